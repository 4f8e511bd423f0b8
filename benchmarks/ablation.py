"""The paper's ablation ladder on Picto, from the tiny base: what each part of the method gives and
costs, and what remains of the base's abilities.

    python benchmarks/ablation.py run experiments    # choices, on the validation split
    python benchmarks/ablation.py run changes        # around the winner of the experiments
    python benchmarks/ablation.py time               # seconds per step of every arm of the ladder
    python benchmarks/ablation.py run ladder         # three seeds, on the test split
    python benchmarks/ablation.py run sweeps
    python benchmarks/ablation.py report             # tables and figure of docs/ablation.md
    python benchmarks/ablation.py list experiments   # what is planned, and what was predicted

A stage resumes where it stopped, and several copies of the script share its runs. Each run writes
one JSON file to benchmarks/results/ablation/STAGE/, with Hit@1 of every task and of every query,
so that arms are compared on the same queries. In percent, always on held-out combinations, it also
holds:

- ``matching``: Yes/No accuracy on right and nearly right documents, for each view;
- ``vqa_exact``: exact answers by greedy generation; with ``raw-raw`` above, what remains of the
  base's abilities;
- ``composition``: how often a scene is nearer to its caption than to one in which an object is
  replaced, two are swapped, or one is added or left out (as in SugarCrepe); guessing gives 50.

The arms named ``…-equal-time`` train for as many steps as fit into the time of
``3-hard-negatives``, by the seconds that ``time`` has measured.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nearest_negatives import NearestNegatives
from rich.console import Console
from rich.table import Table

from rematch.data import picto
from rematch.data.picto_tasks import TASKS, UNSEEN, Draw, evaluation_tasks
from rematch.encoding.encoder import Encoder
from rematch.evaluate.metrics import Interval, paired_interval
from rematch.evaluate.run import evaluate, summary
from rematch.files import write_json
from rematch.matching import View
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS
from rematch.train.build import build_collator, build_loss, build_model
from rematch.train.collator import Collator
from rematch.train.recipe import Recipe, load_recipe
from rematch.train.run import train
from rematch.train.sources import build_dataset

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
SECONDS = RESULTS / "seconds.json"
PAGE = ROOT / "docs" / "ablation.md"
REFERENCE = "3-hard-negatives"
BASE = "0-base"  # the untrained base, pooled by its last token


@dataclass(frozen=True)
class Arm:
    """A recipe of the ladder with overrides, and what was expected of it before it ran.

    Attributes:
        warm_up: Overrides of a run before, from whose model the arm starts; none: no such run.
        collator: What makes its batches.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    prediction: str = ""
    warm_up: tuple[str, ...] = ()
    collator: type[Collator] = Collator


def change(prediction: str, *overrides: str, recipe: str = "6-all", **options: Any) -> Arm:
    """An experiment: the full method (or another rung) with overrides."""
    return Arm(recipe, overrides, prediction, **options)


