"""Which arithmetic a training run uses: what the hardware computes natively.

Emulated bfloat16 is slow: on a CPU with AVX2 alone a training step takes 19 times as long as in
float32.
"""

import os
import platform

import torch

OVERRIDE = "REMATCH_NATIVE_BF16"


def native_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware.

    On CPUs these are AVX-512 BF16, AMX and ARM's BF16 extension; ``ATEN_CPU_CAPABILITY=avx2``
    counts as a CPU without them. The environment variable ``REMATCH_NATIVE_BF16`` (0 or 1)
    overrides what is detected.

    Args:
        device: Type of the device, such as ``"cpu"`` or ``"cuda"``.
    """
    if os.environ.get(OVERRIDE):
        return os.environ[OVERRIDE] == "1"
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "xpu":
        return bool(torch.xpu.is_bf16_supported())
    if device != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        # elsewhere the operator also reports emulation
        available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose(bf16: bool | str, attention: str | None, device: str) -> tuple[bool, str | None]:
    """Settle the settings that a recipe leaves to the hardware.

    Args:
        bf16: bfloat16 autocast, or ``"auto"``.
        attention: Attention implementation, ``"auto"``, or ``None`` for the backbone's choice.
        device: Type of the device.

    Returns:
        Whether to use bfloat16 autocast, and the attention implementation. ``"auto"`` chooses
        eager attention under bfloat16 on a CPU, where it is a quarter faster than sdpa, and the
        backbone's choice elsewhere.
    """
    use_bf16 = native_bfloat16(device) if bf16 == "auto" else bool(bf16)
    if attention == "auto":
        attention = "eager" if use_bf16 and device == "cpu" else None
    return use_bf16, attention
