"""Which parts of a picture the learnable tokens attend to (the paper's Figure 1)."""

from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rematch.model import ReMatch


@torch.inference_mode()
def attention_maps(model: ReMatch, value: Any, task: str = "document") -> NDArray[np.float32]:
    """Compute the attention of the learnable tokens to a picture, mean over layers and heads.

    Args:
        model: A model with K learnable tokens; if it has none, the last token takes their place.
        value: An input with one picture.
        task: ``"query"`` or ``"document"``, whose learnable tokens are used.

    Returns:
        (K, h, w), where h · w is the number of the picture's tokens.
    """
    backbone = model.backbone
    implementation = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation("eager")  # the others return no attention
    try:
        features = model.preprocess([value], task=task)
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
    count = int(is_patch.sum())
    if "image_grid_thw" in features:
        _, height, width = features["image_grid_thw"][0].tolist()
        merged = round((height * width / count) ** 0.5)
        height, width = height // merged, width // merged
    else:
        height = width = round(count**0.5)
    maps: NDArray[np.float32] = (
        mean[-k:, is_patch][:, : height * width].reshape(k, height, width).numpy()
    )
    return maps


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
