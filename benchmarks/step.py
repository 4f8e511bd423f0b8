"""Seconds, tokens, memory and utilisation of one training step: sentence-transformers, ours
without and with matching.

    python benchmarks/step.py --output benchmarks/results/step-cpu.json
    python benchmarks/step.py --device cuda --output benchmarks/results/step-cuda.json   #
    Qwen2-VL-2B, random weights

All arms have the same backbone, samples, batch and mini-batch, full fine-tuning of the language
model, a frozen vision tower and a gradient cache. Arms take turns step by step; medians are
compared.

- ``naive`` is matching as eight forward passes, one per question, each with its own query,
  document and pictures; ``naive_seen`` is the same with the pictures seen once, as all our arms
  have them.
- MFU: the arithmetic of a forward and backward pass without the cache's second forward, by torch's
  flop counter, over what a large matrix product reaches on this machine in this run.
  sentence-transformers does contrastive's work.
- Memory is what a process of its own grows by over one step, returned to the system piece by piece
  so that it is what is in use. ``memory_256_over_32`` leaves inputs aside: pixels, and what the
  frozen tower made of them.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from rematch.backbone.loading import resolve
from rematch.data import picto
from rematch.data.picto_tasks import training_triplet
from rematch.files import write_json
from rematch.matching import VIEWS
from rematch.model import ReMatch
from rematch.train.batch import Batch, Step
from rematch.train.collator import Collator, cut, identity
from rematch.train.loss import ReMatchLoss

COLUMNS = ("query", "positive", "negative")
ARMS = ("st_contrastive", "contrastive", "naive", "naive_seen", "unified", "reuse", "feat")


def small_backbone(directory: Path) -> str:
    """A LLaVA that splits its work between sight and language as a real one does: 144 picture
    tokens, 12 layers.
    """
    config = AutoConfig.from_pretrained(resolve("rematch-base"))
    vision, text = config.vision_config, config.text_config
    vision.num_hidden_layers, vision.image_size = 12, 2 * picto.SIZE
    text.num_hidden_layers, text.layer_types = 8, ["full_attention"] * 8
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    processor = AutoProcessor.from_pretrained(resolve("rematch-base"))
    processor.image_processor.size = {"height": vision.image_size, "width": vision.image_size}
    processor.save_pretrained(directory)
    return str(directory)


def samples(count: int) -> list[dict[str, Any]]:
    return [
        {name: getattr(training_triplet(0, i), name).as_input() for name in COLUMNS}
        for i in range(count)
    ]


class Naive(ReMatchLoss):
    """Matching as one forward pass per question."""

    shares_pictures = False

    def match(self, step: Step, batch: Batch, seen: Any, vectors: Tensor) -> Tensor:
        return super().match(step, batch, seen if self.shares_pictures else None, vectors)

    def answers(self, logits: Tensor, relevant: Tensor, batch: Batch) -> Tensor:
        yes, no = self.backbone.answer_ids
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), torch.where(relevant, yes, no).flatten(), reduction="sum"
        )
        return total * (self.w_qdm / (8 * len(batch.inputs)))


class NaiveSeen(Naive):
    shares_pictures = True


def naive_batch(model: ReMatch, rows: list[dict[str, Any]], tokens: int) -> Batch:
    """The ordinary batch, with one question a sequence in its matching steps."""
    batch: Batch = Collator(model, VIEWS, tokens)(rows)["batch"]
    batch.matching = []
    reader = model.backbone.reader
    numbers: dict[int, int] = {}
    readings: dict[int, Any] = {}
    for row, places in zip(rows, batch.inputs.tolist(), strict=True):
        for column, place in zip(COLUMNS, places, strict=True):
            readings[place] = readings.get(place) or reader.read(row[column])
            if readings[
                place
            ].vision:  # sets are numbered in the order in which contents are first met
                numbers.setdefault(identity(row[column]), len(numbers))
    set_of = {
        place: numbers.get(identity(row[c]))
        for row, places in zip(rows, batch.inputs.tolist(), strict=True)
        for c, place in zip(COLUMNS, places, strict=True)
    }
    for view in VIEWS:
        query_view, document_view = view.split("-")
        for document in (1, 2):
            pairs = batch.inputs[:, [0, document]].tolist()
            question = [(query_view, 0, document_view)]
            laid = [
                reader.pack_matching([(readings[q], [readings[d]])], [question])[0]
                for q, d in pairs
            ]
            lengths = [packed.input_ids.shape[1] for packed in laid]
            order = sorted(range(len(pairs)), key=lengths.__getitem__)
            for chosen in cut([lengths[i] for i in order], tokens):
                some = [pairs[order[i]] for i in chosen]
                packed, _ = reader.pack_matching(
                    [(readings[q], [readings[d]]) for q, d in some], [question] * len(some)
                )
                read = [
                    p
                    for q, d in some
                    for p, v in ((q, query_view), (d, document_view))
                    if v == "feat"
                ]
                raw = [
                    p
                    for q, d in some
                    for p, v in ((q, query_view), (d, document_view))
                    if v == "raw"
                ]
                tensors = vars(packed) | {"read": torch.tensor(read).long()}
                tensors["relevant"] = torch.full((len(some), 1), document == 1)
                batch.matching.append(
                    Step(tensors, [set_of[p] for p in raw if set_of[p] is not None])
                )
    return batch


def build(args: argparse.Namespace, directory: Path) -> tuple[ReMatch, list[dict[str, Any]], int]:
    path = small_backbone(directory) if args.device == "cpu" else random_qwen(directory)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = ReMatch.from_backbone(path, 16, model_kwargs={"dtype": dtype}, device=args.device)
    model.backbone.freeze_vision()
    rows = samples(args.batch)
    reader = model.backbone.reader
    longest = max(
        len(reader.read(row[column]).ids) + 16 for row in rows[:32] for column in COLUMNS
    )
    return model, rows, args.mini_batch * longest


def random_qwen(directory: Path, **smaller: Any) -> str:
    """Qwen2-VL-2B's shape with random weights and 256 tokens a picture (wants a torchvision that
    fits torch).
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny_families import MROPE, qwen2_vl

    text = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "rope_parameters": MROPE | {"mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
    pixels = smaller.get("pixels", (448 * 448, 448 * 448))
    model, processor = qwen2_vl(
        text | smaller.get("text", {}), vision | smaller.get("vision", {}), pixels
    )
    model.bfloat16().save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)


