"""``rematch mine``: hard negatives for own data, with false negatives taken out by the matching
head.

The documents nearest to a query are its hardest negatives, and often they are right answers that
nobody labelled. The same weights that ranked them can judge them: a candidate that the model says
Yes to, or nearly as much as to the labelled positive, is left out.

Pictures that are not files, such as those inside a parquet file, are written to ``NAME-pictures/``
beside the output ``NAME.jsonl``, each once, named by a digest of its content.
"""

import io
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sentence_transformers.util import dot_score, semantic_search
from xxhash import xxh3_128

from rematch.data.corpus import documents_of
from rematch.data.images import Checked, Picture, data_url, load_image
from rematch.data.pairs import read_triplets
from rematch.data.schema import Item
from rematch.encoding.fingerprint import model_fingerprint
from rematch.encoding.inputs import content_key, inspect_picture
from rematch.errors import DataError
from rematch.files import write_json
from rematch.matching import View
from rematch.model import ReMatch

QUERIES_AT_ONCE, INPUTS_AT_ONCE, SAMPLES = 64, 2048, 8
REASONS = {
    "kept": "kept as hard negatives",
    "surplus": "left over: the query has its number of negatives",
    "positive": "the query's own positive",
    "query": "identical to the query",
    "yes": "false negative: the matching head says Yes",
    "margin": "false negative: P(yes) comes too near to the positive's",
}


@dataclass(frozen=True)
class Rules:
    """What is taken for a hard negative.

    Attributes:
        negatives: At most so many for each query, the hardest.
        candidates: So many of the nearest documents are looked at.
        yes: A candidate with this P(yes) or more is taken for a right answer.
        margin: And so is one whose P(yes) is not at least this far below that of the query's least
            likely positive.
        views: What the matching head reads of query and document.
    """

    negatives: int = 4
    candidates: int = 30
    yes: float = 0.5
    margin: float = 0.0
    views: View = View.FEAT_FEAT


