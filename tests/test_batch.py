"""A batch on its way from a data worker to the model: few open files, little memory, the very same
numbers.
"""

import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared_gradients import SMALL, assert_equal, gradients
from torch.utils.data import DataLoader

from rematch.backbone.pictures import Pictures
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [tensor for member in value for tensor in tensors_of(member)]
    return tensors_of(vars(value)) if hasattr(value, "__dataclass_fields__") else []


@pytest.mark.parametrize("reuse", [False, True])
def test_a_batch_survives_pickling(model, triplets, reuse):
    batch = Collator(model, batch_tokens=SMALL, reuse=reuse)(triplets)["batch"]
    batch.pictures.values["more"] = torch.randn(3, dtype=torch.bfloat16)
    copy = pickle.loads(pickle.dumps(batch))
    before, after = tensors_of(batch), tensors_of(copy)
    assert len(before) > 100
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True)
    )
    assert copy.ids == batch.ids
    after[0].add_(1)  # can be written to


def test_a_batch_comes_from_a_worker_through_few_open_files(model, triplets):
    """Hundreds of tensors, as at a batch of 1,024; each would be an open file if torch shared
    their memory.
    """
    collator = Collator(model, batch_tokens=60)
    expected = collator(triplets)["batch"]
    assert len(tensors_of(expected)) > 150
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = iter(
        DataLoader(triplets, len(triplets), collate_fn=collator, num_workers=1, prefetch_factor=1)
    )
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard)
        )
        batch = next(loader)["batch"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(
        torch.equal(a, b) for a, b in zip(tensors_of(batch), tensors_of(expected), strict=True)
    )


def test_pictures_are_kept_as_levels_and_come_back_to_the_bit(model, triplets):
    collator = Collator(model)
    reading = model.backbone.reader.read({"image": triplets_picture(triplets)})
    stored = collator(triplets)["batch"].pictures
    assert stored.values["pixel_values"].dtype == torch.uint8
    plain = Pictures.collect([reading.vision] * 2, [reading.visual_tokens] * 2)
    restored = collator.compact(plain).take([1]).to("cpu", torch.float32)
    assert torch.equal(restored.values["pixel_values"], reading.vision["pixel_values"])


def triplets_picture(triplets):
    return next(t[c]["image"] for t in triplets for c in ("query", "positive") if "image" in t[c])


@pytest.mark.parametrize("shape", [(40, 3 * 2 * 4 * 4), (20, 3, 8, 8), (1, 20, 3, 8, 8)])
def test_levels_of_every_layout(shape):
    """Patches flattened with the channels first, as Qwen has them; pictures; pictures in tiles."""
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    levels = (torch.arange(np.prod(shape)) % 256).reshape(shape)
    channels_second = (shape[0], 3, -1) if len(shape) == 2 else (-1, 3, shape[-2] * shape[-1])
    parts = levels.reshape(channels_second).float() * np.float32(1 / 255)
    values = ((parts - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).reshape(shape)
    pictures = Pictures({"pixel_values": values}, {"pixel_values": [1] * shape[0]}, [1] * shape[0])
    compact = pictures.compact(mean, std, torch.float32)
    assert compact.values["pixel_values"].dtype == torch.uint8
    assert torch.equal(compact.to("cpu", torch.float32).values["pixel_values"], values)
    padded = values.clone()
    padded.view(-1)[: padded.numel() // 10] = 0.0  # what some processors pad with is no level
    other = Pictures({"pixel_values": padded}, pictures.sizes, pictures.tokens).compact(
        mean, std, torch.bfloat16
    )
    assert other.values["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(other.values["pixel_values"], padded.bfloat16())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_features_over_the_budget_are_computed_again(model, triplets, cached, reuse):
    model.backbone.freeze_vision()
    batch = Collator(model, batch_tokens=SMALL, reuse=reuse)(triplets)["batch"]
    counts, results = [], []
    handle = model.backbone.base.vision_tower.register_forward_pre_hook(
        lambda _, args: counts.append(len(args[0]))
    )
    for budget in (4.0, 0.0):
        counts.clear()
        loss = ReMatchLoss(model, gradient_cache=cached, features_gb=budget)
        results.append(gradients(model, loss, [batch]))
        passes = sum(counts) / len(batch.pictures)
        if budget:
            assert passes == 1
        elif cached or not reuse:  # without a cache, reuse reads each picture once anyway
            assert passes > 1
    handle.remove()
    assert_equal(*results, 1e-9)


def test_a_blank_picture_is_no_level_trap(model):
    """All levels equal: the table has one entry a channel."""
    reading = model.backbone.reader.read({"image": Image.new("RGB", (96, 96), (10, 200, 255))})
    pictures = Collator(model).compact(Pictures.collect([reading.vision], [reading.visual_tokens]))
    assert torch.equal(
        pictures.to("cpu", torch.float32).values["pixel_values"], reading.vision["pixel_values"]
    )
