"""``rematch train --estimate``: memory and time of a training step, without weights.

What one GPU holds at the peak of a step: weights and what training them takes, features of the
frozen tower, vectors, and the largest of the passes that run one at a time. 1 GB is 2³⁰ bytes.
"""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rematch.errors import RecipeError
from rematch.matching import Matching
from rematch.train.recipe import Recipe
from rematch.train.shape import Shape, head_bytes, load_shape, pass_bytes

GB = 2**30
# Tokens that are assumed, not read from data; the table says so.
TEXT, TEMPLATE, PROMPT, HEAD, SLOT = 64, 30, 45, 4, 12
RESERVED = 1.0  # GB: CUDA context, libraries, workspaces
LARGEST_SCORES = 1 << 24  # as in rematch.train.loss.info_nce


@dataclass(frozen=True)
class Lengths:
    """Tokens that a step is assumed to hold.

    Attributes:
        inputs: Of each distinct input of a sample as it is embedded.
        matching: Of a sample's matching sequence; 0 without matching.
        slots: Answer slots of it.
        context: In ``reuse`` mode, tokens whose keys and values it reads.
    """

    inputs: tuple[int, ...]
    matching: int
    slots: int
    context: int = 0

    @classmethod
    def of(cls, recipe: Recipe, picture_tokens: int, pictures: int) -> "Lengths":
        """Lengths of a sample whose first ``pictures`` of query, positive and negative have a
        picture at the cap.
        """
        contents = [TEXT + picture_tokens * (i < pictures) for i in range(3)]
        inputs = tuple(content + TEMPLATE + recipe.model.num_tokens for content in contents)
        embedded = inputs if recipe.data.hard_negatives else inputs[:2]
        if not recipe.loss.w_qdm:
            return cls(embedded, 0, 0)
        if recipe.loss.matching == Matching.FEAT:
            return cls(embedded, PROMPT + 3 * HEAD + 2 * SLOT, 2)
        slots = 2 * len(recipe.loss.views)
        if recipe.loss.matching == Matching.REUSE:
            return cls(embedded, 3 + slots * SLOT, slots, PROMPT + sum(inputs))
        return cls(embedded, 2 * PROMPT + sum(contents) + 6 * HEAD + slots * SLOT, slots)


@dataclass(frozen=True)
class Estimate:
    """One GPU's share of a step.

    Attributes:
        memory: GB by what they hold, all there at once but for the passes.
        passes: GB of each kind of pass; one of them runs at a time.
        host: GB of pixel values in the memory of a process and its data workers, each with a
            batch.
        step_flop: Floating-point operations of a step.
        assumed: What was assumed.
        arithmetic: How operations were counted.
    """

    memory: dict[str, float]
    passes: dict[str, float]
    host: float
    step_flop: float
    assumed: str
    arithmetic: str

    @property
    def total(self) -> float:
        """GB at the peak."""
        return sum(self.memory.values()) + max(self.passes.values())

    def seconds(self, tflops: float) -> float:
        """Of a step, at so many TFLOP/s."""
        return self.step_flop / (tflops * 1e12)

    def table(self, tflops: float | None = None) -> Table:
        """Everything, for a terminal."""
        notes = f"1 GB is 2³⁰ bytes. Assumed: {self.assumed}. Arithmetic: {self.arithmetic}."
        table = Table("on each GPU", "GB", caption=notes, caption_justify="left")
        table.columns[1].justify = "right"
        for name, size in self.memory.items():
            table.add_row(name, f"{size:.2f}")
        largest = max(self.passes, key=self.passes.__getitem__)
        for name, size in self.passes.items():
            table.add_row(
                f"{name}: activations",
                f"{size:.2f}" if name == largest else f"[dim]({size:.2f})[/dim]",
            )
        table.add_section()
        table.add_row(
            "[bold]peak[/bold] (one kind of pass at a time)", f"[bold]{self.total:.2f}[/bold]"
        )
        table.add_section()
        table.add_row(
            "pixel values in host memory, one batch ahead per worker", f"{self.host:.2f}"
        )
        table.add_row("arithmetic of a step", f"{self.step_flop / 1e15:.2f} PFLOP")
        if tflops:
            table.add_row(f"a step at {tflops:g} TFLOP/s", f"{self.seconds(tflops):.1f} s")
        return table


