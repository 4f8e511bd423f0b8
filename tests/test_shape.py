"""The formulas for the bytes of a pass, against what autograd saves."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForMultimodalLM, Qwen2VLConfig

from rematch.backbone.lora import inject
from rematch.backbone.module import Backbone
from rematch.matching import Segment, pack
from rematch.train.recipe import load_recipe
from rematch.train.shape import head_bytes, layer_bytes, load_shape, pass_bytes


class BareBackbone(Backbone):
    """A backbone around a model in memory, without a processor."""

    def __init__(self, model):
        torch.nn.Module.__init__(self)
        self.model = model


def text_segment(length, **options):
    return Segment(torch.arange(30, 30 + length), torch.arange(length).expand(3, -1), **options)


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
    """A backbone of the small model's config, perhaps with LoRA and rows of learnable tokens."""
    config = Qwen2VLConfig.from_pretrained(path)
    model = AutoModelForMultimodalLM.from_config(config, dtype=getattr(torch, dtype))
    if lora:
        inject(model, LoraConfig(r=8, lora_alpha=16), [490, 491], vision=False)
    return BareBackbone(model.train())


def saved_bytes(model, forward):
    """Bytes that autograd saves in a forward pass, without weights; each storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = tensor  # keeps the storage alive
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def embedding_pass(backbone, rows, length):
    """A forward pass of random text with some padding, as a function."""
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
    recomputed = 16 * 64 * layer_bytes(shape, 64, bf16=True)  # in the backward pass
    predicted = pass_bytes(shape, 16, 64, bf16=True, checkpointing=True) - recomputed
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("dtype", "bf16"), [("float32", False), ("bfloat16", True)])
def test_bytes_of_a_matching_pass_with_its_logits(small, dtype, bf16):
    shape = load_shape(
        recipe_of(small, "model.lora.r=8", "model.num_tokens=1", f"model.dtype={dtype}")
    )
    backbone = build(small, True, dtype)
    prompt, query = text_segment(20), text_segment(80, attends_to=(0,), start=20)
    documents = [text_segment(80, attends_to=(0,), start=100)] * 2
    slots = [text_segment(2, attends_to=(0, 1, i), start=180, is_slot=True) for i in (2, 3)]
    packed = pack([[prompt, query, *documents, *slots]] * 6, 0)
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
