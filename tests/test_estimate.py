"""The estimate against real passes, published sizes, and the recipes that ship."""

import json
import re
import sys
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from test_mrope import Bare, text_segment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForMultimodalLM, Qwen2VLConfig

from rematch import cli
from rematch.backbone.lora import inject
from rematch.data.picto_tasks import training_triplet
from rematch.errors import RecipeError
from rematch.matching import pack
from rematch.train.estimate import GB, estimate
from rematch.train.recipe import load_recipe
from rematch.train.run import build_collator, build_loss, build_model
from rematch.train.shape import head_bytes, layer_bytes, load_shape, pass_bytes

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).parent / "data" / "backbones"  # config.json of each, as on the hub
CARDS = {
    "24gb": (24, 1, 60),
    "80gb": (80, 1, 300),
    "8x80gb": (80, 8, 300),
}  # GB, GPUs, TFLOP/s that one may reach
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("qwen*.yaml"))


def shipped(name):
    """A recipe, its backbone's config read from tests/data, and its card."""
    return changed(name), CARDS[name.rpartition("-")[2]]


def changed(name, *overrides):
    backbone, _, _ = name.rpartition("-")
    return load_recipe(
        ROOT / f"recipes/{name}.yaml", [f"model.backbone={PUBLISHED / backbone}", *overrides]
    )


@cache
def shape_of(backbone):
    """The shape of a shipped recipe's backbone, with its adapter and its 80 GB recipe's cap on
    pictures.
    """
    return load_shape(changed(f"{backbone}-80gb"))


def estimated(name, *overrides, **options):
    recipe = changed(name, *overrides)
    return estimate(recipe, shape_of(name.rpartition("-")[0]), **options)


# ---- the formula against autograd ---------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Qwen2-VL of four layers, its config in a directory."""
    path = tmp_path_factory.mktemp("small")
    text = {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 6, 6],
            "rope_theta": 10000.0,
        },
    }
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 128,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
    }
    tokens = {"image_token_id": 5, "vision_start_token_id": 3, "vision_end_token_id": 4}
    Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens
    ).save_pretrained(path)
    return path


def recipe_of(path, *overrides):
    (path / "recipe.yaml").write_text("{}")
    return load_recipe(
        path / "recipe.yaml", [f"model.backbone={path}", "model.max_pixels=3136", *overrides]
    )


def build(path, lora, dtype):
    config = Qwen2VLConfig.from_pretrained(path)
    model = AutoModelForMultimodalLM.from_config(config, dtype=getattr(torch, dtype))
    if lora:
        inject(model, LoraConfig(r=8, lora_alpha=16), [490, 491], vision=False)
    return Bare(model.train())


