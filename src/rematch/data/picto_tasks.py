"""Picto's twelve tasks in MMEB's four meta-tasks: an endless stream of training triplets, drawn
from eight of them, and two fixed splits of all twelve, for validation and for the test.

A task is a function that makes a :class:`Sample` from a random generator: a query, its positive
and near-misses, which differ from the positive in **one property**. Training takes a near-miss as
hard negative; the splits put near-misses into every candidate list.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from PIL import Image

from rematch.data import picto
from rematch.data.picto import Scene
from rematch.data.schema import Item, RetrievalTask, Triplet
from rematch.errors import DataError
from rematch.prompts import DOCUMENT_INSTRUCTIONS

T = TypeVar("T")
Split = Literal["test", "validation"]

NUMBERS = ("zero", "one", "two", "three", "four")
QUERIES, CANDIDATES, BLOCK = 200, 100, 50
SPLIT_SEEDS: dict[Split, int] = {"test": 20260101, "validation": 20260102}
UNSEEN = "-Unseen"  # suffix of a task whose queries are drawn in the unseen style


@dataclass(frozen=True)
class Draw:
    """Samples the scenes and pictures of a :class:`Sample`.

    Attributes:
        rng: Source of randomness.
        held_out: Whether scenes are of held-out combinations.
        styles: Styles that pictures are drawn in.
        augment: Whether pictures vary as in training (:func:`rematch.data.picto.render`).
        changes: The changes by which near-misses may differ.
        turn: In the splits the number of the query, which makes the answers take turns.
    """

    rng: random.Random
    held_out: bool
    styles: tuple[str, ...]
    augment: bool
    changes: tuple[str, ...] = picto.CHANGES
    turn: int | None = None

    def pick(self, answers: Sequence[T]) -> T:
        """Pick an answer: at random, or in the splits by turns."""
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
        """Return another training style; the unseen style is never a document's."""
        return self.rng.choice([s for s in picto.TRAIN_STYLES if s != style])


@dataclass(frozen=True)
class Sample:
    """A query and its documents: the positive first, then at least one near-miss."""

    query: Item
    documents: list[Item]


def _text(kind: str, text: str) -> Item:
    return Item(text, instruction=DOCUMENT_INSTRUCTIONS[kind], key=text)


def _picture(kind: str, image: Image.Image, key: str = "") -> Item:
    return Item(image=image, instruction=DOCUMENT_INSTRUCTIONS[kind], key=key)


def _other(draw: Draw, label: str, labels: list[str]) -> str:
    """Sample another label."""
    return draw.rng.choice([other for other in labels if other != label])


def _scene_with_background(draw: Draw, colour: str) -> Scene:
    while True:
        scene = draw.scene()
        if scene.background == colour:
            return scene


def _classify(instruction: str, scene: Scene, draw: Draw, label: str, wrong: str) -> Sample:
    query = Item(image=draw.picture(scene), instruction=instruction)
    return Sample(query, [_text("label", label), _text("label", wrong)])


def category(draw: Draw) -> Sample:
    label = draw.pick(picto.categories())
    count = draw.rng.randint(1, 3)
    while True:
        scene = draw.scene(count, repeats=count)
        if picto.objects()[scene.objects[0]] == label:
            break
    wrong = _other(draw, label, picto.categories())
    instruction = "Identify the category of the object shown in the image."
    return _classify(instruction, scene, draw, label, wrong)


def background(draw: Draw) -> Sample:
    colour = draw.pick(list(picto.COLOURS))
    scene = _scene_with_background(draw, colour)
    wrong = _other(draw, colour, list(picto.COLOURS))
    return _classify("Identify the background colour of the image.", scene, draw, colour, wrong)


def count(draw: Draw) -> Sample:
    n = draw.pick((1, 2, 3, 4))
    wrong = draw.rng.choice([m for m in (n - 1, n + 1) if 1 <= m <= 4])
    instruction = "Identify the number of objects in the image."
    return _classify(instruction, draw.scene(n), draw, NUMBERS[n], NUMBERS[wrong])


