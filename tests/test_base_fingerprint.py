"""The fingerprint of a base: it does not depend on how the base is loaded, and guards adapters."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from shared_four_bit import four_bit

from rematch import ReMatch
from rematch.backbone.fingerprint import digest_files
from rematch.errors import ModelError


@pytest.fixture
def sibling(backbone_path, tmp_path):
    """The tiny base with one weight changed, as a merged adapter leaves it."""
    path = tmp_path / "sibling"
    shutil.copytree(backbone_path, path)
    weights = load_file(path / "model.safetensors")
    name = next(name for name in sorted(weights) if "q_proj.weight" in name)
    weights[name] *= 1.05
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def adapter(make_model, tmp_path):
    """An adapter on the tiny base."""
    path = tmp_path / "adapter"
    make_model(dtype=torch.float32, lora=LoraConfig(r=2)).save_pretrained(str(path))
    return path


def fingerprint(path, **model_kwargs):
    model = ReMatch.from_backbone(str(path), 2, model_kwargs=model_kwargs)
    return model.backbone.fingerprint


def test_a_base_has_the_same_fingerprint_however_it_is_loaded(backbone_path, sibling, tmp_path):
    options = [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, four_bit()]
    (expected,) = {fingerprint(backbone_path, **option) for option in options}
    model = ReMatch.from_backbone(
        str(backbone_path), 0, model_kwargs={"dtype": torch.bfloat16}
    ).backbone.model
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert digest_files(str(tmp_path / "sharded")) == expected
    assert digest_files(str(sibling)) not in (expected, None)
    assert digest_files(str(tmp_path)) is None


def test_a_base_from_the_hub_is_digested_in_its_cache(backbone_path, tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--base" / "snapshots" / commit
    shutil.copytree(backbone_path, snapshot)
    cached = digest_files("someone/base", cache_dir=str(tmp_path), revision=commit)
    assert cached == digest_files(str(backbone_path))


def test_a_base_without_safetensors_is_digested_in_memory(backbone_path, sibling, tmp_path):
    for base in (backbone_path, sibling):
        copy = tmp_path / f"{base.name}.bin"
        shutil.copytree(base, copy)
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    binary, other = (tmp_path / f"{base.name}.bin" for base in (backbone_path, sibling))
    expected = fingerprint(binary, dtype=torch.float32)
    assert len(expected) == 12
    assert fingerprint(binary, dtype=torch.bfloat16) == expected
    assert fingerprint(other) != expected


@pytest.mark.parametrize("options", [None, four_bit()], ids=["plain", "4 bits"])
def test_an_adapter_is_refused_on_a_sibling_of_its_base(adapter, sibling, options):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(sibling)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="trained on another base"):
        ReMatch(adapter, model_kwargs=options)
