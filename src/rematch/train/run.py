"""``rematch train``: a recipe becomes a model. sentence-transformers' trainer does the work."""

import json
import os
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.util import get_device_name
from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

from rematch.backbone.pixels import limit_pixels
from rematch.errors import ImageError, RecipeError, RematchError, TooLongError, TrainingError
from rematch.files import write_json, write_text
from rematch.matching import Matching, View
from rematch.model import ReMatch
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.precision import choose, native_bfloat16
from rematch.train.recipe import Recipe
from rematch.train.sources import build_dataset, build_validation
from rematch.train.trainer import StopOnSignal, Trainer, check_checkpoint, newest_checkpoint


def build_model(recipe: Recipe) -> ReMatch:
    """The model a recipe starts from, with what it does not train frozen."""
    settings = recipe.model
    lora = None
    if settings.lora:
        lora = LoraConfig(
            r=settings.lora.r, lora_alpha=settings.lora.alpha, lora_dropout=settings.lora.dropout
        )
    torch.manual_seed(recipe.train.seed)
    vision = settings.lora.vision if settings.lora else False
    dtype = settings.dtype or (
        "auto" if lora else "float32"
    )  # bfloat16 would lose small updates of whole weights
    options: dict[str, Any] = {"dtype": dtype}
    _, attention = _precision(recipe)
    if attention:
        options["attn_implementation"] = attention
    if settings.liger and not (torch.cuda.is_available() and find_spec("liger_kernel")):
        raise RecipeError(
            "model.liger needs a CUDA device and liger-kernel (pip install liger-kernel)."
        )
    if settings.four_bit:
        if not is_bitsandbytes_available():
            raise RecipeError(
                f"model.four_bit needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer (pip "
                "install bitsandbytes)."
            )
        compute = torch.bfloat16 if native_bfloat16(device_type()) else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        options["device_map"] = {
            "": get_device_name()
        }  # by default all processes would load onto the first GPU
    model = ReMatch.from_backbone(
        settings.backbone, settings.num_tokens, lora=lora, lora_vision=vision, model_kwargs=options
    )
    model.backbone.document_instructions = recipe.data.document_instructions
    model.backbone.matching = recipe.loss.matching
    limit_pixels(model.backbone.processor, settings.min_pixels, settings.max_pixels)
    if lora is None and not settings.train_vision:
        model.backbone.freeze_vision()
    if settings.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.backbone.model)
    if settings.compile:
        for layer in model.backbone.model.get_decoder().layers:
            layer.compile(dynamic=True)
    if recipe.train.gradient_checkpointing:
        model.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def device_type() -> str:
    """Type of the device that a run uses."""
    return (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )  # type: ignore[union-attr]


def _precision(recipe: Recipe) -> tuple[bool, str | None]:
    return choose(recipe.train.bf16, recipe.model.attention, device_type())


def build_loss(recipe: Recipe, model: ReMatch) -> ReMatchLoss:
    """The loss of a recipe."""
    options = recipe.loss.model_dump(exclude={"matching", "views"})
    return ReMatchLoss(
        model, views=_views(recipe), features_gb=recipe.train.features_gb, **options
    )


def build_collator(recipe: Recipe, model: ReMatch) -> Collator:
    """What makes batches for :func:`build_loss`."""
    skip: list[type[RematchError]] = []
    if recipe.data.unreadable == "skip":
        skip.append(ImageError)
    if recipe.data.too_long == "skip":
        skip.append(TooLongError)
    reuse = recipe.loss.matching == Matching.REUSE
    return Collator(model, _views(recipe), recipe.train.mini_batch_tokens, reuse, tuple(skip))


def _views(recipe: Recipe) -> list[View]:
    if not recipe.loss.w_qdm:
        return []
    return [View.FEAT_FEAT] if recipe.loss.matching == Matching.FEAT else recipe.loss.views


