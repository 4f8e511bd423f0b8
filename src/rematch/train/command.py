"""``rematch train`` and ``rematch mine``.

Models and trainers are imported once the options are known to be valid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rematch.console import say
from rematch.errors import RecipeError, RematchError
from rematch.matching import View
from rematch.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from rematch.train.estimate import Estimate

_ESTIMATE_OPTIONS = ("gpus", "fsdp", "gpu_memory", "tflops", "pictures")
_TRUSTED_SHARE = 0.6  # of positives answered with Yes; with fewer, the filter is not to be trusted


@dataclass(frozen=True)
class TrainOptions:
    """The command's options; see ``rematch train --help``."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    estimate: bool = False
    gpus: int = 1
    fsdp: bool = False
    gpu_memory: float | None = None
    tflops: float | None = None
    pictures: int = 3


@dataclass(frozen=True)
class MineOptions:
    """The command's options; see ``rematch mine --help``."""

    model: str
    data: Path
    output: Path
    corpus: Path | None = None
    negatives: int = 4
    candidates: int = 30
    yes: float = 0.5
    margin: float = 0.0
    view: View = View.FEAT_FEAT


# ---- rematch train ------------------------------------------------------------------------------


def run_train(options: TrainOptions) -> None:
    """Train a model, or print the estimate, and say where the model is.

    Raises:
        RematchError: If an option does not fit, or as for loading a recipe, training, and
            estimating.
    """
    recipe = load_recipe(options.recipe, options.overrides)
    if options.estimate:
        _run_estimate(recipe, options)
        return
    defaults = TrainOptions(options.recipe)
    if any(getattr(options, name) != getattr(defaults, name) for name in _ESTIMATE_OPTIONS):
        raise RematchError(
            "--gpus, --fsdp, --gpu-memory, --tflops and --pictures need --estimate. Add it."
        )
    from rematch.train.run import train

    train(recipe)
    _print(f"Model and log: {recipe.train.output}")


def _run_estimate(recipe: Recipe, options: TrainOptions) -> None:
    """Print the estimate.

    Raises:
        RecipeError: If the peak is above ``options.gpu_memory``.
    """
    from rematch.train.estimate import estimate
    from rematch.train.shape import load_shape

    result = estimate(recipe, load_shape(recipe), options.gpus, options.fsdp, options.pictures)
    Console().print(_estimate_table(result, options.tflops))
    if options.tflops:
        hours = recipe.train.steps * result.seconds(options.tflops) / 3600
        _print(
            f"{recipe.train.steps:,} steps: {hours:.1f} h at {options.tflops:g} TFLOP/s per GPU, "
            f"number of GPUs: {options.gpus}"
        )
    memory = options.gpu_memory
    if memory is None:
        return
    if result.total > memory:
        raise RecipeError(
            f"the peak of {result.total:.1f} GB does not fit into {memory:g} GB. Lower "
            "train.mini_batch_tokens or model.max_pixels, or set train.gradient_checkpointing, "
            "loss.gradient_cache or model.four_bit."
        )
    _print(f"fits into {memory:g} GB; {100 * (1 - result.total / memory):.0f} % remain free")


def _estimate_table(result: "Estimate", tflops: float | None) -> Table:
    notes = f"1 GB is 2³⁰ bytes. Assumed: {result.assumptions}. Arithmetic: {result.arithmetic}."
    table = Table("on each GPU", "GB", caption=notes, caption_justify="left")
    table.columns[1].justify = "right"
    for name, size in result.memory.items():
        table.add_row(name, f"{size:.2f}")
    largest = max(result.passes, key=result.passes.__getitem__)
    for name, size in result.passes.items():
        cell = f"{size:.2f}" if name == largest else f"[dim]({size:.2f})[/dim]"
        table.add_row(f"{name}: activations", cell)
    table.add_section()
    table.add_row(
        "[bold]peak[/bold] (one kind of pass at a time)", f"[bold]{result.total:.2f}[/bold]"
    )
    table.add_section()
    table.add_row("pixel values in host memory, one batch ahead per worker", f"{result.host:.2f}")
    table.add_row("arithmetic per step", f"{result.step_flop / 1e15:.2f} PFLOP")
    if tflops:
        table.add_row(f"time per step at {tflops:g} TFLOP/s", f"{result.seconds(tflops):.1f} s")
    return table


# ---- rematch mine -------------------------------------------------------------------------------


def run_mine(options: MineOptions) -> dict[str, Any]:
    """Mine hard negatives, and print what became of the candidates.

    Returns:
        The report, as in the .json file.

    Raises:
        RematchError: If an option does not fit, or as for loading a model and mining.
    """
    from rematch.model import ReMatch
    from rematch.train.candidates import Rules
    from rematch.train.mine import mine

    rules = Rules(options.negatives, options.candidates, options.yes, options.margin, options.view)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        stages: dict[str, TaskID] = {}

        def progress(stage: str, completed: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage)
            bars.update(stages[stage], completed=completed, total=total)

        model = ReMatch(options.model)
        report = mine(model, options.data, options.output, rules, options.corpus, progress)
    _print_report(report, options.output)
    return report


def _print_report(report: dict[str, Any], output: Path) -> None:
    from rematch.train.candidates import REASONS

    table = Table("candidates", "")
    for reason, count in report["candidates"].items():
        table.add_row(f"{count:,}", REASONS[reason])
    Console().print(table)
    answered_yes = report["positives_answered_yes"]
    if answered_yes < _TRUSTED_SHARE:
        say(
            f"the model says Yes to only {100 * answered_yes:.0f} % of the labelled positives, so "
            "do not trust its judgement of candidates on this data. Fine-tune it first."
        )
    if report["queries_without_negatives"]:
        say(
            f"{report['queries_without_negatives']:,} of {report['queries']:,} queries have no "
            "negative and are not in the output."
        )
    _print(f"{report['negatives']:,} negatives: {output}")
    _print(f"What was dropped and why: {output.with_suffix('.html')}")


def _print(line: str) -> None:
    Console(soft_wrap=True, highlight=False).print(escape(line))