def _answer(draw: Draw, scene: Scene, question: str, answer: str, *wrong: str) -> Sample:
    instruction = "Represent the given image with the following question: "
    query = Item(question, draw.picture(scene), instruction)
    return Sample(query, [_text("answer", text) for text in (answer, *wrong)])


def _relation(draw: Draw, relations: tuple[str, str]) -> Sample:
    while True:
        scene = draw.scene(draw.rng.randint(2, 4), distinct=True)
        neighbours = [n for n in picto.neighbours(scene) if n[0] in relations]
        if neighbours:
            relation, anchor, cell = draw.rng.choice(neighbours)
            answer = scene.cells[cell]
            # every other object of the picture is a near-miss, wrong by its place
            others = [name for name in scene.objects if name != answer]
            wrong = draw.rng.choice(others)
            rest = [name for name in others if name != wrong]
            question = f"What is {relation} the {anchor}?"
            return _answer(draw, scene, question, answer, wrong, *rest)


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
    wrong = draw.rng.choice([m for m in (n - 1, n + 1) if 1 <= m <= 4])
    question = f"How many times do you see {picto.with_article(name)}?"
    return _answer(draw, scene, question, NUMBERS[n], NUMBERS[wrong])


def what_colour(draw: Draw) -> Sample:
    colour = draw.pick(list(picto.COLOURS))
    scene = _scene_with_background(draw, colour)
    wrong = _other(draw, colour, list(picto.COLOURS))
    return _answer(draw, scene, "What colour is the background?", colour, wrong)


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
    wrong = before if draw.rng.random() < 0.3 else picto.near_miss(after, draw.rng, changes)
    return Sample(
        query,
        [_picture("image", draw.picture(s, style), picto.caption(s)) for s in (after, wrong)],
    )


def grounding(draw: Draw) -> Sample:
    while True:
        scene = draw.scene(draw.rng.randint(2, 4), distinct=True)
        neighbours = picto.neighbours(scene)
        if neighbours:
            break
    relation, anchor, cell = draw.rng.choice(neighbours)
    picture = draw.picture(scene)
    instruction = "Select the portion of the image that isolates the object labeled as "
    query = Item(f'"the object {relation} the {anchor}"', picture, instruction)
    other = draw.rng.choice([i for i, name in enumerate(scene.cells) if name and i != cell])
    return Sample(query, [_picture("crop", picto.crop(picture, c)) for c in (cell, other)])


def _scenes(draw: Draw, scene: Scene, style: str) -> list[Item]:
    """Draw a scene and a near-miss of it in a style."""
    wrong = picto.near_miss(scene, draw.rng, draw.changes)
    return [_picture("image", draw.picture(s, style), picto.caption(s)) for s in (scene, wrong)]


# for every task its meta-task and the function that makes a sample
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
# as in MMEB, some tasks of most meta-tasks are evaluated only
OOD_TASKS = ("Picto-Count", "Picto-AboveBelow", "Picto-HowMany", "Picto-Style")
TRAINED_TASKS = tuple(name for name in TASKS if name not in OOD_TASKS)


def training_triplet(seed: int, index: int, task: str | None = None) -> Triplet:
    """Make a training sample; equal arguments give equal samples.

    Args:
        seed: Seed of the stream of samples.
        index: Number of the sample in the stream.
        task: Name of any of the twelve tasks; by default one of ``TRAINED_TASKS`` is sampled.
    """
    rng = random.Random(f"{seed}/{index}")
    _, generate = TASKS[task or rng.choice(TRAINED_TASKS)]
    sample = generate(Draw(rng, held_out=False, styles=picto.TRAIN_STYLES, augment=True))
    return Triplet(sample.query, sample.documents[0], sample.documents[1])


