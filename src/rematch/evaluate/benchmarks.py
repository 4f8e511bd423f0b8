"""Benchmarks by name: Picto, MMEB, MMEB-V2, the five zero-shot sets; or custom data."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rematch.data import picto_tasks
from rematch.data.custom import load_custom
from rematch.data.frames import FRAMES
from rematch.data.mmeb import download, load_mmeb_eval
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.mmeb_v2_table import GROUPS, VIDEO_SETS, VISDOC_SETS, SetV2, sets_named
from rematch.data.picto_pages import picto_v2_tasks
from rematch.data.picto_tasks import BLOCK, QUERIES, UNSEEN, Split, evaluation_tasks
from rematch.data.schema import RetrievalTask
from rematch.data.video_sets import load_videos
from rematch.data.visdoc import is_beir_with_pictures, load_beir_folder, load_visdoc
from rematch.data.zeroshot import load_zeroshot
from rematch.errors import DataError
from rematch.files import named

NAMES = ("picto", "picto-validation", "mmeb", "zeroshot", "mmeb-v2", *GROUPS)
_MMEB_TASKS = [data_set.name for data_set in DATA_SETS]


@dataclass
class Benchmark:
    """The tasks of a benchmark that can be evaluated.

    Attributes:
        name: Name of the benchmark.
        tasks: The tasks.
        left_out: The reason for each task that was left out.
    """

    name: str
    tasks: list[RetrievalTask]
    left_out: dict[str, str]


def load_benchmark(
    name: str,
    data: Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    skip_missing: bool = False,
    frames: int = FRAMES,
) -> Benchmark:
    """Load the tasks of a benchmark.

    Args:
        name: One of :data:`NAMES`; the name or repository of a set of MMEB-V2
            (:func:`~rematch.data.mmeb_v2_table.sets_named`); or the path of custom data
            (:mod:`rematch.data.custom`, :mod:`rematch.data.visdoc`).
        data: Folder of the benchmark. Without it, Picto is generated, and MMEB and visual
            documents are downloaded.
        tasks: Names of the tasks to load; by default all.
        limit: Number of queries to load of each task; by default all.
        skip_missing: Leave out tasks whose data is missing or broken, instead of raising an
            error.
        frames: How many frames stand for a video.

    Raises:
        DataError: If the benchmark or a task is unknown, or data is missing.
    """
    if name == "picto":
        loaded, left_out = _load_picto("test", data, tasks, limit)
    elif name == "picto-validation":
        loaded, left_out = _load_picto("validation", data, tasks, limit)
    elif name == "mmeb":
        selected = _select(tasks, _MMEB_TASKS)
        loaded, left_out = load_mmeb_eval(data or download(selected), selected, limit)
    elif name == "zeroshot":
        loaded, left_out = _load_zeroshot(data, tasks, limit)
    elif name == "mmeb-v2":
        loaded, left_out = _load_mmeb_v2(data, tasks, limit, frames)
    elif name in GROUPS or (not Path(name).exists() and sets_named(name)):
        loaded, left_out = _load_v2_sets(name, sets_named(name), data, tasks, limit, frames)
    else:
        loaded, left_out = _load_custom_tasks(name, tasks, limit)
    # most people have only some of the zero-shot sets, and evaluate those without naming them
    may_miss = skip_missing or (name == "zeroshot" and loaded and not tasks)
    if left_out and not may_miss:
        raise _missing(left_out)
    if not loaded:
        raise DataError(
            f"{name}: no task can be evaluated. Check --tasks, and the data of the tasks."
        )
    return Benchmark(name if name in NAMES else named(Path(name)).stem, loaded, left_out)


def _load_picto(
    split: Split, data: Path | None, names: Sequence[str], limit: int | None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    available = [name + suffix for suffix in ("", UNSEEN) for name in picto_tasks.TASKS]
    selected = _select(names, available)
    if data is not None:
        if split != "test":
            raise DataError(
                f"picto-{split}: --data {data} cannot hold it, because only Picto's test split is "
                "exported. Leave out --data; the split is generated."
            )
        return load_mmeb_eval(data, selected, limit)
    # queries are generated in whole blocks
    queries = min(QUERIES, -(-(limit or QUERIES) // BLOCK) * BLOCK)
    tasks = [
        task
        for name in selected
        for task in evaluation_tasks(
            [name.removesuffix(UNSEEN)],
            split=split,
            unseen_style=name.endswith(UNSEEN),
            queries=queries,
        )
    ]
    for task in tasks:
        task.queries, task.candidates = task.queries[:limit], task.candidates[:limit]
    return tasks, {}


def _load_mmeb_v2(
    data: Path | None, names: Sequence[str], limit: int | None, frames: int
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load sets of all three modalities; a modality of which no set is wanted is not touched."""
    sets = [*VIDEO_SETS, *VISDOC_SETS]
    selected = _select(names, [*_MMEB_TASKS, *(s.name for s in sets)])
    images = [name for name in selected if name in _MMEB_TASKS]
    tasks: list[RetrievalTask] = []
    left_out: dict[str, str] = {}
    if images:
        folder = data
        if data and (data / "image-tasks").is_dir():
            folder = data / "image-tasks"
        try:
            tasks, left_out = load_mmeb_eval(folder or download(images), images, limit)
        except DataError as error:
            left_out = dict.fromkeys(images, str(error))
        for task in tasks:
            task.modality = "image"
    others = [s for s in sets if s.name in selected]
    if others:
        loaded, missing = _load_v2_sets("mmeb-v2", others, data, (), limit, frames)
        tasks, left_out = tasks + loaded, left_out | missing
    return tasks, left_out


