"""The demo: evaluate and search with a trained model, then train and evaluate two models."""

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rematch.data.picto_tasks import BLOCK, evaluation_tasks
from rematch.data.schema import RetrievalTask
from rematch.demo.examples import ExampleMaps, ExampleSearch, example_maps, example_searches
from rematch.demo.pace import MINUTES, TIMED_STEPS, Pace
from rematch.encoding.encoder import Encoder
from rematch.evaluate.metrics import Interval, paired_interval
from rematch.evaluate.run import TaskResult, evaluate, summary
from rematch.evaluate.summary import baselines
from rematch.model import ReMatch
from rematch.train.recipe import Loss, Model, Recipe, Train
from rematch.train.run import train

BATCH_SIZE, TOKENS = 24, 16

LogEntry = dict[str, Any]


@dataclass(frozen=True)
class DemoResults:
    """Everything that the reports show.

    Attributes:
        content: What ``report.json`` holds.
        logs: Log entries of the training run of each model, a row per logged step.
        tiny: Results of ``rematch-tiny``, task by task.
        searches: Searches with ``rematch-tiny``.
        maps: Attention maps of ``rematch-tiny``.
    """

    content: dict[str, Any]
    logs: dict[str, list[LogEntry]]
    tiny: list[TaskResult]
    searches: list[ExampleSearch]
    maps: list[ExampleMaps]