def report(
    recipe: Recipe,
    gpus: int,
    fsdp: bool,
    gpu_memory: float | None,
    tflops: float | None,
    pictures: int,
) -> None:
    """Print the estimate.

    Raises:
        RecipeError: If the peak is above ``gpu_memory`` GB.
    """
    result = estimate(recipe, load_shape(recipe), gpus, fsdp, pictures)
    console = Console()
    console.print(result.table(tflops))
    if tflops:
        hours = recipe.train.steps * result.seconds(tflops) / 3600
        console.print(
            f"{recipe.train.steps:,} steps: {hours:.1f} h at {tflops:g} TFLOP/s on each of {gpus} "
            "GPUs"
        )
    if gpu_memory is None:
        return
    if result.total > gpu_memory:
        raise RecipeError(
            f"the peak of {result.total:.1f} GB does not fit into {gpu_memory:g} GB. Lower "
            "train.mini_batch_tokens or model.max_pixels, or set train.gradient_checkpointing, "
            "loss.gradient_cache or model.four_bit."
        )
    console.print(
        f"fits into {gpu_memory:g} GB; {100 * (1 - result.total / gpu_memory):.0f} % are left"
    )


def estimate(
    recipe: Recipe, shape: Shape, gpus: int = 1, fsdp: bool = False, pictures: int = 3
) -> Estimate:
    """Memory and arithmetic of one step on each GPU.

    Args:
        recipe: What would be trained.
        shape: Of its backbone, by :func:`~rematch.train.shape.load_shape`.
        gpus: Processes that share the batch.
        fsdp: They share weights, gradients and optimizer states, too.
        pictures: How many of query, positive and negative have a picture, each at the cap.

    Raises:
        RecipeError: If the batch cannot be shared evenly.
    """
    settings, loss = recipe.train, recipe.loss
    if settings.batch_size % gpus:
        raise RecipeError(
            f"train.batch_size={settings.batch_size} cannot be shared evenly by {gpus} processes."
        )
    batch = settings.batch_size // gpus
    lengths = Lengths.of(recipe, shape.picture_tokens, pictures)
    shown = batch * min(pictures, len(lengths.inputs))
    memory = _weights(recipe, shape, gpus if fsdp else 1, gpus > 1)
    features = shown * shape.picture_tokens * shape.width * shape.dtype / GB
    kept = 0.0 if _trains_vision(recipe) or features > recipe.train.features_gb else features
    memory["features of the frozen tower"] = kept
    vectors = batch * len(lengths.inputs) * max(1, recipe.model.num_tokens) * shape.width * 4 / GB
    memory["token vectors and their gradients"] = 3 * vectors
    passes = _passes(recipe, shape, lengths, batch, shown)
    documents = settings.batch_size * (len(lengths.inputs) - 1)
    scores = 4 * min(batch * documents, LARGEST_SCORES) * 4 / GB
    gathered = 2 * documents * shape.width * 4 / GB
    passes["InfoNCE and orthogonality"] = scores + gathered + 3 * vectors
    memory["CUDA context and libraries"] = RESERVED
    pixels = shown * shape.picture_tokens * shape.patches * shape.patch_values / GB
    assumed = (
        f"{pictures} of query, positive and negative with a picture of {shape.picture_tokens:,} "
        f"tokens (the cap); {TEXT} tokens of text each; inputs of {max(lengths.inputs):,} tokens, "
        f"matching sequences of {lengths.matching:,} with {lengths.slots} answers; "
        f"{loss.matching} matching"
    )
    flop = _flop(recipe, shape, lengths, batch, shown, kept > 0)
    backward = "2 (4 for the adapter)" if recipe.model.lora else "4"
    arithmetic = (
        f"2 FLOP a weight and token in each of {_forwards(recipe)} forward passes (gradient cache "
        f"and checkpointing add one each) and {backward} in the backward pass; 4 FLOP a head's "
        "width and pair of tokens for attention"
    )
    return Estimate(memory, passes, (1 + recipe.train.workers) * pixels, flop, assumed, arithmetic)


def _trains_vision(recipe: Recipe) -> bool:
    return recipe.model.lora.vision if recipe.model.lora else recipe.model.train_vision


def _forwards(recipe: Recipe) -> int:
    """How often the language model runs forward in a step."""
    return 1 + recipe.loss.gradient_cache + recipe.train.gradient_checkpointing


def _weights(recipe: Recipe, shape: Shape, shards: int, reduced: bool) -> dict[str, float]:
    """Weights, and what training them takes, in GB."""
    linear = shape.layer_weights + shape.vision_linear
    everything = shape.layer_weights + shape.embedding_weights + shape.vision_weights
    weights: float = everything * shape.dtype
    if recipe.model.four_bit:  # blocks of 64 four-bit numbers with a float32 scale
        weights = (everything - linear) * shape.dtype + linear * (0.5 + 4 / 64)
    trained = shape.adapter
    if not recipe.model.lora:
        trained += everything if recipe.model.train_vision else everything - shape.vision_weights
    size = 4 if recipe.model.lora else shape.dtype
    gathered = 2 * shape.layer_weights / shape.layers * shape.dtype if shards > 1 else 0
    reducer = trained * size if reduced and shards == 1 else 0  # DDP's buckets
    return {
        "weights of the backbone": (weights / shards + gathered) / GB,
        "adapter and projector": shape.adapter * 4 / shards / GB,
        "gradients": (trained * size / shards + reducer) / GB,
        "optimizer (two moments)": 2 * trained * size / shards / GB,
    }


