"""Loading visual documents: BEIR with pictures, as ViDoRe, VisRAG and MMEB-V2 publish them.

Three configurations: ``queries`` (``query-id``, ``query``, sometimes ``language``), ``corpus``
(``corpus-id``, ``image``) and ``qrels`` (``query-id``, ``corpus-id``, ``score``). Every page of
the corpus is a candidate of every query; a score above 0 makes a page right, and a higher one more
right. Ids are numbers or texts of any length.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from rematch.data.images import PictureSource
from rematch.data.mmeb_v2_table import SetV2, beir_set
from rematch.data.schema import Item, RetrievalTask
from rematch.data.tables import Rows, TablePicture, are_paths, load_table, require_columns
from rematch.errors import DataError
from rematch.files import named


def load_visdoc(
    sets: Iterable[SetV2], directory: Path | None = None, limit: int | None = None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load sets of visual documents.

    Args:
        sets: The sets.
        directory: The folder that holds a folder per set, which may be named like the set or like
            its repository and may be in ``visdoc-tasks``; by default they come from the hub.
        limit: Only load this many queries of each, but all pages.

    Returns:
        The tasks, and for each other set the reason why it is missing.
    """
    tasks, missing = [], {}
    for data_set in sets:
        try:
            source = locate(data_set, directory) if directory else data_set.repository
            tasks.append(load_pages(data_set, source, limit))
        except DataError as error:
            missing[data_set.name] = str(error)
    return tasks, missing


def locate(data_set: SetV2, directory: Path) -> Path:
    """The folder of a set.

    Raises:
        DataError: If there is none.
    """
    names = (data_set.name, data_set.repository.split("/")[-1], data_set.repository)
    folders = ("", f"{data_set.modality}-tasks", f"{data_set.modality}-tasks/data")
    for folder in folders:
        for name in names:
            if (directory / folder / name).is_dir():
                return directory / folder / name
    either = " or ".join(dict.fromkeys(names[:2]))
    raise DataError(f"no folder {either} in {directory} or {folders[1]} there")


def is_beir_with_pictures(folder: Path) -> bool:
    """Whether a folder holds ``corpus``, ``queries`` and ``qrels`` in the hub's form."""
    return all(
        any(folder.glob(f"{config}/*.parquet")) or any(folder.glob(f"{config}/*.jsonl"))
        for config in ("corpus", "queries", "qrels")
    )


def load_beir_folder(folder: Path, limit: int | None = None) -> RetrievalTask:
    """Load a folder that is not one of the benchmark's sets, in their form.

    Raises:
        DataError: As for :func:`load_pages`.
    """
    return load_pages(beir_set(named(folder).name, str(folder)), folder, limit)


def load_pages(data_set: SetV2, source: Path | str, limit: int | None = None) -> RetrievalTask:
    """Load a set.

    Args:
        data_set: The set.
        source: Its folder, or its repository on the hub.
        limit: Only load this many queries.

    Raises:
        DataError: If a table is missing or broken, or names what another one does not have.
    """
    queries, corpus, qrels = (
        load_table(source, config, data_set.split) for config in ("queries", "corpus", "qrels")
    )
    require_columns(queries, ("query-id", "query"), f"{source}, queries")
    require_columns(corpus, ("corpus-id", "image"), f"{source}, corpus")
    require_columns(qrels, ("query-id", "corpus-id", "score"), f"{source}, qrels")
    task = RetrievalTask(
        data_set.name,
        data_set.meta_task,
        [],
        _pages(data_set, source, corpus),
        [],
        ood=data_set.ood,
        answers=[],
        grades=[],
        metric=data_set.metric,
        modality=data_set.modality,
    )
    judgements = _judgements(source, qrels, {d.key: i for i, d in enumerate(task.documents)})
    assert task.answers is not None
    assert task.grades is not None
    unjudged = wrong = 0
    for key, text in _queries(data_set, source, queries):
        if len(task.queries) == limit:
            break
        if key not in judgements:
            unjudged += 1
            continue
        right = {page: grade for page, grade in judgements[key].items() if grade > 0}
        wrong += not right
        task.queries.append(Item(text, None, data_set.instruction, key))
        task.answers.append(list(right))
        task.grades.append(list(right.values()))
    if not task.queries:
        raise DataError(f"{source}: none of its {len(queries)} queries can be evaluated.")
    if unjudged:
        task.notes.append(f"queries left out, because qrels lack them: {unjudged}")
    if wrong:
        task.notes.append(f"queries that have no right page and count as 0: {wrong}")
    return task


def _queries(data_set: SetV2, source: Path | str, queries: Rows) -> Iterable[tuple[str, str]]:
    """Yield id and text of the queries in the set's language."""
    if data_set.language:
        require_columns(queries, ("language",), f"{source}, queries")
    for row in queries:
        if data_set.language in ("", row.get("language")):
            text = row["query"]
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{source}, queries: query {row['query-id']!r} has no text.")
            yield str(row["query-id"]), text


def _pages(data_set: SetV2, source: Path | str, corpus: Rows) -> list[Item]:
    """The pages of a corpus; the first one of those with the same id."""
    pages: dict[str, Item] = {}
    paths = corpus["image"] if are_paths(corpus, "image") else None
    for row, number in enumerate(corpus["corpus-id"]):
        key = str(number)
        if key in pages:
            continue
        image: PictureSource = TablePicture(f"{source}, page {key[:80]}", corpus, row)
        if paths is not None:
            if not paths[row] or not isinstance(source, Path):
                raise DataError(f"{source}, corpus: page {key[:80]!r} has no picture.")
            image = source / paths[row]
        pages[key] = Item("", image, data_set.document_instruction, key)
    if not pages:
        raise DataError(f"{source}, corpus: holds no page.")
    return list(pages.values())


def _judgements(
    source: Path | str, qrels: Rows, numbers: dict[str, int]
) -> dict[str, dict[int, float]]:
    """For each query its judged pages with their scores, the highest of repeated ones."""
    judgements: dict[str, dict[int, float]] = {}
    for row in qrels:
        query, page, score = str(row["query-id"]), str(row["corpus-id"]), row["score"]
        if page not in numbers:
            raise DataError(
                f"{source}, qrels: page {page[:80]!r} is not in the corpus. Download the set "
                "again."
            )
        try:
            grade = float(score)
        except (TypeError, ValueError):
            grade = math.nan
        if not math.isfinite(grade):
            raise DataError(f"{source}, qrels: score {score!r} of query {query!r} is no number.")
        pages = judgements.setdefault(query, {})
        pages[numbers[page]] = max(grade, pages.get(numbers[page], -math.inf))
    return judgements
