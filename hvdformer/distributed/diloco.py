"""Fusion by DiLoCo (arXiv 2311.08105, algorithm 1): the ranks train apart, then an outer optimizer follows their mean.

For `every` steps each rank runs AdamW by itself from the same weights w. Then the mean of what they moved by,
d = w - mean of the ranks' weights, is taken as a gradient by SGD with Nesterov momentum, and all go on from its result:

    m <- momentum m + d        w <- w - outer_learning_rate (d + momentum m)

Sent per rank: 6 (n-1)/n of the weights' bytes every `every` steps, a third of it the weights and the rest AdamW's
moments, which are averaged as in local_sgd.py (in the paper each rank keeps its own) so that the state of a fused model
is one, whatever the world size. With outer_learning_rate 1 and momentum 0 it is local_sgd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed.buckets import Bucket
from hvdformer.distributed.fusion import MakeOptimizer, Share
from hvdformer.distributed.local_sgd import LocalSGDFusion

MOMENTUM = "outer_momentum"


class DiLoCoFusion(LocalSGDFusion):
    """Keeps the weights of the last fusion, and the outer momentum, beside AdamW's state."""

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        super().__init__(settings, buckets, make_optimizer, share)
        assert settings.outer_learning_rate is not None and settings.outer_momentum is not None  # resolved
        self._rate, self._momentum = settings.outer_learning_rate, settings.outer_momentum
        self._start = [bucket.flat.detach().clone() for bucket in buckets]
        self._momenta = [torch.zeros_like(start) for start in self._start]

    @torch.no_grad()
    def fuse(self) -> None:
        """Average, then take the outer step from where the ranks started together."""
        super().fuse()
        for bucket, start, m in zip(self.buckets, self._start, self._momenta, strict=True):
            d = start - bucket.flat
            m.mul_(self._momentum).add_(d)
            start.sub_(d.add_(m, alpha=self._momentum), alpha=self._rate)
            bucket.flat.copy_(start)

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        state = super().state_of(number)
        return {**state, MOMENTUM: self._momenta[number]} if state else state

    def state_is_loaded(self) -> None:
        """A checkpoint is of a fused model: its weights are where the ranks start together."""
        for bucket, start in zip(self.buckets, self._start, strict=True):
            start.copy_(bucket.flat.detach())

    def _extra(self) -> list[torch.Tensor]:
        return [*self._start, *self._momenta]