EXPERIMENTS = {
    "last-token": change("The level to beat.", recipe="3-hard-negatives"),
    "all": change(
        "Within a point of last-token: rows move now, from random starts.",
        "model.token_init=random",
    ),
    "all-plain-rate": change(
        "As all, -1: rows of RMS 0.1 move without scaled rates too, only less.",
        "train.scale_learning_rates=false",
    ),
    "all-start-last": change(
        "The best start, +1 over all: rows begin where the base reads its answers.",
        "model.token_init=last",
    ),
    "all-start-last-qdm-0.3": change(
        "+0.5 over all-start-last, matching five points more accurate.",
        "model.token_init=last",
        "loss.w_qdm=0.3",
    ),
    "all-start-mixed": change(
        "+1.5 over all-start-last: copies keep Category, random rows keep Style, so both stay.",
        "model.token_init=mixed",
    ),
    "all-start-small": change("As all.", "model.token_init=small"),
    "all-start-mean": change("Between random and last.", "model.token_init=mean"),
    "tokens": change(
        "As last-token; matching is what separates it from all.", recipe="5-multi-token"
    ),
    "last-token-matching": change("OOD +1 over last-token, IND as it.", recipe="4-matching"),
}
# around the winner of the experiments; float32, in which machines with and without bfloat16 agree
CHANGES_OF_ALL = {
    "all": change("Within a point of all-start-mixed above, which ran in bfloat16: 55."),
    "all-qdm-1": change(
        "+1 OOD, -1 IND; all four views five points more accurate.", "loss.w_qdm=1"
    ),
    "all-k4": change("-0.5: two copies and two random rows.", "model.num_tokens=4"),
    "all-no-orth": change("-0.5: tokens collapse to the same vector.", "loss.w_orth=0"),
    "all-lora": change(
        "IND -3, OOD +2: adapters keep more of the base and learn less.",
        "model.lora={}",
        "train.learning_rate=1.0e-3",
    ),
    "all-joint": change(
        "As all in vectors; raw-raw accuracy ten points higher.", "loss.joint=true"
    ),
    "all-warm-up": change(
        "+0.5: the projector can be read before InfoNCE moves the model; raw-raw 5 higher.",
        warm_up=("loss.w_qdm=1", "loss.w_orth=0", "loss.temperature=100", "train.steps=300"),
    ),
    "all-nearest-negative": change(
        "-0.3 overall, views two points less accurate: fewer questions about nearly right ones.",
        collator=NearestNegatives,
    ),
    "all-qdm-0.3": change("+0.5 OOD.", "loss.w_qdm=0.3"),
    "all-k8": change("As all.", "model.num_tokens=8"),
    "all-orth-0.1": change("As all.", "loss.w_orth=0.1"),
}
CHANGES_OF_ALL = {
    name: replace(arm, overrides=(*arm.overrides, "train.bf16=false"))
    for name, arm in CHANGES_OF_ALL.items()
}
LADDER = {
    "1-last-token": Arm("1-last-token"),
    "2-target-instructions": Arm("2-target-instructions"),
    "3-hard-negatives": Arm("3-hard-negatives"),
    "4-matching": Arm("4-matching"),
    "5-multi-token": Arm("5-multi-token"),
    "6-all": Arm("6-all"),
    "7-all-reuse": Arm("6-all", ("loss.matching=reuse",)),
}
LADDER |= {f"{name}-equal-time": LADDER[name] for name in list(LADDER)[3:]}
SWEEPS = (
    {f"K-{k}": Arm("6-all", (f"model.num_tokens={k}",)) for k in (1, 2, 4, 8, 32)}
    | {f"K-{k}-no-orth": Arm("6-all", (f"model.num_tokens={k}", "loss.w_orth=0")) for k in (4, 16)}
    | {f"w_qdm-{w}": Arm("6-all", (f"loss.w_qdm={w}",)) for w in (0.03, 0.3, 1)}
    | {f"only-{view}": Arm("6-all", (f"loss.views=[{view}]",)) for view in View}
)


@dataclass(frozen=True)
class Stage:
    """Runs that belong together.

    Attributes:
        arms: The arms by name.
        seeds: Number of seeds.
        split: The split of Picto that they are measured on.
        steps: Training steps; ``None`` for those of the recipes.
        queries: Queries per task.
        reference: The arm that the others are compared with.
    """

    arms: dict[str, Arm]
    seeds: int
    split: str
    steps: int | None
    queries: int
    reference: str


STAGES = {
    "experiments": Stage(EXPERIMENTS, 2, "validation", 400, 100, "last-token"),
    "changes": Stage(CHANGES_OF_ALL, 2, "validation", 400, 100, "all"),
    "ladder": Stage({BASE: Arm("1-last-token")} | LADDER, 3, "test", None, 200, REFERENCE),
    "sweeps": Stage(SWEEPS, 1, "test", None, 200, REFERENCE),
}
CAPTION_CHANGES = {"replace": "object", "swap": "swap", "add or leave out": "count"}
PER_TASK, SCENES = 50, 200


def recipe_of(arm: Arm, seed: int, output: Path, steps: int | None = None) -> Recipe:
    """Load the recipe of an arm."""
    # one process per run, so that several fit on a machine
    settings = [f"train.seed={seed}", f"train.output={output}", "train.workers=0"]
    settings.append("train.save_every=200")
    if steps:
        settings.append(f"train.steps={steps}")
    path = ROOT / "recipes" / f"ladder-{arm.recipe}.yaml"
    return load_recipe(path, [*arm.overrides, *settings])


