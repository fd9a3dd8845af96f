"""Number formats of the forward and backward; weights, gradients and optimizer state are fp32 in all of them."""

from __future__ import annotations

import math
from typing import Any

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


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What x is multiplied in: the dtype of autocast where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class LossScale:
    """What an fp16 loss is multiplied by so that its gradients don't vanish (arXiv 1710.03740, section 3.2).

    Halved after a gradient that is not finite, whose step is left out, and doubled after 2,000 good steps.
    torch.amp.GradScaler asks each rank's own gradients; here the norm decides, which all ranks have agreed on.
    """

    def __init__(self, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self.value = 2.0**16 if is_enabled else 1.0
        self._good_steps = 0

    def accepts(self, norm: float) -> bool:
        """Whether the gradients of this norm may be applied; adapts the scale. Without a scale: always."""
        if not self.is_enabled:
            return True
        is_finite = math.isfinite(norm)
        self._good_steps = self._good_steps + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self._good_steps == 2000:
            self.value, self._good_steps = self.value * 2, 0
        return is_finite or self.value < 1  # so small a scale is not what made them infinite

    def to_dict(self) -> dict[str, Any] | None:
        return {"scale": self.value, "good_steps": self._good_steps} if self.is_enabled else None

    def load_dict(self, values: dict[str, Any] | None) -> None:
        if self.is_enabled and values is not None and {"scale", "good_steps"} <= values.keys():
            self.value, self._good_steps = float(values["scale"]), int(values["good_steps"])
