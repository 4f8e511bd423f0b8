"""Own evaluation data, text and pictures: rows with positives and candidates, or queries, corpus
and qrels (BEIR).

- ``FILE.jsonl`` (or ``.parquet``): rows of ``query``, ``positives`` and perhaps ``candidates``
  (wrong ones; without them every document of the file is a candidate).
- A folder in BEIR's form: ``corpus.jsonl``, ``queries.jsonl`` (``_id``, ``title``, ``text``,
  ``image``) and ``qrels/test.tsv`` (query-id, corpus-id, score).
- ``FILE.yaml``: a list of such data sets with names and instructions (:class:`OwnTask`).
"""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rematch.data.pairs import item, rows
from rematch.data.schema import Item, RetrievalTask
from rematch.errors import DataError


class OwnTask(BaseModel):
    """One entry of ``tasks`` in a YAML file; paths are relative to it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    data: Path = Field(description="a .jsonl or .parquet file of rows, or a folder in BEIR's form")
    instruction: str = Field("", description="before every query")
    document_instruction: str | None = Field(
        None, description="before every document, instead of ours for pictures"
    )
    meta_task: str = Field("own", description="what mean it counts in")


class _Benchmark(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tasks: list[OwnTask] = Field(min_length=1)


def read_own(source: Path, limit: int | None = None) -> list[RetrievalTask]:
    """The tasks of own data.

    Args:
        source: A .yaml, .jsonl or .parquet file, or a folder in BEIR's form.
        limit: Only the first so many queries of each.

    Raises:
        DataError: If something is missing or does not parse; the message names file and row.
    """
    if source.suffix not in (".yaml", ".yml"):
        return [_read(OwnTask(name=source.stem, data=source), limit)]
    try:
        content = yaml.safe_load(source.read_text())
        given = _Benchmark.model_validate(content)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}). Check the path.") from None
    except yaml.YAMLError as error:
        raise DataError(f"{source}: not valid YAML ({str(error).splitlines()[0]}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{source}: {place or 'the file'}: {first['msg']}. It should be 'tasks:' with a list "
            "of name, data and, if wanted, instruction, document_instruction, meta_task."
        ) from None
    return [
        _read(task.model_copy(update={"data": source.parent / task.data}), limit)
        for task in given.tasks
    ]


def _read(form: OwnTask, limit: int | None) -> RetrievalTask:
    task = _read_beir(form, limit) if form.data.is_dir() else _read_rows(form, limit)
    if not task.queries:
        raise DataError(f"{form.data}: holds no queries.")
    return task


def _read_rows(form: OwnTask, limit: int | None) -> RetrievalTask:
    task = RetrievalTask(form.name, form.meta_task, [], [], [], answers=[])
    assert task.answers is not None
    known: dict[str, int] = {}
    given: list[list[int] | None] = []

    def numbers(values: Any, row: int, column: str) -> list[int]:
        if not isinstance(values, list):
            raise DataError(
                f"{form.data}:{row}: {column} = {values!r} is no list. Put brackets around it."
            )
        return list(dict.fromkeys(_number(form, v, row, column, task, known) for v in values))

    for row, record in rows(form.data):
        if not isinstance(record, dict) or not {"query", "positives"} <= record.keys():
            seen = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{form.data}:{row}: needs 'query' and 'positives' (and may have 'candidates'); "
                f"has {seen}."
            )
        right = numbers(record["positives"], row, "positives")
        if not right:
            raise DataError(
                f"{form.data}:{row}: no positives, so no answer can be right. Add one or delete "
                "the row."
            )
        wrong = record.get("candidates")
        given.append(None if wrong is None else numbers(wrong, row, "candidates"))
        task.queries.append(_query(form, item(record["query"], form.data, row, "query")))
        task.answers.append(right)
    task.queries, task.answers, given = task.queries[:limit], task.answers[:limit], given[:limit]
    if any(own is not None for own in given):
        everything = list(range(len(task.documents)))
        task.candidates = [everything if own is None else own for own in given]
    return task


def _number(
    form: OwnTask, value: Any, row: int, column: str, task: RetrievalTask, known: dict[str, int]
) -> int:
    found = item(value, form.data, row, column)
    key = f"{found.image or ''}{':' if found.image and found.text else ''}{found.text}"
    if key not in known:
        known[key] = len(task.documents)
        task.documents.append(_document(form, replace(found, key=key)))
    return known[key]


def _read_beir(form: OwnTask, limit: int | None) -> RetrievalTask:
    folder = form.data
    task = RetrievalTask(form.name, form.meta_task, [], [], [], answers=[])
    assert task.answers is not None
    places: dict[str, int] = {}
    for key, found in _beir_items(folder / "corpus.jsonl", "document"):
        places[key] = len(task.documents)
        task.documents.append(_document(form, replace(found, key=key)))
    right: dict[str, list[int]] = {}
    for row, (query, document, score) in _qrels(folder / "qrels" / "test.tsv"):
        if document not in places:
            raise DataError(
                f"{folder / 'qrels' / 'test.tsv'}:{row}: document {document!r} is not in "
                "corpus.jsonl."
            )
        if score > 0:
            right.setdefault(query, []).append(places[document])
    for key, found in _beir_items(folder / "queries.jsonl", "query"):
        if key in right and len(task.queries) != limit:
            task.queries.append(_query(form, found))
            task.answers.append(right[key])
    return task


def _beir_items(path: Path, column: str) -> Iterator[tuple[str, Item]]:
    for row, record in rows(path):
        if not isinstance(record, dict) or "_id" not in record:
            raise DataError(f"{path}:{row}: has no '_id', so qrels cannot name it.")
        text = " ".join(part for part in (record.get("title"), record.get("text")) if part)
        value = {"text": text, "image": record.get("image") or []}
        yield str(record["_id"]), item(value, path, row, column)


def _qrels(path: Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. BEIR's form has qrels/test.tsv beside corpus.jsonl and "
            "queries.jsonl."
        )
    with path.open(newline="") as file:
        for row, cells in enumerate(csv.reader(file, delimiter="\t"), 1):
            if not cells or (row == 1 and cells[0] == "query-id"):
                continue
            try:
                query, document, score = cells
                yield row, (query, document, float(score))
            except ValueError:
                raise DataError(
                    f"{path}:{row}: {cells} is not query-id, corpus-id, score between tabs."
                ) from None


def _query(form: OwnTask, found: Item) -> Item:
    return replace(found, instruction=form.instruction)


def _document(form: OwnTask, found: Item) -> Item:
    return (
        found
        if form.document_instruction is None
        else replace(found, instruction=form.document_instruction)
    )
