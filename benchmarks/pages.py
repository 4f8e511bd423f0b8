"""Indexing PDF files and videos: pages a second, memory, and what kill -9 does to it.

    python benchmarks/pages.py --output benchmarks/results/pages.json

A file of 1,000 pages is indexed by `rematch index`, whose memory (PSS, all of its processes) is
read twice a second. Then a folder of PDF files and videos is indexed once undisturbed and once
with five kills at random moments, and the two indexes are compared.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rematch.files import write_json
from rematch.search.index import Index

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from shared_documents import save_pdf, save_video

_TEXT = "page {} of {}: an owl, a fox and {} other animals"
_COLOURS = ("red", "lime", "blue", "white", "black", "orange", "purple", "yellow")


def command(model: str, folder: Path, output: Path) -> list[str]:
    """The command that indexes a folder."""
    arguments = ["index", model, str(folder), "--output", str(output), "--frames", "4"]
    return [sys.executable, "-m", "rematch.cli", *arguments]


def megabytes(group: int) -> float:
    """Memory of a process group (PSS)."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                text = (stat.parent / "smaps_rollup").read_text()
                total += int(text.split("\nPss:")[1].split()[0])
        except (OSError, IndexError):
            continue
    return round(total / 1024, 1)


def index_pages(model: str, folder: Path, pages: int) -> dict[str, object]:
    """Index a file of many pages; pages a second and memory at each quarter."""
    corpus, output = folder / "long", folder / "long.idx"
    corpus.mkdir()
    save_pdf(corpus / "long.pdf", [_TEXT.format(n, pages, n % 7) for n in range(pages)], "Long")
    started = time.monotonic()
    process = subprocess.Popen(
        command(model, corpus, output), stderr=subprocess.DEVNULL, start_new_session=True
    )
    readings: list[tuple[int, float]] = []
    first: tuple[float, int] | None = None
    while process.poll() is None:
        time.sleep(0.5)
        count = len(Index.open(output)) if (output / "documents.lance").is_dir() else 0
        if count and first is None:
            first = time.monotonic(), count
        readings.append((count, megabytes(process.pid)))
    if process.returncode or first is None:
        raise SystemExit("the file was not indexed")
    seconds = time.monotonic() - started
    memory = {}
    for quarter in range(4):
        low, high = quarter * pages // 4, (quarter + 1) * pages // 4
        memory[f"{low} to {high}"] = max((m for n, m in readings if low <= n < high), default=0.0)
    return {
        "pages": pages,
        "seconds": round(seconds, 1),
        "pages_per_second_after_the_first_commit": round(
            (pages - first[1]) / (started + seconds - first[0]), 1
        ),
        "most_memory_mb_by_pages_written": memory,
    }


def kill(model: str, folder: Path, kills: int) -> dict[str, object]:
    """Index a folder undisturbed, and with kills; whether the rows are the same."""
    corpus = folder / "media"
    corpus.mkdir()
    for number in range(4):
        texts = [_TEXT.format(n, 60, number) for n in range(60)]
        save_pdf(corpus / f"{number}.pdf", texts, f"Report {number}")
        colours = random.Random(number).sample(_COLOURS, 6)
        save_video(corpus / f"{number}.mp4", colours)
    rng = random.Random(0)
    whole, disturbed = folder / "whole.idx", folder / "disturbed.idx"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(model, corpus, whole), check=True, **quiet)
    sizes = []
    while len(sizes) < kills:
        process = subprocess.Popen(
            command(model, corpus, disturbed), start_new_session=True, **quiet
        )
        size = sizes[-1] if sizes else 0
        table = disturbed / "documents.lance"
        while process.poll() is None and not (
            table.is_dir() and len(Index.open(disturbed)) > size
        ):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            raise SystemExit("the run ended before it was killed")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        sizes.append(len(Index.open(disturbed)))
    subprocess.run(command(model, corpus, disturbed), check=True, **quiet)
    columns = ["id", "text", "page", "title", "content_hash", "vector"]
    a, b = (
        Index.open(path).table.search().select(columns).to_arrow().sort_by("id")
        for path in (whole, disturbed)
    )
    vectors = [np.stack(t["vector"].to_numpy()) for t in (a, b)]
    same = a.drop(["vector"]).equals(b.drop(["vector"]))
    return {
        "killed": kills,
        "documents_after_each": sizes,
        "documents": len(b),
        "same_rows": same,
        "largest_difference_of_a_vector": float(np.abs(vectors[0] - vectors[1]).max()),
    }


def main() -> None:
    """Measure, print and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        content = {
            "one_file": index_pages(args.model, folder, args.pages),
            "kill": kill(args.model, folder, args.kills),
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "versions": {n: version(n) for n in ("torch", "pypdfium2", "av", "lancedb")},
        }
    print(content)
    if args.output:
        write_json(args.output, content)
    if not content["kill"]["same_rows"]:
        raise SystemExit("the indexes differ")


if __name__ == "__main__":
    main()
