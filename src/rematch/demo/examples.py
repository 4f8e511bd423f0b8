"""Examples for the demo's report: searches in a small corpus, and attention maps."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rematch.data import picto
from rematch.data.picto import Scene
from rematch.data.schema import Item
from rematch.interpretability import attention_maps, overlay
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS

_TOKENS_SHOWN = 6


@dataclass(frozen=True)
class ExampleSearch:
    """A query, and the best documents with their cosines."""

    query: dict[str, Any]
    hits: list[tuple[Item, float]]


@dataclass(frozen=True)
class ExampleMaps:
    """Where the learnable tokens of a document look in a picture.

    Attributes:
        caption: Caption of the picture.
        picture: The picture.
        all_tokens: The map of all tokens together, over the picture.
        tokens: The maps of the first tokens, over the picture.
    """

    caption: str
    picture: Image.Image
    all_tokens: Image.Image
    tokens: list[Image.Image]


def example_maps(model: ReMatch) -> list[ExampleMaps]:
    """Attention maps of two unseen scenes."""
    rng = random.Random(3)
    examples = []
    for _ in range(2):
        scene = picto.sample_scene(rng, held_out=True, count=3, distinct=True)
        picture = picto.render(scene, "noto", 1)
        weights = attention_maps(model, picture)
        examples.append(
            ExampleMaps(
                picto.caption(scene),
                picture,
                overlay(picture, weights.mean(0)),
                [overlay(picture, token) for token in weights[:_TOKENS_SHOWN]],
            )
        )
    return examples


def example_searches(model: ReMatch) -> list[ExampleSearch]:
    """Four searches in 100 unseen scenes: two by text, one by picture, one by both."""
    rng = random.Random(7)
    scenes = [picto.sample_scene(rng, held_out=True, distinct=True) for _ in range(80)]
    original = scenes[1]
    old, new = original.objects[0], scenes[2].objects[0]
    a, b, c, d = (new if name == old else name for name in original.cells)
    scenes.append(Scene((a, b, c, d), original.background))
    scenes += [picto.near_miss(scene, rng) for scene in scenes[:19]]
    corpus = [
        Item(
            image=picto.render(scene, rng.choice(picto.TRAIN_STYLES), i),
            instruction=DOCUMENT_INSTRUCTIONS["image"],
            key=picto.caption(scene),
        )
        for i, scene in enumerate(scenes)
    ]
    vectors = model.encode_document([item.as_input() for item in corpus], show_progress_bar=False)
    queries = _example_queries(scenes, original, old, new)
    scores_of_queries = model.encode_query(queries, show_progress_bar=False) @ vectors.T
    return [
        ExampleSearch(
            query, [(corpus[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:5]]
        )
        for query, scores in zip(queries, scores_of_queries, strict=True)
    ]


def _example_queries(
    scenes: list[Scene], original: Scene, old: str, new: str
) -> list[dict[str, Any]]:
    """The queries; the last one asks for a scene with ``new`` in place of ``old``."""
    to_scene = "Find me an image that matches the given caption: "
    with_two_objects = next(scene for scene in scenes if len(scene.objects) == 2)
    return [
        {"text": to_scene + picto.caption(scenes[0])},
        {"text": to_scene + picto.caption(scenes[3])},
        {
            "text": "Find an image that shows the same scene drawn in another style.",
            "image": picto.render(with_two_objects, picto.UNSEEN_STYLE, 99),
        },
        {
            "text": "Find a similar image with the described change: "
            f"replace the {old} with {picto.with_article(new)}.",
            "image": picto.render(original, "noto", 98),
        },
    ]
