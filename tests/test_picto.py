"""Picto: equal scenes from equal seeds, held-out combinations, balanced answers, export to MMEB's
layouts.
"""

import json
import random
from collections import Counter
from importlib.resources import files

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rematch.data import picto
from rematch.data.mmeb import MARKER, load_mmeb_eval, load_mmeb_train
from rematch.data.mmeb_export import export_picto
from rematch.data.picto_tasks import (
    CANDIDATES,
    OOD_TASKS,
    TASKS,
    TRAINED_TASKS,
    evaluation_tasks,
    training_triplet,
)
from rematch.errors import DataError
from rematch.evaluate.summary import baselines


def test_scenes_and_pictures_follow_from_their_seeds():
    for augment in (False, True):
        scenes = [picto.sample_scene(random.Random(5)) for _ in range(2)]
        first, second = (picto.render(s, "noto", 7, augment=augment) for s in scenes)
        assert first.tobytes() == second.tobytes()
        assert first.size == (96, 96)
    assert (
        picto.render(scenes[0], "noto", 8).tobytes()
        != picto.render(scenes[0], "noto", 9).tobytes()
    )


def test_every_object_has_art_in_every_style():
    for style in (*picto.TRAIN_STYLES, picto.UNSEEN_STYLE):
        sprites = picto._sprites(style)
        assert list(sprites) == list(picto.objects())
        assert all(np.asarray(s)[..., 3].any() for s in sprites.values())
    assert 200 <= len(picto.objects()) <= 400


def test_the_art_is_small_and_its_licences_lie_beside_it():
    folder = files("rematch") / "assets/picto"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 6e6
    text = (folder / "LICENSES.md").read_text()
    assert all(
        word in text
        for word in (
            "Apache License 2.0",
            "CC-BY 4.0",
            "MIT",
            "noto.png",
            "twemoji.png",
            "fluent.png",
        )
    )


def test_training_and_test_combinations_are_apart():
    rng = random.Random(0)
    keys = {
        held_out: {tuple(sorted(set(s.objects))) for s in scenes if len(set(s.objects)) > 1}
        for held_out in (False, True)
        if (scenes := [picto.sample_scene(rng, held_out=held_out) for _ in range(3000)])
    }
    assert len(keys[True]) > 1000
    assert not keys[True] & keys[False]


def test_a_near_miss_differs_in_exactly_one_thing_and_stays_in_its_split():
    rng = random.Random(1)
    for held_out in (False, True):
        for _ in range(400):
            scene = picto.sample_scene(rng, held_out=held_out)
            other = picto.near_miss(scene, rng)
            assert picto.is_held_out(other) == held_out
            assert picto.caption(other) != picto.caption(scene)
            changed = [a != b for a, b in zip(scene.cells, other.cells, strict=True)]
            swapped = sum(changed) == 2 and Counter(scene.cells) == Counter(other.cells)
            assert (scene.background != other.background) + (sum(changed) == 1 or swapped) == 1


def test_captions_tell_scenes_apart():
    """Only the row or column of one or two objects is left open, so these are left out here."""
    rng = random.Random(2)
    scenes = {}
    for _ in range(4000):
        scene = picto.sample_scene(rng, count=rng.randint(3, 4))
        assert scenes.setdefault(picto.caption(scene), scene) == scene


def test_the_test_set_has_its_size_and_is_fixed():
    tasks, small = evaluation_tasks(), evaluation_tasks(queries=50)
    assert [t.name for t in tasks] == list(TASKS)
    assert {t.meta_task for t in tasks} == {"classification", "vqa", "retrieval", "grounding"}
    assert {t.name for t in tasks if t.ood} == set(OOD_TASKS)
    for task, again in zip(tasks, small, strict=True):
        assert len(task.queries) == len(task.candidates) == 200
        assert len(task.documents) <= 400
        assert all(len(set(c)) == len(c) == CANDIDATES for c in task.candidates)
        assert [q.text for q in task.queries[:50]] == [q.text for q in again.queries]
        assert task.candidates[:50] == again.candidates
        for candidates in task.candidates:  # no second positive
            assert len({task.documents[i].key for i in candidates}) == CANDIDATES
    [first], [second] = (evaluation_tasks(["Picto-Edit"], queries=50) for _ in range(2))
    assert first.candidates == second.candidates
    assert pictures([first]) == pictures([second])
    with pytest.raises(ValueError, match="blocks of 50"):
        evaluation_tasks(queries=60)
    with pytest.raises(ValueError, match="split='train': Picto has the splits test and"):
        evaluation_tasks(split="train")


