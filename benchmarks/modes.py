"""What vectors, words, and both find: each caption's noun phrase searches for its picture.

    python benchmarks/modes.py --stamps photos --output benchmarks/results/modes.json

``--stamps`` is a folder of captioned pictures, such as Tux Paint's stamps (docs/search.md). The
query of "A red fox." is "red fox". A hit is right if its caption's noun phrase is the query.
"""

import argparse
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.data.document import Document
from rematch.encoding.encoder import Encoder
from rematch.evaluate.metrics import paired_interval
from rematch.files import write_json
from rematch.search.build import build
from rematch.search.index import Index
from rematch.search.retrieval import Mode

MODES: tuple[Mode, ...] = ("vector", "text", "hybrid")


def noun_phrase(caption: str) -> str:
    """A caption without its article and full stop, in lower case.

    >>> noun_phrase("A red fox.")
    'red fox'
    """
    return re.sub(r"^(an?|the|some)\s+", "", caption.strip().rstrip(".!").lower())


def main() -> None:
    """Measure, print and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--stamps", type=Path, required=True, help="folder of captioned pictures")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = ReMatch(args.model)
    corpus = open_corpus(args.stamps)
    captions = {
        document.id: noun_phrase(document.text)
        for document in corpus
        if isinstance(document, Document) and document.text
    }
    queries = sorted(set(captions.values()))
    hits: dict[str, list[bool]] = {}
    with TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "stamps.idx", model, name=args.model)
        build(index, corpus, Encoder(model))
        for mode in MODES:
            results = index.search(list(queries), 1, mode=mode)
            hits[mode] = [
                bool(best and captions.get(best[0].id) == query)
                for query, best in zip(queries, results, strict=True)
            ]
    scores = {mode: round(100 * sum(values) / len(values), 1) for mode, values in hits.items()}
    interval = paired_interval([hits["hybrid"]], [hits["text"]])
    difference = [round(v, 1) for v in (interval.mean, interval.low, interval.high)]
    content = {
        "model": args.model,
        "queries": len(queries),
        "hit@1": scores,
        "hybrid - text": difference,
    }
    Console().print(content)
    if args.output:
        write_json(args.output, content)


if __name__ == "__main__":
    main()
