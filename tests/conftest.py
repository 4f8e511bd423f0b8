"""A tiny, untrained LLaVA-style backbone that every test can afford, in the packaged base's
vocabulary.
"""

import os
import random
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the same arithmetic on every machine; tests of bfloat16 switch it on
os.environ.setdefault("REMATCH_NATIVE_BF16", "0")

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from rematch.backbone.loading import resolve
from rematch.data.picto_tasks import TASKS, training_triplet
from rematch.model import ReMatch

logging.disable_progress_bar()


@pytest.fixture(scope="session")
def backbone_path(tmp_path_factory) -> Path:
    """Two layers, 32 wide, random weights."""
    path = tmp_path_factory.mktemp("backbone")
    config = AutoConfig.from_pretrained(resolve("rematch-base"))
    config.text_config.hidden_size, config.text_config.intermediate_size = 32, 48
    config.text_config.num_hidden_layers, config.text_config.head_dim = 2, 8
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 32, 48
    config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    AutoProcessor.from_pretrained(resolve("rematch-base")).save_pretrained(path)
    return path


def _rms_norm(module, x):
    return torch.nn.functional.rms_norm(
        x, module.weight.shape, module.weight.to(x.dtype), module.variance_epsilon
    )


def build_model(
    path: Path, num_tokens: int = 4, dtype: torch.dtype = torch.float64, **kwargs
) -> ReMatch:
    """A new model on the tiny backbone, the same each time."""
    torch.manual_seed(1)
    model = ReMatch.from_backbone(str(path), num_tokens, model_kwargs={"dtype": dtype}, **kwargs)
    model.fusion.to(dtype)
    for module in model.modules():
        if type(module).__name__ == "Qwen3RMSNorm":  # its own rounds to float32 inside
            module.forward = partial(_rms_norm, module)
    return model.eval()


@pytest.fixture
def make_model(backbone_path):
    """A new model on the tiny backbone, in float64 unless asked otherwise."""
    return partial(build_model, backbone_path)


@pytest.fixture
def model(make_model) -> ReMatch:
    return make_model()


@pytest.fixture(scope="session")
def saved_model(backbone_path, tmp_path_factory) -> Path:
    """A checkpoint on the tiny backbone, in float32."""
    path = tmp_path_factory.mktemp("saved") / "model"
    build_model(backbone_path, dtype=torch.float32).save_pretrained(str(path))
    return path


@pytest.fixture(scope="session")
def triplets() -> list[dict]:
    """One sample of each of Picto's twelve tasks: text-only, picture-only and mixed columns."""
    samples = [training_triplet(0, i, name) for i, name in enumerate(TASKS)]
    random.Random(0).shuffle(samples)
    columns = ("query", "positive", "negative")
    return [{c: getattr(sample, c).as_input() for c in columns} for sample in samples]
