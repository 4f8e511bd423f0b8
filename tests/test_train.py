"""A run that is cut off goes on exactly; what stops a run says so; every source gets its share."""

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from rematch import ReMatch
from rematch.errors import DataError, ImageError, RecipeError, TooLongError, TrainingError
from rematch.files import write_json
from rematch.train.plan import plan
from rematch.train.recipe import Recipe
from rematch.train.run import build_collator, build_loss, build_model, record, train
from rematch.train.sources import build_dataset, build_validation
from rematch.train.trainer import newest_checkpoint


@pytest.fixture(scope="module", autouse=True)
def default_sigterm():
    """Libraries that other tests use leave a handler behind."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(path, output, **changes):
    settings = {
        "model": {
            "backbone": str(path),
            "num_tokens": 2,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        },
        "loss": {"learn_temperature": True, "gradient_cache": True},
        "train": {
            "output": str(output),
            "steps": 8,
            "batch_size": 4,
            "save_every": 2,
            "log_every": 1,
            "workers": 0,
        },
    }
    for name, change in changes.items():
        settings[name] = settings.get(name, {}) | change
    return Recipe.model_validate(settings)


def curve(output):
    return [row["loss"] for row in json.loads((output / "log.json").read_text()) if "loss" in row]


@pytest.fixture(scope="module")
def whole(backbone_path, tmp_path_factory):
    """A run without interruption."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole") / "model"
    train(recipe(backbone_path, output), quiet=True)
    return output


