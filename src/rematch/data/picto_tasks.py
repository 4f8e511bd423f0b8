"""Picto's twelve tasks in MMEB's four meta-tasks: endless training triplets, and the fixed test
set.

A task is a function that turns a random generator into a :class:`Sample`: a query and documents
that all but the first answer wrongly by **one thing**. Training takes one such near-miss as hard
negative; the test set puts near-misses into every candidate list.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from PIL import Image

from rematch.data import picto
from rematch.data.picto import Scene
from rematch.data.schema import Item, RetrievalTask, Triplet
from rematch.prompts import DOCUMENT_INSTRUCTIONS

T = TypeVar("T")

NUMBERS = ("zero", "one", "two", "three", "four")
QUERIES, CANDIDATES, BLOCK = 200, 100, 50
TEST_SEED = 20260101


@dataclass(frozen=True)
class Draw:
    """Where a sample's scenes and pictures come from."""

    rng: random.Random
    held_out: bool
    styles: tuple[str, ...]
    augment: bool
    changes: tuple[str, ...] = picto.CHANGES  # what near-misses of scenes differ in
    turn: int | None = (
        None  # in the test set: number of the query, so that right answers take turns
    )

    def pick(self, answers: Sequence[T]) -> T:
        return self.rng.choice(answers) if self.turn is None else answers[self.turn % len(answers)]

    def scene(self, count: int | None = None, repeats: int = 0, distinct: bool = False) -> Scene:
        return picto.sample_scene(
            self.rng, held_out=self.held_out, count=count, repeats=repeats, distinct=distinct
        )

    def style(self) -> str:
        return self.rng.choice(self.styles)

    def picture(self, scene: Scene, style: str | None = None) -> Image.Image:
        return picto.render(
            scene, style or self.style(), self.rng.getrandbits(32), augment=self.augment
        )

    def other_style(self, style: str) -> str:
        """A training style that differs from ``style``: unseen art is only ever asked about, never
        the answer.
        """
        return self.rng.choice([s for s in picto.TRAIN_STYLES if s != style])


@dataclass(frozen=True)
class Sample:
    """A query and its documents: the right one first, then near-misses (at least one)."""

    query: Item
    documents: list[Item]


def _text(kind: str, text: str) -> Item:
    return Item(text, instruction=DOCUMENT_INSTRUCTIONS[kind], key=text)


def _picture(kind: str, image: Image.Image, key: str = "") -> Item:
    return Item(image=image, instruction=DOCUMENT_INSTRUCTIONS[kind], key=key)


def _wrong(draw: Draw, right: str, among: list[str] | tuple[str, ...]) -> str:
    return draw.rng.choice([x for x in among if x != right])


def _classify(instruction: str, scene: Scene, draw: Draw, right: str, wrong: str) -> Sample:
    query = Item(image=draw.picture(scene), instruction=instruction)
    return Sample(query, [_text("label", right), _text("label", wrong)])


def category(draw: Draw) -> Sample:
    wanted = draw.pick(picto.categories())
    count = draw.rng.randint(1, 3)
    while picto.objects()[(scene := draw.scene(count, repeats=count)).objects[0]] != wanted:
        pass
    wrong = _wrong(draw, wanted, picto.categories())
    return _classify(
        "Identify the category of the object shown in the image.", scene, draw, wanted, wrong
    )


def background(draw: Draw) -> Sample:
    wanted = draw.pick(list(picto.COLOURS))
    while (scene := draw.scene()).background != wanted:
        pass
    wrong = _wrong(draw, wanted, list(picto.COLOURS))
    return _classify("Identify the background colour of the image.", scene, draw, wanted, wrong)


def count(draw: Draw) -> Sample:
    n = draw.pick((1, 2, 3, 4))
    near = draw.rng.choice([m for m in (n - 1, n + 1) if 1 <= m <= 4])
    instruction = "Identify the number of objects in the image."
    return _classify(instruction, draw.scene(n), draw, NUMBERS[n], NUMBERS[near])


def _ask(draw: Draw, scene: Scene, question: str, right: str, *wrong: str) -> Sample:
    instruction = "Represent the given image with the following question: "
    query = Item(question, draw.picture(scene), instruction)
    return Sample(query, [_text("answer", answer) for answer in (right, *wrong)])


