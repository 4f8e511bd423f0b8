"""Clips of video files: N frames, drawn evenly from a span of time.

A frame is found by seeking, so that a long video is not decoded as a whole. Frames are kept as
JPEG with at most MMEB's number of pixels.
"""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from rematch.errors import DataError, ImageError, first_line
from rematch.files import regular_status

EXTENSIONS = (".mp4", ".webm", ".mov", ".mkv")
FRAMES = 8
MAX_PIXELS = 1280 * 28 * 28  # of a frame, MMEB's limit for a picture
MAX_DECODED = 89_478_485  # pixels, Pillow's limit
_LARGEST = 1 << 40  # bytes
_QUALITY = 90
_SEEK_OVER = 5.0  # seconds; nearer frames are reached by decoding those before them
# FFmpeg must not take a playlist for a video, as it would open what that names
FORMATS = {
    ".mp4": "mp4",
    ".avi": "avi",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
}
_TIME = re.compile(r"(.+)#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Clip:
    """A video, or a part of it.

    Attributes:
        path: Path of the file.
        start: Where it begins, in seconds.
        end: Where it ends, in seconds; ``None`` for the end of the file.
        frames: N, how many frames stand for it; a shorter one repeats some.
    """

    path: Path
    start: float = 0.0
    end: float | None = None
    frames: int = FRAMES

    def __str__(self) -> str:
        if self.end is None:
            return str(self.path)
        return f"{self.path}#t={self.start:g},{self.end:g}"

    @classmethod
    def parse(cls, name: str, frames: int = FRAMES) -> "Clip | None":
        """The clip that is written as ``FILE.mp4`` or ``FILE.mp4#t=START,END``; ``None`` for
        other text.

        >>> Clip.parse("clip.mp4#t=30,60").start
        30.0
        """
        match = _TIME.fullmatch(name)
        path = match[1] if match else name
        if not path.lower().endswith(EXTENSIONS):
            return None
        if match is None:
            return cls(Path(path), frames=frames)
        return cls(Path(path), float(match[2]), float(match[3]), frames)

    def pictures(self) -> list["Frame"]:
        """Its N frames, which are decoded when the first one is read."""
        return [Frame(self, number) for number in range(self.frames)]

    def segments(self, seconds: float) -> list["Clip"]:
        """The clip in parts of this many seconds, the last of which may be shorter.

        Raises:
            DataError: If the video cannot be opened.
        """
        with open_video(self.path) as (container, stream):
            duration = _duration(container, stream)
        starts = [seconds * i for i in range(max(1, math.ceil(duration / seconds - 1e-6)))]
        return [replace(self, start=start, end=start + seconds) for start in starts]


@dataclass(frozen=True)
class Frame:
    """A frame of a clip, as a picture's file.

    Attributes:
        clip: The clip.
        number: The frame's number, from 0.
    """

    clip: Clip
    number: int

    def __str__(self) -> str:
        return f"{self.clip}, frame {self.number + 1}"

    def read_bytes(self) -> bytes:
        """The frame as JPEG.

        Raises:
            ImageError: If the video cannot be decoded.
        """
        try:
            status = regular_status(self.clip.path, _LARGEST)
            return _frames(self.clip, status.st_mtime_ns, status.st_size)[self.number]
        except OSError as error:
            raise ImageError(
                f"{self.clip.path}: cannot be read ({error.strerror}). Check the file."
            ) from None
        except DataError as error:
            raise ImageError(str(error)) from None


@lru_cache(maxsize=4)
def _frames(clip: Clip, modified: int, size: int) -> tuple[bytes, ...]:
    """All frames of a clip, decoded anew if the file has changed."""
    with open_video(clip.path) as (container, stream):
        duration = _duration(container, stream)
        end = max(clip.start, duration if clip.end is None else min(clip.end, duration))
        step = (end - clip.start) / clip.frames
        times = [clip.start + step * (number + 0.5) for number in range(clip.frames)]
        return tuple(map(_jpeg, _frames_at(container, stream, times)))


def _frames_at(container: Any, stream: Any, times: list[float]) -> Iterator[Any]:
    """The frame that is shown at each of the times, which increase; seconds from the start."""
    begin = _seconds(stream.start_time, stream)
    shown: Any = None
    ahead: Any = None  # the frame after it
    for time in times:
        if ahead is None or begin + time > ahead.time + _SEEK_OVER:
            container.seek(int((begin + time) / stream.time_base), stream=stream)
            frames, shown, ahead = container.decode(stream), None, None
        while ahead is None or ahead.time <= begin + time:
            shown = ahead or shown
            ahead = next(frames, None)
            if ahead is None:
                break
            if ahead.time is None:
                raise DataError("a frame does not say when it is shown")
        if shown is None and ahead is None:
            raise DataError("no frame can be decoded")
        yield shown or ahead


def _jpeg(frame: Any) -> bytes:
    picture: Image.Image = frame.to_image()
    if frame.rotation:
        picture = picture.rotate(frame.rotation, expand=True)
    scale = (MAX_PIXELS / (picture.width * picture.height)) ** 0.5
    if scale < 1:
        picture.thumbnail((int(picture.width * scale), int(picture.height * scale)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _duration(container: Any, stream: Any) -> float:
    """The length of a video in seconds; counted, if the file does not say it."""
    if stream.duration:
        return _seconds(stream.duration, stream)
    if container.duration:
        return float(container.duration) / 1_000_000
    times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    return _seconds(max(times) - min(times), stream) if times else 0.0


def _seconds(ticks: int | None, stream: Any) -> float:
    return float((ticks or 0) * stream.time_base)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video and its picture stream.

    Raises:
        DataError: If PyAV is not installed, or the file cannot be opened or decoded.
    """
    try:
        import av
    except ImportError:
        raise DataError("videos need PyAV: pip install 'rematch-mm[video]'.") from None
    try:
        regular_status(path, _LARGEST)
        with av.open(str(path), format=FORMATS[path.suffix.lower()]) as container:
            if not container.streams.video:
                raise DataError("it has no pictures")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_DECODED:
                raise DataError(f"its frames have more than {MAX_DECODED:,} pixels")
            yield container, stream
    except DataError as error:
        message = str(error)
        named = message if str(path) in message else f"{path}: cannot be decoded ({message})."
        raise DataError(named) from None
    except Exception as error:  # FFmpeg's errors, and what its wrapper makes of odd files
        raise DataError(
            f"{path}: cannot be decoded ({first_line(error)}). Replace the file."
        ) from None
