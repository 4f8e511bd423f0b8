"""Five zero-shot sets from their usual files: Flickr30K, COCO 5k, ShareGPT4V-1k, Urban1K,
SugarCrepe.

Each lies somewhere under one folder; what marks it is a file's or a folder's name (:data:`SETS`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rematch.data.images import EXTENSIONS
from rematch.data.schema import Item, RetrievalTask
from rematch.errors import DataError
from rematch.prompts import DOCUMENT_INSTRUCTIONS

TO_IMAGE = "Find me an everyday image that matches the given caption: "
TO_TEXT = "Find an image caption describing the given everyday image."
SPLITS = (
    "replace_obj",
    "replace_att",
    "replace_rel",
    "swap_obj",
    "swap_att",
    "add_obj",
    "add_att",
)
Pairs = list[tuple[Path, list[str]]]  # pictures and their captions


@dataclass(frozen=True)
class ZeroShotSet:
    """One set.

    Attributes:
        name: Of the set; its tasks are called ``NAME i2t`` and ``NAME t2i``.
        marker: What it is known by, under the folder that holds the sets.
        folders: Where its pictures may lie, beside the marker or in the folder of all sets.
        read: From the marker and a finder of pictures to the pictures with their captions.
    """

    name: str
    marker: str
    folders: tuple[str, ...]
    read: Callable[[Path, Callable[[str], Path]], Pairs]


def _karpathy(file: Path, find: Callable[[str], Path]) -> Pairs:
    """Karpathy's splits: ``{"images": [{"filename", "filepath"?, "split", "sentences":
    [{"raw"}]}]}``.
    """
    images = [image for image in _json(file, dict)["images"] if image["split"] == "test"]
    return [
        (
            find(f"{i['filepath']}/{i['filename']}" if i.get("filepath") else i["filename"]),
            [s["raw"] for s in i["sentences"][:5]],
        )
        for i in images
    ]


def _sharegpt4v(file: Path, find: Callable[[str], Path]) -> Pairs:
    """The first 1,000 of ``[{"image", "conversations": [{…}, {"value": caption}]}]``."""
    return [
        (find(row["image"]), [row["conversations"][1]["value"]])
        for row in _json(file, list)[:1000]
    ]


def _urban(folder: Path, find: Callable[[str], Path]) -> Pairs:
    """``caption/NAME.txt`` and ``image/NAME.jpg``."""
    texts = sorted(
        (p for p in (folder / "caption").glob("*.txt") if not p.name.startswith("._")),
        key=_natural,
    )
    found = []
    for text in texts:
        images = [folder / "image" / (text.stem + end) for end in EXTENSIONS]
        image = next((i for i in images if i.is_file()), None)
        if image is None:
            raise DataError(
                f"{text}: no picture of that name in {folder / 'image'}. Unpack Urban1k whole."
            )
        found.append((image, [text.read_text().strip()]))
    return found


SETS = (
    ZeroShotSet(
        "Flickr30K",
        "dataset_flickr30k.json",
        ("flickr30k-images", "flickr30k_images", "images"),
        _karpathy,
    ),
    ZeroShotSet("COCO5k", "dataset_coco.json", ("images",), _karpathy),
    ZeroShotSet(
        "ShareGPT4V-1k",
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        ("images", "data"),
        _sharegpt4v,
    ),
    ZeroShotSet("Urban1K", "Urban1k", (), _urban),
)
_COCO_FOLDERS = ("val2017", "images", "images/val2017")


def read_zeroshot(
    root: Path, limit: int | None = None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """All sets that lie under ``root``.

    Args:
        root: Looked through three folders deep.
        limit: Only the first so many queries of each task (of the documents, all).

    Returns:
        The tasks, two directions a set, SugarCrepe's seven files one each; and why the others are
        not there.

    Raises:
        DataError: If ``root`` is no folder or holds none of the sets.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder. Give the one that holds the zero-shot sets.")
    tasks: list[RetrievalTask] = []
    missing: dict[str, str] = {}
    for one in SETS:
        marker = _locate(root, one.marker)
        if marker is None:
            missing[one.name] = f"no {one.marker} under {root}"
            continue
        try:
            pairs = one.read(marker, _finder((marker.parent, root), one.folders, marker))
            tasks += _both_directions(one.name, pairs)
        except (KeyError, IndexError, TypeError) as error:
            missing[one.name] = (
                f"{marker}: not in the usual form ({type(error).__name__}: {error})"
            )
        except DataError as error:
            missing[one.name] = str(error)
    for split in SPLITS:
        file = _locate(root, f"{split}.json")
        name = f"SugarCrepe {split.replace('_', '-')}"
        if file is None:
            missing[name] = f"no {split}.json under {root}"
            continue
        try:
            tasks.append(
                _sugarcrepe(
                    name,
                    file,
                    _finder((file.parent, file.parent.parent, root), _COCO_FOLDERS, file),
                )
            )
        except (KeyError, TypeError) as error:
            missing[name] = f"{file}: not in the usual form ({type(error).__name__}: {error})"
        except DataError as error:
            missing[name] = str(error)
    if not tasks and all(why.startswith("no ") for why in missing.values()):
        raise DataError(
            f"{root}: none of the zero-shot sets is there. docs/evaluation.md says what each "
            "looks like."
        )
    for task in tasks if limit else []:
        task.queries = task.queries[:limit]
        task.candidates = task.candidates[:limit]
        task.answers = task.answers[:limit] if task.answers else None
    return tasks, missing


