"""Training data of the tiny base: conversations, statements, matching samples and pictures, each
batch drawn from its step number.
"""

import random

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from rematch import prompts
from rematch.data import picto, picto_tasks
from rematch.data.schema import Item
from rematch.matching import Question, Segment, View, lay_out, pack, unified_mask

IMAGE = "<image>"
PATCHES = 36
# kinds of question and their weights; finding a name in a picture is learned last, and asked most
MAKERS = {
    "place": 1,
    "place_category": 2,
    "where": 5,
    "relation": 5,
    "how_many": 3,
    "count": 1,
    "colour": 1,
    "kind": 1,
    "true": 3,
    "is": 5,
}
STATEMENTS = {"caption": 5, "object": 3, "place": 3, "count": 0.5, "colour": 0.5, "category": 2}
# weights of the tasks whose right and nearly right documents are matched
PAIRS = dict.fromkeys(picto_tasks.TASKS, 1.0) | {
    "Picto-LeftRight": 4,
    "Picto-AboveBelow": 4,
    "Picto-HowMany": 3,
    "Picto-T2I": 5,
    "Picto-I2T": 4,
    "Picto-Style": 3,
    "Picto-Edit": 6,
    "Picto-Grounding": 4,
}
# lessons in which three pictures are the documents, and their weights
GALLERIES = {"same scene": 4, "statement": 3, "crop": 4}
GALLERY = 3  # documents of such a lesson
ISOLATED_SHARE = 0.25  # of the matching lessons; in the others, documents see the query
SIGHT_BATCH = 96


