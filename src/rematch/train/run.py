"""``rematch train``: from a recipe to a model, with sentence-transformers' trainer."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from rematch.backbone.loading import is_checkpoint
from rematch.errors import RecipeError, RematchError, TrainingError
from rematch.files import PartialDirectory, remove, write_json, write_text, writing
from rematch.model import ReMatch
from rematch.train.build import build_collator, build_loss, build_model, precision_of
from rematch.train.checkpoints import (
    COMPLETE,
    checkpoint_step,
    newest_checkpoint,
    recipe_record,
    resumable_checkpoint,
)
from rematch.train.collator import Collator
from rematch.train.parallel import largest
from rematch.train.precision import device_type
from rematch.train.recipe import Recipe
from rematch.train.scale import measure, rate_factors
from rematch.train.sources import build_dataset, build_validation
from rematch.train.trainer import StopOnSignal, Trainer


def train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
    collator_type: type[Collator] = Collator,
) -> ReMatch:
    """Train a model and write it to ``recipe.train.output``.

    While the run lasts, its files are in ``OUTPUT.partial``, which is renamed at the end: the
    model, ``recipe.json``, ``log.json`` (every log entry) and TensorBoard files. With checkpoints
    (``train.save_every``), an interrupted run of the same recipe is resumed.

    Args:
        recipe: The settings of the run.
        callbacks: Further callbacks of the trainer.
        quiet: Print neither the progress bar nor the log.
        collator_type: A subclass may choose other documents to ask about
            (:meth:`~rematch.train.collator.Collator.hard_negative`).

    Raises:
        RecipeError: If the output directory exists already, the recipe does not fit the launcher
            or the hardware, or an unfinished run of another recipe is in the way.
        DataError: If the data cannot be read, or does not fill one batch.
        TrainingError: If the loss is not finite, SIGTERM stopped the run after a checkpoint, or
            the checkpoint to resume from is damaged.
        StorageError: If ``OUTPUT.partial`` is not from an earlier run or another process uses it,
            or a file cannot be written.
    """
    _check_launch(recipe)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    directory = PartialDirectory(Path(recipe.train.output))
    if not _is_first_process():
        return _train(recipe, callbacks, quiet, collator_type, directory)
    with directory:
        try:
            return _train(recipe, callbacks, quiet, collator_type, directory)
        except BaseException:
            _clean_up(directory)
            raise


def _train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback],
    quiet: bool,
    collator_type: type[Collator],
    directory: PartialDirectory,
) -> ReMatch:
    """:func:`train`; the first process holds the directory."""
    partial = directory.path
    checkpoint = resumable_checkpoint(recipe, partial)
    dataset = build_dataset(recipe)
    validation = build_validation(recipe)
    model = build_model(recipe)
    arithmetic = _arithmetic(recipe, model)
    if _is_first_process() and not quiet:
        precision, attention = arithmetic["precision"], arithmetic["attention"]
        sys.stderr.write(f"training on {device_type()}: {precision}, {attention} attention\n")
    loss = build_loss(recipe, model)
    collator = build_collator(recipe, model, collator_type)
    if _is_first_process():
        _prepare_directory(recipe, directory, checkpoint)
    # joins the other processes, if there are any
    arguments = _arguments(recipe, partial, validate=validation is not None, quiet=quiet)
    _check_shared(checkpoint, arguments.device)
    scales = measure(model)
    factors = rate_factors(scales) if recipe.train.scale_learning_rates else {}
    if _is_first_process() and not quiet:
        sys.stderr.write(_scale_line(recipe, scales, factors))
    stop = StopOnSignal()
    with _tensorboard_directory(partial / "tensorboard"):
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=validation,
            loss=loss,
            data_collator=collator,
            factors=factors,
            trained_before=is_checkpoint(recipe.model.backbone),
            callbacks=[stop, *callbacks],
        )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    _run(trainer, stop, checkpoint)
    model = _trained_model(trainer, model, recipe)
    if _is_first_process():
        start = {"step": 0} | arithmetic | {"rms": scales, "rate_factors": factors}
        history = [start, *trainer.state.log_history]
        _save(model, recipe, history, directory)
    return model


def _process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


# ---- before the run -----------------------------------------------------------------------------


def _check_launch(recipe: Recipe) -> None:
    """Refuse an output directory in use, and launchers that the recipe does not work with."""
    settings = recipe.train
    output = Path(settings.output)
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise RecipeError(f"{output}: exists already. Choose another train.output=… or remove it.")
    if settings.batch_size % _process_count():
        raise RecipeError(
            f"train.batch_size={settings.batch_size} cannot be divided evenly among "
            f"{_process_count()} processes. Choose a multiple of their number."
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise RecipeError(
            "DeepSpeed is not supported: ZeRO reduces each gradient in one backward pass per "
            "step, but the gradient cache runs several, and weights that ZeRO has flattened "
            "cannot be saved. Launch with recipes/launch/fsdp2.yaml instead: FSDP2 also shards "
            "weights, gradients and optimizer states."
        )
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if recipe.model.four_bit and is_sharded:
        raise RecipeError(
            "model.four_bit does not work with FSDP, which cannot reassemble sharded 4-bit "
            "weights to save them. Use torchrun (each GPU then holds the whole base in 4 bits), "
            "or set model.four_bit=false."
        )
    if recipe.loss.learn_temperature and is_sharded:
        raise RecipeError(
            "loss.learn_temperature does not work with FSDP, whose optimizer takes weights of the "
            "model alone. Use torchrun, or set loss.learn_temperature=false."
        )


def _check_shared(checkpoint: Path | None, device: torch.device) -> None:
    """Check that all processes resume from the same step.

    Raises:
        TrainingError: If they do not.
    """
    step = checkpoint_step(checkpoint) if checkpoint else 0
    last, first = largest([step, -step], device)
    if last != -first:
        raise TrainingError(
            f"some processes resume after step {-first}, others after step {last}. "
            "train.output must be on a disk that all machines share."
        )


def _arithmetic(recipe: Recipe, model: ReMatch) -> dict[str, str]:
    """The arithmetic of the run, as the log names it."""
    mllm = model.backbone.model
    weights = str(mllm.dtype).removeprefix("torch.")
    return {
        "precision": "bfloat16 autocast" if precision_of(recipe).bf16 else weights,
        "attention": mllm.config.get_text_config()._attn_implementation,
    }


def _scale_line(recipe: Recipe, scales: dict[str, float], factors: dict[str, float]) -> str:
    """The scale of words, tokens and projector, and their learning rates, as one line."""
    rate = recipe.train.learning_rate
    rms = ", ".join(f"{name} {scale:.3g}" for name, scale in scales.items())
    rates = [f"{name} {rate * factor:.3g}" for name, factor in factors.items()]
    return f"RMS of weights: {rms}; learning rates: {', '.join([*rates, f'the rest {rate:g}'])}\n"


def _prepare_directory(
    recipe: Recipe, directory: PartialDirectory, checkpoint: Path | None
) -> None:
    """Empty the directory of the unfinished run, unless the run resumes."""
    if checkpoint is None:
        directory.empty()
    else:
        step = checkpoint_step(checkpoint)
        sys.stderr.write(f"{directory.path}: resuming after step {step}\n")
    write_json(directory.path / "recipe.json", recipe_record(recipe))


@contextmanager
def _tensorboard_directory(directory: Path) -> Iterator[None]:
    """Where a trainer that is built inside writes TensorBoard files; it takes no argument."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory)
    try:
        yield
    finally:
        os.environ.pop("TENSORBOARD_LOGGING_DIR")