def _both_directions(name: str, pairs: Pairs) -> list[RetrievalTask]:
    if not pairs:
        raise DataError(f"{name}: its files hold no test pictures.")
    captions = [(i, text) for i, (_, texts) in enumerate(pairs) for text in texts]
    by_picture: list[list[int]] = [[] for _ in pairs]
    for number, (i, _) in enumerate(captions):
        by_picture[i].append(number)
    pictures = [path for path, _ in pairs]
    to_text = RetrievalTask(
        f"{name} i2t",
        name,
        [Item("", path, TO_TEXT) for path in pictures],
        [
            Item(text, None, DOCUMENT_INSTRUCTIONS["caption"], key=f"{n}:{text}")
            for n, (_, text) in enumerate(captions)
        ],
        [],
        answers=list(by_picture),
    )
    to_image = RetrievalTask(
        f"{name} t2i",
        name,
        [Item(text, None, TO_IMAGE) for _, text in captions],
        [Item("", path, DOCUMENT_INSTRUCTIONS["image"], key=str(path)) for path in pictures],
        [],
        answers=[[i] for i, _ in captions],
    )
    return [to_text, to_image]


def _sugarcrepe(name: str, file: Path, find: Callable[[str], Path]) -> RetrievalTask:
    """``{number: {"filename", "caption", "negative_caption"}}``; accuracy is Hit@1 of two."""
    task = RetrievalTask(name, "SugarCrepe", [], [], [])
    for row in _json(file, dict).values():
        task.queries.append(Item("", find(row["filename"]), TO_TEXT))
        first = len(task.documents)
        for text in (row["caption"], row["negative_caption"]):
            task.documents.append(Item(text, None, DOCUMENT_INSTRUCTIONS["caption"], key=text))
        task.candidates.append([first, first + 1])
    return task


def _finder(
    roots: tuple[Path, ...], folders: tuple[str, ...], marker: Path
) -> Callable[[str], Path]:
    places = [root / folder for root in roots for folder in ("", *folders)]

    def find(name: str) -> Path:
        for place in places:
            if (place / name).is_file():
                return place / name
        raise DataError(
            f"{marker} names the picture {name}, which is neither beside it nor in "
            f"{', '.join(folders)}. Unpack the images there."
        )

    return find


def _locate(root: Path, name: str) -> Path | None:
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        for found in sorted(root.glob(depth + name)):
            return found
    return None


def _json(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}).") from None
    if not isinstance(content, kind):
        raise DataError(
            f"{file}: holds a {type(content).__name__}, where the usual file holds a "
            f"{kind.__name__}."
        )
    return content


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.stem), "") if path.stem.isdigit() else (1 << 60, path.stem)
