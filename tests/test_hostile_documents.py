"""One bad document never stops a run, whatever is wrong with it; the others are indexed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shared_search import build_index, contents, save_picture

from rematch.data.corpus import open_corpus
from rematch.data.document import Unreadable
from rematch.data.images import FORMATS, load_image
from rematch.errors import DataError, ImageError, RematchError
from rematch.files import read_regular

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from hostile_corpus import HOSTILE, picture, write_corpus

KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


def ids(output):
    return {row["id"] for row in contents(output)}


def test_a_folder_with_hostile_files_is_indexed_but_for_them(searcher, tmp_path, tally):
    """``scripts/hostile_corpus.py`` does the same with 10,000 documents."""
    good = write_corpus(tmp_path / "corpus", len(HOSTILE) + 40)
    _, report = build_index(searcher, tmp_path / "corpus", tmp_path / "i", max_failures=1)
    assert ids(tmp_path / "i") == set(good)
    failures = {Path(name).name: reason for name, reason in report.failures.items()}
    assert failures.keys() == HOSTILE.keys()
    reasons = {
        "ztxt.png": "Decompressed data too large",
        "eps.png": "not a picture that Pillow can read as PNG",
        "pipe.png": "is a pipe",
        "zero.png": "is a device",
        "sparse.png": "42,949,672,960 bytes",
        "pipe json.png": "is a pipe",
        "loop.png": "symbolic links",
        "surrogate.png": "lone surrogate",
        "400 digits.png": "beyond",
        "another type.png": "other documents have a number",
        "fields.png": "300 fields",
    }
    for name, part in reasons.items():
        assert part in failures[name], failures[name]
    assert not any("\n" in reason or len(reason) > 700 for reason in failures.values())
    tally("Documents")["refused, with the reason"] += len(failures)
    # and again, when nothing has changed
    _, report = build_index(searcher, tmp_path / "corpus", tmp_path / "i", max_failures=1)
    assert (report.unchanged, report.encoded, report.deleted) == (len(good), 0, 0)
    assert len(report.failures) == len(HOSTILE)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file with a few bytes changed, a part cut out, repeated or moved, or its end lost."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((1, 4, 30, 200)))
        kind = rng.choice("flip zero cut repeat insert end header".split())
        if kind == "flip":
            data[start] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            data[start:end] = bytes(end - start)
        elif kind == "cut" and len(data) > 300:
            del data[start:end]
        elif kind == "repeat":
            data[start:start] = data[start:end]
        elif kind == "insert":
            data[start:start] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == "end":
            del data[max(20, start) :]
        elif kind == "header":
            data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(data)


def sidecar(rng: random.Random) -> bytes:
    """JSON, or nearly, of values that nobody expects beside a picture."""
    values = [
        "a", "", " ", 0, -1, 1e308, 10**400, True, None, [], {}, [[["x"]]], {"a": {"b": 1}},
        "\ud800", "\udfff\ud800", "\x00", "\u202e", "x" * 70_000, float("nan"), float("inf"),
    ]  # fmt: skip
    names = [
        "text",
        "caption",
        "year",
        "",
        " ",
        "*",
        "_x",
        "a.b",
        "a`b",
        "vector",
        "ID",
        "é",
        "\ud83d",
    ]
    record = {rng.choice(names): rng.choice(values) for _ in range(rng.randint(0, 3))}
    content = json.dumps(record, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    return mutated(content + b" " * 8, rng) if rng.random() < 0.3 else content


def test_mutated_pictures_and_sidecars_are_indexed_or_refused(searcher, tmp_path, tally):
    rng = random.Random(15)
    folder = tmp_path / "corpus"
    for i in range(20):
        save_picture(folder / f"good {i}.png", i)
    originals = {kind: picture(7, kind, 40) for kind in FORMATS}
    for i in range(240):
        kind = rng.choice(FORMATS)
        path = folder / f"mutated {i}.{KINDS[kind]}"
        path.write_bytes(mutated(originals[kind], rng))
    for i in range(160):
        path = folder / f"sidecar {i}.png"
        path.write_bytes(originals["PNG"])
        path.with_suffix(".json").write_bytes(sidecar(rng))
    index, report = build_index(
        searcher, folder, tmp_path / "i", batch_tokens=2000, max_failures=1
    )
    indexed = ids(tmp_path / "i")
    assert report.documents == 420
    assert {f"good {i}.png" for i in range(20)} <= indexed
    assert len(indexed) + len(report.failures) == report.documents
    assert not indexed & report.failures.keys()
    assert min(len(indexed), len(report.failures)) > 100, "the inputs are of both kinds"
    tally("Documents")["indexed"] += len(indexed) - 20
    tally("Documents")["refused, with the reason"] += len(report.failures)
    assert index.search("a", 3)


def hostile_lines(rng: random.Random) -> list[bytes]:
    """Lines of JSON that are no documents, or strange ones."""
    values = [
        "''", "5", "true", "null", "[]", "{}", "[1]", '{"a": 1}', '"\\ud800"', '"x\\u0000.png"',
        '"' + "a" * 5000 + '.png"', '"' + "b/" * 3000 + 'c.png"', "1" + "0" * 400,
        "1" + "0" * 9000, "-1e999", "NaN", "[" * 100_000 + "]" * 100_000, '"/dev/zero.png"',
        '"pipe.png"', '{"bytes": 5}', '{"path": "/dev/zero"}', '{"path": 5}', '{"bytes": null}',
        '"' + "c" * 1_100_000 + '"', '{"image": ["a.png", "a.png"]}', '{"text": 5}', '"<image>"',
    ]  # fmt: skip
    lines = [
        f'{{"{name}": {value}}}' for name in ("text", "image", "document") for value in values
    ]
    lines += [f'{{"text": "a", "{name}": {value}}}' for name in ("id", "n") for value in values]
    lines += values
    encoded = [line.encode() for line in lines]
    encoded += [b"\xff\xfe{}", b'{"text": "caf\xe9"}', b"\x00", b'{"text": "a"} {"text": "b"}']
    good = b'{"text": "a line", "year": 3}'
    encoded += [mutated(good * 3, rng)[: len(good) + 5].replace(b"\n", b"") for _ in range(60)]
    rng.shuffle(encoded)
    return encoded


def test_hostile_lines_are_indexed_or_refused(searcher, tmp_path, tally):
    rng = random.Random(16)
    os.mkfifo(tmp_path / "pipe.png")
    lines = hostile_lines(rng)
    good = [json.dumps({"id": f"good {i}", "text": f"text {i}"}).encode() for i in range(20)]
    # ids like the numbers of lines that cannot be read
    good += [json.dumps({"id": str(i), "text": f"number {i}"}).encode() for i in range(1, 30)]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines + good))
    _, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i", max_failures=1)
    rows = {row["id"]: row["text"] for row in contents(tmp_path / "i")}
    assert {f"good {i}" for i in range(20)} <= rows.keys()
    assert len(rows) + len(report.failures) == report.documents
    unnamed = [i for i in range(1, 30) if rows.get(str(i)) == f"number {i}"]
    assert len(unnamed) > 15, "a line that cannot be read does not take another's id"
    tally("Documents")["indexed"] += len(rows) - 20
    tally("Documents")["refused, with the reason"] += len(report.failures)


def test_hostile_cells_of_parquet_are_indexed_or_refused(searcher, tmp_path, tally):
    good = picture(3)
    images = [good, b"", b"no picture", good[:300], b"%!PS-Adobe-3.0 EPSF-3.0\n", None, good]
    texts = ["a", "", "b", "\x00", "d", "x" * 1_100_000, "good"]
    numbers = [1.0, float("nan"), float("inf"), -0.0, 1e308, None, 2.0]
    table = pa.table({"image": images, "text": texts, "n": numbers})
    invalid = pa.array([b"\xff\xfe"] + [b"x"] * 6).view(pa.binary())
    table = table.append_column(
        "s", pa.StringArray.from_buffers(7, invalid.buffers()[1], invalid.buffers()[2])
    )
    pq.write_table(table, tmp_path / "c.parquet")
    _, report = build_index(searcher, tmp_path / "c.parquet", tmp_path / "i", max_failures=1)
    rows = {row["text"]: row for row in contents(tmp_path / "i")}
    assert rows["good"]["n"] == 2.0
    assert len(rows) + len(report.failures) == 7
    assert "1" in report.failures, "its string is not UTF-8"
    tally("Documents")["indexed"] += len(rows) - 1
    tally("Documents")["refused, with the reason"] += len(report.failures)
    for content in (b"", b"PAR1", (tmp_path / "c.parquet").read_bytes()[:-30] + bytes(30)):
        (tmp_path / "broken.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.parquet: cannot be read as parquet"):
            list(open_corpus(tmp_path / "broken.parquet"))
        tally("Documents")["refused, with the reason"] += 1


def test_folders_of_links_and_of_great_depth_are_walked_once(tmp_path, tally):
    folder = tmp_path / "corpus"
    outside = tmp_path / "outside"
    for i in range(30):  # 2**30 ways lead to the last one
        (outside / str(i)).mkdir(parents=True)
        if i:
            for name in "ab":
                (outside / str(i - 1) / name).symlink_to(outside / str(i))
    save_picture(outside / "29" / "last.png", 1)
    save_picture(folder / "first.png", 2)
    for name, target in {"out": outside, "up": "/", "self": folder, "loop": "loop"}.items():
        (folder / name).symlink_to(target)
    deep, names = os.open(folder, os.O_RDONLY), []
    for level in range(1200):  # more than Python recurses, more than a path may be long
        names.append(f"{level:04}")
        os.mkdir(names[-1], dir_fd=deep)
        below = os.open(names[-1], os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    (folder / ("n" * 251 + ".png")).write_bytes(picture(3))  # 255 bytes: no sidecar's name fits
    try:
        documents = list(open_corpus(folder))
    finally:  # pytest cannot remove a folder of such depth
        subprocess.run(["rm", "-rf", folder / names[0]], check=True)
    readable = [document.id for document in documents if not isinstance(document, Unreadable)]
    assert sorted(readable) == ["first.png", "n" * 251 + ".png", "out/29/last.png"]
    (too_deep,) = [document for document in documents if isinstance(document, Unreadable)]
    assert "name too long" in str(too_deep.error)
    tally("Documents")["indexed"] += 1
    tally("Documents")["refused, with the reason"] += 1


def test_whatever_an_input_raises_is_its_own_failure(
    searcher, photos, tmp_path, monkeypatch, tally
):
    """Exceptions of libraries that nobody has thought of, in loading and in decoding."""
    from rematch.data import images
    from rematch.search.documents import DocumentEncoder

    errors = [MemoryError(), RecursionError("deep"), ZeroDivisionError(), KeyError("x"), OSError()]
    (photos / "bad.png").write_bytes(picture(9, size=37))
    decode, load = images._as_rgb, DocumentEncoder.load
    for error in errors:

        def failing_decode(image, error=error):
            if image.size == (37, 37):
                raise error
            return decode(image)

        def failing_load(self, document, *, is_new, error=error):
            if document.id == "bad.png":
                document = type("Document", (), {"id": "bad.png", "stamp": lambda _: 1 / 0})()
            return load(self, document, is_new=is_new)

        with monkeypatch.context() as patch:
            patch.setattr(images, "_as_rgb", failing_decode)
            _, report = build_index(searcher, photos, tmp_path / f"i {type(error).__name__}")
        assert list(report.failures) == ["bad.png"]
        assert type(error).__name__ in report.failures["bad.png"]
        tally("Documents")["refused, with the reason"] += 1
    monkeypatch.setattr(DocumentEncoder, "load", failing_load)
    _, report = build_index(searcher, photos, tmp_path / "i")
    assert "ZeroDivisionError" in report.failures["bad.png"]


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PCX", "TGA", "PDF"])
def test_only_the_documented_formats_are_opened(tmp_path, kind, tally):
    path = tmp_path / "a.png"
    path.write_bytes(b"%PDF-1.4" if kind == "PDF" else picture(0, kind))
    with pytest.raises(ImageError, match="not a picture that Pillow can read as PNG"):
        load_image(path)
    tally("Documents")["refused, with the reason"] += 1


def test_only_regular_files_up_to_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for path, part in {
        tmp_path / "pipe": "a pipe",
        tmp_path: "a folder",
        Path("/dev/zero"): "a device",
        tmp_path / "large": "11 bytes",
        Path("/proc/self/maps"): "larger than 10 bytes",  # its size is said to be 0
    }.items():
        with pytest.raises(RematchError, match=part):
            read_regular(path, 10)
    assert read_regular(tmp_path / "large", 11) == bytes(11)


def test_a_picture_in_memory_is_not_restricted():
    assert load_image(Image.fromarray(np.zeros((40, 40, 3), np.uint8))).size == (40, 40)
