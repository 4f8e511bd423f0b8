"""MMEB from disk or from the hub: one reader for its three layouts.

- MMEB-train: ``<Config>/original-*.parquet`` (or ``diverse_instruction-*``) with ``qry,
  qry_image_path, pos_text, pos_image_path`` and perhaps ``neg_text, neg_image_path``.
- MMEB-eval: ``<Config>/test-*.parquet`` with ``qry_text, qry_img_path, tgt_text[],
  tgt_img_path[]``; the two lists are parallel and **index 0 is the answer**.
- MMEB_Test_Instruct: the same with the instructions apart, ``qry_inst`` and ``tgt_inst``.

Text may begin with the marker ``<|image_1|>``, with or without a picture; empty means "". Pictures
lie unpacked beside the configs (also in ``images/`` or ``eval_images/``) or in zip archives there
or in ``images_zip/``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rematch.data import mmeb_table, picto_tasks
from rematch.data.images import Archives, Zipped
from rematch.data.pairs import rows
from rematch.data.schema import Item, RetrievalTask, Triplet
from rematch.errors import DataError
from rematch.prompts import DOCUMENT_INSTRUCTIONS

MARKER = "<|image_1|>"
HUB = "TIGER-Lab/MMEB-eval"
_PICTURE_FOLDERS = ("", "images", "eval_images", "eval-images")


def read_train(
    directory: Path | str, split: str = "original", allow_missing: bool = False
) -> list[list[Triplet]]:
    """The training samples of a directory in MMEB-train form, config by config in the order of
    their names.

    Args:
        directory: The folder that holds one folder per config, or one config's own folder.
        split: ``"original"`` or ``"diverse_instruction"``.
        allow_missing: Let pictures be missing; whoever opens one then gets an ImageError.

    Raises:
        DataError: If there is no config in it, or a picture is missing.
        ImageError: If a zip archive is broken.
    """
    directory = Path(directory)
    one = any(_real(directory.glob(f"{split}-*.parquet")))
    pictures = _Pictures(directory.parent if one else directory, allow_missing)
    configs: dict[str, list[Triplet]] = {}
    for file in _parquet_files(directory.parent if one else directory, f"{split}-*.parquet"):
        if one and file.parent != directory:
            continue
        triplets = configs.setdefault(file.parent.name, [])
        form = data_set(file.parent.name)
        for row, record in rows(file):
            _has(record, ("qry", "pos_text"), file, row)
            query = _query("", record["qry"], record.get("qry_image_path"), pictures, file, row)
            positive, negative = (
                _target(
                    form,
                    "",
                    record.get(f"{side}_text"),
                    record.get(f"{side}_image_path"),
                    pictures,
                    f"{file}:{row}",
                )
                for side in ("pos", "neg")
            )
            triplets.append(
                Triplet(query, positive, negative if negative.text or negative.image else None)
            )
    pictures.complain()
    return list(configs.values())


def read_eval(
    directory: Path | str, names: Iterable[str] | None = None, limit: int | None = None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """The tasks of a directory in MMEB-eval or MMEB_Test_Instruct form.

    Candidates that agree in what identifies them
    (:attr:`~rematch.data.mmeb_table.DataSet.identity`) are one document.

    Args:
        directory: Holds one folder per config.
        names: The data sets wanted; by default whatever is there.
        limit: Only the first so many queries of each.

    Returns:
        The tasks that are there whole, in the order of MMEB's (or Picto's) tables; and for each
        wanted one that is not, why not.

    Raises:
        DataError: If there is no config in the directory, or a file cannot be read.
        ImageError: If a zip archive is broken.
    """
    directory = Path(directory)
    files: dict[str, list[Path]] = {}
    for file in _parquet_files(directory, "test-*.parquet"):
        if file.parent.name not in mmeb_table.LEFT_OUT:
            files.setdefault(file.parent.name, []).append(file)
    wanted = sorted(files, key=_place) if names is None else list(names)
    tasks, missing, pictures = [], {}, _Pictures(directory)
    for name in wanted:
        if name not in files:
            missing[name] = f"no {name}/test-*.parquet in {directory}"
            continue
        tasks.append(_read_task(name, files[name], pictures, limit))
        try:
            pictures.complain()
        except DataError as error:
            missing[name] = str(error)
            tasks.pop()
    return tasks, missing


def _read_task(
    name: str, files: list[Path], pictures: "_Pictures", limit: int | None
) -> RetrievalTask:
    form = data_set(name)
    task = RetrievalTask(name, form.meta_task, [], [], [], ood=form.ood)
    known: dict[str, int] = {}
    records = ((file, row, record) for file in files for row, record in rows(file))
    for file, row, record in records:
        if len(task.queries) == limit:
            break
        _has(record, ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), file, row)
        texts, paths = record["tgt_text"] or [], record["tgt_img_path"] or []
        if not texts or len(texts) != len(paths):
            raise DataError(
                f"{file}:{row}: {len(texts)} tgt_text and {len(paths)} tgt_img_path; the lists "
                "must be of one length, with the answer first. Download the file again."
            )
        asked = record.get("qry_inst") or ""
        task.queries.append(
            _query(asked, record["qry_text"], record["qry_img_path"], pictures, file, row)
        )
        indices: dict[int, None] = {}  # a candidate that stands twice in a row is one
        for text, path in zip(texts, paths, strict=True):
            key = _identity(form, text or "", path or "")
            if key not in known:
                known[key] = len(task.documents)
                told = record.get("tgt_inst") or ""
                task.documents.append(
                    _target(form, told, text, path, pictures, f"{file}:{row}", key)
                )
            indices[known[key]] = None
        task.candidates.append(np.fromiter(indices, np.int32))
    return task


def download(names: Iterable[str]) -> Path:
    """The data sets from the Hugging Face hub, in its cache.

    Raises:
        DataError: If the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        folders = [f"{name}/test-*" for name in names]
        return Path(
            snapshot_download(HUB, repo_type="dataset", allow_patterns=[*folders, "images.zip"])
        )
    except Exception as error:
        raise DataError(
            f"{HUB} cannot be had from the hub ({str(error).splitlines()[0]}). Download it "
            "elsewhere and give its folder with --data."
        ) from error