def assert_same_run(output, whole):
    assert curve(output) == curve(whole)
    ours, theirs = ReMatch(output).state_dict(), ReMatch(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(output.glob("checkpoint-*"))


def run_and_signal(settings, tmp_path, when, number):
    """Train in a process of its own and send it a signal as soon as ``when`` is true."""
    (tmp_path / "recipe.json").write_text(settings.model_dump_json())
    code = """
import sys, torch
torch.set_num_threads(1)
from rematch.errors import RematchError
from rematch.train.recipe import load_recipe
from rematch.train.run import build_collator, build_loss, build_model, record, train
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


def test_a_killed_run_goes_on_exactly(backbone_path, tmp_path, whole):
    """kill -9 once after a save and once inside one."""
    output = tmp_path / "model"
    partial = output.with_name("model.partial")
    settings = recipe(backbone_path, output)
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
    assert_same_run(output, whole)


def test_sigterm_writes_a_checkpoint_and_leaves(backbone_path, tmp_path, whole):
    output = tmp_path / "model"
    settings = recipe(backbone_path, output)
    partial = output.with_name("model.partial")
    message, code = run_and_signal(
        settings, tmp_path, lambda: newest_checkpoint(partial), signal.SIGTERM
    )
    assert code == 1
    assert "Start the same command again" in message
    assert not output.exists()
    train(settings, quiet=True)
    assert_same_run(output, whole)


def test_a_torn_checkpoint_is_never_chosen(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        if complete:
            (directory / "complete.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_another_recipe_does_not_go_on_from_a_checkpoint(backbone_path, tmp_path):
    output = tmp_path / "model"
    left = output.with_name("model.partial") / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "complete.json").write_text("{}")
    write_json(left.parent / "recipe.json", record(recipe(backbone_path, output)))
    with pytest.raises(RecipeError, match=r"train\.learning_rate"):
        train(recipe(backbone_path, output, train={"learning_rate": 0.1}), quiet=True)
    assert left.exists()


class Interrupt(TrainerCallback):
    """Ends a run in a step, before that is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise TrainingError("interrupted")


@pytest.fixture(scope="module")
def unfinished(backbone_path, tmp_path_factory):
    """What an interrupted run leaves: its recipe and one checkpoint."""
    output = tmp_path_factory.mktemp("unfinished") / "model"
    with pytest.raises(TrainingError, match="interrupted"):
        train(recipe(backbone_path, output), callbacks=(Interrupt(3),), quiet=True)
    return output.with_name("model.partial")


def resume(backbone_path, unfinished, tmp_path, damage):
    """Go on with a damaged copy of an unfinished run; it is still there afterwards."""
    partial, settings = tmp_path / "model.partial", recipe(backbone_path, tmp_path / "model")
    shutil.copytree(unfinished, partial)
    write_json(partial / "recipe.json", record(settings))
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

    settings = recipe(
        backbone_path, tmp_path / "model", data={"validation": 4}, train={"steps": 2}
    )
    with pytest.raises(
        TrainingError, match=r"checkpoint-2/adapter_model\.safetensors: has 3 bytes"
    ):
        train(settings, callbacks=(Damage(),), quiet=True)
    assert not (tmp_path / "model").exists()


def test_sigterm_is_given_back_after_a_failure(unfinished):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_training_runs_in_a_thread(backbone_path, tmp_path):
    """Python sets signal handlers in the main thread only; a notebook may train in another one."""
    settings = recipe(backbone_path, tmp_path / "model", train={"steps": 2})
    with ThreadPoolExecutor(1) as threads:
        threads.submit(train, settings, quiet=True).result()
    assert (tmp_path / "model" / "log.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_deepspeed_is_refused(backbone_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch sets it
    with pytest.raises(RecipeError, match=r"several.*fsdp2\.yaml"):
        train(recipe(backbone_path, tmp_path / "model"), quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_names_step_and_samples(backbone_path, tmp_path):
    settings = recipe(
        backbone_path,
        tmp_path / "model",
        train={"learning_rate": 1e30, "save_every": 0, "steps": 6},
    )
    with pytest.raises(TrainingError, match=r"step [2-6]: the loss is .*picto, sample \d+"):
        train(settings, quiet=True)
    assert not list(tmp_path.iterdir())


def test_validation_chooses_the_checkpoint_and_the_card_tells_the_recipe(backbone_path, tmp_path):
    output = tmp_path / "model"
    train(recipe(backbone_path, output, data={"validation": 8}, train={"steps": 4}), quiet=True)
    history = json.loads((output / "log.json").read_text())
    assert [row["step"] for row in history if "eval_loss" in row] == [2, 4]
    logged = [row for row in history if "loss" in row][-1]
    assert {
        "token_cosine",
        "samples_per_second",
        "tokens_per_second",
        "grad_norm",
        "contrastive",
    } <= logged.keys()
    card = (output / "README.md").read_text()
    assert "steps: 4" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card


def test_validation_needs_checkpoints(backbone_path, tmp_path):
    with pytest.raises(ValueError, match="save_every"):
        recipe(backbone_path, tmp_path, data={"validation": 4}, train={"save_every": 0})


def test_the_plan_draws_by_weight_and_uses_every_sample():
    order = plan([10, 30], [3.0, 1.0], 100, 8, seed=1)
    share = Counter(order[:, 0].tolist())
    assert 0.7 < share[0] / 800 < 0.8
    own = order[order[:, 0] == 0, 1]
    assert all(sorted(own[i : i + 10]) == list(range(10)) for i in range(0, len(own) - 9, 10))
    assert (order == plan([10, 30], [3.0, 1.0], 100, 8, seed=1)).all()
    assert (order != plan([10, 30], [3.0, 1.0], 100, 8, seed=2)).any()


def test_homogeneous_batches_come_from_one_source():
    order = plan([20, 20], [1.0, 1.0], 50, 6, seed=0, homogeneous=True)
    sources = order[:, 0].reshape(50, 6)
    assert (sources == sources[:, :1]).all()
    assert set(sources[:, 0].tolist()) == {0, 1}


def test_sources_and_validation_do_not_overlap(tmp_path, backbone_path):
    for name in ("one", "two"):
        lines = [{"query": f"{name} {i}", "positive": f"answer {name} {i}"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [
        {"path": str(tmp_path / "one.jsonl"), "weight": 5},
        {"path": str(tmp_path / "two.jsonl")},
    ]
    settings = recipe(backbone_path, tmp_path / "m", data={"source": sources, "validation": 2})
    rows, kept = build_dataset(settings), build_validation(settings)
    seen, kept_out = ({row["query"]["text"] for row in part} for part in (rows, kept))
    assert kept_out == {"one 10", "one 11", "two 10", "two 11"}
    assert not seen & kept_out
    assert {row["id"].rpartition("/")[2].partition(",")[0] for row in rows} == {
        "one.jsonl",
        "two.jsonl",
    }


def test_a_source_can_have_its_own_temperature(tmp_path, backbone_path):
    (tmp_path / "own.jsonl").write_text(
        "".join(
            json.dumps({"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"}) + "\n"
            for i in range(8)
        )
    )
    sources = [
        {"path": str(tmp_path / "own.jsonl"), "temperature": 0.1},
        {"path": "picto", "samples": 8},
    ]
    settings = recipe(
        backbone_path, tmp_path / "m", data={"source": sources}, loss={"learn_temperature": False}
    )
    rows = [build_dataset(settings)[i] for i in range(8)]
    told = {row["id"].rpartition("/")[2].partition(",")[0]: row["temperature"] for row in rows}
    assert told == {"own.jsonl": 0.1, "picto": 0.02}
    model = build_model(settings)
    batch = build_collator(settings, model)(rows)["batch"]
    assert batch.temperatures.tolist() == [row["temperature"] for row in rows]
    loss = build_loss(settings, model)
    own = loss([batch])["contrastive"].item()
    batch.temperatures = None
    assert loss([batch])["contrastive"].item() != pytest.approx(own, rel=1e-3)
    with pytest.raises(ValueError, match="temperature of its own"):
        recipe(
            backbone_path,
            tmp_path / "m",
            data={"source": sources},
            loss={"learn_temperature": True},
        )


# ---- samples that cannot be used ----------------------------------------------------------------


@pytest.fixture
def broken_data(tmp_path):
    """Twelve samples: the third has a broken picture, the fourth a missing one, the sixth is too
    long.
    """
    rows = [{"query": f"query {i}", "positive": f"document {i}"} for i in range(12)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[2]["positive"], rows[3]["positive"] = "broken.png", "missing.png"
    rows[5]["query"] = "a dog above a pizza " * 100
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def short_backbone(backbone_path, tmp_path):
    """The tiny backbone, whose tokenizer takes no more than 128 tokens."""
    path = tmp_path / "short"
    shutil.copytree(backbone_path, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 128}))
    return path


def broken_recipe(backbone, output, data, **settings):
    changes = {"steps": 3, "save_every": 0, "batch_size": 4}
    return recipe(backbone, output, data={"source": str(data)} | settings, train=changes)


def test_by_default_a_sample_that_cannot_be_used_stops_the_run(
    short_backbone, tmp_path, broken_data
):
    with pytest.raises(
        DataError,
        match=r"data.jsonl:4: positive names the picture .*missing.png, which is not there",
    ):
        train(broken_recipe(short_backbone, tmp_path / "m", broken_data), quiet=True)
    with pytest.raises(TooLongError, match="longer than the 128 tokens"):
        train(
            broken_recipe(short_backbone, tmp_path / "m", broken_data, unreadable="skip"),
            quiet=True,
        )
    (tmp_path / "missing.png").write_bytes(b"no picture either")
    with pytest.raises(ImageError, match="not a picture that Pillow can read"):
        train(
            broken_recipe(short_backbone, tmp_path / "m", broken_data, too_long="skip"), quiet=True
        )
    assert not (tmp_path / "m").exists()


def test_samples_are_skipped_counted_and_named(short_backbone, tmp_path, broken_data, caplog):
    """Three steps of four: every sample once, and others in the places of three."""
    logging.get_logger("rematch").addHandler(caplog.handler)
    skip = {"unreadable": "skip", "too_long": "skip"}
    train(broken_recipe(short_backbone, tmp_path / "m", broken_data, **skip), quiet=True)
    named = sorted((tmp_path / "m/skipped.txt").read_text().splitlines())
    assert {line.split(": ")[0].rpartition(", ")[2] for line in named} == {
        "sample 3",
        "sample 4",
        "sample 6",
    }
    assert any("broken.png: not a picture" in line for line in named)
    assert any("missing.png: no such picture" in line for line in named)
    assert any("longer than the 128 tokens" in line for line in named)
    log = [row for row in json.loads((tmp_path / "m/log.json").read_text()) if "loss" in row]
    assert log[-1]["skipped"] == len(named) == 3
    assert "skipped, another sample takes its place" in caplog.text


def test_a_substitute_is_the_same_in_every_run_and_there_may_be_none(
    short_backbone, tmp_path, broken_data
):
    settings = broken_recipe(
        short_backbone, tmp_path / "m", broken_data, unreadable="skip", too_long="skip"
    )
    model = build_model(settings)
    samples = [build_dataset(settings)[i] for i in range(12)]
    ids = [build_collator(settings, model)(samples)["batch"].ids for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 12
    broken_data.write_text(
        "".join(json.dumps({"query": f"a {i}", "positive": "no.png"}) + "\n" for i in range(6))
    )
    rows = [build_dataset(settings)[i] for i in range(4)]
    with pytest.raises(
        DataError, match=r"sample \d: it cannot be used, and neither can those of its source"
    ):
        build_collator(settings, model)(rows)


def test_a_substitute_is_no_sample_of_the_batch(short_backbone, tmp_path, broken_data):
    settings = broken_recipe(
        short_backbone, tmp_path / "m", broken_data, unreadable="skip", too_long="skip"
    )
    collator = build_collator(settings, build_model(settings))
    samples = sorted((build_dataset(settings)[i] for i in range(12)), key=lambda row: row["id"])
    broken = [row for row in samples if row["id"].endswith(("sample 3", "sample 4", "sample 6"))]
    whole = [row for row in samples if row not in broken]
    for bad in broken:
        batch = collator([bad, *whole[:8]])["batch"]
        assert batch.ids[0] == whole[8]["id"]
        assert batch.pictures is None  # of what was left out nothing stays


def test_a_run_does_not_go_on_in_other_arithmetic(backbone_path, tmp_path, monkeypatch):
    """Begun in float32, continued on a machine where auto means bfloat16."""
    settings = recipe(backbone_path, tmp_path / "m")
    stop = Stop(after=3)
    with pytest.raises(KeyboardInterrupt):
        train(settings, (stop,), quiet=True)
    monkeypatch.setenv("REMATCH_NATIVE_BF16", "1")
    with pytest.raises(RecipeError, match=r"it differs in settled\.bf16, settled\.attention"):
        train(settings, quiet=True)


class Stop(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.after:
            raise KeyboardInterrupt


def test_evaluation_leaves_no_workers_behind_and_skips_are_named_once(backbone_path, tmp_path):
    rows = [{"query": f"query {i}", "positive": f"document {i}"} for i in range(12)]
    rows[10]["positive"] = "missing.png"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts.append(len(multiprocessing.active_children()))

    changes = {"steps": 5, "save_every": 1, "batch_size": 4, "workers": 1}
    data = {"source": str(tmp_path / "data.jsonl"), "validation": 4, "unreadable": "skip"}
    train(recipe(backbone_path, tmp_path / "m", data=data, train=changes), (Count(),), quiet=True)
    assert max(counts) == 1
    (line,) = (tmp_path / "m/skipped.txt").read_text().splitlines()
    assert line.startswith(f"{tmp_path / 'data.jsonl'}, sample 11: ")
