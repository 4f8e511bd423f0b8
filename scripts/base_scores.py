"""Scores of the tiny base on held-out combinations: generated answers, and Yes/No questions about
statements and documents.
"""

import random

import torch
from base_lessons import STATEMENTS, Lessons, MatchLesson, statement
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from rematch import prompts
from rematch.data import picto, picto_tasks
from rematch.data.schema import Item
from rematch.matching import additive


def answer_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Token ids of Yes and No."""
    (yes,), (no,) = (
        tokenizer.encode(word, add_special_tokens=False) for word in (prompts.YES, prompts.NO)
    )
    return yes, no


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    per_task: int,
    joint: bool = True,
) -> dict[str, float]:
    """Scores on held-out combinations, in percent, in the training styles and the unseen one.

    With ``joint``, documents see the query.

    - ``vqa``: exact answers by greedy generation.
    - ``match``: Yes/No accuracy on "does this text / picture match that picture?", where half of
      the answers are Yes: six kinds of statement about a picture, captions for pictures, pictures
      for captions, and pictures for pictures. Wrong captions and pictures are nearly right; other
      wrong statements are drawn at random.
    - ``near_miss``: Yes/No accuracy on the right and the nearly right document of all twelve
      tasks. In questions and edits the query only implies the document.
    """
    model.eval()
    lessons = Lessons(processor, 0, 0, 0, 0, 0)
    scores: dict[str, float] = {}
    for unseen_style in (False, True):
        styles = (picto.UNSEEN_STYLE,) if unseen_style else picto.TRAIN_STYLES
        suffix = "/unseen" if unseen_style else ""
        vqa, near_miss = [], {}
        for name, (meta_task, generate) in picto_tasks.TASKS.items():
            draw = picto_tasks.Draw(
                random.Random(f"base-eval/{name}/{unseen_style}"), True, styles, False
            )
            samples = [generate(draw) for _ in range(per_task)]
            if meta_task == "vqa":
                hits = [
                    generate_answer(model, lessons, s.query) == s.documents[0].text
                    for s in samples
                ]
                vqa.append(sum(hits) / len(hits))
                scores[f"vqa/{name}{suffix}"] = 100 * vqa[-1]
            near_miss[name] = yes_no_accuracy(
                model, lessons, [(s.query, s.documents[:2], [True, False]) for s in samples], joint
            )
            scores[f"near_miss/{name}{suffix}"] = near_miss[name]
        statements = {}
        for kind in STATEMENTS:
            rng = random.Random(f"base-eval/{kind}/{unseen_style}")
            items = []
            for _ in range(per_task):
                scene = picto.sample_scene(rng, held_out=True)
                picture = picto.render(scene, rng.choice(styles), rng.getrandbits(32))
                text, fits = statement(scene, rng, kind)
                items.append((Item(image=picture), [Item(text)], [fits]))
            statements[kind] = scores[f"statement/{kind}{suffix}"] = yes_no_accuracy(
                model, lessons, items, joint
            )
        two_sided = [near_miss[f"Picto-{task}"] for task in ("T2I", "I2T", "Style")]
        accuracies = [*statements.values(), *two_sided]
        scores["vqa" + suffix] = 100 * sum(vqa) / len(vqa)
        scores["match" + suffix] = sum(accuracies) / len(accuracies)
        scores["near_miss" + suffix] = sum(near_miss.values()) / len(near_miss)
    model.train()
    return {name: round(score, 1) for name, score in scores.items()}


def yes_no_accuracy(
    model: LlavaForConditionalGeneration,
    lessons: Lessons,
    items: list[MatchLesson],
    joint: bool,
) -> float:
    """Accuracy on (query, documents, whether each is relevant), in percent."""
    yes, no = answer_ids(lessons.tokenizer)
    batch = lessons.match(items, [joint] * len(items))
    pictures = [
        item.image
        for query, documents, _ in items
        for item in (query, *documents)
        if item.image is not None
    ]
    if pictures:
        batch["pixel_values"] = lessons.processor.image_processor(pictures, return_tensors="pt")[
            "pixel_values"
        ]
    out = model.model(
        input_ids=batch["ids"],
        pixel_values=batch.get("pixel_values"),
        attention_mask=additive(batch["mask"], torch.float32),
        position_ids=batch["positions"],
    ).last_hidden_state
    logits = model.lm_head(out[torch.arange(len(items))[:, None], batch["slots"]])
    right = (logits[..., yes] > logits[..., no]) == (batch["relevant"] == 1)
    return 100 * right.float().mean().item()


def generate_answer(model: LlavaForConditionalGeneration, lessons: Lessons, query: Item) -> str:
    """The model's answer to a question, by greedy generation."""
    ids, _ = lessons.chat([(query.text, "")])
    ids = ids[: -len(lessons.ids("<|end|>"))]
    pixels = lessons.processor.image_processor([query.image], return_tensors="pt")["pixel_values"]
    out = model.generate(
        input_ids=torch.tensor([ids]),
        pixel_values=pixels,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    return lessons.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
