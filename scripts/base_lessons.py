"""Training data of the tiny base: conversations, statements, matching samples and pictures, each
batch drawn from its step number.
"""

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

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
    "Picto-T2I": 8,
    "Picto-I2T": 4,
    "Picto-Style": 7,
}
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


class Lessons(Dataset[dict[str, Tensor]]):
    """Complete batches, one per step, each drawn from its step number alone, so that a resumed run
    continues exactly.

    Args:
        processor: The base's processor.
        steps: Number of batches.
        chats: Conversations per step; twice as many while there is no matching.
        pairs: Matching samples per step.
        facts: Pictures with eight statements each, per step.
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
        alone: int = 0,
        first: int = 0,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.steps, self.chats, self.pairs, self.facts_per_step = steps, chats, pairs, facts
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
            style = rng.choice(picto.TRAIN_STYLES)
            pictures.append(
                picto.render(scene, style, rng.getrandbits(32), augment=rng.random() < 0.8)
            )
            ids, target = self.chat(turns(scene, rng, 8))
            rows.append(ids)
            labels.append(target)
            cells.append([self.ids(name)[0] if name else -100 for name in scene.cells])
        batch = {
            "chat_ids": pad(rows, self.tokenizer.pad_token_id),
            "chat_labels": pad(labels, -100),
            "cells": torch.tensor(cells),
            "place_words": torch.tensor(
                [[self.ids(word)[0] for word in p] for p in (("top", "bottom"), ("left", "right"))]
            ),
        }
        tasks = rng.choices(list(PAIRS), list(PAIRS.values()), k=pairs)
        triplets = [
            picto_tasks.training_triplet(1 + rng.getrandbits(30), 0, task) for task in tasks
        ]
        items = [
            (t.query, [t.positive, t.negative], [True, False]) for t in triplets if t.negative
        ]
        items += [self.facts(rng) for _ in range(0 if early else self.facts_per_step)]
        if items:
            batch |= self.match(items)
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

    def facts(self, rng: random.Random) -> tuple[Item, list[Item], list[bool]]:
        """A picture as query, eight statements as documents, and which of them are true."""
        scene = picto.sample_scene(rng)
        picture = picto.render(
            scene, rng.choice(picto.TRAIN_STYLES), rng.getrandbits(32), augment=rng.random() < 0.8
        )
        statements = [statement(scene, rng) for _ in range(8)]
        return (
            Item(image=picture),
            [Item(text) for text, _ in statements],
            [fits for _, fits in statements],
        )

    def match(self, items: list[tuple[Item, list[Item], list[bool]]]) -> dict[str, Tensor]:
        """Packed questions about (query, documents, whether each is relevant)."""
        prompt = self.segment("<|user|>" + prompts.MATCH_TASK, None)
        slot = self.segment(prompts.MATCH_QUESTION, None, "<|end|><|assistant|>")
        gap = self.segment(prompts.MATCH_QUERY, None).end + 1
        rows = []
        for query, documents, _ in items:
            q = {"raw": self.segment(prompts.MATCH_QUERY, query)}
            d = [{"raw": self.segment(prompts.MATCH_DOCUMENT, document)} for document in documents]
            rows.append(
                lay_out(
                    prompt, q, d, slot, [Question(View.RAW_RAW, i) for i in range(len(d))], gap
                )
            )
        packed = pack(rows, self.tokenizer.pad_token_id)
        return {
            "ids": packed.input_ids,
            "positions": packed.position_ids[0],
            "mask": unified_mask(packed.segments, packed.attends),
            "slots": packed.slots,
            "relevant": pad([[int(fits) for fits in true] for _, _, true in items], -1),
        }


class SightLessons(Dataset[tuple[Tensor, Tensor]]):
    """Batches of pictures with the number of the object in each cell (0: nothing)."""

    def __init__(self, processor: LlavaProcessor, steps: int) -> None:
        self.processor, self.steps = processor, steps
        self.numbers = {name: i for i, name in enumerate(["", *picto.objects()])}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(1)
        rng = random.Random(f"sight/{step}")
        pictures, cells = [], []
        for _ in range(SIGHT_BATCH):
            scene = picto.sample_scene(rng, count=4 if rng.random() < 0.7 else None)
            picture = picto.render(
                scene,
                rng.choice(picto.TRAIN_STYLES),
                rng.getrandbits(32),
                augment=rng.random() < 0.8,
            )
            names = scene.cells
            if rng.random() < 0.15:  # a crop, as in grounding: one object fills the picture
                cell = rng.choice([i for i, name in enumerate(names) if name])
                picture, names = picto.crop(picture, cell), (names[cell],) * 4
            pictures.append(picture)
            cells.append([self.numbers[name] for name in names])
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor(cells)


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows padded at their end to the longest, (B, T)."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r) for r in rows], batch_first=True, padding_value=value
    )