def mine(
    model: ReMatch,
    data: Path,
    output: Path,
    rules: Rules = Rules(),
    corpus: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Find hard negatives; write them as training data, and beside them a report of what was
    dropped and why.

    A run that was cut off goes on where it stood when it is started again with the same arguments.

    Args:
        model: Encodes and judges.
        data: A .jsonl or .parquet file with ``query`` and ``positive``, as for training.
        output: A .jsonl file: a row per query and negative with ``cosine``, ``p_yes`` and
            ``positive_p_yes``. The report is written beside it as .html and .json.
        rules: What is taken for a hard negative.
        corpus: Further documents: a folder of pictures or a file. Those of ``data`` always belong
            to it.
        progress: Told what is being done, how much of it is done, and how much there is.

    Returns:
        The report.

    Raises:
        DataError: If a file cannot be read, the output exists, or another run's unfinished work
            lies in its place.
        ImageError: If a picture cannot be read.
    """
    if output.exists():
        raise DataError(f"{output}: exists already. Choose another --output or remove it.")
    if output.suffix != ".jsonl":
        raise DataError(f"{output}: the output is JSON lines; give it the ending .jsonl.")
    if (pictures := _pictures_of(output)).exists() and not pictures.is_dir():
        raise DataError(
            f"{pictures}: a file, where a folder for pictures is needed. Choose another --output."
        )
    triplets = read_triplets(data)
    queries: dict[str, Item] = {}
    positives: dict[str, dict[str, None]] = defaultdict(dict)
    documents: dict[str, Item] = {}
    for triplet in triplets:
        query, positive = identity(triplet.query), identity(triplet.positive)
        queries.setdefault(query, triplet.query)
        documents.setdefault(positive, triplet.positive)
        positives[query][positive] = None
        if triplet.negative is not None:
            documents.setdefault(identity(triplet.negative), triplet.negative)
    further = documents_of(corpus) if corpus else []
    for document in further:
        documents.setdefault(identity(document), document)
    given = len(triplets) + sum(t.negative is not None for t in triplets) + len(further)

    work = output.with_name(output.name + ".partial")
    _claim(work, model, rules, [*queries, "", *documents])
    instruct = model.backbone.document_instructions
    asked = [item.as_input() for item in queries.values()]
    told = [item.as_input(instruct) for item in documents.values()]
    with model.truncate_embeddings(None):  # the matching head reads whole vectors
        query_vectors = _encode(model.encode_query, asked, work / "queries", progress)
        vectors = _encode(model.encode_document, told, work / "documents", progress)
    keys, places = list(queries), {key: i for i, key in enumerate(documents)}
    own = [[places[key] for key in positives[query]] for query in keys]
    names = list(documents)
    for start in range(0, len(keys), QUERIES_AT_ONCE):
        progress("judging", start, len(keys))
        file = work / f"block-{start:09}.json"
        if file.exists():
            continue
        block = range(start, min(start + QUERIES_AT_ONCE, len(keys)))
        near = _nearest(
            query_vectors[block.start : block.stop],
            vectors,
            rules.candidates + max(map(len, own)) + 1,
        )
        found = []
        for i, candidates in zip(block, near, strict=True):
            known = {j: "query" for j, _ in candidates if names[j] == keys[i]} | dict.fromkeys(
                own[i], "positive"
            )
            open_ones = [(j, c) for j, c in candidates if j not in known][: rules.candidates]
            dropped = [(j, c, None, known[j]) for j, c in candidates if j in known]
            found.append((i, open_ones, dropped))
        judged = _judge(model, found, own, (asked, told), (query_vectors, vectors), rules.views)
        rows = [_sort_out(*one, *scores, rules) for one, scores in zip(found, judged, strict=True)]
        write_json(file, rows)
    progress("judging", len(keys), len(keys))
    blocks = [
        row for file in sorted(work.glob("block-*.json")) for row in json.loads(file.read_text())
    ]
    return _write(
        output, work, blocks, list(queries.values()), list(documents.values()), own, given, rules
    )


def identity(item: Item) -> str:
    """Equal for items with the same text and the same pictures, byte for byte, wherever these lie.

    Raises:
        ImageError: If a picture cannot be read.
    """
    return content_key(item.as_input(instruction=False)).hex()


def _claim(work: Path, model: ReMatch, rules: Rules, keys: list[str]) -> None:
    """Take the directory of unfinished work, if it is this very run's."""
    settings = {
        "rules": asdict(rules),
        "contents": xxh3_128("".join(keys).encode()).hexdigest(),
        "model": model_fingerprint(model),
        "matching": model.backbone.matching,
        "document_instructions": model.backbone.document_instructions,
    }
    file = work / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise DataError(
            f"{work}: unfinished work of another run (model, data or options differ). Finish it "
            "with its own arguments, choose another --output, or remove the directory."
        )
    write_json(file, settings)


def _encode(
    encode: Callable[..., Any],
    inputs: list[Any],
    files: Path,
    progress: Callable[[str, int, int], None],
) -> NDArray[np.float32]:
    found = []
    for start in range(0, len(inputs), INPUTS_AT_ONCE):
        progress(f"encoding {files.name}", start, len(inputs))
        file = files.with_name(f"{files.name}-{start:09}.npy")
        if not file.exists():
            scratch = file.with_suffix(".tmp")
            with scratch.open("wb") as stream:
                np.save(
                    stream, encode(inputs[start : start + INPUTS_AT_ONCE], show_progress_bar=False)
                )
            os.replace(scratch, file)
        found.append(np.load(file))
    progress(f"encoding {files.name}", len(inputs), len(inputs))
    vectors: NDArray[np.float32] = np.concatenate(found)
    return vectors


def _nearest(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], count: int
) -> list[list[tuple[int, float]]]:
    """For each query (document, cosine) in descending order."""
    found = semantic_search(
        torch.from_numpy(queries),
        torch.from_numpy(vectors),
        top_k=min(count, len(vectors)),
        score_function=dot_score,
    )
    return [[(int(hit["corpus_id"]), float(hit["score"])) for hit in hits] for hits in found]


def _judge(
    model: ReMatch,
    found: Sequence[tuple[int, list[tuple[int, float]], Any]],
    own: list[list[int]],
    inputs: tuple[list[Any], list[Any]],
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]],
    view: View,
) -> list[tuple[float, list[float]]]:
    """For each query the P(yes) of its least likely positive, and of its candidates."""
    queries = inputs[0] if view.query == "raw" else vectors[0]
    documents = inputs[1] if view.document == "raw" else vectors[1]
    lists = [[documents[j] for j in (*own[i], *(j for j, _ in near))] for i, near, _ in found]
    margins = model.score_lists([queries[i] for i, _, _ in found], lists, view)
    judged = []
    for (i, _, _), query_margins in zip(found, margins, strict=True):
        p_yes = torch.from_numpy(query_margins).sigmoid().tolist()
        positives = len(own[i])
        judged.append((min(p_yes[:positives]), p_yes[positives:]))
    return judged


