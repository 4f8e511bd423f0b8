"""Training on several of MMEB's data sets: weights, caps and missing hard negatives."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shared_benchmarks import train_tree, write_parquet

from rematch.errors import DataError
from rematch.train.recipe import load_recipe
from rematch.train.sources import build_dataset

ROOT = Path(__file__).parents[1]
SAME_ROW = {"qry": "one?", "qry_image_path": "", "pos_text": "yes", "pos_image_path": ""}


def test_training_samples_each_data_set_by_its_weight_and_cap(tmp_path, backbone_path):
    train_tree(tmp_path)

    def sampled_queries(seed):
        sources = [
            {"path": str(tmp_path / "OK-VQA"), "weight": 3, "samples": 4},
            {"path": str(tmp_path / "WebQA"), "weight": 1},
        ]
        recipe = load_recipe(
            ROOT / "recipes/picto.yaml",
            [
                f"data.source={json.dumps(sources)}",
                "train.steps=40",
                "train.batch_size=5",
                f"train.seed={seed}",
            ],
        )
        rows = build_dataset(recipe)[:]
        return [row["text"] for row in rows["query"]]

    texts = sampled_queries(0)
    vqa = [t for t in texts if t.startswith("what?")]
    assert len(set(vqa)) == 4, "the cap"
    assert 0.65 < len(vqa) / len(texts) < 0.85, "the weight"
    assert texts == sampled_queries(0)
    assert texts != sampled_queries(1)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_data_set_without_hard_negatives_lends_other_samples_documents(tmp_path, homogeneous):
    train_tree(tmp_path)
    file = tmp_path / "WebQA" / "original-00000-of-00001.parquet"
    wide = pq.read_table(file).to_pylist()
    write_parquet(file, [row | {"neg_text": "wrong"} for row in wide])
    settings = [
        f"data.source={tmp_path}",
        f"data.homogeneous={json.dumps(homogeneous)}",
        "train.batch_size=4",
    ]
    rows = build_dataset(load_recipe(ROOT / "recipes/picto.yaml", [*settings, "train.steps=9"]))[:]
    sources = set()
    for positive, negative in zip(rows["positive"], rows["negative"], strict=True):
        of_webqa = "image" in positive
        sources.add(of_webqa)
        if of_webqa:
            assert negative["text"].endswith("wrong")
        else:
            assert negative["text"].startswith("Represent the answer: a")
            assert negative != positive
    assert sources == {True, False}
    again = build_dataset(load_recipe(ROOT / "recipes/picto.yaml", [*settings, "train.steps=9"]))[
        :
    ]
    assert again["negative"] == rows["negative"]
    write_parquet(
        file,
        [row | {"neg_text": "", "pos_text": "same"} for row in wide[:-1]]
        + [wide[-1] | {"neg_text": "x"}],
    )
    write_parquet(tmp_path / "OK-VQA" / "original-00000-of-00001.parquet", [SAME_ROW] * 6)
    with pytest.raises(DataError, match="has no hard negative, and none of 64 other samples"):
        build_dataset(load_recipe(ROOT / "recipes/picto.yaml", [*settings, "train.steps=9"]))[:]
