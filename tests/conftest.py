"""A tiny, untrained LLaVA-style backbone that every test can afford, in the packaged base's
vocabulary.
"""

import hashlib
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the same arithmetic on every machine; tests of bfloat16 switch it on
os.environ.setdefault("REMATCH_NATIVE_BF16", "0")

import pytest
import torch
from shared_tally import Tally
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from rematch.backbone.loading import resolve
from rematch.data.picto_tasks import TASKS, training_triplet
from rematch.model import ReMatch

logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--tally", metavar="DIR", help="where counts of hostile inputs are written")


@pytest.fixture(scope="module")
def tally(request):
    """Counts what a module tried: ``tally("Filters")["refused"] += 1``."""
    counts = Tally()
    yield counts
    if folder := request.config.getoption("--tally"):
        counts.save(Path(folder))


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


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Put a directory into a cache of the hub, which then is all that can be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, directory: Path, revision: str = "main") -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(revision.encode()).hexdigest()
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(directory, repository / "snapshots" / commit)

    return put


@pytest.fixture(scope="session")
def triplets() -> list[dict]:
    """One sample of each of Picto's twelve tasks: text-only, picture-only and mixed columns."""
    samples = [training_triplet(0, i, name) for i, name in enumerate(TASKS)]
    random.Random(0).shuffle(samples)
    columns = ("query", "positive", "negative")
    return [{c: getattr(sample, c).as_input() for c in columns} for sample in samples]


# ---- search, imported only where it is needed ---------------------------------------------------


@pytest.fixture(scope="session")
def searcher(saved_model) -> ReMatch:
    """The saved checkpoint; tests must not change it."""
    return ReMatch(str(saved_model))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures of awkward names, some with captions and metadata, one a copy of another."""
    from shared_search import NAMES, save_picture

    folder = tmp_path / "photos"
    for i, name in enumerate(NAMES):
        save_picture(folder / "deep" / f"{name}.png", i)
    shutil.copy(folder / "deep" / "plain.png", folder / "copy.png")
    (folder / "deep" / "plain.txt").write_text("a caption\n")
    (folder / "deep" / "it's.json").write_text(
        json.dumps({"caption": "a dark room", "year": 1999, "place": "Rome", "l": [1]})
    )
    (folder / "deep" / "with space.json").write_text(json.dumps({"year": 2010, "good": True}))
    (folder / "._hidden.png").write_bytes(b"what macOS leaves")
    (folder / "circle").symlink_to(folder)
    return folder


@pytest.fixture(scope="session")
def library(searcher, tmp_path_factory):
    """An index of 40 documents: pictures, texts and both, with years."""
    from shared_search import build_index, save_picture

    folder = tmp_path_factory.mktemp("library")
    rows = []
    for i in range(40):
        row = {"id": f"d{i}", "year": 1980 + i}
        row |= {"image": str(save_picture(folder / f"{i}.png", i))} if i % 3 else {}
        row |= {"text": f"number {i}"} if i % 3 != 1 else {}
        rows.append(row)
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index, _ = build_index(searcher, folder / "c.jsonl", folder / "i", tokens=True)
    return index
