"""Training recipes: validated YAML with ``key=value`` overrides.

An unknown key is an error that suggests the most similar key.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from rematch.errors import DataError, RecipeError, shortened
from rematch.files import parse_yaml, read_yaml
from rematch.matching import Matching, View
from rematch.prompts import TokenInit

_PROBLEMS_SHOWN = 5
_LONGEST_KEY = 100  # characters
_MOST_SAMPLES = 100_000_000  # of a run
_MOST_PIXELS = 1_000_000_000


def _check_text(text: str) -> str:
    """Refuse what no file or model can be called.

    Raises:
        ValueError: If the text is empty, or has control characters or halves of surrogate pairs.
    """
    if not text.strip():
        raise ValueError("is empty; give a value or leave the key out")
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise ValueError("has characters that are not text; remove them")
    return text


Text = Annotated[str, Field(max_length=4000), AfterValidator(_check_text)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=False, validate_default=True, allow_inf_nan=False
    )


class Lora(_Section):
    """A LoRA adapter. Leave ``model.lora`` out (null) for full fine-tuning."""

    r: int = Field(32, gt=0, le=10_000, description="rank of the adapter")
    alpha: int = Field(
        64, gt=0, le=1_000_000, description="scale of the adapter; its output is times alpha / r"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    vision: bool = Field(False, description="adapt the vision tower too")


class Model(_Section):
    """The model to train."""

    backbone: Text = Field(
        "rematch-base",
        description="hub name, directory, or packaged model; a ReMatch model is trained further",
    )
    num_tokens: int = Field(
        16, ge=0, le=1024, description="K learnable tokens; 0 pools the last token"
    )
    token_init: TokenInit = Field(
        "random",
        description="start of the learnable tokens; random: noise at the scale of the word "
        "embeddings; small: at a tenth of it; last, mean: small noise around the template's last "
        "token or the mean of the vocabulary; mixed: last and random in turn",
    )
    lora: Lora | None = Field(None, description="LoRA adapter; null: full fine-tuning")
    dtype: Literal["auto", "float32", "bfloat16"] | None = Field(
        None,
        description="dtype of the weights; null: as in the checkpoint with LoRA and bfloat16, "
        "else float32",
    )
    attention: Text | None = Field(
        "auto",
        description="sdpa, eager or flex_attention; null: the backbone's default; auto: the "
        "default too, but eager for bfloat16 on a CPU",
    )
    four_bit: bool = Field(
        False, description="QLoRA: load the frozen weights in 4 bits (needs bitsandbytes)"
    )
    compile: bool = Field(False, description="torch.compile the language model's layers")
    liger: bool = Field(
        False, description="use Liger's fused kernels (needs liger-kernel and a GPU)"
    )
    min_pixels: int | None = Field(
        None,
        gt=0,
        le=_MOST_PIXELS,
        description="enlarge smaller pictures to this; null: the backbone's limit",
    )
    max_pixels: int | None = Field(
        None,
        gt=0,
        le=_MOST_PIXELS,
        description="scale larger pictures down to this; null: the backbone's limit",
    )
    train_vision: bool = Field(
        False, description="train the vision tower too (full fine-tuning only)"
    )


class Source(_Section):
    """One of several training sets."""

    path: Text = Field(
        description="picto, a .jsonl or .parquet file, a directory in MMEB-train form, or one "
        "config in it"
    )
    weight: float | None = Field(
        None, gt=0, le=1e9, description="relative frequency of its samples; null: their number"
    )
    samples: int | None = Field(
        None,
        gt=0,
        le=_MOST_SAMPLES,
        description="size of the random subset to use; null: all samples",
    )
    split: str = Field(
        "original",
        max_length=100,
        pattern=r"^[\w-]+$",
        description="split of a directory in MMEB-train form: original or diverse_instruction",
    )
    temperature: float | None = Field(
        None, gt=0, le=100, description="temperature of its queries; null: loss.temperature"
    )


class Data(_Section):
    """The training data."""

    source: Text | list[Source] = Field(
        "picto", description="one training set, as in Source.path, or a list of sources"
    )
    samples: int | None = Field(
        None,
        gt=0,
        le=_MOST_SAMPLES,
        description="size of the random subset of each source; null: all samples",
    )
    homogeneous: bool = Field(
        False,
        description="fill each batch from one source (each config of a directory is one)",
    )
    hard_negatives: bool = Field(True, description="use the hard negatives of the data")
    validation: int = Field(
        0,
        ge=0,
        le=_MOST_SAMPLES,
        description="samples of each source held out for validation, scored at every checkpoint",
    )
    unreadable: Literal["error", "skip"] = Field(
        "error",
        description="error: a picture that cannot be read stops the run; skip: another sample "
        "replaces its sample",
    )
    too_long: Literal["error", "skip"] = Field(
        "error",
        description="error: an input longer than the model takes stops the run; skip: another "
        "sample replaces its sample",
    )
    document_instructions: bool = Field(True, description="put instructions before documents")


class Loss(_Section):
    """The loss; the defaults are the paper's."""

    temperature: float = Field(0.02, gt=0, le=100, description="τ of InfoNCE")
    w_orth: float = Field(
        0.5, ge=0, le=1000, description="weight of the orthogonality loss; 0: off"
    )
    w_qdm: float = Field(0.1, ge=0, le=1000, description="weight of the matching loss; 0: off")
    matching: Matching = Field(
        Matching.UNIFIED,
        description="unified: read raw inputs again; feat: show embeddings only; reuse: keys and "
        "values of the embedding pass",
    )
    joint: bool = Field(
        False, description="let documents attend to the query when questions are answered"
    )
    gradient_cache: bool = Field(
        False,
        description="bound activation memory by a mini-batch, for one more forward pass",
    )
    learn_temperature: bool = Field(
        False, description="train the temperature, starting from loss.temperature"
    )
    mask_duplicates: bool = Field(
        False, description="do not count a document identical to the positive as a negative"
    )
    symmetric: bool = Field(False, description="also contrast positives with queries")
    hardness: float = Field(
        0.0, ge=0, le=1000, description="β: weight negatives by exp(β · cosine); 0: all equal"
    )
    matryoshka: list[Annotated[int, Field(gt=0, le=1_000_000)]] = Field(
        [], max_length=32, description="further widths to train, for truncated embeddings"
    )
    views: list[View] = Field(
        list(View), min_length=1, max_length=len(View), description="views to ask about"
    )