def _relation(draw: Draw, relations: tuple[str, str]) -> Sample:
    while True:
        scene = draw.scene(draw.rng.randint(2, 4), distinct=True)
        asked = [r for r in picto.neighbours(scene) if r[0] in relations]
        if asked:
            relation, anchor, cell = draw.rng.choice(asked)
            right = scene.cells[cell]
            others = [n for n in scene.objects if n != right]
            wrong = draw.rng.choice(others)
            rest = [
                n for n in others if n != wrong
            ]  # whatever else the picture shows is wrong by its place
            return _ask(draw, scene, f"What is {relation} the {anchor}?", right, wrong, *rest)


def beside(draw: Draw) -> Sample:
    return _relation(draw, ("left of", "right of"))


def above(draw: Draw) -> Sample:
    return _relation(draw, ("above", "below"))


def how_many(draw: Draw) -> Sample:
    n = draw.pick((1, 2, 3, 4))
    scene = draw.scene(4 if n == 4 else draw.rng.randint(n, 4), repeats=n)
    name = Counter(scene.objects).most_common()[0][0]
    if n == 1:
        name = draw.rng.choice(picto.unique_objects(scene))
    near = draw.rng.choice([m for m in (n - 1, n + 1) if 1 <= m <= 4])
    question = f"How many times do you see {picto.with_article(name)}?"
    return _ask(draw, scene, question, NUMBERS[n], NUMBERS[near])


def what_colour(draw: Draw) -> Sample:
    wanted = draw.pick(list(picto.COLOURS))
    while (scene := draw.scene()).background != wanted:
        pass
    return _ask(
        draw,
        scene,
        "What colour is the background?",
        wanted,
        _wrong(draw, wanted, list(picto.COLOURS)),
    )


def caption_to_scene(draw: Draw) -> Sample:
    scene = draw.scene()
    query = Item(
        picto.caption(scene), instruction="Find me an image that matches the given caption: "
    )
    return Sample(query, _scenes(draw, scene, draw.style()))


def scene_to_caption(draw: Draw) -> Sample:
    scene = draw.scene()
    query = Item(
        image=draw.picture(scene), instruction="Find an image caption describing the given image."
    )
    captions = [picto.caption(s) for s in (scene, picto.near_miss(scene, draw.rng, draw.changes))]
    return Sample(query, [_text("caption", c) for c in captions])


def style_to_style(draw: Draw) -> Sample:
    scene, style = draw.scene(), draw.style()
    instruction = "Find an image that shows the same scene drawn in another style."
    return Sample(
        Item(image=draw.picture(scene, style), instruction=instruction),
        _scenes(draw, scene, draw.other_style(style)),
    )


def edit(draw: Draw) -> Sample:
    while True:
        before = draw.scene(draw.rng.randint(2, 4), distinct=True)
        cell = draw.rng.choice([i for i, name in enumerate(before.cells) if name])
        old, new = before.cells[cell], draw.rng.choice(list(picto.objects()))
        a, b, c, d = (new if i == cell else name for i, name in enumerate(before.cells))
        after = replace(before, cells=(a, b, c, d))
        if new not in before.objects and picto.is_held_out(after) == draw.held_out:
            break
    style = draw.style()
    change = f"replace the {old} with {picto.with_article(new)}."
    query = Item(
        change, draw.picture(before, style), "Find a similar image with the described change: "
    )
    changes = tuple(c for c in ("object", "swap", "colour") if c in draw.changes)
    near = before if draw.rng.random() < 0.3 else picto.near_miss(after, draw.rng, changes)
    return Sample(
        query, [_picture("image", draw.picture(s, style), picto.caption(s)) for s in (after, near)]
    )


def grounding(draw: Draw) -> Sample:
    while True:
        scene = draw.scene(draw.rng.randint(2, 4), distinct=True)
        asked = picto.neighbours(scene)
        if asked:
            break
    relation, anchor, cell = draw.rng.choice(asked)
    picture = draw.picture(scene)
    instruction = "Select the portion of the image that isolates the object labeled as "
    query = Item(f'"the object {relation} the {anchor}"', picture, instruction)
    other = draw.rng.choice([i for i, name in enumerate(scene.cells) if name and i != cell])
    return Sample(query, [_picture("crop", picto.crop(picture, c)) for c in (cell, other)])


def _scenes(draw: Draw, scene: Scene, style: str) -> list[Item]:
    near = picto.near_miss(scene, draw.rng, draw.changes)
    return [_picture("image", draw.picture(s, style), picto.caption(s)) for s in (scene, near)]


