"""Loading MMEB-V2's sets of videos: rows from a folder or from the hub, and frames from a folder.

A video is one input of N pictures, in order. What the rows of a set are is the ``form`` in its row
of :mod:`rematch.data.mmeb_v2_table`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rematch.data.frames import FRAMES, VIDEO_EXTENSIONS, Videos
from rematch.data.mmeb_v2_table import MOMENT_WITH_PICTURE, MOMENT_WITH_VIDEO, SetV2
from rematch.data.schema import Item, RetrievalTask
from rematch.data.tables import Rows, load_table, require_columns
from rematch.data.visdoc import locate
from rematch.errors import DataError
from rematch.prompts import DOCUMENT_INSTRUCTIONS

LABELS_FILE = "labels.txt"  # all labels of a set, one a line, in the folder of its frames
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load_videos(
    sets: Iterable[SetV2], directory: Path, limit: int | None = None, frames: int = FRAMES
) -> tuple[list[RetrievalTask], dict[str, str]]:
    """Load sets of videos.

    Args:
        sets: The sets.
        directory: The benchmark's folder, which holds the frames or the videos. Rows that it does
            not hold come from the hub.
        limit: Only load this many queries of each, but all documents.
        frames: N, how many frames stand for a video.

    Returns:
        The tasks, and for each other set the reason why it is missing.
    """
    tasks, missing = [], {}
    for data_set in sets:
        try:
            tasks.append(_load_set(data_set, directory, limit, frames))
        except DataError as error:
            missing[data_set.name] = str(error)
    return tasks, missing


def _load_set(data_set: SetV2, directory: Path, limit: int | None, frames: int) -> RetrievalTask:
    source: Path | str
    try:
        source = locate(data_set, directory)
    except DataError:
        if "/" not in data_set.repository:  # Picto's are on no hub
            raise
        source = data_set.repository
    videos = Videos(directory, data_set.frames, frames)
    if not videos.frames.parent.is_dir() and not (videos.root / "videos").is_dir():
        raise DataError(f"no frames in {videos.frames} and no videos in {videos.root / 'videos'}")
    builder = _Builder(data_set, source, videos, limit)
    for config in data_set.subsets or (data_set.config,):
        rows = load_table(source, config, data_set.split)
        require_columns(rows, _columns(data_set), str(source))
        builder.subset = config if data_set.subsets else ""
        try:
            _READERS[data_set.form](builder, rows)
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise DataError(
                f"{source}: not in the published form ({type(error).__name__}: {error}). Download "
                "the set again."
            ) from error
    videos.raise_if_missing()
    task = builder.task
    if not task.queries:
        raise DataError(f"{source}: holds no rows.")
    return task


def _columns(data_set: SetV2) -> tuple[str, ...]:
    """The columns that a form needs."""
    extra: dict[str, tuple[str, ...]] = {
        "options": (*data_set.options, "answer"),
        "momentseeker": ("positive_frames", "negative_frames"),
    }
    return (*data_set.columns, *extra.get(data_set.form, ()))


class _Builder:
    """A task in the making: documents are told apart by their keys.

    Args:
        data_set: The set.
        source: Where its rows are, for errors.
        videos: Its videos.
        limit: How many queries to take.
    """

    def __init__(
        self, data_set: SetV2, source: Path | str, videos: Videos, limit: int | None
    ) -> None:
        self.data_set, self.source, self.videos, self.limit = data_set, source, videos, limit
        self.task = RetrievalTask(
            data_set.name,
            data_set.meta_task,
            [],
            [],
            [],
            answers=[],
            metric=data_set.metric,
            modality=data_set.modality,
        )
        self.numbers: dict[str, int] = {}
        self.subset = ""  # of the rows that are being read (MVBench)

    def document(self, item: Item) -> int:
        """Number of a document, which is added if it is new."""
        if item.key not in self.numbers:
            self.numbers[item.key] = len(self.task.documents)
            self.task.documents.append(item)
        return self.numbers[item.key]

    def text(self, kind: str, text: str) -> int:
        """Number of a label or an answer."""
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        return self.document(Item(text, None, DOCUMENT_INSTRUCTIONS[kind], text))

    def video(self, name: str) -> int:
        """Number of a video or clip."""
        return self.document(
            Item("", self.videos.find(name), self.data_set.document_instruction, name)
        )

    def query(
        self, item: Item, answers: Iterable[int], candidates: Iterable[int] | None = None
    ) -> None:
        """Add a query with the documents that answer it, and its candidates if it has its own."""
        if self.is_full():
            return
        assert self.task.answers is not None
        self.task.queries.append(item)
        self.task.answers.append(list(dict.fromkeys(answers)))
        if candidates is not None:
            self.task.candidates.append(list(dict.fromkeys(candidates)))

    def cell(self, number: int, row: dict[str, Any], column: str) -> str:
        """The text in a cell; the first of several, as in the benchmark.

        Raises:
            DataError: If there is none.
        """
        value = row[column]
        text = value[0] if isinstance(value, list) and value else value
        if not isinstance(text, str) or not text.strip():
            raise self.error(number, f"{column} = {value!r} is no text.")
        return text

    def is_full(self) -> bool:
        """Whether there are as many queries as wanted."""
        return len(self.task.queries) == self.limit

    def error(self, row: int, message: str) -> DataError:
        """The error for a row."""
        return DataError(f"{self.source}, row {row}: {message} Download the set again.")


def _numbered(rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(rows, 1)


def _name(value: Any) -> str:
    """A video's name, without folders and the extension of a file."""
    name = Path(str(value))
    return name.stem if name.suffix.lower() in VIDEO_EXTENSIONS else str(value)


