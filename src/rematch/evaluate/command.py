"""``rematch evaluate``: load, evaluate, print, write."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import get_rank, get_world_size

from rematch.backbone.loading import resolve
from rematch.backbone.pixels import limit_pixels
from rematch.console import say
from rematch.encoding.encoder import Encoder
from rematch.encoding.vector_store import VectorStore
from rematch.errors import ModelError, RematchError
from rematch.evaluate.benchmarks import Benchmark, load
from rematch.evaluate.output import content_of, save_vectors, write
from rematch.evaluate.rerank import Reranking
from rematch.evaluate.run import TaskResult, evaluate
from rematch.matching import View
from rematch.model import ReMatch


@dataclass(frozen=True)
class Options:
    """The command's options; see ``rematch evaluate --help``."""

    model: str = "rematch-tiny"
    benchmark: str = "picto"
    output: Path | None = None
    data: Path | None = None
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    skip_missing: bool = False
    document_instructions: bool | None = None
    rerank: int = 0
    views: tuple[View, ...] = (View.RAW_RAW,)
    maxsim: bool = False
    cache: Path | None = None
    save_vectors: bool = False
    batch_tokens: int | None = None
    workers: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    trust_remote_code: bool = False


def run(options: Options) -> dict[str, Any]:
    """Evaluate and return what ``scores.json`` holds.

    Under ``torchrun`` the processes share the work, and the first one prints and writes.

    Raises:
        RematchError: If an option does not fit, or as for loading and evaluating.
    """
    if options.output and options.output.is_file():
        raise RematchError(f"--output {options.output} is a file. Give a directory.")
    if options.save_vectors and options.output is None:
        raise RematchError("--save-vectors needs --output, the directory to write them to.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        return _run(options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    benchmark = load(
        options.benchmark, options.data, options.tasks, options.limit, options.skip_missing
    )
    model = load_model(options)
    if not isinstance(model, ReMatch) and (options.rerank or options.maxsim):
        raise RematchError(
            f"{options.model}: --rerank and --maxsim need a ReMatch model. Leave them out."
        )
    first = get_rank() == 0
    directory = options.cache or (options.output / "vectors" if options.output else None)
    warn = say if first else _nothing
    store = VectorStore(directory, model, warn) if directory else None
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not first) as progress:
        bar = progress.add_task("evaluating", total=len(benchmark.tasks), now="")

        def encoded(done: int, total: int) -> None:
            progress.update(bar, now=f"{done:,} of {total:,} inputs")

        encoder = Encoder(
            model,
            store,
            batch_tokens=options.batch_tokens,
            workers=options.workers,
            progress=encoded,
            warn=warn,
        )
        results, broken = evaluate(
            encoder,
            benchmark.tasks,
            progress=lambda name: progress.update(bar, advance=1, description=name),
            skip_missing=options.skip_missing,
            document_instructions=options.document_instructions,
            reranking=Reranking(options.rerank, options.views) if options.rerank else None,
            multi_vector=options.maxsim,
        )
    benchmark.left_out |= broken
    if not results:
        name, why = next(iter(benchmark.left_out.items()))
        raise RematchError(f"nothing could be evaluated: {name}: {why}")
    kept = (
        "limit",
        "document_instructions",
        "rerank",
        "views",
        "maxsim",
        "min_pixels",
        "max_pixels",
    )
    content = content_of(
        options.model,
        benchmark,
        results,
        encoder,
        time.perf_counter() - started,
        {k: getattr(options, k) for k in kept},
    )
    if first:
        _print(results, content, benchmark)
        if options.output:
            paths = write(options.output, content, results, encoder)
            if options.save_vectors:
                save_vectors(options.output / "arrays", results)
            Console().print(
                "Written: " + ", ".join(escape(str(path)) for path in paths), soft_wrap=True
            )
    return content


def _nothing(message: str) -> None:
    pass


def load_model(options: Options) -> SentenceTransformer:
    """A ReMatch model, or any other SentenceTransformer.

    Raises:
        ModelError: If it is neither, or does not take the wanted picture sizes.
    """
    name = options.model
    kwargs: dict[str, Any] = {}
    if get_world_size() > 1 and torch.cuda.is_available():
        kwargs["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if _is_rematch(name):
        model: SentenceTransformer = ReMatch(name, **kwargs)
    else:
        try:
            model = SentenceTransformer(
                name, trust_remote_code=options.trust_remote_code, **kwargs
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"{name}: cannot be loaded ({str(error).strip().splitlines()[0]}). Give a "
                "directory that holds a SentenceTransformer, a hub name, or rematch-tiny."
            ) from error
    limit_pixels(getattr(model[0], "processor", None), options.min_pixels, options.max_pixels)
    return model


def _is_rematch(name: str) -> bool:
    modules = Path(resolve(name)) / "modules.json"
    return (
        not Path(resolve(name)).is_dir()
        or not modules.exists()
        or "rematch." in modules.read_text()
    )


def _print(results: list[TaskResult], content: dict[str, Any], benchmark: Benchmark) -> None:
    table = Table(title="Hit@1 (%)")
    others = [name for name in content["methods"] if name != "embedding"]
    table.add_column("task", no_wrap=True)
    for column in ("Hit@1", "Hit@10", "MRR", *others):
        table.add_column(column, justify="right")
    for r in results:
        cells = [f"{r.scores[k]:.1f}" for k in ("hit@1", "hit@10", "mrr")]
        table.add_row(r.task.name, *cells, *(f"{r.methods[n]['hit@1']:.1f}" for n in others))
    table.add_section()
    for name, value in content["scores"].items():
        cells = [f"{content['methods'][n]['scores'][name]:.1f}" for n in others]
        table.add_row(f"[bold]{name}", f"[bold]{value:.1f}", "", "", *cells)
    for name in ("chance", "commonest"):
        table.add_row(f"{name}, overall", f"{content[name]['overall']:.1f}", "", "")
    if others:
        cost = content["run"]["ms_per_query"]
        table.add_row(
            "ms per query", f"{cost['embedding']:.2f}", "", "", *(f"{cost[n]:.2f}" for n in others)
        )
    Console().print(table)
    for name, why in benchmark.left_out.items():
        say(f"left out: {name}: {why}")
    for warning in content["warnings"]:
        say(warning)
