"""The fingerprint of a base, by which an adapter recognises the weights it was trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_VALUES = 64  # values of each weight that are digested


def base_fingerprint(
    model: PreTrainedModel, name_or_path: str, cache_dir: str | None = None
) -> str:
    """Return the fingerprint of a base that was just loaded.

    It is the digest of its safetensors files; if there are none, of its weights in memory.

    Args:
        model: The loaded base, before an adapter or new tokens are added.
        name_or_path: The hub name or directory that it was loaded from.
        cache_dir: Cache of the hub; by default transformers' own.
    """
    revision = getattr(model.config, "_commit_hash", None)
    digest = digest_files(name_or_path, cache_dir=cache_dir, revision=revision)
    return digest or digest_weights(model)


def digest_files(name_or_path: str, **hub: Any) -> str | None:
    """Digest the safetensors files of a base: names, shapes and some values of the weights.

    The dtype or quantization that a base is loaded in makes no difference: up to 64 values of each
    stored weight are digested, rounded to bfloat16.

    Args:
        name_or_path: A directory, or a hub name whose files have been downloaded.
        hub: Further arguments of transformers' ``cached_file``, such as ``cache_dir`` and
            ``revision``.

    Returns:
        16 hex digits; ``None`` if there are no safetensors files.
    """

    def local_path(file: str) -> Path:
        return Path(cached_file(name_or_path, file, local_files_only=True, **hub))

    try:
        paths = [local_path(SAFE_WEIGHTS_NAME)]
    except OSError:
        try:
            index = json.loads(local_path(SAFE_WEIGHTS_INDEX_NAME).read_text())
        except OSError:
            return None
        paths = [local_path(name) for name in set(index["weight_map"].values())]
    digests = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                weight = file.get_slice(name)
                shape = weight.get_shape()
                first_values = (0,) * (len(shape) - 1) + (slice(0, _VALUES),)
                values = weight[first_values] if shape else file.get_tensor(name)
                digests[name] = f"{shape}{values.bfloat16().tolist()}"
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def digest_weights(model: PreTrainedModel) -> str:
    """Digest the weights of a model in memory: names, shapes and up to 64 values of each.

    The input embedding and the LM head are left out, because learnable tokens may have been added
    to them. The floating-point dtype makes no difference, but quantization does.

    Returns:
        12 hex digits.
    """
    digest = hashlib.sha256()
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(p) for module in vocabulary if module is not None for p in module.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) not in left_out:
            values = weight.detach().flatten()[:_VALUES].bfloat16().view(torch.int16)
            digest.update(f"{name}{tuple(weight.shape)}".encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