def steps_of(name: str, stage: Stage) -> int | None:
    """Training steps of an arm: the stage's, or as many as take the reference's time."""
    if not name.endswith("-equal-time"):
        return stage.steps
    if not SECONDS.exists():
        raise SystemExit(
            f"{name}: the number of steps follows from measured seconds, and there are none. Run "
            "`benchmarks/ablation.py time` first."
        )
    seconds = json.loads(SECONDS.read_text())["seconds_per_step"]
    steps = recipe_of(LADDER[REFERENCE], 0, ROOT).train.steps
    return int(steps * seconds[REFERENCE] / seconds[name.removesuffix("-equal-time")])


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
    for name, change in CAPTION_CHANGES.items():
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


def run(stage_name: str, name: str, seed: int, work_dir: Path) -> None:
    """Train and measure one arm, unless its result exists or another copy is working on it."""
    stage = STAGES[stage_name]
    run_name = f"{name}-seed{seed}"
    target = RESULTS / stage_name / f"{run_name}.json"
    output = work_dir / stage_name / run_name
    warm_up_output = output.with_name(f"{run_name}-first")
    with claim(output.with_name(f"{run_name}.lock")) as claimed:
        if target.exists() or not claimed:
            return
        arm = stage.arms[name]
        row: dict[str, Any] = {"arm": name, "seed": seed, "split": stage.split}
        start = time.time()
        if name == BASE:
            torch.manual_seed(seed)
            model = ReMatch.from_backbone("rematch-base", 0)
        else:
            recipe = recipe_of(arm, seed, output, steps_of(name, stage))
            row |= {"overrides": list(arm.overrides), "steps": recipe.train.steps}
            if arm.warm_up:
                recipe.model.backbone = warmed_up(arm, seed, warm_up_output)
            if output.exists():
                model = ReMatch(output)
            else:
                model = train(recipe, quiet=True, collator_type=arm.collator)
            log = json.loads((output / "log.json").read_text())
            row |= {"precision": log[0]["precision"], "training": log[-2:]}
        model.eval()
        tasks = [
            task
            for unseen in (False, True)
            for task in evaluation_tasks(
                split=stage.split, unseen_style=unseen, queries=stage.queries
            )
        ]
        results = evaluate(Encoder(model), tasks)[0]
        row |= {
            "scores": summary(results),
            "hits": {r.task.name: "".join("01"[int(hit)] for hit in r.hits) for r in results},
            "composition": composition(model),
        } | abilities(model)
        write_json(target, row)
        if name != BASE:
            shutil.rmtree(output)
        if arm.warm_up:
            shutil.rmtree(warm_up_output)
        minutes = (time.time() - start) / 60
        Console().print(f"{run_name}: {row['scores']['overall']} after {minutes:.0f} minutes")


def warmed_up(arm: Arm, seed: int, output: Path) -> str:
    """Path of the model that an arm starts from."""
    if not output.exists():
        recipe = recipe_of(replace(arm, overrides=arm.overrides + arm.warm_up), seed, output)
        train(recipe, quiet=True)
    return str(output)


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
    arms = [arm for arm in LADDER if not arm.endswith("-equal-time")]
    ready = {}
    for arm in arms:
        recipe = recipe_of(LADDER[arm], 0, args.work_dir / "none", args.rounds + 1)
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
    write_json(SECONDS.with_name("encoding.json"), cost | setting)
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

SCORES = {
    "IND": lambda row: row["scores"]["ind"],
    "OOD": lambda row: row["scores"]["ood"],
    "style": lambda row: row["scores"]["style"],
    "overall": lambda row: row["scores"]["overall"],
}
ABILITIES = {
    "replace": lambda row: row["composition"]["replace"],
    "swap": lambda row: row["composition"]["swap"],
    "add": lambda row: row["composition"]["add or leave out"],
    **{view: lambda row, view=view: row["matching"][view] for view in View},
    "VQA": lambda row: row["vqa_exact"],
}
# overall Hit@1 on MMEB of the paper's own ladder (2B, tuned settings, with the chat template)
PAPER = {
    "1-last-token": 65.5,
    "2-target-instructions": 67.3,
    "3-hard-negatives": 67.9,
    "4-matching": 68.8,
    "5-multi-token": 68.7,
    "6-all": 69.2,
}
PANELS = {
    "ind": ("trained tasks", "#3b6ea5"),
    "ood": ("untrained tasks", "#c2410c"),
    "style": ("unseen style", "#7a7a7a"),
}


