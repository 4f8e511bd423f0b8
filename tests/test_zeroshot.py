"""The five zero-shot sets in their published files."""

import shutil

import pytest
from shared_benchmarks import zeroshot_tree

from rematch.data.zeroshot import load_zeroshot
from rematch.errors import DataError
from rematch.evaluate.benchmarks import load_benchmark


def test_the_five_zero_shot_sets_are_loaded_from_their_published_files(tmp_path):
    zeroshot_tree(tmp_path)
    tasks, missing = load_zeroshot(tmp_path)
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
    assert [t.meta_task for t in tasks[-7:]].count("SugarCrepe add") == 2
    shutil.rmtree(tmp_path / "Urban1k")
    (tmp_path / "val2017" / f"{0:012}.jpg").unlink()
    benchmark = load_benchmark("zeroshot", tmp_path)
    assert "no Urban1k under" in benchmark.left_out["Urban1K"]
    assert "names the picture 000000000000.jpg" in benchmark.left_out["SugarCrepe add-obj"]
    assert len(benchmark.tasks) == 6
    with pytest.raises(DataError, match="holds none of the zero-shot sets"):
        load_zeroshot(tmp_path / "coco" / "val2014")
    (tmp_path / "coco" / "dataset_coco.json").write_text('{"pictures": []}')
    assert "not in the published format" in load_zeroshot(tmp_path)[1]["COCO5k"]
