"""Helpers of the tests that build and search indexes."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.search.build import Report, build
from rematch.search.index import Index
from rematch.search.storage import exists

# Sums in another order (batches, threads, vector instructions) change components of unit vectors,
# and cosines of two of them, by less than this in float32: a few hundred terms, two normalised
# layers.
ROUNDING = 1e-5


NAMES = ("plain", "with space", "ünï-コード", "it's", 'quo"te', "new\nline", "semi;colon--")


def save_picture(path: Path, seed: int, size: int = 40) -> Path:
    """Write a picture of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def build_index(
    model: ReMatch,
    corpus: Path,
    output: Path,
    *,
    dimensions: int = 0,
    tokens: bool = False,
    batch_tokens: int = 200,
    **settings,
) -> tuple[Index, Report]:
    """Create or update an index of a corpus."""
    if exists(output):
        index = Index.open(output, model)
    else:
        name = model.model_card_data.base_model or "model"
        index = Index.create(output, model, name=name, dimensions=dimensions, tokens=tokens)
    encoder = Encoder(model, batch_tokens=batch_tokens, workers=0)
    return index, build(index, open_corpus(corpus), encoder, **settings)


def contents(uri: Path | str) -> list[dict]:
    """All rows of an index, ordered by id."""
    rows = Index.open(uri).table.search().limit(None).to_list()
    return sorted(rows, key=lambda row: row["id"])


def assert_same_rows(rows: list[dict], expected: list[dict]) -> None:
    """Two indexes have the same rows, up to rounding of the vectors."""
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for a, b in zip(rows, expected, strict=True):
        assert np.allclose(a.pop("vector"), b.pop("vector"), atol=ROUNDING)
        assert ("tokens" in a) == ("tokens" in b)
        if "tokens" in a:
            # float16: a number near a rounding boundary may be rounded either way, and below 1
            # the two results are 2**-11 apart
            assert np.allclose(
                np.array(a.pop("tokens")), np.array(b.pop("tokens")), atol=2**-11 + ROUNDING
            )
        assert {k: v for k, v in a.items() if v is not None} == {
            k: v for k, v in b.items() if v is not None
        }


def scores_of(hits) -> dict[str, float]:
    return {hit.id: hit.score for hit in hits}


def assert_best(ranked: dict[str, float], scores: dict[str, float], tolerance: float) -> None:
    """The ranking has the best documents in order, except those that rounding may swap."""
    listed = [scores[name] for name in ranked]
    assert list(ranked.values()) == pytest.approx(listed, abs=tolerance)
    assert all(after <= before + 2 * tolerance for before, after in pairwise(listed))
    assert (
        max((s for name, s in scores.items() if name not in ranked), default=-1)
        <= min(listed) + 2 * tolerance
    )


def library_inputs(index: Index) -> list[dict]:
    """The inputs that the documents of the fixture ``library`` were encoded from."""
    documents = open_corpus(Path(index.uri).parent / "c.jsonl")
    return [document.item().as_input() for document in documents]
