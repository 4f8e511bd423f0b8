"""Learning rates in proportion to the scale of weights, and how far weights have moved."""

import json
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import build_model
from peft import LoraConfig
from shared_four_bit import four_bit
from shared_training import (
    Interrupt,
    assert_same_run,
    free_port,
    small_recipe,
    step_logs,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import TrainerCallback

from rematch import ReMatch
from rematch.errors import TrainingError
from rematch.train import trainer as training
from rematch.train.build import build_model as build_from_recipe
from rematch.train.run import train
from rematch.train.scale import (
    Movement,
    Rows,
    ScaledSteps,
    measure,
    rate_factors,
    scaled_parts,
)

FACTOR = 84.0
FULL = {"model": {"lora": None}}


def rms(tensor):
    return tensor.double().pow(2).mean().sqrt().item()


@pytest.fixture
def large_words(backbone_path, tmp_path):
    """The tiny backbone with word embeddings a hundred times as large, and an LM head apart."""
    model = ReMatch.from_backbone(str(backbone_path), 0).backbone
    with torch.no_grad():
        head = model.model.get_output_embeddings().weight.clone()
        model.model.get_input_embeddings().weight *= 100
        model.model.get_output_embeddings().weight = torch.nn.Parameter(head)
    for config in (model.model.config, model.model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.model.save_pretrained(tmp_path / "large")
    model.processor.save_pretrained(tmp_path / "large")
    return tmp_path / "large"


# ---- one step, against a parameter group --------------------------------------------------------


def cosine_steps(parameters, loss, factors=()):
    """Eight steps of AdamW with weight decay, clipping and a cosine schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    ScaledSteps(optimizer, factors)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(8):
        loss().backward()
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(grouped, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def loss_of(table, matrix, bias):
    """Of a tied embedding: it is read as input and as output."""
    states = torch.tanh(table[[1, 3, 4, 3]] @ matrix + bias)
    return torch.nn.functional.cross_entropy(states @ table.T, torch.tensor([3, 4, 1, 0]))


def test_scaled_steps_equal_a_parameter_group_with_the_multiplied_learning_rate():
    generator = torch.Generator().manual_seed(0)
    start = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 5), (5, 5), (5,))
    ]
    ids = [3, 4]

    words, rows, matrix, bias = (
        torch.nn.Parameter(t.clone()) for t in (start[0], start[0][ids], *start[1:])
    )
    table = lambda: words.index_copy(0, torch.tensor(ids), rows)  # noqa: E731
    groups = [
        {"params": [words, bias]},
        {"params": [rows], "lr": 1e-2 * FACTOR},
        {"params": [matrix], "lr": 1e-2 * 3},
    ]
    cosine_steps(groups, lambda: loss_of(table(), matrix, bias))
    expected = [table().detach(), matrix.detach(), bias.detach()]

    module = torch.nn.ParameterDict(
        {name: t.clone() for name, t in zip(("table", "matrix", "bias"), start, strict=True)}
    )
    factors = [(Rows(module, "table", tuple(ids)), FACTOR), (Rows(module, "matrix"), 3.0)]
    cosine_steps(list(module.values()), lambda: loss_of(**module), factors)
    for name, tensor in zip(("table", "matrix", "bias"), expected, strict=True):
        torch.testing.assert_close(module[name].detach(), tensor, rtol=1e-12, atol=1e-12)
    assert (expected[0] - start[0])[ids].norm() > 5 * (expected[0] - start[0])[[0, 1]].norm()


def test_a_step_is_not_lost_to_the_rounding_of_the_rows():
    """In bfloat16, 6 - 0.001 is 6: multiplying what is left of the step would give nothing."""
    module = torch.nn.ParameterDict({"table": torch.full((2, 1), 6.0, dtype=torch.bfloat16)})
    optimizer = torch.optim.AdamW(module.values(), lr=1e-3, weight_decay=0)
    ScaledSteps(optimizer, [(Rows(module, "table", (1,)), 100.0)])
    module["table"].sum().backward()
    optimizer.step()
    assert module["table"].flatten().tolist() == pytest.approx([6, 5.9], abs=0.02)
    assert module["table"][1] < 6


def test_rows_without_a_gradient_stay():
    module = torch.nn.ParameterDict({"table": torch.ones(2, 2), "other": torch.ones(1)})
    optimizer = torch.optim.AdamW(module.values(), lr=0.1, weight_decay=0.5)
    ScaledSteps(optimizer, [(Rows(module, "table"), 2.0)])
    module["other"].sum().backward()
    optimizer.step()
    assert torch.equal(module["table"], torch.ones(2, 2))


# ---- in two processes ---------------------------------------------------------------------------

AT_THE_BORDER = (3, 639, 640, 1184)  # of two processes with 640 rows each, and the last one


def steps_with_set_gradients(model, mesh=None):
    """Three steps whose gradients come from a seed; how far the model has moved by then."""
    movement = Movement(model, trains_projector=True)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    parts = scaled_parts(model)
    factors = [(r, 50.0) for rows in parts.values() for r in rows]
    if factors[0][0].ids:  # rows of the embedding; with LoRA they are an adapter
        embedding = model.backbone.model.get_input_embeddings()
        factors[0] = (Rows(embedding, ids=AT_THE_BORDER), 50.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ScaledSteps(optimizer, factors)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if mesh is not None:
                gradient = distribute_tensor(gradient, mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
    return movement.shares()


def models(backbone):
    """Models for full fine-tuning and for LoRA, by name."""
    return {
        "full": build_model(backbone, num_tokens=2),
        "lora": build_model(backbone, num_tokens=2, lora=LoraConfig(r=2)),
    }


def sharded_worker(rank, port, backbone, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    for kind, model in models(backbone).items():
        # as with cpu_ram_efficient_loading, where only the first process has the weights
        loaded = models(backbone)[kind].to_empty(device="cpu") if rank else model
        scales = measure(loaded)
        moved = steps_with_set_gradients(model, init_device_mesh("cpu", (2,)))
        weights = {name: p.full_tensor() for name, p in model.named_parameters()}
        torch.save((scales, moved, weights), results / f"{kind}-{rank}.pt")
    dist.destroy_process_group()


def test_sharded_rows_step_as_in_one_process(backbone_path, tmp_path):
    mp.spawn(sharded_worker, (free_port(), backbone_path, tmp_path), nprocs=2)
    for kind, model in models(backbone_path).items():
        expected_scales = measure(model)
        expected_moved = steps_with_set_gradients(model)
        for rank in range(2):
            scales, moved, weights = torch.load(tmp_path / f"{kind}-{rank}.pt")
            assert scales == pytest.approx(expected_scales)
            assert moved == pytest.approx(expected_moved)
            for name, parameter in model.named_parameters():
                expected = parameter.detach()
                torch.testing.assert_close(weights[name], expected, rtol=1e-12, atol=1e-12)
        assert moved["moved_tokens"] > 0.01
        if kind == "full":
            start = models(backbone_path)[kind]
            table, before = (
                m.backbone.model.get_input_embeddings().weight for m in (model, start)
            )
            far = ((table - before).abs().mean(1) > 0.01).nonzero().flatten().tolist()
            assert far == list(AT_THE_BORDER)


# ---- the factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_rows_as_large_as_other_weights_get_the_plain_learning_rate(make_model, lora):
    model = make_model(lora=lora)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter /= 3  # the tiny backbone starts at 0.06
    scales = measure(model)
    factors = rate_factors(scales)
    assert scales["words"] == pytest.approx(0.02, rel=0.05)
    assert scales["reference"] == pytest.approx(0.02, rel=0.05)
    assert factors["tokens"] == pytest.approx(1, rel=0.2)
    for name, layer in (
        ("projector_1", model.fusion.projector.linear_1),
        ("projector_2", model.fusion.projector.linear_2),
    ):
        assert factors[name] == pytest.approx(rms(layer.weight) / scales["reference"], rel=1e-4)
    assert factors.keys() == {"tokens", "projector_1", "projector_2"}


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_large_rows_get_a_large_factor(large_words, lora):
    torch.manual_seed(0)
    model = ReMatch.from_backbone(str(large_words), 4, lora=lora)
    assert rate_factors(measure(model))["tokens"] == pytest.approx(100, rel=0.2)


def test_the_scale_of_quantized_weights_comes_from_the_config(backbone_path):
    model = ReMatch.from_backbone(str(backbone_path), 2, model_kwargs=four_bit())
    model.backbone.model.config.get_text_config().initializer_range = 0.05
    assert measure(model)["reference"] == 0.05


def test_without_learnable_tokens_only_the_projector_has_a_factor(make_model):
    assert rate_factors(measure(make_model(0))).keys() == {"projector_1", "projector_2"}


# ---- a run --------------------------------------------------------------------------------------


def first_step(recipe):
    """How far elements of each part move in one step, as a multiple of the learning rate."""
    start = build_from_recipe(recipe)
    trained = train(recipe, quiet=True)
    parts, before = scaled_parts(trained), scaled_parts(start)
    return {
        name: (rows[0].gather() - before[name][0].gather()).abs().max().item()
        / recipe.train.learning_rate
        for name, rows in parts.items()
    }, rate_factors(measure(start))


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_the_first_step_of_a_run_moves_every_part_by_its_own_rate(large_words, tmp_path, lora):
    """Adam's first step is the learning rate for every element, unless its gradient is tiny."""
    recipe = small_recipe(
        large_words,
        tmp_path / "model",
        model={"lora": lora},
        train={"steps": 1, "save_every": 0, "warmup": 0, "learning_rate": 1e-3},
    )
    moved, factors = first_step(recipe)
    assert factors["tokens"] > 50
    assert moved == pytest.approx(factors, rel=0.1)


def test_the_learning_rates_can_be_left_alone(large_words, tmp_path):
    recipe = small_recipe(
        large_words,
        tmp_path / "model",
        model={"lora": None},
        train={
            "steps": 1,
            "save_every": 0,
            "warmup": 0,
            "learning_rate": 1e-3,
            "scale_learning_rates": False,
        },
    )
    moved, _ = first_step(recipe)
    assert moved == pytest.approx(dict.fromkeys(moved, 1), rel=0.1)


@pytest.fixture
def single_thread():
    """Sums are in the same order in every run."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.2}], ids=["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(large_words, tmp_path, lora):
    def recipe(output):
        return small_recipe(
            large_words,
            output,
            model={"lora": lora},
            train={"steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1},
        )

    train(recipe(tmp_path / "whole"), quiet=True)
    with pytest.raises(TrainingError, match="interrupted"):
        train(recipe(tmp_path / "resumed"), callbacks=(Interrupt(3),), quiet=True)
    assert (tmp_path / "resumed.partial" / "checkpoint-2").exists()
    train(recipe(tmp_path / "resumed"), quiet=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    whole, resumed = (
        [[row[n] for n in sorted(row) if n.startswith("moved")] for row in step_logs(path)]
        for path in (tmp_path / "whole", tmp_path / "resumed")
    )
    assert whole == resumed
    assert len(whole[-1]) == 3
    assert all(share > 0 for share in whole[-1])


# ---- how far weights have moved -----------------------------------------------------------------


def share(tensor, start):
    return ((tensor - start).norm() / start.norm()).item()


def final_entry(output):
    return json.loads((output / "log.json").read_text())[-1]


def test_the_log_tells_how_far_weights_have_moved(backbone_path, tmp_path):
    settings = small_recipe(backbone_path, tmp_path / "m", **FULL, train={"steps": 2})
    start, model = build_from_recipe(settings), train(settings, quiet=True)
    entry = final_entry(tmp_path / "m")
    assert "train_loss" in entry
    ids = model.backbone.tokenizer.convert_tokens_to_ids(
        [f"<|{kind}_emb_{i}|>" for kind in ("query", "doc") for i in range(2)]
    )
    table, before = (m.backbone.model.get_input_embeddings().weight for m in (model, start))
    assert entry["moved_tokens"] == pytest.approx(share(table[ids], before[ids]), abs=1e-6)
    names = [f"linear_{i}.weight" for i in (1, 2)]
    shares = [
        share(model.fusion.projector.get_parameter(n), start.fusion.projector.get_parameter(n))
        for n in names
    ]
    assert entry["moved_projector"] == pytest.approx(sum(shares) / 2, abs=1e-6)
    layer, layer_before = (m.backbone.model.get_decoder().layers[1] for m in (model, start))
    shares = [
        share(p, layer_before.get_parameter(n)) for n, p in layer.named_parameters() if "proj" in n
    ]
    assert len(shares) == 7
    assert entry["moved_model"] == pytest.approx(sum(shares) / 7, abs=1e-6)


def test_with_lora_the_model_moves_by_the_change_of_the_adapter(backbone_path, tmp_path):
    settings = small_recipe(
        backbone_path, tmp_path / "m", train={"steps": 2, "learning_rate": 1e-2}
    )
    model = train(settings, quiet=True)
    adapted = [
        module
        for module in model.backbone.model.get_decoder().layers[1].modules()
        if hasattr(module, "get_delta_weight")
    ]
    shares = [
        (m.get_delta_weight("default").norm() / m.get_base_layer().weight.norm()).item()
        for m in adapted
    ]
    assert len(shares) == 7
    entry = final_entry(tmp_path / "m")
    assert entry["moved_model"] == pytest.approx(sum(shares) / 7, rel=1e-3)
    assert entry["moved_tokens"] > 0


def test_the_start_of_a_run_names_scales_and_learning_rates(large_words, tmp_path, capsys):
    settings = small_recipe(
        large_words, tmp_path / "m", train={"steps": 1, "save_every": 0, "report_to": ["none"]}
    )
    train(settings)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("RMS of"))
    first = json.loads((tmp_path / "m" / "log.json").read_text())[0]
    scales, factors = first["rms"], first["rate_factors"]
    assert f"words {scales['words']:.3g}, tokens {scales['tokens']:.3g}" in line
    assert f"reference {scales['reference']:.3g}; learning rates: tokens" in line
    assert f"tokens {1e-4 * factors['tokens']:.3g}, projector_1" in line
    assert line.endswith("the rest 0.0001")


# ---- a warning about what has not moved ---------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of a training run that are about movement."""
    messages = []
    monkeypatch.setattr(training.logger, "warning", messages.append)
    return lambda: [m for m in messages if "how far weights have moved" in m]


STILL = {"steps": 3, "learning_rate": 1e-7, "save_every": 0}


def test_a_run_that_ends_with_tokens_and_projector_unmoved_warns(
    backbone_path, tmp_path, warnings
):
    train(small_recipe(backbone_path, tmp_path / "m", train=STILL), quiet=True)
    (message,) = warnings()
    assert message.startswith("step 3: how far weights have moved")
    assert "learnable tokens: 0.0" in message
    assert "projector: 0.0" in message
    assert "raise train.learning_rate" in message


def test_a_long_run_warns_once_before_its_end(backbone_path, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(training, "WARNING_AFTER", 2)
    train(small_recipe(backbone_path, tmp_path / "m", train=STILL), quiet=True)
    (message,) = warnings()
    assert message.startswith("step 2: ")


def test_a_trained_model_need_not_move_far(saved_model, tmp_path, warnings):
    train(
        small_recipe(saved_model, tmp_path / "m", model={"num_tokens": 4}, train=STILL), quiet=True
    )
    assert not warnings()


def test_a_run_that_is_stopped_early_does_not_warn(backbone_path, tmp_path, warnings):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    train(
        small_recipe(backbone_path, tmp_path / "m", train=STILL), callbacks=(Stop(),), quiet=True
    )
    assert "moved_tokens" in final_entry(tmp_path / "m")
    assert not warnings()


def test_a_run_whose_tokens_and_projector_move_does_not_warn(backbone_path, tmp_path, warnings):
    moving = {"steps": 3, "learning_rate": 1e-2, "save_every": 0}
    train(small_recipe(backbone_path, tmp_path / "m", train=moving), quiet=True)
    assert not warnings()


@pytest.mark.parametrize("loss", [{"w_qdm": 0}, {"views": ["raw-raw"]}], ids=["off", "raw"])
def test_what_does_not_train_is_neither_logged_nor_warned_of(
    backbone_path, tmp_path, warnings, loss
):
    settings = small_recipe(
        backbone_path, tmp_path / "m", model={"num_tokens": 0}, loss=loss, train=STILL
    )
    train(settings, quiet=True)
    assert not warnings()
    moved = [name for name in final_entry(tmp_path / "m") if name.startswith("moved")]
    assert moved == ["moved_model"]
