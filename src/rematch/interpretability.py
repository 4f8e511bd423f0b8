"""Where the learnable tokens look in a picture (the paper's Figure 1)."""

from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rematch.model import ReMatch


@torch.inference_mode()
def attention_maps(model: ReMatch, value: Any, task: str = "document") -> NDArray[np.float32]:
    """Attention of the learnable tokens' positions to a picture's, mean over layers and heads.

    Args:
        model: With K learnable tokens; the last token alone if K = 0.
        value: An input with one picture.
        task: ``"query"`` or ``"document"``, which have tokens of their own.

    Returns:
        (K, h, w), where the picture is h · w tokens.
    """
    backbone = model.backbone
    implementation = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation("eager")  # the others do not give their attention out
    try:
        features = model.preprocess([value], task=task)
        inputs = {
            k: v.to(model.device) for k, v in features.items() if isinstance(v, torch.Tensor)
        }
        known = signature(backbone.base.forward).parameters
        accepted = {k: v for k, v in inputs.items() if k in known}
        attentions = backbone.base(**accepted, output_attentions=True).attentions
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
    """The picture, darkened where there is little attention.

    Args:
        picture: RGB.
        weights: (h, w); the largest one is full brightness.
    """
    light = np.clip(weights / weights.max(), 0, 1)
    mask = Image.fromarray((255 * light).astype(np.uint8)).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    return Image.composite(
        picture, Image.eval(picture.convert("L"), lambda v: v // 4).convert("RGB"), mask
    )
