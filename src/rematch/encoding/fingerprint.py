"""Digests that tell models apart by what their vectors depend on.

There are two of them:

- :func:`model_fingerprint` is equal for models whose vectors can be compared with each other.
- :func:`describe_model` lists all that vectors depend on to the last bit, such as the device, the
  dtype, the attention kernel, the versions of libraries and this package's code.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedConfig, PreTrainedModel
from xxhash import xxh3_128

FINGERPRINT_FORMAT = "2:"  # begins every fingerprint; those before it ignored the configuration
# modules that turn an input into a vector; an edit of any other one leaves stored vectors valid
VECTOR_MODULES = (
    "prompts tokens model backbone/module backbone/loading backbone/reading backbone/turns "
    "backbone/pictures backbone/key_values backbone/lora data/images data/inputs data/clips "
    "data/pages encoding/encoder encoding/inputs"
).split()
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "pillow")
_IRRELEVANT = frozenset(
    "_name_or_path architectures auto_map dtype torch_dtype transformers_version id2label "
    "label2id problem_type use_cache return_dict output_attentions output_hidden_states "
    "initializer_range initializer_factor".split()
)  # settings of a configuration that vectors do not depend on


def describe_model(model: SentenceTransformer) -> dict[str, Any]:
    """All that a model's vectors depend on to the last bit, as digests and settings."""
    return _settings(model) | {
        "weights": _weights(model),
        "modules": str(model),
        "truncate_dim": model.truncate_dim,
        "attention": {name: config._attn_implementation for name, config in _configs(model)},
        "device": model.device.type,
        "code": code_digest(_PACKAGE),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def model_fingerprint(model: SentenceTransformer) -> str:
    """A digest that two models share if their vectors can be compared.

    It covers the weights, the configuration, the chat template, the tokenizer, the settings for
    pictures and the prompts. Weights are rounded to bfloat16, so that the precision that they were
    loaded in does not matter.
    """
    content = _settings(model) | {"weights": _weights(model, torch.bfloat16)}
    return FINGERPRINT_FORMAT + digest_of(json.dumps(content, sort_keys=True, default=str))


def code_digest(package: Path) -> str:
    """Digest of those modules of this package that turn inputs into vectors.

    Args:
        package: The package's directory.
    """
    digest = xxh3_128()
    for module in VECTOR_MODULES:
        digest.update((package / f"{module}.py").read_bytes())
    return digest.hexdigest()


def digest_of(text: str) -> str:
    """Digest of a text, 32 hexadecimal digits."""
    return xxh3_128(text.encode()).hexdigest()


def _settings(model: SentenceTransformer) -> dict[str, Any]:
    processor = getattr(model[0], "processor", None) or model.tokenizer
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "template": digest_of(str(getattr(processor, "chat_template", None))),
        "tokenizer": digest_of(_vocabulary(backend) if backend is not None else repr(tokenizer)),
        "pictures": str(getattr(processor, "image_processor", None)),
        "max_seq_length": model.max_seq_length,
        "prompts": model.prompts,
        "configuration": {name: _configuration(config) for name, config in _configs(model)},
    }


def _configs(model: SentenceTransformer) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Name and configuration of each Transformers model, and of each part of a configuration."""

    def nested(name: str, config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
        yield name, config
        for key, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                yield from nested(f"{name}.{key}", value)

    visited: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not name.startswith(visited):
            visited += (name + ".",)
            yield from nested(name, module.config)


def _configuration(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings that differ from their defaults.

    So a setting that a later version of Transformers adds does not change the fingerprint.
    """
    values = config.to_dict()
    try:
        defaults = type(config)().to_dict()
    except Exception:  # some classes require arguments; then all their settings count
        defaults = {}
    nested = {key for key, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    changed = {k for k, v in values.items() if k not in defaults or defaults[k] != v}
    relevant = changed - nested - _IRRELEVANT
    return {"model_type": config.model_type} | {key: values[key] for key in relevant}


def _weights(model: SentenceTransformer, dtype: torch.dtype | None = None) -> str:
    digest = xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        value = value.to(dtype) if dtype and value.is_floating_point() else value
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """A fast tokenizer as JSON, without the padding and truncation settings of its last call."""
    content = json.loads(tokenizer.to_str())
    return json.dumps(
        {k: v for k, v in content.items() if k not in ("padding", "truncation")}, sort_keys=True
    )
