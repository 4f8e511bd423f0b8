"""Loading MMEB in its three layouts, from disk or from the hub.

- MMEB-train: ``<Config>/original-*.parquet`` (or ``diverse_instruction-*``) with ``qry,
  qry_image_path, pos_text, pos_image_path`` and optionally ``neg_text, neg_image_path``.
- MMEB-eval: ``<Config>/test-*.parquet`` with ``qry_text, qry_img_path, tgt_text[],
  tgt_img_path[]``; the two lists are parallel and **index 0 is the positive**.
- MMEB_Test_Instruct: like MMEB-eval, with the instructions in columns of their own, ``qry_inst``
  and ``tgt_inst``.

A text may begin with the marker ``<|image_1|>``, with or without a picture; the path of a missing
picture is empty. Pictures are unpacked beside the configs (also in ``images/`` or
``eval_images/``), or in zip archives there or in ``images_zip/``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rematch.data import mmeb_table, picto_tasks
from rematch.data.images import Archives, ZippedPicture
from rematch.data.mmeb_table import DataSet
from rematch.data.rows import is_file, is_text, load_rows
from rematch.data.schema import Item, RetrievalTask, Triplet
from rematch.errors import DataError, ImageError, shortened
from rematch.prompts import DOCUMENT_INSTRUCTIONS

MARKER = "<|image_1|>"
HUB = "TIGER-Lab/MMEB-eval"
_LIST_COLUMNS = frozenset({"tgt_text", "tgt_img_path"})
_TEXT_COLUMNS = (
    _LIST_COLUMNS
    | {
        f"{side}_{part}"
        for side in ("qry", "pos", "neg", "tgt")
        for part in ("text", "img_path", "image_path", "inst")
    }
    | {"qry"}
)
_PICTURE_FOLDERS = ("", "images", "eval_images", "eval-images")


def load_mmeb_train(
    directory: Path | str, split: str = "original", allow_missing: bool = False
) -> list[list[Triplet]]:
    """Load the training samples of a directory in MMEB-train layout.

    Args:
        directory: The folder that holds a folder per config, or the folder of a single config.
        split: ``"original"`` or ``"diverse_instruction"``.
        allow_missing: Whether pictures may be missing; opening one later raises an ImageError.

    Returns:
        The samples of each config, in the order of the configs' names.

    Raises:
        DataError: If the directory holds no config, or a picture is missing.
        ImageError: If a zip archive is broken.
    """
    directory = Path(directory)
    pattern = f"{split}-*.parquet"
    if any(_data_files(directory.glob(pattern))):  # a single config
        root, files = directory.parent, sorted(_data_files(directory.glob(pattern)))
    else:
        root, files = directory, _parquet_files(directory, pattern)
    pictures = _PictureFinder(root, allow_missing)
    configs: dict[str, list[Triplet]] = {}
    for file in files:
        triplets = configs.setdefault(file.parent.name, [])
        data_set = data_set_of(file.parent.name)
        for row, record in load_rows(file):
            place = f"{file}:{row}"
            _check_columns(record, ("qry", "pos_text"), place)
            query = _query("", record["qry"], record.get("qry_image_path"), pictures, place)
            positive, negative = (
                _target(
                    data_set,
                    "",
                    record.get(f"{side}_text"),
                    record.get(f"{side}_image_path"),
                    pictures,
                    place,
                )
                for side in ("pos", "neg")
            )
            has_negative = negative.text or negative.image
            triplets.append(Triplet(query, positive, negative if has_negative else None))
    pictures.raise_if_missing()
    return list(configs.values())


def load_mmeb_eval(
    directory: Path | str, names: Iterable[str] | None = None, limit: int | None = None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load the tasks of a directory in MMEB-eval or MMEB_Test_Instruct layout.

    Candidates with the same key (:attr:`~rematch.data.mmeb_table.DataSet.candidate_key`) are the
    same document.

    Args:
        directory: The folder that holds a folder per config.
        names: Names of the data sets to load; by default all that the directory holds.
        limit: Only load this many queries of each.

    Returns:
        The complete tasks, in the order of MMEB's (or Picto's) tables; and for each other data
        set the reason why it is missing or cannot be read.

    Raises:
        DataError: If the directory holds no config.
    """
    directory = Path(directory)
    files: dict[str, list[Path]] = {}
    for file in _parquet_files(directory, "test-*.parquet"):
        if file.parent.name not in mmeb_table.EXCLUDED:
            files.setdefault(file.parent.name, []).append(file)
    names = sorted(files, key=_table_order) if names is None else names
    tasks, missing, pictures = [], {}, _PictureFinder(directory)
    for name in names:
        if name not in files:
            missing[name] = f"no {name}/test-*.parquet in {directory}"
            continue
        try:
            task = _load_task(name, files[name], pictures, limit)
            pictures.raise_if_missing()
        except (DataError, ImageError) as error:  # the latter of a zip archive
            pictures.missing.clear()
            missing[name] = str(error)
        else:
            tasks.append(task)
    return tasks, missing


