"""The estimate against a real step, published sizes, and the recipes of the project."""

import json
import re
import sys
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rematch import cli
from rematch.data.picto_tasks import training_triplet
from rematch.errors import RecipeError
from rematch.train.build import build_collator, build_loss, build_model
from rematch.train.estimate import GB, estimate
from rematch.train.recipe import load_recipe
from rematch.train.shape import load_shape

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).parent / "data" / "backbones"  # config.json of each, as on the hub
CARDS = {  # GB, GPUs, TFLOP/s that one may achieve
    "24gb": (24, 1, 60),
    "80gb": (80, 1, 300),
    "8x80gb": (80, 8, 300),
}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("qwen*.yaml"))


def shipped(name):
    """A recipe of the project with its backbone's config from tests/data, and its card."""
    return changed(name), CARDS[name.rpartition("-")[2]]


def changed(name, *overrides):
    backbone, _, _ = name.rpartition("-")
    return load_recipe(
        ROOT / f"recipes/{name}.yaml", [f"model.backbone={PUBLISHED / backbone}", *overrides]
    )


@cache
def shape_of(backbone):
    """The shape of a backbone, with the adapter and the picture size of its 80 GB recipe."""
    return load_shape(changed(f"{backbone}-80gb"))


def estimated(name, *overrides, **options):
    recipe = changed(name, *overrides)
    return estimate(recipe, shape_of(name.rpartition("-")[0]), **options)


class Peak(TorchDispatchMode):
    """The peak of the bytes that tensors created inside take."""

    def __init__(self, model):
        super().__init__()
        self.alive = {p.untyped_storage()._cdata: 0 for p in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key):
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize(
    ("checkpointing", "joint"), [(False, False), (True, False), (False, True)]
)
def test_peak_of_a_whole_step(checkpointing, joint):
    """Picto's samples have fewer tokens than the estimate assumes, so passes are not full."""
    settings = [
        "model.lora.r=8",
        "loss.gradient_cache=true",
        "train.mini_batch_tokens=1024",
        "train.batch_size=8",
    ]
    settings += [f"train.gradient_checkpointing={checkpointing}", "train.bf16=false"]
    settings += [f"loss.joint={joint}"]
    recipe = load_recipe(ROOT / "recipes/picto.yaml", settings)
    model = build_model(recipe)
    rows = [training_triplet(0, i) for i in range(8)]
    samples = [
        {name: getattr(row, name).as_input() for name in ("query", "positive", "negative")}
        for row in rows
    ]
    batch = build_collator(recipe, model)(samples)["batch"]
    loss = build_loss(recipe, model.train())
    with Peak(model) as measured:
        torch.stack(list(loss([batch]).values())).sum().backward()
    result = estimate(recipe, load_shape(recipe))
    names = ("features of the frozen tower", "token vectors and their gradients", "gradients")
    predicted = GB * (sum(result.memory[name] for name in names) + max(result.passes.values()))
    assert 0.9 < predicted / measured.peak < 1.5


# ---- published backbones ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "adapter"),
    [
        ("qwen2-vl-2b", 2_208_985_600, 36_929_536),
        ("qwen2.5-vl-3b", 3_754_622_976, 59_867_136),
        ("qwen2.5-vl-7b", 8_292_166_656, 80_740_352),
    ],
)
def test_weights_are_as_many_as_published(name, weights, adapter):
    recipe, _ = shipped(f"{name}-80gb")
    shape = shape_of(name)
    counted = shape.layer_weights + shape.embedding_weights + shape.vision_weights
    assert counted + shape.width == weights  # and the final norm
    rows = 2 * recipe.model.num_tokens * shape.width
    assert shape.adapter == adapter + rows + 2 * shape.width * (shape.width + 1)


def test_gpus_share_the_batch_and_with_fsdp_the_weights():
    name = "qwen2.5-vl-7b-8x80gb"
    features = "train.features_gb=100"  # enough for all pictures on one GPU
    alone, shared, sharded = (
        estimated(name, features, gpus=gpus, fsdp=fsdp)
        for gpus, fsdp in ((1, False), (8, False), (8, True))
    )
    assert alone.step_flop / shared.step_flop == pytest.approx(8, rel=0.01)
    assert alone.host == pytest.approx(8 * shared.host)
    weights = "weights of the backbone"
    assert shared.memory[weights] == alone.memory[weights]
    assert sharded.memory[weights] < alone.memory[weights] / 4
    assert sharded.passes == shared.passes
    with pytest.raises(RecipeError, match="cannot be divided evenly among 3 GPUs"):
        estimated(name, gpus=3)


