"""A backbone's shape, read from its config alone, and the bytes that autograd saves when it runs.

Formulas over widths and tokens; tests/test_shape.py compares them with what real passes save. In
them: D width, I width of the MLP, Q heads · head width, L layers, V vocabulary, T length of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.image_processing_base import ImageProcessingMixin

from rematch.backbone.loading import resolve
from rematch.backbone.lora import inject
from rematch.errors import RecipeError
from rematch.train.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """What a backbone's memory and arithmetic depend on.

    Attributes:
        width: D.
        inner: I.
        heads: Attention heads.
        head_width: Width of one.
        layers: L.
        vocabulary: V.
        tied: Whether input embedding and LM head share their weights.
        layer_weights: Weights of all decoder layers.
        embedding_weights: Of input embedding and LM head, counted once if tied.
        vision_weights: Of the vision tower and what joins it to the language model.
        vision_linear: Those of them that 4-bit loading shrinks.
        vision_width: Width of the tower.
        vision_inner: Width of its MLP.
        vision_layers: Its layers.
        vision_full: Those of them that attend to the whole picture; the others attend to windows.
        window: Patches of a window.
        picture_tokens: Tokens of a picture at the cap.
        patches: Patches per picture token.
        patch_values: Numbers of one patch in ``pixel_values``.
        adapter: Trained weights that the recipe adds: LoRA, learnable tokens' rows, the projector.
        rank: Of the adapter; 0 without one.
        dtype: Bytes of a weight as the recipe loads it.
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
    """Read a backbone's config and count its weights; no weights are read or downloaded.

    Raises:
        RecipeError: If the config cannot be read, or the size of a picture in tokens does not
            follow from it.
    """
    name = recipe.model.backbone
    try:
        config = AutoConfig.from_pretrained(resolve(name))
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.backbone={name}: its config.json cannot be read "
            f"({str(error).strip().splitlines()[0]}). --estimate needs this one file: connect to "
            "the hub once, or give a directory that holds it."
        ) from error
    text, vision = config.get_text_config(), config.vision_config
    decoder, embedding, head = (
        model.get_decoder(),
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    )
    layer_weights = sum(p.numel() for p in decoder.layers.parameters())
    vocabulary_weights = {
        id(p): p.numel() for module in (embedding, head) for p in module.parameters()
    }
    language = {id(p) for p in decoder.parameters()} | set(vocabulary_weights)
    tower = {id(p): p.numel() for p in model.parameters() if id(p) not in language}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    adapter = rank = 0
    if lora := recipe.model.lora:
        rows = list(range(2 * recipe.model.num_tokens))
        with torch.device("meta"):
            inject(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha), rows, lora.vision)
        adapter, rank = sum(p.numel() for p in model.parameters() if p.requires_grad), lora.r
    width = text.hidden_size
    adapter += projector_weights(width)
    side = getattr(vision, "patch_size", 14)
    merged = getattr(vision, "spatial_merge_size", 1) ** 2
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    vision_width = getattr(vision, "embed_dim", None) or vision.hidden_size
    ratio = getattr(vision, "mlp_ratio", None)
    whole = getattr(vision, "fullatt_block_indexes", None)
    loaded = recipe.model.dtype or ("auto" if lora else "float32")
    dtype = (
        (config.dtype or torch.float32).itemsize
        if loaded == "auto"
        else {"bfloat16": 2, "float32": 4}[loaded]
    )
    return Shape(
        width=width,
        inner=text.intermediate_size,
        heads=text.num_attention_heads,
        head_width=getattr(text, "head_dim", None) or width // text.num_attention_heads,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        tied=embedding.weight is head.weight,
        layer_weights=layer_weights,
        embedding_weights=sum(vocabulary_weights.values()),
        vision_weights=sum(tower.values()),
        vision_linear=sum(size for key, size in tower.items() if key in linear),
        vision_width=vision_width,
        vision_inner=round(ratio * vision_width) if ratio else vision.intermediate_size,
        vision_layers=depth,
        vision_full=depth if whole is None else len(whole),
        window=(getattr(vision, "window_size", side) // side) ** 2,
        picture_tokens=_picture_tokens(recipe, config),
        patches=merged if hasattr(vision, "spatial_merge_size") else 1,
        patch_values=3 * getattr(vision, "temporal_patch_size", 1) * side**2,
        adapter=adapter,
        rank=rank,
        dtype=dtype,
    )


def _picture_tokens(recipe: Recipe, config: Any) -> int:
    """Tokens of a picture at the cap; of any picture, where the backbone has a fixed size."""
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
            f"model.backbone={name}: how many tokens a picture of {config.model_type} becomes "
            "depends on its shape, which --estimate does not know. It estimates Qwen-VL and LLaVA."
        )
    return int(
        getattr(config, "image_seq_length", 0) or (vision.image_size // vision.patch_size) ** 2
    )


def layer_bytes(shape: Shape, length: int, *, bf16: bool, eager: bool = False) -> float:
    """Bytes that autograd saves in one decoder layer for one token of a row of ``length``.

    What both norms read, in float32; the input of every linear layer (each casts its own under
    autocast, or with a float32 adapter on bfloat16 weights); the adapter's r numbers; queries,
    keys and values of all heads, the result, its log-sum and the mask's row; three inner vectors
    of the MLP.
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
    """Bytes that autograd saves in one forward pass of the language model, weights excluded.

    Args:
        shape: Of the backbone.
        rows: Sequences in the pass.
        length: T, of each.
        bf16: Whether it runs under bfloat16 autocast.
        checkpointing: Each layer's input alone, and the activations of the layer that is computed
            again.
        eager: Attention that keeps its weights.
    """
    layer = layer_bytes(shape, length, bf16=bf16, eager=eager)
    norm = 4 * shape.width + 4 + (0 if shape.rank else shape.dtype * shape.width)
    layers = (
        shape.layers * shape.dtype * shape.width + layer if checkpointing else shape.layers * layer
    )
    cast = 0  # weights that autocast has converted
    if bf16:
        cast += 2 * (shape.adapter - projector_weights(shape.width)) if shape.rank else 0
        cast += 2 * shape.layer_weights if shape.dtype == 4 else 0
    return rows * length * (layers + norm) + cast


def head_bytes(shape: Shape, slots: int, *, bf16: bool) -> float:
    """Bytes that logits at ``slots`` answer positions take, gradients included, and the head's
    weights where the rows of learnable tokens are put into a copy of them.
    """
    compute = 2 if bf16 else shape.dtype
    copies = 2 * shape.vocabulary * shape.width * compute if shape.tied and shape.rank else 0
    return slots * shape.vocabulary * (2 * compute + 3 * 4) + copies


def projector_weights(width: int) -> int:
    """Weights of :class:`~rematch.tokens.Projector`."""
    return 2 * width * (width + 1)
