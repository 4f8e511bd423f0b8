"""MMEB's three layouts with their odd cases, the zero-shot five, own data: what is read, and what
is said of errors.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rematch.data.images import Zipped, load_image
from rematch.data.mmeb import MARKER, data_set, read_eval, read_train
from rematch.data.mmeb_export import export_picto
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.own import read_own
from rematch.data.zeroshot import SPLITS, read_zeroshot
from rematch.errors import DataError, ImageError, ModelError
from rematch.evaluate.benchmarks import load_benchmark
from rematch.evaluate.command import EvaluateOptions, load_model
from rematch.evaluate.report import reference_scores
from rematch.train.recipe import load_recipe
from rematch.train.sources import build_dataset

ROOT = Path(__file__).parents[1]
_trees: dict[str, Path] = {}


def picto_tree(path, layout="mmeb-eval"):
    """Picto exported once in a test run, and linked from then on."""
    if layout not in _trees:
        export_picto(path, layout, samples=6)
        _trees[layout] = path
    elif not path.exists():
        path.symlink_to(_trees[layout])


def odd_pictures(folder):
    """One picture of each kind that loaders trip over; the name says which."""
    folder.mkdir(parents=True)
    base = Image.effect_mandelbrot((40, 32), (-2, -1.5, 1, 1.5), 50)
    base.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.convert("RGB").save(folder / "rotated.jpg", exif=exif)
    Image.new("RGBA", (40, 32), (255, 0, 0, 0)).save(folder / "transparent.png")
    base.convert("P").save(folder / "palette.png")
    frames = [Image.new("RGB", (40, 32), c) for c in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    base.convert("RGB").resize((10, 40)).save(folder / "narrow.png")
    (folder / "._cmyk.jpg").write_bytes(b"resource fork")


ODD = ("cmyk.jpg", "rotated.jpg", "transparent.png", "palette.png", "animated.gif", "narrow.png")


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    (path.parent / f"._{path.name}").write_bytes(b"resource fork")


def eval_tree(root, names=None, apart=False):
    """MMEB-eval (or, with the instructions ``apart``, MMEB_Test_Instruct) in small: two queries of
    each data set.
    """
    odd_pictures(root / "images" / "Odd")
    for number, data in enumerate(DATA_SETS):
        if names and data.name not in names:
            continue
        rows = []
        for i in range(2):
            query_image = "" if data.identity == "image" else f"Odd/{ODD[(number + i) % len(ODD)]}"
            asked, text = (
                "Represent the given image with the following question: ",
                f"what is {i}?",
            )
            texts, paths = [f"answer {(i + j) % 4}" for j in range(3)], [""] * 3
            told, own = "", texts
            if data.identity != "text":
                paths = [f"Odd/{ODD[(i + j) % len(ODD)]}" for j in range(3)]
                told, own = "Represent the given image.", [""] * 3
            if data.name == "RefCOCO-Matching":
                told = "Select the portion of the image that follows the language expressions: "
                own, paths = [f"the {w} one" for w in ("left", "right", "left")], [paths[0]] * 3
            if apart:
                marked = f"{MARKER}\n{asked}" if query_image else asked
                row = {"qry_inst": marked, "qry_text": text, "qry_img_path": query_image}
                row |= {
                    "tgt_inst": f"{MARKER}\n{told}" if told else "",
                    "tgt_text": own,
                    "tgt_img_path": paths,
                }
            else:
                # WebQA has the marker without a picture
                marker = f"{MARKER}\n" if query_image or data.name == "WebQA" else ""
                shown = [f"{MARKER}\n{told}{t}" for t in own] if told else own
                row = {"qry_text": f"{marker}{asked}{text}\n", "qry_img_path": query_image}
                row |= {"tgt_text": shown, "tgt_img_path": paths}
            rows.append(row)
        parquet(root / data.name / "test-00000-of-00001.parquet", rows)


def test_the_table_is_mmebs():
    known = reference_scores()
    assert [d.name for d in DATA_SETS]
    assert len(DATA_SETS) == 36
    for meta, names in known["meta_tasks"].items():
        assert {d.name for d in DATA_SETS if d.meta_task == meta} == set(names)
    assert {d.name for d in DATA_SETS if d.ood} == set(known["out_of_distribution"])
    shared = ROOT.parent / "shared" / "mmeb_reference_scores.json"
    assert not shared.exists() or known == json.loads(shared.read_text())


def test_both_layouts_of_the_test_sets_give_the_same_inputs(tmp_path):
    eval_tree(tmp_path / "eval")
    eval_tree(tmp_path / "instruct", apart=True)
    (tmp_path / "eval" / "CIFAR-100").mkdir()
    parquet(tmp_path / "eval" / "CIFAR-100" / "test-0.parquet", [{"qry_text": ""}])
    (one, none), (other, _) = read_eval(tmp_path / "eval"), read_eval(tmp_path / "instruct")
    assert not none
    assert [t.name for t in one] == [d.name for d in DATA_SETS]
    for a, b in zip(one, other, strict=True):
        for mine, theirs in ((a.queries, b.queries), (a.documents, b.documents)):
            for x, y in zip(mine, theirs, strict=True):
                assert MARKER not in x.instruction + x.text
                for instruction in (True, False):
                    first, second = x.as_input(instruction), y.as_input(instruction)
                    assert (
                        first.get("text", "").strip() == second.get("text", "").strip()
                        or x in a.queries
                    )
                    assert Path(first.get("image", "")).name == Path(second.get("image", "")).name
    by_name = {t.name: t for t in one}
    webqa = by_name["WebQA"].queries[0]
    assert webqa.image is None
    assert webqa.text.startswith("Represent the given image with")
    matching = by_name["RefCOCO-Matching"]
    assert len(matching.candidates[0]) == 2, "one picture and text twice is one candidate"
    assert matching.documents[0].as_input(False)["text"] == "the left one"
    assert by_name["OK-VQA"].documents[0].as_input()["text"] == "Represent the answer: answer 0"
    assert by_name["OK-VQA"].documents[0].as_input(False) == {"text": "answer 0"}
    assert "text" not in by_name["MSCOCO"].documents[0].as_input(False)


def test_odd_pictures_load(tmp_path):
    odd_pictures(tmp_path / "odd")
    found = {name: load_image(tmp_path / "odd" / name) for name in ODD}
    assert all(picture.mode == "RGB" for picture in found.values())
    assert found["rotated.jpg"].size == (32, 40)
    assert found["transparent.png"].getpixel((0, 0)) == (255, 255, 255)
    assert found["animated.gif"].getpixel((0, 0))[0] > 200
    assert found["narrow.png"].size == (56, 56), "MMEB's rule for sides under 28 pixels"


@pytest.mark.parametrize("prefix", ["images/", ""])
@pytest.mark.parametrize("place", ["images.zip", "images_zip/Odd.zip"])
def test_pictures_are_read_from_zip_archives(tmp_path, prefix, place):
    eval_tree(tmp_path, names={"MSCOCO", "OK-VQA"})
    unpacked, _ = read_eval(tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(tmp_path / place, "w") as archive:
        for file in sorted((tmp_path / "images" / "Odd").iterdir()):
            archive.write(file, f"{prefix}Odd/{file.name}")
    shutil.rmtree(tmp_path / "images")
    zipped, missing = read_eval(tmp_path)
    assert not missing
    for a, b in zip(unpacked, zipped, strict=True):
        for x, y in zip(a.documents, b.documents, strict=True):
            assert x.key == y.key
            assert (x.image is None) == (y.image is None)
            assert x.image is None or isinstance(y.image, Zipped)
    assert load_image(zipped[1].documents[0].image).mode == "RGB"
    (tmp_path / place).write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ImageError, match=r"no whole zip archive.*Download it again"):
        read_eval(tmp_path)


def train_tree(root):
    odd_pictures(root / "images" / "Odd")
    plain = [
        {
            "qry": f"{MARKER}\nwhat? {i}\n",
            "qry_image_path": f"images/Odd/{ODD[i]}",
            "pos_text": f"a{i}",
            "pos_image_path": "",
        }
        for i in range(6)
    ]
    parquet(root / "OK-VQA" / "original-00000-of-00001.parquet", plain)
    other = [row | {"qry": f"{MARKER}\ntell me: what? {i}\n"} for i, row in enumerate(plain)]
    parquet(root / "OK-VQA" / "diverse_instruction-00000-of-00001.parquet", other)
    wide = [
        {
            "qry": f"{MARKER}\nFind a Wikipedia image that answers this question: {i}?\n",
            "qry_image_path": "",
            "pos_text": f"{MARKER}\nRepresent the given Wikipedia image with related text information: t{i}",
            "pos_image_path": f"images/Odd/{ODD[i]}",
            "neg_text": "",
            "neg_image_path": "",
        }
        for i in range(6)
    ]
    parquet(root / "WebQA" / "original-00000-of-00001.parquet", wide)


def test_training_data_is_read_with_its_odd_cases(tmp_path):
    train_tree(tmp_path)
    vqa, webqa = read_train(tmp_path)
    assert [len(vqa), len(webqa)] == [6, 6]
    assert vqa[0].negative is None
    assert webqa[0].negative is None
    assert vqa[0].query.text == "what? 0"
    assert vqa[0].positive.as_input()["text"] == "Represent the answer: a0"
    assert webqa[0].query.image is None
    assert webqa[0].query.text.startswith("Find a Wikipedia")
    assert webqa[0].positive.as_input(False)["text"] == "t0"
    (diverse,) = read_train(tmp_path, "diverse_instruction")
    assert diverse[0].query.text == "tell me: what? 0"
    assert [len(config) for config in read_train(tmp_path / "WebQA")] == [6], (
        "one config's own folder"
    )
    assert data_set("ImageNet_1K").name == "ImageNet-1K"


def test_training_draws_each_data_set_by_its_weight_and_cap(tmp_path, backbone_path):
    train_tree(tmp_path)

    def drawn(seed):
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

    texts = drawn(0)
    vqa = [t for t in texts if t.startswith("what?")]
    assert len(set(vqa)) == 4, "the cap"
    assert 0.65 < len(vqa) / len(texts) < 0.85, "the weight"
    assert texts == drawn(0)
    assert texts != drawn(1)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_data_set_without_hard_negatives_lends_other_samples_documents(tmp_path, homogeneous):
    train_tree(tmp_path)
    file = tmp_path / "WebQA" / "original-00000-of-00001.parquet"
    wide = pq.read_table(file).to_pylist()
    parquet(file, [row | {"neg_text": "wrong"} for row in wide])
    settings = [
        f"data.source={tmp_path}",
        f"data.homogeneous={json.dumps(homogeneous)}",
        "train.batch_size=4",
    ]
    rows = build_dataset(load_recipe(ROOT / "recipes/picto.yaml", [*settings, "train.steps=9"]))[:]
    seen = set()
    for positive, negative in zip(rows["positive"], rows["negative"], strict=True):
        of_webqa = "image" in positive
        seen.add(of_webqa)
        if of_webqa:
            assert negative["text"].endswith("wrong")
        else:
            assert negative["text"].startswith("Represent the answer: a")
            assert negative != positive
    assert seen == {True, False}
    again = build_dataset(load_recipe(ROOT / "recipes/picto.yaml", [*settings, "train.steps=9"]))[
        :
    ]
    assert again["negative"] == rows["negative"]
    parquet(
        file,
        [row | {"neg_text": "", "pos_text": "same"} for row in wide[:-1]]
        + [wide[-1] | {"neg_text": "x"}],
    )
    parquet(tmp_path / "OK-VQA" / "original-00000-of-00001.parquet", [ALIKE] * 6)
    with pytest.raises(DataError, match="has no hard negative, and none of 64 other samples"):
        build_dataset(load_recipe(ROOT / "recipes/picto.yaml", [*settings, "train.steps=9"]))[:]


ALIKE = {"qry": "one?", "qry_image_path": "", "pos_text": "yes", "pos_image_path": ""}


def test_missing_things_are_named_or_left_out(tmp_path):
    eval_tree(tmp_path / "mmeb")
    shutil.rmtree(tmp_path / "mmeb" / "GQA")
    (tmp_path / "mmeb/images/Odd/palette.png").unlink()
    with pytest.raises(DataError, match=r"is missing: .*--tasks.*--skip-missing"):
        load_benchmark("mmeb", tmp_path / "mmeb")
    found = load_benchmark("mmeb", tmp_path / "mmeb", skip_missing=True)
    assert "no GQA/test-" in found.left_out["GQA"]
    assert "names the picture Odd/palette.png" in found.left_out["CIRR"]
    assert len(found.tasks) + len(found.left_out) == 36
    whole = found.tasks[0].name
    assert [t.name for t in load_benchmark("mmeb", tmp_path / "mmeb", [whole]).tasks] == [whole]
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
    parquet(tmp_path / "wrong" / "GQA" / "test-0.parquet", [{"question": "?"}])
    with pytest.raises(DataError, match="has no column qry_text"):
        load_benchmark("mmeb", tmp_path / "wrong", ["GQA"])


def test_mmeb_comes_from_the_hub_without_a_folder(tmp_path, monkeypatch):
    import huggingface_hub

    eval_tree(tmp_path)
    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: asked.update(kw, name=name) or tmp_path,
    )
    assert len(load_benchmark("mmeb", tasks=["GQA"]).tasks) == 1
    assert asked["name"] == "TIGER-Lab/MMEB-eval"
    assert "GQA/test-*" in asked["allow_patterns"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match=r"cannot be had from the hub.*--data"):
        load_benchmark("mmeb")


def zeroshot_tree(root):
    """All five in their usual files, two or three pictures each."""

    def picture(path, colour):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(path)

    def karpathy(number, folder):
        name = f"{folder.name}{number}.jpg"
        picture(folder / name, (number * 40, 0, 90))
        sentences = [{"raw": f"caption {number}, {i}"} for i in range(6)]
        return {
            "filename": name,
            "split": "test" if number < 2 else "train",
            "sentences": sentences,
        }

    flickr = root / "flickr30k"
    images = [karpathy(i, flickr / "flickr30k-images") for i in range(3)]
    (flickr / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    images = [karpathy(i, root / "coco" / "val2014") | {"filepath": "val2014"} for i in range(3)]
    (root / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    share = []
    for i in range(3):
        picture(root / "sharegpt4v" / "sam" / f"{i}.jpg", (0, i * 80, 0))
        share.append(
            {
                "image": f"sam/{i}.jpg",
                "conversations": [{"value": "describe"}, {"value": f"long {i}"}],
            }
        )
        picture(root / "Urban1k" / "image" / f"{i + 1}.jpg", (0, 0, i * 80))
        (root / "Urban1k" / "caption").mkdir(exist_ok=True)
        (root / "Urban1k" / "caption" / f"{i + 1}.txt").write_text(f"a street {i}\n")
        picture(root / "val2017" / f"{i:012}.jpg", (i * 80, i * 80, 0))
    name = "share-captioner_coco_lcs_sam_1246k_1107.json"
    (root / "sharegpt4v" / name).write_text(json.dumps(share))
    (root / "sugar-crepe" / "data").mkdir(parents=True)
    rows = {
        str(i): {"filename": f"{i:012}.jpg", "caption": f"a {i}", "negative_caption": f"no {i}"}
        for i in range(3)
    }
    for split in SPLITS:
        (root / "sugar-crepe" / "data" / f"{split}.json").write_text(json.dumps(rows))


def test_the_zero_shot_five_are_read_from_their_usual_files(tmp_path):
    zeroshot_tree(tmp_path)
    tasks, missing = read_zeroshot(tmp_path)
    assert not missing
    by_name = {t.name: t for t in tasks}
    assert len(tasks) == 8 + 7
    i2t, t2i = by_name["Flickr30K i2t"], by_name["Flickr30K t2i"]
    assert len(i2t.queries) == 2, "the test split only"
    assert len(i2t.documents) == 10, "five captions a picture"
    assert [list(a) for a in i2t.answers] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert len(t2i.queries) == 10
    assert t2i.answers[7] == [1]
    assert by_name["Urban1K t2i"].queries[2].text == "a street 2"
    crepe = by_name["SugarCrepe swap-att"]
    assert crepe.pool(1)
    assert [crepe.documents[i].text for i in crepe.candidates[1]] == ["a 1", "no 1"]
    shutil.rmtree(tmp_path / "Urban1k")
    (tmp_path / "val2017" / f"{0:012}.jpg").unlink()
    found = load_benchmark("zeroshot", tmp_path)
    assert "no Urban1k under" in found.left_out["Urban1K"]
    assert "names the picture 000000000000.jpg" in found.left_out["SugarCrepe add-obj"]
    assert len(found.tasks) == 6
    with pytest.raises(DataError, match="none of the zero-shot sets is there"):
        read_zeroshot(tmp_path / "coco" / "val2014")
    (tmp_path / "coco" / "dataset_coco.json").write_text('{"pictures": []}')
    assert "not in the usual form" in read_zeroshot(tmp_path)[1]["COCO5k"]


def own_data(root):
    """The same six questions as rows and in BEIR's form, and a YAML file that names both."""
    pictures = root / "pictures"
    pictures.mkdir(parents=True)
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (48, 48), colour).save(pictures / f"{colour}.png")
    rows = [
        {"query": f"a {c} square", "positives": [f"pictures/{c}.png"]}
        for c in ("red", "green", "blue")
    ]
    rows += [
        {
            "query": {"image": f"pictures/{c}.png", "text": "name it"},
            "positives": [c, f"{c}!"],
            "candidates": ["grey"],
        }
        for c in ("red", "green", "blue")
    ]
    (root / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    beir = root / "my-beir"
    (beir / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": c, "title": c.title(), "text": "a colour", "image": f"../pictures/{c}.png"}
        for c in ("red", "blue")
    ]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (beir / "queries.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"q{i}", "text": f"find {c}"}) + "\n"
            for i, c in enumerate(("red", "blue", "none"))
        )
    )
    (beir / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\tred\t1\nq1\tblue\t2\nq1\tred\t0\n"
    )
    (root / "shop.yaml").write_text(
        "tasks:\n  - name: shop\n    data: shop.jsonl\n    instruction: 'Find me: '\n"
        "  - name: colours\n    data: my-beir\n    document_instruction: ''\n"
    )