def turns(scene: picto.Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Question-answer turns about a scene; half of the time the dense caption is one of them."""
    names = list(picto.objects())
    present = list(dict.fromkeys(scene.objects))
    unique, near = picto.unique_objects(scene), picto.neighbours(scene)
    dialogue = [("Describe the image.", picto.caption(scene))] if rng.random() < 0.5 else []
    while len(dialogue) < count:
        kind = rng.choices(list(MAKERS), list(MAKERS.values()))[0]
        if kind == "place":
            cell = rng.randrange(4)
            dialogue.append(
                (f"What is in the {picto.CELLS[cell]}?", scene.cells[cell] or "nothing")
            )
        elif kind == "place_category":
            cell = rng.choice([i for i, name in enumerate(scene.cells) if name])
            category = picto.objects()[scene.cells[cell]]
            dialogue.append(
                (f"What category is in the {picto.CELLS[cell]}?", picto.with_article(category))
            )
        elif kind == "where" and unique:
            name = rng.choice(unique)
            dialogue.append((f"Where is the {name}?", picto.CELLS[scene.cells.index(name)]))
        elif kind == "relation" and near:
            relation, anchor, cell = rng.choice(near)
            dialogue.append((f"What is {relation} the {anchor}?", scene.cells[cell]))
        elif kind == "how_many":
            name = rng.choice(present) if rng.random() < 0.85 else rng.choice(names)
            n = picto_tasks.NUMBERS[scene.objects.count(name)]
            dialogue.append((f"How many times do you see {picto.with_article(name)}?", n))
        elif kind == "count":
            dialogue.append(
                ("How many objects are there?", picto_tasks.NUMBERS[len(scene.objects)])
            )
        elif kind == "colour":
            dialogue.append(("What colour is the background?", scene.background))
        elif kind == "kind":
            name = rng.choice(present)
            dialogue.append(
                (f"What is {picto.with_article(name)}?", picto.with_article(picto.objects()[name]))
            )
        elif kind == "is":
            name = rng.choice(present) if rng.random() < 0.5 else rng.choice(names)
            answer = prompts.YES if name in present else prompts.NO
            dialogue.append((f"Do you see {picto.with_article(name)}?", answer))
        elif kind == "true":
            true = rng.random() < 0.5
            text = picto.caption(scene if true else picto.near_miss(scene, rng))
            dialogue.append((f"Does it show {text}?", prompts.YES if true else prompts.NO))
    rng.shuffle(dialogue)
    return dialogue


def statement(scene: picto.Scene, rng: random.Random, kind: str = "") -> tuple[str, bool]:
    """A short statement about a scene, and whether it is true (about half are)."""
    names, fits = list(picto.objects()), rng.random() < 0.5
    kind = kind or rng.choices(list(STATEMENTS), list(STATEMENTS.values()))[0]
    if kind == "object":
        name = rng.choice(scene.objects if fits else names)
        return picto.with_article(name), name in scene.objects
    if kind == "place":
        cell = rng.choice([i for i, name in enumerate(scene.cells) if name])
        name = scene.cells[cell] if fits else rng.choice([*scene.objects, rng.choice(names)])
        return f"{picto.with_article(name)} in the {picto.CELLS[cell]}", name == scene.cells[cell]
    if kind == "count":
        n = len(scene.objects) if fits else rng.randint(1, 4)
        return f"{picto_tasks.NUMBERS[n]} objects", n == len(scene.objects)
    if kind == "colour":
        colour = scene.background if fits else rng.choice(list(picto.COLOURS))
        return f"{picto.with_article(colour)} background", colour == scene.background
    if kind == "category":
        present = {picto.objects()[name] for name in scene.objects}
        category = rng.choice(sorted(present) if fits else picto.categories())
        return picto.with_article(category), category in present
    return picto.caption(scene if fits else picto.near_miss(scene, rng)), fits


MatchLesson = tuple[Item, list[Item], list[bool]]  # query, documents, whether each is relevant


def drawing(scene: picto.Scene, rng: random.Random, style: str = "") -> Image.Image:
    """A picture of a scene in a training style."""
    style = style or rng.choice(picto.TRAIN_STYLES)
    return picto.render(scene, style, rng.getrandbits(32), augment=rng.random() < 0.8)


def pair(rng: random.Random, task: str) -> MatchLesson:
    """A right and a nearly right document of a task; one in six wrong ones is a random one."""
    triplet = picto_tasks.training_triplet(1 + rng.getrandbits(30), 0, task)
    wrong = triplet.negative
    if rng.random() < 1 / 6:
        other = picto_tasks.training_triplet(1 + rng.getrandbits(30), 0, task).positive
        if other.image is not None or other.text != triplet.positive.text:
            wrong = other
    assert wrong is not None
    return triplet.query, [triplet.positive, wrong], [True, False]


def facts(rng: random.Random) -> MatchLesson:
    """A picture as query, eight statements as documents, and which of them are true."""
    scene = picto.sample_scene(rng)
    statements = [statement(scene, rng) for _ in range(8)]
    documents = [Item(text) for text, _ in statements]
    return Item(image=drawing(scene, rng)), documents, [fits for _, fits in statements]


def gallery(rng: random.Random) -> MatchLesson:
    """Three pictures as documents, about half of them right.

    - ``same scene``: the query is a picture of the scene in another style, as in Picto-Style;
    - ``statement``: the query is a statement or caption, as in Picto-T2I;
    - ``crop``: the query asks for the object at a place of a picture, or beside, above or below
      another object, as in Picto-Grounding; the documents are crops.
    """
    kind = rng.choices(list(GALLERIES), list(GALLERIES.values()))[0]
    instruction = prompts.DOCUMENT_INSTRUCTIONS["crop" if kind == "crop" else "image"]
    scene = picto.sample_scene(rng, count=rng.choice((1, 2, None, None)))
    relevant = [rng.random() < 0.5 for _ in range(GALLERY)]
    style = rng.choice(picto.TRAIN_STYLES)
    if kind == "crop":
        scene = picto.sample_scene(rng, count=rng.choice((2, 3, 4)), distinct=True)
        cells = [i for i, name in enumerate(scene.cells) if name]
        cell = rng.choice(cells)
        phrase = f"the object in the {picto.CELLS[cell]}"
        near = picto.neighbours(scene)
        if near and rng.random() < 0.6:
            relation, anchor, cell = rng.choice(near)
            phrase = f"the object {relation} the {anchor}"
        picture = drawing(scene, rng, style)
        others = [i for i in cells if i != cell]
        crops = [picto.crop(picture, cell if fits else rng.choice(others)) for fits in relevant]
        query = Item(
            f'"{phrase}"',
            picture,
            "Select the portion of the image that isolates the object labeled as ",
        )
        return query, [Item(image=c, instruction=instruction) for c in crops], relevant
    if kind == "same scene":
        query = Item(
            image=drawing(scene, rng),
            instruction="Find an image that shows the same scene drawn in another style.",
        )
        scenes = [scene if fits else picto.near_miss(scene, rng) for fits in relevant]
    else:
        text, _ = statement(scene, rng, rng.choice(("caption", "object", "place", "colour")))
        query = Item(text, instruction="Find me an image that matches the given caption: ")
        scenes = [picto.near_miss(scene, rng) for _ in relevant]
        scenes[0] = scene
        relevant = [is_true(text, shown) for shown in scenes]
    images = [drawing(shown, rng, style) for shown in scenes]
    return query, [Item(image=image, instruction=instruction) for image in images], relevant


def is_true(text: str, scene: picto.Scene) -> bool:
    """Whether a caption, or a statement of an object, a place or a colour, fits a scene."""
    cells = zip(scene.cells, picto.CELLS, strict=True)
    true = {picto.with_article(name) for name in scene.objects}
    true |= {f"{picto.with_article(name)} in the {cell}" for name, cell in cells if name}
    true |= {f"{picto.with_article(scene.background)} background", picto.caption(scene)}
    return text in true


class Lessons(Dataset[dict[str, Tensor]]):
    """Complete batches, one per step, each drawn from its step number alone, so that a resumed run
    continues exactly.

    Args:
        processor: The base's processor.
        steps: Number of batches.
        chats: Conversations per step; twice as many while there is no matching.
        pairs: Matching samples per step.
        facts: Pictures with eight statements each, per step.
        galleries: Queries with three pictures each, per step.
        alone: Number of first steps without matching.
        first: The step to start at.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        steps: int,
        chats: int,
        pairs: int,
        facts: int,
        galleries: int,
        alone: int = 0,
        first: int = 0,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.steps, self.chats, self.pairs = steps, chats, pairs
        self.facts_per_step, self.galleries_per_step = facts, galleries
        self.alone, self.first = alone, first
        self.cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        step = self.first + index
        rng = random.Random(f"base/{step}")
        early = step < self.alone
        chats, pairs = (2 * self.chats, 0) if early else (self.chats, self.pairs)
        pictures: list = []
        rows, labels, cells = [], [], []
        for _ in range(chats):
            scene = picto.sample_scene(rng)
            pictures.append(drawing(scene, rng))
            ids, target = self.chat(turns(scene, rng, 8))
            rows.append(ids)
            labels.append(target)
            cells.append(scene.cells)
        batch = {
            "chat_ids": pad(rows, self.tokenizer.pad_token_id),
            "chat_labels": pad(labels, -100),
        } | read_out_targets(self.tokenizer, cells)
        tasks = rng.choices(list(PAIRS), list(PAIRS.values()), k=pairs)
        items = [pair(rng, task) for task in tasks]
        if not early:
            items += [facts(rng) for _ in range(self.facts_per_step)]
            items += [gallery(rng) for _ in range(self.galleries_per_step)]
            batch |= self.match(items, [rng.random() >= ISOLATED_SHARE for _ in items])
        for query, documents, _ in items:
            pictures += [item.image for item in (query, *documents) if item.image is not None]
        batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")[
            "pixel_values"
        ]
        return batch

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, cached."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def chat(self, dialogue: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation about a picture, and labels for its answers."""
        ids: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate(dialogue):
            picture = self.ids(IMAGE) * PATCHES if i == 0 else []
            user = self.ids("<|user|>") + picture + self.ids(question)
            user += self.ids("<|end|><|assistant|>")
            assistant = self.ids(answer) + self.ids("<|end|>")
            ids += user + assistant
            labels += [-100] * len(user) + assistant
        return ids, labels

    def segment(self, head: str, item: Item | None, tail: str = "") -> Segment:
        """A segment of a head, an item and a tail."""
        ids = list(self.ids(head)) if head else []
        if item is not None:
            text = item.instruction + item.text
            if item.image is not None:
                ids += self.ids(IMAGE) * PATCHES
            if text:
                ids += self.ids(text)
        if tail:
            ids += self.ids(tail)
        return Segment(torch.tensor(ids), torch.arange(len(ids))[None])

    def match(self, items: list[MatchLesson], joint: list[bool]) -> dict[str, Tensor]:
        """Packed questions about (query, documents, whether each is relevant); in ``joint`` ones
        documents see the query.
        """
        prompt = self.segment("<|user|>" + prompts.MATCH_TASK, None)
        slot = self.segment(prompts.MATCH_QUESTION, None, "<|end|><|assistant|>")
        gap = self.segment(prompts.MATCH_QUERY, None).end + 1
        rows = []
        for (query, documents, _), sees_query in zip(items, joint, strict=True):
            q = {"raw": self.segment(prompts.MATCH_QUERY, query)}
            d = [{"raw": self.segment(prompts.MATCH_DOCUMENT, document)} for document in documents]
            questions = [Question(View.RAW_RAW, i) for i in range(len(d))]
            rows.append(lay_out(prompt, q, d, slot, questions, gap, sees_query))
        packed = pack(rows, self.tokenizer.pad_token_id)
        return {
            "ids": packed.input_ids,
            "positions": packed.position_ids[0],
            "mask": unified_mask(packed.segments, packed.attends),
            "slots": packed.slots,
            "relevant": pad([[int(fits) for fits in true] for _, _, true in items], -1),
        }


