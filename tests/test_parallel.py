"""Two processes against one with the same global batch: DDP and FSDP2, plain and cached, unified
and reuse.
"""

import gc
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import build_model
from PIL import Image
from safetensors.torch import load_file
from shared_gradients import SMALL
from shared_training import free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from rematch import ReMatch
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.recipe import load_recipe
from rematch.train.run import train

ROOT = Path(__file__).parents[1]
CASES = [
    (kind, pictures, frozen)
    for kind in ("ddp", "fsdp2")
    for pictures, frozen in (
        ("everywhere", False),
        ("on one process", False),
        ("on one process", True),
    )
]
MODES = [(cached, reuse) for cached in (False, True) for reuse in (False, True)]


def step(model, wrapped, rows, cached, reuse, options):
    batch = Collator(model, batch_tokens=SMALL, reuse=reuse)(rows)["batch"]
    loss = ReMatchLoss(wrapped, gradient_cache=cached, **options)
    wrapped.zero_grad()
    total = torch.stack(list(loss([batch]).values())).sum()
    total.backward()
    gradients = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradients[name.removeprefix("module.")] = (
                gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            )
    temperature = None
    if loss.log_temperature is not None:
        temperature = loss.log_temperature.grad
    return total.detach(), gradients, temperature


def worker(rank, port, backbone, shares, results):
    """Everything that two processes are compared in, in one pair of them: starting one takes
    longer than its steps.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    measured = {}
    for kind, pictures, frozen in CASES:
        measured[kind, pictures, frozen] = run_modes(
            kind, frozen, backbone, shares[pictures][rank]
        )
        if rank == 0:
            torch.save(measured, results)
    gc.collect()
    # DDP is gone by now: were it the last to hold the group, freeing it would wait, with the
    # interpreter's lock, for gloo's thread, which waits for that lock
    dist.destroy_process_group()


def run_modes(kind, frozen, backbone, rows):
    reductions = []
    measured = {}
    for cached, reuse in MODES:
        wrapped = model = build_model(backbone, num_tokens=2)
        if frozen:
            model.backbone.freeze_vision()
        if kind == "ddp":
            wrapped = DistributedDataParallel(model, bucket_cap_mb=1000)
            wrapped.register_comm_hook(None, counted(reductions))
        else:
            mesh = init_device_mesh("cpu", (2,))
            base = model.backbone.base
            for layer in [*base.language_model.layers, *base.vision_tower.encoder.layers]:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(model, FSDPModule)
        options = {"learn_temperature": True, "mask_duplicates": True, "symmetric": True}
        total, gradients, temperature = step(model, wrapped, rows, cached, reuse, options)
        dist.all_reduce(total)
        measured[cached, reuse] = (total.item() / 2, gradients, temperature)
        if kind == "ddp":
            assert len(reductions) == 1, "one reduction a step"
            reductions.clear()
    return measured


def counted(reductions):
    def hook(_, bucket):
        reductions.append(bucket.index())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0] / 2)

    return hook


@pytest.fixture(scope="module")
def rows(triplets):
    texts = [
        {c: {"text": f"{c} number {i}"} for c in ("query", "positive", "negative")}
        for i in range(4)
    ]
    return {"everywhere": triplets[:8], "on one process": triplets[:4] + texts}


@pytest.fixture(scope="module")
def two_processes(backbone_path, rows, tmp_path_factory):
    """What two processes computed, by case."""
    results = tmp_path_factory.mktemp("parallel") / "results.pt"
    shares = {name: (samples[:4], samples[4:]) for name, samples in rows.items()}
    mp.spawn(worker, (free_port(), backbone_path, shares, results), nprocs=2)
    return torch.load(results)


@pytest.mark.parametrize(("kind", "pictures", "frozen"), CASES)
def test_two_processes_equal_one(backbone_path, rows, two_processes, kind, pictures, frozen):
    """A process without pictures must neither hang nor lose its part of the reduction."""
    model = build_model(backbone_path, num_tokens=2)
    if frozen:
        model.backbone.freeze_vision()
    for cached, reuse in MODES:
        options = {"learn_temperature": True, "mask_duplicates": True, "symmetric": True}
        total, gradients, temperature = step(model, model, rows[pictures], cached, reuse, options)
        theirs = two_processes[kind, pictures, frozen][cached, reuse]
        assert theirs[0] == pytest.approx(total.item(), rel=1e-7)
        assert theirs[2].item() == pytest.approx(temperature.item(), rel=1e-6)
        largest = max(g.norm() for g in gradients.values())
        for name, gradient in gradients.items():
            difference = (theirs[1][name] - gradient).norm()
            assert difference <= 1e-6 * gradient.norm().clamp(min=1e-3 * largest), (
                cached,
                reuse,
                name,
            )


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_USE_CPU": "true",
}


@pytest.mark.parametrize(
    ("kind", "matching"),
    [("ddp", "unified"), ("fsdp2", "unified"), ("fsdp2", "reuse")],
)
def test_two_processes_train_and_save_what_one_does(backbone_path, tmp_path, kind, matching):
    """The whole command under torchrun; the model of a sharded run is put together at the end."""
    settings = [
        f"model.backbone={backbone_path}",
        "model.num_tokens=2",
        "train.steps=2",
        "train.batch_size=4",
    ]
    settings += [
        "train.bf16=false",
        "train.workers=0",
        "train.save_every=1",
        "loss.gradient_cache=true",
    ]
    settings += [
        "train.learning_rate=1e-3",
        "train.mini_batch_tokens=300",
        f"loss.matching={matching}",
    ]
    recipe = ROOT / "recipes" / "picto.yaml"
    alone, together = tmp_path / "one", tmp_path / "two"
    train(load_recipe(recipe, [*settings, f"train.output={alone}"]), quiet=True)
    program = (
        ["-m", "rematch.cli"] if kind == "ddp" else [Path(__file__).with_name("sharded_on_cpu.py")]
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    done = subprocess.run(
        [*launch, *program, "train", recipe, *settings, f"train.output={together}"],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | (FSDP2 if kind == "fsdp2" else {}),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    base, single, shared = (
        load_file(path / "model.safetensors") for path in (backbone_path, alone, together)
    )
    assert single.keys() == shared.keys()
    moved = max(
        float((single[n] - base[n]).abs().max()) for n in base if base[n].shape == single[n].shape
    )
    apart = max(float((single[n] - shared[n]).abs().max()) for n in single)
    assert moved > 1e-3
    assert apart < moved / 10  # Adam turns rounding into steps where a gradient is nearly zero
    single_model, shared_model = ReMatch(alone), ReMatch(together)
    assert shared_model.backbone.matching == single_model.backbone.matching == matching
    pair = (["a dog"], [Image.new("RGB", (96, 96), "red")])
    assert shared_model.match(*pair) == pytest.approx(single_model.match(*pair), abs=0.02)
    single_weight, shared_weight = (
        model.fusion.projector.linear_1.weight for model in (single_model, shared_model)
    )
    assert (single_weight - shared_weight).abs().max() < moved / 10


# ---- a process group that serves one device only ------------------------------------------------


@pytest.fixture
def one_device_group(monkeypatch):
    """A group of two that serves the device type ``meta`` alone, as NCCL serves ``cuda`` alone:
    gloo would reduce a tensor on the CPU without a word. Collectives return at once, and numbers
    read off the device are 3.
    """
    dist.init_process_group("meta:fake", rank=0, world_size=2, store=FakeStore())
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor,
        "tolist",
        lambda t: [3, 0][: t.numel()] if t.device.type == "meta" else to_list(t),
    )
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # it knows no such device
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_device_group")
def test_the_group_refuses_other_devices():
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_collectives_stay_on_the_device_of_the_model(
    make_model, one_device_group, cached, reuse, frozen
):
    model = make_model().to("meta")
    model.backbone.model.set_attn_implementation("eager")  # sdpa looks at the mask's values
    if frozen:
        model.backbone.freeze_vision()
    rows = [{c: f"{c} number {i}" for c in ("query", "positive", "negative")} for i in range(4)]
    loss = ReMatchLoss(
        model, gradient_cache=cached, learn_temperature=True, mask_duplicates=True, symmetric=True
    )
    batch = Collator(model, batch_tokens=SMALL, reuse=reuse)(rows)["batch"]
    torch.stack(list(loss.to("meta")([batch]).values())).sum().backward()
    assert loss.log_temperature.grad.device.type == "meta"


def test_all_processes_stop_after_the_same_step_when_one_gets_sigterm(backbone_path, tmp_path):
    """Only the second process gets the signal; alone it would write a checkpoint and wait for the
    first one forever.
    """
    (tmp_path / "recipe.json").write_text(
        json.dumps(
            {
                "model": {
                    "backbone": str(backbone_path),
                    "num_tokens": 2,
                    "lora": {"r": 2, "dropout": 0.2},
                },
                "train": {
                    "steps": 5,
                    "batch_size": 4,
                    "save_every": 100,
                    "log_every": 1,
                    "workers": 0,
                },
            }
        )
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    done = subprocess.run(
        [
            *launch,
            Path(__file__).with_name("sigterm_to_one.py"),
            tmp_path / "recipe.json",
            tmp_path,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert "stopped after step 3 of 5" in (tmp_path / f"error-{rank}.txt").read_text()
        assert (tmp_path / f"checkpoint-{rank}.txt").read_text() == "checkpoint-3"
    whole, stopped = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
