"""A backbone's shape, from its config alone, and the bytes that autograd saves in a pass.

The formulas depend on widths and numbers of tokens only; tests/test_shape.py compares them with
real passes. Symbols: D width, I width of the MLP, L layers, V vocabulary, T length of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.image_processing_base import ImageProcessingMixin

from rematch.backbone.checks import check_size
from rematch.backbone.loading import loading, resolve
from rematch.backbone.lora import inject
from rematch.errors import RecipeError
from rematch.train.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """The sizes that a backbone's memory and arithmetic depend on.

    Attributes:
        width: D, the width of hidden states.
        inner: I, the width of the MLP.
        heads: Number of attention heads.
        head_width: Width of an attention head.
        layers: L, the number of decoder layers.
        vocabulary: V, the size of the vocabulary.
        tied: Whether input embedding and LM head share their weights.
        layer_weights: Number of weights of all decoder layers.
        embedding_weights: Number of weights of input embedding and LM head, counted once if tied.
        vision_weights: Number of weights of the vision tower and its connector.
        vision_linear: Number of those that 4-bit loading compresses.
        vision_width: Width of the vision tower.
        vision_inner: Width of its MLP.
        vision_layers: Number of its layers.
        vision_full: Number of its layers that attend to the whole picture; the others attend to
            windows.
        window: Number of patches in a window.
        picture_tokens: Length of a picture of the largest size, in tokens.
        patches: Number of patches per picture token.
        patch_values: Number of values per patch in ``pixel_values``.
        adapter: Number of trained weights that the recipe adds: LoRA, rows of learnable tokens,
            and the projector.
        rank: Rank of the adapter; 0 without one.
        dtype: Bytes per weight, as the recipe loads it.
    """

    width: int
    inner: int
    heads: int
    head_width: int
    layers: int
    vocabulary: int
    tied: bool
    layer_weights: int
    embedding_weights: int
    vision_weights: int
    vision_linear: int
    vision_width: int
    vision_inner: int
    vision_layers: int
    vision_full: int
    window: int
    picture_tokens: int
    patches: int
    patch_values: int
    adapter: int
    rank: int
    dtype: int


def load_shape(recipe: Recipe) -> Shape:
    """Read the shape of a recipe's backbone, without reading or downloading its weights.

    Raises:
        ModelError: If the config cannot be read, or is not that of a multimodal model.
        RecipeError: If it does not tell how many tokens a picture has.
    """
    remedy = (
        "--estimate needs this one file: connect to the hub once, or give a directory that holds "
        "it."
    )
    with loading(f"model.backbone={recipe.model.backbone}: its config.json", remedy):
        return _shape(recipe)


def _shape(recipe: Recipe) -> Shape:
    config, model = _load_config(recipe)
    text, vision = config.get_text_config(), config.vision_config
    decoder = model.get_decoder()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layer_weights = sum(p.numel() for p in decoder.layers.parameters())
    vocabulary_weights = {
        id(p): p.numel() for module in (embedding, head) for p in module.parameters()
    }
    language = {id(p) for p in decoder.parameters()} | set(vocabulary_weights)
    tower = {id(p): p.numel() for p in model.parameters() if id(p) not in language}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    tied = embedding.weight is head.weight
    width = text.hidden_size
    lora = recipe.model.lora
    bf16 = recipe.train.bf16 is not False
    dtype = recipe.model.dtype or ("auto" if lora and bf16 else "float32")
    if dtype == "auto":
        dtype_bytes = (config.dtype or torch.float32).itemsize
    else:
        dtype_bytes = {"bfloat16": 2, "float32": 4}[dtype]
    patch_side = getattr(vision, "patch_size", 14)
    vision_width = getattr(vision, "embed_dim", None) or vision.hidden_size
    vision_layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    mlp_ratio = getattr(vision, "mlp_ratio", None)
    full_layers = getattr(vision, "fullatt_block_indexes", None)
    return Shape(
        width=width,
        inner=text.intermediate_size,
        heads=text.num_attention_heads,
        head_width=getattr(text, "head_dim", None) or width // text.num_attention_heads,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        tied=tied,
        layer_weights=layer_weights,
        embedding_weights=sum(vocabulary_weights.values()),
        vision_weights=sum(tower.values()),
        vision_linear=sum(size for key, size in tower.items() if key in linear),
        vision_width=vision_width,
        vision_inner=round(mlp_ratio * vision_width) if mlp_ratio else vision.intermediate_size,
        vision_layers=vision_layers,
        vision_full=vision_layers if full_layers is None else len(full_layers),
        window=(getattr(vision, "window_size", patch_side) // patch_side) ** 2,
        picture_tokens=_picture_tokens(recipe, config),
        patches=getattr(vision, "spatial_merge_size", 1) ** 2,
        patch_values=3 * getattr(vision, "temporal_patch_size", 1) * patch_side**2,
        adapter=_adapter_weights(recipe, model) + projector_weights(width),
        rank=lora.r if lora else 0,
        dtype=dtype_bytes,
    )


def _load_config(recipe: Recipe) -> tuple[Any, Any]:
    """The backbone's config, and a model of its shape without weights."""
    config = AutoConfig.from_pretrained(resolve(recipe.model.backbone))
    check_size(config)
    with torch.device("meta"):
        return config, AutoModelForMultimodalLM.from_config(config)


