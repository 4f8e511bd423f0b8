"""The documentation runs: pages from top to bottom, the README's and the API pages' examples, and
every figure as it was measured.
"""

import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from shared_benchmarks import custom_data, eval_tree, visdoc_tree, zeroshot_tree
from shared_documents import save_pdf, save_video

from rematch import Index, cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(\w+)([^\n]*)\n(.*?)```", re.DOTALL)
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
# headings of scores that are not their names
HEADINGS = {"vqa": "VQA", "ind": "IND", "ood": "OOD", "style": "unseen style"}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, options and content of each code block of a page."""
    return BLOCK.findall((ROOT / page).read_text())


def write_file(options: str, content: str) -> None:
    """Write a code block with a title to the file of that name."""
    Path(options.partition('title="')[2].rstrip('"')).write_text(content)


def run_command(line: str, monkeypatch) -> int:
    """Exit code of a command of the page."""
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run_commands(code: str, monkeypatch, capfd) -> list[str]:
    """Run each line of a block; the names of the subcommands."""
    lines = code.strip().splitlines()
    for line in lines:
        assert run_command(line, monkeypatch) == 0, f"{line}\n{capfd.readouterr().err}"
    return [line.split()[1] for line in lines]


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def table(page: str, heading: str) -> dict[str, dict[str, str]]:
    """The rows of a table by their first cells, each by column; of all tables of a page whose
    first column has this heading.
    """
    rows: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif cells[0] == heading:
            columns = cells[1:]
        elif columns:
            rows[cells[0]] = dict(zip(columns, cells[1:], strict=True))
    return rows


def cells_of(scores: dict[str, float]) -> dict[str, str]:
    """All scores of a report, as a table shows them."""
    return {HEADINGS.get(name, name): f"{score:.1f}" for name, score in scores.items()}


# ---- what runs ----------------------------------------------------------------------------------


def some_documents(folder):
    """50 captioned photos, three PDF files of which one is broken, and two videos."""
    for number in range(50):
        colour = ("red", "green", "blue")[number % 3]
        path = folder / "photos" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), colour).save(path)
        path.with_suffix(".txt").write_text(f"a {colour} picture")
    save_pdf(folder / "report.pdf", ["Annual report of 2025", "Expenses"], "Report")
    save_pdf(folder / "letter.pdf", ["Dear owl"])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    for name in ("walk.mp4", "swim.webm"):
        save_video(folder / name, ["green", "blue"])


def test_the_quickstart_from_top_to_bottom(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    some_documents(tmp_path / "documents")
    commands = []
    for language, options, code in blocks("docs/quickstart.md"):
        if "title=" in options:
            write_file(options, code)
        elif language == "python":
            exec(compile(code, "quickstart", "exec"), {})
        elif language == "bash":
            commands += run_commands(code, monkeypatch, capfd)
    assert commands == ["index", "search", "train", "evaluate", "index", "search", "search"]
    report = json.loads((tmp_path / "documents.idx/report.json").read_text())
    assert report["documents"] == 50 + 3 + 2
    assert list(report["last_run"]["failures"]) == ["broken.pdf"]
    hits = Index.open("documents.idx").search("annual report", 2)
    assert {hit.id for hit in hits} == {"report.pdf#page=1", "report.pdf#page=2"}
    assert (tmp_path / "scores/scores.json").exists()
    assert ".png" in capfd.readouterr().out


def test_the_search_page_from_top_to_bottom(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (50, 50), colour).save(f"photos/{colour}-line.png")
        Path(f"photos/{colour}-line.json").write_text(
            json.dumps({"text": colour, "year": 2001, "place": "Rome"})
        )
    commands = []
    for language, options, code in blocks("docs/search.md"):
        if language == "python":
            exec(compile(code, "search", "exec"), {})
            assert "blue-line.png" in capfd.readouterr().out
        elif language == "bash" and "norun" not in options:
            commands += run_commands(code, monkeypatch, capfd)
    updated = ["index", "search", "index"]
    assert commands == updated + ["search"] * 7 + ["index"] * 2
    by_ray, by_one_process = (
        sorted(Index.open(name).table.to_arrow()["id"].to_pylist())
        for name in ("spread.idx", "small.idx")
    )
    assert by_ray == by_one_process


def test_the_evaluation_page_from_top_to_bottom(tmp_path, monkeypatch, capfd):
    """Every command and file of the page, on small copies of the data sets that it mentions."""
    eval_tree(tmp_path / "mmeb-eval")
    shutil.rmtree(tmp_path / "mmeb-eval" / "NIGHTS")
    visdoc_tree(tmp_path / "mmeb-v2")
    zeroshot_tree(tmp_path / "zeroshot")
    custom_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = []
    for language, options, code in blocks("docs/evaluation.md"):
        if "title=" in options:
            write_file(options, code)
        elif language == "bash":
            commands += run_commands(code, monkeypatch, capfd)
        elif language == "json":
            Path("lines.jsonl").write_text(code)
            command = "rematch evaluate rematch-tiny --benchmark lines.jsonl"
            assert run_command(command, monkeypatch) == 0
    assert len(commands) == 15
    scores = json.loads(Path("mmeb-partial/scores.json").read_text())
    assert list(scores["left_out"]) == ["NIGHTS"]
    assert "NIGHTS" in Path("mmeb-partial/report.html").read_text()
    leaderboard = json.loads(Path("mmeb-partial/leaderboard.json").read_text())
    assert len(leaderboard["metrics"]["image"]) == 35
    assert "published scores" in Path("mmeb-scores/report.html").read_text()
    metrics = json.loads(Path("v2-scores/leaderboard.json").read_text())["metrics"]
    assert [len(metrics[modality]) for modality in ("image", "video", "visdoc")] == [0, 0, 5]
    own_tasks = json.loads(Path("own-scores/scores.json").read_text())["tasks"]
    assert list(own_tasks) == ["shop", "colours"]
    assert len(json.loads(Path("zeroshot-scores/scores.json").read_text())["tasks"]) == 15


@pytest.mark.parametrize(
    "page", ["README.md", *(page for page in PAGES if page.startswith("docs/api/"))]
)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [
        code
        for language, options, code in blocks(page)
        if language == "python" and "notest" not in options
    ]
    assert examples
    for code in examples:
        exec(compile(code, page, "exec"), {})


def test_the_readmes_commands_are_understood(monkeypatch):
    """Each line is parsed by the real command line; what it would run is replaced."""
    calls = []
    for command in cli.app.registered_commands + cli.data_app.registered_commands:
        monkeypatch.setattr(
            command, "callback", functools.wraps(command.callback)(lambda **kw: calls.append(kw))
        )
    code = next(
        code
        for language, _, code in blocks("README.md")
        if language == "bash" and code.startswith("rematch")
    )
    for line in code.strip().splitlines():
        assert run_command(line, monkeypatch) == 0, line
    assert len(calls) == 8


def test_the_ladders_overrides_are_valid():
    from rematch.train.recipe import load_recipe

    rungs = re.findall(
        r"\| `((?:model|loss|data)\.[^`]+)` \|", (ROOT / "docs/method.md").read_text()
    )
    assert len(rungs) == 5
    for rung in rungs:
        load_recipe(ROOT / "recipes/picto.yaml", rung.split())


# ---- what is linked -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    paths = r"(?:benchmarks|recipes|scripts|src|tests)/[\w./-]+\.(?:yaml|py|md|json)"
    for path in re.findall(paths, re.sub(r"benchmarks/results/gpu\.json", "", text)):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_site_and_on_its_index():
    navigation = (ROOT / "mkdocs.yml").read_text()
    index = (ROOT / "docs/index.md").read_text()
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/index.md":
            assert page.removeprefix("docs/") in navigation, page
            assert f"({page.removeprefix('docs/')})" in index, page


def test_every_public_name_is_documented():
    import rematch
    from rematch import errors

    text = "\n".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/api/"))
    documented = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    documented |= {f"rematch.{name}" for name in vars(errors) if "rematch.errors" in documented}
    assert {f"rematch.{name}" for name in rematch.__all__} <= documented


def test_the_readme_opens_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert readme.index("make demo") < readme.index("make test") < 500
    assert "make test\nmake docs\n" in (ROOT / ".ci/run").read_text()


# ---- figures ------------------------------------------------------------------------------------


def test_figures_of_the_search_benchmark_are_those_measured():
    page = (ROOT / "docs/search.md").read_text()
    measured = results("search.json")
    for name in ("rerank_packed_speedup", "rerank_feat_speedup", "encode_speedup"):
        assert f"**{measured[name]:.1f}**" in page
    for name, kind in measured["rerank_kinds"].items():
        packed, from_vectors = (kind["single_s"] / kind[way] for way in ("packed_s", "feat_s"))
        assert f"| {name} | {packed:.1f} | {from_vectors:.1f} |" in page
    for name, order in measured["picto"].items():
        assert f"| {name} | {order['hit@1']:.1f} | {order['ms_per_query']:.1f} |" in page
    widths = [measured["picto"]["cosine"]["hit@1"], *measured["picto_smaller_vectors"].values()]
    assert f"| {' | '.join(f'{hit:.1f}' for hit in widths)} |" in page
    for name in ("scan", "float", "int8", "binary"):
        row = measured["ann"][name]
        build = "" if row["build_s"] is None else f"{row['build_s']:.0f}"
        cells = f"{build} | {row['size_mb']:.0f} | {row['p50_ms']:.1f} | {row['p95_ms']:.1f}"
        assert f"| {name} | {cells} | {row['recall@10']:.3f} |" in page
    for count, peak in measured["encode_peak_mb"].items():
        assert f"| {int(count):,} | {peak:,} | {measured['encode_rate_at'][count]:.0f} |" in page


def test_figures_of_the_serving_benchmark_are_those_measured():
    page = (ROOT / "docs/serving.md").read_text()
    measured = results("serve.json")
    assert measured["failed"] == 0
    for clients, both in measured["clients"].items():
        for way, name in (("batching", "on"), ("no_batching", "off")):
            figures = " | ".join(f"{both[way][key]:.0f}" for key in ("rps", "p50_ms", "p95_ms"))
            assert f"| {clients} | {name} | {figures} |" in page
    rates = {way: figures["rps"] for way, figures in measured["clients"]["64"].items()}
    assert f"{rates['batching'] / rates['no_batching']:.2f} times as many" in page


def test_figures_of_the_evaluation_benchmark_are_those_measured():
    page = (ROOT / "docs/evaluation.md").read_text()
    measured = results("evaluate.json")
    for name in ("speedup_evaluate", "speedup_over_distinct", "speedup_encode"):
        assert f"{measured[name]:.2f}" in page
    methods = results("picto-methods.json")
    rows = table("docs/evaluation.md", "order by")
    assert {name for name in rows if set(name) != {"-"}} == set(methods["methods"])
    for name, method in methods["methods"].items():
        milliseconds = {"ms per query": f"{methods['run']['ms_per_query'][name]:.2f}"}
        assert rows[name] == cells_of(method["scores"]) | milliseconds


def test_figures_of_the_ablation_are_those_measured():
    page = (ROOT / "docs/ablation.md").read_text()
    probe = results("ablation/probe.json")
    for kind in ("label", "crop", "picture"):
        cosines = probe["document_cosine"][kind]
        assert f"{cosines['with']:.2f}" in page
        assert f"{cosines['without']:.2f}" in page
    rows = table("docs/ablation.md", "tokens")
    columns = {"picture → caption": "I2T", "caption → picture": "T2I"}
    for model, label in (("start", "before training"), ("rematch-tiny", "`rematch-tiny`")):
        for tokens, of_tokens in (("copies", "copies"), ("random", "random"), ("all", "all 16")):
            cells = rows[f"{of_tokens}, {label}"]
            assert len(cells) == 6
            for column, cell in cells.items():
                hits = probe["hits_by_start"][model][f"Picto-{columns.get(column, column)}"]
                assert cell == f"{hits[tokens]:.0f}"
    for arm in ("all", "all-no-orth"):
        log = results(f"ablation/changes/{arm}-seed0.json")["training"]
        (cosine,) = (entry["token_cosine"] for entry in log if "token_cosine" in entry)
        assert f"{cosine:.2f}" in page
    for losses in probe["gradients"].values():
        share = losses["matching"]["norm"] / losses["contrastive"]["norm"]
        assert f" {100 * share:.0f} % " in page
    seconds = results("ablation/seconds.json")["seconds_per_step"]
    for arm in ("3-hard-negatives", "5-multi-token", "6-all", "7-all-reuse"):
        assert f"{seconds[arm]:.2f} s" in page
    milliseconds = results("ablation/encoding.json")["encode_ms_per_scene"]
    for tokens in ("K=0", "K=16"):
        assert f"{milliseconds[tokens]:.2f} ms" in page


def test_figures_of_pictos_pages_and_clips_are_those_measured():
    rows = table("docs/evaluation.md", "set")
    for report in results("picto-v2.json").values():
        for name, scores in report["tasks"].items():
            metric = {"Hit@1": "hit@1", "nDCG@5": "ndcg@5"}[rows[name]["metric"]]
            assert rows[name]["rematch-tiny"] == f"{scores[metric]:.1f}"
        chances = [float(rows[name]["chance"]) for name in report["tasks"]]
        assert sum(chances) / len(chances) == pytest.approx(report["chance"]["overall"], abs=0.06)


def test_the_scores_in_the_docs_are_those_of_the_committed_reports():
    page = " ".join((ROOT / "docs/picto.md").read_text().split())
    rows = table("docs/picto.md", "Hit@1 (%)")
    report = json.loads((ROOT / "docs/demo-report.json").read_text())
    floors = {"chance": report["chance"], "commonest answer": report["commonest"]}
    for name, scores in (report["arms"] | floors).items():
        assert rows[name] == cells_of(scores)
    tiny = json.loads((ROOT / "src/rematch/assets/tiny/scores.json").read_text())["scores"]
    assert rows["rematch-tiny, whole test set"] == cells_of(tiny)
    base = json.loads((ROOT / "src/rematch/assets/base/scores.json").read_text())
    assert f"Exact VQA answers {base['vqa']:.1f} %" in page
    assert f"Yes/No matching {base['match']:.1f} %" in page
    assert f"implies: {base['near_miss']:.1f} %" in page
    contrastive = results("picto-contrastive.json")["scores"]
    assert rows["contrastive, full length"] == cells_of(contrastive)
    assert 40 < contrastive["overall"] < 85


def test_figures_of_the_step_benchmark_are_those_measured():
    page = (ROOT / "docs/performance.md").read_text().partition("## What a step costs")[2]
    measured = results("step-cpu.json")
    for arm, seconds in measured["seconds_per_step"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{arm}`"))
        cells = [cell.strip() for cell in row.split("|")[3:-1]]
        matching = measured["matching_seconds"].get(arm)
        assert cells[0] == f"{seconds:.2f}"
        assert cells[1] == ("" if matching is None else f"{matching:.2f}")
        assert cells[2] == f"{measured['step_memory_mb'][arm]:,}"
        assert cells[3] == f"{measured['mfu'][arm]:.2f}"
    for ratio in measured["ratios"].values():
        assert f"{ratio:.2f}" in page
