"""``rematch demo``: the whole life of a model in five minutes, and a report of it."""

import json
import random
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from rematch.data import picto
from rematch.data.picto import Scene
from rematch.data.picto_tasks import BLOCK, evaluation_tasks
from rematch.data.schema import Item
from rematch.demo.report import example_maps, write_report
from rematch.encoding.encoder import Encoder
from rematch.errors import RematchError
from rematch.evaluate.run import TaskResult, evaluate, summary
from rematch.evaluate.summary import baselines
from rematch.files import write_json
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS
from rematch.train.precision import choose
from rematch.train.recipe import Loss, Model, Recipe, Train
from rematch.train.run import build_collator, build_loss, build_model, train
from rematch.train.sources import build_dataset

BATCH = 24
IMAGE = DOCUMENT_INSTRUCTIONS["image"]
MINUTES = 5.0
FEWEST_STEPS, MOST_STEPS = 30, 100  # with 30, both arms are far above chance (docs/log.md)
_PROBED = 4  # steps that are timed, the first not counted
# of the time left that is planned for: real steps took up to 1.25 times as long as timed ones
_SHARE = 0.7
_LOADING = 15.0  # seconds before and after what is measured: imports, the report
_START = 4.0  # seconds that a training run takes beside its steps


@dataclass(frozen=True)
class Pace:
    """How fast this machine is.

    Attributes:
        steps: Seconds of a training step of each arm.
        evaluation: Seconds to evaluate one model.
        left: Seconds left for training and evaluating both arms.
    """

    steps: dict[str, float]
    evaluation: float
    left: float

    @property
    def fitting(self) -> int:
        """The steps per arm that fit into the time left, at least ``FEWEST_STEPS`` and at most
        ``MOST_STEPS``.

        >>> Pace({"contrastive": 1.0, "rematch": 3.0}, evaluation=20.0, left=260.0).fitting
        33
        >>> Pace({"contrastive": 5.0, "rematch": 9.0}, evaluation=20.0, left=240.0).fitting
        30
        """
        training = self.left * _SHARE - len(self.steps) * (self.evaluation + _START)
        return max(FEWEST_STEPS, min(MOST_STEPS, int(training / sum(self.steps.values()))))


def recipes(steps: int, directory: Path) -> dict[str, Recipe]:
    """The two arms: the same base, samples and steps; contrastive-only pools the last token and
    asks no questions.
    """

    def run(name: str, loss: Loss) -> Recipe:
        settings = Train(
            output=str(directory / name),
            steps=steps,
            batch_size=BATCH,
            learning_rate=5e-4,
            log_every=2,
            report_to=["none"],
            workers=0,  # on two cores a second process slows the first one down more than it helps
        )
        return Recipe(
            model=Model(num_tokens=16 if name == "rematch" else 0), loss=loss, train=settings
        )

    return {
        "contrastive": run("contrastive", Loss(w_orth=0, w_qdm=0)),
        "rematch": run("rematch", Loss()),
    }