def _load_v2_sets(
    name: str,
    sets: Sequence[SetV2],
    data: Path | None,
    names: Sequence[str],
    limit: int | None,
    frames: int,
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load sets of visual documents and of videos."""
    selected = _select(names, [s.name for s in sets])
    sets = [s for s in sets if s.name in selected]
    if data is None and name.startswith("picto-"):
        return picto_v2_tasks([s.name for s in sets], limit), {}
    if data is not None and not data.is_dir():
        raise DataError(f"--data {data}: is not a folder. Give the folder that holds the sets.")
    videos = [s for s in sets if s.modality == "video"]
    tasks: list[RetrievalTask] = []
    left_out: dict[str, str] = {}
    if videos and data is None:
        left_out = {
            s.name: "--data is missing, the folder that holds the frames or the videos; no hub "
            "has them one by one"
            for s in videos
        }
    elif data is not None:
        tasks, left_out = load_videos(videos, data, limit, frames)
    pages, missing = load_visdoc([s for s in sets if s.modality == "visdoc"], data, limit)
    return tasks + pages, left_out | missing


def _load_zeroshot(
    data: Path | None, names: Sequence[str], limit: int | None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    if data is None:
        raise DataError(
            "zeroshot: --data is missing. Give the folder that holds the sets "
            "(docs/evaluation.md)."
        )
    return _selected(names, *load_zeroshot(data, limit))


def _selected(
    names: Sequence[str], tasks: list[RetrievalTask], left_out: dict[str, str]
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """The tasks and reasons that ``names`` lists, or all of them if it is empty."""
    selected = _select(names, [task.name for task in tasks] + list(left_out))
    return (
        [task for task in tasks if task.name in selected],
        {name: reason for name, reason in left_out.items() if name in selected},
    )


def _load_custom_tasks(
    path: str, names: Sequence[str], limit: int | None
) -> tuple[list[RetrievalTask], dict[str, str]]:
    source = Path(path)
    if not source.exists():
        matches = get_close_matches(path, NAMES, 1)
        hint = f" Did you mean {matches[0]}?" if matches else ""
        raise DataError(
            f"--benchmark {path}: neither {', '.join(NAMES)}, a set of MMEB-V2, nor an existing "
            f"file or folder.{hint}"
        )
    if source.is_dir() and is_beir_with_pictures(source):
        return _selected(names, [load_beir_folder(source, limit)], {})
    return _selected(names, *load_custom(source, limit))


def _select(names: Sequence[str], available: Sequence[str]) -> list[str]:
    """The available names that ``names`` lists, or all of them if it is empty.

    Raises:
        DataError: If a name is not available.
    """
    for name in names:
        if name not in available:
            matches = get_close_matches(name, available, 3)
            hint = f"The tasks are: {', '.join(available)}."
            if matches:
                hint = f"Did you mean {' or '.join(matches)}?"
            raise DataError(f"--tasks {name}: no such task. {hint}")
    return [name for name in available if not names or name in names]


def _missing(left_out: dict[str, str]) -> DataError:
    first, *others = left_out
    more = f" (and {len(others)} more: {', '.join(others)})" if others else ""
    return DataError(
        f"{first} cannot be loaded: {left_out[first].rstrip('.')}{more}. Add or repair it, name "
        "the tasks to evaluate with --tasks, or leave out what cannot be loaded with "
        "--skip-missing."
    )
