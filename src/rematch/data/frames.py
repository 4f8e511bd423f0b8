"""Frames of videos: from a folder of pictures, or from a file that is decoded once.

A video stands for N of its frames, drawn evenly from the first to the last. Of a file, up to 64
evenly drawn frames are written to a folder, as MMEB-V2 does, and the N are drawn from those.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

from PIL import Image

from rematch.data.clips import FORMATS, open_video
from rematch.errors import DataError

T = TypeVar("T")
FRAMES = 8  # of a video that the benchmark encodes
KEPT = 64  # frames of a file that are written to disk
VIDEO_EXTENSIONS = tuple(FORMATS)
_PARTIAL = ".partial-"
_PICTURES = (".jpg", ".jpeg", ".png")


def draw_evenly(frames: Sequence[T], count: int) -> list[T]:
    """Draw frames evenly, the first and the last among them; all, if there are not more.

    >>> draw_evenly(range(64), 8)
    [0, 9, 18, 27, 36, 45, 54, 63]
    >>> draw_evenly("abc", 8)
    ['a', 'b', 'c']
    >>> draw_evenly(range(10), 1)
    [0]
    """
    if len(frames) <= count:
        return list(frames)
    return [frames[i * (len(frames) - 1) // max(1, count - 1)] for i in range(count)]


def frames_in(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of the numbers in their names; none if there is no
    such folder.
    """
    if not folder.is_dir():
        return []
    pictures = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _PICTURES and not path.name.startswith("._")
    ]
    return sorted(pictures, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def extract_frames(video: Path, folder: Path, kept: int = KEPT) -> list[Path]:
    """Decode a video's evenly drawn frames into a folder, which appears when it is complete.

    Args:
        video: The file.
        folder: Folder to create.
        kept: How many frames at most.

    Raises:
        DataError: If PyAV is not installed, the video cannot be decoded, or the folder cannot be
            written.
    """
    # a new folder for each process, so that what is removed is never anybody else's
    partial = folder.with_name(f"{folder.name}{_PARTIAL}{token_hex(8)}")
    try:
        partial.mkdir(parents=True)
        try:
            for number, frame in _decode(video, kept):
                frame.save(partial / f"{number:06}.jpg", quality=95)
            try:
                os.replace(partial, folder)
            except OSError:
                if not frames_in(folder):  # otherwise another process was faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder}: frames of {video.name} cannot be written ({error.strerror or error}). "
            "Make the folder writable, or put the frames there."
        ) from None
    return frames_in(folder)


def _decode(video: Path, kept: int) -> Iterator[tuple[int, Image.Image]]:
    """Yield the number and the picture of evenly drawn frames."""
    with open_video(video) as (container, stream):
        total = sum(1 for _ in container.decode(stream))
    if not total:
        raise DataError(f"{video}: has no frames. Replace the file.")
    numbers = {i * total // kept for i in range(kept)} if total > kept else set(range(total))
    with open_video(video) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                yield number, frame.to_image()


class Videos:
    """The videos of a set: folders of frames, else files.

    Args:
        directory: The benchmark's folder.
        folder: The set's folder in it, such as ``video_cls/HMDB51``: frames are in
            ``video-tasks/frames/FOLDER/NAME``, videos in ``video-tasks/videos/FOLDER/NAME.mp4``;
            ``video-tasks`` may be left out.
        count: N, how many frames stand for a video.

    Attributes:
        missing: Names of the videos that are neither there.
    """

    def __init__(self, directory: Path, folder: str, count: int = FRAMES) -> None:
        tasks = directory / "video-tasks"
        self.root = tasks if tasks.is_dir() else directory
        self.folder, self.count = folder, count
        self.missing: list[str] = []
        self._frames: dict[str, list[Path]] = {}

    @property
    def frames(self) -> Path:
        """The folder of the set's frames."""
        return self.root / "frames" / self.folder

    def find(self, name: str) -> list[Path]:
        """N frames of a video; none, and its name noted, if it is missing.

        Args:
            name: Name of the video, without the extension of a file; it may have folders.

        Raises:
            DataError: If the name leads out of the set's folder, or as for
                :func:`extract_frames`.
        """
        if name not in self._frames:
            self._check(name)
            try:
                self._frames[name] = draw_evenly(self._find(name), self.count)
            except OSError as error:  # such as a name that is too long
                raise DataError(f"{self.frames}: {name[:80]!r} ({error.strerror}).") from None
        if not self._frames[name]:
            self.missing.append(name)
        return self._frames[name]

    def clips(self, name: str) -> list[str]:
        """Names of the clips of a video, the folders in its own; without ``query``, the whole.

        Raises:
            DataError: If the name leads out of the set's folder.
        """
        self._check(name)
        try:
            folders = [path.name for path in (self.frames / name).iterdir() if path.is_dir()]
        except OSError:  # no such folder; find() says so
            return []
        return sorted(name for name in folders if name != "query" and _PARTIAL not in name)

    def _check(self, name: str) -> None:
        leads_out = Path(name).is_absolute() or ".." in Path(name).parts
        if leads_out or "\0" in name or not name.strip():
            raise DataError(f"{self.frames}: {name[:80]!r} is not the name of a video.")

    def _find(self, name: str) -> list[Path]:
        if frames := frames_in(self.frames / name):
            return frames
        video = self.root / "videos" / self.folder / name
        for file in (video, *(video.with_name(video.name + end) for end in VIDEO_EXTENSIONS)):
            if file.is_file() and file.suffix.lower() in VIDEO_EXTENSIONS:
                return extract_frames(file, self.frames / name)
        return []

    def raise_if_missing(self) -> None:
        """Raise a DataError if videos were missing."""
        if self.missing:
            more = f" (and {len(self.missing) - 1:,} more)" if len(self.missing) > 1 else ""
            raise DataError(
                f"no frames of {self.missing[0]}{more} in {self.frames}, and no video in "
                f"{self.root / 'videos' / self.folder}"
            )
