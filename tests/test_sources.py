"""Sources: the order of their samples, validation, temperatures."""

from collections import Counter

import pytest
from shared_training import small_recipe, write_rows

from rematch.train.build import build_collator, build_loss, build_model
from rematch.train.plan import plan_samples
from rematch.train.sources import build_dataset, build_validation


def test_the_plan_draws_by_weight_and_uses_every_sample():
    order = plan_samples([10, 30], [3.0, 1.0], 100, 8, seed=1)
    counts = Counter(order[:, 0].tolist())
    assert 0.7 < counts[0] / 800 < 0.8
    first = order[order[:, 0] == 0, 1]
    epochs = [first[i : i + 10] for i in range(0, len(first) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert (order == plan_samples([10, 30], [3.0, 1.0], 100, 8, seed=1)).all()
    assert (order != plan_samples([10, 30], [3.0, 1.0], 100, 8, seed=2)).any()


def test_homogeneous_batches_come_from_one_source():
    order = plan_samples([20, 20], [1.0, 1.0], 50, 6, seed=0, homogeneous=True)
    sources = order[:, 0].reshape(50, 6)
    assert (sources == sources[:, :1]).all()
    assert set(sources[:, 0].tolist()) == {0, 1}


def test_sources_and_validation_do_not_overlap(tmp_path, backbone_path):
    for name in ("one", "two"):
        lines = [{"query": f"{name} {i}", "positive": f"answer {name} {i}"} for i in range(12)]
        write_rows(tmp_path / f"{name}.jsonl", lines)
    sources = [
        {"path": str(tmp_path / "one.jsonl"), "weight": 5},
        {"path": str(tmp_path / "two.jsonl")},
    ]
    settings = small_recipe(
        backbone_path, tmp_path / "m", data={"source": sources, "validation": 2}
    )
    training, validation = build_dataset(settings), build_validation(settings)
    trained, held_out = ({row["query"]["text"] for row in rows} for rows in (training, validation))
    assert held_out == {"one 10", "one 11", "two 10", "two 11"}
    assert not trained & held_out
    assert {file_of(row) for row in training} == {"one.jsonl", "two.jsonl"}


def file_of(row):
    """The name of the file that a row is from, or of the source."""
    return row["id"].rpartition("/")[2].partition(",")[0]


def test_a_source_can_have_its_own_temperature(tmp_path, backbone_path):
    rows = [{"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(8)]
    sources = [
        {"path": str(write_rows(tmp_path / "pairs.jsonl", rows)), "temperature": 0.1},
        {"path": "picto", "samples": 8},
    ]
    settings = small_recipe(
        backbone_path, tmp_path / "m", data={"source": sources}, loss={"learn_temperature": False}
    )
    rows = [build_dataset(settings)[i] for i in range(8)]
    temperatures = {file_of(row): row["temperature"] for row in rows}
    assert temperatures == {"pairs.jsonl": 0.1, "picto": 0.02}
    model = build_model(settings)
    batch = build_collator(settings, model)(rows)["batch"]
    assert batch.temperatures.tolist() == [row["temperature"] for row in rows]
    loss = build_loss(settings, model)
    value = loss([batch])["contrastive"].item()
    batch.temperatures = None
    assert loss([batch])["contrastive"].item() != pytest.approx(value, rel=1e-3)
    with pytest.raises(ValueError, match="has its own temperature"):
        small_recipe(
            backbone_path,
            tmp_path / "m",
            data={"source": sources},
            loss={"learn_temperature": True},
        )