def _adapter_weights(recipe: Recipe, model: Any) -> int:
    """Number of weights of LoRA and the rows of learnable tokens; adds them to the model."""
    lora = recipe.model.lora
    if lora is None:
        return 0
    rows = list(range(2 * recipe.model.num_tokens))
    with torch.device("meta"):
        inject(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha), rows, lora.vision)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _picture_tokens(recipe: Recipe, config: Any) -> int:
    """Length in tokens of a picture of the largest size, or of any picture if all have one."""
    vision, name = config.vision_config, recipe.model.backbone
    if hasattr(vision, "spatial_merge_size"):
        pixels: int | None = recipe.model.max_pixels
        if pixels is None:
            try:
                settings, _ = ImageProcessingMixin.get_image_processor_dict(resolve(name))
            except OSError as error:
                raise RecipeError(
                    f"model.max_pixels is not set, and the preprocessor_config.json of {name}, "
                    "which has the default, cannot be read. Set model.max_pixels."
                ) from error
            pixels = int(settings.get("max_pixels") or settings["size"]["longest_edge"])
        tokens: int = pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
        return tokens
    if config.model_type != "llava":
        raise RecipeError(
            f"model.backbone={name}: the number of tokens of a picture depends on its shape in "
            f"{config.model_type} models, so --estimate cannot tell. It supports Qwen-VL and "
            "LLaVA."
        )
    return int(
        getattr(config, "image_seq_length", 0) or (vision.image_size // vision.patch_size) ** 2
    )


def layer_bytes(shape: Shape, length: int, *, bf16: bool, eager: bool = False) -> float:
    """Bytes that autograd saves in one decoder layer, per token of a row.

    Counted are the inputs of both norms, in float32; the input of every linear layer (each casts
    its own copy under autocast, or with a float32 adapter on bfloat16 weights); the adapter's r
    values per layer; queries, keys and values of all heads, the output of attention, its log-sum
    and the row of the mask; and three inner vectors of the MLP.

    Args:
        shape: Shape of the backbone.
        length: T, the length of the row.
        bf16: Whether the pass runs under bfloat16 autocast.
        eager: Whether attention is eager, which saves the attention weights.
    """
    width, inner, queries = shape.width, shape.inner, shape.heads * shape.head_width
    compute = 2 if bf16 else shape.dtype
    if shape.rank:
        copied = bf16 or shape.dtype == 2
        inputs = (5 * width + queries if copied else 2 * width) + inner
        linear = (2 if bf16 else 4) * (inputs + 7 * shape.rank)
        norms = 2 * (4 * width + 4)
    else:
        copied = bf16 and shape.dtype == 4
        linear = compute * ((5 if copied else 2) * width + inner)
        norms = 2 * (4 * width + 4 + shape.dtype * width)
    attention = 4 * queries * compute
    if eager:
        attention += shape.heads * length * (4 if compute == 4 else 4 + compute)
    else:
        attention += 4 * shape.heads + length * compute
    return norms + linear + attention + 3 * inner * compute


def pass_bytes(
    shape: Shape,
    rows: int,
    length: int,
    *,
    bf16: bool,
    checkpointing: bool = False,
    eager: bool = False,
) -> float:
    """Bytes that autograd saves in one forward pass of the language model, without the weights.

    Args:
        shape: Shape of the backbone.
        rows: Number of sequences in the pass.
        length: T, the length of each.
        bf16: Whether the pass runs under bfloat16 autocast.
        checkpointing: Whether only the input of each layer is saved; the activations of one layer
            then count once, for the backward pass.
        eager: Whether attention is eager, which saves the attention weights.
    """
    layer = layer_bytes(shape, length, bf16=bf16, eager=eager)
    norm = 4 * shape.width + 4
    if not shape.rank:
        norm += shape.dtype * shape.width
    layers = shape.layers * layer
    if checkpointing:
        layers = shape.layers * shape.dtype * shape.width + layer
    cast_weights = 0  # bytes of autocast's copies
    if bf16 and shape.rank:
        cast_weights += 2 * (shape.adapter - projector_weights(shape.width))
    if bf16 and shape.dtype == 4:
        cast_weights += 2 * shape.layer_weights
    return rows * length * (layers + norm) + cast_weights


def head_bytes(shape: Shape, slots: int, *, bf16: bool) -> float:
    """Bytes of the logits at answer slots with their gradients, and of copies of the LM head.

    The head is copied if it is tied and an adapter trains rows of it: PEFT writes the rows of
    learnable tokens into a copy.

    Args:
        shape: Shape of the backbone.
        slots: Number of answer slots.
        bf16: Whether the pass runs under bfloat16 autocast.
    """
    compute = 2 if bf16 else shape.dtype
    copies = 2 * shape.vocabulary * shape.width * compute if shape.tied and shape.rank else 0
    return slots * shape.vocabulary * (2 * compute + 3 * 4) + copies


def projector_weights(width: int) -> int:
    """Number of weights of :class:`~rematch.tokens.Projector`."""
    return 2 * width * (width + 1)
