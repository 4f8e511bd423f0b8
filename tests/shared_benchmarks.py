"""Benchmarks in their published files, in small."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rematch.data.mmeb import MARKER
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.mmeb_v2_table import MVBENCH
from rematch.data.zeroshot import SPLITS


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
            "qry": f"{MARKER} what? {i}\n",
            "qry_image_path": f"images/Odd/{ODD[i]}",
            "pos_text": f"a{i}",
            "pos_image_path": "",
        }
        for i in range(6)
    ]
    write_parquet(root / "OK-VQA" / "original-00000-of-00001.parquet", plain)
    other = [row | {"qry": f"In {MARKER}, what? {i}\n"} for i, row in enumerate(plain)]
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


# ---- MMEB-V2 ------------------------------------------------------------------------------------


def page_picture(i):
    """The bytes of a page, other than those of every other number."""
    buffer = io.BytesIO()
    Image.effect_mandelbrot((40, 56), (-2, -1.5, 1, 1 + i / 9), 20).convert("RGB").save(
        buffer, "PNG"
    )
    return buffer.getvalue()


LONG_ID = "https://example.org/" + "a-very-long-title-of-a-report/" * 12 + "page-3.png"


def beir_tables(ids, queries, qrels):
    """Rows of the three tables of BEIR with pictures."""
    return {
        "corpus": [{"corpus-id": key, "image": page_picture(i)} for i, key in enumerate(ids)],
        "queries": queries,
        "qrels": [{"query-id": q, "corpus-id": c, "score": s} for q, c, s in qrels],
    }


def write_beir(folder, tables, form="image", split="test"):
    """Write the tables with pictures as the hub has them (``image``), as plain structs of bytes
    (``struct``), or as JSONL with paths (``paths``).
    """
    for config, rows in tables.items():
        place = folder / config
        place.mkdir(parents=True)
        if form == "paths":
            for i, row in enumerate(rows):
                if "image" in row:
                    (folder / f"{i}.png").write_bytes(row["image"])
                    row["image"] = f"{i}.png"
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (place / f"{split}-0.jsonl").write_text(lines)
            continue
        for row in rows:
            if "image" in row:
                row["image"] = {"bytes": row["image"], "path": None}
        if form == "struct":
            write_parquet(place / f"{split}-00000-of-00001.parquet", rows)
            continue
        import datasets

        data = datasets.Dataset.from_list(rows)
        if config == "corpus":
            data = data.cast_column("image", datasets.Image())
        datasets.disable_progress_bars()
        data.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))


def visdoc_tree(root):
    """Write sets of each publisher of visual documents, with the odd cases."""
    folder = root / "visdoc-tasks"
    queries = [{"query-id": i, "query": f"question {i}"} for i in range(4)]
    # of ViDoRe V1: numbers as ids, one page a query; the last query is not judged
    tables = beir_tables(range(6), queries, [(0, 3, 1), (1, 1, 1), (2, 0, 1)])
    write_beir(folder / "arxivqa_test_subsampled_beir", tables)
    # of ViDoRe V2: languages, grades, several right pages, a query whose pages are all wrong
    queries = [
        {"query-id": i, "query": f"{language} {i}", "language": language}
        for i, language in enumerate(("english", "french", "english", "spanish", "english"))
    ]
    qrels = [
        (0, 1, 2),
        (0, 4, 1),
        (0, 5, 1),
        (1, 2, 1),
        (2, 3, 0),
        (2, 5, 0),
        (3, 0, 1),
        (3, 0, 2),
    ]
    tables = beir_tables(range(8), queries, [*qrels, (4, 6, 1)])
    write_beir(folder / "esg_reports_v2", tables, "struct")
    # of VisRAG: very long ids that differ at their ends, split train
    ids = [LONG_ID, LONG_ID.replace("page-3", "page-4"), "short.png"]
    queries = [{"query-id": f"q{i}", "query": f"chart {i}"} for i in range(3)]
    tables = beir_tables(ids, queries, [(f"q{i}", ids[i], 1) for i in range(3)])
    write_beir(folder / "VisRAG-Ret-Test-ChartQA", tables, "paths", split="train")
    # -doc counts any page of the right document, -page only the right page
    ids = [f"{name}_{page}" for name in ("a.pdf", "b.pdf") for page in range(3)]
    queries = [{"query-id": "q", "query": "what is on page 1 of b?"}]
    write_beir(folder / "ViDoSeek-page-fixed", beir_tables(ids, queries, [("q", "b.pdf_1", 1)]))
    qrels = [("q", key, 1) for key in ids if key.startswith("b")]
    write_beir(folder / "ViDoSeek", beir_tables(ids, queries, qrels))


VISDOC_TREE = (
    "ViDoRe_arxivqa",
    "ViDoRe_esg_reports_v2_multilingual",
    "VisRAG_ChartQA",
    "ViDoSeek-page",
    "ViDoSeek-doc",
)


def frame_folder(folder, count, colour):
    """Write frames whose numbers are not in the order of their names as texts."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (colour, 8 * i, 0)).save(folder / f"frame_{i}.png")
    (folder / "._frame_0.png").write_bytes(b"resource fork")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def video_tree(root):
    """Write one set of each form of MMEB-V2's videos."""
    tasks, frames = root / "video-tasks", root / "video-tasks/frames"
    names = [f"v{i}" for i in range(3)]
    for folder in ("video_cls/HMDB51", "video_cls/SSv2", "video_ret/MSVD", "video_qa/Video-MME"):
        for i, name in enumerate(names):
            frame_folder(frames / folder / name, 12, 60 * i)
    rows = [{"video_id": v, "pos_text": text} for v, text in zip(names, "abb", strict=True)]
    write_jsonl(tasks / "HMDB51/test.jsonl", rows)
    with_candidates = [row | {"neg_text": ["a", "b", "c", "d"]} for row in rows]
    write_jsonl(tasks / "SmthSmthV2/test.jsonl", with_candidates)
    rows = [
        {"video_id": v, "video": f"{v}.avi", "caption": [f"caption of {v}", "another one"]}
        for v in names
    ]
    write_parquet(tasks / "MSVD/data/test-00000-of-00001.parquet", rows)
    rows = [
        {"videoID": v, "question": "Who?", "options": ["A. Ann.", "B. Bob."], "answer": answer}
        for v, answer in zip(names, "BAB", strict=True)
    ]
    write_jsonl(tasks / "Video-MME/test.jsonl", rows)
    # NExTQA: the numbers of videos; the same video for two questions
    frame_folder(frames / "video_qa/NExTQA/471", 3, 90)
    row = {f"a{i}": f"answer {i}" for i in range(5)}
    row |= {"video": 471, "question": "why", "qid": "1", "type": "CW"}
    write_jsonl(tasks / "NExTQA/MC/test.jsonl", [row | {"answer": 4}, row | {"answer": 0}])
    frame_folder(frames / "video_qa/EgoSchema/ego", 3, 90)
    row = {"video_idx": "ego", "question_idx": "1", "question": "What? ", "answer": "1"}
    write_jsonl(tasks / "EgoSchema/Subset/test.jsonl", [row | {"option": ["A. x", "B. y"]}])
    frame_folder(frames / "video_qa/ActivityNetQA/v_net", 3, 90)
    row = {"video_name": "net", "question": "is it", "answer": "no", "question_id": "1"}
    write_jsonl(tasks / "ActivityNetQA/test.jsonl", [row])
    for subset in MVBENCH:
        frame_folder(frames / f"video_qa/MVBench/{subset}/same.mp4", 2, 90)
        row = {"video": "same.mp4", "question": subset, "candidates": ["x", "y"], "answer": "y"}
        write_jsonl(tasks / f"MVBench/{subset}/train.jsonl", [row])
    for i, clip in enumerate(("query", "positive_0", "negative_0", "negative_1")):
        frame_folder(frames / "video_mret/QVHighlight/long" / clip, 12, 20 * i)
    rows = [{"query": "a scene", "video_path": "videos/long.mp4"}]
    write_jsonl(tasks / "QVHighlight/test.jsonl", rows)
    folder = frames / "video_mret/MomentSeeker"
    for i, name in enumerate(("film_1", "film_2", "film_3")):
        frame_folder(folder / "video_frames" / name, 4, 50 * i)
    Image.new("RGB", (40, 40)).save(folder / "query_still.jpg")
    clips = [{"output_path": f"film/{i}.mp4"} for i in (1, 2, 3)]
    rows = [
        {"query": "find it", "input_frames": path}
        | {"positive_frames": clips[:2], "negative_frames": clips[2:]}
        for path in ("", "still.jpg", "film/3.mp4")
    ]
    write_jsonl(tasks / "MomentSeeker/test.jsonl", rows)
