"""Cross-entropy over a vocabulary straight from the hidden states, in chunks, so that the logits are never all there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hvdformer.precision import product_dtype

# N targets, C of them a chunk, D model width, V vocabulary

IGNORED = -100  # a target that is not counted

# Logits of a chunk. Small enough to stay in a core's caches and to be little beside the weights; large enough that the
# passes over the (V, D) gradient, one a chunk, take little time beside the matrix products.
_CHUNK_BYTES = 16 * 2**20
_MIN_ROWS = 256
_IDS = 512  # ids for which logits are computed at a time
# Logits in fp32 that a core turns into probabilities at a time: what its second cache holds.
_TILE_BYTES = 2**20


def rows_of_a_chunk(vocab_size: int) -> int:
    """C: how many hidden states are turned into logits at a time."""
    return max(_MIN_ROWS, _CHUNK_BYTES // (4 * vocab_size))


def cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats of softmax(hidden @ weight.T) against the targets: a scalar in fp32.

    hidden (N, D) and weight (V, D) are multiplied in the dtype of autocast where it is on; the softmax is fp32.
    targets: (N,) int64 ids, or IGNORED. Same value as F.cross_entropy(..., reduction="sum") to rounding.

    The gradients are computed along with the loss, chunk by chunk (as in Hsu et al., "Liger Kernel", arXiv 2410.10989,
    section 3.2): logits and their gradient take C V numbers instead of 3 N V. For that, backward works once.
    """
    rows = rows_of_a_chunk(len(weight))
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _CrossEntropySum.apply(hidden, weight, targets, rows)
    dtype = product_dtype(hidden)
    total = torch.zeros((), device=hidden.device)
    matrix = weight.to(dtype)
    for h, t in zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True):
        total += F.cross_entropy(F.linear(h, matrix).float(), t, ignore_index=IGNORED, reduction="sum")
    return total


def _logits(hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(C, D), (V, D) -> (C, V).

    On a CPU a range of ids at a time: MKL's fp32 product of a few hundred rows with a whole vocabulary ran at 65 to 83
    GFLOP/s on a core of an EPYC, and so at 87 to 95.
    """
    if hidden.device.type != "cpu":
        return F.linear(hidden, matrix)
    logits = hidden.new_empty(len(hidden), len(matrix))
    ids = _IDS * torch.get_num_threads()
    for part, rows in zip(logits.split(ids, dim=1), matrix.split(ids), strict=True):
        torch.mm(hidden, rows.t(), out=part)
    return logits


def _differentiate(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of (C, V) logits, a scalar in fp32; in their place its gradient, in their dtype."""
    is_counted = (targets != IGNORED).unsqueeze(1)  # (C, 1)
    index = targets.clamp(min=0).unsqueeze(1)
    losses = torch.empty(index.shape, device=logits.device)
    minus_one = losses.new_full((1, 1), -1.0)
    # On a CPU so few rows at a time that all of it happens in the caches of the cores.
    tile = len(logits)
    if logits.device.type == "cpu":
        tile = max(1, _TILE_BYTES * torch.get_num_threads() // (4 * logits.shape[1]))
    for z, i, loss in zip(logits.split(tile), index.split(tile), losses.split(tile), strict=True):
        p = z.float()
        largest, at_target = p.amax(-1, keepdim=True), p.gather(1, i)
        torch.softmax(p, dim=-1, out=p)
        # The largest probability is 1 / sum of exp(logit - largest).
        torch.sub(largest - at_target, p.amax(-1, keepdim=True).log_(), out=loss)
        # d loss / d logits = softmax - one at the target; nothing where the target does not count
        p.scatter_add_(1, i, minus_one.expand_as(i))
        if p is not z:
            z.copy_(p)
    if not bool(is_counted.all()):
        losses.masked_fill_(~is_counted, 0)
        logits.mul_(is_counted)
    return losses.sum()


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
    ) -> torch.Tensor:
        dtype = product_dtype(hidden)
        matrix = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.empty_like(weight, dtype=torch.float32)
        is_first = True
        with torch.autocast(hidden.device.type, enabled=False):
            for h, t, gradient in zip(
                hidden.to(dtype).split(rows), targets.split(rows), hidden_gradient.split(rows), strict=True
            ):
                q = _logits(h, matrix)  # (C, V), and then d loss / d logits
                total += _differentiate(q, t)
                gradient.copy_(q @ matrix)
                if dtype != torch.float32:
                    product = q.t() @ h
                    weight_gradient.copy_(product) if is_first else weight_gradient.add_(product)
                elif is_first:
                    torch.mm(q.t(), h, out=weight_gradient)
                else:
                    weight_gradient.addmm_(q.t(), h)
                is_first = False
        ctx.gradients = hidden_gradient, weight_gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.gradients
        ctx.gradients = None
        return hidden_gradient.mul_(scale), weight_gradient.mul_(scale), None, None
