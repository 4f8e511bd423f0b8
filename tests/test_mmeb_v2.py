"""MMEB-V2: graded metrics, visual documents and videos in all their forms, and what comes out."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval
from PIL import Image
from shared_benchmarks import (
    LONG_ID,
    VISDOC_TREE,
    beir_tables,
    eval_tree,
    frame_folder,
    page_picture,
    video_tree,
    visdoc_tree,
    write_beir,
    write_jsonl,
)

from rematch.data import picto_pages, video_sets, visdoc
from rematch.data.frames import Videos, draw_evenly, extract_frames, frames_in
from rematch.data.images import load_image
from rematch.data.mmeb_export import export_picto
from rematch.data.mmeb_v2_table import (
    ENGLISH_SETS,
    GROUPS,
    VIDEO_SETS,
    VISDOC_SETS,
    beir_set,
    sets_named,
)
from rematch.data.schema import Item, RetrievalTask
from rematch.encoding.inputs import content_key
from rematch.errors import DataError, ImageError, RematchError
from rematch.evaluate import metrics
from rematch.evaluate.benchmarks import load_benchmark
from rematch.evaluate.command import EvaluateOptions, run
from rematch.evaluate.metrics import rank_candidates
from rematch.evaluate.report import reference_scores_v2
from rematch.evaluate.run import _graded_ranks
from rematch.evaluate.summary import chance, task_means

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Sets of all three modalities, laid out like the benchmark."""
    root = tmp_path_factory.mktemp("mmeb-v2")
    visdoc_tree(root)
    video_tree(root)
    eval_tree(root / "image-tasks", names={"GQA", "MSCOCO_t2i"})
    return root


def graded_task(rng, queries=60, pages=30):
    """Random grades from 0 to 3; some queries have no right page."""
    items = [Item(key=str(i)) for i in range(pages)]
    task = RetrievalTask("t", "g", [], items, [], answers=[], grades=[], metric="ndcg@5")
    qrels = {}
    for i in range(queries):
        judged = rng.choice(pages, rng.integers(1, 9), replace=False)
        grades = rng.integers(0, 4, len(judged)) * (i % 7 > 0)
        qrels[str(i)] = {str(p): int(g) for p, g in zip(judged, grades, strict=True)}
        right = {int(p): float(g) for p, g in zip(judged, grades, strict=True) if g}
        task.queries.append(Item(key=str(i)))
        task.answers.append(list(right))
        task.grades.append(list(right.values()))
    return task, qrels


