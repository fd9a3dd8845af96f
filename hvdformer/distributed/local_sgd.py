"""Fusion by averaging weights: the ranks train apart for `every` steps, then become their mean (arXiv 1805.09767).

A rank's gradient is the mean over its own targets, and so is clipped by its own norm. Every `every` steps each rank
sends its weights and AdamW's two moments through an allreduce: 6 (n-1)/n of the weights' bytes, so 3/`every` of what
allreduce sends. The moments are averaged too (as one of the strategies of arXiv 1910.00643), so that after a fusion
the ranks hold one state: whatever is evaluated or saved is that of all of them, and any world size can go on with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Bucket
from hvdformer.distributed.fusion import Fusion, MakeOptimizer, Share


class LocalSGDFusion(Fusion):
    """Ranks count by their share of the micro-batches, where those don't divide evenly."""

    averages_locally = True

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        super().__init__(settings, buckets, make_optimizer, share)
        assert settings.every is not None  # resolved
        self.every = settings.every
        self._weight = share.micro_batches / share.num_micro_batches
        self._scale, self._own_norm, self._largest_norm = 1.0, 0.0, -1  # of this step, set by reduce()

    def reduce(self, scale: float) -> bool:
        """Nothing is reduced: the gradient stays this rank's own. Begins to exchange the norms, along with the step's sums."""
        import horovod.torch as hvd

        self._scale, self._own_norm = scale, self._rounded_norm()
        norm = scale * self._own_norm if math.isfinite(self._own_norm) else math.inf
        self._largest_norm = hvd.allreduce_async(
            torch.tensor([norm], dtype=torch.float64), name="norm", op=hvd.Max
        )
        return True

    def clip(self, max_norm: float, scale: float) -> float:
        """Clip by this rank's norm; returns the largest norm of any rank."""
        self._limit(self._own_norm, max_norm, scale * self._scale)
        return scale * float(comm.result(self._largest_norm))

    @torch.no_grad()
    def fuse(self) -> None:
        """Every rank's weights and moments become the mean over all ranks."""
        self._average([bucket.flat.detach() for bucket in self.buckets], "weights")
        states = [self.optimizer.state[bucket.flat] for bucket in self.buckets]
        if not all(states):
            return  # every step up to now was skipped, on all ranks alike
        for key in ("exp_avg", "exp_avg_sq"):
            self._average([state[key] for state in states], key)

    def _average(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        import horovod.torch as hvd

        if self.share.size == 1:
            return
        handles = []
        for number, tensor in enumerate(tensors):
            tensor.mul_(self._weight)
            handles.append(hvd.allreduce_async_(tensor, name=f"fuse {name} {number}", op=hvd.Sum))
            self._count_allreduce(tensor.nbytes)
        for handle in handles:
            comm.result(handle)
