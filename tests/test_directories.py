"""Nothing that is not ours is removed; what is damaged, in use or full is said in one line."""

import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from shared_search import build_index, contents, save_picture
from shared_training import Interrupt, small_recipe, write_rows
from transformers import TrainerCallback

from rematch.data.mmeb_export import export_picto
from rematch.errors import DataError, RematchError, StorageError, TrainingError
from rematch.evaluate.command import EvaluateOptions
from rematch.evaluate.command import run as run_evaluation
from rematch.files import MARKER, PartialDirectory, check_replaceable, write_json, write_text
from rematch.search.command import IndexOptions, SearchOptions, run_index, run_search
from rematch.search.index import Index
from rematch.search.storage import write_lock
from rematch.train.checkpoints import recipe_record
from rematch.train.mine import mine
from rematch.train.run import train

ROOT = Path(__file__).parents[1]


def snapshot(folder):
    """Every path below a folder with its content; locks and markers name the process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and path.name not in (MARKER, ".lock")
        else None
        for path in folder.rglob("*")
    }


@contextmanager
def refused(folder, error=StorageError, match=None):
    """The block raises an error of one line, and leaves the folder as it was."""
    before = snapshot(folder)
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before


@contextmanager
def largest_file(size):
    """No file grows beyond a size, as on a disk that is full or under a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


# ---- what is not ours ---------------------------------------------------------------------------