def read_rows(stage: str) -> dict[str, list[dict[str, Any]]]:
    """The results of a stage by arm, in the order of the stage and of seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in STAGES[stage].arms:
        paths = sorted((RESULTS / stage).glob(f"{name}-seed*.json"))
        rows = [json.loads(path.read_text()) for path in paths]
        if rows:
            groups[name] = rows
    return groups


def hits_of(rows: list[dict[str, Any]], seeds: list[int], left_out: str = "") -> list[np.ndarray]:
    """Hits of an arm for each task, (seeds, queries), without the tasks of a kind."""
    chosen = sorted((row for row in rows if row["seed"] in seeds), key=lambda row: row["seed"])
    return [
        np.array([[bit == "1" for bit in row["hits"][task]] for row in chosen])
        for task in chosen[0]["hits"]
        if task.removesuffix(UNSEEN) != left_out
    ]


def difference(
    rows: list[dict[str, Any]], reference: list[dict[str, Any]], left_out: str = ""
) -> Interval | None:
    """Difference of two arms over the seeds that both have, with its paired 95 % interval."""
    seeds = sorted({row["seed"] for row in rows} & {row["seed"] for row in reference})
    if not seeds:
        return None
    return paired_interval(*(hits_of(arm, seeds, left_out) for arm in (rows, reference)))


def difference_cell(interval: Interval | None) -> str:
    """A difference with its interval, as the tables show it."""
    if interval is None:
        return ""
    mean, low, high = (round(value, 1) + 0.0 for value in interval)  # + 0.0: no negative zero
    return f"{mean:+.1f} ({low:+.1f} … {high:+.1f})"


def score_table(stage: str) -> list[list[str]]:
    """Scores of a stage, and each arm's difference from its reference: a header, then the arms."""
    groups, reference_name = read_rows(stage), STAGES[stage].reference
    reference = groups.get(reference_name, [])
    differences = f"overall − {reference_name}", "the same without Style"
    table = [["arm", "steps", "seeds", *SCORES, *differences]]
    if stage == "ladder":
        table[0].append("paper, MMEB")
    for name, rows in groups.items():
        cells = [name, f"{rows[0].get('steps', 0):,}", str(len(rows))]
        cells += [mean_and_error([value(row) for row in rows]) for value in SCORES.values()]
        for left_out in ("", "Picto-Style"):
            is_reference = name == reference_name
            cells.append(
                "" if is_reference else difference_cell(difference(rows, reference, left_out))
            )
        if stage == "ladder":
            cells.append(paper_cell(name))
        table.append(cells)
    return table


def paper_cell(name: str) -> str:
    """The paper's score of a rung, and its difference from the paper's reference."""
    if name not in PAPER:
        return ""
    score = f"{PAPER[name]:.1f}"
    return score if name == REFERENCE else f"{score} ({PAPER[name] - PAPER[REFERENCE]:+.1f})"


def ability_table(stage: str) -> list[list[str]]:
    """Abilities of the arms of a stage: a header, then the arms."""
    return [["arm", *ABILITIES]] + [
        [name, *(mean_and_error([value(row) for row in rows]) for value in ABILITIES.values())]
        for name, rows in read_rows(stage).items()
    ]


def print_missing(stage: str) -> None:
    """Print which planned runs of a stage have no result."""
    groups = read_rows(stage)
    missing = [
        f"{name} (seed {seed})"
        for name in STAGES[stage].arms
        for seed in range(STAGES[stage].seeds)
        if seed not in [row["seed"] for row in groups.get(name, [])]
    ]
    Console().print(f"Not run of {stage}:", ", ".join(missing) or "nothing")