def saved_bytes(model, forward):
    """What autograd keeps of a forward pass besides the weights, each storage counted once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in kept.values())


def embedding_pass(backbone, rows, length):
    ids = torch.randint(20, 480, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -length // 4 :] = 0
    positions = torch.arange(length).expand(3, rows, length)
    return lambda: backbone.base(input_ids=ids, attention_mask=mask, position_ids=positions)


PRECISIONS = [
    ("float32", True, False),
    ("bfloat16", True, True),
    ("bfloat16", True, False),
    ("float32", True, True),
    ("float32", False, False),
    ("float32", False, True),
]


@pytest.mark.parametrize(("dtype", "lora", "bf16"), PRECISIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bytes_of_a_pass_are_those_that_autograd_saves(small, dtype, lora, bf16, attention):
    overrides = [
        f"model.dtype={dtype}",
        *(["model.lora.r=8", "model.num_tokens=1"] if lora else []),
    ]
    shape = load_shape(recipe_of(small, *overrides))
    backbone = build(small, lora, dtype)
    if not lora:
        backbone.freeze_vision()
    backbone.model.set_attn_implementation(attention)
    eager = attention == "eager"
    for rows, length in ((16, 64), (4, 256)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            measured = saved_bytes(backbone.model, embedding_pass(backbone, rows, length))
        assert pass_bytes(shape, rows, length, bf16=bf16, eager=eager) == pytest.approx(
            measured, rel=0.05
        )


def test_bytes_of_a_checkpointed_pass(small):
    shape = load_shape(
        recipe_of(small, "model.lora.r=8", "model.num_tokens=1", "model.dtype=bfloat16")
    )
    backbone = build(small, True, "bfloat16")
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        measured = saved_bytes(backbone.model, embedding_pass(backbone, 16, 64))
    again = 16 * 64 * layer_bytes(shape, 64, bf16=True)  # computed in the backward pass
    assert pass_bytes(shape, 16, 64, bf16=True, checkpointing=True) - again == pytest.approx(
        measured, rel=0.15
    )


@pytest.mark.parametrize(("dtype", "bf16"), [("float32", False), ("bfloat16", True)])
def test_bytes_of_a_matching_pass_with_the_answers(small, dtype, bf16):
    shape = load_shape(
        recipe_of(small, "model.lora.r=8", "model.num_tokens=1", f"model.dtype={dtype}")
    )
    backbone = build(small, True, dtype)
    prompt, slot = text_segment(backbone, *range(30, 50)), text_segment(backbone, 12, 13)
    query, document = (text_segment(backbone, *range(start, start + 80)) for start in (100, 200))
    documents = [replace(document, sees=(0,), start=100)] * 2
    slots = [replace(slot, sees=(0, 1, i), start=180, is_slot=True) for i in (2, 3)]
    packed = pack([[prompt, replace(query, sees=(0,), start=20), *documents, *slots]] * 6, 0)
    length, answers = packed.input_ids.shape[1], packed.slots.numel()

    def answer():
        logits = backbone.answer_logits(vars(packed)).float()
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.zeros(answers, dtype=torch.long)
        )

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        measured = saved_bytes(backbone.model, answer)
    predicted = pass_bytes(shape, 6, length, bf16=bf16) + head_bytes(shape, answers, bf16=bf16)
    assert predicted == pytest.approx(measured, rel=0.15)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_whole_step(checkpointing):
    """Picto's samples hold fewer tokens than the estimate assumes, so that its passes are not
    quite full.
    """
    settings = [
        "model.lora.r=8",
        "loss.gradient_cache=true",
        "train.mini_batch_tokens=1024",
        "train.batch_size=8",
    ]
    settings += [f"train.gradient_checkpointing={checkpointing}", "train.bf16=false"]
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
    held = ("features of the frozen tower", "token vectors and their gradients", "gradients")
    predicted = GB * (sum(result.memory[name] for name in held) + max(result.passes.values()))
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
    name, features = (
        "qwen2.5-vl-7b-8x80gb",
        "train.features_gb=100",
    )  # enough for all pictures on one GPU, too
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
    with pytest.raises(RecipeError, match="cannot be shared evenly by 3"):
        estimated(name, gpus=3)


def test_what_saves_memory_and_time_shows():
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
    contrastive, feat, reuse = (
        estimated("qwen2-vl-2b-80gb", override).step_flop / base.step_flop
        for override in ("loss.w_qdm=0", "loss.matching=feat", "loss.matching=reuse")
    )
    assert contrastive < feat < reuse < 1
    features = "features of the frozen tower"
    again = estimated("qwen2-vl-2b-80gb", "train.features_gb=1")
    assert base.memory[features] > 1
    assert again.memory[features] == 0
    assert again.step_flop > 1.2 * base.step_flop


# ---- the recipes that ship ----------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_card_and_says_what_it_takes(name):
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


def test_command_prints_the_estimate_and_judges_the_card(monkeypatch, capsys, tmp_path):
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


def test_command_refuses_what_it_cannot_know(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "recipes/qwen2-vl-2b-24gb.yaml"
    code, _, err = run(
        monkeypatch, capsys, recipe, "model.backbone=some/model-on-the-hub", "--estimate"
    )
    assert code == 2
    assert "config.json cannot be read" in err
    code, _, err = run(monkeypatch, capsys, recipe, "--gpus", 8)
    assert code == 2
    assert "go with --estimate" in err
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