def test_settings_that_save_memory_or_time():
    base = estimated("qwen2-vl-2b-80gb")
    checkpointed = estimated("qwen2-vl-2b-80gb", "train.gradient_checkpointing=true")
    assert checkpointed.total < base.total / 2
    assert 1.2 < checkpointed.step_flop / base.step_flop < 4 / 3
    plain = estimated("qwen2-vl-2b-80gb", "loss.gradient_cache=false")
    assert plain.total > 20 * base.total
    assert plain.step_flop < base.step_flop
    four_bit = estimated("qwen2-vl-2b-80gb", "model.four_bit=true")
    assert (
        four_bit.memory["weights of the backbone"] < 0.4 * base.memory["weights of the backbone"]
    )
    contrastive, feat, reuse, joint = (
        estimated("qwen2-vl-2b-80gb", override).step_flop / base.step_flop
        for override in (
            "loss.w_qdm=0",
            "loss.matching=feat",
            "loss.matching=reuse",
            "loss.joint=true",
        )
    )
    assert contrastive < feat < reuse < 1 < joint
    raw_raw = [
        estimated("qwen2-vl-2b-80gb", "loss.views=[raw-raw]", override).step_flop
        for override in ("loss.joint=false", "loss.joint=true")
    ]
    assert raw_raw[0] == pytest.approx(raw_raw[1], rel=0.02)  # one copy of each document
    features = "features of the frozen tower"
    again = estimated("qwen2-vl-2b-80gb", "train.features_gb=1")
    assert base.memory[features] > 1
    assert again.memory[features] == 0
    assert again.step_flop > 1.2 * base.step_flop


# ---- the recipes of the project -----------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_card_and_states_its_cost(name):
    recipe, (card, gpus, tflops) = shipped(name)
    shape = load_shape(recipe)
    result, usual = estimate(recipe, shape, gpus), estimate(recipe, shape, gpus, pictures=1)
    assert 1.15 * result.total <= card
    seconds = result.seconds(tflops)
    assert seconds <= 120
    hours = recipe.train.steps * seconds / 3600
    comment = (
        f"# {result.total:.1f} GB, {seconds:.0f} s a step, {hours:.0f} h; "
        f"{usual.seconds(tflops):.0f} s a step with `--pictures 1`"
    )
    text = (ROOT / f"recipes/{name}.yaml").read_text()
    assert comment in text
    options = f"--estimate --gpu-memory {card} --tflops {tflops}" + (
        f" --gpus {gpus}" if gpus > 1 else ""
    )
    assert f"`{options}`" in text
    tokens = int(re.findall(r"# (\d+) tokens a picture", text)[0])
    assert shape.picture_tokens == tokens
    if gpus == 8:  # the paper's run
        assert (recipe.train.batch_size, recipe.train.steps) == (1024, 2500)


def test_every_backbone_comes_with_three_cards():
    assert len(RECIPES) == 9


# ---- the command --------------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["rematch", "train", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_command_prints_the_estimate_and_compares_it_with_the_card(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "recipes/qwen2-vl-2b-24gb.yaml"
    backbone = f"model.backbone={PUBLISHED / 'qwen2-vl-2b'}"
    output = tmp_path / "model"
    options = (recipe, backbone, f"train.output={output}", "--estimate", "--tflops", 60)
    code, out, err = run(monkeypatch, capsys, *options, "--gpu-memory", 24)
    result = estimated("qwen2-vl-2b-24gb")
    assert code == 0, err
    for text in (
        f"{result.total:.2f}",
        "fits into 24 GB",
        "matching pass",
        f"{result.seconds(60):.1f} s",
        "256 tokens",
    ):
        assert text in out
    assert not output.exists()
    code, out, err = run(monkeypatch, capsys, *options, "--gpu-memory", 4)
    assert code == 2
    assert "does not fit into 4 GB" in err


def test_command_refuses_what_it_cannot_estimate(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "recipes/qwen2-vl-2b-24gb.yaml"
    code, _, err = run(
        monkeypatch, capsys, recipe, "model.backbone=some/model-on-the-hub", "--estimate"
    )
    assert code == 2
    assert "its config.json: cannot be loaded" in err
    code, _, err = run(monkeypatch, capsys, recipe, "--gpus", 8)
    assert code == 2
    assert "need --estimate" in err
    backbone = f"model.backbone={PUBLISHED / 'qwen2-vl-2b'}"
    code, _, err = run(
        monkeypatch, capsys, recipe, backbone, "model.max_pixels=null", "--estimate"
    )
    assert code == 2
    assert "Set model.max_pixels" in err
    config = {"model_type": "llava_onevision"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run(monkeypatch, capsys, recipe, f"model.backbone={tmp_path}", "--estimate")
    assert code == 2
    assert "llava_onevision" in err
