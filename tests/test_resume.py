"""An interrupted run resumes exactly, or says why it cannot."""

import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from shared_training import Interrupt, assert_same_run, small_recipe
from transformers import TrainerCallback

from rematch.errors import RecipeError, TrainingError
from rematch.files import MARKER, write_json
from rematch.train.checkpoints import newest_checkpoint, recipe_record
from rematch.train.run import train


@pytest.fixture(scope="module", autouse=True)
def default_sigterm():
    """Libraries that other tests use leave a handler behind."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(autouse=True)
def single_thread():
    """Sums are in the same order in every process."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="module")
def uninterrupted(backbone_path, tmp_path_factory):
    """The output of a run without interruption."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("uninterrupted") / "model"
    train(small_recipe(backbone_path, output), quiet=True)
    return output


def run_and_signal(settings, tmp_path, when, number):
    """Train in a process of its own and send it a signal as soon as ``when()`` is true."""
    (tmp_path / "recipe.json").write_text(settings.model_dump_json())
    code = """
import sys, torch
torch.set_num_threads(1)
from rematch.errors import RematchError
from rematch.train.recipe import load_recipe
from rematch.train.run import train
try:
    train(load_recipe(sys.argv[1]), quiet=True)
except RematchError as error:
    sys.exit(str(error))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.json")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=60)[1].decode(), process.returncode


