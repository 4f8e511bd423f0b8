"""Measure on one GPU, in nine minutes, what a CPU cannot show.

    python benchmarks/gpu.py                                # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --small --output small.json    # tiny sizes on a CPU

The backbone has Qwen2-VL-2B's shape and random weights; nothing is downloaded. Qwen's processor
needs torchvision; without it a LLaVA of the same widths is used. The parts are independent: one
that fails, or lacks its package, is recorded with its error, and the others go on. Each part has a
share of the time; what it does not use goes to those after it. The file is rewritten after every
part.

- steps: seconds of a training step of every arm, gradient cache everywhere, against
  sentence-transformers' CachedMultipleNegativesRankingLoss on the same samples. Arms are
  interleaved; medians are compared. MFU counts a forward and a backward pass, by torch's flop
  counter, without what the cache computes again.
- memory: peak of one step with its optimizer, against ``rematch train --estimate``.
- precision: losses and gradients under bfloat16 autocast against float32, in a smaller shape.
- flex: FlexAttention with the block mask against sdpa with the dense one: matching loss and
  gradients of a small LLaVA (transformers has no FlexAttention for Qwen2-VL).
- liger, compile, qlora: a step of each against the plain one.
- encode, rerank: inputs and pairs per second.
- collectives: NCCL (gloo on a CPU) in a group of one process, and a step under DDP against the
  plain one.
"""

import argparse
import datetime
import faulthandler
import math
import os
import platform
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS, Bench, clean
from rich.console import Console
from rich.table import Table

from rematch.files import write_json
from rematch.train.estimate import GB

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "torchvision",
    "bitsandbytes",
    "liger-kernel",
)


class TimeIsUp(BaseException):  # libraries catch and wrap an Exception
    """A part has used up its share of the time."""


def run_part(
    bench: Bench, part: Callable[[Bench], dict[str, Any]], limit: float
) -> dict[str, Any]:
    """Run a part for at most ``limit`` seconds; its results or its error, and its duration."""

    def stop(number: int, frame: Any) -> None:
        raise TimeIsUp(f"not finished within its {limit:.1f} seconds")

    start = time.monotonic()
    bench.deadline = start + limit
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        result = part(bench)
    except (Exception, TimeIsUp) as error:  # a part that fails is a result; the others go on
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        if not isinstance(error, TimeIsUp):
            result["traceback"] = traceback.format_exc().splitlines()[-12:]
        traceback.clear_frames(error.__traceback__)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    clean()
    return result | {"took": time.monotonic() - start}


def rounded(value: Any) -> Any:
    """Round to four digits; NaN and infinity become text, which JSON can hold."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def installed(name: str) -> str | None:
    """Version of a package, or ``None``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def summary(result: dict[str, Any]) -> str:
    """A part's results as lines of the table."""
    if "error" in result:
        return f"[red]{result['error'][:160]}[/red]"
    lines = []
    for name, value in result.items():
        if name == "took" or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def main() -> None:
    """Run the parts, write JSON after each, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="minutes for all parts together"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples per step")
    parser.add_argument(
        "--mini-batch-tokens", type=int, help="tokens of a forward pass; by default as many as fit"
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="only these parts, separated by commas"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; by default benchmarks/results/gpu.json, or none with --small",
    )
    args = parser.parse_args()
    args.device = "cpu" if args.small else "cuda"
    if args.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device. Use --small to run on a CPU.")
    output = args.output or (
        None if args.small else Path(__file__).parent / "results" / "gpu.json"
    )
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(
            f"--parts {','.join(sorted(unknown))} is unknown; choose from {','.join(PARTS)}"
        )
    end = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / GB
        if args.device == "cuda"
        else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "small": args.small,
        "parts": {},
    }

    def write() -> None:
        if output:
            write_json(output, rounded(report))

    # a part that hangs inside a kernel receives no signal; what has been written stays
    faulthandler.dump_traceback_later(60 * args.minutes + 30, exit=True)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, Path(directory))
        report |= {"family": bench.family, "batch": bench.batch, "mini_batch_tokens": bench.tokens}
        weights = sum(file.stat().st_size for file in Path(bench.path).glob("*.safetensors"))
        report["weights_gb"] = weights / GB
        for i, name in enumerate(names):
            remaining = end - time.monotonic()
            share = PARTS[name][0] / sum(PARTS[later][0] for later in names[i:])
            limit = max(0.1, remaining * min(1.0, 1.5 * share))
            report["parts"][name] = {"error": "the benchmark ended while this part was running"}
            write()
            report["parts"][name] = run_part(bench, PARTS[name][1], limit)
            write()
            failed = "error" in report["parts"][name]
            print(
                f"{name}: {'failed' if failed else 'done'} after "
                f"{report['parts'][name]['took']:.1f} s",
                flush=True,
            )
    faulthandler.cancel_dump_traceback_later()
    table = Table("part", "seconds", "result")
    for name, result in rounded(report)["parts"].items():
        table.add_row(name, str(result["took"]), summary(result))
    Console().print(table)
    if output:
        print(f"Written: {output}")


if __name__ == "__main__":
    main()