def _load_task(
    name: str, files: list[Path], pictures: "_PictureFinder", limit: int | None
) -> RetrievalTask:
    data_set = data_set_of(name)
    task = RetrievalTask(
        name,
        data_set.meta_task,
        [],
        [],
        [],
        ood=data_set.ood,
        unseen_style=name.endswith(picto_tasks.UNSEEN),
    )
    document_numbers: dict[str, int] = {}
    records = ((f"{file}:{row}", record) for file in files for row, record in load_rows(file))
    for place, record in records:
        if len(task.queries) == limit:
            break
        _check_columns(record, ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), place)
        texts, paths = record["tgt_text"] or [], record["tgt_img_path"] or []
        if not texts or len(texts) != len(paths):
            raise DataError(
                f"{place}: {len(texts)} tgt_text and {len(paths)} tgt_img_path; the lists must "
                "have the same length, with the positive first. Download the file again."
            )
        instruction = record.get("qry_inst") or ""
        task.queries.append(
            _query(instruction, record["qry_text"], record["qry_img_path"], pictures, place)
        )
        candidates: dict[int, None] = {}  # keeps the first of repeated candidates, in order
        for text, path in zip(texts, paths, strict=True):
            key = _candidate_key(data_set, text or "", path or "")
            if key not in document_numbers:
                document_numbers[key] = len(task.documents)
                instruction = record.get("tgt_inst") or ""
                task.documents.append(
                    _target(data_set, instruction, text, path, pictures, place, key)
                )
            candidates[document_numbers[key]] = None
        task.candidates.append(np.fromiter(candidates, np.int32))
    return task


def download(names: Iterable[str]) -> Path:
    """Download data sets of MMEB-eval from the Hugging Face hub into its cache.

    Returns:
        The folder that holds a folder per config.

    Raises:
        DataError: If the download fails.
    """
    from huggingface_hub import snapshot_download

    try:
        folders = [f"{name}/test-*" for name in names]
        return Path(
            snapshot_download(HUB, repo_type="dataset", allow_patterns=[*folders, "images.zip"])
        )
    except Exception as error:
        raise DataError(
            f"{HUB} cannot be downloaded from the hub ({str(error).splitlines()[0]}). Download it "
            "on another machine and give its folder with --data."
        ) from error


def data_set_of(config: str) -> DataSet:
    """Return the data set of a config's name, one of MMEB's or of Picto's.

    Raises:
        DataError: If neither has such a data set.
    """
    picto = {name.replace("-", "_"): name for name in picto_tasks.TASKS}
    picto |= {name: name for name in picto_tasks.TASKS}
    base = config.removesuffix(picto_tasks.UNSEEN)
    if base in picto:
        name = picto[base]
        meta_task, _ = picto_tasks.TASKS[name]
        return DataSet(config, meta_task, "image+text", ood=name in picto_tasks.OOD_TASKS)
    if data_set := mmeb_table.find_data_set(config):
        return data_set
    names = ", ".join(data_set.name for data_set in mmeb_table.DATA_SETS)
    raise DataError(
        f"{config}: not a data set of MMEB ({names}) or of Picto ({', '.join(picto_tasks.TASKS)})."
    )


def _table_order(name: str) -> tuple[bool, int]:
    """Sort key of a data set: its place in MMEB's or Picto's table."""
    order = [data_set.name for data_set in mmeb_table.DATA_SETS] + list(picto_tasks.TASKS)
    base = name.removesuffix(picto_tasks.UNSEEN)
    return name.endswith(picto_tasks.UNSEEN), order.index(base) if base in order else len(order)


def _parquet_files(directory: Path, pattern: str) -> list[Path]:
    """The parquet files in the folders of a directory; a DataError if there are none."""
    files = sorted(_data_files(directory.glob(f"*/{pattern}")))
    if not files:
        reason = f"holds no <config>/{pattern}" if directory.is_dir() else "is not a folder"
        raise DataError(
            f"{directory}: {reason}. Give the directory that holds a folder per config."
        )
    return files


