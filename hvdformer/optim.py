"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hvdformer.config import OptimConfig


def build_optimizer(
    matrices: Sequence[torch.nn.Parameter],
    vectors: Sequence[torch.nn.Parameter],
    config: OptimConfig,
    device: torch.device,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused, with weight decay on the matrices only, as GPT-3 and Llama were trained."""
    return torch.optim.AdamW(
        [
            {"params": list(matrices), "weight_decay": config.weight_decay},
            {"params": list(vectors), "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of update number `step` (from 0) of `steps`.

    Linear warm-up to the peak, which update warmup_steps - 1 reaches; then constant, a half cosine down to
    min_learning_rate at the last update (arXiv 1608.03983), or for wsd constant and then linear down to it over
    the last decay_steps (arXiv 2404.06395).
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        begin, length = config.warmup_steps, steps - config.warmup_steps
    else:
        length = config.decay_steps or max(1, min(steps // 5, steps - config.warmup_steps))
        begin = steps - length
    progress = max(0, step + 1 - begin) / length  # 1 at the last update
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (floor - peak) * progress
