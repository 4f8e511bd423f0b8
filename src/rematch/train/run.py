"""``rematch train``: a recipe becomes a model. sentence-transformers' trainer does the work."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback

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
    dtype = {} if lora else {"dtype": torch.float32}  # small updates of whole weights would be lost in bfloat16
    model = ReMatch.from_backbone(
        settings.backbone, settings.num_tokens, lora=lora, lora_vision=vision, model_kwargs=dtype
    )
    model.backbone.document_instructions = recipe.data.document_instructions
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
        triplet = partial(training_triplet, seed)
    else:
        path = Path(source)
        read = read_train(path) if path.is_dir() else read_triplets(path)
        samples = read[: recipe.data.samples]
        count, has_negatives = len(samples), bool(samples) and all(t.negative is not None for t in samples)
        if not has_negatives and any(t.negative is not None for t in samples) and recipe.data.hard_negatives:
            raise DataError(
                f"{source}: some samples have a hard negative and others none. Give every one a negative, or train "
                "without them (data.hard_negatives=false)."
            )
        triplet = samples.__getitem__
    if count < recipe.train.batch_size:
        raise DataError(
            f"{source}: {count} samples do not fill one batch of {recipe.train.batch_size}; lower train.batch_size "
            f"(train.batch_size={max(2, count)}) or bring more data."
        )
    columns = ["query", "positive"] + ["negative"] * (has_negatives and recipe.data.hard_negatives)
    rows = _Rows(triplet, columns, recipe.data.document_instructions)
    return Dataset.from_dict({"index": list(range(count))}).with_transform(rows)


@dataclass(frozen=True)
class _Rows:
    """From indices to the columns of a batch; a class, so that data workers can be started by pickling it."""

    triplet: Callable[[int], Triplet]
    columns: list[str]
    document_instructions: bool

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [self.triplet(i) for i in batch["index"]]
        instruct = {c: self.document_instructions or c == "query" for c in self.columns}
        return {c: [getattr(t, c).as_input(instruct[c]) for t in found] for c in self.columns}


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("this version trains on one device; start it without torchrun or accelerate launch.")
    if output.is_file() or (output.exists() and any(output.iterdir())):
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
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
        dataloader_num_workers=settings.workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        disable_tqdm=quiet,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel: the loss calls parts of the model by name
    views = recipe.loss.views if recipe.loss.w_qdm else []
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        data_collator=Collator(model, views, settings.seed),
        callbacks=list(callbacks),
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    loss.autocast = trainer.accelerator.autocast
    try:
        trainer.train()
    except RematchError:
        sys.stderr.write("\n")  # the progress bar has left the line open
        shutil.rmtree(partial, ignore_errors=True)
        raise
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward ran under autocast
    loss.autocast = nullcontext
    os.environ.pop("TENSORBOARD_LOGGING_DIR")
    model.eval()
    model.save_pretrained(str(partial))
    (partial / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n")
    (partial / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return model
