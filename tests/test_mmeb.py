"""MMEB in its three layouts with their odd cases, and what is said of missing data."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from shared_benchmarks import ODD, eval_tree, odd_pictures, train_tree, write_parquet

from rematch.data.images import ZippedPicture, load_image
from rematch.data.mmeb import MARKER, data_set_of, load_mmeb_eval, load_mmeb_train
from rematch.data.mmeb_table import DATA_SETS
from rematch.errors import DataError
from rematch.evaluate.benchmarks import load_benchmark
from rematch.evaluate.report import reference_scores

ROOT = Path(__file__).parents[1]


def test_the_table_is_mmebs():
    published = reference_scores()
    assert [d.name for d in DATA_SETS]
    assert len(DATA_SETS) == 36
    for meta, names in published["meta_tasks"].items():
        assert {d.name for d in DATA_SETS if d.meta_task == meta} == set(names)
    assert {d.name for d in DATA_SETS if d.ood} == set(published["out_of_distribution"])
    shared = ROOT.parent / "shared" / "mmeb_reference_scores.json"
    assert not shared.exists() or published == json.loads(shared.read_text())


def test_both_layouts_of_the_test_sets_give_the_same_inputs(tmp_path):
    eval_tree(tmp_path / "eval")
    eval_tree(tmp_path / "instruct", instruct=True)
    (tmp_path / "eval" / "CIFAR-100").mkdir()
    write_parquet(tmp_path / "eval" / "CIFAR-100" / "test-0.parquet", [{"qry_text": ""}])
    tasks, missing = load_mmeb_eval(tmp_path / "eval")
    instruct_tasks, _ = load_mmeb_eval(tmp_path / "instruct")
    assert not missing
    assert [t.name for t in tasks] == [d.name for d in DATA_SETS]
    for a, b in zip(tasks, instruct_tasks, strict=True):
        for items, instruct_items in ((a.queries, b.queries), (a.documents, b.documents)):
            for x, y in zip(items, instruct_items, strict=True):
                assert MARKER not in x.instruction + x.text
                for instruction in (True, False):
                    first, second = x.as_input(instruction), y.as_input(instruction)
                    assert (
                        first.get("text", "").strip() == second.get("text", "").strip()
                        or x in a.queries
                    )
                    assert Path(first.get("image", "")).name == Path(second.get("image", "")).name
    by_name = {t.name: t for t in tasks}
    webqa = by_name["WebQA"].queries[0]
    assert webqa.image is None
    assert webqa.text.startswith("Represent the given image with")
    matching = by_name["RefCOCO-Matching"]
    assert len(matching.candidates[0]) == 2, "the same picture and text are the same candidate"
    assert matching.documents[0].as_input(False)["text"] == "the left one"
    assert by_name["OK-VQA"].documents[0].as_input()["text"] == "Represent the answer: answer 0"
    assert by_name["OK-VQA"].documents[0].as_input(False) == {"text": "answer 0"}
    assert "text" not in by_name["MSCOCO"].documents[0].as_input(False)


def test_odd_pictures_load(tmp_path):
    odd_pictures(tmp_path / "odd")
    pictures = {name: load_image(tmp_path / "odd" / name) for name in ODD}
    assert all(picture.mode == "RGB" for picture in pictures.values())
    assert pictures["rotated.jpg"].size == (32, 40)
    assert pictures["transparent.png"].getpixel((0, 0)) == (255, 255, 255)
    assert pictures["animated.gif"].getpixel((0, 0))[0] > 200
    assert pictures["narrow.png"].size == (56, 56), "MMEB's rule for sides under 28 pixels"


@pytest.mark.parametrize("prefix", ["images/", ""])
@pytest.mark.parametrize("place", ["images.zip", "images_zip/Odd.zip"])
def test_pictures_are_loaded_from_zip_archives(tmp_path, prefix, place):
    eval_tree(tmp_path, names={"MSCOCO", "OK-VQA"})
    unpacked, _ = load_mmeb_eval(tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(tmp_path / place, "w") as archive:
        for file in sorted((tmp_path / "images" / "Odd").iterdir()):
            archive.write(file, f"{prefix}Odd/{file.name}")
    shutil.rmtree(tmp_path / "images")
    zipped, missing = load_mmeb_eval(tmp_path)
    assert not missing
    for a, b in zip(unpacked, zipped, strict=True):
        for x, y in zip(a.documents, b.documents, strict=True):
            assert x.key == y.key
            assert (x.image is None) == (y.image is None)
            assert x.image is None or isinstance(y.image, ZippedPicture)
    assert load_image(zipped[1].documents[0].image).mode == "RGB"
    (tmp_path / place).write_bytes(b"PK\x03\x04 torn")
    tasks, missing = load_mmeb_eval(tmp_path)
    assert not tasks
    assert set(missing) == {"MSCOCO", "OK-VQA"}
    assert "not a complete zip archive" in missing["MSCOCO"]


def test_training_data_is_loaded_with_its_odd_cases(tmp_path):
    train_tree(tmp_path)
    vqa, webqa = load_mmeb_train(tmp_path)
    assert [len(vqa), len(webqa)] == [6, 6]
    assert vqa[0].negative is None
    assert webqa[0].negative is None
    assert vqa[0].query.text == "what? 0"
    assert vqa[0].positive.as_input()["text"] == "Represent the answer: a0"
    assert webqa[0].query.image is None
    assert webqa[0].query.text.startswith("Find a Wikipedia")
    assert webqa[0].positive.as_input(False)["text"] == "t0"
    (diverse,) = load_mmeb_train(tmp_path, "diverse_instruction")
    assert diverse[0].query.text == "In the image, what? 0"
    assert [len(config) for config in load_mmeb_train(tmp_path / "WebQA")] == [6], (
        "the folder of a single config"
    )
    assert data_set_of("ImageNet_1K").name == "ImageNet-1K"


def test_missing_data_is_named_or_left_out(tmp_path):
    eval_tree(tmp_path / "mmeb")
    shutil.rmtree(tmp_path / "mmeb" / "GQA")
    (tmp_path / "mmeb/images/Odd/palette.png").unlink()
    with pytest.raises(DataError, match=r"cannot be loaded: .*--tasks.*--skip-missing"):
        load_benchmark("mmeb", tmp_path / "mmeb")
    benchmark = load_benchmark("mmeb", tmp_path / "mmeb", skip_missing=True)
    assert "no GQA/test-" in benchmark.left_out["GQA"]
    assert "names the picture Odd/palette.png" in benchmark.left_out["CIRR"]
    assert len(benchmark.tasks) + len(benchmark.left_out) == 36
    name = benchmark.tasks[0].name
    assert [t.name for t in load_benchmark("mmeb", tmp_path / "mmeb", [name]).tasks] == [name]
    with pytest.raises(
        DataError, match=r"--tasks HatefulMeme: no such task\. Did you mean HatefulMemes"
    ):
        load_benchmark("mmeb", tmp_path / "mmeb", ["HatefulMeme"])
    with pytest.raises(DataError, match="no <config>/test-"):
        load_benchmark("mmeb", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_benchmark("mmeb", tmp_path / "nowhere")
    with pytest.raises(DataError, match="Did you mean mmeb"):
        load_benchmark("mmebs", tmp_path)
    write_parquet(tmp_path / "wrong" / "GQA" / "test-0.parquet", [{"question": "?"}])
    with pytest.raises(DataError, match="has no column qry_text"):
        load_benchmark("mmeb", tmp_path / "wrong", ["GQA"])


def test_broken_sets_are_left_out_each_with_its_reason(tmp_path):
    names = ["VOC2007", "OK-VQA", "GQA"]
    eval_tree(tmp_path, names)
    (tmp_path / "VOC2007/test-00001.parquet").write_bytes(b"torn")
    (tmp_path / "images/Odd/palette.png").unlink()  # of VOC2007's whole file; not of OK-VQA
    (tmp_path / "GQA/test-00000-of-00001.parquet").write_bytes(b"torn")
    for name in ("mmeb", "mmeb-v2"):
        with pytest.raises(DataError, match=r"VOC2007 cannot be loaded: .*00001\.parquet"):
            load_benchmark(name, tmp_path, names)
        benchmark = load_benchmark(name, tmp_path, names, skip_missing=True)
        assert [task.name for task in benchmark.tasks] == ["OK-VQA"]
        assert "VOC2007/test-00001.parquet: cannot be read" in benchmark.left_out["VOC2007"]
        assert "GQA/test-00000-of-00001.parquet: cannot be read" in benchmark.left_out["GQA"]


def test_mmeb_comes_from_the_hub_without_a_folder(tmp_path, monkeypatch):
    import huggingface_hub

    eval_tree(tmp_path)
    arguments = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: arguments.update(kw, name=name) or tmp_path,
    )
    assert len(load_benchmark("mmeb", tasks=["GQA"]).tasks) == 1
    assert arguments["name"] == "TIGER-Lab/MMEB-eval"
    assert "GQA/test-*" in arguments["allow_patterns"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match=r"cannot be downloaded from the hub.*--data"):
        load_benchmark("mmeb")
