"""Frames of videos, found by time."""

import os

import av
import numpy as np
import pytest
from PIL import Image, ImageColor
from shared_documents import save_video

from rematch.data.clips import MAX_PIXELS, Clip
from rematch.data.images import load_image
from rematch.errors import DataError, ImageError

COLOURS = ["red", "lime", "blue", "white", "black", "orange", "purple", "yellow"]


def colours_of(clip):
    """The name of the colour that each frame shows."""
    values = {name: np.array(ImageColor.getrgb(name)) for name in COLOURS}
    means = [np.asarray(load_image(frame)).mean((0, 1)) for frame in clip.pictures()]
    return [min(values, key=lambda name: abs(values[name] - mean).sum()) for mean in means]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.MOV", "a.mkv"])
def test_frames_are_drawn_evenly(tmp_path, name):
    path = save_video(tmp_path / name.lower(), COLOURS)
    path = path.rename(tmp_path / name)
    assert colours_of(Clip(path)) == COLOURS
    assert colours_of(Clip(path, frames=4)) == COLOURS[1::2]
    assert colours_of(Clip(path, 2, 4, 2)) == COLOURS[2:4]
    assert colours_of(Clip(path, 7, 99, 2)) == COLOURS[7:] * 2


def test_seeking_finds_what_decoding_everything_finds(tmp_path):
    path = save_video(tmp_path / "long.mp4", COLOURS * 8, seconds=3)
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    for clip in (Clip(path), Clip(path, 30, 60), Clip(path, 100.5, 101, 3)):
        end = 192 if clip.end is None else clip.end
        step = (end - clip.start) / clip.frames
        for number, frame in enumerate(clip.pictures()):
            time = clip.start + (number + 0.5) * step
            expected = max((f for f in frames if f[0] <= time), key=lambda f: f[0])[1]
            difference = np.abs(np.asarray(load_image(frame), int) - np.asarray(expected, int))
            assert difference.mean() < 4, "JPEG's loss at most"


def test_segments_cover_the_video(tmp_path):
    path = save_video(tmp_path / "a.mp4", COLOURS)
    segments = Clip(path, frames=2).segments(3)
    assert [str(segment).removeprefix(str(path)) for segment in segments] == [
        "#t=0,3", "#t=3,6", "#t=6,9",
    ]  # fmt: skip
    assert colours_of(segments[2]) == COLOURS[6:]
    assert len(Clip(path).segments(8)) == 1
    assert [Clip.parse(str(segment), 2) for segment in segments] == segments
    assert Clip.parse("a.png") is None
    assert Clip.parse("a#t=1,2.mkv", 3) == Clip(type(path)("a#t=1,2.mkv"), frames=3)


def test_large_frames_are_scaled(tmp_path):
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (1920, 1080)))))
        container.mux(stream.encode())
    width, height = load_image(Clip(path, frames=1).pictures()[0]).size
    assert 0.97 * MAX_PIXELS < width * height <= MAX_PIXELS
    assert width / height == pytest.approx(16 / 9, rel=0.01)


def test_a_changed_file_is_decoded_again(tmp_path):
    path = save_video(tmp_path / "a.mp4", ["red"])
    assert colours_of(Clip(path, frames=1)) == ["red"]
    save_video(path, ["blue", "blue"])
    assert colours_of(Clip(path, frames=1)) == ["blue"]


def test_errors_name_the_file_and_the_reason(tmp_path):
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{save_video(tmp_path / 'a.mp4', ['red'])}\n")
    noise = tmp_path / "noise.webm"
    noise.write_bytes(os.urandom(5000))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    for path in (playlist, noise, cut):
        with pytest.raises(ImageError, match=rf"{path.name}: cannot be decoded \("):
            load_image(Clip(path).pictures()[0])
    with pytest.raises(ImageError, match=r"sound\.mkv: cannot be decoded \(it has no pictures"):
        load_image(Clip(sound).pictures()[0])
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ImageError, match="a pipe; only regular files"):
        load_image(Clip(tmp_path / "pipe.mp4").pictures()[0])
    with pytest.raises(ImageError, match="No such file"):
        load_image(Clip(tmp_path / "no.mp4").pictures()[0])
    with pytest.raises(DataError, match="cannot be decoded"):
        Clip(noise).segments(3)
