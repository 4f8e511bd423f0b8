"""LoRA on a backbone: injecting an adapter, folding it into the weights, and knowing the base it
belongs to.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


def inject(model: PreTrainedModel, lora: LoraConfig, token_ids: list[int], vision: bool) -> None:
    """Add an adapter to the linear layers of the language model, and make the learnable tokens'
    rows trainable.

    Args:
        model: The backbone with its LM head.
        lora: Rank and so on; ``target_modules`` and ``trainable_token_indices`` are filled in
            unless set.
        token_ids: Of the learnable tokens.
        vision: Reach the vision tower too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if lora.target_modules is None:
        reached = [model.get_decoder()]
        if vision:
            reached += [m for m in model.modules() if "Vision" in type(m).__name__]
        layers = {
            layer for part in reached for layer in part.modules() if isinstance(layer, nn.Linear)
        }
        lora.target_modules = sorted(names[layer] for layer in layers if layer is not head)
    if lora.trainable_token_indices is None and token_ids:
        lora.trainable_token_indices = {names[embedding].rpartition(".")[2]: token_ids}
    model.add_adapter(lora)
    _in_float32(model)


def _in_float32(model: PreTrainedModel) -> None:
    """An adapter on a base in bfloat16 or 4 bits: its small updates need float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def load(model: PreTrainedModel, directory: Path) -> list[str]:
    """Add a saved adapter to its base, frozen and in the precision it was trained in.

    Returns:
        The names of weights that only the saved adapter or only the model has; nothing is restored
        if there are any.
    """
    model.load_adapter(str(directory), is_trainable=True)
    lost = sorted(set(get_peft_model_state_dict(model)) ^ set(_saved(directory)))
    if not lost:
        _in_float32(model)  # peft had made it the base's dtype
        restore(model, directory)
        model.requires_grad_(False)
    return lost


def _saved(directory: Path) -> dict[str, torch.Tensor]:
    saved = load_file(directory / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in saved.items()}


def restore(model: PreTrainedModel, directory: Path) -> None:
    """Put the weights of a saved adapter into the model's own adapter."""
    set_peft_model_state_dict(model, _saved(directory))


def merge(model: PreTrainedModel) -> None:
    """Fold the adapter, if there is one, into the weights in place; weights in 4 bits are
    dequantized first.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    if four_bit := getattr(model, "is_loaded_in_4bit", False):
        model.dequantize(model.dtype)
        model.is_loaded_in_4bit = False
        for layer in model.modules():
            if (
                isinstance(layer, nn.Linear) and layer.bias is not None
            ):  # bitsandbytes had made it its compute dtype
                layer.bias.data = layer.bias.data.to(layer.weight.dtype)
    done: list[str] = []  # a replaced wrapper's own layers need no second look
    for name, layer in list(model.named_modules()):
        if any(name.startswith(prefix) for prefix in done):
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            merged = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        elif isinstance(layer, BaseTunerLayer):
            LoraLinear.merge(
                layer
            ) if four_bit else layer.merge()  # that of a 4-bit layer would quantize the sum again
            merged = layer.get_base_layer()
        else:
            continue
        model.set_submodule(name, merged)
        done.append(name + ".")
    model._hf_peft_config_loaded = False
    del model.peft_config
    model._weight_conversions = None  # it would write adapter names into the merged checkpoint
    model.tie_weights()


def keep_scales(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew in the first evaluation on a CPU with
    AVX-512 BF16: that rounds their scales for good, and dequantizing cannot read it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def base_fingerprint(
    model: PreTrainedModel, name_or_path: str, cache_dir: str | None = None
) -> str:
    """That of the files a base was just loaded from; of its weights in memory if the files are not
    safetensors.
    """
    revision = getattr(model.config, "_commit_hash", None)
    return files_fingerprint(name_or_path, cache_dir=cache_dir, revision=revision) or fingerprint(
        model
    )


def files_fingerprint(name_or_path: str, **hub: Any) -> str | None:
    """Sixteen hex digits that tell one base from another, from the safetensors files it was loaded
    from.

    They do not depend on the dtype or quantization it is loaded in: name, shape and up to 64
    values of each stored weight, rounded to bfloat16, are digested.

    Args:
        name_or_path: A directory, or a hub name whose files have been downloaded.
        hub: As for transformers' ``cached_file``, such as ``cache_dir`` and ``revision``.

    Returns:
        None if there are no safetensors files.
    """

    def path_of(file: str) -> Path:
        return Path(cached_file(name_or_path, file, local_files_only=True, **hub))

    try:
        files = [path_of(SAFE_WEIGHTS_NAME)]
    except OSError:
        try:
            names = set(
                json.loads(path_of(SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()
            )
        except OSError:
            return None
        files = [path_of(name) for name in names]
    digests = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                shape = file.get_slice(name).get_shape()
                first_values = (0,) * (len(shape) - 1) + (slice(0, 64),)
                values = file.get_slice(name)[first_values] if shape else file.get_tensor(name)
                digests[name] = f"{shape}{values.bfloat16().tolist()}"
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: PreTrainedModel) -> str:
    """Twelve hex digits that tell the weights of one model from another's, whatever dtype they
    have: shapes of all weights and the values of a few.

    The input embedding is left out: learnable tokens may have been added to it.
    """
    digest = hashlib.sha256()
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(p) for module in vocabulary if module is not None for p in module.parameters()}
    weights = [(name, p) for name, p in model.named_parameters() if id(p) not in left_out]
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    for _, weight in weights[:: max(1, len(weights) // 8)]:
        digest.update(
            weight.detach().flatten()[:64].bfloat16().view(torch.int16).cpu().numpy().tobytes()
        )
    return digest.hexdigest()[:12]