def _read_labels(builder: _Builder, rows: Rows) -> None:
    """Video → label, among all labels or among those of the row."""
    video, label = builder.data_set.columns
    has_candidates = "neg_text" in rows.column_names
    if not has_candidates:
        labels = [builder.cell(number, row, label) for number, row in _numbered(rows)]
        for text in _all_labels(builder, labels):
            builder.text("label", text)
    for number, row in _numbered(rows):
        if builder.is_full():
            break
        name = _name(row[video])
        query = Item("", builder.videos.find(name), builder.data_set.instruction, name)
        right = builder.text("label", builder.cell(number, row, label))
        wrong = [builder.text("label", text) for text in row["neg_text"]] if has_candidates else []
        builder.query(query, [right], [right, *wrong] if has_candidates else None)


def _all_labels(builder: _Builder, labels: Iterable[str]) -> list[str]:
    """The labels of a set: those of its labels.txt, and those of its rows."""
    file = builder.videos.frames / LABELS_FILE
    listed = file.read_text().splitlines() if file.is_file() else []
    distinct = list(dict.fromkeys(text for text in (*listed, *labels) if text.strip()))
    expected = builder.data_set.labels
    if expected and len(distinct) != expected:
        builder.task.notes.append(
            f"the candidates are {len(distinct)} labels instead of {expected}, so scores are not "
            f"comparable; put all labels into {file}, one a line"
        )
    return distinct


def _read_captions(builder: _Builder, rows: Rows) -> None:
    """Caption → video."""
    video, caption = builder.data_set.columns
    for number, row in _numbered(rows):
        document = builder.video(_name(row[video]))
        text = builder.cell(number, row, caption)
        builder.query(Item(text, None, builder.data_set.instruction, str(row[video])), [document])


def _read_clips(builder: _Builder, rows: Rows) -> None:
    """Description and video → clip. A video's folder holds the folders ``query``, ``positive…``
    and those of other clips.
    """
    video, text = builder.data_set.columns
    for number, row in _numbered(rows):
        if builder.is_full():
            break
        name = _name(row[video])
        clips = builder.videos.clips(name)
        right = [clip for clip in clips if clip.startswith("positive")]
        if clips and not right:
            raise builder.error(number, f"{name} has no clip positive….")
        description = builder.cell(number, row, text)
        query = Item(
            description,
            builder.videos.find(f"{name}/query"),
            builder.data_set.instruction,
            f"{name}: {description}",
        )
        candidates = [builder.video(f"{name}/{clip}") for clip in (*right, *clips)]
        builder.query(query, candidates[: len(right)], candidates)


