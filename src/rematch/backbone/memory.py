"""Forward passes that fit into a device's memory: how large they are at first, and when they were
too large.
"""

import torch


def default_batch_tokens(device: torch.device) -> int:
    """Tokens of a forward pass, padding included: on a CPU as many as its cache holds well."""
    return 2048 if device.type == "cpu" else 16_384


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")  # of the CPU, MPS, cuBLAS
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