def pictures(tasks):
    """The bytes of all pictures of some tasks."""
    items = [item for task in tasks for item in (*task.queries, *task.documents)]
    return [item.image.tobytes() for item in items if item.image is not None]


@pytest.mark.parametrize("unseen_style", [False, True])
def test_validation_and_test_have_the_same_shape_and_no_scene_in_common(unseen_style, monkeypatch):
    scenes = {"test": [], "validation": []}
    sample_scene, drawn = picto.sample_scene, []
    monkeypatch.setattr(
        picto,
        "sample_scene",
        lambda *args, **kwargs: drawn.append(sample_scene(*args, **kwargs)) or drawn[-1],
    )
    tasks = {}
    for split in scenes:
        drawn.clear()
        tasks[split] = evaluation_tasks(split=split, unseen_style=unseen_style, queries=50)
        scenes[split] = list(drawn)
        assert all(picto.is_held_out(scene) for scene in scenes[split])
    test, validation = tasks["test"], tasks["validation"]
    for a, b in zip(test, validation, strict=True):
        assert (a.name, a.meta_task, a.ood, a.unseen_style) == (
            b.name,
            b.meta_task,
            b.ood,
            b.unseen_style,
        )
        assert len(a.queries) == len(b.queries) == 50
    assert len(pictures(test)) > 500
    assert not set(pictures(test)) & set(pictures(validation))
    # scenes of one kind of object are few, and some of them come up in both by chance
    various = [{s for s in scenes[split] if len(set(s.objects)) > 2} for split in scenes]
    assert len(various[0]) > 500
    assert not various[0] & various[1]


def test_no_task_is_won_by_the_commonest_answer():
    tasks = evaluation_tasks(queries=100)
    floors = baselines([*tasks, *evaluation_tasks(unseen_style=True, queries=100)])
    assert floors["chance"]["overall"] == pytest.approx(1.0)
    assert floors["commonest"]["overall"] < 12
    for task in tasks:
        answers = Counter(task.documents[c[0]].key for c in task.candidates)
        share = answers.most_common(1)[0][1] / len(task.queries)
        assert share <= 1.05 / len(answers) or share <= 0.05, task.name


def test_queries_of_the_unseen_tasks_are_drawn_in_that_style_only(monkeypatch):
    styles = Counter()
    render = picto.render
    monkeypatch.setattr(
        picto,
        "render",
        lambda s, style, seed, augment=False: (
            styles.update([style]) or render(s, style, seed, augment=augment)
        ),
    )
    tasks = evaluation_tasks(unseen_style=True, queries=50)
    assert [task.name for task in tasks] == [f"{name}-Unseen" for name in TASKS]
    assert all(task.unseen_style for task in tasks)
    assert [task.ood for task in tasks] == [name in OOD_TASKS for name in TASKS]
    assert styles[picto.UNSEEN_STYLE] > 0
    assert (
        sum(styles[s] for s in picto.TRAIN_STYLES) == 100
    )  # the documents of the style-to-style task
    styles.clear()
    for i in range(200):
        training_triplet(0, i)
    assert set(styles) == set(picto.TRAIN_STYLES)


def test_eight_tasks_are_trained_and_four_are_not(monkeypatch):
    assert OOD_TASKS == ("Picto-Count", "Picto-AboveBelow", "Picto-HowMany", "Picto-Style")
    assert len(TRAINED_TASKS) == 8
    assert {*TRAINED_TASKS, *OOD_TASKS} == set(TASKS)
    made = Counter()

    def counted(name, generate):
        return lambda draw: made.update([name]) or generate(draw)

    monkeypatch.setattr(
        "rematch.data.picto_tasks.TASKS",
        {name: (meta, counted(name, generate)) for name, (meta, generate) in TASKS.items()},
    )
    for i in range(400):
        training_triplet(0, i)
    assert set(made) == set(TRAINED_TASKS)
    assert min(made.values()) > 25
    for name in OOD_TASKS:
        training_triplet(0, 0, name)
    assert set(OOD_TASKS) < set(made)


