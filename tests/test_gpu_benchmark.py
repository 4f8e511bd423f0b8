"""benchmarks/gpu.py runs with tiny sizes on a CPU; it has not been run on a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
NEEDS_A_GPU = {"liger"}


def run(*options):
    command = [sys.executable, SCRIPT, "--small", *map(str, options)]
    process = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    printed = run("--minutes", 3, "--output", output)
    return json.loads(output.read_text()) | {"printed": printed}


def numbers(value):
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    return [value] if isinstance(value, float | int) and not isinstance(value, bool) else []


def test_every_part_is_measured_or_says_why_not(report):
    names = "steps memory precision flex encode rerank collectives qlora compile liger"
    assert list(report["parts"]) == names.split()
    for name, result in report["parts"].items():
        assert result["took"] > 0
        assert f"{name}: {'failed' if 'error' in result else 'done'}" in report["printed"]
        if name in NEEDS_A_GPU:
            assert "CUDA" in result["error"]
        elif name != "qlora" or "error" not in result:  # bitsandbytes may not be installed
            assert "error" not in result, result
            assert all(math.isfinite(number) for number in numbers(result))


def test_report_says_where_it_was_made(report):
    assert report["small"] is True
    assert report["hardware"]
    assert report["date"].startswith("20")
    assert report["versions"]["torch"]
    assert report["family"] in ("qwen2_vl", "llava")


def test_ratios_are_those_of_the_seconds(report):
    steps = report["parts"]["steps"]
    seconds = steps["seconds"]
    assert set(seconds) == {
        "st_contrastive",
        "contrastive",
        "multi_token",
        "unified",
        "feat",
        "reuse",
    }
    assert min(seconds.values()) > 0
    expected = {
        "contrastive_over_st": seconds["st_contrastive"] / seconds["contrastive"],
        "reuse_over_st": seconds["st_contrastive"] / seconds["reuse"],
        "unified_step_over_contrastive_step": seconds["unified"] / seconds["contrastive"],
        "reuse_step_over_contrastive_step": seconds["reuse"] / seconds["contrastive"],
    }
    assert steps["ratios"] == pytest.approx(expected, rel=0.01)
    assert steps["tflops"]["unified"] / steps["matrix_product_tflops"] == pytest.approx(
        steps["share_of_a_matrix_product"]["unified"], rel=0.01
    )
    for kind in report["parts"]["memory"].values():
        if isinstance(kind, dict):
            ratio = kind["predicted_gb"] / kind["measured_gb"]
            assert kind["predicted_over_measured"] == pytest.approx(ratio, rel=0.01)
            assert 0.8 < ratio < 2  # the small batch does not fill its passes


def test_parts_agree_with_their_references(report):
    parts = report["parts"]
    assert parts["precision"]["gradient_cosine"] > 0.99
    assert parts["precision"]["gradient_error"] > 0  # else bfloat16 was not on
    assert parts["flex"]["loss"] == pytest.approx(parts["flex"]["reference_loss"], rel=1e-3)
    # DDP with one process, as torchrun starts it
    assert parts["collectives"]["gradient_error"] < 1e-3
    losses = parts["compile"]["loss"]
    assert losses["changed"] == pytest.approx(losses["plain"], rel=1e-3)


def test_a_part_that_takes_too_long_is_stopped_and_reported(tmp_path):
    output = tmp_path / "gpu.json"
    run("--minutes", 0, "--parts", "steps", "--output", output)
    error = json.loads(output.read_text())["parts"]["steps"]["error"]
    assert "not finished within its 0.1 seconds" in error