class _Bar:
    """A progress bar of the whole demo, in seconds."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.start = time.monotonic()
        self.task = progress.add_task("", total=MINUTES * 60)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def stage(self, description: str) -> None:
        """Name what happens now."""
        self.progress.update(self.task, description=description)

    def correct(self, remaining: float | None = None) -> None:
        """Set the bar to the time that has passed, and its end to the time that remains."""
        elapsed = self.elapsed
        total = None if remaining is None else elapsed + remaining
        self.progress.update(self.task, completed=elapsed, total=total)

    def advance(self, seconds: float) -> None:
        """Move the bar by the expected duration of what is complete."""
        self.progress.advance(self.task, seconds)


class _AdvanceBar(TrainerCallback):  # type: ignore[misc]  # untyped library
    def __init__(self, bar: _Bar, step_seconds: float) -> None:
        self.bar, self.step_seconds = bar, step_seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.advance(self.step_seconds)


def demo_recipes(steps: int, directory: Path) -> dict[str, Recipe]:
    """The two recipes: the same base, samples and steps.

    ``contrastive`` pools the last token and has no other loss; ``rematch`` is the whole method.
    """

    def recipe(name: str, model: Model, loss: Loss) -> Recipe:
        settings = Train(
            output=str(directory / name),
            steps=steps,
            batch_size=BATCH_SIZE,
            learning_rate=5e-4,
            log_every=2,
            report_to=["none"],
            workers=0,  # on two cores a second process costs more time than it saves
        )
        return Recipe(model=model, loss=loss, train=settings)

    return {
        "contrastive": recipe("contrastive", Model(num_tokens=0), Loss(w_orth=0, w_qdm=0)),
        "rematch": recipe("rematch", Model(num_tokens=TOKENS, token_init="mixed"), Loss()),
    }


def verdict(difference: Interval, steps: int) -> str:
    """How far ``rematch`` is ahead of ``contrastive``, how certain that is, and why.

    Args:
        difference: Overall Hit@1 of ``rematch`` minus that of ``contrastive``.
        steps: Training steps of each.

    >>> verdict(Interval(4.0, 1.5, 6.5), 48).partition(" (")[0]
    'rematch is 4.0 points ahead of contrastive overall'
    """
    certainty = (
        f"95 % interval of the difference: {difference.low:+.1f} to {difference.high:+.1f}, over "
        "the queries; another seed can change it by a few points more"
    )
    points = f"{abs(difference.mean):.1f} points"
    if difference.low > 0:
        return f"rematch is {points} ahead of contrastive overall ({certainty})."
    if difference.high < 0:
        return (
            f"rematch is {points} behind contrastive overall ({certainty}). "
            f"It starts with {TOKENS} new tokens that {steps} steps have hardly trained, whereas "
            "the last token is the one that the base answers with. docs/ablation.md compares the "
            "two after more steps."
        )
    return f"These queries cannot tell rematch and contrastive apart overall ({certainty})."


def demonstrate(progress: Progress, steps: int | None = None) -> DemoResults:
    """Evaluate and search with ``rematch-tiny``, then train and evaluate both models.

    Args:
        progress: Where the progress bar and a line on the number of steps appear.
        steps: Training steps per model; by default as many as fit into five minutes.
    """
    bar = _Bar(progress)
    tasks = [
        *evaluation_tasks(queries=BLOCK),
        *evaluation_tasks(unseen_style=True, queries=BLOCK),
    ]
    bar.stage("evaluating rematch-tiny")
    tiny = ReMatch("rematch-tiny")
    evaluation_start = bar.elapsed
    results = {"rematch-tiny": evaluate(Encoder(tiny), tasks)[0]}
    evaluation_seconds = bar.elapsed - evaluation_start
    bar.correct()
    bar.stage("searching")
    searches, maps = example_searches(tiny), example_maps(tiny)
    bar.correct()
    bar.stage("timing training steps")
    with tempfile.TemporaryDirectory() as directory:
        timed = demo_recipes(TIMED_STEPS, Path(directory))
        pace = Pace.measure(timed, evaluation_seconds, bar.start)
        explanation = pace.explain(steps or pace.steps, requested=steps is not None)
        steps = steps or pace.steps
        progress.console.print(explanation, highlight=False)
        bar.correct(remaining=pace.duration(steps))
        logs = {}
        for name, recipe in demo_recipes(steps, Path(directory)).items():
            results[name], logs[name] = _train_and_evaluate(name, recipe, tasks, pace, bar)
    bar.stage("done")
    bar.correct(remaining=0)
    accuracy = {
        key.removeprefix("match_accuracy/"): value
        for key, value in logs["rematch"][-1].items()
        if key.startswith("match_accuracy/")
    }
    models = ("contrastive", "rematch", "rematch-tiny")
    hits = {name: [result.hits for result in results[name]] for name in models}
    difference = paired_interval(hits["rematch"], hits["contrastive"])
    content = {
        "benchmark": "picto",
        "seconds": round(bar.elapsed, 1),
        "queries_per_task": BLOCK,
        "steps_per_arm": steps,
        "why": explanation,
        "seconds_per_step": {name: round(s, 2) for name, s in pace.step_seconds.items()},
        "evaluation_seconds": round(evaluation_seconds, 1),
        "precision": logs["rematch"][0]["precision"],
        **baselines(tasks),
        "arms": {name: summary(results[name]) for name in models},
        "difference": {name: round(v, 1) for name, v in difference._asdict().items()},
        "verdict": verdict(difference, steps),
        "matching_accuracy": accuracy,
    }
    step_logs = {name: entries[1:] for name, entries in logs.items()}
    return DemoResults(content, step_logs, results["rematch-tiny"], searches, maps)


def _train_and_evaluate(
    name: str, recipe: Recipe, tasks: list[RetrievalTask], pace: Pace, bar: _Bar
) -> tuple[list[TaskResult], list[LogEntry]]:
    """The results of one model, and its log: the arithmetic, then the logged steps."""
    bar.stage(f"training {name}, {recipe.train.steps} steps")
    model = train(recipe, [_AdvanceBar(bar, pace.step_seconds[name])], quiet=True)
    history = json.loads((Path(recipe.train.output) / "log.json").read_text())
    log = [entry for entry in history if "loss" in entry or "precision" in entry]
    bar.stage(f"evaluating {name}")
    task_seconds = pace.evaluation_seconds / len(tasks)
    progress = partial(_advance, bar, task_seconds)
    return evaluate(Encoder(model), tasks, progress=progress)[0], log


def _advance(bar: _Bar, seconds: float, _: str) -> None:
    bar.advance(seconds)
