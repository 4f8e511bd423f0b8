"""QLoRA on bitsandbytes' CPU kernels: trained, loaded, merged, resumed exactly."""

import json

import numpy as np
import pytest
import torch
from shared_four_bit import four_bit, four_bit_recipe, inputs
from shared_gradients import gradients
from transformers import TrainerCallback

from rematch import ReMatch
from rematch.errors import RecipeError, TrainingError
from rematch.train.build import build_model
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.run import train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in the same order in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupt(TrainerCallback):
    """Ends a run after a step, before that is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise TrainingError("interrupted")


def step_logs(output):
    return [row for row in json.loads((output / "log.json").read_text()) if "loss" in row]


def linears(model, kind):
    return [module for module in model.modules() if type(module).__name__ == kind]


@pytest.fixture(scope="module")
def uninterrupted(backbone_path, tmp_path_factory):
    """A run of three steps without interruption: the trained model, and its directory."""
    output = tmp_path_factory.mktemp("four_bit") / "model"
    return train(four_bit_recipe(backbone_path, output), quiet=True), output


def test_it_trains_all_losses_in_4_bits(uninterrupted, backbone_path):
    model, output = uninterrupted
    assert len(linears(model, "Linear4bit")) > 20
    log = step_logs(output)
    assert len(log) == 3
    assert all(row["matching"] > 0 for row in log)
    assert not (output / "model.safetensors").exists()
    start = build_model(four_bit_recipe(backbone_path, output))
    before, after = dict(start.named_parameters()), dict(model.named_parameters())
    for name, parameter in after.items():
        trains = parameter.requires_grad and "lora_A" not in name  # A moves once B has left zero
        assert not (trains and torch.equal(parameter, before[name])), name
        assert parameter.dtype == torch.float32 or not parameter.requires_grad, name


def test_loaded_the_same_way_it_gives_the_same_vectors(uninterrupted):
    model, output = uninterrupted
    expected, scores = model.encode_query(inputs()), model.match(inputs(), inputs()[::-1])
    loaded = ReMatch(output, model_kwargs=four_bit())
    assert np.array_equal(loaded.encode_query(inputs()), expected)
    assert np.array_equal(loaded.match(inputs(), inputs()[::-1]), scores)


def test_loaded_without_quantization_it_gives_similar_vectors(uninterrupted):
    model, output = uninterrupted
    loaded = ReMatch(output)
    assert not linears(loaded, "Linear4bit")
    cosines = (loaded.encode_query(inputs()) * model.encode_query(inputs())).sum(1)
    assert cosines.min() > 0.9


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_merged_it_is_an_ordinary_checkpoint(uninterrupted, tmp_path, compute):
    _, output = uninterrupted
    model = ReMatch(output, model_kwargs=four_bit(compute))
    expected = model.encode_query(inputs())
    merged = model.merge_lora()
    tolerance = 1e-5 if compute is torch.float32 else 0.02
    assert np.abs(merged.encode_query(inputs()) - expected).max() <= tolerance
    merged.save_pretrained(str(tmp_path / "merged"))
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    loaded = ReMatch(tmp_path / "merged")
    assert not linears(loaded, "Linear4bit")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert np.abs(loaded.encode_query(inputs()) - merged.encode_query(inputs())).max() <= 1e-6


def test_it_resumes_exactly(backbone_path, tmp_path, uninterrupted):
    output = tmp_path / "model"
    with pytest.raises(TrainingError, match="interrupted"):
        train(four_bit_recipe(backbone_path, output), callbacks=(Interrupt(2),), quiet=True)
    assert (tmp_path / "model.partial" / "checkpoint-1" / "complete.json").exists()
    resumed = train(four_bit_recipe(backbone_path, output), quiet=True)
    model, expected = uninterrupted
    losses, expected_losses = ([row["loss"] for row in step_logs(o)] for o in (output, expected))
    assert losses == expected_losses
    weights, expected_weights = (ReMatch(path).state_dict() for path in (output, expected))
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert not list(output.glob("checkpoint-*"))
    assert np.array_equal(resumed.encode_query(inputs()), model.encode_query(inputs()))


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_reach_the_learnable_rows_under_gradient_checkpointing(
    backbone_path, triplets, tmp_path, cached
):
    """The first layer starts from trainable and frozen rows, and its dropout is repeated."""
    results = []
    for checkpointing in (False, True):
        settings = four_bit_recipe(backbone_path, tmp_path, gradient_checkpointing=checkpointing)
        model = build_model(settings).train()
        batch = Collator(model, batch_tokens=300)(triplets[:6])["batch"]
        results.append(gradients(model, ReMatchLoss(model, gradient_cache=cached), [batch]))
    (losses, plain), (again, checkpointed) = results
    assert losses == again
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    rows = next(gradient for name, gradient in checkpointed.items() if "trainable_tokens" in name)
    assert rows.abs().sum(1).min() > 0


def test_an_evaluation_does_not_change_4_bit_weights(backbone_path):
    """On CPUs with AVX-512 BF16, bitsandbytes would repack them with rounded scales."""
    model = ReMatch.from_backbone(str(backbone_path), 2, model_kwargs=four_bit()).eval()
    before = [
        (m.weight.data.clone(), m.weight.quant_state.absmax.clone())
        for m in linears(model, "Linear4bit")
    ]
    model.encode_query(inputs())
    for module, (data, scales) in zip(linears(model, "Linear4bit"), before, strict=True):
        assert torch.equal(module.weight.data, data)
        assert torch.equal(module.weight.quant_state.absmax, scales)


def test_without_bitsandbytes_it_says_what_to_install(backbone_path, tmp_path, monkeypatch):
    monkeypatch.setattr("rematch.train.build.is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match="pip install bitsandbytes"):
        build_model(four_bit_recipe(backbone_path, tmp_path))


def test_fsdp_is_refused(backbone_path, tmp_path, monkeypatch):
    """It would train to the end and then fail to assemble the model."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"four_bit does not work with FSDP.*torchrun"):
        train(four_bit_recipe(backbone_path, tmp_path / "model"), quiet=True)