def _data_files(files: Iterable[Path]) -> list[Path]:
    """Files without the resource forks (``._NAME``) that macOS adds to archives."""
    return [file for file in files if not file.name.startswith("._")]


def _check_columns(record: dict[str, Any], columns: tuple[str, ...], place: str) -> None:
    missing = [column for column in columns if column not in record]
    if missing:
        raise DataError(
            f"{place}: has no column {', '.join(missing)}; it has {', '.join(record)}. Is this an "
            "MMEB file?"
        )
    for column in _TEXT_COLUMNS & record.keys():
        values = record[column]
        for value in values if column in _LIST_COLUMNS and isinstance(values, list) else [values]:
            if value is not None and not is_text(value):
                raise DataError(
                    f"{place}: {column} = {shortened(value)} is not text. Download the file again."
                )
    for column in _LIST_COLUMNS & record.keys():
        if not isinstance(record[column], list | None):
            raise DataError(
                f"{place}: {column} = {shortened(record[column])} is not a list. Download the "
                "file again."
            )


def _query(
    instruction: str, text: str | None, path: str | None, pictures: "_PictureFinder", place: str
) -> Item:
    instruction, text = _without_marker(instruction), _without_marker(text or "")
    image = pictures.find(path, place) if path else None
    return Item(text, image, instruction=_spaced(instruction, text))


def _target(
    data_set: DataSet,
    instruction: str,
    text: str | None,
    path: str | None,
    pictures: "_PictureFinder",
    place: str,
    key: str = "",
) -> Item:
    key = key or path or text or ""
    text = _without_marker(text or "")
    if not path:
        return Item(text, None, DOCUMENT_INSTRUCTIONS[data_set.kind], key)
    instruction = _without_marker(instruction)
    if not instruction:  # it may be at the start of the text
        starts = (start for start in mmeb_table.TARGET_INSTRUCTIONS if text.startswith(start))
        instruction = next(starts, "")
        text = text.removeprefix(instruction)
    return Item(text, pictures.find(path, place), _spaced(instruction, text), key)


def _without_marker(text: str) -> str:
    """A text without the marker of its picture.

    At the start it is followed by a line break or a space, as the layout has it. Within a
    sentence, as in the split ``diverse_instruction``, words take its place.

    >>> _without_marker("<|image_1|> Represent the given image.")
    'Represent the given image.'
    >>> _without_marker("In <|image_1|>, find the object.")
    'In the image, find the object.'
    """
    start = text.lstrip()
    if start.startswith(MARKER):
        text = start.removeprefix(MARKER).lstrip()
    return text.replace(MARKER, "the image").strip("\n")


def _spaced(instruction: str, text: str) -> str:
    """The instruction, with a space at its end if a text follows."""
    needs_space = instruction and text and not instruction.endswith((" ", "\n"))
    return instruction + " " if needs_space else instruction


def _candidate_key(data_set: DataSet, text: str, path: str) -> str:
    """What tells candidates apart, as in the benchmark's own evaluation."""
    if not path or data_set.candidate_key == "text":
        return text
    return path if data_set.candidate_key == "image" else f"{path}:{_without_marker(text)}"


class _PictureFinder:
    """Finds pictures under a folder, unpacked or in zip archives, and notes missing ones.

    Args:
        root: The folder.
        allow_missing: Whether a missing picture is returned as a path instead of noted.
    """

    def __init__(self, root: Path, allow_missing: bool = False) -> None:
        self.root, self.archives, self.allow_missing = root, Archives(root), allow_missing
        self.missing: list[str] = []
        self.places: dict[str, Path | ZippedPicture | None] = {}

    def find(self, path: str, row: str) -> Path | ZippedPicture | None:
        """Return where a picture is; ``None``, and noted, if it is missing.

        Args:
            path: Path of the picture in the data set.
            row: File and row that name it, for the error.
        """
        if path not in self.places:
            self.places[path] = self._find(path)
        if self.places[path] is None:
            self.missing.append(f"{row} names the picture {path}")
        return self.places[path]

    def _find(self, path: str) -> Path | ZippedPicture | None:
        for folder in _PICTURE_FOLDERS:
            if is_file(self.root / folder / path):
                return self.root / folder / path
        return self.archives.find(path) or (self.root / path if self.allow_missing else None)

    def raise_if_missing(self) -> None:
        """Raise a DataError if pictures were missing since the last call."""
        missing, self.missing = self.missing, []
        if missing:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise DataError(
                f"{missing[0]}, which is neither unpacked under {self.root} nor in a zip archive "
                f"there{more}. Are the images downloaded?"
            )
