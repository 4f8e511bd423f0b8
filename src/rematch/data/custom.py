"""Custom evaluation data of texts and pictures.

- ``FILE.jsonl`` (or ``.parquet``): rows of ``query``, ``positives`` and optionally ``candidates``
  (wrong documents; without them every document of the file is a candidate).
- A folder in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl`` (``_id``, ``title``, ``text``,
  ``image``) and ``qrels/test.tsv`` (query-id, corpus-id, score).
- ``FILE.yaml``: a list of such data sets with names and instructions (:class:`CustomTask`).
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rematch.data.rows import is_text, load_rows, parse_item
from rematch.data.schema import Item, RetrievalTask
from rematch.errors import DataError, shortened
from rematch.files import named, read_text, read_yaml


class CustomTask(BaseModel):
    """An entry of ``tasks`` in a YAML file; paths are relative to the file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^/\x00-\x1f]+$")
    data: Path = Field(
        description="a .jsonl or .parquet file of rows, or a folder in BEIR's layout"
    )
    instruction: str | None = Field(
        None, description="text before every query, instead of the one that a search would choose"
    )
    document_instruction: str | None = Field(
        None, description="text before every document, instead of the default for pictures"
    )
    meta_task: str = Field("own", description="group whose mean the task counts in")


class _TaskList(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tasks: list[CustomTask] = Field(min_length=1)


def load_custom(
    source: Path, limit: int | None = None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load the tasks of custom evaluation data.

    Args:
        source: A .yaml, .jsonl or .parquet file, or a folder in BEIR's layout.
        limit: Only load this many queries of each task.

    Returns:
        The tasks, and for each other one of a .yaml file the reason why it cannot be loaded.

    Raises:
        DataError: If something is missing or does not parse; the message names file and row.
    """
    if source.suffix not in (".yaml", ".yml"):
        return [_load_task(CustomTask(name=named(source).stem, data=source), limit)], {}
    content = read_yaml(source)
    try:
        entries = _TaskList.model_validate(content).tasks
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{source}: {place or 'the file'}: {first['msg']}. It should be 'tasks:' with a list "
            "of name, data and, optionally, instruction, document_instruction, meta_task."
        ) from None
    ((name, count),) = Counter(entry.name for entry in entries).most_common(1)
    if count > 1:
        raise DataError(
            f"{source}: {count} tasks have the name {shortened(name)}, so only one's scores would "
            "be kept. Give each task another name."
        )
    tasks, left_out = [], {}
    for entry in entries:
        custom = entry.model_copy(update={"data": source.parent / entry.data})
        try:
            tasks.append(_load_task(custom, limit))
        except DataError as error:
            left_out[entry.name] = str(error)
    return tasks, left_out


def _load_task(custom: CustomTask, limit: int | None) -> RetrievalTask:
    task = _load_beir(custom, limit) if custom.data.is_dir() else _load_file(custom, limit)
    if not task.queries:
        raise DataError(f"{custom.data}: holds no queries.")
    task.chooses_instructions = custom.instruction is None
    return task


def _load_file(custom: CustomTask, limit: int | None) -> RetrievalTask:
    """Load a file of rows; all its documents, but only ``limit`` queries."""
    task = RetrievalTask(custom.name, custom.meta_task, [], [], [], answers=[])
    answers: list[list[int]] = []
    candidates: list[list[int] | None] = []
    document_numbers: dict[str, int] = {}

    def numbers(values: Any, row: int, column: str) -> list[int]:
        """The document numbers of a cell; documents are added to the task as they appear."""
        if not isinstance(values, list):
            raise DataError(
                f"{custom.data}:{row}: {column} = {shortened(values)} is not a list. Put brackets "
                "around it."
            )
        cell: dict[int, None] = {}
        for value in values:
            item = parse_item(value, custom.data, row, column)
            separator = ":" if item.image and item.text else ""
            key = f"{item.image or ''}{separator}{item.text}"
            if key not in document_numbers:
                document_numbers[key] = len(task.documents)
                task.documents.append(_document(custom, replace(item, key=key)))
            cell[document_numbers[key]] = None
        return list(cell)

    for row, record in load_rows(custom.data):
        if not isinstance(record, dict) or not {"query", "positives"} <= record.keys():
            content = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{custom.data}:{row}: needs 'query' and 'positives' (and may have "
                f"'candidates'); has {content}."
            )
        positives = numbers(record["positives"], row, "positives")
        if not positives:
            raise DataError(
                f"{custom.data}:{row}: no positives, so no answer can be right. Add one or delete "
                "the row."
            )
        wrong = record.get("candidates")
        candidates.append(None if wrong is None else numbers(wrong, row, "candidates"))
        task.queries.append(_query(custom, parse_item(record["query"], custom.data, row, "query")))
        answers.append(positives)
    task.queries, task.answers = task.queries[:limit], list(answers[:limit])
    candidates = candidates[:limit]
    if any(row_candidates is not None for row_candidates in candidates):
        every_document = list(range(len(task.documents)))
        task.candidates = [
            every_document if row_candidates is None else row_candidates
            for row_candidates in candidates
        ]
    return task


def _load_beir(custom: CustomTask, limit: int | None) -> RetrievalTask:
    """Load a folder in BEIR's layout; queries without a positive are left out."""
    folder = custom.data
    task = RetrievalTask(custom.name, custom.meta_task, [], [], [], answers=[])
    assert task.answers is not None
    document_numbers: dict[str, int] = {}
    for key, item in _beir_items(folder / "corpus.jsonl", "document"):
        document_numbers[key] = len(task.documents)
        task.documents.append(_document(custom, replace(item, key=key)))
    positives: dict[str, list[int]] = {}
    qrels = folder / "qrels" / "test.tsv"
    for row, (query, document, score) in _qrels(qrels):
        if document not in document_numbers:
            raise DataError(f"{qrels}:{row}: document {document!r} is not in corpus.jsonl.")
        if score > 0:
            positives.setdefault(query, []).append(document_numbers[document])
    for key, item in _beir_items(folder / "queries.jsonl", "query"):
        if key in positives and len(task.queries) != limit:
            task.queries.append(_query(custom, item))
            task.answers.append(positives[key])
    return task


def _beir_items(path: Path, column: str) -> Iterator[tuple[str, Item]]:
    """Yield the id and the item of every row."""
    for row, record in load_rows(path):
        if not isinstance(record, dict) or "_id" not in record:
            raise DataError(f"{path}:{row}: has no '_id', so qrels cannot refer to it.")
        parts = [record[name] for name in ("title", "text") if record.get(name)]
        if not all(map(is_text, parts)) or not isinstance(record["_id"], str | int):
            raise DataError(
                f"{path}:{row}: {shortened(record)} has a title, text or _id that is not text. "
                "Fix the row."
            )
        text = " ".join(parts)
        value = {"text": text, "image": record.get("image") or []}
        yield str(record["_id"]), parse_item(value, path, row, column)


def _qrels(path: Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
    """Yield the row number and (query id, document id, score) of every judgement."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. BEIR's layout has qrels/test.tsv beside corpus.jsonl and "
            "queries.jsonl."
        )
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    row = 0
    try:
        for row, cells in enumerate(rows, 1):
            if cells and (row > 1 or cells[0] != "query-id"):
                yield row, _judgement(path, row, cells)
    except csv.Error as error:
        raise DataError(f"{path}:{row + 1}: cannot be read ({error}). Fix the row.") from None


def _judgement(path: Path, row: int, cells: list[str]) -> tuple[str, str, float]:
    """The (query id, document id, score) of a row.

    Raises:
        DataError: If it has other cells.
    """
    try:
        query, document, score = cells
        number = float(score)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{path}:{row}: {shortened(cells)} is not query-id, corpus-id, score between tabs."
        )
    return query, document, number


def _query(custom: CustomTask, item: Item) -> Item:
    return replace(item, instruction=custom.instruction or "")


def _document(custom: CustomTask, item: Item) -> Item:
    if custom.document_instruction is None:
        return item
    return replace(item, instruction=custom.document_instruction)
