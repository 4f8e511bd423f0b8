"""``rematch mine``: hard negatives for training data, without false negatives.

1. Queries and documents are encoded.
2. The nearest documents of each query are judged by the matching head
   (:mod:`rematch.train.candidates`).
3. Training data and a report are written (:mod:`rematch.train.mine_output`).

An interrupted run resumes: its vectors and judgements are in ``OUTPUT.partial``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from xxhash import xxh3_128

from rematch.console import say
from rematch.data.corpus import documents_of
from rematch.data.schema import Item
from rematch.data.triplets import load_triplets
from rematch.encoding.encoder import Encoder
from rematch.encoding.fingerprint import model_fingerprint
from rematch.encoding.inputs import content_key
from rematch.encoding.vector_store import VectorStore
from rematch.errors import DataError, StorageError, first_line
from rematch.files import PartialDirectory, read_regular, write_json
from rematch.model import ReMatch
from rematch.train.candidates import REASONS, Inputs, JudgedQuery, Pool, Rules, judge
from rematch.train.mine_output import check_reports, pictures_folder, write_output

QUERIES_PER_BLOCK = 64
_LARGEST_FILE = 256 << 20  # bytes, of those in the directory of an unfinished run

Progress = Callable[[str, int, int], None]
_DEFAULTS = Rules()


def mine(
    model: ReMatch,
    data: Path,
    output: Path,
    rules: Rules = _DEFAULTS,
    corpus: Path | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Find hard negatives, and write them as training data with a report.

    An interrupted run with the same model, data and rules resumes.

    Args:
        model: Model that encodes and judges.
        data: A .jsonl or .parquet file with ``query`` and ``positive``, as for training.
        output: A .jsonl file: a row per query and negative with ``cosine``, ``p_yes`` and
            ``positive_p_yes``, that of the query's least likely positive. Rows take turns in
            the query's positives, and each positive has a row. The report is written beside it
            as .html and .json, and pictures that are not files to the folder ``NAME-pictures``.
        rules: What counts as a hard negative.
        corpus: Further documents besides those of ``data``: a folder of pictures or a file.
        progress: Called with the name of the stage, the amount of work done, and the total.

    Returns:
        The report.

    Raises:
        DataError: If a file cannot be read, the output exists, or an unfinished run with other
            settings is in the way.
        StorageError: If ``OUTPUT.partial`` is damaged, not from an earlier run or in use, or a
            file cannot be written.
        ImageError: If a picture cannot be read.
    """
    _check_output(output)
    with PartialDirectory(output) as directory:
        try:
            check_reports(output, directory.path)
            pool = _load_pool(data, corpus)
            _claim(directory, model, pool, rules)
            judged = _judge(model, pool, directory.path, rules, progress)
            return write_output(output, directory, pool, judged, rules)
        except BaseException:
            if directory.path.exists() and directory.is_empty():
                directory.discard()
            raise


def _check_output(output: Path) -> None:
    if output.exists():
        raise DataError(f"{output}: exists already. Choose another --output or remove it.")
    if output.suffix != ".jsonl":
        raise DataError(f"{output}: the output is JSON lines; give it the extension .jsonl.")
    pictures = pictures_folder(output)
    if pictures.exists() and not pictures.is_dir():
        raise DataError(
            f"{pictures}: is a file, but pictures are written to a folder of this name. Choose "
            "another --output."
        )


def _load_pool(data: Path, corpus: Path | None) -> Pool:
    """The distinct queries and documents of the data and the corpus."""
    queries: dict[str, Item] = {}
    documents: dict[str, Item] = {}
    positives: dict[str, dict[str, None]] = defaultdict(dict)  # distinct, in order
    triplets = load_triplets(data)
    for triplet in triplets:
        query, positive = _content_key(triplet.query), _content_key(triplet.positive)
        queries.setdefault(query, triplet.query)
        documents.setdefault(positive, triplet.positive)
        positives[query][positive] = None
        if triplet.negative is not None:
            documents.setdefault(_content_key(triplet.negative), triplet.negative)
    further = documents_of(corpus) if corpus else []
    for document in further:
        documents.setdefault(_content_key(document), document)
    indices = {key: index for index, key in enumerate(documents)}
    negatives = sum(triplet.negative is not None for triplet in triplets)
    return Pool(
        list(queries.values()),
        list(documents.values()),
        positives=[[indices[positive] for positive in positives[query]] for query in queries],
        twins=[indices.get(query) for query in queries],
        duplicates=len(triplets) + negatives + len(further) - len(documents),
        digest=xxh3_128("".join([*queries, "", *documents]).encode()).hexdigest(),
    )