def evaluation_tasks(
    names: Collection[str] = (),
    *,
    split: Split = "test",
    unseen_style: bool = False,
    queries: int = QUERIES,
) -> list[RetrievalTask]:
    """Return a fixed split: twelve tasks of 200 queries with 100 candidates each.

    Every 50 queries share 100 documents, their positives and near-misses, so ``queries=50`` is a
    smaller test of the same difficulty.

    Args:
        names: Names of the tasks to draw, as in :data:`TASKS`; by default all twelve.
        split: ``"test"``, or ``"validation"``: other scenes of the same kind, to choose by.
        unseen_style: Whether queries have pictures in the style that no training picture has.
        queries: Number of queries per task, a multiple of 50, at most 200.

    Raises:
        DataError: If there is no such split, or ``queries`` is not such a multiple.
    """
    if split not in SPLIT_SEEDS:
        raise DataError(f"split={split!r}: Picto has the splits {' and '.join(SPLIT_SEEDS)}.")
    if queries % BLOCK or not 0 < queries <= QUERIES:
        raise DataError(
            f"queries={queries}: Picto's splits come in blocks of {BLOCK}, up to {QUERIES}."
        )
    return [
        _evaluation_task(name, split, unseen_style, queries)
        for name in TASKS
        if not names or name in names
    ]


def _evaluation_task(name: str, split: Split, unseen_style: bool, n_queries: int) -> RetrievalTask:
    meta_task, generate = TASKS[name]
    rng = random.Random(f"{SPLIT_SEEDS[split]}/{name}/{unseen_style}")
    styles = (picto.UNSEEN_STYLE,) if unseen_style else picto.TRAIN_STYLES
    # near-misses in colour and count would be too easy
    draw = Draw(rng, held_out=True, styles=styles, augment=True, changes=("swap", "object"))
    task = RetrievalTask(
        name + (UNSEEN if unseen_style else ""),
        meta_task,
        [],
        [],
        [],
        ood=name in OOD_TASKS,
        unseen_style=unseen_style,
    )
    if meta_task in ("classification", "vqa"):
        _fill_from_labels(task, draw, generate, n_queries)
    else:
        _fill_in_blocks(task, draw, generate, n_queries)
    return task


def _fill_from_labels(
    task: RetrievalTask, draw: Draw, generate: Callable[[Draw], Sample], n_queries: int
) -> None:
    """Add queries whose candidates are labels of all kinds.

    All labels of the positive's own kind are among the candidates, if there are few of them;
    otherwise the near-misses are.
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
        positive, *near_misses = (d.text for d in sample.documents)
        kind = next(kind for kind in kinds if positive in kind)
        hard = kind if len(kind) < CANDIDATES // 2 else [positive, *near_misses]
        easy = [label for label in labels if label not in hard]
        negatives = [label for label in hard if label != positive]
        negatives += draw.rng.sample(easy, CANDIDATES - len(hard))
        task.queries.append(sample.query)
        task.candidates.append([labels.index(label) for label in (positive, *negatives)])


def _fill_in_blocks(
    task: RetrievalTask, draw: Draw, generate: Callable[[Draw], Sample], n_queries: int
) -> None:
    """Add queries in blocks of 50 that share their positives and near-misses as candidates."""
    for start in range(0, 2 * n_queries, CANDIDATES):
        block = range(start, start + CANDIDATES)
        while len(task.documents) < start + CANDIDATES:
            sample = generate(draw)
            keys = {d.key for d in sample.documents} - {""}
            if keys & {d.key for d in task.documents[start:]}:
                # a scene or caption that this block already has could be a second positive
                continue
            positive = len(task.documents)
            task.documents += sample.documents[:2]
            task.queries.append(sample.query)
            task.candidates.append([positive] + [i for i in block if i != positive])
    task.documents = [
        replace(d, key=d.text or f"{task.name}-{i}") for i, d in enumerate(task.documents)
    ]