def report() -> None:
    """Print every stage, write its tables into docs/ablation.md, and plot the ladder."""
    page = PAGE.read_text()
    for stage in filter(read_rows, STAGES):
        for marker, cells in (
            (stage, score_table(stage)),
            (f"{stage}-abilities", ability_table(stage)),
        ):
            console_table = Table(*cells[0])
            for row in cells[1:]:
                console_table.add_row(*row)
            Console(width=200).print(console_table)
            lines = [f"| {' | '.join(row)} |" for row in cells]
            lines.insert(1, "|---" + "|--:" * (len(cells[0]) - 1) + "|")
            start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
            before, _, rest = page.partition(start)
            page = before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
        print_missing(stage)
    scratch = PAGE.with_suffix(".tmp")
    scratch.write_text(page)
    scratch.replace(PAGE)
    if groups := read_rows("ladder"):
        draw(groups, PAGE.with_suffix(".png"))


def draw(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot each arm's difference from the reference with its interval, and its scores by seed."""
    import matplotlib.pyplot as plt

    arms = [name for name in groups if name != BASE][::-1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.4 * len(arms) + 1.9), sharey=True, layout="constrained"
    )
    for y, arm in enumerate(arms):
        if arm in PAPER:
            left.plot(PAPER[arm] - PAPER[REFERENCE], y, "D", mfc="none", mec="#c2410c", ms=7)
        interval = difference(groups[arm], groups[REFERENCE]) if arm != REFERENCE else None
        if interval:
            left.plot((interval.low, interval.high), (y, y), color="#3b6ea5", lw=2)
            left.plot(interval.mean, y, "o", color="#3b6ea5", ms=7)
        for key, (title, color) in PANELS.items():
            values = [row["scores"][key] for row in groups[arm]]
            right.plot(values, [y] * len(values), ".", color=color, alpha=0.6, ms=6)
            right.plot(statistics.mean(values), y, "|", color=color, ms=14, mew=2.5, label=title)
    left.plot([], [], "o-", color="#3b6ea5", label="Picto, paired 95 % interval")
    left.plot([], [], "D", mfc="none", mec="#c2410c", label="the paper, MMEB, 2B")
    left.axvline(0, color="#888", lw=1)
    left.set(
        title=f"overall Hit@1 minus {REFERENCE} (points)",
        yticks=range(len(arms)),
        yticklabels=arms,
    )
    right.set(title="Hit@1 (%): mean, and each seed", xlim=(0, 100))
    handles, labels = right.get_legend_handles_labels()
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "frameon": False}
    right.legend(handles[: len(PANELS)], labels[: len(PANELS)], ncols=len(PANELS), **below)
    left.legend(ncols=2, **below)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def mean_and_error(values: list[float]) -> str:
    """Format a mean ± its standard error over seeds."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main() -> None:
    """Time, run, report or list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    time_parser = commands.add_parser("time", help="measure seconds per step")
    time_parser.add_argument("--rounds", type=int, default=15, help="measured steps of each arm")
    run_parser = commands.add_parser("run", help="train and measure the arms of a stage")
    run_parser.add_argument("stage", choices=STAGES)
    run_parser.add_argument("--arms", nargs="+", help="only these arms")
    run_parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    commands.add_parser("report", help="write tables and figure")
    commands.add_parser("list", help="print a stage").add_argument("stage", choices=STAGES)
    for command in (time_parser, run_parser):
        command.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "ablation")
    args = parser.parse_args()
    if args.command == "time":
        measure_seconds(args)
    elif args.command == "report":
        report()
    elif args.command == "list":
        for name, arm in STAGES[args.stage].arms.items():
            Console().print(f"{name}: {' '.join(arm.overrides)}  {arm.prediction}", markup=False)
    else:
        stage = STAGES[args.stage]
        if unknown := sorted(set(args.arms or ()) - set(stage.arms)):
            parser.error(f"{args.stage} has no arm {', '.join(unknown)}; see `list {args.stage}`.")
        for seed in args.seeds or range(stage.seeds):
            for name in args.arms or stage.arms:
                run(args.stage, name, seed, args.work_dir)


if __name__ == "__main__":
    main()
