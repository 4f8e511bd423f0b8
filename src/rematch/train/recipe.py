"""Recipes: validated YAML with ``key=value`` overrides; an unknown key is an error that names the
nearest.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rematch.errors import RecipeError
from rematch.matching import Matching, View


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, validate_default=True)


class Lora(_Section):
    """LoRA adapter; leave ``model.lora`` out (null) for full fine-tuning."""

    r: int = Field(32, gt=0, description="rank")
    alpha: int = Field(64, gt=0, description="scale")
    dropout: float = Field(0.0, ge=0, lt=1)
    vision: bool = Field(False, description="let the adapter reach the vision tower")


class Model(_Section):
    """What is trained."""

    backbone: str = Field("rematch-base", description="hub name, directory, or a packaged model")
    num_tokens: int = Field(16, ge=0, description="K learnable tokens; 0 pools the last token")
    lora: Lora | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = Field(
        None,
        description="of the weights: by default the checkpoint's under an adapter, float32 without",
    )
    attention: str | None = Field(
        "auto",
        description="sdpa, eager, flex_attention; null: the backbone's choice; auto: that too, but eager where a CPU "
        "trains in bfloat16",
    )
    four_bit: bool = Field(
        False, description="QLoRA: the frozen weights in 4 bits (needs bitsandbytes)"
    )
    compile: bool = Field(False, description="torch.compile for the language model's layers")
    liger: bool = Field(False, description="Liger's fused kernels (needs liger-kernel and a GPU)")
    min_pixels: int | None = Field(
        None, gt=0, description="smaller pictures are enlarged; null: the backbone's limit"
    )
    max_pixels: int | None = Field(
        None, gt=0, description="larger ones are scaled down; null: the backbone's limit"
    )
    train_vision: bool = Field(False, description="full fine-tuning: train the vision tower too")


class Source(_Section):
    """One of several data sets."""

    path: str = Field(
        description="picto, a .jsonl/.parquet file, a directory in MMEB-train form, or one config in it"
    )
    weight: float | None = Field(
        None, gt=0, description="how often it is drawn; by default its number of samples"
    )
    samples: int | None = Field(
        None, gt=0, description="use only so many samples, drawn by train.seed"
    )
    split: str = Field(
        "original",
        description="of a directory in MMEB-train form: original or diverse_instruction",
    )
    temperature: float | None = Field(
        None, gt=0, description="τ for its queries instead of loss.temperature"
    )


class Data(_Section):
    """What it is trained on."""

    source: str | list[Source] = Field(
        "picto", description="one data set, as in Source.path, or a list of sources"
    )
    samples: int | None = Field(
        None, gt=0, description="use only so many samples (of each source)"
    )
    homogeneous: bool = Field(
        False, description="every batch from one source (each config of a directory is one)"
    )
    hard_negatives: bool = Field(True, description="use the explicit hard negatives")
    validation: int = Field(
        0, ge=0, description="samples of each source kept out and scored at every checkpoint"
    )
    unreadable: Literal["error", "skip"] = Field(
        "error",
        description="a picture that cannot be read stops the run, or another sample takes the sample's place",
    )
    too_long: Literal["error", "skip"] = Field(
        "error", description="likewise an input longer than the model takes"
    )
    document_instructions: bool = Field(
        True, description="put the target-side instruction before documents"
    )


class Loss(_Section):
    """The weights of the three losses (the paper's values)."""

    temperature: float = Field(0.02, gt=0)
    w_orth: float = Field(0.5, ge=0, description="0 switches orthogonality off")
    w_qdm: float = Field(0.1, ge=0, description="0 switches matching off")
    matching: Matching = Field(
        Matching.UNIFIED,
        description="read raw inputs anew; ask about vectors only; read what embedding computed",
    )
    gradient_cache: bool = Field(
        False, description="memory of one mini-batch, whatever the batch; one more forward"
    )
    learn_temperature: bool = Field(False, description="train the temperature, from its value on")
    mask_duplicates: bool = Field(
        False, description="a document identical to the positive is no negative"
    )
    symmetric: bool = Field(False, description="contrast positives with queries too")
    hardness: float = Field(
        0.0, ge=0, description="a negative counts exp(hardness x cosine) times"
    )
    matryoshka: list[int] = Field([], description="further widths at which vectors shall work")
    views: list[View] = Field(list(View), min_length=1)


class Train(_Section):
    """How long and how fast."""

    output: str = Field("rematch-model", description="directory of the trained model and its log")
    steps: int = Field(1600, gt=0)
    batch_size: int = Field(
        32, gt=1, description="samples per step; the others' documents are negatives"
    )
    mini_batch_tokens: int = Field(
        16_384, gt=0, description="tokens per forward pass, pictures and padding included"
    )
    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    bf16: bool | Literal["auto"] = Field(
        "auto", description="bfloat16 autocast; auto: where the CPU or GPU computes it natively"
    )
    seed: int = 0
    log_every: int = Field(20, gt=0)
    gradient_checkpointing: bool = Field(
        False, description="keep no activations inside layers, compute them again"
    )
    save_every: int = Field(
        0,
        ge=0,
        description="steps between checkpoints; a run that was cut off goes on from the last",
    )
    features_gb: float = Field(
        4.0,
        ge=0,
        description="memory for a frozen tower's features; beyond it they are computed in every pass",
    )
    report_to: list[str] = Field(
        [], description="trackers; by default TensorBoard if it is installed"
    )
    workers: int = Field(1, ge=0, description="processes that read and tokenize ahead")


class Recipe(_Section):
    """One training run."""

    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    train: Train = Train()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.data.validation and not self.train.save_every:
            raise ValueError("data.validation is scored at checkpoints; set train.save_every too")
        if self.loss.w_qdm and "flash" in (self.model.attention or ""):
            raise ValueError(
                f"model.attention={self.model.attention} takes no 4-D masks, which matching "
                "needs; leave it out, or train without matching (loss.w_qdm=0)"
            )
        if self.loss.matching == Matching.REUSE and self.train.gradient_checkpointing:
            raise ValueError(
                "loss.matching=reuse reads keys and values that train.gradient_checkpointing "
                "throws away; switch one of them off (loss.gradient_cache with fewer "
                "train.mini_batch_tokens saves memory too)"
            )
        own = isinstance(self.data.source, list) and any(
            source.temperature for source in self.data.source
        )
        if own and self.loss.learn_temperature:
            raise ValueError(
                "a source has a temperature of its own; with loss.learn_temperature there is only "
                "one"
            )
        if (self.model.min_pixels or 0) > (self.model.max_pixels or float("inf")):
            raise ValueError(
                f"model.min_pixels={self.model.min_pixels} is more than model.max_pixels"
            )
        if self.model.four_bit and self.model.lora is None:
            raise ValueError("model.four_bit leaves nothing to train without model.lora")
        return self


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file.
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        RecipeError: If the file is missing or no YAML, a key is unknown (the message names the
            nearest), or a value has the wrong type.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(
            f"{path}: no such recipe. Those that ship with the project lie in recipes/."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections, this is a {type(raw).__name__}."
        )
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise RecipeError(
                f"override {override!r}: write it as section.key=value, such as train.steps=200."
            )
        *parents, leaf = key.split(".")
        place: Any = raw
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise RecipeError(f"override {override!r}: {parent} is a value, not a section.")
        try:
            place[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"override {override!r}: its value is not valid YAML.") from None
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] != "extra_forbidden":
        return f"{where} = {error['input']!r}: {error['msg'].lower()}"
    known = [
        f"{name}.{key}"
        for name, f in Recipe.model_fields.items()
        for key in f.annotation.model_fields
    ]  # type: ignore[union-attr]
    known += list(Recipe.model_fields) + [f"model.lora.{key}" for key in Lora.model_fields]
    nearest = difflib.get_close_matches(where, known, n=1, cutoff=0) or ["?"]
    return f"unknown key {where}; did you mean {nearest[0]}?"
