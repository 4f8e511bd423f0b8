"""The documentation runs: the quickstart from top to bottom, the README's examples, its commands'
names.
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
from shared_benchmarks import custom_data, eval_tree, zeroshot_tree

from rematch import Index, cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(\w+)([^\n]*)\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


def run_command(line: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_quickstart_from_top_to_bottom(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, options, code in blocks("docs/quickstart.md"):
        if "file=" in options:
            Path(options.split("file=")[1].strip()).write_text(code)
        elif language == "python":
            exec(compile(code, "quickstart", "exec"), {})
        elif language == "bash":
            for line in code.strip().splitlines():
                assert run_command(line, monkeypatch) == 0, f"{line}\n{capfd.readouterr().err}"
                ran.append(line.split()[1])
    assert ran == ["train", "evaluate", "index", "search", "search"]
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
    ran = []
    for language, options, code in blocks("docs/search.md"):
        if language == "python":
            exec(compile(code, "search", "exec"), {})
            assert "blue-line.png" in capfd.readouterr().out
        elif language == "bash" and "norun" not in options:
            for line in code.strip().splitlines():
                assert run_command(line, monkeypatch) == 0, f"{line}\n{capfd.readouterr().err}"
                ran.append(line.split()[1])
    assert ran == ["index", "search", "index", "search", "search", "search", "index", "index"]
    by_ray, alone = (
        sorted(Index.open(name).table.to_arrow()["id"].to_pylist())
        for name in ("spread.idx", "small.idx")
    )
    assert by_ray == alone


def test_figures_of_the_search_benchmark_are_those_measured():
    page = (ROOT / "docs/search.md").read_text()
    measured = json.loads((ROOT / "benchmarks/results/search.json").read_text())
    for name in ("rerank_packed_speedup", "rerank_feat_speedup", "encode_speedup"):
        assert f"**{measured[name]:.1f}**" in page
    for name, kind in measured["rerank_kinds"].items():
        ratios = (
            f"{kind['single_s'] / kind['packed_s']:.1f} | {kind['single_s'] / kind['feat_s']:.1f}"
        )
        assert f"| {name} | {ratios} |" in page
    for name, order in measured["picto"].items():
        assert f"| {name} | {order['hit@1']:.1f} | {order['ms_per_query']:.1f} |" in page
    smaller = measured["picto_smaller_vectors"]
    assert (
        f"| {measured['picto']['cosine']['hit@1']:.1f} | "
        f"{' | '.join(f'{v:.1f}' for v in smaller.values())} |" in page
    )
    for name in ("scan", "float", "int8", "binary"):
        found = measured["ann"][name]
        built = "" if found["build_s"] is None else f"{found['build_s']:.0f}"
        cells = f"{built} | {found['size_mb']:.0f} | {found['p50_ms']:.1f} | {found['p95_ms']:.1f}"
        assert f"| {name} | {cells} | {found['recall@10']:.3f} |" in page
    for count, peak in measured["encode_peak_mb"].items():
        assert f"| {int(count):,} | {peak:,} | {measured['encode_rate_at'][count]:.0f} |" in page


def test_figures_of_the_serving_benchmark_are_those_measured():
    page = (ROOT / "docs/serving.md").read_text()
    measured = json.loads((ROOT / "benchmarks/results/serve.json").read_text())
    assert measured["failed"] == 0
    for clients, both in measured["clients"].items():
        for way, name in (("batching", "on"), ("no_batching", "off")):
            figures = " | ".join(f"{both[way][k]:.0f}" for k in ("rps", "p50_ms", "p95_ms"))
            assert f"| {clients} | {name} | {figures} |" in page
    most = measured["clients"]["64"]
    assert f"{most['batching']['rps'] / most['no_batching']['rps']:.2f} times as many" in page


def test_the_evaluation_page_from_top_to_bottom(tmp_path, monkeypatch, capfd):
    """Every command and file of the page, on small copies of the data sets that it speaks of."""
    eval_tree(tmp_path / "mmeb-eval")
    shutil.rmtree(tmp_path / "mmeb-eval" / "NIGHTS")
    zeroshot_tree(tmp_path / "zeroshot")
    custom_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for language, options, code in blocks("docs/evaluation.md"):
        if "file=" in options:
            Path(options.split("file=")[1].strip()).write_text(code)
        elif language == "bash":
            for line in code.strip().splitlines():
                assert run_command(line, monkeypatch) == 0, f"{line}\n{capfd.readouterr().err}"
                ran += 1
        elif language == "json":
            Path("lines.jsonl").write_text(code)
            assert (
                run_command("rematch evaluate rematch-tiny --benchmark lines.jsonl", monkeypatch)
                == 0
            )
    assert ran == 11
    scores = json.loads(Path("mmeb-partial/scores.json").read_text())
    assert list(scores["left_out"]) == ["NIGHTS"]
    assert "NIGHTS" in Path("mmeb-partial/report.html").read_text()
    assert (
        len(json.loads(Path("mmeb-partial/leaderboard.json").read_text())["metrics"]["image"])
        == 35
    )
    assert "published figures" in Path("mmeb-scores/report.html").read_text()
    assert list(json.loads(Path("own-scores/scores.json").read_text())["tasks"]) == [
        "shop",
        "colours",
    ]
    assert len(json.loads(Path("zeroshot-scores/scores.json").read_text())["tasks"]) == 15


def test_figures_of_the_evaluation_benchmark_are_those_measured():
    page = (ROOT / "docs/evaluation.md").read_text()
    measured = json.loads((ROOT / "benchmarks/results/evaluate.json").read_text())
    for name in ("speedup_evaluate", "speedup_over_distinct", "speedup_encode"):
        assert f"{measured[name]:.2f}" in page
    methods = json.loads((ROOT / "benchmarks/results/picto-methods.json").read_text())
    for name, found in methods["methods"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        cells = [f"{found['scores'][c]:.1f}" for c in METHOD_COLUMNS]
        assert row.split(" | ")[1:-1] == cells
        assert row.endswith(f" {methods['run']['ms_per_query'][name]:.2f} |")


METHOD_COLUMNS = ("overall", "classification", "vqa", "retrieval", "grounding", "ood_overall")


def test_the_readmes_python_runs():
    code = [
        c
        for language, options, c in blocks("README.md")
        if language == "python" and "notest" not in options
    ]
    assert len(code) == 1
    exec(compile(code[0], "README", "exec"), {})


def test_the_readmes_commands_are_understood(monkeypatch):
    """Each line is parsed by the real command line; what it would run is replaced."""
    called = []
    for command in cli.app.registered_commands + cli.data_app.registered_commands:
        monkeypatch.setattr(
            command, "callback", functools.wraps(command.callback)(lambda **kw: called.append(kw))
        )
    code = [
        c
        for language, _, c in blocks("README.md")
        if language == "bash" and c.startswith("rematch")
    ]
    for line in code[0].strip().splitlines():
        assert run_command(line, monkeypatch) == 0, line
    assert len(called) == 8


@pytest.mark.parametrize(
    "page",
    sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]),
)
def test_links_and_recipes_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"(?:recipes|scripts|src)/[\w./-]+\.(?:yaml|py|md)", text):
        assert (ROOT / path).exists(), path


def test_the_ladders_overrides_are_valid():
    from rematch.train.recipe import load_recipe

    rungs = re.findall(
        r"\| `((?:model|loss|data)\.[^`]+)` \|", (ROOT / "docs/method.md").read_text()
    )
    assert len(rungs) == 5
    for rung in rungs:
        load_recipe(ROOT / "recipes/picto.yaml", rung.split())


def test_the_readme_opens_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert readme.index("make demo") < readme.index("make test") < 500
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_scores_in_the_docs_are_those_of_the_committed_reports():
    page = (ROOT / "docs/picto.md").read_text()
    report = json.loads((ROOT / "docs/demo-report.json").read_text())
    columns = ("overall", "classification", "vqa", "retrieval", "grounding", "ood_overall")
    rows = {**report["arms"], "chance": report["chance"], "commonest answer": report["commonest"]}
    for name, scores in rows.items():
        cells = " | ".join(f"{scores[c]:.1f}" for c in columns)
        assert f"| {name} | {cells} |" in page
    tiny = json.loads((ROOT / "src/rematch/assets/tiny/scores.json").read_text())
    cells = " | ".join(f"{tiny['scores'][c]:.1f}" for c in columns)
    assert f"| rematch-tiny, whole test set | {cells} |" in page
    base = json.loads((ROOT / "src/rematch/assets/base/scores.json").read_text())
    assert f"exact VQA answers {base['vqa']:.1f} %" in page
    assert f"Yes/No matching {base['match']:.1f} %" in page
    assert f"implies: {base['near_miss']:.1f} %" in page
    contrastive = json.loads((ROOT / "benchmarks/results/picto-contrastive.json").read_text())[
        "scores"
    ]
    assert (
        f"| contrastive, full length | {' | '.join(f'{contrastive[c]:.1f}' for c in columns)} |"
        in page
    )
    assert 40 < contrastive["overall"] < 85


def test_figures_of_the_step_benchmark_are_those_measured():
    page = (ROOT / "docs/training.md").read_text().partition("## What a step costs")[2]
    measured = json.loads((ROOT / "benchmarks/results/step-cpu.json").read_text())
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