def arm(
    name: str,
    model: ReMatch,
    rows: list[dict[str, Any]],
    tokens: int,
    mini_batch: int,
    cached: bool = True,
) -> tuple[Callable[[], Tensor], Batch | None]:
    """One forward of the arm's loss, and its batch if it is ours."""
    if name == "st_contrastive":
        columns = [
            {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in c.items()}
            for c in st_columns(model, rows)
        ]
        loss = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=mini_batch)
        return lambda: loss([dict(c) for c in columns], None), None
    options: dict[str, Any] = {"gradient_cache": cached}
    views: Sequence[str] = ["feat-feat"] if name == "feat" else VIEWS
    if name == "contrastive":
        views, options["w_qdm"], options["w_orth"] = (), 0, 0
    kind = {"naive": Naive, "naive_seen": NaiveSeen}.get(name, ReMatchLoss)
    ours = kind(model, views=views or VIEWS, **options)
    if kind is ReMatchLoss:
        batch = Collator(model, views, tokens, reuse=name == "reuse")(rows)["batch"]
    else:
        batch = naive_batch(model, rows, tokens)
    return lambda: torch.stack(list(ours([batch]).values())).sum(), batch


def timed(step: Callable[[], Tensor], model: ReMatch) -> float:
    model.zero_grad()
    wait()
    start = time.perf_counter()
    step().backward()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def growth(args: argparse.Namespace) -> dict[str, float]:
    """MB that one step of ``args.arm`` adds to a process that has its model, gradients and inputs
    (Linux).
    """
    with tempfile.TemporaryDirectory() as directory:
        model, rows, tokens = build(args, Path(directory))
        arm(args.arm, model, rows[:8], tokens, args.mini_batch)[
            0
        ]().backward()  # gradients are there from here on
        step, batch = arm(args.arm, model, rows, tokens, args.mini_batch)
        seen = ReMatchLoss(model).see(batch) if batch else None
        features = sum(unit.nbytes for one in seen or [] for unit in one.units) / 2**20
        del seen
        if args.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step().backward()
            return {
                "mb": (torch.cuda.max_memory_allocated() - before) / 2**20,
                "features_mb": features,
            }
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        step().backward()
        return {"mb": status("VmHWM") - before, "features_mb": features}


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure_growth(args: argparse.Namespace, name: str, batch: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--arm",
        name,
        "--batch",
        str(batch),
        "--mini-batch",
        str(args.mini_batch),
    ]
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }  # freed memory leaves the process at once
    out = subprocess.run(
        [*command, "--device", args.device],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | exact,
    )
    found: dict[str, float] = json.loads(out.stdout.strip().splitlines()[-1])
    return found


