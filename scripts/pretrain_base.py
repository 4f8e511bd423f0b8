"""Pretrain the tiny LLaVA-style base model from scratch on Picto scenes (on a CPU, resumable).

    python scripts/pretrain_base.py --work-dir runs/base --output src/rematch/assets/base

There are three kinds of lesson, all on training styles and training combinations only:

- Sight comes first: the vision tower alone, with a linear read-out that names the object in each
  cell. A released MLLM starts from a trained vision tower too, and learning names from captions
  alone took over 1,200 steps to begin.
- Chat: a picture and many question-answer turns about it, by ordinary causal next-token
  prediction. The questions ask for a dense caption, look-ups by place and by name, relations,
  counts, colours, and Yes/No on statements that are true, or false by one thing.
- Matching: a query, a right and a nearly right document, and the Yes/No question about each, in
  the chat template and the segment layout of ``rematch.matching``. Statements about a picture,
  true or false by one thing, serve as documents for it.

During chat, every picture token is also read out through the (tied) word embeddings. It must name
the object in its quarter, and top or bottom, left or right. So pictures and words share a space at
the language model's input, and looking a word up in a picture becomes a comparison of like with
like. Without the names, look-ups by name stayed at chance for 1,250 steps. Without the places,
they stayed there for 3,500 more: picture tokens did not tell where they are.

``--start-from MODEL`` continues from a finished base with a fresh learning rate; the committed
base is several such runs (docs/log.md). The log (``log.jsonl``), the scores on held-out
combinations and the model are written to ``--output``.
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
    return LlavaForConditionalGeneration(config), processor


def learn_to_see(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    lr: float,
    log: TextIO,
) -> None:
    """Train the vision tower alone; a linear layer, discarded later, reads out its quarters."""
    tower = model.model.vision_tower
    width, edge = tower.config.hidden_size, picto.SIZE // tower.config.patch_size
    head = torch.nn.Linear(width, len(picto.objects()) + 1)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    lessons = SightLessons(processor, steps)
    hits, start = 0.0, time.time()
    for step, (pixels, cells) in enumerate(
        DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=4), 1
    ):
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels, output_hidden_states=True).hidden_states[-1]
        quarters = (
            states.float()
            .view(-1, 2, edge // 2, 2, edge // 2, width)
            .mean((2, 4))
            .view(-1, 4, width)
        )
        logits = head(quarters)
        loss = F.cross_entropy(logits.flatten(0, 1), cells.flatten(), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        hits += (logits.argmax(-1) == cells).float().mean().item()
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


def losses(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], yes_no: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Chat loss, matching loss and matching accuracy of a batch, each a scalar."""
    features = model.model.get_image_features(
        pixel_values=batch["pixel_values"], return_dict=True
    ).pooler_output
    chats = len(batch["chat_ids"])
    embed = model.get_input_embeddings()

    def hidden(ids: Tensor, images: tuple[Tensor, ...], **kwargs: Tensor) -> Tensor:
        embeds = embed(ids)
        where = (ids == model.config.image_token_index)[..., None]
        embeds = embeds.masked_scatter(where, torch.cat(list(images)).to(embeds.dtype))
        return model.model.language_model(inputs_embeds=embeds, **kwargs).last_hidden_state

    states = hidden(batch["chat_ids"], features[:chats])[:, :-1]
    labels = batch["chat_labels"][:, 1:]
    has_label = labels != -100
    chat = F.cross_entropy(model.lm_head(states[has_label]).float(), labels[has_label])
    tokens = torch.stack(list(features[:chats])).float()  # (B, 36, D), row by row
    scale = 0.07 / embed.weight.detach().pow(2).mean().sqrt()
    words = embed.weight * scale  # independent of the length of the word embeddings
    edge = int(PATCHES**0.5)
    half = torch.arange(edge) * 2 // edge
    quarter = (2 * half[:, None] + half).flatten()  # (36,): the quarter of each picture token
    read_out = F.cross_entropy(
        (tokens @ words.T).flatten(0, 1), batch["cells"][:, quarter].flatten()
    )
    for pair, place in zip(batch["place_words"], (quarter // 2, quarter % 2), strict=True):
        logits = (tokens @ words[pair].T).flatten(0, 1)  # top or bottom, left or right
        read_out = read_out + F.cross_entropy(logits, place.repeat(chats))
    chat = chat + 0.3 * read_out
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


@torch.no_grad()
def ease_lookup(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scale: float = 36.0,
    lookup: tuple[int, ...] = (0, 3),
    copy: tuple[int, ...] = (2,),
) -> None:
    """Initialise heads that find the place of a name, in a base that can name what is at a place
    (docs/log.md).

    1. Word embeddings get the length of picture tokens; the last norm undoes the factor for the
       tied LM head. Next to layer outputs seventy times as long, a word's identity was lost after
       the first layer.
    2. In the ``lookup`` layers one head compares like with like: ``W_q`` and ``W_k`` are the main
       directions of the objects' names, in dimensions that the rotary embedding hardly rotates,
       with a bias towards pictures and away from the word itself.
    3. In the ``copy`` layers one head passes on, through ``W_v`` and ``W_o``, the names of what it
       attends to.
    """
    text = model.model.language_model
    words = [
        processor.tokenizer.encode(name, add_special_tokens=False)[0] for name in picto.objects()
    ]
    model.get_input_embeddings().weight.mul_(scale)
    text.norm.weight.div_(scale)
    batch = Lessons(processor, 1, 24, 0, 0, alone=1)[0]
    states = model(
        input_ids=batch["chat_ids"], pixel_values=batch["pixel_values"], output_hidden_states=True
    )
    ids = batch["chat_ids"]
    of_picture, of_text = (
        ids == model.config.image_token_index,
        torch.isin(ids, torch.tensor(words)),
    )
    config, size = text.config, text.config.head_dim
    half, group = size // 2, config.num_attention_heads // config.num_key_value_heads
    turn = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)  # radians a token
    slow = turn < 0.0025
    rows = torch.cat([slow, slow]).nonzero()[:, 0]
    for index in (*lookup, *copy):
        layer = text.layers[index]
        inputs = layer.input_layernorm(states.hidden_states[index])
        pictures, texts = inputs[of_picture], inputs[of_text]
        means = torch.stack([pictures.mean(0), texts.mean(0)])
        names = layer.input_layernorm(model.get_input_embeddings().weight[words])
        names = names - names.mean(0)
        names = names - names @ torch.linalg.pinv(means) @ means
        directions = torch.linalg.svd(names, full_matrices=False).Vh
        attention = layer.self_attn
        if index in copy:
            attention.v_proj.weight[-size:] = directions[:size]
            attention.o_proj.weight[:, -group * size :] = (
                4 / group * directions[:size].T.repeat(1, group)
            )
            for projection, rows_of in ((attention.q_proj, group), (attention.k_proj, 1)):
                projection.weight[-rows_of * size :].normal_(std=config.initializer_range)
            continue
        content = directions[: len(rows) - 1]
        # +1 on pictures, -0.5 on words
        to_picture = torch.linalg.pinv(means) @ torch.tensor([1.0, -0.5])
        to_text = torch.linalg.pinv(means) @ torch.tensor([0.0, 1.0])
        key, query = torch.zeros(2, size, config.hidden_size)
        key[rows] = torch.cat(
            [content, 0.6 * (pictures @ content.T).norm(dim=1).mean() * to_picture[None]]
        )
        query[rows] = torch.cat(
            [content, 0.6 * (texts @ content.T).norm(dim=1).mean() * to_text[None]]
        )
        attention.k_proj.weight[-size:] = key
        attention.q_proj.weight[-group * size :] = query.repeat(group, 1)


def build_optimizers(model: LlavaForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases (docs/log.md has the
    gain from Muon).
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        if is_matrix:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98))]


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
    parser.add_argument(
        "--start-from", help="a finished base to continue from, without the sight lessons"
    )
    parser.add_argument(
        "--ease-lookup", action="store_true", help="with --start-from: see ease_lookup"
    )
    parser.add_argument("--sight-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--alone", type=int, help="number of first steps with chat alone (default: half)"
    )
    parser.add_argument(
        "--chats",
        type=int,
        default=22,
        help="conversations per step (twice as many with chat alone)",
    )
    parser.add_argument("--pairs", type=int, default=24, help="matching samples per step")
    parser.add_argument(
        "--facts", type=int, default=14, help="pictures with eight statements each per step"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--eval-every", type=int, default=500)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if args.start_from:
        model = LlavaForConditionalGeneration.from_pretrained(args.start_from)
        processor = LlavaProcessor.from_pretrained(args.start_from)
        if args.ease_lookup:
            ease_lookup(model, processor)
    else:
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
    if not checkpoint.exists() and not args.start_from:
        learn_to_see(model, processor, args.sight_steps, 2e-3, log)
        save_checkpoint(checkpoint, model, optimizers, 0, 0.0)
    alone = args.steps // 2 if args.alone is None else args.alone
    lessons = Lessons(processor, args.steps, args.chats, args.pairs, args.facts, alone, step)
    loader = DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=4)
    sums, start = torch.zeros(3), time.time() - seconds
    for batch in loader:
        warm = min(1.0, (step + 1) / 200)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            chat, match, accuracy = losses(model, batch, yes_no)
        model.zero_grad()
        (chat + match).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        sums += torch.stack([chat, match, accuracy]).detach()
        step += 1
        if step % 50 == 0:
            chat_loss, match_loss, match_accuracy = (sums / 50).tolist()
            sums.zero_()
            row = {"step": step, "seconds": round(time.time() - start), "lr": rate}
            row |= {
                "chat_loss": chat_loss,
                "match_loss": match_loss,
                "match_accuracy": 100 * match_accuracy,
            }
            if step % args.eval_every == 0:
                row |= evaluate(model, processor, 40)
            line = json.dumps({k: round(v, 5) for k, v in row.items()})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            if step % 250 == 0:
                save_checkpoint(checkpoint, model, optimizers, step, time.time() - start)
    output = args.output or args.work_dir / "model"
    save(model, processor, output)
    scores = evaluate(LlavaForConditionalGeneration.from_pretrained(output), processor, 200)
    print(json.dumps(scores, indent=2))
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (output / "log.jsonl").write_text((args.work_dir / "log.jsonl").read_text())


if __name__ == "__main__":
    sys.exit(main())