def _read_momentseeker(builder: _Builder, rows: Rows) -> None:
    """Description, sometimes with a picture or a video → clip; the row names its clips."""
    context, text = builder.data_set.columns
    videos = builder.videos

    def clips(row: dict[str, Any], side: str) -> list[int]:
        paths = [clip["output_path"] for clip in row[f"{side}_frames"] or []]
        return [builder.video(_frame_folder(path)) for path in paths]

    for number, row in _numbered(rows):
        if builder.is_full():
            break
        path = row[context] or ""
        description = builder.cell(number, row, text)
        item = Item(description, None, builder.data_set.instruction, f"{path}: {description}")
        if path.endswith(".mp4"):
            item = replace(
                item, image=videos.find(_frame_folder(path)), instruction=MOMENT_WITH_VIDEO
            )
        elif path.endswith(".jpg"):
            picture = videos.frames / f"query_{path}"
            if not picture.is_file():
                videos.missing.append(picture.name)
            item = replace(item, image=picture, instruction=MOMENT_WITH_PICTURE)
        right = clips(row, "positive")
        if not right:
            raise builder.error(number, "no positive_frames.")
        builder.query(item, right, [*right, *clips(row, "negative")])


def _frame_folder(path: str) -> str:
    return "video_frames/" + path.replace("/", "_").split(".mp4")[0]


def _read_options(builder: _Builder, rows: Rows) -> None:
    """Video and question → one of the row's options."""
    data_set = builder.data_set
    video, question = data_set.columns
    for number, row in _numbered(rows):
        if builder.is_full():
            break
        name = str(row[video])
        if data_set.layout == "yes-no":
            name = f"v_{name}"
        elif builder.subset:  # a folder of frames per subset, named like the video with extension
            name = f"{builder.subset}/{name}"
        options = [row[column] for column in data_set.options]
        if len(options) == 1:
            options = options[0]
        if data_set.layout == "yes-no":
            options = ["yes", "no"]
        if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            raise builder.error(number, f"the options {options!r} are not texts.")
        text, candidates = _asked(builder.cell(number, row, question), options, data_set.layout)
        right = _answer(row["answer"], options)
        if right is None:
            raise builder.error(number, f"answer {row['answer']!r} is none of {options}.")
        numbers = [builder.text("answer", candidate) for candidate in candidates]
        key = f"{name}: {number}"
        query = Item(text, builder.videos.find(name), data_set.instruction, key)
        builder.query(query, [numbers[right]], [numbers[right], *numbers])


def _asked(question: str, options: list[str], layout: str) -> tuple[str, list[str]]:
    r"""A question with its options, and the candidates' texts, as the benchmark writes them.

    >>> _asked("Who", ["Ann", "Bob"], "numbered")
    ('Who\nOptions:\n(A) Ann\n(B) Bob', ['(A) Ann', '(B) Bob'])
    >>> _asked("Who?", ["A. Ann.", "B. Bob."], "lettered")
    ('Who?\nA. Ann.\nB. Bob.', ['Ann', 'Bob'])
    """
    if layout == "yes-no":
        return f"{question}? (A) yes; (B) no.", options
    if layout in ("numbered", "listed"):
        listed = [f"({letter}) {text}" for letter, text in zip(_LETTERS, options, strict=False)]
        text = "\n".join([question, "Options:", *listed])
        return text, listed if layout == "numbered" else options
    without_letter = [text[text.find(". ") :].strip(". ") for text in options]
    if layout == "joined":
        return question + " ".join(options), without_letter
    return "\n".join([question, *options]), without_letter


def _answer(answer: Any, options: list[str]) -> int | None:
    """Number of the right option: given as text, letter or number.

    >>> _answer("B", ["x", "y"]), _answer(0, ["x", "y"]), _answer("y", ["x", "y"]), _answer(7, [])
    (1, 0, 1, None)
    """
    if answer in options:
        return options.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS:
        number = _LETTERS.index(answer)
    elif str(answer).isdecimal():
        number = int(answer)
    else:
        return None
    return number if number < len(options) else None


_READERS: dict[str, Callable[[_Builder, Rows], None]] = {
    "labels": _read_labels,
    "captions": _read_captions,
    "clips": _read_clips,
    "momentseeker": _read_momentseeker,
    "options": _read_options,
}
