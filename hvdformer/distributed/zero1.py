"""Fusion with the optimizer's state shared out over the ranks: ZeRO stage 1 (arXiv 1910.02054, section 5.1).

Every bucket is cut into n equal slices, and rank r updates slice r. A reducescatter, started as soon as backward has
filled the bucket, brings rank r the sum of slice r over all ranks; the ranks agree on the global norm; each updates
its slices with their part of AdamW's moments; an allgather brings the new weights to all. Each rank sends 2 (n-1)/n of
the gradients' bytes a step, as with allreduce, and keeps 1/n of the moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Bucket, Watch
from hvdformer.distributed.fusion import Fusion, MakeOptimizer, Share


class Zero1Fusion(Fusion):
    """The optimizer's parameters are this rank's slices of the buckets."""

    is_replicated = False

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        """buckets: padded to a multiple of the world size."""
        self._slices = [
            torch.nn.Parameter(_slice(bucket.flat.detach(), share.rank, share.size)) for bucket in buckets
        ]
        super().__init__(settings, buckets, make_optimizer, share)
        self._handles: dict[int, int] = {}
        self._whole: dict[int, dict[str, torch.Tensor]] = {}  # state of buckets, while it is saved or loaded
        if share.size > 1:
            self._watch = Watch(buckets, share.micro_batches, self._start)

    def _parameters(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        pairs = list(zip(self.buckets, self._slices, strict=True))
        matrices, vectors = (
            [p for bucket, p in pairs if bucket.decays == decays] for decays in (True, False)
        )
        return matrices, vectors

    def _start(self, number: int) -> None:
        import horovod.torch as hvd

        gradient = self.buckets[number].gradient
        self._handles[number] = hvd.reducescatter_async(gradient, name=f"bucket {number}", op=hvd.Sum)
        self._count_scatter(gradient.nbytes)

    def reduce(self, scale: float) -> bool:
        """Bring the sums over all ranks of this rank's slices into their gradients."""
        for number, (bucket, parameter) in enumerate(zip(self.buckets, self._slices, strict=True)):
            if self._watch is None:
                parameter.grad = bucket.gradient
                continue
            if number not in self._handles:
                self._start(number)
            parameter.grad = comm.result(self._handles.pop(number))
        if self._watch is not None:
            self._watch.reset()
        return True

    def _norm(self) -> float:
        import horovod.torch as hvd

        own = super()._norm()
        squares = torch.tensor([own * own], dtype=torch.float64)
        return float(
            comm.result(hvd.allreduce_async(squares, name="squares of the gradient", op=hvd.Sum)).sqrt()
        )

    def _step(self, learning_rate: float) -> None:
        """Update this rank's slices, then get those of the others."""
        import horovod.torch as hvd

        super()._step(learning_rate)
        if self.share.size == 1:
            return
        handles = [
            hvd.allgather_async(parameter.detach(), name=f"weights {number}")
            for number, parameter in enumerate(self._slices)
        ]
        for bucket, handle in zip(self.buckets, handles, strict=True):
            bucket.flat.detach().copy_(comm.result(handle))
            self._count_scatter(bucket.flat.nbytes)

    def clear(self) -> None:
        super().clear()
        for parameter in self._slices:
            parameter.grad = None

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        """The whole state of a bucket: between `make_state` and `state_is_loaded`, and on rank 0 while it is gathered."""
        return self._whole.get(number, {})

    def make_state(self, number: int, specs: dict[str, tuple[bool, torch.dtype]]) -> None:
        self._whole[number] = self._zeros(number, specs)

    def state_is_loaded(self) -> None:
        """Keep this rank's slices."""
        for number, state in self._whole.items():
            self.optimizer.state[self._slices[number]] = {
                key: _slice(value, self.share.rank, self.share.size).clone() if value.ndim else value
                for key, value in state.items()
            }
        self._whole = {}

    def gather_state(self) -> None:
        """Bring the slices of all ranks together on rank 0, one tensor after the other."""
        import horovod.torch as hvd

        for number, parameter in enumerate(self._slices):
            state = self.optimizer.state.get(parameter, {})
            for key, value in sorted(state.items()):
                whole = value
                if value.ndim:
                    whole = comm.result(hvd.allgather_async(value, name=f"gather {key} {number}"))
                if self.share.rank == 0:
                    self._whole.setdefault(number, {})[key] = whole

    def release_state(self) -> None:
        self._whole = {}


def _slice(flat: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return flat.view(size, -1)[rank]