def _sort_out(
    query: int,
    candidates: list[tuple[int, float]],
    dropped: list[tuple[int, float, None, str]],
    positive: float,
    scores: list[float],
    rules: Rules,
) -> dict[str, Any]:
    """What becomes of each candidate: (document, cosine, P(yes), reason)."""
    rows: list[tuple[int, float, float | None, str]] = list(dropped)
    kept = 0
    for (document, cosine), p_yes in zip(candidates, scores, strict=True):
        if p_yes >= rules.yes:
            reason = "yes"
        elif p_yes > positive - rules.margin:
            reason = "margin"
        else:
            reason = "kept" if kept < rules.negatives else "surplus"
            kept += 1
        rows.append((document, cosine, p_yes, reason))
    return {"query": query, "positive_p_yes": positive, "candidates": rows}


# ---- what is written ----------------------------------------------------------------------------


def _write(
    output: Path,
    work: Path,
    blocks: list[dict[str, Any]],
    queries: list[Item],
    documents: list[Item],
    own: list[list[int]],
    given: int,
    rules: Rules,
) -> dict[str, Any]:
    counts: Counter[str] = Counter(reason for row in blocks for *_, reason in row["candidates"])
    samples: dict[str, list[Any]] = defaultdict(list)
    lines, without = [], 0
    for row in blocks:
        query, positive = queries[row["query"]], documents[own[row["query"]][0]]
        chosen = [c for c in row["candidates"] if c[3] == "kept"]
        without += not chosen
        for document, cosine, p_yes, _ in chosen:
            line = {"query": query, "positive": positive, "negative": documents[document]}
            figures = {"cosine": round(cosine, 4), "p_yes": round(p_yes, 4)}
            figures["positive_p_yes"] = round(row["positive_p_yes"], 4)
            cells = {name: _cell(item, output, work) for name, item in line.items()} | figures
            lines.append(json.dumps(cells, ensure_ascii=False))
        shown = set()
        for document, cosine, p_yes, reason in row["candidates"]:
            if (
                len(samples[reason]) < SAMPLES and reason not in shown
            ):  # one of a kind from each query
                shown.add(reason)
                samples[reason].append(
                    (query, positive, row["positive_p_yes"], documents[document], cosine, p_yes)
                )
    answered = [row["positive_p_yes"] >= rules.yes for row in blocks]
    report = {
        "queries": len(queries),
        "queries_without_negatives": without,
        "documents": len(documents),
        "duplicates_in_the_corpus": given - len(documents),
        "candidates": {reason: counts[reason] for reason in REASONS},
        "negatives": len(lines),
        "positives_answered_yes": round(sum(answered) / len(answered), 4),
        "rules": asdict(rules),
    }
    for path, text in (
        (output.with_suffix(".html"), _page(report, samples)),
        (output.with_suffix(".json"), json.dumps(report, indent=2) + "\n"),
        (output, "".join(line + "\n" for line in lines)),
    ):
        scratch = work / path.name
        scratch.write_text(text)
        os.replace(scratch, path)
    shutil.rmtree(work)
    return report


def _pictures(item: Item) -> Sequence[Picture]:
    if item.image is None:
        return []
    return item.image if isinstance(item.image, list) else [item.image]


def _cell(item: Item, output: Path, work: Path) -> str | dict[str, Any]:
    """An item as training data has it, pictures relative to the file."""
    names = [
        os.path.relpath(_as_file(picture, output, work), output.parent)
        for picture in _pictures(item)
    ]
    if not names:
        return item.text
    return {"text": item.text, "image": names} if item.text else {"image": names}


def _as_file(picture: Picture, output: Path, work: Path) -> Path:
    """Where a picture lies; one that is no file becomes one in the output's folder of pictures."""
    if isinstance(picture, Path | Checked):
        return picture if isinstance(picture, Path) else picture.path
    digest = inspect_picture(picture).digest
    if isinstance(picture, Image.Image):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        content = stream.getvalue()
    else:
        content = picture.read_bytes()
    path = (
        _pictures_of(output)
        / f"{digest.hex()}.{str(Image.open(io.BytesIO(content)).format).lower()}"
    )
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        scratch = work / path.name
        scratch.write_bytes(content)
        os.replace(scratch, path)
    return path


def _pictures_of(output: Path) -> Path:
    return output.with_name(output.stem + "-pictures")


def _page(report: dict[str, Any], samples: dict[str, list[Any]]) -> str:
    def shown(item: Item) -> dict[str, Any]:
        return {
            "text": item.text,
            "images": [data_url(load_image(picture)) for picture in _pictures(item)[:2]],
        }

    groups = [
        (
            meaning,
            report["candidates"][reason],
            [
                (shown(q), shown(p), at, shown(d), cosine, p_yes)
                for q, p, at, d, cosine, p_yes in samples[reason]
            ],
        )
        for reason, meaning in REASONS.items()
        if samples[reason]
    ]
    template = jinja2.Template(
        (files("rematch") / "assets/mining.html.jinja").read_text(), autoescape=True
    )
    page: str = template.render(report=report, groups=groups)
    return page
