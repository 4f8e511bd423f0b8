"""The parts of benchmarks/gpu.py: what is built, run and compared."""

import argparse
import gc
import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch

try:  # before transformers, which breaks on a torchvision that was built for another torch
    import torchvision
except ImportError:
    torchvision = None
except RuntimeError:  # two operators are missing that are not used here
    torch.library.define(
        "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
    torch.library.define(
        "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
    import torchvision

import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from step import attainable, random_qwen, samples, st_columns, wait
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from rematch.backbone.loading import resolve
from rematch.encoding.encoder import Encoder
from rematch.model import ReMatch
from rematch.train.build import build_collator, build_loss, build_model
from rematch.train.estimate import GB, RESERVED, estimate
from rematch.train.recipe import Recipe
from rematch.train.shape import load_shape
from rematch.train.trainer import PEAK_TFLOPS

ARMS = {  # sections of a recipe
    "contrastive": {"w_orth": 0.0, "w_qdm": 0.0},
    "multi_token": {"w_qdm": 0.0},
    "unified": {},
    "feat": {"matching": "feat"},
    "reuse": {"matching": "reuse"},
}
SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class Bench:
    """Device, backbone, samples and mini-batch size, which the parts share."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        self.device: str = args.device
        self.small: bool = args.small
        self.directory = directory
        self.batch: int = 6 if args.small else args.batch
        self.deadline = math.inf
        self.family, self.path = make_backbone(directory / "backbone", self.device, self.small)
        self.rows = samples(self.batch)
        self.tokens: int = args.mini_batch_tokens or self.largest_passes()

    def largest_passes(self) -> int:
        """Tokens of a forward pass with which a step fills at most 80 % of the GPU."""
        if self.device == "cpu":
            return 600
        room = 0.8 * torch.cuda.get_device_properties(0).total_memory / GB
        self.tokens = 16_384
        shape = load_shape(self.recipe())
        while self.tokens > 2048 and estimate(self.recipe(), shape).total >= room:
            self.tokens //= 2
        return self.tokens

    def recipe(
        self,
        path: str | None = None,
        *,
        lora: bool = True,
        model: Any = (),
        loss: Any = (),
        train: Any = (),
    ) -> Recipe:
        """A recipe like those that ship, with changed settings."""
        on_gpu = self.device == "cuda"
        sections = {
            "model": {"backbone": path or self.path, "dtype": "bfloat16" if on_gpu else "float32"}
            | ({"lora": {"r": 32, "alpha": 64}} if lora else {})
            | dict(model),
            "loss": {"gradient_cache": True} | dict(loss),
            "train": {"bf16": on_gpu, "batch_size": self.batch, "mini_batch_tokens": self.tokens}
            | dict(train),
        }
        return Recipe.model_validate(sections)

    def model(self, recipe: Recipe) -> ReMatch:
        """A new model on the device in training mode, under autocast as in the trainer."""
        model = build_model(recipe).train()
        if recipe.train.bf16 is True:
            autocast = torch.autocast(self.device, torch.bfloat16)
            model.forward = MethodType(autocast(model.forward.__func__), model)
        return model

    def step(self, recipe: Recipe, model: ReMatch) -> Callable[[], Tensor]:
        """A function that computes the total loss of a batch under a recipe."""
        batch = build_collator(recipe, model)(self.rows)["batch"]
        loss = build_loss(recipe, model)
        return lambda: torch.stack(list(loss([batch]).values())).sum()

    def interleaved(
        self, steps: dict[str, Callable[[], Any]], rounds: int = 5
    ) -> dict[str, float]:
        """Median seconds of each function, run in turns: a warm-up, then up to ``rounds`` rounds
        while half of the part's time remains, at least one.
        """
        times: dict[str, list[float]] = {name: [] for name in steps}
        rounds = 1 if self.small else rounds
        start = time.monotonic()
        for turn in range(rounds + 1):
            for name in random.Random(turn).sample(list(steps), len(steps)):
                wait()
                begin = time.perf_counter()
                steps[name]()
                wait()
                if turn:
                    times[name].append(time.perf_counter() - begin)
            if turn and time.monotonic() - start > (self.deadline - start) / 2:
                break
        return {name: statistics.median(values) for name, values in times.items()}


# ---- backbones ----------------------------------------------------------------------------------


def make_backbone(directory: Path, device: str, small: bool) -> tuple[str, str]:
    """Write a backbone with random weights, tiny or as wide as Qwen2-VL-2B: family and path."""
    torch.manual_seed(0)
    if not torchvision:
        return "llava", make_llava(directory, device, small)
    sizes: dict[str, Any] = {}
    if small:
        narrow = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
        sizes["text"] = SMALL_TEXT | {"rope_parameters": narrow, "vocab_size": 4096}
        sizes["vision"] = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4}
        sizes["pixels"] = (56 * 56, 56 * 56)
    with torch.device(device):  # drawing two billion numbers takes a CPU half a minute
        return "qwen2_vl", random_qwen(directory, **sizes)


def make_llava(directory: Path, device: str, small: bool) -> str:
    """Write a LLaVA of these widths with the packaged base's vocabulary; its directory."""
    config = AutoConfig.from_pretrained(resolve("rematch-base"))
    vision, text = config.vision_config, config.text_config
    wide = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    }
    tower = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    }
    wide |= {"num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151_936}
    for name, value in (SMALL_TEXT if small else wide).items():
        setattr(text, name, value)
    for name, value in (SMALL_VISION if small else tower).items():
        setattr(vision, name, value)
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision.image_size = (4 if small else 16) * vision.patch_size
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    (model if small else model.bfloat16()).save_pretrained(directory)
    processor = AutoProcessor.from_pretrained(resolve("rematch-base"))
    processor.image_processor.size = {"height": vision.image_size, "width": vision.image_size}
    processor.save_pretrained(directory)
    return str(directory)


# ---- parts --------------------------------------------------------------------------------------


def steps(bench: Bench) -> dict[str, Any]:
    """Seconds and arithmetic of a training step of every arm."""
    recipes = {name: bench.recipe(loss=sections) for name, sections in ARMS.items()}
    model = bench.model(recipes["unified"])
    losses = {name: bench.step(recipe, model) for name, recipe in recipes.items()}
    columns = [
        {
            key: value.to(bench.device) if isinstance(value, Tensor) else value
            for key, value in column.items()
        }
        for column in st_columns(model, bench.rows)
    ]
    longest = max(column["input_ids"].shape[1] for column in columns)
    peer = CachedMultipleNegativesRankingLoss(
        model, scale=50.0, mini_batch_size=max(1, bench.tokens // longest)
    )
    losses["st_contrastive"] = lambda: peer([dict(column) for column in columns], None)
    seconds = bench.interleaved(
        {name: partial(train_step, loss, model) for name, loss in losses.items()}
    )
    rows = bench.rows[:2]
    flop = {
        name: arithmetic(bench, recipe, model, rows) / len(rows)
        for name, recipe in recipes.items()
    }
    flop["st_contrastive"] = flop["contrastive"]
    reached = attainable(bench.device, model.dtype)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else ""
    peak = next((value * 1e12 for key, value in PEAK_TFLOPS.items() if key in name), None)
    rate = {arm: bench.batch * flop[arm] / duration for arm, duration in seconds.items()}
    return {
        "seconds": seconds,
        "samples_per_second": {arm: bench.batch / duration for arm, duration in seconds.items()},
        "tflops": {arm: value / 1e12 for arm, value in rate.items()},
        "mfu": {arm: value / peak for arm, value in rate.items()} if peak else None,
        "share_of_a_matrix_product": {arm: value / reached for arm, value in rate.items()},
        "matrix_product_tflops": reached / 1e12,
        "ratios": {
            "contrastive_over_st": seconds["st_contrastive"] / seconds["contrastive"],
            "reuse_over_st": seconds["st_contrastive"] / seconds["reuse"],
            "unified_step_over_contrastive_step": seconds["unified"] / seconds["contrastive"],
            "reuse_step_over_contrastive_step": seconds["reuse"] / seconds["contrastive"],
        },
    }


def arithmetic(bench: Bench, recipe: Recipe, model: ReMatch, rows: list[dict[str, Any]]) -> float:
    """FLOP of a forward and backward pass over samples, without a gradient cache."""
    plain = recipe.model_copy(
        update={"loss": recipe.loss.model_copy(update={"gradient_cache": False})}
    )
    batch = build_collator(plain, model)(rows)["batch"]
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(build_loss(plain, model)([batch]).values())).sum().backward()
    model.zero_grad()
    return float(counter.get_total_flops())


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of a step against the estimate, with and without gradient checkpointing."""
    results = {}
    for checkpointing in (False, True):
        recipe = bench.recipe(train={"gradient_checkpointing": checkpointing})
        result = estimate(recipe, load_shape(recipe))
        model = bench.model(recipe)
        loss = bench.step(recipe, model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with peak_bytes(bench, model) as measured:
            loss().backward()
            optimizer.step()
        predicted = result.total - RESERVED
        results["checkpointing" if checkpointing else "plain"] = {
            "predicted_gb": predicted,
            "measured_gb": measured[0] / GB,
            "predicted_over_measured": predicted * GB / measured[0],
        }
        del model, loss, optimizer
        clean()
    return results


@contextmanager
def peak_bytes(bench: Bench, model: ReMatch) -> Iterator[list[float]]:
    """Append the peak bytes of tensors in the block, weights included, to the yielded list."""
    measured: list[float] = []
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield measured
        measured.append(torch.cuda.max_memory_allocated())
        return
    with Storages(model) as storages:
        yield measured
    measured.append(storages.peak + sum(p.nbytes for p in model.parameters()))


class Storages(TorchDispatchMode):
    """Adds up the storages that operators allocate, for devices that do not count them."""

    def __init__(self, model: ReMatch) -> None:
        super().__init__()
        self.alive = {p.untyped_storage()._cdata: 0 for p in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def precision(bench: Bench) -> dict[str, Any]:
    """Losses and gradients under bfloat16 autocast against float32."""
    path = (
        bench.path
        if bench.small
        else make_backbone(bench.directory / "narrow", bench.device, small=True)[1]
    )
    losses, gradients = {}, {}
    for bf16 in (False, True):
        recipe = bench.recipe(path, lora=False, model={"dtype": "float32"}, train={"bf16": bf16})
        model = bench.model(recipe)
        loss = bench.step(recipe, model)()
        loss.backward()
        losses[bf16], gradients[bf16] = loss.item(), flat_gradient(model)
    return compare(losses[True], losses[False], gradients[True], gradients[False])


def flex(bench: Bench) -> dict[str, Any]:
    """FlexAttention against sdpa on the matching loss."""
    # Qwen2-VL does not support FlexAttention
    path = make_llava(bench.directory / "flex", bench.device, small=True)
    losses, gradients, seconds = {}, {}, {}
    for attention in ("sdpa", "flex_attention"):
        sections = {"dtype": "float32", "attention": attention}
        recipe = bench.recipe(path, lora=False, model=sections, train={"bf16": False})
        model = bench.model(recipe)
        batch = build_collator(recipe, model)(bench.rows)["batch"]
        loss = build_loss(recipe, model)
        vectors = torch.randn(
            len(batch.keys), model.backbone.width, generator=torch.Generator().manual_seed(0)
        )
        vectors = vectors.to(bench.device)

        def match(loss: Any = loss, batch: Any = batch, vectors: Tensor = vectors) -> Tensor:
            return loss.match(batch.matching[0], loss.passes(batch), vectors)

        # on a CPU FlexAttention has no backward pass, and compiling it takes a minute
        if bench.device == "cpu":
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                losses[attention] = match().item()
                seconds |= bench.interleaved({attention: match}, 2)
            continue
        value = match()
        value.backward()
        losses[attention], gradients[attention] = value.item(), flat_gradient(model)
        seconds |= bench.interleaved({attention: partial(train_step, match, model)})
    ratio = {"seconds": seconds, "sdpa_over_flex": seconds["sdpa"] / seconds["flex_attention"]}
    both = [gradients.get(name, torch.ones(1)) for name in ("flex_attention", "sdpa")]
    result = compare(losses["flex_attention"], losses["sdpa"], *both) | ratio
    if not gradients:
        result |= {"gradient_cosine": None, "gradient_error": None, "backward": "not on a CPU"}
    return result


def variant(
    bench: Bench, changes: dict[str, Any], compile_with: str | None = None
) -> dict[str, Any]:
    """Compare a step with changed model settings with the plain one, on the same weights and
    samples.
    """
    seconds, values, peaks = {}, {}, {}
    for name, sections in (("plain", {}), ("changed", changes)):
        recipe = bench.recipe(model=sections)
        model = bench.model(recipe)
        if name == "changed" and compile_with:
            layers = list(model.backbone.model.get_decoder().layers)
            for module in [layers[0].mlp] if bench.small else layers:
                module.compile(dynamic=True, backend=compile_with)
        loss = bench.step(recipe, model)
        values[name] = loss().item()
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds |= bench.interleaved({name: partial(train_step, loss, model)}, 2)
        if bench.device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() / GB
        del model, loss
        clean()
    return {
        "seconds": seconds,
        "peak_gb": peaks or None,
        "plain_over_changed": seconds["plain"] / seconds["changed"],
        "loss": values,
    }


def liger(bench: Bench) -> dict[str, Any]:
    """A step with Liger's kernels."""
    return variant(bench, {"liger": True})


def compiled(bench: Bench) -> dict[str, Any]:
    """A step with compiled layers."""
    return variant(bench, {}, "inductor" if bench.device == "cuda" else "eager")


def qlora(bench: Bench) -> dict[str, Any]:
    """A step on a base in 4 bits."""
    return variant(bench, {"four_bit": True})


def encode(bench: Bench) -> dict[str, Any]:
    """Inputs encoded per second."""
    model = bench.model(bench.recipe()).eval()
    inputs = [row["positive"] for row in samples(12 if bench.small else 512)]
    encoder = Encoder(model, batch_tokens=bench.tokens, workers=0)
    texts = [f"a photograph of {i} animals in a garden" for i in range(len(inputs))]
    seconds = bench.interleaved(
        {
            "documents": lambda: encoder.encode(inputs, "document"),
            "texts": lambda: Encoder(model, batch_tokens=bench.tokens, workers=0).encode(
                texts, "document"
            ),
        },
        2,
    )
    return {"per_second": {name: len(inputs) / duration for name, duration in seconds.items()}}


def rerank(bench: Bench) -> dict[str, Any]:
    """Pairs judged per second."""
    model = bench.model(bench.recipe()).eval()
    query = bench.rows[0]["query"]
    documents = [row["positive"] for row in samples(4 if bench.small else 64)]
    single = documents[: max(1, len(documents) // 4)]
    seconds = bench.interleaved(
        {
            "raw-raw": lambda: model.score(query, documents, "raw-raw"),
            "feat-feat": lambda: model.score(query, documents, "feat-feat"),
            "one_by_one": lambda: [
                model.score(query, [document], "raw-raw") for document in single
            ],
        },
        2,
    )
    pairs = {"raw-raw": len(documents), "feat-feat": len(documents), "one_by_one": len(single)}
    rates = {name: pairs[name] / duration for name, duration in seconds.items()}
    return {
        "pairs_per_second": rates,
        "packed_over_one_by_one": rates["raw-raw"] / rates["one_by_one"],
    }


def collectives(bench: Bench) -> dict[str, Any]:
    """Run collectives and DDP with one process, as ``torchrun --nproc_per_node=1`` would."""
    backend = "nccl" if bench.device == "cuda" else "gloo"
    recipe = bench.recipe()
    model = bench.model(recipe)
    loss = bench.step(recipe, model)()
    loss.backward()
    plain, plain_gradient = loss.item(), flat_gradient(model)
    model.zero_grad()
    rendezvous = f"file://{bench.directory / 'rendezvous'}"
    dist.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)
    try:
        numbers = torch.arange(8.0, device=bench.device)
        dist.all_reduce(numbers)
        gathered = [torch.empty_like(numbers)]
        dist.all_gather(gathered, numbers)
        assert torch.equal(gathered[0].cpu(), torch.arange(8.0))
        shared = ddp_loss(bench, recipe, model)
        result = compare(shared, plain, flat_gradient(model), plain_gradient)
    finally:
        clean()  # a reducer that outlives its group hangs
        dist.destroy_process_group()
    return {"backend": backend} | result


def ddp_loss(bench: Bench, recipe: Recipe, model: ReMatch) -> float:
    """The loss of a step under DDP; the gradients stay in the model."""
    batch = build_collator(recipe, model)(bench.rows)["batch"]
    loss: Any = build_loss(recipe, model)
    loss.model = DistributedDataParallel(model)
    total = torch.stack(list(loss([batch]).values())).sum()
    total.backward()
    return float(total.detach())


# ---- helpers ------------------------------------------------------------------------------------


def train_step(loss: Callable[[], Tensor], model: ReMatch) -> None:
    """Run a forward and backward pass."""
    model.zero_grad()
    loss().backward()


def flat_gradient(model: ReMatch) -> Tensor:
    """All gradients as one float32 vector."""
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def compare(
    value: float, reference: float, gradient: Tensor, reference_gradient: Tensor
) -> dict[str, Any]:
    """A loss and its gradient beside the reference's."""
    error = (gradient - reference_gradient).norm() / reference_gradient.norm()
    return {
        "loss": value,
        "reference_loss": reference,
        "gradient_cosine": torch.cosine_similarity(gradient, reference_gradient, dim=0).item(),
        "gradient_error": error.item(),
    }


def clean() -> None:
    """Free what is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS: dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]] = {  # share of the time
    "steps": (3.0, steps),
    "memory": (1.0, memory),
    "precision": (0.5, precision),
    "flex": (0.7, flex),
    "encode": (0.7, encode),
    "rerank": (0.7, rerank),
    "collectives": (0.5, collectives),
    "qlora": (0.7, qlora),
    "compile": (1.2, compiled),
    "liger": (0.7, liger),  # last: it replaces functions of the model's module
}
