"""Which parts of a picture the learnable tokens attend to (the paper's Figure 1)."""

import math
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rematch.backbone.reading import Reading
from rematch.errors import RematchError
from rematch.model import ReMatch

MOST_BYTES = 4 << 30  # of the attention between all tokens, in all heads and layers


@torch.inference_mode()
def attention_maps(model: ReMatch, value: Any, task: str = "document") -> NDArray[np.float32]:
    """Compute the attention of the learnable tokens to a picture, mean over layers and heads.

    Args:
        model: A model with K learnable tokens; if it has none, the last token takes their place.
        value: An input with pictures, such as a video's frames; the map is of the first one.
        task: ``"query"`` or ``"document"``, whose learnable tokens are used.

    Returns:
        (K, h, w), where h · w is the number of the picture's tokens.

    Raises:
        RematchError: If there is no picture, its tokens form no grid, or the input is too long.
    """
    backbone = model.backbone
    pictures, _ = backbone.reader.pictures_and_text(value, 0)
    if not pictures:
        raise RematchError("the input has no picture, so there is nothing to map. Give one.")
    height, width = _grid(backbone.reader.read(pictures[0]))
    features = model.preprocess([value], task=task)
    length, text = features["input_ids"].shape[1], backbone.model.config.get_text_config()
    needed = 4 * length**2 * text.num_hidden_layers * text.num_attention_heads
    if needed > MOST_BYTES:
        raise RematchError(
            f"the input has {length:,} tokens, whose attention to one another takes "
            f"{needed / 2**30:.0f} GiB in all layers. Attention maps need at most "
            f"{MOST_BYTES >> 30} GiB: use a smaller picture."
        )
    implementation = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation("eager")  # the others return no attention
    try:
        parameters = signature(backbone.base.forward).parameters
        inputs = {
            name: value.to(model.device)
            for name, value in features.items()
            if name in parameters and isinstance(value, torch.Tensor)
        }
        attentions = backbone.base(**inputs, output_attentions=True).attentions
    finally:
        backbone.model.set_attn_implementation(implementation)
    mean = torch.stack([a[0].mean(0) for a in attentions]).mean(0).float().cpu()  # (T, T)
    k = max(1, model.fusion.num_tokens)
    is_patch = (features["input_ids"][0] == backbone.reader.picture_token_id).cpu()
    first = mean[-k:, is_patch][:, : height * width]
    maps: NDArray[np.float32] = first.reshape(k, height, width).numpy()
    return maps


def _grid(picture: Reading) -> tuple[int, int]:
    """Rows and columns of the tokens of an input that is a single picture."""
    if "image_grid_thw" in picture.vision:
        height, width = picture.vision["image_grid_thw"][0, 1:].tolist()
        tiles = 1
    else:
        *counts, _, height, width = picture.vision["pixel_values"].shape
        tiles = math.prod(counts)
    count = picture.visual_tokens
    side = math.sqrt(height * width / count)  # of the square that a token stands for
    rows, columns = round(height / side), round(width / side)
    if tiles > 1 or rows * columns != count:
        raise RematchError(
            f"the picture's {count} tokens form no grid: the model cuts pictures into tiles or "
            "merges their parts. Attention maps need a model that does neither."
        )
    return rows, columns


def overlay(picture: Image.Image, weights: NDArray[np.float32]) -> Image.Image:
    """Darken a picture where there is little attention.

    Args:
        picture: The picture, RGB.
        weights: Attention weights (h, w); the largest means full brightness.
    """
    brightness = Image.fromarray((255 * np.clip(weights / weights.max(), 0, 1)).astype(np.uint8))
    mask = brightness.resize(picture.size, Image.Resampling.BICUBIC)
    dark = Image.eval(picture.convert("L"), lambda level: level // 4).convert("RGB")
    return Image.composite(picture, dark, mask)
