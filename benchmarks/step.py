"""Seconds, tokens, memory and utilisation of one training step: sentence-transformers, ours
without and with matching.

    python benchmarks/step.py --output benchmarks/results/step-cpu.json
    python benchmarks/step.py --device cuda --output benchmarks/results/step-cuda.json

On a CPU the backbone is a small LLaVA, on a GPU one of Qwen2-VL-2B's shape with random weights.
All arms have the same backbone, samples, batch and mini-batch, full fine-tuning of the language
model, a frozen vision tower and a gradient cache. Steps of the arms are interleaved, and medians
are compared.

- ``naive`` is matching as eight forward passes, one per question, each with its own query,
  document and pictures. In ``naive_seen`` the vision tower runs once, as in all our arms.
- MFU: the arithmetic of a forward and backward pass without the cache's second forward pass, by
  torch's flop counter, over the rate of a large matrix product on this machine in this run.
  sentence-transformers does the work of ``contrastive``.
- Memory is the growth of a separate process over one step, with an allocator that returns freed
  memory at once. ``memory_256_over_32`` leaves out the inputs: pixels, and the frozen tower's
  features of them.
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
from dataclasses import replace
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
from rematch.matching import Question, View
from rematch.model import ReMatch
from rematch.train.batch import Batch, MiniBatch
from rematch.train.collator import Collator, input_key, split
from rematch.train.gradient_cache import Passes
from rematch.train.loss import ReMatchLoss

COLUMNS = ("query", "positive", "negative")
ARMS = ("st_contrastive", "contrastive", "naive", "naive_seen", "unified", "reuse", "feat")


def small_backbone(directory: Path) -> str:
    """Write a LLaVA that divides its work between vision and language like a real one: 144 picture
    tokens, 12 vision layers. Returns its directory.
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
    """Training samples of Picto."""
    return [
        {name: getattr(training_triplet(0, i), name).as_input() for name in COLUMNS}
        for i in range(count)
    ]


class Naive(ReMatchLoss):
    """Matching as one forward pass per question."""

    shares_pictures = False

    def match(self, mini_batch: MiniBatch, passes: Passes, embeddings: Tensor) -> Tensor:
        if not self.shares_pictures:
            passes = replace(passes, features=None)
        return super().match(mini_batch, passes, embeddings)

    def answers(self, logits: Tensor, relevant: Tensor, batch: Batch) -> Tensor:
        yes, no = self.backbone.answer_ids
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), torch.where(relevant, yes, no).flatten(), reduction="sum"
        )
        return total * (self.w_qdm / (8 * len(batch.inputs)))


class NaiveSeen(Naive):
    """The same, with the vision tower run once per step."""

    shares_pictures = True


def naive_batch(model: ReMatch, rows: list[dict[str, Any]], tokens: int) -> Batch:
    """The ordinary batch, with one question per sequence in its matching steps."""
    batch: Batch = Collator(model, tuple(View), tokens)(rows)["batch"]
    batch.matching = []
    reader = model.backbone.reader
    numbers: dict[int, int] = {}
    readings: dict[int, Any] = {}
    picture_sets: dict[int, int | None] = {}
    for row, places in zip(rows, batch.inputs.tolist(), strict=True):
        for column, place in zip(COLUMNS, places, strict=True):
            if place not in readings:
                readings[place] = reader.read(row[column])
            content = input_key(row[column])
            if readings[place].vision:  # sets are numbered in the order of their first appearance
                numbers.setdefault(content, len(numbers))
            picture_sets[place] = numbers.get(content)
    for view in View:
        question = [Question(view, 0)]
        for column in (1, 2):
            pairs = batch.inputs[:, [0, column]].tolist()

            def pack(pairs: list[list[int]], question: Any = question) -> Any:
                rows = [(readings[query], [readings[document]]) for query, document in pairs]
                return model.backbone.questions.pack(rows, [question] * len(rows))[0]

            lengths = [pack([pair]).input_ids.shape[1] for pair in pairs]
            order = sorted(range(len(pairs)), key=lengths.__getitem__)
            for indices in split([lengths[i] for i in order], tokens):
                members = [pairs[order[i]] for i in indices]
                by_form: dict[str, list[int]] = {"raw": [], "feat": []}
                for query, document in members:
                    by_form[view.query].append(query)
                    by_form[view.document].append(document)
                tensors = dict(vars(pack(members)))
                tensors["placeholder_inputs"] = torch.tensor(by_form["feat"]).long()
                tensors["relevant"] = torch.full((len(members), 1), column == 1)
                sets = [picture_sets[place] for place in by_form["raw"]]
                batch.matching.append(MiniBatch(tensors, [n for n in sets if n is not None]))
    return batch


def build(args: argparse.Namespace, directory: Path) -> tuple[ReMatch, list[dict[str, Any]], int]:
    """The model, the samples, and the tokens of a mini-batch."""
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


def random_qwen(directory: Path, **changes: Any) -> str:
    """Write a model of Qwen2-VL-2B's shape with random weights and 256 tokens per picture; needs a
    torchvision that fits torch.

    Args:
        directory: Directory of the model, which is also returned.
        changes: ``text`` and ``vision`` override the sizes, ``pixels`` the limits of a picture.
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
    pixels = changes.get("pixels", (448 * 448, 448 * 448))
    model, processor = qwen2_vl(
        text | changes.get("text", {}), vision | changes.get("vision", {}), pixels
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
    """A function that runs a forward pass of the arm's loss, and the batch if it is ours."""
    if name == "st_contrastive":
        columns = [
            {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in column.items()}
            for column in st_columns(model, rows)
        ]
        loss = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=mini_batch)
        return lambda: loss([dict(column) for column in columns], None), None
    options: dict[str, Any] = {"gradient_cache": cached}
    views: Sequence[View] = [View.FEAT_FEAT] if name == "feat" else tuple(View)
    if name == "contrastive":
        views, options["w_qdm"], options["w_orth"] = (), 0, 0
    kind = {"naive": Naive, "naive_seen": NaiveSeen}.get(name, ReMatchLoss)
    ours = kind(model, views=views or tuple(View), **options)
    if kind is ReMatchLoss:
        batch = Collator(model, views, tokens, reuse=name == "reuse")(rows)["batch"]
    else:
        batch = naive_batch(model, rows, tokens)
    return lambda: torch.stack(list(ours([batch]).values())).sum(), batch


