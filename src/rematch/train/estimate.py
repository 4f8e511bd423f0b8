"""Memory and arithmetic of a training step, from a backbone's shape alone.

The peak on one GPU is the weights and what training them takes, the features of the frozen tower,
the token vectors, and the largest of the passes, which run one at a time. 1 GB is 2³⁰ bytes.
"""

from dataclasses import dataclass
from functools import partial

from rematch.errors import RecipeError
from rematch.matching import Matching
from rematch.train.recipe import Recipe
from rematch.train.shape import Shape, head_bytes, pass_bytes

GB = 2**30
# Lengths in tokens that are assumed, not read from the data: the text of an input, the chat
# template around it, the prompt of a question, "Query:" or "Document:", and an answer slot.
TEXT, TEMPLATE, PROMPT, HEAD, SLOT = 64, 30, 45, 4, 12
RESERVED = 1.0  # GB: CUDA context, libraries, workspaces
LARGEST_SCORES = 1 << 24  # as max_scores of rematch.train.loss.ReMatchLoss


@dataclass(frozen=True)
class Lengths:
    """The numbers of tokens that a sample is assumed to have.

    Attributes:
        inputs: Length of each distinct input as it is embedded.
        matching: Length of the matching sequence; 0 without matching.
        slots: Number of its answer slots.
        context: In ``reuse`` mode, number of tokens whose keys and values it reads.
    """

    inputs: tuple[int, ...]
    matching: int
    slots: int
    context: int = 0

    @classmethod
    def of(cls, recipe: Recipe, picture_tokens: int, pictures: int) -> "Lengths":
        """Lengths for a recipe.

        Args:
            recipe: The settings of the run.
            picture_tokens: Length of a picture.
            pictures: How many of query, positive and negative have a picture, in this order.
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
        raw, feat = 1, 1  # copies of each document
        if recipe.loss.joint:
            raw = sum(view.document == "raw" for view in recipe.loss.views)
            feat = len(recipe.loss.views) - raw
        documents = raw * sum(contents[1:]) + 2 * (raw + feat) * HEAD
        query = 2 * PROMPT + contents[0] + 2 * HEAD
        return cls(embedded, query + documents + slots * SLOT, slots)


@dataclass(frozen=True)
class Estimate:
    """One GPU's share of a step.

    Attributes:
        memory: GB of everything that is in memory at the same time, by name, without passes.
        passes: GB of each kind of pass, by name; one runs at a time.
        host: GB of pixel values in host memory: of a process and of its data workers, a batch
            each.
        step_flop: Floating-point operations of a step.
        assumptions: What the estimate assumes of the data, for users.
        arithmetic: How it counts operations, for users.
    """

    memory: dict[str, float]
    passes: dict[str, float]
    host: float
    step_flop: float
    assumptions: str
    arithmetic: str

    @property
    def total(self) -> float:
        """GB at the peak."""
        return sum(self.memory.values()) + max(self.passes.values())

    def seconds(self, tflops: float) -> float:
        """Duration of a step at a rate in TFLOP/s."""
        return self.step_flop / (tflops * 1e12)


def estimate(
    recipe: Recipe, shape: Shape, gpus: int = 1, fsdp: bool = False, pictures: int = 3
) -> Estimate:
    """Memory and arithmetic of one step on each GPU.

    Args:
        recipe: The settings of the run.
        shape: Shape of its backbone (:func:`~rematch.train.shape.load_shape`).
        gpus: Number of GPUs that share the batch.
        fsdp: Whether they also share weights, gradients and optimizer states.
        pictures: How many of query, positive and negative have a picture, each of the largest
            size.

    Raises:
        RecipeError: If the batch cannot be divided evenly among the GPUs.
    """
    settings, loss = recipe.train, recipe.loss
    if settings.batch_size % gpus:
        raise RecipeError(
            f"train.batch_size={settings.batch_size} cannot be divided evenly among {gpus} GPUs. "
            "Choose a multiple of their number."
        )
    batch = settings.batch_size // gpus
    lengths = Lengths.of(recipe, shape.picture_tokens, pictures)
    picture_count = batch * min(pictures, len(lengths.inputs))
    memory = _weights(recipe, shape, gpus if fsdp else 1, gpus > 1)
    features = picture_count * shape.picture_tokens * shape.width * shape.dtype / GB
    keeps_features = not _trains_vision(recipe) and features <= settings.features_gb
    memory["features of the frozen tower"] = features if keeps_features else 0.0
    vectors = batch * len(lengths.inputs) * max(1, recipe.model.num_tokens) * shape.width * 4 / GB
    memory["token vectors and their gradients"] = 3 * vectors
    passes = _passes(recipe, shape, lengths, batch, picture_count)
    documents = settings.batch_size * (len(lengths.inputs) - 1)
    scores = 4 * min(batch * documents, LARGEST_SCORES) * 4 / GB
    gathered = 2 * documents * shape.width * 4 / GB
    passes["InfoNCE and orthogonality"] = scores + gathered + 3 * vectors
    memory["CUDA context and libraries"] = RESERVED
    pixels = picture_count * shape.picture_tokens * shape.patches * shape.patch_values / GB
    assumptions = (
        f"{pictures} of query, positive and negative have a picture, of {shape.picture_tokens:,} "
        f"tokens (the largest size); each has {TEXT} tokens of text; inputs have up to "
        f"{max(lengths.inputs):,} tokens, matching sequences {lengths.matching:,} with "
        f"{lengths.slots} answers; {loss.matching} matching"
        f"{', joint documents' if loss.joint else ''}"
    )
    flop = _flop(recipe, shape, lengths, batch, picture_count, keeps_features)
    backward = "2 (4 for the adapter)" if recipe.model.lora else "4"
    arithmetic = (
        f"2 FLOP per weight and token in each of {_forwards(recipe)} forward passes (gradient "
        f"cache and checkpointing add one each) and {backward} in the backward pass; for "
        "attention, 4 FLOP per dimension of a head and pair of tokens"
    )
    host = (1 + settings.workers) * pixels
    return Estimate(memory, passes, host, flop, assumptions, arithmetic)


def _trains_vision(recipe: Recipe) -> bool:
    return recipe.model.lora.vision if recipe.model.lora else recipe.model.train_vision


def _forwards(recipe: Recipe) -> int:
    """Number of forward passes of the language model per token in a step."""
    return 1 + recipe.loss.gradient_cache + recipe.train.gradient_checkpointing


def _weights(recipe: Recipe, shape: Shape, shards: int, reduced: bool) -> dict[str, float]:
    """GB of the weights and of what training them takes.

    Args:
        recipe: The settings of the run.
        shape: Shape of its backbone.
        shards: Number of GPUs that share the weights.
        reduced: Whether gradients are reduced over several GPUs.
    """
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
    recipe: Recipe, shape: Shape, lengths: Lengths, batch: int, picture_count: int
) -> dict[str, float]:
    """GB of activations and temporary tensors, for each kind of pass.

    Args:
        recipe: The settings of the run.
        shape: Shape of its backbone.
        lengths: Lengths of a sample.
        batch: Number of samples on this GPU.
        picture_count: Number of pictures on this GPU.
    """
    settings, cached = recipe.train, recipe.loss.gradient_cache
    bf16 = settings.bf16 is not False
    activations = partial(
        pass_bytes,
        shape,
        bf16=bf16,
        checkpointing=settings.gradient_checkpointing,
        eager=recipe.model.attention == "eager",
    )

    def saved_and_temporary(length: int, batch_tokens: int) -> tuple[float, float]:
        """Bytes of saved activations, and of the MLP's temporary tensors in the largest pass."""
        rows = max(1, settings.mini_batch_tokens // length)
        tokens = max(min(settings.mini_batch_tokens, batch_tokens), length)
        tokens_saved = tokens if cached else max(batch_tokens, tokens)
        saved = activations(rows, length) * tokens_saved / (rows * length)
        return saved, 8 * shape.inner * tokens

    input_tokens = sum(lengths.inputs)
    saved, temporary = saved_and_temporary(max(lengths.inputs), batch * input_tokens)
    passes = {"embedding pass": saved + temporary}
    tower = 0.0
    if _trains_vision(recipe):
        tokens = settings.mini_batch_tokens if cached else batch * input_tokens
        tower = tokens * shape.patches * _tower_bytes(recipe, shape)
        passes["embedding pass"] += tower
    else:
        tokens = max(settings.mini_batch_tokens, shape.picture_tokens)
        patches = min(tokens, picture_count * shape.picture_tokens) * shape.patches
        widths = max(17 * shape.vision_width, 3 * shape.vision_width + 2 * shape.vision_inner)
        passes["vision tower"] = patches * shape.dtype * (widths + shape.patch_values)
    if lengths.matching:
        text_only = Lengths.of(recipe, shape.picture_tokens, pictures=0)
        rows = max(1, settings.mini_batch_tokens // text_only.matching) if cached else batch
        head = head_bytes(shape, min(rows, batch) * lengths.slots, bf16=bf16)
        if lengths.context:  # the questions are part of the embedding pass
            samples = max(1, settings.mini_batch_tokens // input_tokens) if cached else batch
            key_values = 2 * shape.heads * shape.head_width * shape.layers  # numbers per token
            copies = 2 * (2 if bf16 else 4)  # bytes: two copies
            context = samples * lengths.context * key_values * copies
            passes["embedding pass"] += activations(samples, lengths.matching) + context + head
        else:
            saved, temporary = saved_and_temporary(lengths.matching, batch * lengths.matching)
            passes["matching pass"] = saved + temporary + head + tower
            if not cached:  # activations of both passes are in memory until the backward pass
                passes["matching pass"] += passes["embedding pass"] - temporary
    return {name: size / GB for name, size in passes.items()}


def _tower_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes of activations of a vision tower that trains, per patch."""
    layer = 30 * shape.vision_width + 8 * shape.vision_inner
    if recipe.train.gradient_checkpointing:
        return 2 * shape.vision_width * shape.vision_layers + layer
    return layer * shape.vision_layers


def _flop(
    recipe: Recipe,
    shape: Shape,
    lengths: Lengths,
    batch: int,
    picture_count: int,
    keeps_features: bool,
) -> float:
    """Floating-point operations of a step on one GPU.

    - Weights: 2 per weight and token in a forward pass; in the backward pass 2 for the gradient of
      the layer's input, and 2 more if the weight trains.
    - Attention, over whole rows: 4 per dimension of a head and pair of tokens in a forward pass.
    - The gradient cache adds a forward pass, and so does gradient checkpointing.

    Args:
        recipe: The settings of the run.
        shape: Shape of its backbone.
        lengths: Lengths of a sample.
        batch: Number of samples on this GPU.
        picture_count: Number of pictures on this GPU.
        keeps_features: Whether the vision tower runs once per picture.
    """
    forwards = _forwards(recipe)
    has_lora = recipe.model.lora is not None
    rows = list(lengths.inputs)
    if lengths.matching:
        rows.append(lengths.matching)
    weights = 2 * shape.layer_weights * (forwards + 1 if has_lora else forwards + 2)
    adapter = 2 * shape.adapter * (forwards + 2) if has_lora else 0
    queries = shape.heads * shape.head_width * shape.layers
    attention = sum(
        4 * queries * length * (length + lengths.context * (length == lengths.matching))
        for length in rows
    )
    head = (
        2 * shape.vocabulary * shape.width * lengths.slots * (1 + recipe.loss.gradient_cache + 2)
    )
    sample = sum(rows) * (weights + adapter) + attention * (forwards + 2) + head
    patches = shape.picture_tokens * shape.patches
    windowed_layers = shape.vision_layers - shape.vision_full
    attended = shape.vision_full * patches + windowed_layers * shape.window
    picture = patches * (2 * shape.vision_weights + 4 * shape.vision_width * attended)
    stages = 2 if lengths.matching and not lengths.context else 1  # that read pictures
    if _trains_vision(recipe):
        tower_passes = stages * (forwards + (1 if has_lora else 2))
    elif keeps_features:
        tower_passes = 1
    else:
        tower_passes = stages * (1 + recipe.loss.gradient_cache)
    return batch * sample + picture_count * tower_passes * picture
