"""What a backbone must have to embed and to answer matching questions, checked when it is loaded.

Every check raises a :class:`~rematch.errors.ModelError` that names the backbone, the reason and
the remedy.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from rematch.backbone.reading import Reader
from rematch.errors import ModelError, shortened
from rematch.prompts import NO, YES

_SIZES = frozenset(
    {
        "num_hidden_layers",
        "depth",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_attention_heads",
        "embed_dim",
    }
)
_MOST_LAYERS = 1_000
_LARGEST_SIZE = 10_000_000  # of a vocabulary; widths and positions are smaller


def check_size(config: PreTrainedConfig) -> None:
    """Check that the sizes in a config are those of a model, before one of them is built."""
    parts = [config, config.get_text_config(), getattr(config, "vision_config", None)]
    for part in parts:
        for name, value in vars(part).items() if part is not None else ():
            largest = _MOST_LAYERS if "layers" in name or name == "depth" else _LARGEST_SIZE
            if name in _SIZES and isinstance(value, int) and not 0 < value <= largest:
                raise ModelError(
                    f"config.json: {name} = {shortened(value)} is not a size of a model. Download "
                    "it again."
                )


def check_weights(model: nn.Module, name: str) -> None:
    """Check that all weights are finite numbers."""
    for weight_name, weight in model.named_parameters():
        # weights in 4 or 8 bits have no NaN of their own
        if weight.is_meta or not weight.numel() or weight.dtype.itemsize < 2:
            continue
        if not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise ModelError(
                f"{name}: the weight {weight_name} has values that are not finite numbers, so "
                "every vector would be NaN. Download or train the model again."
            )


def check_processor(processor: Any, name: str) -> None:
    """Check that a processor reads pictures and has a chat template."""
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{name}: its processor was loaded as {type(processor).__name__}, which reads no "
            "pictures. Either the model is text-only, or its image processor needs a package that "
            "is missing (often torchvision)."
        )
    if not getattr(processor, "chat_template", None):
        raise ModelError(
            f"{name}: has no chat template, but queries, documents and matching questions are "
            "written as chat turns. Use the instruction-tuned variant of the model, or set "
            "processor.chat_template and save it."
        )


def check_attention(model: PreTrainedModel, name: str) -> None:
    """Check that a model takes a 4-D attention mask and precomputed picture features."""
    config = model.config.get_text_config()
    parameters = signature(model.base_model.forward).parameters
    layer_types = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if "token_type_ids" in parameters or getattr(config, "use_bidirectional_attention", None):
        reason = (
            "lets the tokens of a picture see those behind them, which matching's causal mask "
            "does not allow"
        )
    elif layer_types:
        reason = (
            f"has layers of type {', '.join(sorted(layer_types))}, which ignore matching's 4-D "
            "attention mask"
        )
    elif "mm_encoder_outputs" not in parameters:
        reason = "does not take precomputed picture features (mm_encoder_outputs)"
    else:
        return
    raise ModelError(
        f"{name}: {type(model).__name__} {reason}. Use a model of another family, such as "
        "Qwen2-VL, Qwen3-VL, LLaVA-OneVision, SmolVLM or InternVL."
    )


def answer_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of Yes and No, after checking that each word is a single token."""
    token_ids = []
    for word in (YES, NO):
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ModelError(
                f"the tokenizer splits {word!r} into {len(ids)} tokens, but matching needs {YES} "
                f"and {NO} to be one token each. Use another backbone."
            )
        token_ids.append(int(ids[0]))
    return token_ids


def check_reading(
    reader: Reader, encode: Callable[[Any, str], dict[str, Tensor]], name: str
) -> None:
    """Check that training reads the same tokens and pictures as ``encode`` does.

    It is tried with a text, a picture, and both.

    Args:
        reader: Reader of the backbone, which training uses.
        encode: Returns the features of an input for a task, as ``encode`` computes them.
        name: Name of the backbone, for the error.
    """
    picture = Image.new("RGB", (64, 64), "white")
    both = {"text": "word", "image": picture}
    inputs = [("query", "word"), ("document", "word"), ("document", picture), ("document", both)]
    for task, value in inputs:
        reading, features = reader.read(value), encode(value, task)
        trained, encoded = (
            reader.with_learnable_tokens(reading, task).ids,
            features["input_ids"][0],
        )
        shapes = {key: tuple(pixels.shape) for key, pixels in reading.vision.items()}
        encoded_shapes = {key: tuple(features[key].shape) for key in shapes if key in features}
        if trained.tolist() != encoded.tolist() or shapes != encoded_shapes:
            sizes = f" ({shapes} against {encoded_shapes})" if shapes != encoded_shapes else ""
            raise ModelError(
                f"{name}: training would read a {task} as {reader.decode(trained)!r}, but encode "
                f"reads {reader.decode(encoded)!r}{sizes}. Its chat template, tokenizer or "
                "processing_kwargs depend on how they are called. Use a template that writes the "
                "same around every input, or another backbone."
            )
