"""LoRA on a backbone: injecting an adapter, folding it into the weights, and knowing the base it belongs to."""

import hashlib

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel


def inject(model: PreTrainedModel, lora: LoraConfig, token_ids: list[int], vision: bool) -> None:
    """Add an adapter to the linear layers of the language model, and make the learnable tokens' rows trainable.

    Args:
        model: The backbone with its LM head.
        lora: Rank and so on; ``target_modules`` and ``trainable_token_indices`` are filled in unless set.
        token_ids: Of the learnable tokens.
        vision: Reach the vision tower too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if lora.target_modules is None:
        reached = [model.get_decoder()]
        if vision:
            reached += [m for m in model.modules() if "Vision" in type(m).__name__]
        layers = {layer for part in reached for layer in part.modules() if isinstance(layer, nn.Linear)}
        lora.target_modules = sorted(names[layer] for layer in layers if layer is not head)
    if lora.trainable_token_indices is None and token_ids:
        lora.trainable_token_indices = {names[embedding].rpartition(".")[2]: token_ids}
    model.add_adapter(lora)
    for parameter in model.parameters():
        if parameter.requires_grad:  # an adapter on a bfloat16 base: its small updates need float32
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def merge(model: PreTrainedModel) -> None:
    """Fold the adapter, if there is one, into the weights in place."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    done: list[str] = []  # a replaced wrapper's own layers need no second look
    for name, layer in list(model.named_modules()):
        if any(name.startswith(prefix) for prefix in done):
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(layer, BaseTunerLayer):
            layer.merge()
            merged = layer.get_base_layer()
        else:
            continue
        model.set_submodule(name, merged)
        done.append(name + ".")
    model._hf_peft_config_loaded = False
    del model.peft_config
    model._weight_conversions = None  # it would write adapter names into the merged checkpoint
    model.tie_weights()


def fingerprint(model: PreTrainedModel) -> str:
    """Twelve hex digits that tell one base from another, whatever dtype it is loaded in: shapes of all weights and the
    values of a few.

    The input embedding is left out: learnable tokens may have been added to it.
    """
    digest = hashlib.sha256()
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(p) for module in vocabulary if module is not None for p in module.parameters()}
    weights = [(name, p) for name, p in model.named_parameters() if id(p) not in left_out]
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    for _, weight in weights[:: max(1, len(weights) // 8)]:
        digest.update(weight.detach().flatten()[:64].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