def _arguments(
    recipe: Recipe, partial: Path, *, validate: bool, quiet: bool
) -> SentenceTransformerTrainingArguments:
    """The recipe in the trainer's terms."""
    settings = recipe.train
    batch_size = settings.batch_size // _process_count()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(partial),
        max_steps=settings.steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        bf16=precision_of(recipe).bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,
        eval_strategy="steps" if validate else "no",
        eval_steps=settings.save_every or None,
        load_best_model_at_end=validate,
        report_to=settings.report_to or (["tensorboard"] if find_spec("tensorboard") else []),
        # processes cannot share weights on MPS, which the collator holds
        dataloader_num_workers=0 if device_type() == "mps" else settings.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # the loss depends on all of them (parallel.touch)
        disable_tqdm=quiet,
    )
    # no DataParallel: the loss calls methods of the model by name
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# ---- the run and after --------------------------------------------------------------------------


def _run(trainer: Trainer, stop: StopOnSignal, checkpoint: Path | None) -> None:
    """Train to the last step.

    Raises:
        TrainingError: If SIGTERM stopped the run early.
        StorageError: If a file of the run cannot be written.
    """
    try:
        with writing(trainer.args.output_dir):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RematchError:
        sys.stderr.write("\n")  # ends the line of the progress bar
        raise
    finally:
        stop.restore()
        _close_tensorboard(trainer)
    step, steps = trainer.state.global_step, trainer.args.max_steps
    if stop.stopped and step < steps:
        raise TrainingError(
            f"stopped after step {step} of {steps} on SIGTERM; a checkpoint was written. Run the "
            "same command again to resume."
        )


