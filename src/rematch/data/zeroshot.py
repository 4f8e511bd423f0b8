"""Loading five zero-shot sets from their published files: Flickr30K, COCO 5k, ShareGPT4V-1k,
Urban1K, SugarCrepe.

All are somewhere under the same folder; each is recognised by the name of a file or folder
(:data:`SETS`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rematch.data.images import EXTENSIONS
from rematch.data.rows import is_text
from rematch.data.schema import Item, RetrievalTask
from rematch.errors import DataError, first_line, shortened
from rematch.files import read_json, read_text
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
_OTHER_FORMAT = (DataError, KeyError, IndexError, TypeError, AttributeError, OSError)
Pairs = list[tuple[Path, list[str]]]  # pictures and their captions


@dataclass(frozen=True)
class ZeroShotSet:
    """A zero-shot set of pictures and captions.

    Attributes:
        name: Name of the set; its tasks are called ``NAME i2t`` and ``NAME t2i``.
        marker: Name of the file or folder by which the set is recognised.
        folders: Folders that may hold its pictures, beside the marker or in the folder of all
            sets.
        load: Loads the pictures with their captions, given the path of the marker and a function
            that finds a picture by its name.
    """

    name: str
    marker: str
    folders: tuple[str, ...]
    load: Callable[[Path, Callable[[str], Path]], Pairs]


def _karpathy(file: Path, find: Callable[[str], Path]) -> Pairs:
    """Load a test split of Karpathy's: ``{"images": [{"filename", "filepath"?, "split",
    "sentences": [{"raw"}]}]}``, with five captions per picture.
    """
    pairs = []
    for image in _load_json(file, dict)["images"]:
        if image["split"] == "test":
            folder = f"{image['filepath']}/" if image.get("filepath") else ""
            captions = [_caption(sentence["raw"]) for sentence in image["sentences"][:5]]
            pairs.append((find(folder + image["filename"]), captions))
    return pairs


def _sharegpt4v(file: Path, find: Callable[[str], Path]) -> Pairs:
    """Load the first 1,000 of ``[{"image", "conversations": [{…}, {"value": caption}]}]``."""
    return [
        (find(row["image"]), [_caption(row["conversations"][1]["value"])])
        for row in _load_json(file, list)[:1000]
    ]


def _urban(folder: Path, find: Callable[[str], Path]) -> Pairs:
    """Load ``caption/NAME.txt`` and ``image/NAME.jpg``."""
    files = [f for f in (folder / "caption").glob("*.txt") if not f.name.startswith("._")]
    texts = sorted(files, key=_numeric_order)
    pairs = []
    for text in texts:
        images = [folder / "image" / (text.stem + end) for end in EXTENSIONS]
        image = next((i for i in images if i.is_file()), None)
        if image is None:
            raise DataError(
                f"{text}: no picture of that name in {folder / 'image'}. Unpack all of Urban1k."
            )
        pairs.append((image, [read_text(text).strip()]))
    return pairs


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


def load_zeroshot(
    root: Path, limit: int | None = None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load all zero-shot sets under a folder.

    Args:
        root: The folder; it is searched three folders deep.
        limit: Only load this many queries of each task, but all documents.

    Returns:
        The tasks, one per direction of a set and one per file of SugarCrepe; and for each other
        set the reason why it is missing.

    Raises:
        DataError: If ``root`` is not a folder or holds none of the sets.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder. Give the folder that holds the zero-shot sets.")
    tasks: list[RetrievalTask] = []
    missing: dict[str, str] = {}
    for zero_shot_set in SETS:
        name = zero_shot_set.name
        marker = _locate(root, zero_shot_set.marker)
        if marker is None:
            missing[name] = f"no {zero_shot_set.marker} under {root}"
            continue
        find = _picture_finder((marker.parent, root), zero_shot_set.folders, marker)
        try:
            tasks += _both_directions(name, zero_shot_set.load(marker, find))
        except _OTHER_FORMAT as error:
            missing[name] = _reason(marker, error)
    for split in SPLITS:
        name = f"SugarCrepe {split.replace('_', '-')}"
        file = _locate(root, f"{split}.json")
        if file is None:
            missing[name] = f"no {split}.json under {root}"
            continue
        roots = (file.parent, file.parent.parent, root)
        try:
            tasks.append(_sugarcrepe(name, file, _picture_finder(roots, _COCO_FOLDERS, file)))
        except _OTHER_FORMAT as error:
            missing[name] = _reason(file, error)
    if not tasks and all(reason.startswith("no ") for reason in missing.values()):
        raise DataError(
            f"{root}: holds none of the zero-shot sets. docs/evaluation.md describes their files."
        )
    if limit:
        for task in tasks:
            task.queries = task.queries[:limit]
            task.candidates = task.candidates[:limit]
            task.answers = task.answers[:limit] if task.answers else None
    return tasks, missing


def _reason(file: Path, error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error) if str(file) in str(error) else f"{file}: {error}"
    return f"{file}: not in the published format ({first_line(error)})"


def _both_directions(name: str, pairs: Pairs) -> list[RetrievalTask]:
    """Make the image-to-text and the text-to-image task of a set."""
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
    """Load ``{number: {"filename", "caption", "negative_caption"}}``; Hit@1 is the accuracy."""
    change = name.partition("-")[0]  # "SugarCrepe add": the groups that papers report
    task = RetrievalTask(name, change, [], [], [])
    for row in _load_json(file, dict).values():
        task.queries.append(Item("", find(row["filename"]), TO_TEXT))
        first = len(task.documents)
        for text in map(_caption, (row["caption"], row["negative_caption"])):
            task.documents.append(Item(text, None, DOCUMENT_INSTRUCTIONS["caption"], key=text))
        task.candidates.append([first, first + 1])
    return task


def _caption(value: Any) -> str:
    """A caption that is a text.

    Raises:
        DataError: If it is something else.
    """
    if not is_text(value):
        raise DataError(f"the caption {shortened(value)} is not text. Download the file again.")
    caption: str = value
    return caption


def _picture_finder(
    roots: tuple[Path, ...], folders: tuple[str, ...], marker: Path
) -> Callable[[str], Path]:
    """Return a function that finds a picture by its name, or raises a DataError."""
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
    """Return the first file or folder of a name, at most three folders deep."""
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        paths = sorted(root.glob(depth + name))
        if paths:
            return paths[0]
    return None


def _load_json(file: Path, kind: type) -> Any:
    """Load a JSON file whose content must be of a type."""
    content = read_json(file)
    if not isinstance(content, kind):
        raise DataError(
            f"{file}: holds a {type(content).__name__}, but the published file holds a "
            f"{kind.__name__}."
        )
    return content


def _numeric_order(path: Path) -> tuple[int, str]:
    """Sort key of files: first numbers in their order, then other names."""
    return (int(path.stem), "") if path.stem.isdigit() else (1 << 60, path.stem)
