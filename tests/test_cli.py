"""The command as a user types it: help, runs, and one clear line for every kind of bad input."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rematch import ReMatch, cli
from rematch.backbone.loading import resolve
from rematch.errors import ModelError
from rematch.train.recipe import load_recipe
from rematch.train.run import train
from rematch.train.sources import build_dataset

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def rematch(capsys, monkeypatch):
    """Run the command in this process; returns (exit code, what it printed)."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rematch", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def fails(rematch):
    """The command must end with code 2 and one error, no traceback; returns the message."""

    def run(*arguments: object) -> str:
        code, said = rematch(*arguments)
        assert code == 2, said
        assert "Traceback" not in said
        lines = [
            line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")
        ]
        assert len(lines) == 1, said
        return lines[0]

    return run


@pytest.fixture
def pairs(tmp_path):
    """A small JSONL of pictures and captions with hard negatives."""
    lines = []
    for i, colour in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
        lines.append(
            {
                "query": f"a {colour} card {i}",
                "positive": f"{colour}.png",
                "negative": {"text": "x", "image": "red.png"},
            }
        )
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def small(backbone_path, output, *more):
    """Arguments of a two-step run on the tiny backbone."""
    train = {
        "steps": 2,
        "batch_size": 3,
        "bf16": "false",
        "log_every": 1,
        "workers": 0,
        "output": output,
    }
    settings = [f"train.{key}={value}" for key, value in train.items()]
    return [
        RECIPES / "picto.yaml",
        f"model.backbone={backbone_path}",
        "model.num_tokens=2",
        *settings,
        *more,
    ]


