"""What ``rematch mine`` writes: training data, and a report of what was dropped and why.

Pictures that are not files, such as those inside a parquet file, are written once each to
``NAME-pictures/`` beside the output ``NAME.jsonl``, named by a digest of their content.
"""

import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from rematch.data.images import CheckedPicture, PictureSource, data_url, load_image
from rematch.data.schema import Item
from rematch.encoding.inputs import inspect_picture
from rematch.errors import DataError
from rematch.files import PartialDirectory, replacing, write_text, writing
from rematch.train.candidates import REASONS, Candidate, JudgedQuery, Pool, Rules

_PUBLISHING = "publishing"  # a file in the run's directory: from here on the reports are its own
_EXAMPLES = 8  # per reason, in the report
_PICTURES_SHOWN = 2  # of an input, in the report


@dataclass(frozen=True)
class _Example:
    """A candidate that the report shows, with the query and its first positive."""

    query: Item
    positive: Item
    positive_p_yes: float
    document: Item
    candidate: Candidate


def check_reports(output: Path, work: Path) -> None:
    """Refuse to replace files that have the reports' names, unless this run wrote them.

    Raises:
        DataError: If there are such files.
    """
    for path in (output.with_suffix(".html"), output.with_suffix(".json")):
        if os.path.lexists(path) and not (work / _PUBLISHING).exists():
            raise DataError(
                f"{path}: exists already, and the report would take its place. Choose another "
                "--output, or move the file away."
            )


def write_output(
    output: Path,
    directory: PartialDirectory,
    pool: Pool,
    judged: Sequence[JudgedQuery],
    rules: Rules,
) -> dict[str, Any]:
    """Write training data and report, and remove the directory of the unfinished run.

    Args:
        output: The .jsonl file; the report is written beside it.
        directory: Directory of the unfinished run.
        pool: All queries and documents.
        judged: All queries with their candidates.
        rules: What counted as a hard negative.

    Returns:
        The report, as in the .json file.
    """
    rows = _rows(output, pool, judged)
    report = _report(pool, judged, rules)
    contents = {
        output.with_suffix(".html"): _page(report, _examples(pool, judged)),
        output.with_suffix(".json"): json.dumps(report, indent=2) + "\n",
        output: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    }
    work = directory.path
    for path, text in contents.items():
        write_text(work / path.name, text)
    with writing(output):
        (work / _PUBLISHING).touch()
        for path in contents:  # the training data last
            os.replace(work / path.name, path)
    directory.discard()
    return report


def _rows(output: Path, pool: Pool, judged: Sequence[JudgedQuery]) -> list[dict[str, Any]]:
    """A row of training data for each query and negative; of several positives, the rows take
    turns, and a query with more positives than negatives takes these in turns.
    """
    rows = []
    for result in judged:
        query = pool.queries[result.query]
        positives = pool.positives[result.query]
        negatives = [c for c in result.candidates if c.reason == "kept"]
        count = max(len(positives), len(negatives)) if negatives else 0
        for positive, candidate in islice(zip(cycle(positives), cycle(negatives)), count):
            assert candidate.p_yes is not None
            rows.append(
                {
                    "query": _cell(query, output),
                    "positive": _cell(pool.documents[positive], output),
                    "negative": _cell(pool.documents[candidate.document], output),
                    "cosine": round(candidate.cosine, 4),
                    "p_yes": round(candidate.p_yes, 4),
                    "positive_p_yes": round(result.positive_p_yes, 4),
                }
            )
    return rows


def _report(pool: Pool, judged: Sequence[JudgedQuery], rules: Rules) -> dict[str, Any]:
    counts = Counter(candidate.reason for result in judged for candidate in result.candidates)
    without_negatives = sum(
        all(candidate.reason != "kept" for candidate in result.candidates) for result in judged
    )
    answered_yes = sum(result.positive_p_yes >= rules.yes for result in judged)
    settings = asdict(rules)
    settings["views"] = settings.pop("view")  # the key in the file
    return {
        "queries": len(pool.queries),
        "queries_without_negatives": without_negatives,
        "documents": len(pool.documents),
        "duplicates_in_the_corpus": pool.duplicates,
        "candidates": {reason: counts[reason] for reason in REASONS},
        "negatives": counts["kept"],
        "positives_answered_yes": round(answered_yes / len(judged), 4),
        "rules": settings,
    }


# ---- the page -----------------------------------------------------------------------------------


def _examples(pool: Pool, judged: Sequence[JudgedQuery]) -> dict[str, list[_Example]]:
    """For each reason a few candidates, at most one of each query."""
    examples: dict[str, list[_Example]] = defaultdict(list)
    for result in judged:
        query = pool.queries[result.query]
        positive = pool.documents[pool.positives[result.query][0]]
        for reason in REASONS:
            candidates = [c for c in result.candidates if c.reason == reason]
            if candidates and len(examples[reason]) < _EXAMPLES:
                document = pool.documents[candidates[0].document]
                examples[reason].append(
                    _Example(query, positive, result.positive_p_yes, document, candidates[0])
                )
    return examples


def _page(report: dict[str, Any], examples: dict[str, list[_Example]]) -> str:
    groups = [
        {
            "meaning": meaning,
            "count": report["candidates"][reason],
            "rows": [
                {
                    "query": _display(example.query),
                    "positive": _display(example.positive),
                    "positive_p_yes": example.positive_p_yes,
                    "document": _display(example.document),
                    "p_yes": example.candidate.p_yes,
                    "cosine": example.candidate.cosine,
                }
                for example in examples[reason]
            ],
        }
        for reason, meaning in REASONS.items()
        if examples[reason]
    ]
    source = (files("rematch") / "assets/mining.html.jinja").read_text()
    page: str = jinja2.Template(source, autoescape=True).render(report=report, groups=groups)
    return page


def _display(item: Item) -> dict[str, Any]:
    """An item as the page shows it."""
    pictures = pictures_of_item(item)[:_PICTURES_SHOWN]
    return {"text": item.text, "images": [data_url(load_image(picture)) for picture in pictures]}


# ---- pictures -----------------------------------------------------------------------------------


def pictures_of_item(item: Item) -> Sequence[PictureSource]:
    """The pictures of an item, which may have none, one, or several."""
    if item.image is None:
        return []
    return item.image if isinstance(item.image, list) else [item.image]


def pictures_folder(output: Path) -> Path:
    """The folder for pictures that are not files."""
    return output.with_name(output.stem + "-pictures")


def _cell(item: Item, output: Path) -> str | dict[str, Any]:
    """An item in the form of training data; paths of pictures are relative to the output."""
    paths = [
        os.path.relpath(_as_file(picture, output), output.parent)
        for picture in pictures_of_item(item)
    ]
    if not paths:
        return item.text
    return {"text": item.text, "image": paths} if item.text else {"image": paths}


def _as_file(picture: PictureSource, output: Path) -> Path:
    """The file of a picture; it is written if there is none."""
    if isinstance(picture, Path):
        return picture
    if isinstance(picture, CheckedPicture):
        return picture.path
    if isinstance(picture, Image.Image):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        content = stream.getvalue()
    else:
        content = picture.read_bytes()
    digest, _ = inspect_picture(picture)
    extension = str(Image.open(io.BytesIO(content)).format).lower()
    path = pictures_folder(output) / f"{digest.hex()}.{extension}"
    if not path.exists():
        with replacing(path) as temporary:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(content)
    return path