def arithmetic(
    name: str, model: ReMatch, rows: list[dict[str, Any]], tokens: int, mini_batch: int
) -> float:
    """FLOPs of forward and backward without a gradient cache."""
    name = "contrastive" if name == "st_contrastive" else name
    with FlopCounterMode(display=False) as counter:
        arm(name, model, rows, tokens, mini_batch, cached=False)[0]().backward()
    model.zero_grad()
    return float(counter.get_total_flops())


def attainable(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def main() -> None:
    """Measure, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--mini-batch",
        type=int,
        default=32,
        help="inputs of the longest kind that fit into a pass",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--arm", choices=ARMS, help="only print the memory that one step of this arm takes"
    )
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(growth(args)))
        return
    with tempfile.TemporaryDirectory() as directory:
        model, rows, tokens = build(args, Path(directory))
        steps = {name: arm(name, model, rows, tokens, args.mini_batch) for name in ARMS}
        flops = {name: arithmetic(name, model, rows, tokens, args.mini_batch) for name in ARMS}
        times: dict[str, list[float]] = {name: [] for name in ARMS}
        for turn in range(args.rounds + 1):
            for name in random.Random(turn).sample(ARMS, len(ARMS)):
                taken = timed(steps[name][0], model)
                if turn:  # the first one warms up
                    times[name].append(taken)
        peak = attainable(args.device, model.dtype)
    seconds = {name: round(statistics.median(found), 3) for name, found in times.items()}
    matching = {name: round(seconds[name] - seconds["contrastive"], 3) for name in ARMS[2:]}
    padded = sum(c["input_ids"].numel() for c in st_columns(model, rows))
    read = {name: batch.tokens if batch else padded for name, (_, batch) in steps.items()}
    tokens_per_second = {name: round(read[name] / seconds[name]) for name in ARMS}
    mfu = {name: round(flops[name] / seconds[name] / peak, 3) for name in ARMS}
    memory = {name: measure_growth(args, name, args.batch) for name in ARMS}
    large = measure_growth(args, "unified", 8 * args.batch)
    apart = [found["mb"] - found["features_mb"] for found in (large, memory["unified"])]
    ratios = {
        "contrastive_over_st": round(seconds["st_contrastive"] / seconds["contrastive"], 2),
        "unified_over_naive": round(matching["naive"] / matching["unified"], 2),
        "unified_over_naive_seen": round(matching["naive_seen"] / matching["unified"], 2),
        "reuse_step_over_contrastive_step": round(seconds["reuse"] / seconds["contrastive"], 2),
        "reuse_over_st_contrastive": round(seconds["st_contrastive"] / seconds["reuse"], 2),
        f"memory_{8 * args.batch}_over_{args.batch}": round(apart[0] / apart[1], 2),
        "the_same_with_features": round(large["mb"] / memory["unified"]["mb"], 2),
    }
    table = Table("arm", "s a step", "matching s", "tokens/s", "MB a step", "MFU")
    for name in ARMS:
        row = (
            seconds[name],
            matching.get(name, ""),
            tokens_per_second[name],
            round(memory[name]["mb"]),
            mfu[name],
        )
        table.add_row(name, *map(str, row))
    Console().print(table, ratios)
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {
        "seconds_per_step": seconds,
        "matching_seconds": matching,
        "tokens_per_second": tokens_per_second,
        "step_memory_mb": {name: round(found["mb"]) for name, found in memory.items()},
        "unified_step_memory_mb": {str(args.batch): memory["unified"], str(8 * args.batch): large},
        "mfu": mfu,
        "attainable_gflops": round(peak / 1e9),
        "ratios": ratios,
        "batch": args.batch,
        "mini_batch": args.mini_batch,
        "rounds": args.rounds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vision_share_of_a_contrastive_forward": vision_share(model, rows),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else hardware,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "sentence-transformers")
        },
    }
    if args.output:
        write_json(args.output, result)


def st_columns(model: ReMatch, rows: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """The padded columns that sentence-transformers' loss is given."""
    tasks = {c: "query" if c == "query" else "document" for c in COLUMNS}
    return [model.preprocess([row[c] for row in rows], task=tasks[c]) for c in COLUMNS]


def vision_share(model: ReMatch, rows: list[dict[str, Any]]) -> float:
    """Which part of the arithmetic of embedding a batch once is the vision tower's."""
    batch, loss = Collator(model, (), 1_000_000)(rows)["batch"], ReMatchLoss(model)
    with torch.no_grad(), FlopCounterMode(display=False) as vision:
        seen = loss.see(batch)
    with torch.no_grad(), FlopCounterMode(display=False) as language:
        for step in batch.embedding:
            loss.embed(step, batch, seen)
    parts = [vision.get_total_flops(), language.get_total_flops()]
    return round(parts[0] / sum(parts), 2)


if __name__ == "__main__":
    main()
