"""bfloat16 where the hardware computes it, and nowhere else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM

from rematch.train.build import build_model
from rematch.train.precision import choose_precision, native_bfloat16
from rematch.train.recipe import load_recipe
from rematch.train.run import train

RECIPES = Path(__file__).parents[1] / "recipes"


def test_a_cpu_without_avx_512_has_no_native_bfloat16():
    """Runs in a process of its own: torch reads the capability when it is loaded."""
    program = "from rematch.train.precision import native_bfloat16; print(native_bfloat16('cpu'))"
    environment = {
        name: value for name, value in os.environ.items() if name != "REMATCH_NATIVE_BF16"
    }
    environment |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize(
    ("capability", "avx512_bf16", "amx", "native"),
    [
        ("AVX2", True, True, False),
        ("AVX512", False, False, False),
        ("AVX512", True, False, True),
        ("AVX512", False, True, True),
    ],
)
def test_native_bfloat16_of_x86(monkeypatch, capability, avx512_bf16, amx, native):
    monkeypatch.delenv("REMATCH_NATIVE_BF16")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert native_bfloat16("cpu") is native


def test_auto_follows_the_hardware(monkeypatch):
    monkeypatch.setenv("REMATCH_NATIVE_BF16", "1")
    assert choose_precision("auto", "auto", "cpu") == (True, "eager")
    assert choose_precision("auto", "auto", "cuda") == (True, None)
    assert choose_precision(False, "auto", "cpu") == (False, None)
    assert choose_precision("auto", "sdpa", "cpu") == (True, "sdpa")
    monkeypatch.setenv("REMATCH_NATIVE_BF16", "0")
    assert choose_precision("auto", "auto", "cpu") == (False, None)
    assert choose_precision(True, "auto", "cpu") == (True, "eager")


@pytest.mark.parametrize(
    "name", ["picto.yaml", *(path.name for path in sorted(RECIPES.glob("ladder-*.yaml")))]
)
def test_recipes_for_cpus_use_auto(name):
    recipe = load_recipe(RECIPES / name)
    assert recipe.train.bf16 == "auto"
    assert recipe.model.attention == "auto"


@pytest.mark.parametrize(
    ("native", "arithmetic"), [("1", ("bfloat16 autocast", "eager")), ("0", ("float32", "sdpa"))]
)
def test_the_log_names_the_arithmetic(
    backbone_path, tmp_path, monkeypatch, capsys, native, arithmetic
):
    monkeypatch.setenv("REMATCH_NATIVE_BF16", native)
    settings = [
        f"model.backbone={backbone_path}",
        "model.num_tokens=2",
        "train.steps=2",
        "train.batch_size=4",
    ]
    settings += ["train.workers=0", f"train.output={tmp_path / 'model'}", "train.report_to=[none]"]
    train(load_recipe(RECIPES / "picto.yaml", settings))
    first, *_ = json.loads((tmp_path / "model/log.json").read_text())
    assert (first["precision"], first["attention"]) == arithmetic
    assert (
        f"training on cpu: {arithmetic[0]}, {arithmetic[1]} attention" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("native", "frozen"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_lora_trains_float32_weights_on_a_bfloat16_checkpoint(
    backbone_path, tmp_path, monkeypatch, capsys, native, frozen
):
    """bfloat16 would round away what the projector learns, and is slow where it is emulated."""
    base = shutil.copytree(backbone_path, tmp_path / "base")
    AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    monkeypatch.setenv("REMATCH_NATIVE_BF16", native)
    settings = [f"model.backbone={base}", "model.num_tokens=2", "model.lora={r: 2}"]
    settings += ["train.steps=2", "train.batch_size=4", "train.workers=0"]
    settings += [f"train.output={tmp_path / 'model'}", "train.report_to=[none]"]
    recipe = load_recipe(RECIPES / "picto.yaml", settings)
    model = build_model(recipe)
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert any("projector" in name for name in trainable)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {frozen}
    scores = train(recipe).match(["a dog"], ["a dog above a pizza"], "feat-raw")  # no autocast
    assert np.isfinite(scores).all()
    precision = "bfloat16 autocast" if native == "1" else "float32"
    assert f"training on cpu: {precision}" in capsys.readouterr().err


def test_the_log_names_the_dtype_of_weights_that_a_recipe_sets(backbone_path, tmp_path, capsys):
    settings = [f"model.backbone={backbone_path}", "model.num_tokens=2", "model.dtype=bfloat16"]
    settings += ["train.steps=1", "train.batch_size=4", "train.workers=0", "train.bf16=false"]
    settings += [f"train.output={tmp_path / 'model'}", "train.report_to=[none]"]
    train(load_recipe(RECIPES / "picto.yaml", settings))
    assert "training on cpu: bfloat16, sdpa attention" in capsys.readouterr().err