class SightLessons(Dataset[dict[str, Tensor]]):
    """Batches of pictures with the word for the object in each quarter."""

    def __init__(self, processor: LlavaProcessor, steps: int) -> None:
        self.processor, self.steps = processor, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        rng = random.Random(f"sight/{step}")
        pictures, cells = [], []
        for _ in range(SIGHT_BATCH):
            scene = picto.sample_scene(rng, count=4 if rng.random() < 0.6 else None)
            picture, names = drawing(scene, rng), scene.cells
            if rng.random() < 0.15:  # a crop, as in grounding: one object fills the picture
                cell = rng.choice([i for i, name in enumerate(names) if name])
                picture, names = picto.crop(picture, cell), (names[cell],) * 4
            pictures.append(picture)
            cells.append(names)
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels} | read_out_targets(self.processor.tokenizer, cells)


def read_out_targets(
    tokenizer: PreTrainedTokenizerFast, cells: list[tuple[str, ...]]
) -> dict[str, Tensor]:
    """What picture tokens are read out as.

    Returns:
        ``words``: the token id of every object and of "nothing", (O,); ``cells``: the index of the
        right one for each quarter, (B, 4); ``place_words``: top, bottom, left, right, (2, 2).
    """
    words = [*picto.objects(), "nothing", "top", "bottom", "left", "right"]
    ids = torch.tensor([tokenizer.encode(w, add_special_tokens=False)[0] for w in words])
    indices = {word: i for i, word in enumerate(words)}
    targets = [[indices[name or "nothing"] for name in names] for names in cells]
    return {
        "words": ids[:-4],
        "cells": torch.tensor(targets),
        "place_words": ids[-4:].view(2, 2),
    }


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows padded at their end to the longest, (B, T)."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r) for r in rows], batch_first=True, padding_value=value
    )
