"""How the results of the ranks become one model: what every kind of fusion has in common.

Each kind is a file beside this one (see kinds.py). A step calls, on every rank alike,

    backward of the rank's micro-batches -> reduce -> clip -> update -> fuse, every `every` steps

Kinds that reduce gradients do their work in `reduce` and have nothing left to fuse; kinds that let the ranks train
apart for a while reduce nothing and do theirs in `fuse`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed.buckets import Bucket, Watch
from hvdformer.errors import UserError

CHUNK = 65536  # numbers converted at a time: what lies between two passes over them stays in the core's cache
ADAMW_KEYS = frozenset({"step", "exp_avg", "exp_avg_sq"})
MakeOptimizer = Callable[[list[torch.nn.Parameter], list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Share:
    """This rank's part in each step."""

    rank: int
    size: int
    micro_batches: int  # of this rank; ranks may differ
    num_micro_batches: int  # of all ranks together


class Fusion:
    """The base of all kinds, and by itself the one for kinds whose gradients lie in the buckets when they are reduced."""

    every = 1  # steps between two calls of fuse(); between them the ranks' weights may differ
    is_replicated = True  # every rank holds the whole state whenever the ranks have one model
    averages_locally = False  # gradients are means over this rank's own targets, not over those of all ranks

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        """Every rank calls this with the same buckets; make_optimizer: from matrices and vectors to update."""
        self.settings, self.buckets, self.share = settings, buckets, share
        self.optimizer: Any = make_optimizer(*self._parameters())  # Horovod's has methods of its own
        self.bytes_sent = (
            0  # by this rank since the start: payload of its collectives, but for a few numbers a step
        )
        self._watch: Watch | None = None

    def _parameters(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """What the optimizer updates: matrices, vectors."""
        matrices, vectors = ([b.flat for b in self.buckets if b.decays == decays] for decays in (True, False))
        return matrices, vectors

    # What a step calls

    def reduce(self, scale: float) -> bool:
        """Bring the ranks' gradients together, after backward. False: all ranks have to compute them once more.

        scale: what makes this rank's gradient the mean over its own targets; only kinds that average locally use it.
        """
        return True

    def clip(self, max_norm: float, scale: float) -> float:
        """Multiply the gradients by `scale`, then limit their global 2-norm to `max_norm` (0: leave it), in one pass.

        Returns the norm before the limit, the same on every rank: not finite if any gradient is not.
        """
        return self._limit(self._rounded_norm(), max_norm, scale)

    def update(self, learning_rate: float) -> None:
        """Apply the gradients, then clear them."""
        self._step(learning_rate)
        self.clear()

    def clear(self) -> None:
        """Set all gradients to zero."""
        for bucket in self.buckets:
            bucket.gradient.zero_()

    def fuse(self) -> None:
        """Make one model of the ranks' weights."""

    # State, beside the weights: what is the same on every rank and independent of how many there are

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        """The state of a bucket: per key a tensor of the length of the bucket, or a scalar."""
        return dict(self.optimizer.state.get(self.buckets[number].flat, {}))

    def make_state(self, number: int, specs: dict[str, tuple[bool, torch.dtype]]) -> None:
        """Allocate the state of a bucket, to be filled in place through `state_of`: {key: (is it a vector, dtype)}.

        Keys that another kind of fusion has left are passed over.
        """
        self.optimizer.state[self.buckets[number].flat] = self._zeros(number, specs)

    def state_is_loaded(self) -> None:
        """Called on every rank when the weights, and the state of every bucket if there is one, have been filled."""

    def gather_state(self) -> None:
        """Bring the whole state to rank 0, for a save; what only some ranks hold is sent. Every rank calls it."""

    def release_state(self) -> None:
        """Let go of what `gather_state` brought."""

    def to_dict(self) -> dict[str, Any]:
        """State that is not tensors, for JSON."""
        return {}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over what `to_dict` gave, maybe of another kind: what does not fit is ignored."""

    def state_bytes(self) -> int:
        """Bytes that the optimizer and this kind of fusion keep on this rank beside weights and gradients."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*held, *self._extra()])

    # For the kinds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Backward within it starts no collective, and leaves the plain gradients in the buckets."""
        if self._watch is not None:
            self._watch.is_paused = True
        yield
        if self._watch is not None:
            self._watch.is_paused = False

    def _gradients(self) -> list[torch.Tensor]:
        """The gradients that the optimizer applies."""
        return [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]

    def _limit(self, norm: float, max_norm: float, scale: float) -> float:
        """`clip`, given the 2-norm of the gradients as they are."""
        norm, factor = scale * norm, scale
        if max_norm > 0 and norm > max_norm:
            factor *= max_norm / norm
        if factor != 1 and math.isfinite(factor):
            torch._foreach_mul_(self._gradients(), factor)
        return norm

    def _rounded_norm(self) -> float:
        """The norm in fp32, after a sum in float64, so that how a kind groups the sum does not show."""
        with np.errstate(over="ignore"):
            return float(np.float32(self._norm()))

    def _norm(self) -> float:
        """The 2-norm of all gradients together, in float64."""
        norms = torch.stack([_norm_of(gradient) for gradient in self._gradients()])
        return float(torch.linalg.vector_norm(norms))

    def _step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def _zeros(self, number: int, specs: dict[str, tuple[bool, torch.dtype]]) -> dict[str, torch.Tensor]:
        flat = self.buckets[number].flat
        specs = {key: spec for key, spec in specs.items() if key in ADAMW_KEYS}
        is_fused = bool(self.optimizer.defaults.get("fused"))
        return {
            # torch.optim keeps a step count on the CPU unless it is fused.
            key: torch.zeros(flat.shape if is_vector else (), dtype=dtype, device=flat.device)
            if is_vector or is_fused
            else torch.zeros((), dtype=dtype)
            for key, (is_vector, dtype) in specs.items()
        }

    def _extra(self) -> list[torch.Tensor]:
        """Tensors that this kind keeps beside the optimizer's."""
        return []

    def _count_allreduce(self, nbytes: int) -> None:
        """A ring sends each byte twice, but for the rank's own part."""
        self.bytes_sent += 2 * nbytes * (self.share.size - 1) // self.share.size

    def _count_scatter(self, nbytes: int) -> None:
        """Of a reducescatter, allgather or alltoall of `nbytes` in all, a rank sends all but its own part."""
        self.bytes_sent += nbytes * (self.share.size - 1) // self.share.size


def refuse(kind: str, found: str, instead: str) -> UserError:
    """The error for a kind of fusion that cannot do what is asked of it."""
    return UserError(f"fusion.kind={kind} cannot work here: {found}. {instead}")


def _norm_of(flat: torch.Tensor) -> torch.Tensor:
    """The 2-norm of a flat tensor, in float64."""
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float64)
    # In pieces that stay in the core's cache: twice as fast as vector_norm, which converts number by number.
    wide = torch.empty(min(CHUNK, flat.numel()), dtype=torch.float64)
    squares = []
    for part in flat.split(CHUNK):
        piece = wide[: part.numel()].copy_(part)
        squares.append(torch.dot(piece, piece))
    return torch.stack(squares).sum().sqrt()
