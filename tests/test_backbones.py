"""Every family of backbones that the documentation names: trained, saved, loaded, encoded, matched; or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm", "idefics3", "internvl")
TORCHVISION = Path(sys.prefix) / "torchvision-for-tests"  # `make install` puts it there, out of the library's way


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/tiny_backbones.py found for each family."""
    assert TORCHVISION.is_dir(), f"{TORCHVISION} is missing; `make install` puts it there"
    output = tmp_path_factory.mktemp("backbones")
    script = Path(__file__).with_name("tiny_backbones.py")
    done = subprocess.run(
        [sys.executable, script, output, *WORKING, "gemma3"],
        env=os.environ | {"PYTHONPATH": str(TORCHVISION), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


@pytest.mark.parametrize("family", WORKING)
def test_family_trains_and_gives_the_same_vectors_by_every_way(found, family):
    mine = found[family]
    assert "error" not in mine, mine
    losses = [mine[name] for name in ("contrastive", "orthogonality", "matching", "grad_norm")]
    assert np.isfinite(losses).all()
    assert min(losses) > 0
    assert mine["loaded"] < 1e-5  # loaded from disk as it was trained
    assert mine["alone"] < 1e-5  # alone as in a padded batch
    assert mine["features"] < 1e-5  # pictures seen beforehand as through the processor


@pytest.mark.parametrize("family", WORKING)
def test_family_answers_packed_questions_as_single_ones(found, family):
    for view, (packed, single) in found[family]["match"].items():
        np.testing.assert_allclose(packed, single, atol=1e-5, err_msg=view)
        assert len(set(packed)) == 3, view  # documents tell in every view


def test_bidirectional_pictures_are_refused_with_the_reason(found):
    message = found["gemma3"]["error"]
    assert "Gemma3ForConditionalGeneration" in message
    assert "see those behind them" in message
    assert "Qwen2-VL" in message