def _close_tensorboard(trainer: Trainer) -> None:
    """End the thread that writes TensorBoard files, before their directory may be removed.

    transformers closes them only after a run that comes to its end.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            with suppress(OSError):  # the disk may be full, which the run has reported
                callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _trained_model(trainer: Trainer, model: ReMatch, recipe: Recipe) -> ReMatch:
    """The model without what the trainer wrapped around it.

    Under FSDP it is a new model, with the trained weights in the first process only.
    """
    if trainer.is_fsdp_enabled:  # each process holds a part of each weight
        weights = trainer.accelerator.get_state_dict(trainer.model)
        model = build_model(recipe)
        if _is_first_process():
            model.load_state_dict(weights)
    # restores the forward method, which ran under autocast
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.eval()
    return model


def _save(
    model: ReMatch, recipe: Recipe, history: list[dict[str, Any]], directory: PartialDirectory
) -> None:
    """Save the model with log and model card, drop the checkpoints, and rename the directory."""
    partial = directory.path
    with writing(partial):
        model.save_pretrained(str(partial))
        write_text(partial / "log.json", json.dumps(history, indent=1) + "\n")
        _extend_model_card(partial / "README.md", recipe, history)
        for checkpoint in partial.glob("checkpoint-*"):
            remove(checkpoint)
    directory.publish()


def _clean_up(directory: PartialDirectory) -> None:
    """After a failure, keep only what a run can resume from."""
    if newest_checkpoint(directory.path) is None:
        if not directory.holds_earlier_files:
            directory.discard()
        return
    for checkpoint in directory.path.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            remove(checkpoint)


def _extend_model_card(card: Path, recipe: Recipe, history: list[dict[str, Any]]) -> None:
    """Describe the training run in the model card."""
    settings = recipe.model_dump(mode="json", exclude_defaults=True)
    last_entry: dict[str, Any] = next(
        (entry for entry in reversed(history) if "loss" in entry), {}
    )
    names = ("loss", "contrastive", "matching")
    losses = {name: round(last_entry[name], 4) for name in last_entry if name in names}
    packages = ("torch", "transformers", "sentence-transformers", "peft", "rematch-mm")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    section = f"""
## Training

Trained by `rematch train` with this recipe (all other settings are defaults):

```yaml
{yaml.safe_dump(settings, sort_keys=False)}```

Final losses: {losses}. Versions: {versions}.
"""
    write_text(card, card.read_text() + section)
