"""Benchmarks in their published files, in small."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rematch.data.mmeb import MARKER
from rematch.data.mmeb_export import export_picto
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.zeroshot import SPLITS

_trees: dict[str, Path] = {}


def picto_tree(path, layout="mmeb-eval"):
    """Export Picto; after the first call in a test run, only link to that export."""
    if layout not in _trees:
        export_picto(path, layout, samples=6)
        _trees[layout] = path
    elif not path.exists():
        path.symlink_to(_trees[layout])


def odd_pictures(folder):
    """Write a picture of each kind that loaders get wrong; the name says which."""
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


def write_parquet(path, rows):
    """Write rows, and beside them a resource fork as macOS puts it into archives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    (path.parent / f"._{path.name}").write_bytes(b"resource fork")


def eval_tree(root, names=None, instruct=False):
    """Write two queries of each data set in MMEB-eval layout, or in MMEB_Test_Instruct layout."""
    odd_pictures(root / "images" / "Odd")
    for number, data in enumerate(DATA_SETS):
        if names and data.name not in names:
            continue
        rows = []
        for i in range(2):
            query_image = (
                "" if data.candidate_key == "image" else f"Odd/{ODD[(number + i) % len(ODD)]}"
            )
            instruction = "Represent the given image with the following question: "
            text = f"what is {i}?"
            paths = [""] * 3
            target_instruction = ""
            targets = [f"answer {(i + j) % 4}" for j in range(3)]
            if data.candidate_key != "text":
                paths = [f"Odd/{ODD[(i + j) % len(ODD)]}" for j in range(3)]
                target_instruction = "Represent the given image."
                targets = [""] * 3
            if data.name == "RefCOCO-Matching":
                target_instruction = (
                    "Select the portion of the image that follows the language expressions: "
                )
                targets = [f"the {side} one" for side in ("left", "right", "left")]
                paths = [paths[0]] * 3
            if instruct:
                marked = f"{MARKER}\n{instruction}" if query_image else instruction
                row = {"qry_inst": marked, "qry_text": text, "qry_img_path": query_image}
                row |= {
                    "tgt_inst": f"{MARKER}\n{target_instruction}" if target_instruction else "",
                    "tgt_text": targets,
                    "tgt_img_path": paths,
                }
            else:
                # WebQA has the marker without a picture
                marker = f"{MARKER}\n" if query_image or data.name == "WebQA" else ""
                if target_instruction:
                    targets = [f"{MARKER}\n{target_instruction}{target}" for target in targets]
                row = {"qry_text": f"{marker}{instruction}{text}\n", "qry_img_path": query_image}
                row |= {"tgt_text": targets, "tgt_img_path": paths}
            rows.append(row)
        write_parquet(root / data.name / "test-00000-of-00001.parquet", rows)


WIKIPEDIA = "Represent the given Wikipedia image with related text information: "


def train_tree(root):
    """Write two data sets in MMEB-train layout."""
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
    write_parquet(root / "OK-VQA" / "original-00000-of-00001.parquet", plain)
    other = [row | {"qry": f"{MARKER}\ntell me: what? {i}\n"} for i, row in enumerate(plain)]
    write_parquet(root / "OK-VQA" / "diverse_instruction-00000-of-00001.parquet", other)
    wide = [
        {
            "qry": f"{MARKER}\nFind a Wikipedia image that answers this question: {i}?\n",
            "qry_image_path": "",
            "pos_text": f"{MARKER}\n{WIKIPEDIA}t{i}",
            "pos_image_path": f"images/Odd/{ODD[i]}",
            "neg_text": "",
            "neg_image_path": "",
        }
        for i in range(6)
    ]
    write_parquet(root / "WebQA" / "original-00000-of-00001.parquet", wide)


def zeroshot_tree(root):
    """Write all five zero-shot sets in their published files, two or three pictures each."""

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


def custom_data(root):
    """Write custom data as rows and in BEIR's layout, and a YAML file that names both."""
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