def test_a_killed_run_resumes_exactly(backbone_path, tmp_path, uninterrupted):
    """kill -9 once after a save and once inside one."""
    output = tmp_path / "model"
    partial = output.with_name("model.partial")
    settings = small_recipe(backbone_path, output)
    _, code = run_and_signal(
        settings, tmp_path, lambda: newest_checkpoint(partial), signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    before = set(partial.glob("checkpoint-*"))
    _, code = run_and_signal(
        settings, tmp_path, lambda: set(partial.glob("checkpoint-*")) - before, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    train(settings, quiet=True)
    assert_same_run(output, uninterrupted)


def test_sigterm_writes_a_checkpoint_and_ends_the_run(backbone_path, tmp_path, uninterrupted):
    output = tmp_path / "model"
    settings = small_recipe(backbone_path, output)
    partial = output.with_name("model.partial")
    message, code = run_and_signal(
        settings, tmp_path, lambda: newest_checkpoint(partial), signal.SIGTERM
    )
    assert code == 1
    assert "Run the same command again" in message
    assert not output.exists()
    train(settings, quiet=True)
    assert_same_run(output, uninterrupted)


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        if complete:
            (directory / "complete.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_another_recipe_does_not_resume_from_a_checkpoint(backbone_path, tmp_path):
    output = tmp_path / "model"
    checkpoint = output.with_name("model.partial") / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}")
    (checkpoint.parent / MARKER).touch()
    record = recipe_record(small_recipe(backbone_path, output))
    write_json(checkpoint.parent / "recipe.json", record)
    with pytest.raises(RecipeError, match=r"train\.learning_rate"):
        train(small_recipe(backbone_path, output, train={"learning_rate": 0.1}), quiet=True)
    assert checkpoint.exists()


@pytest.fixture(scope="module")
def unfinished(backbone_path, tmp_path_factory):
    """What an interrupted run leaves: its recipe and one checkpoint."""
    output = tmp_path_factory.mktemp("unfinished") / "model"
    with pytest.raises(TrainingError, match="interrupted"):
        train(small_recipe(backbone_path, output), callbacks=(Interrupt(3),), quiet=True)
    return output.with_name("model.partial")


def resume(backbone_path, unfinished, tmp_path, damage):
    """Resume a damaged copy of an unfinished run; it must be left as it is."""
    partial, settings = tmp_path / "model.partial", small_recipe(backbone_path, tmp_path / "model")
    shutil.copytree(unfinished, partial)
    write_json(partial / "recipe.json", recipe_record(settings))
    damage(partial)
    before = sorted(partial.rglob("*"))
    try:
        train(settings, quiet=True)
    finally:
        assert sorted(partial.rglob("*")) == before


@pytest.mark.parametrize("content", [None, '{"model": {', "[1]", '{"train": 3}', "null"])
def test_a_checkpoint_without_its_recipe_is_named(backbone_path, unfinished, tmp_path, content):
    def damage(partial):
        (partial / "recipe.json").unlink()
        if content is not None:
            (partial / "recipe.json").write_text(content)

    with pytest.raises(
        RecipeError,
        match=r"model\.partial: holds checkpoint-2 .* recipe\.json .* remove the directory",
    ):
        resume(backbone_path, unfinished, tmp_path, damage)


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut"])
@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "adapter_model.safetensors",
        "1_MultiTokenFusion/model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "loss.pt",
    ],
)
def test_a_damaged_checkpoint_is_named(backbone_path, unfinished, tmp_path, name, cut):
    def damage(partial):
        file = partial / "checkpoint-2" / name
        content = file.read_bytes()
        file.unlink()
        if cut:
            file.write_bytes(content[: len(content) // 2])

    with pytest.raises(TrainingError, match=rf"checkpoint-2/{name}: .* remove the checkpoint"):
        resume(backbone_path, unfinished, tmp_path, damage)


def test_a_checkpoint_that_does_not_list_its_files_is_refused(backbone_path, unfinished, tmp_path):
    with pytest.raises(TrainingError, match=r"complete\.json: does not list the files"):
        resume(
            backbone_path,
            unfinished,
            tmp_path,
            lambda p: (p / "checkpoint-2" / "complete.json").write_text('{"step": 2}'),
        )


def test_a_best_checkpoint_that_cannot_be_loaded_is_an_error(backbone_path, tmp_path):
    """The library would log it and keep the last weights."""

    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **_):
            (Path(state.best_model_checkpoint) / "adapter_model.safetensors").write_bytes(b"cut")

    settings = small_recipe(
        backbone_path, tmp_path / "model", data={"validation": 4}, train={"steps": 2}
    )
    with pytest.raises(
        TrainingError, match=r"checkpoint-2/adapter_model\.safetensors: has 3 bytes"
    ):
        train(settings, callbacks=(Damage(),), quiet=True)
    assert not (tmp_path / "model").exists()


def test_the_handler_of_sigterm_is_restored_after_a_failure(unfinished):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_training_runs_in_a_thread(backbone_path, tmp_path):
    """Python sets signal handlers in the main thread only; a notebook may train in another one."""
    settings = small_recipe(backbone_path, tmp_path / "model", train={"steps": 2})
    with ThreadPoolExecutor(1) as threads:
        threads.submit(train, settings, quiet=True).result()
    assert (tmp_path / "model" / "log.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_does_not_resume_in_other_arithmetic(backbone_path, tmp_path, monkeypatch):
    """It began in float32, and is resumed on a machine where auto means bfloat16."""
    settings = small_recipe(backbone_path, tmp_path / "m")
    with pytest.raises(TrainingError, match="interrupted"):
        train(settings, (Interrupt(3),), quiet=True)
    monkeypatch.setenv("REMATCH_NATIVE_BF16", "1")
    with pytest.raises(RecipeError, match=r"it differs in settled\.bf16, settled\.attention"):
        train(settings, quiet=True)


def test_a_learned_temperature_is_refused_under_fsdp(backbone_path, tmp_path, monkeypatch):
    """It would fail in the optimizer, after loading."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = small_recipe(backbone_path, tmp_path / "model")
    recipe.loss.learn_temperature = True
    with pytest.raises(RecipeError, match="learn_temperature does not work with FSDP"):
        train(recipe, quiet=True)


def test_processes_that_see_different_checkpoints_are_told_to_share_a_disk(
    backbone_path, tmp_path, monkeypatch
):
    recipe = small_recipe(backbone_path, tmp_path / "model")
    with pytest.raises(TrainingError, match="interrupted"):
        train(recipe, callbacks=(Interrupt(3),), quiet=True)
    step = int(newest_checkpoint(tmp_path / "model.partial").name.rpartition("-")[2])
    # the other process has found none
    monkeypatch.setattr("rematch.train.run.largest", lambda counts, _: [counts[0], 0])
    with pytest.raises(TrainingError, match=f"others after step {step}.*all machines share"):
        train(recipe, quiet=True)
    monkeypatch.undo()
    assert train(recipe, quiet=True)