def test_own_data_in_each_form(tmp_path):
    own_data(tmp_path)
    shop, colours = read_own(tmp_path / "shop.yaml")
    assert [shop.name, colours.name] == ["shop", "colours"]
    assert shop.queries[0].as_input() == {"text": "Find me: a red square"}
    own, right = shop.pool(0)
    assert right == 1
    assert len(own) == len(shop.documents) == 10, "without candidates, every document of the file"
    own, right = shop.pool(3)
    assert right == 2
    assert [shop.documents[i].key for i in own] == ["red", "red!", "grey"]
    assert shop.documents[0].instruction == "Represent the given image."
    assert len(colours.queries) == 2, "queries without judgements are left out"
    assert colours.documents[0].as_input()["text"] == "Red a colour"
    assert list(colours.answers[1]) == [1]
    assert read_own(tmp_path / "shop.jsonl", limit=2)[0].queries == shop_without(tmp_path)[:2]


def shop_without(root):
    return read_own(root / "shop.jsonl")[0].queries


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"query": "a"}', "needs 'query' and 'positives'"),
        ('{"query": "a", "positives": []}', "no positives"),
        ('{"query": "a", "positives": "b"}', "is no list"),
        ('{"query": "a", "positives": ["no.png"]}', "names the picture"),
        ("", "holds no queries"),
    ],
)
def test_errors_in_own_rows_name_file_and_row(tmp_path, content, said):
    (tmp_path / "own.jsonl").write_text(content + "\n")
    with pytest.raises(DataError, match=rf"own\.jsonl.*{said}"):
        read_own(tmp_path / "own.jsonl")


def test_errors_in_own_yaml_and_beir(tmp_path):
    own_data(tmp_path)
    (tmp_path / "bad.yaml").write_text("tasks:\n  - nam: shop\n")
    with pytest.raises(DataError, match=r"bad\.yaml: tasks\.0\.name: Field required"):
        read_own(tmp_path / "bad.yaml")
    (tmp_path / "my-beir/qrels/test.tsv").write_text("q0\tpurple\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:1: document 'purple' is not in corpus"):
        read_own(tmp_path / "my-beir")
    (tmp_path / "my-beir/qrels/test.tsv").write_text("q0 red 1\n")
    with pytest.raises(DataError, match="between tabs"):
        read_own(tmp_path / "my-beir")


def test_a_model_that_scales_pictures_to_one_size_takes_no_pixel_limits(saved_model):
    with pytest.raises(ModelError, match="fixed size"):
        load_model(EvaluateOptions(str(saved_model), max_pixels=10_000))