def test_training_triplets_follow_from_seed_and_index():
    a, b = training_triplet(3, 4), training_triplet(3, 4)
    assert a.query.text == b.query.text
    assert a.negative is not None
    assert training_triplet(3, 5).query != a.query


def test_export_in_mmeb_eval_layout_loads_as_the_same_test_set(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rematch.data.picto_tasks.TASKS", {n: TASKS[n] for n in ("Picto-Count", "Picto-T2I")}
    )
    export_picto(tmp_path / "eval", "mmeb-eval", queries=150)
    table = pq.read_table(tmp_path / "eval/Picto-T2I/test-00000-of-00001.parquet").to_pylist()
    assert list(table[0]) == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
    assert len(table) == 150
    assert table[0]["qry_img_path"] == ""
    assert table[0]["tgt_img_path"][0].startswith("images/")
    assert table[0]["tgt_text"][0] == f"{MARKER}\nRepresent the given image."
    count = pq.read_table(tmp_path / "eval/Picto-Count/test-00000-of-00001.parquet").to_pylist()
    assert count[0]["qry_text"].startswith(MARKER)
    assert count[0]["tgt_img_path"] == [""] * 100
    tasks = [
        task
        for unseen_style in (False, True)
        for task in evaluation_tasks(unseen_style=unseen_style, queries=150)
    ]
    for task, loaded in zip(tasks, load_mmeb_eval(tmp_path / "eval")[0], strict=True):
        for field in ("name", "meta_task", "ood", "unseen_style"):
            assert getattr(task, field) == getattr(loaded, field)
        for i in (0, 123):
            assert task.queries[i].as_input().get("text") == loaded.queries[i].as_input().get(
                "text"
            )
            document, exported = (t.documents[t.candidates[i][0]] for t in (task, loaded))
            for instruction in (True, False):
                text, exported_text = (
                    d.as_input(instruction).get("text") for d in (document, exported)
                )
                assert text == exported_text
            if document.image is not None:
                assert Image.open(exported.image).tobytes() == document.image.tobytes()


def test_export_in_mmeb_train_layout_loads_as_the_same_samples(tmp_path):
    samples = 40
    export_picto(tmp_path / "train", "mmeb-train", samples=samples)
    table = pq.read_table(
        tmp_path / "train/Picto_Edit/original-00000-of-00001.parquet"
    ).to_pylist()
    assert list(table[0]) == [
        "qry",
        "qry_image_path",
        "pos_text",
        "pos_image_path",
        "neg_text",
        "neg_image_path",
    ]
    assert [len(config) for config in load_mmeb_train(tmp_path / "train")] == [samples] * 8
    names = [name.replace("_", "-") for name in sorted(n.replace("-", "_") for n in TRAINED_TASKS)]
    triplets = [training_triplet(0, i, name) for name in names for i in range(samples)]
    loaded = [triplet for config in load_mmeb_train(tmp_path / "train") for triplet in config]
    for triplet, exported in zip(triplets, loaded, strict=True):
        for column in ("query", "positive", "negative"):
            a, b = getattr(triplet, column), getattr(exported, column)
            assert a.as_input().get("text") == b.as_input().get("text")
            assert (a.image is None) == (b.image is None)
            assert a.image is None or Image.open(b.image).tobytes() == a.image.tobytes()
    with pytest.raises(DataError, match="exists already"):
        export_picto(tmp_path / "train", "mmeb-train")
    with pytest.raises(DataError, match="mmeb-train, mmeb-eval or mmeb-v2"):
        export_picto(tmp_path / "other", "coco")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train"]


def test_objects_file_is_consistent():
    rows = json.loads((files("rematch") / "assets/picto/objects.json").read_text())
    assert len({r["name"] for r in rows}) == len(rows)
    assert {r["article"] for r in rows} == {"a", "an", "some"}
