"""Make a folder of 10,000 documents, 50 of them hostile, index it, and check what is in the index.

    python scripts/hostile_corpus.py DIR

DIR must not exist. The index is ``DIR/index``.
"""

import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 10_000
Writer = Callable[[Path], object]


def picture(seed: int, kind: str = "PNG", size: int = 32) -> bytes:
    """A picture's file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def with_chunk(name: bytes, content: bytes) -> bytes:
    """A PNG with a further chunk after its header."""
    png = picture(0)
    chunk = struct.pack(">I", len(content)) + name + content
    return png[:33] + chunk + struct.pack(">I", zlib.crc32(name + content)) + png[33:]


def _bomb(path: Path) -> None:
    Image.new("1", (30_000, 20_000)).save(path)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 40 << 30)


def _socket(path: Path) -> None:
    current = Path.cwd()
    os.chdir(path.parent)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(current)


def _link(target: str) -> Writer:
    return lambda path: path.symlink_to(target)


def _content(content: bytes) -> Writer:
    return lambda path: path.write_bytes(content)


def _beside(suffix: str, write: Writer | bytes | str) -> Writer:
    """A good picture, and a hostile file beside it."""

    def writer(path: Path) -> None:
        path.write_bytes(picture(1))
        other = path.with_suffix(suffix)
        if isinstance(write, str):
            other.write_text(write)
        elif isinstance(write, bytes):
            other.write_bytes(write)
        else:
            write(other)

    return writer


_PNG, _JPEG = picture(0), picture(0, "JPEG")
HOSTILE: dict[str, Writer] = {
    # pictures
    "ztxt.png": _content(with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
    "itxt.png": _content(with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3 << 20)))),
    "exif.png": _content(with_chunk(b"eXIf", b"broken")),
    "bomb.png": _bomb,
    "cut.png": _content(_PNG[:400]),
    "cut.jpg": _content(_JPEG[: len(_JPEG) // 2]),
    "cut.webp": _content(picture(0, "WEBP")[:60]),
    "cut.tif": _content(picture(0, "TIFF")[:100]),
    "flat.png": _content(_PNG[:16] + bytes(4) + _PNG[20:]),
    "crc.png": _content(_PNG[:30] + b"xxx" + _PNG[33:]),
    "empty.gif": _content(b""),
    "header.gif": _content(b"GIF89a"),
    "text.jpg": _content(b"no picture"),
    "page.png": _content(b"<html><img src=x></html>"),
    # formats that Pillow reads and nobody expects
    "eps.png": _content(picture(0, "EPS")),
    "ppm.png": _content(picture(0, "PPM")),
    "ico.png": _content(picture(0, "ICO")),
    "pcx.jpg": _content(picture(0, "PCX")),
    "tga.jpg": _content(picture(0, "TGA")),
    "sgi.bmp": _content(picture(0, "SGI")),
    # no files
    "pipe.png": os.mkfifo,
    "socket.png": _socket,
    "zero.png": _link("/dev/zero"),
    "null.jpg": _link("/dev/null"),
    "sparse.png": _sparse,
    "loop.png": _link("loop.png"),
    "gone.png": _link("nowhere.png"),
    # what is beside a picture
    "surrogate.png": _beside(".json", '{"text": "a \\ud800 b"}'),
    "field surrogate.png": _beside(".json", '{"place": "\\udfff"}'),
    "400 digits.png": _beside(".json", '{"year": 1' + "0" * 400 + "}"),
    "9000 digits.png": _beside(".json", '{"year": 1' + "0" * 9000 + "}"),
    "infinite.png": _beside(".json", '{"year": -1e999}'),
    "deep.png": _beside(".json", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    "list.png": _beside(".json", "[1]"),
    "text list.png": _beside(".json", '{"text": ["a"]}'),
    "caption object.png": _beside(".json", '{"caption": {"a": 1}}'),
    "no json.png": _beside(".json", "{"),
    "latin.png": _beside(".txt", b"caf\xe9"),
    "latin json.png": _beside(".json", b'{"text": "caf\xe9"}'),
    "pipe text.png": _beside(".txt", os.mkfifo),
    "pipe json.png": _beside(".json", os.mkfifo),
    "sparse json.png": _beside(".json", _sparse),
    "folder.png": _beside(".json", Path.mkdir),
    "device.png": _beside(".txt", _link("/dev/zero")),
    "fields.png": _beside(".json", json.dumps({f"field {i}": i for i in range(300)})),
    "reserved.png": _beside(".json", '{"vector": [1]}'),
    "dotted.png": _beside(".json", '{"a.b": 1}'),
    "another type.png": _beside(".json", '{"year": "late"}'),
    "long.png": _beside(".txt", "a" * 2_000_000),
    "case.png": _beside(".json", '{"Year": 1}'),
}


def write_corpus(folder: Path, count: int) -> list[str]:
    """Write a corpus with everything of :data:`HOSTILE` spread among good pictures.

    Args:
        folder: The folder to make.
        count: Number of documents, the hostile ones included.

    Returns:
        Ids of the good documents.
    """
    folder.mkdir(parents=True)
    good = []
    for i in range(count - len(HOSTILE)):
        path = folder / f"{i % 50:02}" / f"{i:05}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i))
        if i % 3 == 0:
            path.with_suffix(".json").write_text(json.dumps({"text": f"{i}", "year": 1900 + i}))
        good.append(str(path.relative_to(folder)))
    for i, (name, write) in enumerate(HOSTILE.items()):
        path = folder / f"{i % 50:02}" / name
        path.parent.mkdir(exist_ok=True)
        write(path)
    (folder / "circle").symlink_to(folder)
    (folder / "up").symlink_to("/")
    return good


def check(index: Path, good: list[str]) -> str:
    """Check that the index has the good documents, and its report the others; say so."""
    import lancedb

    failures = json.loads((index / "report.json").read_text())["last_run"]["failures"]
    table = lancedb.connect(index).open_table("documents")
    indexed = set(table.search().select(["id"]).to_arrow()["id"].to_pylist())
    assert indexed == set(good), sorted(indexed ^ set(good))[:20]
    assert {Path(name).name for name in failures} == set(HOSTILE), failures
    return f"{len(indexed):,} indexed, {len(failures)} refused"


def main() -> None:
    """Write, index, check."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    root = Path(sys.argv[1])
    good = write_corpus(root / "corpus", COUNT)
    start = time.monotonic()
    command = [sys.executable, "-m", "rematch.cli", "index", root / "corpus"]
    subprocess.run([*command, "--output", root / "index"], check=True)
    print(f"{check(root / 'index', good)}, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
