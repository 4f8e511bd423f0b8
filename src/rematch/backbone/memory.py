"""The memory of forward passes: a default size for them, and recognising when it ran out."""

import torch


def default_batch_tokens(device: torch.device) -> int:
    """Return the default batch tokens for a device: 2,048 fit a CPU's cache well."""
    return 2048 if device.type == "cpu" else 16_384


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that memory ran out, on any kind of device."""
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")  # CPU, MPS, cuBLAS
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
