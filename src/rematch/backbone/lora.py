"""LoRA on a backbone: adding an adapter, loading a saved one, merging it into the weights."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def inject(model: PreTrainedModel, lora: LoraConfig, token_ids: list[int], vision: bool) -> None:
    """Add an adapter to the linear layers of the language model and train the learnable tokens.

    Args:
        model: The backbone with its LM head; changed in place.
        lora: Rank and other settings; ``target_modules`` and ``trainable_token_indices`` are
            filled in unless set.
        token_ids: Token ids of the learnable tokens, whose embedding rows become trainable.
        vision: Whether the vision tower gets the adapter too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if lora.target_modules is None:
        adapted = [model.get_decoder()]
        if vision:
            adapted += [m for m in model.modules() if "Vision" in type(m).__name__]
        layers = {
            layer for part in adapted for layer in part.modules() if isinstance(layer, nn.Linear)
        }
        lora.target_modules = sorted(names[layer] for layer in layers if layer is not head)
    if lora.trainable_token_indices is None and token_ids:
        lora.trainable_token_indices = {names[embedding].rpartition(".")[2]: token_ids}
    model.add_adapter(lora)
    train_in_float32(model)


def train_in_float32(module: nn.Module) -> None:
    """Cast trainable weights to float32: bfloat16 would lose small updates."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def learnable_rows(model: PreTrainedModel) -> nn.ParameterDict | None:
    """The rows of the learnable tokens by adapter, or ``None`` if no adapter trains them."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, TrainableTokensWrapper):
        return None
    rows: nn.ParameterDict = embedding.token_adapter.trainable_tokens_delta
    return rows


def linear_layers(part: nn.Module) -> list[nn.Linear]:
    """The linear layers of a part of the model, without those that an adapter adds."""
    return [
        layer
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name
    ]


def adapters(part: nn.Module) -> list[LoraLayer]:
    """The layers of a part of the model that have an adapter."""
    return [layer for layer in part.modules() if isinstance(layer, LoraLayer)]


def load(model: PreTrainedModel, directory: Path) -> list[str]:
    """Add a saved adapter to its base, frozen and in the precision it was trained in.

    Returns:
        The names of weights that only the file or only the model has. If there are any, the
        adapter's weights are not restored.
    """
    model.load_adapter(str(directory), is_trainable=True)
    mismatched = sorted(set(get_peft_model_state_dict(model)) ^ set(_saved_weights(directory)))
    if not mismatched:
        train_in_float32(model)  # peft had cast the adapter to the base's dtype
        restore(model, directory)
        model.requires_grad_(False)
    return mismatched


def _saved_weights(directory: Path) -> dict[str, Tensor]:
    weights = load_file(directory / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in weights.items()}


def restore(model: PreTrainedModel, directory: Path) -> None:
    """Copy the weights of a saved adapter into the model's adapter."""
    set_peft_model_state_dict(model, _saved_weights(directory))


def merge(model: PreTrainedModel) -> None:
    """Merge the adapter into the weights in place; without an adapter, do nothing.

    4-bit weights are dequantized first.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    four_bit = getattr(model, "is_loaded_in_4bit", False)
    if four_bit:
        _dequantize(model)
    merged_prefixes: list[str] = []  # the layers inside a merged wrapper are gone with it
    for name, layer in list(model.named_modules()):
        if any(name.startswith(prefix) for prefix in merged_prefixes):
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            merged = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        elif isinstance(layer, BaseTunerLayer):
            if four_bit:
                LoraLinear.merge(layer)  # a 4-bit layer's own merge would quantize the sum again
            else:
                layer.merge()
            merged = layer.get_base_layer()
        else:
            continue
        model.set_submodule(name, merged)
        merged_prefixes.append(name + ".")
    model._hf_peft_config_loaded = False
    del model.peft_config
    model._weight_conversions = None  # it would write adapter names into the merged checkpoint
    model.tie_weights()


def _dequantize(model: PreTrainedModel) -> None:
    model.dequantize(model.dtype)
    model.is_loaded_in_4bit = False
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            # bitsandbytes had cast the bias to its compute dtype
            layer.bias.data = layer.bias.data.to(layer.weight.dtype)


def prevent_repacking(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX-512 BF16.

    It would do so in the first evaluation. Repacking rounds the scales for good, and repacked
    weights cannot be dequantized.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
