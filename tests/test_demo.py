"""The demo on a small scale: two steps per model, four tasks; what the reports hold."""

import json
import re
from dataclasses import replace

import pytest

from rematch.data.picto_tasks import TASKS, evaluation_tasks
from rematch.demo.command import DemoOptions, run_demo
from rematch.demo.pace import MAX_STEPS, MIN_STEPS, Pace, seconds_per_step
from rematch.demo.run import demo_recipes, verdict
from rematch.evaluate.metrics import Interval
from rematch.matching import View


def with_ten_queries(**options):
    """Picto's tasks with ten queries each."""
    return [
        replace(task, queries=task.queries[:10], candidates=task.candidates[:10])
        for task in evaluation_tasks(**options)
    ]


def test_the_demo_writes_both_reports(tmp_path, monkeypatch):
    names = ("Picto-Count", "Picto-HowMany", "Picto-I2T", "Picto-Grounding")
    tasks = {n: TASKS[n] for n in names}
    monkeypatch.setattr("rematch.data.picto_tasks.TASKS", tasks)
    monkeypatch.setattr("rematch.data.picto_tasks.TRAINED_TASKS", names[2:])
    monkeypatch.setattr("rematch.demo.run.BATCH_SIZE", 4)
    monkeypatch.setattr("rematch.demo.run.evaluation_tasks", with_ten_queries)
    page = run_demo(DemoOptions(tmp_path / "out", steps=2))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["benchmark"] == "picto"
    assert report["seconds"] > 0
    assert report["steps_per_arm"] == 2
    assert set(report["seconds_per_step"]) == {"contrastive", "rematch"}
    assert report["why"].startswith("2 training steps per model (time per step: contrastive ")
    assert set(report["arms"]) == {"contrastive", "rematch", "rematch-tiny"}
    for scores in (*report["arms"].values(), report["chance"]):
        assert set(scores) == {
            "overall",
            "classification",
            "vqa",
            "retrieval",
            "grounding",
            "ind",
            "ood",
            "style",
        }
        assert all(0 <= v <= 100 for v in scores.values())
    assert set(report["matching_accuracy"]) == {
        f"{v}/{d}" for v in View for d in ("positive", "negative")
    }
    html = page.read_text()
    assert report["why"] in html
    assert html.count("data:image/png;base64,") > 30
    assert not re.search(r'(?:src|href)="http', html)  # self-contained
    assert "prove no ranking" in html
    difference = report["difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert report["verdict"] in html
    assert "<th>overall<th>IND<th>OOD<th>style" in html
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.5, 6.5, "rematch is 3.5 points ahead of contrastive overall ("),
        (-6.5, -0.5, "rematch is 3.5 points behind contrastive overall ("),
        (-2.0, 3.0, "cannot tell rematch and contrastive apart"),
    ],
)
def test_the_verdict_says_who_is_ahead_and_how_certainly(low, high, words):
    sentence = verdict(Interval((low + high) / 2, low, high), 48)
    assert words in sentence
    assert f"95 % interval of the difference: {low:+.1f} to {high:+.1f}, over" in sentence
    assert ("16 new tokens that 48 steps" in sentence) == (high < 0)


@pytest.mark.parametrize(
    ("remaining", "steps", "why"),
    [
        (1000.0, MAX_STEPS, "the maximum of the demo"),
        (260.0, 33, "as many as fit into 5 minutes"),
        (60.0, MIN_STEPS, "will take about 6.7 minutes instead of 5"),
    ],
)
def test_the_demo_trains_as_long_as_its_time_allows(remaining, steps, why):
    pace = Pace({"contrastive": 1.0, "rematch": 3.0}, 20.0, remaining)
    assert pace.steps == steps
    assert why in pace.explain(steps, requested=False)
    assert pace.explain(7, requested=True).endswith("as requested.")


def test_a_step_is_timed_on_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("rematch.demo.run.BATCH_SIZE", 2)
    for name, recipe in demo_recipes(4, tmp_path).items():
        assert seconds_per_step(recipe) > 0, name
