"""What the tiny base can do on held-out combinations: answers by generation, Yes/No on statements
and documents.
"""

import random

import torch
from base_lessons import STATEMENTS, Lessons, statement
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from rematch import prompts
from rematch.data import picto, picto_tasks
from rematch.data.schema import Item
from rematch.matching import additive


def answer_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    (yes,), (no,) = (
        tokenizer.encode(w, add_special_tokens=False) for w in (prompts.YES, prompts.NO)
    )
    return yes, no


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, per_task: int
) -> dict[str, float]:
    """On held-out combinations, in percent, in and out of distribution:

    - ``vqa``: exact answers by greedy generation;
    - ``match``: Yes/No on "does this text / picture match that picture?", half of it with the
      answer Yes: six kinds of statement about a picture, captions for pictures and pictures for
      captions, pictures for pictures. Wrong captions and pictures are nearly right, other wrong
      statements are drawn at random;
    - ``near_miss``: Yes/No on the right and the nearly right document of all twelve tasks,
      questions and edits among them, for which a document must be judged that the query only
      implies.
    """
    model.eval()
    lessons = Lessons(processor, 0, 0, 0, 0)
    scores: dict[str, float] = {}
    for ood in (False, True):
        styles = (picto.OOD_STYLE,) if ood else picto.TRAIN_STYLES
        end, vqa, near_miss = "/ood" if ood else "", [], {}
        for name, (meta_task, generate) in picto_tasks.TASKS.items():
            draw = picto_tasks.Draw(random.Random(f"base-eval/{name}/{ood}"), True, styles, False)
            samples = [generate(draw) for _ in range(per_task)]
            if meta_task == "vqa":
                hits = [
                    generate_answer(model, lessons, s.query) == s.documents[0].text
                    for s in samples
                ]
                vqa.append(sum(hits) / len(hits))
                scores[f"vqa/{name}{end}"] = 100 * vqa[-1]
            near_miss[name] = judged(
                model, lessons, [(s.query, s.documents[:2], [True, False]) for s in samples]
            )
            scores[f"near_miss/{name}{end}"] = near_miss[name]
        statements = {}
        for kind in STATEMENTS:
            rng = random.Random(f"base-eval/{kind}/{ood}")
            items = []
            for _ in range(per_task):
                scene = picto.sample_scene(rng, held_out=True)
                picture = picto.render(scene, rng.choice(styles), rng.getrandbits(32))
                text, fits = statement(scene, rng, kind)
                items.append((Item(image=picture), [Item(text)], [fits]))
            statements[kind] = scores[f"statement/{kind}{end}"] = judged(model, lessons, items)
        asked = [
            *statements.values(),
            *(near_miss[f"Picto-{task}"] for task in ("T2I", "I2T", "Style")),
        ]
        scores["vqa" + end] = 100 * sum(vqa) / len(vqa)
        scores["match" + end] = sum(asked) / len(asked)
        scores["near_miss" + end] = sum(near_miss.values()) / len(near_miss)
    model.train()
    return {k: round(v, 1) for k, v in scores.items()}


def judged(
    model: LlavaForConditionalGeneration,
    lessons: Lessons,
    items: list[tuple[Item, list[Item], list[bool]]],
) -> float:
    """How many Yes/No answers are right, in percent."""
    yes, no = answer_ids(lessons.tokenizer)
    batch = lessons.match(items)
    pictures = [
        i.image
        for query, documents, _ in items
        for i in (query, *documents)
        if i.image is not None
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