def _passes(
    recipe: Recipe, shape: Shape, lengths: Lengths, batch: int, shown: int
) -> dict[str, float]:
    """GB of activations and of what is computed on the way, for each kind of pass."""
    settings, cached = recipe.train, recipe.loss.gradient_cache
    options: dict[str, Any] = {
        "bf16": settings.bf16 is not False,
        "checkpointing": settings.gradient_checkpointing,
        "eager": recipe.model.attention == "eager",
    }
    bf16 = options["bf16"]

    def saved(length: int, tokens_of_batch: int) -> tuple[float, float]:
        """Bytes that are saved, and those of the MLP's temporary vectors in the largest pass."""
        rows = max(1, settings.mini_batch_tokens // length)
        tokens = max(min(settings.mini_batch_tokens, tokens_of_batch), length)
        whole = tokens if cached else max(tokens_of_batch, tokens)
        kept = pass_bytes(shape, rows, length, **options) * whole / (rows * length)
        return kept, 8 * shape.inner * tokens

    length = max(lengths.inputs)
    kept, working = saved(length, batch * sum(lengths.inputs))
    passes = {"embedding pass": kept + working}
    tower = 0.0
    if _trains_vision(recipe):
        patches = (
            settings.mini_batch_tokens * shape.patches
            if cached
            else batch * sum(lengths.inputs) * shape.patches
        )
        block = 30 * shape.vision_width + 8 * shape.vision_inner
        layers = 2 * shape.vision_width * shape.vision_layers + block
        tower = patches * (
            layers if settings.gradient_checkpointing else block * shape.vision_layers
        )
        passes["embedding pass"] += tower
    else:
        tokens = min(
            max(settings.mini_batch_tokens, shape.picture_tokens), shown * shape.picture_tokens
        )
        patches = tokens * shape.patches
        widths = max(17 * shape.vision_width, 3 * shape.vision_width + 2 * shape.vision_inner)
        passes["vision tower"] = patches * shape.dtype * (widths + shape.patch_values)
    if lengths.matching:
        text_only = Lengths.of(recipe, shape.picture_tokens, 0)
        rows = max(1, settings.mini_batch_tokens // text_only.matching) if cached else batch
        head = head_bytes(shape, min(rows, batch) * lengths.slots, bf16=bf16)
        if lengths.context:  # the questions are part of the embedding pass
            samples = (
                max(1, settings.mini_batch_tokens // sum(lengths.inputs)) if cached else batch
            )
            questions = pass_bytes(shape, samples, lengths.matching, **options)
            read = (
                4
                * samples
                * lengths.context
                * shape.heads
                * shape.head_width
                * shape.layers
                * (2 if bf16 else 4)
            )
            passes["embedding pass"] += questions + read + head
        else:
            kept, working = saved(lengths.matching, batch * lengths.matching)
            passes["matching pass"] = kept + working + head + tower
            if not cached:  # both are kept until the backward pass
                passes["matching pass"] += passes["embedding pass"] - working
    return {name: size / GB for name, size in passes.items()}


def _flop(
    recipe: Recipe,
    shape: Shape,
    lengths: Lengths,
    batch: int,
    shown: int,
    kept: bool,
) -> float:
    """Operations of a step: 2 per weight and token in a forward pass, 2 more in the backward pass
    for the gradient of what the weight reads, and 2 more where the weight trains; one forward more
    under a gradient cache, another one with gradient checkpointing; attention over whole rows, 4
    per head width and pair of tokens.
    """
    forwards = _forwards(recipe)
    lora = recipe.model.lora is not None
    rows = [*lengths.inputs, *([lengths.matching] if lengths.matching else [])]
    language = 2 * shape.layer_weights * (forwards + 1 if lora else forwards + 2)
    adapter = 2 * shape.adapter * (forwards + 2) if lora else 0
    queries = shape.heads * shape.head_width * shape.layers
    attention = sum(
        4 * queries * length * (length + lengths.context * (length == lengths.matching))
        for length in rows
    )
    head = (
        2 * shape.vocabulary * shape.width * lengths.slots * (1 + recipe.loss.gradient_cache + 2)
    )
    sample = sum(rows) * (language + adapter) + attention * (forwards + 2) + head
    picture = shape.picture_tokens * shape.patches
    seen = (
        4
        * shape.vision_width
        * picture
        * (shape.vision_full * picture + (shape.vision_layers - shape.vision_full) * shape.window)
    )
    passes = 2 if lengths.matching and not lengths.context else 1  # that show a picture
    looks = 1 if kept else passes * (1 + recipe.loss.gradient_cache)
    if _trains_vision(recipe):
        looks = passes * (forwards + (1 if lora else 2))
    return batch * sample + shown * looks * (2 * shape.vision_weights * picture + seen)
