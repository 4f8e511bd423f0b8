"""``rematch train``: a recipe becomes a model. sentence-transformers' trainer does the work."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from rematch.data.mmeb import read_train
from rematch.data.pairs import read_triplets
from rematch.data.picto_tasks import training_triplet
from rematch.data.schema import Triplet
from rematch.errors import DataError, RecipeError, RematchError
from rematch.losses import ReMatchLoss
from rematch.model import ReMatch
from rematch.train.collator import Collator
from rematch.train.recipe import Recipe


def build_model(recipe: Recipe) -> ReMatch:
    """The model a recipe starts from, with what it does not train frozen."""
    settings = recipe.model
    lora = None
    if settings.lora:
        lora = LoraConfig(r=settings.lora.r, lora_alpha=settings.lora.alpha, lora_dropout=settings.lora.dropout)
    torch.manual_seed(recipe.train.seed)
    vision = settings.lora.vision if settings.lora else False
    model = ReMatch.from_backbone(settings.backbone, settings.num_tokens, lora=lora, lora_vision=vision)
    if lora is None and not settings.train_vision:
        for name, parameter in model.backbone.model.named_parameters():
            if "vision" in name or "visual" in name:
                parameter.requires_grad_(False)
    return model


def build_dataset(recipe: Recipe) -> Dataset:
    """A dataset of rows ``query``, ``positive``(, ``negative``), made or read as they are asked for."""
    source, seed = recipe.data.source, recipe.train.seed
    total = recipe.train.steps * recipe.train.batch_size
    triplet: Callable[[int], Triplet]
    if source == "picto":
        count, has_negatives = recipe.data.samples or total, True

        def triplet(index: int) -> Triplet:
            return training_triplet(seed, index)
    else:
        path = Path(source)
        read = read_train(path) if path.is_dir() else read_triplets(path)
        samples = read[: recipe.data.samples]
        count, has_negatives = len(samples), samples[0].negative is not None
        triplet = samples.__getitem__
    if count < recipe.train.batch_size:
        raise DataError(
            f"{source}: {count} samples do not fill one batch of {recipe.train.batch_size}; lower train.batch_size "
            f"(train.batch_size={max(2, count)}) or bring more data."
        )
    columns = ["query", "positive"] + ["negative"] * (has_negatives and recipe.data.hard_negatives)
    instruct = recipe.data.document_instructions

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [triplet(i) for i in batch["index"]]
        return {c: [getattr(t, c).as_input(instruct or c == "query") for t in found] for c in columns}

    return Dataset.from_dict({"index": list(range(count))}).with_transform(rows)


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]  # sentence-transformers ships no types
    """The library's trainer; it logs the Yes/No accuracy per view pair and keeps every log in ``log.jsonl``."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self.loss.pop_accuracy(), start_time)

    def validate_column_names(self, dataset: Any, dataset_name: str | None = None) -> None:
        """Rows are made by a transform, so that the stored columns are not those the model sees."""


def train(recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = (), quiet: bool = False) -> ReMatch:
    """Train a model and write it to ``recipe.train.output``.

    The directory is written under a temporary name and renamed when it is whole; ``recipe.json``, ``log.json`` (every
    logged step) and TensorBoard files lie in it.

    Args:
        recipe: What to do.
        callbacks: Further trainer callbacks.
        quiet: No progress bar.

    Raises:
        RecipeError: If the output directory exists already.
        DataError: If the data cannot be read, or holds less than one batch.
    """
    settings = recipe.train
    output = Path(settings.output)
    if output.exists() and any(output.iterdir()):
        raise RecipeError(f"{output}: exists already. Choose another train.output=… or remove it.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dataset = build_dataset(recipe)
    model = build_model(recipe)
    loss = ReMatchLoss(
        model,
        temperature=recipe.loss.temperature,
        w_orth=recipe.loss.w_orth,
        w_qdm=recipe.loss.w_qdm,
        views=recipe.loss.views,
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(partial / "tensorboard")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(partial),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        save_strategy="no",
        report_to=["tensorboard"],
        dataloader_num_workers=settings.workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        disable_tqdm=quiet,
    )
    views = recipe.loss.views if recipe.loss.w_qdm else []
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        data_collator=Collator(model, views, settings.seed),
        callbacks=list(callbacks),
    )
    try:
        trainer.train()
    except RematchError:
        sys.stderr.write("\n")  # the progress bar has left the line open
        shutil.rmtree(partial, ignore_errors=True)
        raise
    model.eval()
    model.save_pretrained(str(partial))
    (partial / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n")
    (partial / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return model