# name: (meta-task, generator). The names are the benchmark's.
TASKS: dict[str, tuple[str, Callable[[Draw], Sample]]] = {
    "Picto-Category": ("classification", category),
    "Picto-Background": ("classification", background),
    "Picto-Count": ("classification", count),
    "Picto-LeftRight": ("vqa", beside),
    "Picto-AboveBelow": ("vqa", above),
    "Picto-HowMany": ("vqa", how_many),
    "Picto-WhatColour": ("vqa", what_colour),
    "Picto-T2I": ("retrieval", caption_to_scene),
    "Picto-I2T": ("retrieval", scene_to_caption),
    "Picto-Style": ("retrieval", style_to_style),
    "Picto-Edit": ("retrieval", edit),
    "Picto-Grounding": ("grounding", grounding),
}


def training_triplet(seed: int, index: int, task: str | None = None) -> Triplet:
    """The ``index``-th training sample of the endless stream named by ``seed``; any task's, or the
    given one's.
    """
    rng = random.Random(f"{seed}/{index}")
    _, generate = TASKS[task or rng.choice(list(TASKS))]
    sample = generate(Draw(rng, held_out=False, styles=picto.TRAIN_STYLES, augment=True))
    return Triplet(sample.query, sample.documents[0], sample.documents[1])


def evaluation_tasks(*, ood: bool = False, queries: int = QUERIES) -> list[RetrievalTask]:
    """The fixed test set: twelve tasks of 200 queries with 100 candidates each.

    Every 50 queries share the 100 documents that answer them or nearly do, so ``queries=50`` is
    the same test in small.

    Args:
        ood: Pictures in the style that no training picture has.
        queries: Queries per task, a multiple of 50, at most 200.

    Raises:
        ValueError: If ``queries`` is not such a multiple.
    """
    if queries % BLOCK or not 0 < queries <= QUERIES:
        raise ValueError(
            f"queries={queries}: Picto's tests come in blocks of {BLOCK}, up to {QUERIES}"
        )
    return [_test_task(name, ood, queries) for name in TASKS]


def _test_task(name: str, ood: bool, n_queries: int) -> RetrievalTask:
    meta_task, generate = TASKS[name]
    rng = random.Random(f"{TEST_SEED}/{name}/{ood}")
    styles = (picto.OOD_STYLE,) if ood else picto.TRAIN_STYLES
    # colour and count are never confused: such near-misses would make the tests easy
    draw = Draw(rng, held_out=True, styles=styles, augment=True, changes=("swap", "object"))
    task = RetrievalTask(name + ("-OOD" if ood else ""), meta_task, [], [], [], ood)
    if meta_task in ("classification", "vqa"):
        _fill_from_labels(task, draw, generate, n_queries)
    else:
        _fill_in_blocks(task, draw, generate, n_queries)
    return task


def _fill_from_labels(
    task: RetrievalTask, draw: Draw, generate: Callable[[Draw], Sample], n_queries: int
) -> None:
    """Labels and answers: candidates are drawn from every label there is, those of the question's
    own kind always.
    """
    kinds = [
        list(picto.categories()),
        list(picto.COLOURS),
        list(NUMBERS[1:]),
        list(picto.objects()),
    ]
    labels = list(dict.fromkeys(label for kind in kinds for label in kind))
    instruction_kind = "label" if task.meta_task == "classification" else "answer"
    task.documents = [_text(instruction_kind, label) for label in labels]
    for turn in range(n_queries):
        sample = generate(replace(draw, turn=turn))
        right, *wrong = (d.text for d in sample.documents)
        own = next(kind for kind in kinds if right in kind)
        near = own if len(own) < CANDIDATES // 2 else [right, *wrong]
        rest = [label for label in labels if label not in near]
        chosen = [label for label in near if label != right] + draw.rng.sample(
            rest, CANDIDATES - len(near)
        )
        task.queries.append(sample.query)
        task.candidates.append([labels.index(right)] + [labels.index(label) for label in chosen])


def _fill_in_blocks(
    task: RetrievalTask, draw: Draw, generate: Callable[[Draw], Sample], n_queries: int
) -> None:
    """Scenes, captions and crops: 50 queries, their 50 answers and 50 near-misses are one
    another's candidates.
    """
    for start in range(0, 2 * n_queries, CANDIDATES):
        block = range(start, start + CANDIDATES)
        while len(task.documents) < start + CANDIDATES:
            sample = generate(draw)
            keys = {d.key for d in sample.documents} - {""}
            if keys & {d.key for d in task.documents[start:]}:
                # a scene or caption that is in this block already could be a second right answer
                continue
            gold = len(task.documents)
            task.documents += sample.documents[:2]
            task.queries.append(sample.query)
            task.candidates.append([gold] + [i for i in block if i != gold])
    task.documents = [
        replace(d, key=d.text or f"{task.name}-{i}") for i, d in enumerate(task.documents)
    ]
