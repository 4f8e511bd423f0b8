"""The paper's ablation ladder on Picto, from the tiny base: what each part of the method gives and
costs, and what remains of the base's abilities.

    python benchmarks/ablation.py time    # seconds per step of every arm; run this first
    python benchmarks/ablation.py run --seeds 0 1 2    # resumable; several copies share the work
    python benchmarks/ablation.py run --arms 6-all --set model.num_tokens=4 --name K4    # a sweep
    python benchmarks/ablation.py report    # table, plot, and what has not been run

Each run writes one JSON file to benchmarks/results/ablation/. It holds Hit@1 on Picto's whole test
set and, in percent, always on held-out combinations:

- ``matching``: Yes/No accuracy on right and nearly right documents, for each view;
- ``vqa_exact``: exact answers by greedy generation; with ``raw-raw`` above, what remains of the
  base's abilities;
- ``composition``: how often a scene is nearer to its caption than to one in which an object is
  replaced, two are swapped, or one is added or left out (as in SugarCrepe); guessing gives 50.

The arms named ``…-equal-time`` train for as many steps as fit into the time of ``5-multi-token``
(contrastive losses alone, all else equal), by the seconds that ``time`` has measured.
"""

import argparse
import fcntl
import json
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rematch.data import picto
from rematch.data.picto_tasks import TASKS, Draw, evaluation_tasks
from rematch.encoding.encoder import Encoder
from rematch.evaluate.run import evaluate, summary
from rematch.files import write_json
from rematch.matching import View
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS
from rematch.train.build import build_collator, build_loss, build_model
from rematch.train.recipe import Recipe, load_recipe
from rematch.train.run import train
from rematch.train.sources import build_dataset

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
SECONDS = RESULTS.with_name("ablation-seconds.json")
PAGE = ROOT / "docs" / "ablation.md"
START, END = "<!-- table -->", "<!-- end of table -->"
STEPS = 1600
REFERENCE = "5-multi-token"
# arm: its recipe, and overrides of it
ARMS: dict[str, tuple[str, list[str]]] = {
    "5-multi-token": ("5-multi-token", []),
    "6-all": ("6-all", []),
    "6-all-reuse": ("6-all", ["loss.matching=reuse"]),
    "6-all-equal-time": ("6-all", []),
    "3-hard-negatives": ("3-hard-negatives", []),
    "4-matching": ("4-matching", []),
    "6-all-reuse-equal-time": ("6-all", ["loss.matching=reuse"]),
    "6-all-feat": ("6-all", ["loss.matching=feat"]),
    "2-target-instructions": ("2-target-instructions", []),
    "1-last-token": ("1-last-token", []),
}
BASE = "0-base"  # the untrained base, pooled by its last token
CHANGES = {"replace": "object", "swap": "swap", "add or leave out": "count"}
PER_TASK, SCENES = 50, 200


def recipe_of(arm: str, seed: int, steps: int, output: Path, overrides: list[str]) -> Recipe:
    """Load the recipe of an arm."""
    name, changes = ARMS[arm]
    settings = [f"train.seed={seed}", f"train.steps={steps}", f"train.output={output}"]
    # one process per run, so that several fit on a machine
    settings += ["train.save_every=200", "train.workers=0"]
    return load_recipe(ROOT / "recipes" / f"ladder-{name}.yaml", [*changes, *settings, *overrides])


def steps_of(arm: str) -> int:
    """Training steps of an arm: 1,600, or as many as take the reference's time."""
    if not arm.endswith("-equal-time"):
        return STEPS
    if not SECONDS.exists():
        raise SystemExit(
            f"{arm}: the number of steps follows from measured seconds, and there are none. Run "
            "`benchmarks/ablation.py time` first."
        )
    seconds = json.loads(SECONDS.read_text())["seconds_per_step"]
    return int(STEPS * seconds[REFERENCE] / seconds[arm.removesuffix("-equal-time")])


# ---- measurements ---------------------------------------------------------------------------