# ---- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_graded_metrics_equal_those_of_trec(seed):
    rng = np.random.default_rng(seed)
    task, qrels = graded_task(rng)
    runs, graded = {}, []
    for i in range(len(task.queries)):
        scores = rng.normal(size=len(task.documents))
        runs[str(i)] = {str(j): float(score) for j, score in enumerate(scores)}
        candidates, relevant = task.pool(i)
        order = rank_candidates(scores[candidates], relevant)
        graded.append(_graded_ranks(order, task.relevance(i)))
    ranks, grades = [r for r, _ in graded], [g for _, g in graded]
    assert any(not len(r) for r in ranks)
    names = {"ndcg_cut_5,10", "success_1,5,10", "recip_rank", "recall_5", "P_5", "map"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(runs)
    assert len(theirs) == len(ranks)

    def mean(name):
        return pytest.approx(100 * np.mean([row[name] for row in theirs.values()]))

    for k in (5, 10):
        assert metrics.ndcg_at(ranks, k, grades) == mean(f"ndcg_cut_{k}")
    for k in (1, 5, 10):
        assert metrics.hit_at(ranks, k) == mean(f"success_{k}")
    assert metrics.mrr_at(ranks) == mean("recip_rank")
    assert metrics.recall_at(ranks, 5) == mean("recall_5")
    assert metrics.precision_at(ranks, 5) == mean("P_5")
    assert metrics.map_at(ranks) == mean("map")
    f1 = [
        2 * row["P_5"] * row["recall_5"] / ((row["P_5"] + row["recall_5"]) or 1)
        for row in theirs.values()
    ]
    assert metrics.f1_at(ranks, 5) == pytest.approx(100 * np.mean(f1))


def test_exponential_gains():
    ranks, grades = [np.array([2, 3])], [np.array([1.0, 3.0])]
    gain = 1 / np.log2(3) + 7 / np.log2(4)
    best = 7 + 1 / np.log2(3)
    assert metrics.ndcg_at(ranks, 5, grades, exponential=True) == pytest.approx(100 * gain / best)


def test_chance_is_the_mean_over_all_rankings():
    pages = [Item(key=str(i)) for i in range(6)]
    queries = [Item(key="q")]
    task = RetrievalTask("t", "g", queries, pages, [], answers=[[4, 1]], grades=[[1.0, 3.0]])
    task.metric = "ndcg@5"
    graded = [_graded_ranks(np.array(o), task.relevance(0)) for o in permutations(range(6))]
    ranks, grades = [r for r, _ in graded], [g for _, g in graded]
    assert chance(task) == pytest.approx(metrics.ndcg_at(ranks, 5, grades))
    assert task.relevance(0).tolist() == [1.0, 3.0]


def test_means_are_taken_for_each_modality():
    def task(name, meta, modality, ood=False):
        return RetrievalTask(name, meta, [], [], [], ood=ood, modality=modality)

    tasks = [
        task("A", "vqa", "image"),
        task("B", "vqa", "image", ood=True),
        task("C", "video QA", "video"),
        task("D", "visdoc OOD", "visdoc", ood=True),
    ]
    assert task_means(tasks, [10, 20, 60, 90]) == {
        "overall": 45.0,
        "image": 15.0,
        "video": 60.0,
        "visdoc": 90.0,
        "vqa": 15.0,
        "video QA": 60.0,
        "visdoc OOD": 90.0,
        "ind": 10.0,
        "ood": 20.0,
    }


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_is_the_benchmarks():
    assert (len(VISDOC_SETS), len(VIDEO_SETS)) == (24, 18)
    assert Counter(s.meta_task for s in VISDOC_SETS) == {
        "ViDoRe V1": 10,
        "ViDoRe V2": 4,
        "VisRAG": 6,
        "visdoc OOD": 4,
    }
    models = reference_scores_v2()
    published = {name for sets in models.values() for name in sets.get("visdoc", ())}
    # any page of the right document: published with the earlier, faulty page sets only
    assert {s.name for s in VISDOC_SETS} - published == {"ViDoSeek-doc", "MMLongBench-doc"}
    published = {name for sets in models.values() for name in sets.get("video", ())}
    assert published - {s.name for s in VIDEO_SETS} == {"MomentSeeker_1k8"}
    assert published >= {s.name for s in VIDEO_SETS}
    asset = ROOT / "src/rematch/assets/mmeb_v2_reference_scores.json"
    shared = ROOT.parent / "shared/mmeb_v2_reference_scores.json"
    assert not shared.exists() or json.loads(asset.read_text()) == json.loads(shared.read_text())
    for data_set in (*VISDOC_SETS, *VIDEO_SETS, *ENGLISH_SETS):
        assert data_set.instruction.endswith((": ", ".", "?"))
        assert data_set.split == ("train" if "VisRAG" in data_set.repository else data_set.split)


def test_sets_go_by_their_names_and_repositories():
    assert [s.name for s in sets_named("vidore/arxivqa_test_subsampled_beir")] == [
        "ViDoRe_arxivqa"
    ]
    assert [s.name for s in sets_named("vidore_ARXIVQA")] == ["ViDoRe_arxivqa"]
    assert len(sets_named("vidore-v1")) == 10
    assert len(sets_named("vidore-v2")) == 7
    other = sets_named("vidore/Some_new_set_v3")
    assert [(s.name, s.repository) for s in other] == [
        ("Some_new_set_v3", "vidore/Some_new_set_v3")
    ]
    assert sets_named("mmebs") == []
    with pytest.raises(DataError, match="Did you mean visdoc"):
        load_benchmark("visdocs")


# ---- visual documents ---------------------------------------------------------------------------


def test_visual_documents_in_all_their_forms(tree):
    by_name = {s.name: s for s in (*VISDOC_SETS, *ENGLISH_SETS)}
    names = (*VISDOC_TREE, "ViDoRe_esg_reports_v2")
    tasks, missing = visdoc.load_visdoc([by_name[name] for name in names], tree)
    assert not missing
    arxiv, every, chart, page, document, english = tasks
    assert [t.name for t in tasks] == list(names)
    assert {t.metric for t in tasks} == {"ndcg@5"}
    assert arxiv.answers == [[3], [1], [0]]
    assert arxiv.notes == ["queries left out, because qrels lack them: 1"]
    assert every.answers == [[1, 4, 5], [2], [], [0], [6]]
    assert every.grades[0] == [2, 1, 1]
    assert every.grades[3] == [2], "the highest of repeated scores"
    assert every.notes == ["queries that have no right page and count as 0: 1"]
    assert [q.text for q in english.queries] == ["english 0", "english 2", "english 4"]
    assert english.answers == [[1, 4, 5], [], [6]]
    assert len(english.documents) == 8, "pages have no language"
    assert chart.documents[0].key == LONG_ID
    assert len({d.key for d in chart.documents}) == 3
    assert (page.answers, document.answers) == ([[4]], [[3, 4, 5]])
    first = arxiv.queries[0].as_input()
    assert first == {"text": "Find a document image that matches the given query: question 0"}
    for task in tasks:
        for i, item in enumerate(task.documents):
            assert item.as_input()["text"] == (
                "Understand the content of the provided document image."
            )
            picture = load_image(item.image)
            assert picture.size == (40, 56)
            assert content_key({"image": item.image}) == content_key({"image": item.image}), (
                "read twice"
            )
            if task is not chart:
                assert item.image.read_bytes() == page_picture(i)
    limited, _ = visdoc.load_visdoc([by_name[VISDOC_TREE[0]]], tree, limit=1)
    assert (len(limited[0].queries), len(limited[0].documents)) == (1, 6)


def test_a_folder_of_ones_own_and_a_repository_are_read_alike(tree, tmp_path, monkeypatch):
    source = tree / "visdoc-tasks/arxivqa_test_subsampled_beir"
    local = load_benchmark(str(source)).tasks[0]
    assert (local.name, local.metric) == (source.name, "ndcg@5")
    with monkeypatch.context() as patch:
        patch.chdir(source)
        assert load_benchmark(".").tasks[0].name == source.name
    load = datasets.load_dataset
    asked_for = []

    def from_hub(name, *arguments, **options):
        if name != "vidore/arxivqa_test_subsampled_beir":
            return load(name, *arguments, **options)
        asked_for.append((*arguments, options["split"]))
        files = [str(f) for f in (source / arguments[0]).glob("test-*")]
        return load("parquet", data_files=files, split="train")

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    hub = load_benchmark("vidore/arxivqa_test_subsampled_beir").tasks[0]
    assert asked_for == [(config, "test") for config in ("queries", "corpus", "qrels")]
    assert hub.answers == local.answers
    assert [d.image.read_bytes() for d in hub.documents] == [
        d.image.read_bytes() for d in local.documents
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match=r"cannot be loaded \(division by zero\).*with --data"):
        load_benchmark("vidore/arxivqa_test_subsampled_beir")
    with pytest.raises(DataError, match=r"no folder ViDoRe_arxivqa or arxivqa_test_subs"):
        load_benchmark("ViDoRe_arxivqa", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_benchmark("visdoc", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "load_dataset", load)
    folder = tmp_path / "readme"
    write_beir(folder / "files", beir_tables([1], [{"query-id": 1, "query": "x"}], [(1, 1, 1)]))
    configs = "".join(
        f"- config_name: {c}\n  data_files:\n  - split: test\n    path: files/{c}/*.parquet\n"
        for c in ("queries", "corpus", "qrels")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert visdoc.load_pages(beir_set("x", ""), folder).answers == [[0]], "as its README says"


BROKEN = {
    "no query text": lambda t: t["queries"][0].update(query=None),
    "a blank query": lambda t: t["queries"][0].update(query="  "),
    "no queries": lambda t: t["queries"].clear(),
    "an unknown page": lambda t: t["corpus"].pop(),
    "no grade": lambda t: t["qrels"][0].update(score=None),
    "a grade that is NaN": lambda t: t["qrels"][0].update(score=float("nan")),
    "an infinite grade": lambda t: t["qrels"][0].update(score=float("inf")),
    "a missing column": lambda t: [row.pop("score") for row in t["qrels"]],
    "no pages": lambda t: t["corpus"].clear(),
    "a page without picture": lambda t: t["corpus"][0].update(image=None),
    "a page that is no picture": lambda t: t["corpus"][0].update(image=b"GIF89a?"),
    "nothing judged": lambda t: t["qrels"].clear(),
}
HARMLESS = {
    "a page twice": lambda t: t["corpus"].append(t["corpus"][0]),
    "a judgement twice": lambda t: t["qrels"].append(t["qrels"][0]),
    "a grade below 0": lambda t: t["qrels"][0].update(score=-1),
    "texts as grades": lambda t: [row.update(score=str(row["score"])) for row in t["qrels"]],
    "another column": lambda t: [row.update(more=1) for row in t["queries"]],
    "shuffled rows": lambda t: [random.Random(0).shuffle(rows) for rows in t.values()],
}


def random_tables(rng):
    make = rng.choice([int, str, lambda i: f"{i}é/" + "x" * rng.randint(0, 400)])
    ids = [make(i) for i in range(rng.randint(2, 9))]
    queries = [{"query-id": f"q{i}", "query": f"what {i}"} for i in range(rng.randint(1, 6))]
    qrels = [
        (q["query-id"], key, rng.randint(0, 3))
        for q in queries
        for key in rng.sample(ids, rng.randint(1, len(ids)))
    ]
    qrels += [(queries[0]["query-id"], ids[-1], 1)]
    return beir_tables(ids, queries, qrels)


def test_visual_documents_are_read_or_refused_with_a_reason(monkeypatch, tally):
    """Random sets, half of them with a fault or an oddity."""
    rng = random.Random(16)
    for number in range(100):
        tables = random_tables(rng)
        judged = {}
        for row in tables["qrels"]:
            pair = row["query-id"], str(row["corpus-id"])
            judged[pair] = max(row["score"], judged.get(pair, 0))
        fault = rng.choice([*BROKEN, *HARMLESS, ""]) if number % 2 else ""
        (BROKEN | HARMLESS | {"": lambda _: None})[fault](tables)
        monkeypatch.setattr(
            visdoc,
            "load_table",
            lambda _, config, __, tables=tables: datasets.Dataset.from_list(tables[config]),
        )
        message = ""
        try:
            task = visdoc.load_pages(beir_set("random", "random"), Path("random"))
            load_image(task.documents[0].image)
        except (DataError, ImageError) as error:
            message = str(error)
        assert bool(message) == (fault in BROKEN), f"{fault}: {message}"
        assert len(message) < 400
        tally("Visual documents")["refused" if message else "read"] += 1
        if not fault:
            right = {
                (query.key, task.documents[j].key): grade
                for i, query in enumerate(task.queries)
                for j, grade in zip(task.answers[i], task.grades[i], strict=True)
            }
            assert right == {pair: score for pair, score in judged.items() if score}


# ---- videos -------------------------------------------------------------------------------------


def test_frames_are_drawn_evenly_in_the_order_of_their_numbers(tmp_path):
    frame_folder(tmp_path / "v", 12, 9)
    names = [path.stem for path in draw_evenly(frames_in(tmp_path / "v"), 4)]
    assert names == ["frame_0", "frame_3", "frame_7", "frame_11"]
    assert frames_in(tmp_path / "none") == []
    for total in range(1, 80):
        for count in range(1, 20):
            drawn = draw_evenly(range(total), count)
            assert len(drawn) == min(total, count)
            assert drawn == sorted(set(drawn))
            assert drawn[0] == 0
            assert count == 1 or drawn[-1] == total - 1


def test_videos_of_every_form(tree):
    names = (
        "HMDB51 SmthSmthV2 MSVD Video-MME NExTQA EgoSchema ActivityNetQA MVBench QVHighlight "
        "MomentSeeker".split()
    )
    sets = {s.name: s for s in VIDEO_SETS}
    tasks, missing = video_sets.load_videos([sets[name] for name in names], tree)
    assert not missing
    task = {t.name: t for t in tasks}
    text = {name: [q.text for q in t.queries] for name, t in task.items()}
    keys = {name: [d.key for d in t.documents] for name, t in task.items()}
    assert all(t.metric == "hit@1" for t in tasks)
    assert all(t.modality == "video" for t in tasks)
    assert len(task["HMDB51"].queries[0].image) == 8
    assert [path.stem for path in task["HMDB51"].queries[0].image][-2:] == ["frame_9", "frame_11"]
    assert keys["HMDB51"] == ["a", "b"]
    assert task["HMDB51"].pool(0)[0].tolist() == [0, 1]
    assert "2 labels instead of 51" in task["HMDB51"].notes[0]
    assert task["SmthSmthV2"].pool(1)[0].tolist() == [1, 0, 2, 3]
    assert text["MSVD"] == ["caption of v0", "caption of v1", "caption of v2"]
    assert task["MSVD"].candidates == []
    assert task["MSVD"].documents[0].as_input()["text"] == (
        "Understand the content of the provided video."
    )
    assert text["Video-MME"][0] == "Who?\nA. Ann.\nB. Bob."
    assert keys["Video-MME"] == ["Ann", "Bob"]
    assert [a[0] for a in task["Video-MME"].answers] == [1, 0, 1]
    assert text["NExTQA"][0].startswith("why\nOptions:\n(A) answer 0\n(B) answer 1")
    assert [keys["NExTQA"][a[0]] for a in task["NExTQA"].answers] == ["answer 4", "answer 0"]
    assert len(task["NExTQA"].queries[0].image) == 3, "all, where there are fewer"
    assert text["EgoSchema"] == ["What? A. x B. y"]
    assert keys["EgoSchema"][task["EgoSchema"].answers[0][0]] == "y"
    assert text["ActivityNetQA"] == ["is it? (A) yes; (B) no."]
    assert keys["ActivityNetQA"][task["ActivityNetQA"].answers[0][0]] == "no"
    assert len(task["MVBench"].queries) == 20
    assert keys["MVBench"] == ["(A) x", "(B) y"]
    moments = task["QVHighlight"]
    assert keys["QVHighlight"] == ["long/positive_0", "long/negative_0", "long/negative_1"]
    assert moments.pool(0)[0].tolist() == [0, 1, 2]
    assert moments.queries[0].image[0].parent.name == "query"
    seeker = task["MomentSeeker"]
    assert seeker.answers == [[0, 1]] * 3
    kinds = [type(q.image).__name__ for q in seeker.queries]
    assert kinds == ["NoneType", "PosixPath", "list"]
    assert ["image" in q.instruction for q in seeker.queries] == [False, True, False]
    assert "video segment" in seeker.queries[2].instruction


def test_missing_videos_and_labels_are_named(tree, tmp_path):
    hmdb = next(s for s in VIDEO_SETS if s.name == "HMDB51")
    root = tmp_path / "video-tasks"
    write_jsonl(root / "HMDB51/test.jsonl", [{"video_id": "v0", "pos_text": "wave"}] * 2)
    _, missing = video_sets.load_videos([hmdb], tmp_path)
    assert "no frames in" in missing["HMDB51"]
    frame_folder(root / "frames/video_cls/HMDB51/v1", 2, 0)
    _, missing = video_sets.load_videos([hmdb], tmp_path)
    assert "no frames of v0 (and 1 more) in" in missing["HMDB51"]
    frame_folder(root / "frames/video_cls/HMDB51/v0", 2, 0)
    labels = [f"label {i}" for i in range(50)]
    (root / "frames/video_cls/HMDB51/labels.txt").write_text("\n".join(labels))
    (task,), _ = video_sets.load_videos([hmdb], tmp_path)
    assert [d.text for d in task.documents] == [*labels, "wave"]
    assert task.notes == []
    with pytest.raises(DataError, match="K700 cannot be loaded: --data is missing, the folder"):
        load_benchmark("video")


WRONG_ROWS = ("video_id", "pos_text", "query", "question", "answer", "options", "video", "caption")


def test_rows_of_videos_are_read_or_refused_with_a_reason(tree, monkeypatch, tally):
    """The rows of the tree with one cell replaced by something else."""
    rng = random.Random(17)
    load = video_sets.load_table
    originals = {}
    names = "HMDB51 SmthSmthV2 MSVD Video-MME NExTQA QVHighlight MomentSeeker".split()
    values = (None, "", "../../etc", 7, "x" * 300, [], [None], "other", "a\0b", {"a": 1}, -1)
    for number in range(154):
        data_set = next(s for s in VIDEO_SETS if s.name == names[number % len(names)])
        if data_set.name not in originals:
            originals[data_set.name] = load(
                tree / "video-tasks" / data_set.name, data_set.config, data_set.split
            ).to_list()
        rows = json.loads(json.dumps(originals[data_set.name]))
        column = rng.choice(list(rows[0]))
        value = rng.choice(values)
        for row in rows:
            row[column] = value
        monkeypatch.setattr(
            video_sets, "load_table", lambda *_, rows=rows: datasets.Dataset.from_list(rows)
        )
        tasks, missing = video_sets.load_videos([data_set], tree)
        assert len(tasks) + len(missing) == 1
        for reason in missing.values():
            assert str(tree) in reason, (column, value)
        for task in tasks:
            assert all(isinstance(i.text, str) for i in (*task.queries, *task.documents))
            assert all(len(task.pool(i)[0]) >= 1 for i in range(len(task.queries)))
        tally("Rows of videos")["read" if tasks else "refused"] += 1


def write_video(path, frames=100, size=(64, 48)):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = Image.new("RGB", size, (i * 255 // frames, 0, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def test_video_files_are_decoded_once_into_frames(tmp_path):
    root = tmp_path / "video-tasks"
    write_video(root / "videos/video_cls/HMDB51/clip.mp4")
    write_video(root / "videos/video_cls/HMDB51/short.avi", frames=5)
    (root / "videos/video_cls/HMDB51/broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42?" * 9)
    videos = Videos(tmp_path, "video_cls/HMDB51")
    frames = videos.find("clip")
    assert len(frames) == 8
    reds = [Image.open(path).resize((1, 1)).getpixel((0, 0))[0] for path in frames]
    assert reds == sorted(reds)
    assert reds[0] < 20
    assert reds[-1] > 230
    assert len(frames_in(root / "frames/video_cls/HMDB51/clip")) == 64
    assert len(videos.find("short")) == 5
    (root / "videos/video_cls/HMDB51/clip.mp4").unlink()
    assert Videos(tmp_path, "video_cls/HMDB51").find("clip") == frames, "from its frames"
    playlist = root / "videos/video_cls/HMDB51/playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{root / 'videos/video_cls/HMDB51/short.avi'}\n")
    for name in ("broken", "playlist"):
        with pytest.raises(DataError, match=rf"{name}.mp4: cannot be decoded"):
            videos.find(name)
    assert sorted(p.name for p in (root / "frames/video_cls/HMDB51").iterdir()) == [
        "clip",
        "short",
    ]
    for name in ("../x", "/etc", " ", "n" * 300):
        with pytest.raises(DataError):
            videos.find(name)
    assert videos.find("none") == []
    assert videos.missing == ["none"]


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "v.mp4").write_bytes(b"?")
    with pytest.raises(DataError, match=r"pip install 'rematch-mm\[video\]'"):
        extract_frames(tmp_path / "v.mp4", tmp_path / "v")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.mp4"]


# ---- from the command to the files --------------------------------------------------------------

# reads predictions.parquet and nothing else
INDEPENDENT = """
import json, sys
import pyarrow.parquet as pq, pytrec_eval
tasks = {}
for row in pq.read_table(sys.argv[1]).to_pylist():
    qrels, runs = tasks.setdefault(row["task"], ({}, {}))
    grades = {a: int(g) for a, g in zip(row["answers"], row["grades"])}
    qrels[str(row["query"])] = grades or {"no right page": 0}
    runs[str(row["query"])] = dict(zip(row["candidates"], row["scores"]))
out = {}
for task, (qrels, runs) in tasks.items():
    rows = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_5", "success_1"}).evaluate(runs)
    assert len(rows) == len(qrels)
    out[task] = {
        "ndcg@5": 100 * sum(r["ndcg_cut_5"] for r in rows.values()) / len(rows),
        "hit@1": 100 * sum(r["success_1"] for r in rows.values()) / len(rows),
    }
print(json.dumps(out))
"""


def test_scores_equal_those_of_an_independent_script(tree, saved_model, tmp_path):
    content = run(
        EvaluateOptions(
            str(saved_model),
            "mmeb-v2",
            output=tmp_path / "out",
            data=tree,
            skip_missing=True,
            workers=0,
            frames=3,
        )
    )
    command = [sys.executable, "-c", INDEPENDENT, str(tmp_path / "out/predictions.parquet")]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert set(theirs) == set(content["tasks"])
    assert set(VISDOC_TREE) <= set(theirs)
    for name, scores in theirs.items():
        for metric, value in scores.items():
            assert content["tasks"][name][metric] == pytest.approx(value, abs=0.006), name
    sets = {s.name: s for s in (*VISDOC_SETS, *VIDEO_SETS)}
    values = {
        name: scores[sets[name].metric if name in sets else "hit@1"]
        for name, scores in content["tasks"].items()
    }
    means = content["scores"]
    for modality in ("image", "video", "visdoc"):
        part = [
            v
            for n, v in values.items()
            if (sets[n].modality if n in sets else "image") == modality
        ]
        assert means[modality] == pytest.approx(np.mean(part), abs=0.01)
    assert means["overall"] == pytest.approx(np.mean(list(values.values())), abs=0.01)
    assert len(content["tasks"]) + len(content["left_out"]) == 78
    assert any("no right page and count as 0: 1" in w for w in content["warnings"])

    metrics_file = json.loads((tmp_path / "out/leaderboard.json").read_text())["metrics"]
    assert list(metrics_file) == ["image", "video", "visdoc"]
    assert list(metrics_file["image"]) == ["GQA", "MSCOCO_t2i"]
    assert set(metrics_file["visdoc"]) == set(VISDOC_TREE)
    assert sum(map(len, metrics_file.values())) == len(values)
    entry = metrics_file["visdoc"]["ViDoRe_esg_reports_v2_multilingual"]
    assert 100 * entry["ndcg_linear@5"] == pytest.approx(
        values["ViDoRe_esg_reports_v2_multilingual"], abs=0.006
    )
    assert {"ndcg_exponential@5", "precision@1", "f1@10", "map@5", "num_pred"} <= set(entry)

    report = (tmp_path / "out/report.html").read_text()
    assert "Hit@1, of visual documents nDCG@5 in percent over" in report
    published = reference_scores_v2()
    shared = [n for n in VISDOC_TREE if n in published["colpali-v1.3"]["visdoc"]]
    assert f"visdoc ({len(shared)} sets)" in report
    mean = np.mean([published["colpali-v1.3"]["visdoc"][name] for name in shared])
    ours = np.mean([values[name] for name in shared])
    section = report[report.index("Comparison with published scores") :]
    assert '<td>colpali-v1.3<td class="n">–' in section, "it has no scores on images"
    assert f"{mean:.1f}" in section
    assert f"{ours:.1f}" in section
    rows = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert sum(row["rank"] is None for row in rows) == 1
    assert any("frame_11" in row["image"] for row in rows)


def test_picto_on_disk_is_picto_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(picto_pages, "QUERIES", 20)
    export_picto(tmp_path / "tree", "mmeb-v2")
    in_memory = {name: load_benchmark(name).tasks for name in ("picto-visdoc", "picto-video")}
    for name, memory in in_memory.items():
        disk = load_benchmark(name, tmp_path / "tree", frames=4).tasks
        assert [t.name for t in memory] == [s.name for s in GROUPS[name]]
        for a, b in zip(memory, disk, strict=True):
            assert (a.name, a.metric, a.modality) == (b.name, b.metric, b.modality)
            assert len(a.queries) == len(b.queries)
            keys = [[d.key for d in t.documents] for t in (a, b)]
            for i in range(len(a.queries)):
                assert a.queries[i].as_input().get("text") == b.queries[i].as_input().get("text")
                right = [
                    {keys[n][j]: g for j, g in zip(t.answers[i], t.relevance(i), strict=True)}
                    for n, t in enumerate((a, b))
                ]
                assert right[0] == right[1]
                pools = [{keys[n][j] for j in t.pool(i)[0]} for n, t in enumerate((a, b))]
                assert pools[0] == pools[1]
            by_key = {d.key: d for d in b.documents}
            pairs = [*zip(a.queries, b.queries, strict=True)]
            pairs += [(d, by_key[d.key]) for d in a.documents[:3]]
            for x, y in pairs[::20]:
                assert (x.image is None) == (y.image is None)
                if isinstance(x.image, list):
                    assert [p.tobytes() for p in x.image] == [
                        load_image(p).tobytes() for p in y.image
                    ]
                elif x.image is not None:
                    assert load_image(x.image).tobytes() == load_image(y.image).tobytes()
    page, document = in_memory["picto-visdoc"]
    assert max(max(grades) for grades in page.grades) == 2
    assert min(min(grades) for grades in page.grades) == 1
    assert all(len(right) == 3 for right in document.answers), "any page of the right document"
    captions = [q.text for q in in_memory["picto-video"][0].queries]
    assert len(set(captions)) == len(captions)
    (limited,) = load_benchmark("picto-visdoc", tasks=["Picto-Pages-doc"], limit=2).tasks
    assert (len(limited.queries), len(limited.documents)) == (2, 60)
    with pytest.raises(RematchError, match="no such task"):
        load_benchmark("picto-visdoc", tasks=["Picto-Pages"])
