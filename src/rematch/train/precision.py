"""The arithmetic of a training run: bfloat16 only where the hardware computes it natively.

Emulated bfloat16 is slow: on a CPU with AVX2 alone, a training step takes 19 times as long as in
float32.
"""

import os
import platform
from typing import NamedTuple

import torch

OVERRIDE = "REMATCH_NATIVE_BF16"


class Precision(NamedTuple):
    """The arithmetic of a training run.

    Attributes:
        bf16: Whether to use bfloat16 autocast.
        attention: Attention implementation; ``None`` for the backbone's default.
    """

    bf16: bool
    attention: str | None


def native_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware.

    On CPUs this takes AVX-512 BF16, AMX or ARM's BF16 extension; ``ATEN_CPU_CAPABILITY=avx2``
    counts as a CPU without them. The environment variable ``REMATCH_NATIVE_BF16`` (0 or 1)
    overrides the detection.

    Args:
        device: Device type, such as ``"cpu"`` or ``"cuda"``.
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
        # on other CPUs the operator also reports emulation
        available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return avx512 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_precision(bf16: bool | str, attention: str | None, device: str) -> Precision:
    """Replace ``"auto"`` by what suits the hardware.

    Attention is eager under bfloat16 on a CPU, where that is a quarter faster than sdpa, and the
    backbone's default elsewhere.

    Args:
        bf16: Whether to use bfloat16 autocast, or ``"auto"``.
        attention: Attention implementation, ``"auto"``, or ``None`` for the backbone's default.
        device: Device type.
    """
    use_bf16 = native_bfloat16(device) if bf16 == "auto" else bool(bf16)
    if attention == "auto":
        attention = "eager" if use_bf16 and device == "cpu" else None
    return Precision(use_bf16, attention)


def device_type() -> str:
    """Type of the device that training uses, such as ``"cpu"`` or ``"cuda"``."""
    if not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator.type