def _content_key(item: Item) -> str:
    """A digest that items share if they have the same text and pictures, whatever instruction."""
    return content_key({"text": item.text, "image": item.image}).hex()


def _claim(directory: PartialDirectory, model: ReMatch, pool: Pool, rules: Rules) -> None:
    """Write into the directory whose run it is, or check that it belongs to this run."""
    work = directory.path
    settings = {
        "rules": asdict(rules),
        "contents": pool.digest,
        "model": model_fingerprint(model),
        "matching": model.backbone.matching,
        "joint": model.backbone.joint,
        "document_instructions": model.backbone.document_instructions,
    }
    file = work / "settings.json"
    if directory.is_empty():
        write_json(file, settings)
    try:
        previous = json.loads(read_regular(file, _LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{work}: holds an unfinished run, but its settings.json cannot be read "
            f"({first_line(error)}), so nothing says which run it is. Restore settings.json, "
            "choose another --output, or remove the directory."
        ) from None
    if previous != settings:
        raise DataError(
            f"{work}: holds an unfinished run with another model, data or options. Finish it with "
            "its own arguments, choose another --output, or remove the directory."
        )


def _judge(
    model: ReMatch, pool: Pool, work: Path, rules: Rules, progress: Progress
) -> list[JudgedQuery]:
    """Encode, then judge the candidates of each query; blocks that were judged before are read."""
    inputs = _encode(model, pool, work, progress)
    judged: list[JudgedQuery] = []
    count = len(pool.queries)
    for start in range(0, count, QUERIES_PER_BLOCK):
        progress("judging", start, count)
        file = work / f"block-{start:09}.json"
        block = range(start, min(start + QUERIES_PER_BLOCK, count))
        if not file.exists():
            write_json(file, [asdict(q) for q in judge(model, pool, inputs, block, rules)])
        judged += _read_block(file, block, len(pool.documents))
    progress("judging", count, count)
    return judged


def _encode(model: ReMatch, pool: Pool, work: Path, progress: Progress) -> Inputs:
    """Embed the pool; what an interrupted run has embedded comes from its vector store."""
    instruct = model.backbone.document_instructions
    queries = [item.as_input() for item in pool.queries]
    documents = [item.as_input(instruct) for item in pool.documents]
    with model.truncate_embeddings(None):  # the matching head reads whole vectors
        store = VectorStore(work, model, say)

        def vectors(name: str, inputs: Sequence[Any], task: str) -> NDArray[np.float32]:
            report = partial(progress, f"encoding {name}")
            report(0, len(inputs))
            encoded = Encoder(model, store, progress=report).encode(inputs, task)
            report(len(inputs), len(inputs))
            return encoded

        embeddings = (
            vectors("queries", queries, "query"),
            vectors("documents", documents, "document"),
        )
    store.close()
    return Inputs(queries, documents, *embeddings)


def _read_block(file: Path, block: range, documents: int) -> list[JudgedQuery]:
    """The judged queries of a block, from its file.

    Args:
        file: The file.
        block: Indices of the block's queries.
        documents: Number of documents of the pool.

    Raises:
        StorageError: If the file is damaged.
    """
    try:
        content = json.loads(read_regular(file, _LARGEST_FILE))
        judged = TypeAdapter(list[JudgedQuery]).validate_python(content)
        candidates = [candidate for result in judged for candidate in result.candidates]
        if (
            [result.query for result in judged] != list(block)
            or any(candidate.reason not in REASONS for candidate in candidates)
            or any(not 0 <= candidate.document < documents for candidate in candidates)
        ):
            raise ValueError("it is not of these queries")
        return judged
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{file}: cannot be read ({first_line(error)}). Remove it; its queries are then "
            "judged again."
        ) from None
