"""Reranking: each stage against the score that it stands for."""

import numpy as np
import pytest
from shared_search import ROUNDING, assert_best, library_inputs, scores_of

from rematch.errors import RematchError
from rematch.matching import View
from rematch.scoring import maxsim
from rematch.search.cascade import Stage, parse_stages
from rematch.search.schema import IndexSettings


def settings(dimensions: int) -> IndexSettings:
    return IndexSettings("m", "2:0", dimensions, 0, True, "c")


@pytest.mark.parametrize("view", ["raw-raw", "feat-feat", "raw-feat"])
def test_reranking_is_match_of_each_pair(searcher, library, view):
    inputs = library_inputs(library)
    nearest = [
        int(hit.id[1:]) for hit in library.search("number 3", 12, instruction="", mode="vector")
    ]
    p_yes = {f"d{i}": searcher.match(["number 3"], [inputs[i]], view)[0] for i in nearest[:10]}
    hits = library.search("number 3", 12, rerank=f"{view}:10", instruction="", mode="vector")
    assert_best(scores_of(hits[:10]), p_yes, ROUNDING)
    assert [hit.id for hit in hits[10:]] == [f"d{i}" for i in nearest[10:]], (
        "the others keep their places"
    )
    assert [hit.by for hit in hits] == [view] * 10 + ["cosine"] * 2


def test_the_cascade_goes_from_stage_to_stage(searcher, library):
    tokens = searcher.encode_document(
        library_inputs(library), multi_vector=True, show_progress_bar=False
    )
    query = searcher.encode_query(["number 3"], multi_vector=True, show_progress_bar=False)[0]
    nearest = np.array(
        [int(hit.id[1:]) for hit in library.search("number 3", 20, instruction="", mode="vector")]
    )
    by_tokens = nearest[np.argsort(-maxsim(query, tokens[nearest]), kind="stable")]
    hits = library.search("number 3", 20, rerank="maxsim:20", instruction="", mode="vector")
    # stored in float16: a component is off by at most 2**-12, a cosine by the length of such a
    # vector, 2**-12 * sqrt(32) = 1.4e-3
    assert [hit.score for hit in hits] == pytest.approx(
        maxsim(query, tokens[by_tokens]).tolist(), abs=2e-3
    )
    staged = library.search(
        "number 3", 20, rerank="maxsim:20,feat:10,raw:3", instruction="", mode="vector"
    )
    assert [hit.by for hit in staged] == ["raw-raw"] * 3 + ["feat-feat"] * 7 + ["maxsim"] * 10
    assert {hit.id for hit in staged[:10]} == {hit.id for hit in hits[:10]}
    assert [hit.id for hit in staged[10:]] == [hit.id for hit in hits[10:]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("feet:10", "write STAGE:COUNT"),
        ("feat", "write STAGE:COUNT"),
        ("feat:10,raw:20", "Counts must not increase"),
        ("maxsim:10", "Build it with --tokens"),
        ("feat:10", "reads whole vectors only"),
    ],
)
def test_invalid_stages_are_refused(spec, message):
    with pytest.raises(RematchError, match=message):
        parse_stages(spec, settings(8 if "whole" in message else 32), 32)


def test_a_number_alone_is_raw():
    assert parse_stages("10", settings(8), 32) == [Stage(View.RAW_RAW, 10)]


def test_a_stage_takes_the_name_of_a_view():
    stage = Stage("feat-feat", 3)
    assert stage == Stage(View.FEAT_FEAT, 3)
    assert stage.reads("vector")
    assert not stage.reads("tokens")
    with pytest.raises(RematchError, match="view 'feat' is unknown"):
        Stage("feat", 3)