def train(
    recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = (), quiet: bool = False
) -> ReMatch:
    """Train a model and write it to ``recipe.train.output``.

    The directory is written under a temporary name and renamed when it is whole; ``recipe.json``,
    ``log.json`` (every logged step) and TensorBoard files lie in it. With checkpoints
    (``train.save_every``), a run of the same recipe that was cut off is continued.

    Args:
        recipe: What to do.
        callbacks: Further trainer callbacks.
        quiet: No progress bar.

    Raises:
        RecipeError: If the output directory exists already, DeepSpeed launched the run, or an
            unfinished run does not say which recipe it belongs to.
        DataError: If the data cannot be read, or holds less than one batch.
        TrainingError: If the loss is no number, SIGTERM stopped the run (a checkpoint is written
            then), or files of the checkpoint to resume from are missing or cut.
    """
    settings = recipe.train
    output = Path(settings.output)
    world, first = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise RecipeError(f"{output}: exists already. Choose another train.output=… or remove it.")
    if settings.batch_size % world:
        raise RecipeError(
            f"train.batch_size={settings.batch_size} cannot be shared evenly by {world} processes."
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise RecipeError(
            "DeepSpeed is not supported: ZeRO reduces each gradient in one backward pass per "
            "step, but the gradient cache runs several, and weights that ZeRO has flattened "
            "cannot be saved. Launch with recipes/launch/fsdp2.yaml instead: FSDP2 also shards "
            "weights, gradients and optimizer states."
        )
    if recipe.model.four_bit and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise RecipeError(
            "model.four_bit does not work with FSDP, which cannot put 4-bit weights together "
            "again to save them. Use torchrun (each GPU then holds the whole base in 4 bits), or "
            "set model.four_bit=false."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    partial = output.with_name(output.name + ".partial")
    checkpoint = _resumable(recipe, partial)
    dataset = build_dataset(recipe)
    validation = build_validation(recipe)
    use_bf16, _ = _precision(recipe)
    model = build_model(recipe)
    arithmetic = {
        "precision": "bfloat16 autocast" if use_bf16 else "float32",
        "attention": model.backbone.model.config.get_text_config()._attn_implementation,
    }
    if first and not quiet:
        sys.stderr.write(
            "training on {}: {precision}, {attention} attention\n".format(
                device_type(), **arithmetic
            )
        )
    loss = build_loss(recipe, model)
    collator = build_collator(recipe, model)
    if first:
        if checkpoint is None:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / "recipe.json", record(recipe))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(partial / "tensorboard")
    report_to = settings.report_to or (["tensorboard"] if find_spec("tensorboard") else [])
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(partial),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // world,
        per_device_eval_batch_size=settings.batch_size // world,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        bf16=use_bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,
        eval_strategy="steps" if validation is not None else "no",
        eval_steps=settings.save_every or None,
        load_best_model_at_end=validation is not None,
        report_to=report_to,
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # the loss touches them all (parallel.touch)
        disable_tqdm=quiet,
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # no DataParallel: the loss calls parts of the model by name
    stop = StopOnSignal()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation,
        loss=loss,
        data_collator=collator,
        callbacks=[stop, *callbacks],
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    if checkpoint is not None and first:
        sys.stderr.write(
            f"{partial}: continuing after step {checkpoint.name.rpartition('-')[2]}\n"
        )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RematchError:
        sys.stderr.write("\n")  # the progress bar has left the line open
        if first and newest_checkpoint(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        stop.restore()
        os.environ.pop("TENSORBOARD_LOGGING_DIR")
    if stop.stopped and trainer.state.global_step < settings.steps:
        raise TrainingError(
            f"stopped after step {trainer.state.global_step} of {settings.steps}; a checkpoint is "
            "written. Start the same command again to go on."
        )
    if (
        trainer.is_fsdp_enabled
    ):  # every process holds a part of each weight; the first one puts them together
        weights = trainer.accelerator.get_state_dict(trainer.model)
        model = build_model(recipe)
        if first:
            model.load_state_dict(weights)
    trainer.accelerator.unwrap_model(
        model, keep_fp32_wrapper=False
    )  # its forward ran under autocast
    model.eval()
    if first:
        model.save_pretrained(str(partial))
        write_text(
            partial / "log.json",
            json.dumps([{"step": 0} | arithmetic, *trainer.state.log_history], indent=1) + "\n",
        )
        _write_card(partial, model, recipe, trainer.state.log_history)
        for old in partial.glob("checkpoint-*"):
            shutil.rmtree(old)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    return model


def _resumable(recipe: Recipe, partial: Path) -> Path | None:
    """The checkpoint to go on from, if an earlier run of this very recipe left one."""
    checkpoint = newest_checkpoint(partial)
    if checkpoint is None:
        return None
    try:
        before = {
            part: dict(values)
            for part, values in json.loads((partial / "recipe.json").read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        state = (
            "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as a recipe"
        )
        raise RecipeError(
            f"{partial}: holds {checkpoint.name} of an unfinished run, but its recipe.json "
            f"{state}, so nothing says which recipe the checkpoint belongs to. Restore "
            "recipe.json, choose another train.output=…, or remove the directory."
        ) from None
    now = record(recipe)
    changed = [
        f"{part}.{key}"
        for part in now
        for key in now[part]
        if before.get(part, {}).get(key) != now[part][key]
    ]
    if changed:
        raise RecipeError(
            f"{partial}: an unfinished run of another recipe lies there (it differs in "
            f"{', '.join(changed)}). Finish it with its own recipe, choose another "
            "train.output=…, or remove the directory."
        )
    check_checkpoint(checkpoint)
    return checkpoint


def record(recipe: Recipe) -> dict[str, Any]:
    """A recipe, and what it leaves to the hardware: on another machine a run would go on in other
    arithmetic.
    """
    use_bf16, attention = _precision(recipe)
    record: dict[str, Any] = json.loads(recipe.model_dump_json())
    return record | {"settled": {"bf16": use_bf16, "attention": attention}}


def _write_card(
    directory: Path, model: ReMatch, recipe: Recipe, history: list[dict[str, Any]]
) -> None:
    """Add how it was trained to the model card."""
    last = [row for row in history if "loss" in row][-1:]
    names = ("torch", "transformers", "sentence-transformers", "peft", "rematch-mm")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    chosen = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    losses = {
        k: round(v, 4)
        for row in last
        for k, v in row.items()
        if k in ("loss", "contrastive", "matching")
    }
    card = directory / "README.md"
    text = (
        card.read_text()
        + f"""
## Training

`rematch train` with this recipe (what is not named is at its default):

```yaml
{chosen}```

Losses at the end: {losses}. Versions: {versions}.
"""
    )
    write_text(card, text)
