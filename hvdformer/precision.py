"""Number formats of the forward and backward; weights, gradients and optimizer state are fp32 in all of them."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 where the hardware multiplies it natively, fp32 elsewhere.

    A CPU without such instructions emulates bf16: a matrix product took 5 times as long as in fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Private names, and newer than the oldest torch that is supported: where they are missing, so is the answer.
    native = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return "bf16" if any(is_supported and is_supported() for is_supported in native) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for a forward at this precision; with fp32 it changes nothing."""
    return torch.autocast(
        device.type, dtype=DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES
    )