def user_file(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def user_link(path):
    user_file(path.with_name("elsewhere"))
    (path.with_name("elsewhere") / MARKER).touch()
    path.symlink_to("elsewhere")


IN_THE_WAY = {
    "folder": user_file,
    "file": lambda path: path.write_text("mine"),
    "link": user_link,
    "checkpoint": lambda path: (path / "checkpoint-2").mkdir(parents=True),
    "marker that is a folder": lambda path: (path / MARKER / "x").mkdir(parents=True),
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_partial_directory_of_the_users_is_left_alone(
    backbone_path, model, tmp_path, kind, tally
):
    data = write_rows(tmp_path / "d.jsonl", [{"query": "a", "positive": "b"}])
    commands = {
        "model": lambda: train(small_recipe(backbone_path, tmp_path / "model"), quiet=True),
        "mined.jsonl": lambda: mine(model, data, tmp_path / "mined.jsonl"),
        "picto": lambda: export_picto(tmp_path / "picto", "mmeb-eval"),
    }
    for name, run in commands.items():
        folder = tmp_path / name
        IN_THE_WAY[kind](tmp_path / f"{name}.partial")
        with refused(tmp_path, match=r"\.partial: unfinished output is kept under this name"):
            run()
        tally("Directories")["refused in one line, all else as it was"] += 1
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        assert not folder.exists()


def test_an_empty_directory_is_taken_and_a_killed_run_is_continued(tmp_path):
    directory = PartialDirectory(tmp_path / "a" / "b" / "out")
    with directory:
        assert not directory.holds_earlier_files
        (directory.path / "half").touch()
    with directory:
        assert directory.holds_earlier_files
        directory.empty()
        assert directory.is_empty()
        directory.publish()
    assert list((tmp_path / "a" / "b" / "out").iterdir()) == []
    shutil.rmtree(tmp_path / "a")
    with directory:
        directory.discard()
    assert list(tmp_path.iterdir()) == [], "the folders that were made for it are gone too"
    directory.path.mkdir(parents=True)
    with directory:
        directory.discard()
    assert not directory.path.exists()


def test_a_directory_in_use_is_refused_and_names_the_process(tmp_path, backbone_path, tally):
    output = tmp_path / "model"
    code = f"""
import sys
from pathlib import Path
from rematch.files import PartialDirectory
with PartialDirectory(Path({str(output)!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"in\n"
    message = rf"another process \(process {process.pid} on .*\) is writing"
    with refused(tmp_path, match=message):
        train(small_recipe(backbone_path, output), quiet=True)
    process.kill()
    process.communicate()
    with PartialDirectory(output) as directory:  # the lock ends with the process
        assert directory.is_empty()
    tally("Directories")["refused in one line, all else as it was"] += 1


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    with PartialDirectory(tmp_path / "out") as directory:
        (directory.path / "model").write_text("whole")
        user_file(tmp_path / "out")
        with pytest.raises(StorageError, match="What was written is complete, in"):
            directory.publish()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "out.partial" / "model").read_text() == "whole"


def test_a_file_beside_the_output_is_not_replaced(model, tmp_path, tally):
    data = write_rows(tmp_path / "pairs.json", [{"query": "a", "positive": "b"}])
    with refused(tmp_path, DataError, "pairs.json: exists already"):
        mine(model, data, tmp_path / "pairs.jsonl")
    for name in ("scores.json", "report.html", "leaderboard.json", "predictions.parquet"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text('{"benchmark": "of another program"}')
        with refused(tmp_path, match=f"{name}: exists already"):
            run_evaluation(EvaluateOptions(output=folder))
        tally("Directories")["refused in one line, all else as it was"] += 1
    record = tmp_path / "r.json"
    check_replaceable([record], record, {"a"})
    write_json(record, {"a": 1, "b": 2})
    check_replaceable([record, tmp_path / "new"], record, {"a"})


def test_temporary_files_take_no_name_of_the_users(tmp_path):
    (tmp_path / "a.txt.partial").write_text("mine")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt.partial").read_text() == "mine"
    write_text(tmp_path / ("n" * 251 + ".txt"), "a name of 255 bytes")
    with (
        largest_file(1000),
        refused(tmp_path, match=r"a\.txt: cannot be written \(File too large"),
    ):
        write_text(tmp_path / "a.txt", "x" * 5000)


def test_an_index_does_not_replace_a_report_of_the_users(searcher, photos, tmp_path, tally):
    save_picture(photos / "report.png", 1)
    (photos / "report.json").write_text('{"text": "a caption"}')
    with refused(tmp_path, match=r"report\.json: exists already"):
        build_index(searcher, photos, photos)
    tally("Directories")["refused in one line, all else as it was"] += 1


# ---- two first runs -----------------------------------------------------------------------------


def test_of_two_first_runs_the_second_is_told(searcher, saved_model, photos, tmp_path, tally):
    output = tmp_path / "i"
    output.mkdir()
    options = IndexOptions(str(saved_model), str(photos), str(output))
    with (
        write_lock(str(output)),
        refused(tmp_path, match=r"another process is writing to it \(process \d+ on"),
    ):
        run_index(options)
    # between the look whether there is an index, and making one
    Index.create(output, searcher, name="m")
    with refused(tmp_path, match="another process has just made an index there"):
        Index.create(output, searcher, name="m")
    tally("Directories")["refused in one line, all else as it was"] += 2


# ---- damage -------------------------------------------------------------------------------------


def damages(path, rng):
    """The ways to damage a file; each leaves another content, or none."""
    content = path.read_bytes()
    yield "gone", path.unlink
    yield "empty", lambda: path.write_bytes(b"")
    yield "cut", lambda: path.write_bytes(content[: len(content) // 2])
    yield "other", lambda: path.write_bytes(rng.randbytes(len(content)))
    yield "null", lambda: path.write_bytes(bytes(len(content)))

    def as_folder():
        path.unlink()
        path.mkdir()

    yield "folder", as_folder


def test_a_damaged_index_is_read_or_refused(
    searcher, saved_model, photos, tmp_path, tally, capsys
):
    """Every file of an index, damaged in one of six ways."""
    whole = tmp_path / "whole"
    build_index(searcher, photos, whole)
    ids = [row["id"] for row in contents(whole)]
    rng, folder = random.Random(9), tmp_path / "i"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    outcomes, messages = tally("Directories"), []
    for file in files:
        for number in rng.sample(range(6), 1):
            shutil.copytree(whole, folder)
            _, damage = list(damages(folder / file, rng))[number]
            damage()
            for run in (
                lambda: run_search(SearchOptions(str(folder), "a", model=str(saved_model))),
                lambda: build_index(searcher, photos, folder),
            ):
                try:
                    run()
                    outcomes["worked in spite of it"] += 1
                except RematchError as error:
                    messages.append(str(error))
                    outcomes["refused in one line, all else as it was"] += 1
            shutil.rmtree(folder)
    assert all("\n" not in message and str(folder) in message for message in messages)
    empty = tmp_path / "empty" / "documents.lance"
    empty.mkdir(parents=True)
    for options in (SearchOptions(str(empty.parent), "a"), SearchOptions(str(whole / "x"), "a")):
        with refused(tmp_path, DataError):
            run_search(options)
    with refused(tmp_path, match="empty: the index cannot be read"):
        run_index(IndexOptions(str(saved_model), str(photos), str(empty.parent)))
    assert [row["id"] for row in contents(whole)] == ids
    outcomes["refused in one line, all else as it was"] += 3


def quiet_recipe(backbone_path, output, **settings):
    """A recipe that logs nowhere else."""
    return small_recipe(backbone_path, output, train={"report_to": ["none"]} | settings)


@pytest.fixture(scope="module")
def unfinished(backbone_path, tmp_path_factory):
    """What an interrupted training run leaves: its recipe and one checkpoint."""
    output = tmp_path_factory.mktemp("unfinished") / "model"
    with pytest.raises(TrainingError, match="interrupted"):
        train(quiet_recipe(backbone_path, output), callbacks=(Interrupt(3),), quiet=True)
    return output.with_name("model.partial")


class Stop(TrainerCallback):
    """Ends a run before its first step."""

    def on_step_begin(self, *_, **__):
        raise TrainingError("it has resumed")


def test_a_damaged_checkpoint_is_refused(backbone_path, unfinished, tmp_path, tally):
    """Every file that training reads again: gone, cut, of another content, of another kind."""
    settings = quiet_recipe(backbone_path, tmp_path / "model")
    rng, partial = random.Random(10), tmp_path / "model.partial"
    names = ("recipe.json", "complete.json", "trainer_state.json", "optimizer.pt", "scheduler.pt")
    names += ("rng_state.pth", "loss.pt", "adapter_model.safetensors", "model.safetensors")
    files = [path for path in unfinished.rglob("*") if path.name in names]
    assert {path.name for path in files} >= set(names)
    for file in files:
        for number in rng.sample(range(6), 3):
            shutil.copytree(unfinished, partial)
            write_json(partial / "recipe.json", recipe_record(settings))
            kind, damage = list(damages(partial / file.relative_to(unfinished), rng))[number]
            if file.name == "complete.json" and kind == "gone":
                shutil.rmtree(partial)
                continue  # an unfinished checkpoint, which is not resumed
            damage()
            with refused(tmp_path, RematchError):
                train(settings, callbacks=(Stop(),), quiet=True)
            tally("Directories")["refused in one line, all else as it was"] += 1
            shutil.rmtree(partial)


def test_a_damaged_mining_run_is_refused(model, tmp_path, monkeypatch, tally):
    from rematch.train import mine as module

    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    output, kept = tmp_path / "mined.jsonl", tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_output", lambda *_: None)
        mine(model, data, output)
    partial = tmp_path / "mined.jsonl.partial"
    partial.rename(kept)
    rng = random.Random(11)
    for name in ("settings.json", "block-000000000.json"):
        for number in range(6):
            shutil.copytree(kept, partial)
            kind, damage = list(damages(partial / name, rng))[number]
            damage()
            if name.startswith("block") and kind == "gone":
                shutil.rmtree(partial)
                continue  # is judged again
            with refused(tmp_path, match="cannot be read"):
                mine(model, data, output)
            tally("Directories")["refused in one line, all else as it was"] += 1
            shutil.rmtree(partial)
    shutil.copytree(kept, partial)
    block = partial / "block-000000000.json"
    block.write_text(block.read_text().replace('"document": ', '"document": 9'))
    with refused(tmp_path, match="not of these queries"):
        mine(model, data, output)
    shutil.rmtree(partial)
    kept.rename(partial)
    mine(model, data, output)
    assert not partial.exists()


# ---- places that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 300, 20_000])
def test_a_full_disk_is_said_in_one_line(
    backbone_path, searcher, saved_model, photos, tmp_path, size, tally
):
    data = write_rows(
        tmp_path / "d.jsonl", [{"query": "a", "positive": f"b{i}"} for i in range(9)]
    )
    recipe = quiet_recipe(backbone_path, tmp_path / "model", steps=1)
    evaluation = EvaluateOptions(str(saved_model), str(data), tmp_path / "e", workers=0)
    commands = {
        "train": lambda: train(recipe, quiet=True),
        "mine": lambda: mine(searcher, data, tmp_path / "mined.jsonl"),
        "evaluate": lambda: run_evaluation(evaluation),
        "export": lambda: export_picto(tmp_path / "x", "mmeb-train", samples=2),
        "index": lambda: build_index(searcher, photos, tmp_path / "i"),
    }
    if size > 10_000:  # what the others write is smaller
        commands = {"train": commands["train"]}
    for name, run in commands.items():
        before = snapshot(tmp_path)
        with largest_file(size), pytest.raises(StorageError, match="cannot be ") as caught:
            run()
        assert "\n" not in str(caught.value), name
        after = snapshot(tmp_path)
        assert {path: after[path] for path in before} == before
        new = {Path(path).parts[0] for path in after.keys() - before.keys()}
        # what the same command goes on with
        assert new <= {"mined.jsonl.partial", "e", "i"}, name
        assert not [path for path in after if ".rematch-" in path and MARKER not in path], name
        tally("Directories")["refused in one line, all else as it was"] += 1


@pytest.mark.parametrize("place", ["/proc/x", "/proc/self/x/y", "/dev/null/x", "d.jsonl/x"])
def test_a_place_that_cannot_be_written_is_refused(
    backbone_path, searcher, saved_model, photos, tmp_path, place, tally
):
    data = write_rows(tmp_path / "d.jsonl", [{"query": "a", "positive": "b"}])
    output = tmp_path / place
    commands = (
        lambda: train(small_recipe(backbone_path, output), quiet=True),
        lambda: mine(searcher, data, output.with_name("m.jsonl")),
        lambda: run_evaluation(EvaluateOptions(str(saved_model), str(data), output)),
        lambda: export_picto(output, "mmeb-eval"),
        lambda: build_index(searcher, photos, output),
    )
    for run in commands:
        with refused(tmp_path, match="cannot be "):
            run()
        tally("Directories")["refused in one line, all else as it was"] += 1


def test_commands_end_with_code_1_and_one_line(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    code = "from rematch.cli import main; main()"
    command = [sys.executable, "-c", code, "data", "export", "picto", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_keeps_nothing_that_it_cannot_resume_from(backbone_path, tmp_path):
    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

    settings = quiet_recipe(backbone_path, tmp_path / "model")
    with largest_file(-1), pytest.raises(StorageError, match="cannot be written"):
        train(settings, callbacks=(FillDisk(),), quiet=True)
    partial = tmp_path / "model.partial"
    assert [path.name for path in partial.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(TrainingError, match="it has resumed"):
        train(settings, callbacks=(Stop(),), quiet=True)
