"""What a recipe describes: the model to train, the loss, and the collator."""

from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers.util import get_device_name
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

from rematch.backbone.loading import is_checkpoint
from rematch.backbone.pixels import limit_pixels
from rematch.errors import ImageError, RecipeError, RematchError, TooLongError
from rematch.matching import Matching, View
from rematch.model import ReMatch
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.precision import Precision, choose_precision, device_type, native_bfloat16
from rematch.train.recipe import Recipe


def build_model(recipe: Recipe) -> ReMatch:
    """Load the model, add what the recipe trains, and freeze the rest.

    ``model.backbone`` is a backbone, which gets new tokens and a new projector, or a ReMatch
    model, which is trained further.

    Raises:
        RecipeError: If a package or device that the recipe needs is missing.
        ModelError: If the backbone cannot be used.
    """
    settings = recipe.model
    if settings.liger and not (torch.cuda.is_available() and find_spec("liger_kernel")):
        raise RecipeError(
            "model.liger needs a CUDA device and liger-kernel (pip install liger-kernel)."
        )
    torch.manual_seed(recipe.train.seed)
    if is_checkpoint(settings.backbone):
        model = _load_trained(recipe)
    else:
        model = ReMatch.from_backbone(
            settings.backbone,
            settings.num_tokens,
            token_init=settings.token_init,
            model_kwargs=_loading_options(recipe),
        )
    if settings.lora:
        lora = LoraConfig(
            r=settings.lora.r, lora_alpha=settings.lora.alpha, lora_dropout=settings.lora.dropout
        )
        model.add_lora(lora, vision=settings.lora.vision)
    model.backbone.document_instructions = recipe.data.document_instructions
    model.backbone.set_matching(recipe.loss.matching, recipe.loss.joint)
    limit_pixels(model.backbone.processor, settings.min_pixels, settings.max_pixels)
    if not settings.lora and not settings.train_vision:
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


def _load_trained(recipe: Recipe) -> ReMatch:
    """The ReMatch model that a recipe trains further.

    Raises:
        RecipeError: If it has an adapter, or another number of tokens than the recipe says.
    """
    name = recipe.model.backbone
    model = ReMatch(name, model_kwargs=_loading_options(recipe))
    if model.backbone.has_adapter:
        raise RecipeError(
            f"model.backbone={name}: has a LoRA adapter, and training goes on from whole models "
            f'only. Merge it: ReMatch("{name}").merge_lora().save_pretrained("merged").'
        )
    if model.fusion.num_tokens != recipe.model.num_tokens:
        raise RecipeError(
            f"model.num_tokens={recipe.model.num_tokens}: {name} was trained with "
            f"{model.fusion.num_tokens} learnable tokens. Give model.num_tokens="
            f"{model.fusion.num_tokens}."
        )
    return model


def _loading_options(recipe: Recipe) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    settings = recipe.model
    precision = precision_of(recipe)
    # bfloat16 would lose small updates of full weights, and is slow where it is emulated
    frozen_dtype = "auto" if settings.lora and precision.bf16 else "float32"
    options: dict[str, Any] = {"dtype": settings.dtype or frozen_dtype}
    if precision.attention:
        options["attn_implementation"] = precision.attention
    if settings.four_bit:
        if not is_bitsandbytes_available():
            raise RecipeError(
                f"model.four_bit needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer (pip "
                "install bitsandbytes)."
            )
        compute_dtype = torch.bfloat16 if native_bfloat16(device_type()) else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
        # by default, all processes would load the weights onto the first GPU
        options["device_map"] = {"": get_device_name()}
    return options


def precision_of(recipe: Recipe) -> Precision:
    """The arithmetic that a recipe means on this machine."""
    return choose_precision(recipe.train.bf16, recipe.model.attention, device_type())


def build_loss(recipe: Recipe, model: ReMatch) -> ReMatchLoss:
    """The loss of a recipe.

    Raises:
        RecipeError: If ``loss.matryoshka`` has a width that the model's vectors do not have.
    """
    width = model.backbone.width
    if too_wide := [size for size in recipe.loss.matryoshka if size > width]:
        raise RecipeError(
            f"loss.matryoshka={too_wide}: the model's vectors have only {width} dimensions. "
            "Give smaller widths."
        )
    options = recipe.loss.model_dump(exclude={"matching", "joint", "views"})
    return ReMatchLoss(
        model, views=_views(recipe), features_gb=recipe.train.features_gb, **options
    )


def build_collator(
    recipe: Recipe, model: ReMatch, collator_type: type[Collator] = Collator
) -> Collator:
    """The collator that makes batches for :func:`build_loss`."""
    skip: list[type[RematchError]] = []
    if recipe.data.unreadable == "skip":
        skip.append(ImageError)
    if recipe.data.too_long == "skip":
        skip.append(TooLongError)
    return collator_type(
        model,
        _views(recipe),
        recipe.train.mini_batch_tokens,
        reuse=recipe.loss.matching == Matching.REUSE,
        skip=tuple(skip),
    )


def _views(recipe: Recipe) -> list[View]:
    """The views that training asks about; none without matching."""
    if not recipe.loss.w_qdm:
        return []
    return [View.FEAT_FEAT] if recipe.loss.matching == Matching.FEAT else recipe.loss.views
