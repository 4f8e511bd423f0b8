"""``rematch evaluate``: load, evaluate, print, write."""

import os
import time
from collections.abc import Callable, Sequence
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

from rematch.backbone.checks import check_weights
from rematch.backbone.loading import loading, module_types
from rematch.backbone.pixels import limit_pixels
from rematch.console import say
from rematch.data.frames import FRAMES
from rematch.data.instructions import instruct, instruction_table
from rematch.encoding.encoder import Encoder
from rematch.encoding.vector_store import VectorStore
from rematch.errors import RematchError
from rematch.evaluate.benchmarks import Benchmark, load_benchmark
from rematch.evaluate.output import check_output, save_vectors, scores_json, write
from rematch.evaluate.rerank import Reranking
from rematch.evaluate.run import TaskResult, evaluate
from rematch.matching import View
from rematch.model import ReMatch


@dataclass(frozen=True)
class EvaluateOptions:
    """The command's options; see ``rematch evaluate --help``."""

    model: str = "rematch-tiny"
    benchmark: str = "picto"
    output: Path | None = None
    data: Path | None = None
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    skip_missing: bool = False
    frames: int = FRAMES
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

    def affecting_scores(self) -> dict[str, Any]:
        """The options that change scores, for ``scores.json``."""
        return {
            "limit": self.limit,
            "frames": self.frames,
            "document_instructions": self.document_instructions,
            "rerank": self.rerank,
            "views": [str(view) for view in self.views],
            "maxsim": self.maxsim,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
        }


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate, print a table, write the files, and return the content of ``scores.json``.

    Under ``torchrun`` the processes share the work, and the first one prints and writes.

    Raises:
        RematchError: If options contradict each other, or as for loading and evaluating.
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


def _run(options: EvaluateOptions) -> dict[str, Any]:
    started = time.perf_counter()
    if options.output and get_rank() == 0:
        check_output(options.output)
    benchmark = load_benchmark(
        options.benchmark,
        options.data,
        options.tasks,
        options.limit,
        options.skip_missing,
        options.frames,
    )
    model = load_model(options)
    if not isinstance(model, ReMatch) and (options.rerank or options.maxsim):
        raise RematchError(
            f"{options.model}: --rerank and --maxsim need a ReMatch model. Leave them out."
        )
    if isinstance(model, ReMatch):
        table = instruction_table(model.prompts)
        for task in benchmark.tasks:
            instruct(task, table)
    is_first = get_rank() == 0
    warn = say if is_first else _ignore
    results, encoder = _evaluate(options, benchmark, model, warn, show_progress=is_first)
    if not results:
        name, reason = next(iter(benchmark.left_out.items()))
        raise RematchError(f"no task could be evaluated. {name}: {reason}")
    content = scores_json(
        options.model,
        benchmark,
        results,
        encoder,
        time.perf_counter() - started,
        options.affecting_scores(),
    )
    if is_first:
        _print(results, content)
        if options.output:
            paths = write(options.output, content, results, encoder)
            if options.save_vectors:
                save_vectors(options.output / "arrays", results)
            names = ", ".join(escape(str(path)) for path in paths)
            Console().print(f"Written: {names}", soft_wrap=True)
    return content


def _ignore(message: str) -> None:
    pass


def _evaluate(
    options: EvaluateOptions,
    benchmark: Benchmark,
    model: SentenceTransformer,
    warn: Callable[[str], None],
    show_progress: bool,
) -> tuple[list[TaskResult], Encoder]:
    """The results of the tasks, and the encoder; tasks that are left out go to the benchmark."""
    directory = options.cache
    if directory is None and options.output:
        directory = options.output / "vectors"
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.fields[inputs]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not show_progress
    ) as progress:
        bar = progress.add_task("evaluating", total=len(benchmark.tasks), inputs="")
        encoder = Encoder(
            model,
            VectorStore(directory, model, warn) if directory else None,
            batch_tokens=options.batch_tokens,
            workers=options.workers,
            progress=lambda done, total: progress.update(
                bar, inputs=f"{done:,} of {total:,} inputs"
            ),
            warn=warn,
        )
        results, left_out = evaluate(
            encoder,
            benchmark.tasks,
            progress=lambda name: progress.update(bar, advance=1, description=name),
            skip_missing=options.skip_missing,
            document_instructions=options.document_instructions,
            reranking=Reranking(options.rerank, options.views) if options.rerank else None,
            multi_vector=options.maxsim,
        )
    benchmark.left_out |= left_out
    return results, encoder


def load_model(options: EvaluateOptions) -> SentenceTransformer:
    """Load a ReMatch model, or any other SentenceTransformer.

    Raises:
        ModelError: If it is neither, or its pictures cannot be limited as the options say.
    """
    name = options.model
    kwargs: dict[str, Any] = {}
    if get_world_size() > 1 and torch.cuda.is_available():
        kwargs["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    types = module_types(name)
    # what is no SentenceTransformer at all gets the error of ReMatch
    if not types or any(module_type.startswith("rematch.") for module_type in types):
        model: SentenceTransformer = ReMatch(name, **kwargs)
    else:
        remedy = "Give a directory that holds a SentenceTransformer, a hub name, or rematch-tiny."
        with loading(name, remedy):
            model = SentenceTransformer(
                name, trust_remote_code=options.trust_remote_code, **kwargs
            )
            check_weights(model, name)
    limit_pixels(getattr(model[0], "processor", None), options.min_pixels, options.max_pixels)
    return model


def _print(results: Sequence[TaskResult], content: dict[str, Any]) -> None:
    """Print the table of scores, and warnings."""
    columns = {"hit@1": "Hit@1", "hit@10": "Hit@10", "mrr": "MRR"}
    if any(result.task.metric == "ndcg@5" for result in results):
        columns = {"ndcg@5": "nDCG@5", **columns}
    table = Table(title=f"{content['metric']} (%)")
    others = [name for name in content["methods"] if name != "embedding"]
    table.add_column("task", no_wrap=True)
    for column in (*columns.values(), *others):
        table.add_column(column, justify="right")
    for result in results:
        cells = [f"{result.scores[name]:.1f}" for name in columns]
        cells += [f"{result.methods[name].scores[result.task.metric]:.1f}" for name in others]
        table.add_row(result.task.name, *cells)
    table.add_section()
    empty = [""] * (len(columns) - 1)
    for name, value in content["scores"].items():
        cells = [f"{content['methods'][method]['scores'][name]:.1f}" for method in others]
        table.add_row(f"[bold]{name}", f"[bold]{value:.1f}", *empty, *cells)
    for name in ("chance", "commonest"):
        table.add_row(f"{name}, overall", f"{content[name]['overall']:.1f}", *empty)
    if others:
        costs = content["run"]["ms_per_query"]
        cells = [f"{costs[method]:.2f}" for method in others]
        table.add_row("ms per query", f"{costs['embedding']:.2f}", *empty, *cells)
    Console().print(table)
    for name, reason in content["left_out"].items():
        say(f"left out: {name}: {reason}")
    for warning in content["warnings"]:
        say(warning)