HELP = """
import sys
from rematch import cli
sys.argv = ["rematch", "--help"]
try:
    cli.main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""


def test_help_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("demo", "train", "evaluate", "index", "search", "serve", "data"):
        assert word in done.stdout


def test_version_and_typos(rematch):
    assert rematch("--version") == (0, "rematch 0.1.0\n")
    code, said = rematch("trian")
    assert code == 2
    assert "Did you mean 'train'" in said


def test_train_evaluate_and_search(rematch, backbone_path, pairs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    code, said = rematch("train", *small(backbone_path, output, f"data.source={pairs}"))
    assert code == 0, said
    log = [row for row in json.loads((output / "log.json").read_text()) if "loss" in row]
    assert [row["step"] for row in log] == [1, 2]
    for part in (
        "contrastive",
        "orthogonality",
        "matching",
        "match_accuracy/raw-raw/positive",
        "match_accuracy/feat-feat/negative",
    ):
        assert part in log[0]
    assert list((output / "tensorboard").rglob("events*"))
    assert not output.with_name("out.partial").exists()

    monkeypatch.setattr(
        "rematch.data.picto_tasks.TASKS",
        {
            "Picto-Count": __import__("rematch.data.picto_tasks", fromlist=["TASKS"]).TASKS[
                "Picto-Count"
            ]
        },
    )
    code, said = rematch("evaluate", output, "--limit", "20", "--output", tmp_path / "scores")
    assert code == 0, said
    assert "Picto-Count-Unseen" in said
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert set(scores["tasks"]) == {"Picto-Count", "Picto-Count-Unseen"}
    assert scores["chance"]["overall"] == 1.0

    code, said = rematch(
        "index", output, pairs.parent, "--output", tmp_path / "idx", "--workers", "0"
    )
    assert code == 0, said
    query = ["--text", "a red card", "--image", tmp_path / "red.png"]
    code, said = rematch("search", tmp_path / "idx", *query, "--top", "3", "--rerank", "2")
    assert code == 0, said
    assert said.count(".png") == 3
    assert said.count("P(yes)") == 2


@pytest.mark.parametrize(
    "rung",
    [
        [
            "model.num_tokens=0",
            "loss.w_orth=0",
            "loss.w_qdm=0",
            "data.hard_negatives=false",
            "data.document_instructions=false",
        ],
        ["model.num_tokens=0", "loss.w_orth=0", "loss.w_qdm=0", "data.hard_negatives=false"],
        ["model.num_tokens=0", "loss.w_orth=0", "loss.w_qdm=0"],
        ["model.num_tokens=0", "loss.w_orth=0"],
        ["loss.w_qdm=0"],
        ["model.lora={r: 2, alpha: 4}"],
    ],
    ids=[
        "last token + InfoNCE",
        "+ target instructions",
        "+ hard negatives",
        "+ matching",
        "+ multi-token",
        "all, LoRA",
    ],
)
def test_every_rung_of_the_ladder_trains(rematch, backbone_path, tmp_path, rung):
    code, said = rematch("train", *small(backbone_path, tmp_path / "m", *rung))
    assert code == 0, said
    log = next(row for row in json.loads((tmp_path / "m/log.json").read_text()) if "loss" in row)
    assert ("matching" in log) == ("loss.w_qdm=0" not in rung)
    assert ("orthogonality" in log) == ("loss.w_orth=0" not in rung)


def test_training_from_an_mmeb_directory(rematch, backbone_path, tmp_path):
    assert (
        rematch(
            "data",
            "export",
            "picto",
            tmp_path / "mmeb",
            "--format",
            "mmeb-train",
            "--samples",
            "1",
        )[0]
        == 0
    )
    code, said = rematch(
        "train", *small(backbone_path, tmp_path / "m", f"data.source={tmp_path / 'mmeb'}")
    )
    assert code == 0, said


def test_bad_recipes(fails, tmp_path):
    recipe = tmp_path / "r.yaml"
    assert "no such recipe" in fails("train", tmp_path / "none.yaml")
    recipe.write_text("train: {stpes: 3}")
    assert "unknown key train.stpes; did you mean train.steps?" in fails("train", recipe)
    recipe.write_text("model: {lora: {rank: 3}}")
    assert "unknown key model.lora.rank" in fails("train", recipe)
    recipe.write_text("train: {steps: many}")
    assert "train.steps = 'many'" in fails("train", recipe)
    recipe.write_text("train: [")
    assert "not valid YAML" in fails("train", recipe)
    recipe.write_text("- a")
    assert "a recipe is a mapping" in fails("train", recipe)
    assert "section.key=value" in fails("train", RECIPES / "picto.yaml", "steps")
    assert "not valid YAML" in fails("train", RECIPES / "picto.yaml", "train.steps=[")
    assert "no such recipe" in fails("train", tmp_path)
    assert "takes no 4-D masks" in fails(
        "train", RECIPES / "picto.yaml", "model.attention=flash_attention_2"
    )
    joint_reuse = ("loss.joint=true", "loss.matching=reuse")
    assert "switch one of them off" in fails("train", RECIPES / "picto.yaml", *joint_reuse)


def test_bad_training_data(fails, backbone_path, pairs, tmp_path):
    def message(line: str, **picture: bytes) -> str:
        for name, content in picture.items():
            (tmp_path / f"{name}.png").write_bytes(content)
        pairs.write_text(pairs.read_text().splitlines()[0] + "\n" + line)
        said = fails(
            "train",
            *small(backbone_path, tmp_path / "m", f"data.source={pairs}", "train.batch_size=2"),
        )
        assert not (tmp_path / "m").exists()
        return said

    assert "pairs.jsonl:2: not valid JSON" in message('{"query": ')
    assert "pairs.jsonl:2: needs the columns" in message('{"query": "a"}')
    assert "pairs.jsonl:2: 'positive' is empty" in message('{"query": "a", "positive": ""}')
    assert "none.png, which is not there" in message(
        '{"query": "a", "positive": "none.png", "negative": "b"}'
    )
    assert "is neither text" in message(
        '{"query": {"txt": "a"}, "positive": "b", "negative": "b"}'
    )
    assert "is neither text" in message('{"query": {"text": 5}, "positive": "b", "negative": "b"}')
    assert "is neither text" in message('{"query": "  ", "positive": "b", "negative": "b"}')
    assert "has no negative, but other samples have" in message('{"query": "a", "positive": "b"}')
    whole = (tmp_path / "red.png").read_bytes()
    assert "cut.png: " in message(
        '{"query": "a", "positive": "cut.png", "negative": "b"}', cut=whole[:-40]
    )
    assert "no such file" in fails(
        "train", *small(backbone_path, tmp_path / "m", "data.source=nothing.jsonl")
    )
    assert "neither .jsonl nor .parquet" in fails(
        "train", *small(backbone_path, tmp_path / "m", f"data.source={RECIPES / 'picto.yaml'}")
    )
    pairs.write_text(pairs.read_text().splitlines()[0])
    assert "do not fill one batch" in fails(
        "train", *small(backbone_path, tmp_path / "m", f"data.source={pairs}")
    )


def test_bad_mining_input(fails, pairs, tmp_path):
    output = tmp_path / "mined.jsonl"
    assert "no such file" in fails(
        "mine", "rematch-tiny", tmp_path / "none.jsonl", "--output", output
    )
    for option in ("--view", "--views"):
        assert "--views raw is unknown; choose from raw-raw" in fails(
            "mine", "rematch-tiny", pairs, "--output", output, option, "raw"
        )
    assert "extension .jsonl" in fails(
        "mine", "rematch-tiny", pairs, "--output", tmp_path / "mined"
    )
    assert "exists already" in fails("mine", "rematch-tiny", pairs, "--output", pairs)
    assert "not a ReMatch checkpoint" in fails("mine", tmp_path, pairs, "--output", output)
    assert "no such folder or file" in fails(
        "mine", "rematch-tiny", pairs, "--output", output, "--corpus", tmp_path / "none.jsonl"
    )
    assert not list(tmp_path.glob("mined*"))


def test_mine_writes_training_data_and_a_report(rematch, pairs, tmp_path):
    code, said = rematch(
        "mine",
        "rematch-tiny",
        pairs,
        "--output",
        tmp_path / "mined.jsonl",
        "--yes",
        "1",
        "--margin",
        "0",
    )
    assert code == 0, said
    assert "What was dropped and why" in said
    assert (tmp_path / "mined.html").exists()


def test_bad_corpora_and_queries(fails, tmp_path, monkeypatch):
    corpus, output = tmp_path / "corpus", tmp_path / "idx"
    corpus.mkdir()

    def index(path=corpus):
        return fails("index", "rematch-tiny", path, "--output", output, "--workers", "0")

    assert "no query" in fails("search", output)
    assert "holds no files to index" in index()
    assert "no such folder or file" in index(tmp_path / "nowhere")
    (corpus / "fake.png").write_text("not a picture")
    assert "fake.png: not a picture" in index()
    Image.new("RGB", (30, 30)).save(corpus / "fake.png")
    cli.app(
        ["index", "rematch-tiny", str(corpus), "--output", str(output), "--workers", "0"],
        standalone_mode=False,
    )
    assert "input 0: empty" in fails("search", output, "--text", " ")
    assert "gone.png: no such picture" in fails("search", output, "--image", tmp_path / "gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in fails("search", output, "--image", corpus / "fake.png")


def test_bad_checkpoints(fails, make_model, tmp_path):
    from peft import LoraConfig

    (tmp_path / "corpus").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "corpus/ok.png")
    search = lambda path: fails("index", path, tmp_path / "corpus", "--output", tmp_path / "idx")  # noqa: E731
    (tmp_path / "empty").mkdir()
    assert "not a ReMatch checkpoint" in search(tmp_path / "empty")
    assert "no such directory" in search("no-such/model")

    make_model(dtype=torch.float32, lora=LoraConfig(r=2)).save_pretrained(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "lost")
    (tmp_path / "lost/adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is not there" in search(tmp_path / "lost")
    (tmp_path / "lost/adapter_config.json").unlink()
    assert "adapter_model.safetensors is not there" in search(tmp_path / "lost")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "rematch-base"
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(settings))
    assert "trained on another base" in search(tmp_path / "a")

    make_model(dtype=torch.float32).save_pretrained(str(tmp_path / "torn"))
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in search(tmp_path / "torn")


def test_bad_backbones(fails, backbone_path, tmp_path):
    def train(path):
        said = fails("train", *small(path, tmp_path / "m"))
        assert not (tmp_path / "m").exists()
        return said

    shutil.copytree(backbone_path, tmp_path / "silent")
    (tmp_path / "silent/chat_template.jinja").unlink()
    assert "has no chat template" in train(tmp_path / "silent")
    shutil.copytree(backbone_path, tmp_path / "spelling")
    tokenizer = json.loads((tmp_path / "spelling/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (tmp_path / "spelling/tokenizer.json").write_text(json.dumps(tokenizer))
    assert "splits 'Yes' into" in train(tmp_path / "spelling")
    assert "cannot be loaded" in train(tmp_path / "nowhere")


def test_a_processor_that_silently_came_back_as_a_tokenizer(
    fails, backbone_path, tmp_path, monkeypatch
):
    """As AutoProcessor does where a package of the image processor is missing."""
    from transformers import AutoProcessor, AutoTokenizer

    monkeypatch.setattr(AutoProcessor, "from_pretrained", AutoTokenizer.from_pretrained)
    assert "reads no pictures" in fails("train", *small(backbone_path, tmp_path / "m"))


def test_a_broken_picture_met_by_a_data_worker(fails, backbone_path, pairs, tmp_path):
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "green.png").write_bytes(whole[:-40])
    settings = small(backbone_path, tmp_path / "m", f"data.source={pairs}", "train.workers=1")
    assert "error: " + str(tmp_path / "green.png") in fails("train", *settings)
    assert not list(tmp_path.glob("m*"))


def test_mixed_precision_training_returns_the_model_that_it_saves(backbone_path, tmp_path):
    recipe, *settings = map(str, small(backbone_path, tmp_path / "m", "train.bf16=true"))
    returned = train(load_recipe(recipe, settings), quiet=True)
    texts = ["a dog", "a dog above a pizza"]
    assert (
        np.abs(returned.encode_query(texts) - ReMatch(tmp_path / "m").encode_query(texts)).max()
        <= 1e-6
    )


def test_several_pictures_in_a_row_of_own_data(rematch, backbone_path, pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0]["query"] = {"text": "both", "image": ["red.png", "blue.png"]}
    pairs.write_text("\n".join(map(json.dumps, rows)))
    code, said = rematch("train", *small(backbone_path, tmp_path / "m", f"data.source={pairs}"))
    assert code == 0, said


def test_the_dataset_can_be_sent_to_workers_that_are_spawned():
    dataset = build_dataset(load_recipe(RECIPES / "picto.yaml"))
    assert pickle.loads(pickle.dumps(dataset))[0]["query"].keys() == dataset[0]["query"].keys()


def test_a_finished_model_is_not_overwritten(fails, backbone_path, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/precious").write_text("")
    assert "exists already" in fails("train", *small(backbone_path, tmp_path / "m"))


def test_options_out_of_range(fails):
    assert "Did you mean picto?" in fails("evaluate", "rematch-tiny", "--benchmark", "pikto")
    assert "Did you mean Picto-T2I or" in fails("evaluate", "rematch-tiny", "--tasks", "Picto-T2J")
    assert "--views raw is unknown" in fails(
        "evaluate", "rematch-tiny", "--rerank", "5", "--views", "raw"
    )
    assert "unknown; this version has: picto" in fails("data", "export", "coco", "x")


def test_the_packaged_recipe_is_valid():
    for path in RECIPES.glob("*.yaml"):
        assert load_recipe(path).train.steps == yaml.safe_load(path.read_text())["train"]["steps"]


def test_packaged_names_resolve():
    assert Path(resolve("rematch-base"), "config.json").exists()
    assert resolve("some/model") == "some/model"
    with pytest.raises(ModelError, match="Did you mean rematch-tiny"):
        resolve("rematch-tny")
