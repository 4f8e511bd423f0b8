"""Pretrain the tiny LLaVA-style base model from scratch on Picto scenes (on a CPU, resumable).

    python scripts/pretrain_base.py --work-dir runs/base --output src/rematch/assets/base

There are three kinds of lesson, all on training styles and training combinations only:

- Sight comes first: vision tower, projector and word embeddings alone. Every picture token is read
  out through the word embeddings, and must name the object in its quarter, and top or bottom, left
  or right. So pictures and words share a space at the language model's input, and looking a word
  up in a picture is a comparison of like with like from the start. Without the names, look-ups by
  name stayed at chance for 1,250 steps; without the places, for 3,500 more (docs/log.md).
- Chat: a picture and many question-answer turns about it, by ordinary causal next-token
  prediction. The questions ask for a dense caption, look-ups by place and by name, relations,
  counts, colours, and Yes/No on statements that are true, or false by one thing.
- Matching: a query, right and nearly right documents, and the Yes/No question about each, in
  the chat template and the segment layout of ``rematch.matching``. In three of four lessons
  documents see the query; in the others they are isolated.

Word embeddings have an ordinary scale (RMS 0.1), and the layers' outputs start small and learn
slowly beside them, so that a word's identity survives the layers.

A run of this script has not reached a base that matches yet; the committed base comes from an
earlier version of it, in several runs (docs/log.md).

The log (``log.jsonl``), the scores on held-out combinations and the model are written to
``--output``.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from base_lessons import IMAGE, PATCHES, Lessons, SightLessons, turns
from base_scores import answer_ids, evaluate
from package_tiny import halve
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rematch import prompts
from rematch.data import picto, picto_tasks
from rematch.matching import additive

PAD = "<|pad|>"
WORD_RMS = 0.1
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text "
    "}}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE in which every Picto word is one token and any other text can be
    tokenized too.
    """
    rng = random.Random(0)
    corpus = [*picto.objects(), *picto.categories(), *prompts.DOCUMENT_INSTRUCTIONS.values()]
    corpus += [prompts.MATCH_QUERY, prompts.MATCH_DOCUMENT, prompts.MATCH_QUESTION, "Yes", "No"]
    tasks = list(picto_tasks.TASKS)
    for i in range(300):
        scene = picto.sample_scene(rng)
        corpus += [text for turn in turns(scene, rng, 30) for text in turn]
        triplet = picto_tasks.training_triplet(0, i, tasks[i % len(tasks)])
        corpus += [triplet.query.as_input().get("text", ""), triplet.positive.text]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, IMAGE, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token="<|end|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build(
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model and its processor."""
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=picto.SIZE,
        patch_size=16,
        vision_use_head=False,
        initializer_range=0.06,
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    edge = {"height": picto.SIZE, "width": picto.SIZE}
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=edge, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=WORD_RMS)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=WORD_RMS * 0.06)
    for name, parameter in model.model.language_model.named_parameters():
        if writes_to_stream(name):
            torch.nn.init.normal_(parameter, std=WORD_RMS * 0.06)
    return model, processor


def writes_to_stream(name: str) -> bool:
    """Whether a parameter's output is added to the language model's residual stream."""
    return name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))


def read_out(
    tokens: Tensor, word_embeddings: Tensor, targets: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Read objects by quarter and places by picture token out through the word embeddings.

    Lengths count: a loss of directions alone let picture tokens grow to thirty times the words.

    Args:
        tokens: Picture tokens at the language model's input, (B, 36, D), row by row.
        word_embeddings: (V, D).
        targets: Of :func:`base_lessons.read_out_targets`.

    Returns:
        The loss, and the share of quarters that their mean logits name correctly.
    """
    tokens = tokens.float() / (10 * WORD_RMS**2)  # logits of about 25 at the words' scale
    edge = int(PATCHES**0.5)
    half = torch.arange(edge) * 2 // edge
    quarter = (2 * half[:, None] + half).flatten()  # (36,): the quarter of each picture token
    logits = tokens @ word_embeddings[targets["words"]].T  # (B, 36, O)
    by_quarter = torch.stack([logits[:, quarter == q].mean(1) for q in range(4)], 1)  # (B, 4, O)
    loss = F.cross_entropy(
        by_quarter.flatten(0, 1), targets["cells"].flatten(), label_smoothing=0.05
    )
    places = (quarter // 2, quarter % 2)
    for word_pair, place in zip(targets["place_words"], places, strict=True):
        place_logits = tokens @ word_embeddings[word_pair].T
        loss = loss + F.cross_entropy(
            place_logits.flatten(0, 1), place.repeat(len(tokens)), label_smoothing=0.05
        )
    accuracy = (by_quarter.argmax(-1) == targets["cells"]).float().mean()
    return loss, accuracy


def learn_to_see(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    lr: float,
    log: TextIO,
) -> None:
    """Train the vision tower, the projector and the names' word embeddings."""
    optimizers = build_optimizers(model)
    hits, start = 0.0, time.time()
    for step, batch in enumerate(
        DataLoader(
            SightLessons(processor, steps), batch_size=None, num_workers=1, prefetch_factor=4
        ),
        1,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = picture_tokens(model, batch["pixel_values"])
        words = model.get_input_embeddings().weight
        loss, accuracy = read_out(tokens, words, batch)
        update(model, optimizers, loss, lr * rate(step, steps))
        hits += accuracy.item()
        if step % 100 == 0:
            row = {
                "sight_step": step,
                "seconds": round(time.time() - start),
                "loss": round(loss.item(), 4),
                "accuracy": round(hits, 2),  # mean over the last 100 steps, in percent
            }
            line = json.dumps(row)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            hits = 0.0


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine to 2 %."""
    return min(1.0, step / 150) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def update(
    model: LlavaForConditionalGeneration,
    optimizers: list[torch.optim.Optimizer],
    loss: Tensor,
    lr: float,
) -> None:
    """Take an optimizer step down a loss."""
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        optimizer.step()


def picture_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Input embeddings of pictures, (B, 36, D)."""
    features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return torch.stack(list(features))


def losses(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], yes_no: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Chat loss, matching loss and matching accuracy of a batch, each a scalar."""
    features = picture_tokens(model, batch["pixel_values"])
    chats = len(batch["chat_ids"])
    embed = model.get_input_embeddings()

    def hidden(ids: Tensor, images: Tensor, **kwargs: Tensor) -> Tensor:
        embeds = embed(ids)
        where = (ids == model.config.image_token_index)[..., None]
        embeds = embeds.masked_scatter(where, images.to(embeds.dtype))
        out = model.model.language_model(inputs_embeds=embeds, use_cache=False, **kwargs)
        return out.last_hidden_state

    states = hidden(batch["chat_ids"], features[:chats])[:, :-1]
    labels = batch["chat_labels"][:, 1:]
    has_label = labels != -100
    chat = F.cross_entropy(model.lm_head(states[has_label]).float(), labels[has_label])
    reading, _ = read_out(features[:chats], embed.weight, batch)
    chat = chat + 0.2 * reading
    if "ids" not in batch:
        return chat, torch.zeros(()), torch.zeros(())
    states = hidden(
        batch["ids"],
        features[chats:],
        attention_mask=additive(batch["mask"], torch.float32),
        position_ids=batch["positions"],
    )
    slots = batch["slots"]
    is_slot = slots >= 0
    logits = model.lm_head(states[torch.arange(len(slots))[:, None], slots][is_slot]).float()
    relevant = batch["relevant"][is_slot] == 1
    match = F.cross_entropy(logits, torch.where(relevant, *yes_no))
    hits = (logits[..., yes_no[0]] > logits[..., yes_no[1]]) == relevant
    return chat, match, hits.float().mean()


def build_optimizers(model: LlavaForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases (docs/log.md has the
    gain from Muon).

    Each group has a ``share`` of the learning rate; it is small for matrices whose outputs are
    added to word embeddings, as these are small too.
    """
    matrices, outputs, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name or "lm_head" in name:
            rest.append(parameter)
        elif "language_model" in name and writes_to_stream(name):
            outputs.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": matrices, "share": 1.0}, {"params": outputs, "share": 0.2}]
    muon = torch.optim.Muon(groups, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": rest, "share": 1.0}], weight_decay=0, betas=(0.9, 0.98))
    return [muon, adamw]


@torch.no_grad()
def scales(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> dict[str, list[float]]:
    """RMS of the input embeddings and of every layer's output over a batch of conversations, and
    the mean cosine between a word's embedding and its state after each layer.
    """
    ids, chats = batch["chat_ids"], len(batch["chat_ids"])
    out = model.model(
        input_ids=ids,
        pixel_values=batch["pixel_values"][:chats],
        output_hidden_states=True,
        use_cache=False,
    )
    is_word = (ids != model.config.image_token_index) & (ids != 0)
    words = [states[is_word].float() for states in out.hidden_states]
    return {
        "rms": [round(w.pow(2).mean().sqrt().item(), 3) for w in words],
        "identity": [round(F.cosine_similarity(words[0], w).mean().item(), 3) for w in words],
        "picture_rms": [round(picture_tokens(model, batch["pixel_values"]).std().item(), 3)],
    }


def save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    """Write the state of a run under a temporary name, then rename it."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    state |= {"step": step, "seconds": seconds}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    """Write the model, its weights in half precision (the limit is 16 MB) but declared as float32,
    so that they load as float32.
    """
    model.set_attn_implementation("sdpa")
    rows = 128 * math.ceil((len(processor.tokenizer) + 64) / 128)  # with spare rows, like releases
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    halve(output)


def main() -> None:
    """Run the lessons, evaluate, and write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        required=True,
        help="directory of checkpoint and log; an existing run is resumed",
    )
    parser.add_argument(
        "--output", type=Path, help="directory of the finished model (default: WORK_DIR/model)"
    )
    parser.add_argument("--sight-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument(
        "--alone", type=int, default=300, help="number of first steps with chat alone"
    )
    parser.add_argument(
        "--chats",
        type=int,
        default=10,
        help="conversations per step (twice as many with chat alone)",
    )
    parser.add_argument("--pairs", type=int, default=8, help="matching samples per step")
    parser.add_argument(
        "--facts", type=int, default=4, help="pictures with eight statements each per step"
    )
    parser.add_argument(
        "--galleries", type=int, default=6, help="queries with three pictures each per step"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--eval-every", type=int, default=500)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = args.work_dir / "tokenizer"
    if not tokenizer.exists():
        build_tokenizer().save_pretrained(tokenizer)
    model, processor = build(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    # a little faster than sdpa under bf16 autocast on a CPU
    model.set_attn_implementation("eager")
    yes_no = answer_ids(processor.tokenizer)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, Yes/No = {yes_no}",
        flush=True,
    )
    optimizers = build_optimizers(model)
    step, seconds = 0, 0.0
    checkpoint = args.work_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        step, seconds = state["step"], state["seconds"]
        print(f"resuming at step {step}", flush=True)
    log = (args.work_dir / "log.jsonl").open("a")
    model.train()
    if not checkpoint.exists():
        learn_to_see(model, processor, args.sight_steps, 2e-3, log)
        save_checkpoint(checkpoint, model, optimizers, 0, 0.0)
    lessons = Lessons(
        processor,
        args.steps,
        args.chats,
        args.pairs,
        args.facts,
        args.galleries,
        args.alone,
        step,
    )
    loader = DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=4)
    sums, start = torch.zeros(3), time.time() - seconds
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16):
            chat, match, accuracy = losses(model, batch, yes_no)
        step += 1
        lr = args.lr * rate(step, args.steps)
        update(model, optimizers, chat + match, lr)
        sums += torch.stack([chat, match, accuracy]).detach()
        if step % 50 == 0:
            chat_loss, match_loss, match_accuracy = (sums / 50).tolist()
            sums.zero_()
            row = {"step": step, "seconds": round(time.time() - start), "lr": lr}
            row |= {
                "chat_loss": chat_loss,
                "match_loss": match_loss,
                "match_accuracy": 100 * match_accuracy,
            }
            if step % args.eval_every == 0:
                row |= evaluate(model, processor, 40) | scales(model, batch)
            line = json.dumps(
                {k: v if isinstance(v, list) else round(v, 5) for k, v in row.items()}
            )
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            if step % 250 == 0:
                save_checkpoint(checkpoint, model, optimizers, step, time.time() - start)
    output = args.output or args.work_dir / "model"
    save(model, processor, output)
    finished = LlavaForConditionalGeneration.from_pretrained(output)
    scores = evaluate(finished, processor, 200)
    isolated = evaluate(finished, processor, 200, joint=False)
    scores |= {f"isolated/{name}": isolated[name] for name in ("match", "near_miss")}
    print(json.dumps(scores, indent=2))
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (output / "log.jsonl").write_text((args.work_dir / "log.jsonl").read_text())


if __name__ == "__main__":
    sys.exit(main())