def seconds_per_step(recipe: Recipe) -> float:
    """Time a few training steps of a recipe: the median of reading a batch, forward and backward
    pass.
    """
    model = build_model(recipe).train()
    loss, collator, rows = (
        build_loss(recipe, model),
        build_collator(recipe, model),
        build_dataset(recipe),
    )
    use_bf16, _ = choose(recipe.train.bf16, recipe.model.attention, model.device.type)
    seconds = []
    for step in range(_PROBED):
        began = time.perf_counter()
        batch = collator([rows[step * BATCH + i] for i in range(BATCH)])["batch"]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=use_bf16):
            total = torch.stack(list(loss([batch]).values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


class _Advance(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress, bar: Any, cost: float) -> None:
        self.progress, self.bar, self.cost = progress, bar, cost

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.bar, self.cost)


def run_demo(output: Path, steps: int | None = None) -> Path:
    """Evaluate and search with ``rematch-tiny``, train and evaluate both arms, and write both
    reports.

    Args:
        output: Directory of the reports.
        steps: Training steps per arm; by default as many as let the whole demo end within five
            minutes.

    Returns:
        Path of the HTML report.
    """
    if output.exists() and not output.is_dir():
        raise RematchError(f"{output} is a file. Give a directory with --output.")
    began = time.time()
    transformers_logging.disable_progress_bar()
    tasks = [*evaluation_tasks(queries=BLOCK), *evaluation_tasks(ood=True, queries=BLOCK)]
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    results: dict[str, list[TaskResult]] = {}
    logs: dict[str, list[dict[str, Any]]] = {}
    with (
        tempfile.TemporaryDirectory() as work,
        Progress(*columns, speed_estimate_period=60) as progress,
    ):
        bar = progress.add_task("evaluating rematch-tiny", total=MINUTES * 60)
        tiny = ReMatch("rematch-tiny")
        started = time.time()
        tiny_results = evaluate(Encoder(tiny), tasks)[0]
        evaluation = time.time() - started
        progress.update(bar, description="searching", completed=time.time() - began)
        searches, maps = example_searches(tiny), example_maps(tiny, random.Random(3))
        progress.update(bar, description="timing training steps", completed=time.time() - began)
        probed = {
            name: seconds_per_step(recipe) for name, recipe in recipes(_PROBED, Path(work)).items()
        }
        pace = Pace(probed, evaluation, MINUTES * 60 - _LOADING - (time.time() - began))
        chosen = steps or pace.fitting
        arms = recipes(chosen, Path(work))
        why = explain(pace, chosen, asked_for=steps is not None)
        progress.console.print(why, highlight=False)
        total = (time.time() - began) + chosen * sum(probed.values()) + len(arms) * evaluation
        progress.update(bar, total=total, completed=time.time() - began)
        for name, recipe in arms.items():
            progress.update(bar, description=f"training {name}, {chosen} steps")
            model = train(recipe, (_Advance(progress, bar, probed[name]),), quiet=True)
            logs[name] = read_log(Path(recipe.train.output))
            progress.update(bar, description=f"evaluating {name}")
            advance = partial(_advance, progress, bar, evaluation / len(tasks))
            results[name] = evaluate(Encoder(model), tasks, progress=advance)[0]
        progress.update(bar, completed=total, description="done")
    results["rematch-tiny"] = tiny_results
    floors = baselines(tasks)
    content = {
        "benchmark": "picto",
        "seconds": round(time.time() - began, 1),
        "queries_per_task": BLOCK,
        "steps_per_arm": chosen,
        "why": why,
        "seconds_per_step": {name: round(value, 2) for name, value in probed.items()},
        "evaluation_seconds": round(evaluation, 1),
        "precision": logs["rematch"][0]["precision"],
        "chance": floors["chance"],
        "commonest": floors["commonest"],
        "arms": {name: summary(task_results) for name, task_results in results.items()},
        "matching_accuracy": {
            key.removeprefix("match_accuracy/"): value
            for key, value in logs["rematch"][-1].items()
            if key.startswith("match_accuracy/")
        },
    }
    write_json(output / "report.json", content)
    steps_logged = {name: rows[1:] for name, rows in logs.items()}
    return write_report(
        output / "report.html", content, steps_logged, searches, results["rematch-tiny"], maps
    )


def explain(pace: Pace, steps: int, asked_for: bool) -> str:
    """One sentence on how many steps are trained and why."""
    measured = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in pace.steps.items())
    sentence = f"{steps} training steps per arm (a step takes: {measured}; an evaluation: {pace.evaluation:.0f} s)"
    if asked_for:
        return f"{sentence}, as asked for."
    needed = steps * sum(pace.steps.values()) + len(pace.steps) * pace.evaluation
    if needed > pace.left:
        late = (needed - pace.left) / 60
        return (
            f"{sentence}: the fewest with which both arms are above chance. The demo will take "
            f"about {late:.0f} minutes longer than {MINUTES:.0f} on this machine."
        )
    if steps == MOST_STEPS:
        return f"{sentence}: the most that the demo trains."
    return f"{sentence}: as many as let the demo end within {MINUTES:.0f} minutes on this machine."


def _advance(progress: Progress, bar: Any, seconds: float, _: str) -> None:
    progress.advance(bar, seconds)


def read_log(directory: Path) -> list[dict[str, Any]]:
    """What a finished training run logged: its arithmetic, then its steps."""
    history = json.loads((directory / "log.json").read_text())
    return [row for row in history if "loss" in row or "precision" in row]


def example_searches(model: ReMatch) -> list[tuple[dict[str, Any], list[tuple[Item, float]]]]:
    """A small index of held-out scenes, and four searches in it: by text, by picture, and by both."""
    rng = random.Random(7)
    scenes = [picto.sample_scene(rng, held_out=True, distinct=True) for _ in range(80)]
    before = scenes[1]
    old, new = before.objects[0], scenes[2].objects[0]
    a, b, c, d = (new if name == old else name for name in before.cells)
    scenes += [
        Scene((a, b, c, d), before.background),
        *(picto.near_miss(scene, rng) for scene in scenes[:19]),
    ]
    corpus = [
        Item(
            image=picto.render(scene, rng.choice(picto.TRAIN_STYLES), i),
            instruction=IMAGE,
            key=picto.caption(scene),
        )
        for i, scene in enumerate(scenes)
    ]
    vectors = model.encode_document([item.as_input() for item in corpus], show_progress_bar=False)
    to_scene = "Find me an image that matches the given caption: "
    queries: list[dict[str, Any]] = [
        {"text": to_scene + picto.caption(scenes[0])},
        {"text": to_scene + picto.caption(scenes[3])},
        {
            "text": "Find an image that shows the same scene drawn in another style.",
            "image": picto.render(
                next(s for s in scenes if len(s.objects) == 2), picto.OOD_STYLE, 99
            ),
        },
        {
            "text": "Find a similar image with the described change: "
            f"replace the {old} with {picto.with_article(new)}.",
            "image": picto.render(before, "noto", 98),
        },
    ]
    scores = model.encode_query(queries, show_progress_bar=False) @ vectors.T
    return [
        (query, [(corpus[i], float(own[i])) for i in np.argsort(-own, kind="stable")[:5]])
        for query, own in zip(queries, scores, strict=True)
    ]