def data_set(name: str) -> mmeb_table.DataSet:
    """What is known of a config: one of MMEB's, or one of Picto's.

    Raises:
        DataError: If it is neither.
    """
    base = name.removesuffix("-OOD")
    picto = {n.replace("-", "_"): n for n in picto_tasks.TASKS} | {n: n for n in picto_tasks.TASKS}
    if base in picto:
        meta_task = picto_tasks.TASKS[picto[base]][0]
        return mmeb_table.DataSet(name, meta_task, "image+text", name.endswith("-OOD"))
    if found := mmeb_table.find(name):
        return found
    known = [d.name for d in mmeb_table.DATA_SETS]
    raise DataError(
        f"{name}: neither one of MMEB's data sets ({', '.join(known)}) nor of Picto's "
        f"({', '.join(picto_tasks.TASKS)})."
    )


def _place(name: str) -> tuple[bool, int]:
    order = [d.name for d in mmeb_table.DATA_SETS] + list(picto_tasks.TASKS)
    base = name.removesuffix("-OOD")
    return name.endswith("-OOD"), order.index(base) if base in order else len(order)


def _parquet_files(directory: Path, pattern: str) -> list[Path]:
    files = sorted(_real(directory.glob(f"*/{pattern}")))
    if not files:
        what = "is not a folder" if not directory.is_dir() else f"no <config>/{pattern} in it"
        raise DataError(
            f"{directory}: {what}. Give the directory that holds one folder per config."
        )
    return files


def _real(files: Iterable[Path]) -> list[Path]:
    return [
        file for file in files if not file.name.startswith("._")
    ]  # what macOS adds to archives


def _has(record: dict[str, Any], columns: tuple[str, ...], file: Path, row: int) -> None:
    if lost := [c for c in columns if c not in record]:
        raise DataError(
            f"{file}:{row}: has no column {', '.join(lost)}; it has {', '.join(record)}. Is it "
            "MMEB's?"
        )


def _query(
    instruction: str,
    text: str | None,
    path: str | None,
    pictures: "_Pictures",
    file: Path,
    row: int,
) -> Item:
    instruction, text = _unmarked(instruction), _unmarked(text or "")
    image = pictures.find(path, f"{file}:{row}") if path else None
    return Item(text, image, instruction=_joined(instruction, text))


def _target(
    form: mmeb_table.DataSet,
    instruction: str,
    text: str | None,
    path: str | None,
    pictures: "_Pictures",
    where: str,
    key: str = "",
) -> Item:
    text, key = _unmarked(text or ""), key or path or text or ""
    if not path:
        return Item(text, None, DOCUMENT_INSTRUCTIONS[form.kind], key)
    instruction = _unmarked(instruction)
    if not instruction:
        instruction = next(
            (known for known in mmeb_table.TARGET_INSTRUCTIONS if text.startswith(known)), ""
        )
        text = text.removeprefix(instruction)
    return Item(text, pictures.find(path, where), _joined(instruction, text), key)


def _unmarked(text: str) -> str:
    return text.replace(MARKER, "").strip("\n")


def _joined(instruction: str, text: str) -> str:
    return (
        instruction + " "
        if instruction and text and not instruction.endswith((" ", "\n"))
        else instruction
    )


def _identity(form: mmeb_table.DataSet, text: str, path: str) -> str:
    """As the benchmark's own harness tells candidates apart."""
    if not path or form.identity == "text":
        return text
    return path if form.identity == "image" else f"{path}:{_unmarked(text)}"


class _Pictures:
    """Finds pictures under a directory, unpacked or in archives, and collects those that are not
    there.
    """

    def __init__(self, root: Path, allow_missing: bool = False) -> None:
        self.root, self.archives, self.allow_missing = root, Archives(root), allow_missing
        self.missing: list[str] = []
        self.known: dict[str, Path | Zipped | None] = {}

    def find(self, path: str, where: str) -> Path | Zipped | None:
        if path not in self.known:
            self.known[path] = self._find(path)
        if self.known[path] is None:
            self.missing.append(f"{where} names the picture {path}")
        return self.known[path]

    def _find(self, path: str) -> Path | Zipped | None:
        for folder in _PICTURE_FOLDERS:
            if (self.root / folder / path).is_file():
                return self.root / folder / path
        return self.archives.find(path) or (self.root / path if self.allow_missing else None)

    def complain(self) -> None:
        """Raise a DataError if pictures were missing, and forget them."""
        missing, self.missing = self.missing, []
        if missing:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise DataError(
                f"{missing[0]}, which is neither unpacked under {self.root} nor in a zip archive "
                f"there{more}. Are the images downloaded?"
            )
