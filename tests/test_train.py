"""A training run: its log, its model card, its workers, and what stops it."""

import json
import multiprocessing
import shutil
import threading

import pytest
import torch
import yaml
from shared_training import small_recipe, step_logs, write_rows
from transformers import TrainerCallback

from rematch import ReMatch
from rematch.errors import RecipeError, RematchError, TrainingError
from rematch.train.build import build_model
from rematch.train.recipe import Recipe
from rematch.train.run import train


def test_deepspeed_is_refused(backbone_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch sets it
    with pytest.raises(RecipeError, match=r"several.*fsdp2\.yaml"):
        train(small_recipe(backbone_path, tmp_path / "model"), quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_names_step_and_samples(backbone_path, tmp_path):
    settings = small_recipe(
        backbone_path,
        tmp_path / "model",
        train={"save_every": 0, "steps": 6, "report_to": ["tensorboard"]},
    )
    # no recipe may say so
    settings.train = settings.train.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"step [2-6]: the loss is .*picto, sample \d+"):
        train(settings, quiet=True)
    assert not list(tmp_path.iterdir())
    # nor does TensorBoard go on writing there
    assert "_AsyncWriterThread" not in {type(t).__name__ for t in threading.enumerate()}


def test_validation_chooses_the_checkpoint_and_the_card_tells_the_small_recipe(
    backbone_path, tmp_path
):
    output = tmp_path / "model"
    train(
        small_recipe(backbone_path, output, data={"validation": 8}, train={"steps": 4}), quiet=True
    )
    history = json.loads((output / "log.json").read_text())
    assert [row["step"] for row in history if "eval_loss" in row] == [2, 4]
    assert {
        "token_cosine",
        "samples_per_second",
        "tokens_per_second",
        "grad_norm",
        "contrastive",
    } <= step_logs(output)[-1].keys()
    card = (output / "README.md").read_text()
    assert "steps: 4" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card


def test_the_card_has_the_recipe_as_plain_yaml(backbone_path, tmp_path):
    output = tmp_path / "model"
    settings = small_recipe(
        backbone_path,
        output,
        loss={"matching": "reuse", "views": ["raw-raw", "feat-raw"]},
        train={"steps": 1, "save_every": 0},
    )
    train(settings, quiet=True)
    text = (output / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    assert "matching: reuse\n" in text
    assert "- feat-raw\n" in text
    assert Recipe.model_validate(yaml.safe_load(text)) == settings


def test_a_joint_model_is_trained_and_loaded(backbone_path, tmp_path):
    output = tmp_path / "model"
    changes = {"steps": 2, "save_every": 0}
    trained = train(
        small_recipe(backbone_path, output, loss={"joint": True}, train=changes), quiet=True
    )
    loaded = ReMatch(output)
    assert trained.backbone.joint
    assert loaded.backbone.joint
    pair = ["a dog"], ["a cat"]
    joint = loaded.match(*pair)
    assert joint == pytest.approx(trained.match(*pair), abs=1e-6)
    loaded.backbone.set_matching("unified")
    assert abs(loaded.match(*pair) - joint) > 1e-4


def test_the_seed_decides_how_learnable_tokens_start(backbone_path, tmp_path):
    def rows(seed):
        changes = {"model": {"token_init": "last"}, "train": {"seed": seed}}
        model = build_model(small_recipe(backbone_path, tmp_path, **changes))
        return model.backbone.model.get_input_embeddings().weight

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_a_trained_model_is_trained_further(saved_model, tmp_path):
    first = ReMatch(str(saved_model), model_kwargs={"dtype": torch.float32})
    recipe = small_recipe(
        saved_model,
        tmp_path / "further",
        model={"num_tokens": 4, "lora": None},
        train={"save_every": 0, "learning_rate": 1e-3},
    )
    start = build_model(recipe)
    for name, weight in first.state_dict().items():
        assert torch.equal(start.state_dict()[name], weight), name
    train(recipe, quiet=True)
    further = ReMatch(tmp_path / "further")
    tokens = first.backbone.reader.learnable_ids("query")
    rows, rows_before = (
        model.backbone.model.get_input_embeddings().weight[tokens] for model in (further, first)
    )
    assert not torch.equal(rows, rows_before)
    assert not torch.equal(further.fusion.projector(rows), first.fusion.projector(rows))


def test_an_adapter_on_a_trained_model_is_trained_and_loaded(saved_model, tmp_path):
    settings = {
        "model": {"num_tokens": 4, "lora": {"r": 2}},
        "train": {"steps": 2, "save_every": 0},
    }
    trained = train(small_recipe(saved_model, tmp_path / "adapter", **settings), quiet=True)
    loaded = ReMatch(tmp_path / "adapter")
    assert loaded.backbone.base_name == str(saved_model)
    pair = ["a dog"], ["a cat"]
    for view in ("raw-raw", "feat-feat"):
        assert loaded.match(*pair, view) == pytest.approx(trained.match(*pair, view), abs=1e-6)
    with pytest.raises(RecipeError, match=r"has a LoRA adapter.*merge_lora\(\)"):
        build_model(small_recipe(tmp_path / "adapter", tmp_path / "more", **settings))
    loaded.merge_lora().save_pretrained(str(tmp_path / "merged"))
    build_model(small_recipe(tmp_path / "merged", tmp_path / "more", **settings))


def test_a_trained_model_keeps_its_number_of_tokens(saved_model, tmp_path):
    with pytest.raises(RecipeError, match=r"trained with 4 learnable.*Give model\.num_tokens=4"):
        build_model(small_recipe(saved_model, tmp_path / "more"))


@pytest.mark.parametrize("content", ["", "5", "[5]", '{"type": 5}', "[{}]"])
def test_a_damaged_list_of_modules_is_refused(saved_model, tmp_path, content):
    model = shutil.copytree(saved_model, tmp_path / "damaged")
    (model / "modules.json").write_text(content)
    with pytest.raises(RematchError, match=r"modules\.json"):
        build_model(small_recipe(model, tmp_path / "more"))


def test_validation_needs_checkpoints(backbone_path, tmp_path):
    with pytest.raises(ValueError, match="save_every"):
        small_recipe(backbone_path, tmp_path, data={"validation": 4}, train={"save_every": 0})


def test_evaluation_leaves_no_workers_behind_and_skips_are_named_once(backbone_path, tmp_path):
    rows = [{"query": f"query {i}", "positive": f"document {i}"} for i in range(12)]
    rows[10]["positive"] = "missing.png"
    data = {
        "source": str(write_rows(tmp_path / "data.jsonl", rows)),
        "validation": 4,
        "unreadable": "skip",
    }
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts.append(len(multiprocessing.active_children()))

    changes = {"steps": 5, "save_every": 1, "batch_size": 4, "workers": 1}
    train(
        small_recipe(backbone_path, tmp_path / "m", data=data, train=changes),
        (Count(),),
        quiet=True,
    )
    assert max(counts) == 1
    (line,) = (tmp_path / "m/skipped.txt").read_text().splitlines()
    assert line.startswith(f"{tmp_path / 'data.jsonl'}, sample 11: ")
