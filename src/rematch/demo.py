"""``rematch demo``: the whole life of a model in five minutes, and a report of it."""

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from rematch.data import picto
from rematch.data.picto import Scene
from rematch.data.picto_tasks import BLOCK, evaluation_tasks
from rematch.data.schema import Item
from rematch.encoder import Encoder
from rematch.errors import RematchError
from rematch.evaluate.run import TaskResult, baselines, evaluate, summary
from rematch.files import write_json
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS
from rematch.report import example_maps, write_report
from rematch.train.recipe import Loss, Model, Recipe, Train
from rematch.train.run import train

BATCH = 24
IMAGE = DOCUMENT_INSTRUCTIONS["image"]
_STEP_COST = {"contrastive": 1.0, "rematch": 3.0}  # relative seconds, for the time left
_TASK_COST = 1.2


def recipes(steps: int, directory: Path) -> dict[str, Recipe]:
    """The two arms: the same base, samples and steps; contrastive-only pools the last token and asks no questions."""

    def run(name: str, loss: Loss) -> Recipe:
        settings = Train(output=str(directory / name), steps=steps, batch_size=BATCH, learning_rate=5e-4, log_every=2)
        model = Model(num_tokens=16 if name == "rematch" else 0)
        return Recipe(model=model, loss=loss, train=settings)

    return {"contrastive": run("contrastive", Loss(w_orth=0, w_qdm=0)), "rematch": run("rematch", Loss())}


class _Advance(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress, bar: Any, cost: float) -> None:
        self.progress, self.bar, self.cost = progress, bar, cost

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.bar, self.cost)


def run_demo(output: Path, steps: int) -> Path:
    """Train both arms, evaluate them and ``rematch-tiny``, search, write ``report.json`` and ``report.html``.

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
    logs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as work, Progress(*columns, speed_estimate_period=60) as progress:
        arms = recipes(steps, Path(work))
        total = steps * sum(_STEP_COST.values()) + 3 * len(tasks) * _TASK_COST
        bar = progress.add_task("starting", total=total)

        def evaluated(name: str) -> None:
            progress.advance(bar, _TASK_COST)

        for name, recipe in arms.items():
            progress.update(bar, description=f"training {name}, {steps} steps")
            callback = _Advance(progress, bar, _STEP_COST[name])
            model = train(recipe, (callback,), quiet=True)
            logs[name] = read_log(Path(recipe.train.output))
            progress.update(bar, description=f"evaluating {name}")
            results[name] = evaluate(Encoder(model), tasks, progress=evaluated)[0]
        progress.update(bar, description="evaluating rematch-tiny")
        tiny = ReMatch("rematch-tiny")
        results["rematch-tiny"] = evaluate(Encoder(tiny), tasks, progress=evaluated)[0]
        progress.update(bar, description="indexing, searching, reporting")
        searches = example_searches(tiny)
        progress.update(bar, completed=total, description="done")
    floors = baselines(tasks)
    content = {
        "benchmark": "picto",
        "seconds": round(time.time() - began, 1),
        "queries_per_task": BLOCK,
        "steps_per_arm": steps,
        "chance": floors["chance"],
        "commonest": floors["commonest"],
        "arms": {name: summary(found) for name, found in results.items()},
        "matching_accuracy": {
            key.removeprefix("match_accuracy/"): value
            for key, value in logs["rematch"][-1].items()
            if key.startswith("match_accuracy/")
        },
    }
    write_json(output / "report.json", content)
    maps = example_maps(tiny, random.Random(3))
    return write_report(output / "report.html", content, logs, searches, results["rematch-tiny"], maps)


def read_log(directory: Path) -> list[dict[str, float]]:
    """The logged steps of a finished training run."""
    import json

    history = json.loads((directory / "log.json").read_text())
    return [row for row in history if "loss" in row]


def example_searches(model: ReMatch) -> list[tuple[dict[str, Any], list[tuple[Item, float]]]]:
    """A small index of held-out scenes, and four searches in it: by text, by picture, and by both."""
    rng = random.Random(7)
    scenes = [picto.sample_scene(rng, held_out=True, distinct=True) for _ in range(80)]
    before = scenes[1]
    old, new = before.objects[0], scenes[2].objects[0]
    a, b, c, d = (new if name == old else name for name in before.cells)
    scenes += [Scene((a, b, c, d), before.background), *(picto.near_miss(scene, rng) for scene in scenes[:19])]
    corpus = [
        Item(image=picto.render(scene, rng.choice(picto.TRAIN_STYLES), i), instruction=IMAGE, key=picto.caption(scene))
        for i, scene in enumerate(scenes)
    ]
    vectors = model.encode_document([item.as_input() for item in corpus], show_progress_bar=False)
    to_scene = "Find me an image that matches the given caption: "
    queries: list[dict[str, Any]] = [
        {"text": to_scene + picto.caption(scenes[0])},
        {"text": to_scene + picto.caption(scenes[3])},
        {
            "text": "Find an image that shows the same scene drawn in another style.",
            "image": picto.render(next(s for s in scenes if len(s.objects) == 2), picto.OOD_STYLE, 99),
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
