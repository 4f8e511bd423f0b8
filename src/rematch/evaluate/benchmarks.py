"""What can be evaluated on, by name: Picto, MMEB, the five zero-shot sets, own data."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rematch.data import picto_tasks
from rematch.data.custom import load_custom
from rematch.data.mmeb import download, load_mmeb_eval
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.picto_tasks import BLOCK, QUERIES, evaluation_tasks
from rematch.data.schema import RetrievalTask
from rematch.data.zeroshot import load_zeroshot
from rematch.errors import DataError

NAMES = ("picto", "mmeb", "zeroshot")
_MMEB = [d.name for d in DATA_SETS]


@dataclass
class Benchmark:
    """Tasks to evaluate, and why others are left out."""

    name: str
    tasks: list[RetrievalTask]
    left_out: dict[str, str]


def load(
    benchmark: str,
    data: Path | None = None,
    names: Sequence[str] = (),
    limit: int | None = None,
    skip_missing: bool = False,
) -> Benchmark:
    """The tasks of a benchmark.

    Args:
        benchmark: ``"picto"``, ``"mmeb"``, ``"zeroshot"``, or the path of custom data
            (:mod:`rematch.data.custom`).
        data: Folder of the benchmark; Picto is made and MMEB downloaded without one.
        names: Only these tasks.
        limit: Only the first so many queries of each.
        skip_missing: Leave out what is not there, instead of stopping.

    Raises:
        DataError: If the benchmark or one of the names is unknown, or something is missing.
    """
    left_out: dict[str, str] = {}
    if benchmark == "picto":
        wanted = _chosen(names, [name + end for end in ("", "-OOD") for name in picto_tasks.TASKS])
        if data is None:
            tasks = [t for t in _made(limit) if t.name in wanted]
        else:
            tasks, left_out = load_mmeb_eval(data, wanted, limit)
    elif benchmark == "mmeb":
        wanted = _chosen(names, _MMEB)
        tasks, left_out = load_mmeb_eval(data or download(wanted), wanted, limit)
    elif benchmark == "zeroshot":
        if data is None:
            raise DataError(
                "zeroshot: --data is missing. Give the folder that holds the sets "
                "(docs/evaluation.md)."
            )
        tasks, left_out = load_zeroshot(data, limit)
        known = [t.name for t in tasks] + list(left_out)
        wanted = _chosen(names, known)
        tasks = [t for t in tasks if t.name in wanted]
        left_out = {name: why for name, why in left_out.items() if name in wanted}
    else:
        source = Path(benchmark)
        if not source.exists():
            near = get_close_matches(benchmark, NAMES, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise DataError(
                f"--benchmark {benchmark}: neither {', '.join(NAMES)} nor a file or folder that "
                f"is there.{meant}"
            )
        tasks = load_custom(source, limit)
        wanted = _chosen(names, [t.name for t in tasks])
        tasks = [t for t in tasks if t.name in wanted]
    # one command runs the zero-shot sets that are there, as people have some of them
    if left_out and not skip_missing and (benchmark != "zeroshot" or names or not tasks):
        first = next(iter(left_out))
        more = (
            f" (and {len(left_out) - 1} more: {', '.join(list(left_out)[1:])})"
            if len(left_out) > 1
            else ""
        )
        raise DataError(
            f"{first} is missing: {left_out[first].rstrip('.')}{more}. Bring it, name the wanted "
            "ones with --tasks, or leave out what is missing with --skip-missing."
        )
    if not tasks:
        raise DataError(f"{benchmark}: nothing is left to evaluate.")
    return Benchmark(benchmark if benchmark in NAMES else Path(benchmark).stem, tasks, left_out)


def _made(limit: int | None) -> list[RetrievalTask]:
    size = min(QUERIES, -(-(limit or QUERIES) // BLOCK) * BLOCK)
    tasks = [*evaluation_tasks(queries=size), *evaluation_tasks(ood=True, queries=size)]
    for task in tasks:
        task.queries, task.candidates = task.queries[:limit], task.candidates[:limit]
    return tasks


def _chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 3)
            meant = (
                f" Did you mean {' or '.join(near)}?"
                if near
                else f" There are: {', '.join(known)}."
            )
            raise DataError(f"--tasks {name}: no such task.{meant}")
    return [name for name in known if not names or name in names]