class Train(_Section):
    """The run: its length, speed, memory and output."""

    output: Text = Field("rematch-model", description="directory of the trained model and its log")
    steps: int = Field(1600, gt=0, le=_MOST_SAMPLES, description="number of steps")
    batch_size: int = Field(
        32,
        gt=1,
        le=1_000_000,
        description="samples per step, over all processes; a query's negatives are the documents "
        "of all the other samples",
    )
    mini_batch_tokens: int = Field(
        16_384,
        gt=0,
        le=100_000_000,
        description="tokens per forward pass, pictures and padding included",
    )
    learning_rate: float = Field(
        1e-4, gt=0, le=100, description="peak learning rate (cosine schedule)"
    )
    scale_learning_rates: bool = Field(
        True,
        description="multiply the learning rate of learnable tokens and projector by their scale "
        "relative to the other weights",
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=100, description="weight decay of AdamW")
    bf16: bool | Literal["auto"] = Field(
        "auto", description="bfloat16 autocast; auto: where the CPU or GPU supports it natively"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of weights, sample order and dropout")
    log_every: int = Field(20, gt=0, le=_MOST_SAMPLES, description="steps between log entries")
    gradient_checkpointing: bool = Field(
        False, description="recompute the activations inside layers in the backward pass"
    )
    save_every: int = Field(
        0,
        ge=0,
        le=_MOST_SAMPLES,
        description="steps between checkpoints, from which an interrupted run resumes; 0: none",
    )
    features_gb: float = Field(
        4.0,
        ge=0,
        le=1e6,
        description="GiB for features of a frozen vision tower; if they take more, every pass "
        "runs the tower",
    )
    report_to: list[Text] = Field(
        [], max_length=32, description="experiment trackers; empty: TensorBoard if it is installed"
    )
    workers: int = Field(
        1, ge=0, le=256, description="processes that read and tokenize batches ahead"
    )

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        if "://" in output or Path(output).name in ("", ".."):
            raise ValueError("names no directory to create; give a name such as rematch-model")
        return output

    @field_validator("report_to")
    @classmethod
    def _check_trackers(cls, names: list[str]) -> list[str]:
        if set(names) <= {"none"}:
            return names
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        installed = get_available_reporting_integrations()
        for name in names:
            if name not in ("none", "all", *INTEGRATION_TO_CALLBACK):
                raise ValueError(
                    f"{name} is unknown; choose from {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
                )
            if name not in ("none", "all", *installed):
                raise ValueError(f"{name} is not installed; install it or leave it out")
        return names


class Recipe(_Section):
    """The settings of one training run."""

    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    train: Train = Train()

    @model_validator(mode="after")
    def _check_combinations(self) -> "Recipe":
        samples = self.train.steps * self.train.batch_size
        if samples > _MOST_SAMPLES:
            raise ValueError(
                f"train.steps × train.batch_size is {samples:,} samples; a run reads at most "
                f"{_MOST_SAMPLES:,}; lower one of them"
            )
        if self.data.validation and not self.train.save_every:
            raise ValueError(
                "data.validation is scored at checkpoints, but train.save_every=0 writes none; "
                "set train.save_every too"
            )
        if self.loss.w_qdm and "flash" in (self.model.attention or ""):
            raise ValueError(
                f"model.attention={self.model.attention} takes no 4-D masks, which matching "
                "needs; leave it out, or train without matching (loss.w_qdm=0)"
            )
        if self.loss.matching == Matching.REUSE and self.train.gradient_checkpointing:
            raise ValueError(
                "loss.matching=reuse reads keys and values that train.gradient_checkpointing "
                "discards; switch one of them off (loss.gradient_cache with a smaller "
                "train.mini_batch_tokens saves memory too)"
            )
        if self.loss.joint and self.loss.matching == Matching.REUSE:
            raise ValueError(
                "loss.joint lets documents attend to the query, but loss.matching=reuse takes "
                "their keys and values from the embedding pass, which has no query; switch one of "
                "them off"
            )
        if self.loss.learn_temperature and isinstance(self.data.source, list):
            for source in self.data.source:
                if source.temperature:
                    raise ValueError(
                        f"the source {source.path} has its own temperature, but "
                        "loss.learn_temperature trains a single one for all; leave one of them "
                        "out"
                    )
        if (self.model.min_pixels or 0) > (self.model.max_pixels or float("inf")):
            raise ValueError(
                f"model.min_pixels={self.model.min_pixels} is more than "
                f"model.max_pixels={self.model.max_pixels}; lower it"
            )
        if self.model.four_bit and self.model.lora is None:
            raise ValueError(
                "model.four_bit freezes the weights, so nothing is left to train; set model.lora"
            )
        return self


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: A YAML file.
        overrides: Settings that replace those of the file, as ``section.key=value`` with the
            value in YAML.

    Raises:
        RecipeError: If the file is missing or not valid YAML, a key is unknown, or a value has
            the wrong type.
    """
    path = Path(path)
    content = _read_recipe(path)
    for override in overrides:
        _apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        errors = error.errors()
        problems = [_explain(details) for details in errors[:_PROBLEMS_SHOWN]]
        if len(errors) > _PROBLEMS_SHOWN:
            problems.append(f"and {len(errors) - _PROBLEMS_SHOWN} more")
        raise RecipeError(f"{path}: {'; '.join(problems)}") from None


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe. The recipes of this project are in recipes/.")
    try:
        content = read_yaml(path)
    except DataError as error:
        raise RecipeError(str(error)) from None
    if content is None:
        raise RecipeError(f"{path}: is empty. Write {{}} for a recipe of defaults.")
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections, but this is a {type(content).__name__}."
        )
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Set the value that ``section.key=value`` names."""
    key, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(
            f"override {shortened(override)}: write it as section.key=value, such as "
            "train.steps=200."
        )
    *parents, name = key.split(".")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise RecipeError(
                f"override {shortened(override)}: {shortened(parent)} is a value, not a section."
            )
    try:
        section[name] = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(
            f"override {shortened(override)}: the value is not valid YAML ({error})."
        ) from None


def _explain(error: ErrorDetails) -> str:
    """What is wrong with a recipe, in terms of its keys."""
    key = ".".join(str(part) for part in error["loc"])[:_LONGEST_KEY]
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key} = {shortened(error['input'])}: {message}" if key else message
    if error["type"] != "extra_forbidden":
        return f"{key} = {shortened(error['input'])}: {error['msg'].lower()}"
    keys = [*Recipe.model_fields, *(f"model.lora.{name}" for name in Lora.model_fields)]
    for section, settings in (("model", Model), ("data", Data), ("loss", Loss), ("train", Train)):
        keys += [f"{section}.{name}" for name in settings.model_fields]
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0)
    return f"unknown key {key}; did you mean {nearest[0]}?"
