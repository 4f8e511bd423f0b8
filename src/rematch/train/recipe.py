"""Recipes: validated YAML with ``key=value`` overrides; an unknown key is an error that names the nearest."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rematch.errors import RecipeError

View = Literal["raw-raw", "raw-feat", "feat-raw", "feat-feat"]


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
    train_vision: bool = Field(False, description="full fine-tuning: train the vision tower too")


class Data(_Section):
    """What it is trained on."""

    source: str = Field("picto", description="picto, a .jsonl/.parquet file, or a directory in MMEB-train form")
    samples: int | None = Field(None, gt=0, description="use only so many samples")
    hard_negatives: bool = Field(True, description="use the explicit hard negatives")
    document_instructions: bool = Field(True, description="put the target-side instruction before documents")


class Loss(_Section):
    """The weights of the three losses (the paper's values)."""

    temperature: float = Field(0.02, gt=0)
    w_orth: float = Field(0.5, ge=0, description="0 switches orthogonality off")
    w_qdm: float = Field(0.1, ge=0, description="0 switches matching off")
    views: list[View] = Field(["raw-raw", "raw-feat", "feat-raw", "feat-feat"], min_length=1)


class Train(_Section):
    """How long and how fast."""

    output: str = Field("rematch-model", description="directory of the trained model and its log")
    steps: int = Field(1600, gt=0)
    batch_size: int = Field(32, gt=1, description="samples per step; the others' documents are negatives")
    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    bf16: bool = Field(False, description="bfloat16 autocast")
    seed: int = 0
    log_every: int = Field(20, gt=0)
    workers: int = Field(1, ge=0, description="processes that read and tokenize ahead")


class Recipe(_Section):
    """One training run."""

    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    train: Train = Train()


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file.
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        RecipeError: If the file is missing or no YAML, a key is unknown (the message names the nearest), or a value has
            the wrong type.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"{path}: no such recipe. Those that ship with the project lie in recipes/.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(raw).__name__}.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise RecipeError(f"override {override!r}: write it as section.key=value, such as train.steps=200.")
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
    if error["type"] != "extra_forbidden":
        return f"{where} = {error['input']!r}: {error['msg'].lower()}"
    known = [f"{name}.{key}" for name, f in Recipe.model_fields.items() for key in f.annotation.model_fields]  # type: ignore[union-attr]
    known += list(Recipe.model_fields) + [f"model.lora.{key}" for key in Lora.model_fields]
    nearest = difflib.get_close_matches(where, known, n=1, cutoff=0) or ["?"]
    return f"unknown key {where}; did you mean {nearest[0]}?"
