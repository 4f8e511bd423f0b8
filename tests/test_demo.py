"""The demo in small: two steps an arm, two tasks, the report's numbers and pictures."""

import json
import re

from rematch.data.picto_tasks import TASKS
from rematch.demo import run_demo
from rematch.matching import VIEWS


def test_the_demo_writes_both_reports(tmp_path, monkeypatch):
    names = ("Picto-Count", "Picto-HowMany", "Picto-I2T", "Picto-Grounding")
    tasks = {n: TASKS[n] for n in names}
    monkeypatch.setattr("rematch.data.picto_tasks.TASKS", tasks)
    monkeypatch.setattr("rematch.demo.BATCH", 4)
    page = run_demo(tmp_path / "out", steps=2)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["benchmark"] == "picto"
    assert report["seconds"] > 0
    assert set(report["arms"]) == {"contrastive", "rematch", "rematch-tiny"}
    for scores in (*report["arms"].values(), report["chance"]):
        assert set(scores) == {"overall", "classification", "vqa", "retrieval", "grounding", "ood_overall"}
        assert all(0 <= v <= 100 for v in scores.values())
    assert set(report["matching_accuracy"]) == {f"{v}/{d}" for v in VIEWS for d in ("positive", "negative")}
    html = page.read_text()
    assert html.count("data:image/png;base64,") > 30
    assert not re.search(r'(?:src|href)="http', html)  # self-contained
    assert "prove no ranking" in html
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
