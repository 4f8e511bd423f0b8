"""Every recipe that ships is valid and trains."""

import json
from pathlib import Path

import pytest

from rematch.train.recipe import load_recipe
from rematch.train.run import train

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_for_two_steps(path, backbone_path, tmp_path):
    small = [
        f"model.backbone={backbone_path}",
        "data.source=picto",
        f"train.output={tmp_path / 'model'}",
        "train.steps=2",
        "train.batch_size=4",
        "train.save_every=0",
        "train.log_every=1",
        "train.workers=0",
        "model.max_pixels=null",  # the tiny backbone scales pictures to one size
    ]
    train(load_recipe(path, small), quiet=True)
    log = json.loads((tmp_path / "model" / "log.json").read_text())
    logged = [row for row in log if "loss" in row]
    assert len(logged) == 2
    recipe = load_recipe(path)
    assert ("matching" in logged[0]) == (recipe.loss.w_qdm > 0)
    assert ("orthogonality" in logged[0]) == (recipe.loss.w_orth > 0)
