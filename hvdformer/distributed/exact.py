"""Fusion in fixed point: the bits of the result do not depend on how many ranks there are.

Floating-point sums depend on their order and grouping, and those depend on the world size. Here each micro-batch's
gradient becomes integers before anything is added (compare Demmel and Nguyen, "Fast Reproducible Floating-Point
Summation", 2013): with a power of two 2^s for each bucket, q = round(g 2^s), and sums of integers are the same in any
order. They travel as int32 through an allreduce: as many bytes as fp32, 2 (n-1)/n of them a rank and step. With more
than 64 micro-batches a step int32 would leave too few bits, and int64 is sent.

s follows the largest gradient seen in the bucket in the step before, with room for one 8 times as large. A gradient
beyond that is noticed, not wrapped: each rank takes the largest |g| of each of its micro-batches, the maximum over
ranks is as independent of the world size as the sum, and if it does not fit, all ranks compute the step again with
the s that fits. So does the first step. With M micro-batches a bucket's largest gradient keeps 28 - log2(M) bits:
at 8 micro-batches 25, one more than fp32 has, and smaller ones lose a bit with each halving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Bucket, Watch
from hvdformer.distributed.fusion import CHUNK, Fusion, MakeOptimizer, Share

_ROOM = 3  # bits between the largest gradient of one step and the largest that the next may have
_MAX_SCALE = 100  # of s: 2^s and 2^-s have to be fp32 numbers
_NOT_FINITE = 1000  # stands for the exponent of infinities and NaN


class ExactFusion(Fusion):
    """Integer sums of the gradients, bucket by bucket while backward runs."""

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        super().__init__(settings, buckets, make_optimizer, share)
        spare = math.ceil(math.log2(share.num_micro_batches))
        dtype = torch.int32 if share.num_micro_batches <= 64 else torch.int64
        # |q| < 2^bits for each micro-batch, so that the sum over all of them cannot overflow.
        self._bits = (31 if dtype == torch.int32 else 63) - spare
        self._sums = [torch.zeros(b.flat.shape, dtype=dtype, device=b.flat.device) for b in buckets]
        self._scales: list[int] | None = None  # s of each bucket; not known before the first step
        device = buckets[0].flat.device
        self._largest = torch.zeros(
            len(buckets), device=device
        )  # |g| of this rank's micro-batches in this step
        self._passes = [0] * len(buckets)
        self._handles: dict[int, int] = {}
        self._buffers = torch.empty(CHUNK, device=device), torch.empty(CHUNK, dtype=dtype, device=device)
        self._is_finite = True
        self._watch = Watch(buckets, 1, self._add)

    @torch.no_grad()
    def _add(self, number: int) -> None:
        """Backward has put a micro-batch's gradient into a bucket: add it to the sums and clear it."""
        gradient, sums = self.buckets[number].gradient, self._sums[number]
        factor = 2.0 ** (self._scales[number] if self._scales else 0)
        is_first = self._passes[number] == 0
        scaled, rounded = self._buffers
        extremes: list[torch.Tensor] = []
        for part, total in zip(gradient.split(CHUNK), sums.split(CHUNK), strict=True):
            extremes += torch.aminmax(part)  # NaN if there is one
            if self._scales:
                q = torch.mul(part, factor, out=scaled[: len(part)]).round_()
                if is_first:
                    total.copy_(q)
                else:
                    total.add_(rounded[: len(part)].copy_(q))
            part.zero_()
        self._largest[number] = torch.maximum(self._largest[number], torch.stack(extremes).abs().max())
        self._passes[number] += 1
        if self._passes[number] == self.share.micro_batches and self._scales and self.share.size > 1:
            self._start(number)

    def _start(self, number: int) -> None:
        import horovod.torch as hvd

        self._handles[number] = hvd.allreduce_async_(
            self._sums[number], name=f"exact bucket {number}", op=hvd.Sum
        )
        self._count_allreduce(self._sums[number].nbytes)

    @torch.no_grad()
    def reduce(self, scale: float) -> bool:
        """Bring the integer sums over all ranks into the gradients; False if s did not fit them, and now does."""
        for number in range(len(self.buckets)):  # a bucket that no backward reached
            if self._passes[number] == 0:
                self._sums[number].zero_()
                if self._scales and self.share.size > 1:
                    self._start(number)
        exponents = self._largest_exponents()
        self._wait()
        self._largest.zero_()
        self._passes = [0] * len(self.buckets)
        self._is_finite = max(exponents) < _NOT_FINITE
        if not self._is_finite:
            return True  # the norm says so
        used, next_scales = self._scales, [min(self._bits - _ROOM - e, _MAX_SCALE) for e in exponents]
        self._scales = next_scales
        if used is None or any(e + s > self._bits for e, s in zip(exponents, used, strict=True)):
            return False
        for bucket, sums, s in zip(self.buckets, self._sums, used, strict=True):
            for part, total in zip(bucket.gradient.split(CHUNK), sums.split(CHUNK), strict=True):
                part.copy_(total).mul_(2.0**-s)
        return True

    def _largest_exponents(self) -> list[int]:
        """For each bucket the least e with |g| < 2^e for every g of every micro-batch of every rank."""
        import horovod.torch as hvd

        own = [
            (math.frexp(value)[1] if math.isfinite(value) else _NOT_FINITE)
            for value in self._largest.tolist()
        ]
        if self.share.size == 1:
            return own
        exponents = torch.tensor(own, dtype=torch.int32)
        return comm.result(hvd.allreduce_async(exponents, name="exact exponents", op=hvd.Max)).tolist()

    def _wait(self) -> None:
        for number in list(self._handles):
            comm.result(self._handles.pop(number))

    def _norm(self) -> float:
        return super()._norm() if self._is_finite else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The scales, which decide how the next step rounds."""
        names = [bucket.names[0] for bucket in self.buckets]
        return {"exact_scales": dict(zip(names, self._scales, strict=True)) if self._scales else None}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over the scales if they are those of these buckets; else the first step finds them."""
        scales = values.get("exact_scales")
        names = [bucket.names[0] for bucket in self.buckets]
        if isinstance(scales, dict) and list(scales) == names:
            self._scales = [int(scales[name]) for name in names]

    def _extra(self) -> list[torch.Tensor]:
        return self._sums