@torch.inference_mode()
def abilities(model: ReMatch) -> dict[str, Any]:
    """Measure ``vqa_exact`` and ``matching`` on held-out combinations, in percent."""
    exact: list[float] = []
    queries, documents = [], []
    for name, (meta_task, generate) in TASKS.items():
        draw = Draw(random.Random(f"base-eval/{name}/False"), True, picto.TRAIN_STYLES, False)
        samples = [generate(draw) for _ in range(PER_TASK)]
        if meta_task == "vqa":
            exact += [
                generated(model, sample.query) == sample.documents[0].text for sample in samples
            ]
        for sample in samples:
            queries += [sample.query.as_input()] * 2
            documents += [document.as_input() for document in sample.documents[:2]]
    query_vectors = list(model.encode_query(queries, show_progress_bar=False))
    document_vectors = list(model.encode_document(documents, show_progress_bar=False))
    matching = {}
    for view in View:
        query_inputs = queries if view.query == "raw" else query_vectors
        document_inputs = documents if view.document == "raw" else document_vectors
        yes = model.match(query_inputs, document_inputs, view) > 0.5
        matching[view] = percent(yes == np.tile([True, False], len(yes) // 2))
    return {"vqa_exact": percent(exact), "matching": matching}


def generated(model: ReMatch, query: Any) -> str:
    """The model's answer to a question, by greedy generation."""
    reader = model.backbone.reader
    reading = reader.read({"text": query.text, "image": query.image})
    pictures = {name: value.to(model.device) for name, value in reading.vision.items()}
    ids = reading.ids[None].to(model.device)
    out = model.backbone.model.generate(
        input_ids=ids, **pictures, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    answer: str = reader.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()


def composition(model: ReMatch) -> dict[str, float]:
    """How often a scene is nearer to its own caption than to a changed one, in percent."""
    shares = {}
    head = DOCUMENT_INSTRUCTIONS["caption"] if model.backbone.document_instructions else ""
    instruction = "Find an image caption describing the given image."
    for name, change in CHANGES.items():
        rng = random.Random(f"composition/{name}")
        scenes = [
            picto.sample_scene(rng, held_out=True, count=rng.randint(2, 4), distinct=True)
            for _ in range(SCENES)
        ]
        pictures = [
            picto.render(scene, rng.choice(picto.TRAIN_STYLES), rng.getrandbits(32))
            for scene in scenes
        ]
        captions = [head + picto.caption(scene) for scene in scenes]
        changed = [
            head + picto.caption(picto.near_miss(scene, rng, (change,))) for scene in scenes
        ]
        queries = model.encode_query(
            [{"text": instruction, "image": picture} for picture in pictures],
            show_progress_bar=False,
        )
        true, false = (
            model.encode_document(texts, show_progress_bar=False) for texts in (captions, changed)
        )
        shares[name] = percent((queries * true).sum(1) > (queries * false).sum(1))
    return shares


def percent(hits: Any) -> float:
    """Mean of booleans, in percent."""
    return round(100 * float(np.mean(hits)), 1)


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    """Train and measure one arm, unless its result exists or another copy is working on it."""
    name = f"{args.name or arm}-seed{seed}"
    target = RESULTS / f"{name}.json"
    with claim(args.work_dir / f"{name}.lock") as claimed:
        if target.exists() or not claimed:
            return
        start, row = time.time(), {"arm": args.name or arm, "seed": seed}
        if arm == BASE:
            torch.manual_seed(seed)
            model = ReMatch.from_backbone("rematch-base", 0)
        else:
            steps, output = args.steps or steps_of(arm), args.work_dir / name
            recipe = recipe_of(arm, seed, steps, output, args.set)
            model = ReMatch(output) if output.exists() else train(recipe, quiet=True)
            row |= {"steps": steps, "overrides": [*ARMS[arm][1], *args.set]}
        model.eval()
        tasks = evaluation_tasks() + evaluation_tasks(unseen_style=True)
        row |= {
            "scores": summary(evaluate(Encoder(model), tasks)[0]),
            "composition": composition(model),
        } | abilities(model)
        write_json(target, row)
        if arm != BASE:
            shutil.rmtree(output)
        Console().print(
            f"{name}: {row['scores']['overall']} after {(time.time() - start) / 60:.0f} minutes"
        )


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Lock a file until the block ends; yields whether this process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def measure_seconds(args: argparse.Namespace) -> None:
    """Measure median seconds of a training step of each arm, interleaved, and of embedding."""
    arms = [arm for arm in ARMS if not arm.endswith("-equal-time")]
    ready = {}
    for arm in arms:
        recipe = recipe_of(arm, 0, args.rounds + 1, args.work_dir / "none", [])
        model = build_model(recipe).train()
        rows, collator = build_dataset(recipe), build_collator(recipe, model)
        size = recipe.train.batch_size
        batches = [
            collator([rows[i] for i in range(step * size, (step + 1) * size)])
            for step in range(args.rounds + 1)
        ]
        ready[arm] = (model, build_loss(recipe, model), batches)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(args.rounds + 1):
        for arm in random.Random(turn).sample(arms, len(arms)):
            model, loss, batches = ready[arm]
            start = time.perf_counter()
            with torch.autocast(model.device.type, torch.bfloat16):
                total = torch.stack(list(loss([batches[turn]["batch"]]).values())).sum()
            total.backward()
            model.zero_grad()
            if turn:  # the first turn is a warm-up
                seconds[arm].append(time.perf_counter() - start)
    result = {
        "seconds_per_step": {
            arm: round(statistics.median(values), 4) for arm, values in seconds.items()
        }
    }
    setting = {"threads": torch.get_num_threads(), "rounds": args.rounds}
    write_json(SECONDS, result | setting)
    cost = {"encode_ms_per_scene": encoding(args.rounds)}
    write_json(SECONDS.with_name("ablation-encoding.json"), cost | setting)
    Console().print(result, cost)


def encoding(rounds: int) -> dict[str, float]:
    """Median milliseconds to embed a scene, by number of learnable tokens, interleaved."""
    models = {k: ReMatch.from_backbone("rematch-base", k).eval() for k in (0, 4, 16)}
    rng = random.Random(0)
    pictures = [picto.render(picto.sample_scene(rng), picto.TRAIN_STYLES[0], i) for i in range(64)]
    times: dict[int, list[float]] = {k: [] for k in models}
    for _ in range(rounds + 1):
        for k, model in models.items():
            start = time.perf_counter()
            model.encode_document(pictures, batch_size=64, show_progress_bar=False)
            times[k].append(time.perf_counter() - start)
    return {
        f"K={k}": round(1000 * statistics.median(values[1:]) / len(pictures), 2)
        for k, values in times.items()
    }


# ---- report ------------------------------------------------------------------------------


def style_score(scores: dict[str, float]) -> float:
    """Hit@1 in the unseen style, which committed results still call ``ood_overall``."""
    return scores["style"] if "style" in scores else scores["ood_overall"]


COLUMNS = {
    "overall": lambda row: row["scores"]["overall"],
    "style": lambda row: style_score(row["scores"]),
    "replace": lambda row: row["composition"]["replace"],
    "swap": lambda row: row["composition"]["swap"],
    "add": lambda row: row["composition"]["add or leave out"],
    **{view: lambda row, view=view: row["matching"][view] for view in View},
    "VQA": lambda row: row["vqa_exact"],
}


def report(args: argparse.Namespace) -> None:
    """Print means and standard errors, write them into docs/ablation.md, and plot them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        row = json.loads(path.read_text())
        groups.setdefault(row["arm"], []).append(row)
    table = Table("arm", "steps", "seeds", *COLUMNS)
    lines = [
        f"| arm | steps | seeds | {' | '.join(COLUMNS)} |",
        "|---|--:|--:|" + "--:|" * len(COLUMNS),
    ]
    listed = [arm for arm in (BASE, *sorted(ARMS)) if arm in groups]
    for arm in listed + [arm for arm in groups if arm not in listed]:
        rows = groups[arm]
        cells = [arm, f"{rows[0].get('steps', 0):,}", str(len(rows))]
        cells += [mean_and_error([value(row) for row in rows]) for value in COLUMNS.values()]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    Console(width=150).print(table)
    Console().print("Not run:", ", ".join(arm for arm in ARMS if arm not in groups) or "nothing")
    before, _, rest = PAGE.read_text().partition(START)
    scratch = PAGE.with_suffix(".tmp")
    scratch.write_text(
        before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2]
    )
    scratch.replace(PAGE)
    draw({arm: groups[arm] for arm in listed}, PAGE.with_suffix(".png"))


def draw(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot Hit@1 of every arm: a point for each seed, a bar for their mean."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2, figsize=(10, 0.42 * len(groups) + 1.4), sharey=True, layout="constrained"
    )
    arms = list(groups)[::-1]
    for axis, key, title in zip(
        axes, ("overall", "style"), ("overall", "unseen style"), strict=True
    ):
        for y, arm in enumerate(arms):
            values = [COLUMNS[key](row) for row in groups[arm]]
            axis.barh(
                y,
                statistics.mean(values),
                color="#9db8d2" if "all" not in arm else "#3b6ea5",
                height=0.62,
            )
            axis.scatter(values, [y] * len(values), color="#222", s=14, zorder=3)
        axis.set(
            title=f"Hit@1, {title} (%)", yticks=range(len(arms)), yticklabels=arms, xlim=(0, 100)
        )
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def mean_and_error(values: list[float]) -> str:
    """Format a mean ± its standard error."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main() -> None:
    """Time, run or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("time", "run", "report"))
    parser.add_argument("--arms", nargs="+", default=[*ARMS, BASE], choices=[*ARMS, BASE])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, help=f"training steps, instead of {STEPS} or equal time"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], help="more overrides of the recipe, for sweeps"
    )
    parser.add_argument("--name", help="name of the results of a run with --set")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of `time`")
    args = parser.parse_args()
    if args.set and not args.name:
        parser.error("--set needs --name, or the result would count as the arm's. Add --name.")
    if args.what == "time":
        measure_seconds(args)
    elif args.what == "report":
        report(args)
    else:
        for seed in args.seeds:
            for arm in args.arms:
                run(arm, seed, args)


if __name__ == "__main__":
    main()
