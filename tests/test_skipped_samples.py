"""Samples that cannot be used: they stop the run, or others take their place."""

import json
import shutil
from pathlib import Path

import pytest
from shared_training import small_recipe, step_logs, write_rows
from transformers.utils import logging

from rematch.errors import DataError, ImageError, TooLongError
from rematch.train.build import build_collator, build_model
from rematch.train.run import train
from rematch.train.sources import build_dataset
from rematch.train.trainer import Trainer


@pytest.fixture
def broken_data(tmp_path):
    """Twelve samples: the third has a broken picture, the fourth a missing one, the sixth is too
    long.
    """
    rows = [{"query": f"query {i}", "positive": f"document {i}"} for i in range(12)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[2]["positive"], rows[3]["positive"] = "broken.png", "missing.png"
    rows[5]["query"] = "a dog above a pizza " * 100
    return write_rows(tmp_path / "data.jsonl", rows)


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
    return small_recipe(backbone, output, data={"source": str(data)} | settings, train=changes)


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
    """Three steps of four samples: every sample once, and substitutes for three."""
    logging.get_logger("rematch").addHandler(caplog.handler)
    skip = {"unreadable": "skip", "too_long": "skip"}
    train(broken_recipe(short_backbone, tmp_path / "m", broken_data, **skip), quiet=True)
    lines = sorted((tmp_path / "m/skipped.txt").read_text().splitlines())
    assert {line.split(": ")[0].rpartition(", ")[2] for line in lines} == {
        "sample 3",
        "sample 4",
        "sample 6",
    }
    assert any("broken.png: not a picture" in line for line in lines)
    assert any("missing.png: no such picture" in line for line in lines)
    assert any("longer than the 128 tokens" in line for line in lines)
    assert step_logs(tmp_path / "m")[-1]["skipped"] == len(lines) == 3
    assert "skipped, another sample takes its place" in caplog.text


def test_what_another_process_skips_counts_too(short_backbone, tmp_path, broken_data, monkeypatch):
    """It appends to the same file; a sample that both have skipped counts once."""
    report = Trainer._report_skipped

    def report_of_two(trainer, skipped):
        report(trainer, skipped)
        if skipped:
            with (Path(trainer.args.output_dir) / "skipped.txt").open("a") as stream:
                stream.write(f"{skipped[0]}\nsample 99: of another process\n")

    monkeypatch.setattr(Trainer, "_report_skipped", report_of_two)
    skip = {"unreadable": "skip", "too_long": "skip"}
    train(broken_recipe(short_backbone, tmp_path / "m", broken_data, **skip), quiet=True)
    assert step_logs(tmp_path / "m")[-1]["skipped"] == 3 + 1


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
    write_rows(broken_data, [{"query": f"a {i}", "positive": "no.png"} for i in range(6)])
    rows = [build_dataset(settings)[i] for i in range(4)]
    with pytest.raises(DataError, match=r"sample \d: cannot be used, and neither can the samples"):
        build_collator(settings, model)(rows)


def test_a_substitute_is_not_a_sample_of_the_batch(short_backbone, tmp_path, broken_data):
    settings = broken_recipe(
        short_backbone, tmp_path / "m", broken_data, unreadable="skip", too_long="skip"
    )
    collator = build_collator(settings, build_model(settings))
    samples = sorted((build_dataset(settings)[i] for i in range(12)), key=lambda row: row["id"])
    broken = [row for row in samples if row["id"].endswith(("sample 3", "sample 4", "sample 6"))]
    usable = [row for row in samples if row not in broken]
    for row in broken:
        batch = collator([row, *usable[:8]])["batch"]
        assert batch.ids[0] == usable[8]["id"]
        assert batch.pictures is None  # nothing of the skipped sample remains