def timed(step: Callable[[], Tensor], model: ReMatch) -> float:
    """Seconds of a step."""
    model.zero_grad()
    wait()
    start = time.perf_counter()
    step().backward()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Wait until the GPU has finished, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def growth(args: argparse.Namespace) -> dict[str, float]:
    """MB that a step of ``args.arm`` adds to a process that holds model, gradients and inputs;
    Linux only.
    """
    with tempfile.TemporaryDirectory() as directory:
        model, rows, tokens = build(args, Path(directory))
        first_step, _ = arm(args.arm, model, rows[:8], tokens, args.mini_batch)
        first_step().backward()  # allocates the gradients
        step, batch = arm(args.arm, model, rows, tokens, args.mini_batch)
        vision = (ReMatchLoss(model).picture_features(batch) if batch else None) or []
        features = sum(unit.nbytes for picture_set in vision for unit in picture_set.units) / 2**20
        del vision
        if args.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step().backward()
            return {
                "mb": (torch.cuda.max_memory_allocated() - before) / 2**20,
                "features_mb": features,
            }
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = status("VmRSS")
        step().backward()
        return {"mb": status("VmHWM") - before, "features_mb": features}


def status(name: str) -> float:
    """MB of an entry in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure_growth(args: argparse.Namespace, name: str, batch: int) -> dict[str, float]:
    """Growth of a step of an arm, in a process of its own."""
    command = [sys.executable, __file__, "--arm", name, "--device", args.device]
    command += ["--batch", str(batch), "--mini-batch", str(args.mini_batch)]
    # with these, freed memory leaves the process at once
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | allocator
    )
    sizes: dict[str, float] = json.loads(process.stdout.strip().splitlines()[-1])
    return sizes


def arithmetic(
    name: str, model: ReMatch, rows: list[dict[str, Any]], tokens: int, mini_batch: int
) -> float:
    """FLOP of a forward and backward pass without a gradient cache."""
    name = "contrastive" if name == "st_contrastive" else name
    step, _ = arm(name, model, rows, tokens, mini_batch, cached=False)
    with FlopCounterMode(display=False) as counter:
        step().backward()
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
    """Measure, print a table and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--mini-batch",
        type=int,
        default=32,
        help="number of longest inputs that fit into a forward pass",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--arm", choices=ARMS, help="only measure the memory of a step of this arm"
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
                step_time = timed(steps[name][0], model)
                if turn:  # the first turn is a warm-up
                    times[name].append(step_time)
        peak = attainable(args.device, model.dtype)
    seconds = {name: round(statistics.median(values), 3) for name, values in times.items()}
    matching = {name: round(seconds[name] - seconds["contrastive"], 3) for name in ARMS[2:]}
    st_tokens = sum(column["input_ids"].numel() for column in st_columns(model, rows))
    token_counts = {
        name: batch.tokens if batch else st_tokens for name, (_, batch) in steps.items()
    }
    tokens_per_second = {name: round(token_counts[name] / seconds[name]) for name in ARMS}
    mfu = {name: round(flops[name] / seconds[name] / peak, 3) for name in ARMS}
    memory = {name: measure_growth(args, name, args.batch) for name in ARMS}
    large = measure_growth(args, "unified", 8 * args.batch)
    without_features = [sizes["mb"] - sizes["features_mb"] for sizes in (large, memory["unified"])]
    ratios = {
        "contrastive_over_st": round(seconds["st_contrastive"] / seconds["contrastive"], 2),
        "unified_over_naive": round(matching["naive"] / matching["unified"], 2),
        "unified_over_naive_seen": round(matching["naive_seen"] / matching["unified"], 2),
        "reuse_step_over_contrastive_step": round(seconds["reuse"] / seconds["contrastive"], 2),
        "reuse_over_st_contrastive": round(seconds["st_contrastive"] / seconds["reuse"], 2),
        f"memory_{8 * args.batch}_over_{args.batch}": round(
            without_features[0] / without_features[1], 2
        ),
        "the_same_with_features": round(large["mb"] / memory["unified"]["mb"], 2),
    }
    table = Table("arm", "s per step", "matching, s", "tokens/s", "MB per step", "MFU")
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
        "step_memory_mb": {name: round(sizes["mb"]) for name, sizes in memory.items()},
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
    """The padded columns that sentence-transformers' loss takes."""
    return [
        model.preprocess(
            [row[column] for row in rows], task="query" if column == "query" else "document"
        )
        for column in COLUMNS
    ]


def vision_share(model: ReMatch, rows: list[dict[str, Any]]) -> float:
    """The vision tower's share of the arithmetic of embedding a batch once."""
    batch, loss = Collator(model, (), 1_000_000)(rows)["batch"], ReMatchLoss(model)
    with torch.no_grad(), FlopCounterMode(display=False) as vision:
        passes = loss.passes(batch)
    with torch.no_grad(), FlopCounterMode(display=False) as language:
        for mini_batch, _ in passes.embedding:
            loss.embed(mini_batch, passes)
    parts = [vision.get_total_flops(), language.get_total_flops()]
    return round(parts[0] / sum(parts), 2)


if __name__ == "__main__":
    main()
