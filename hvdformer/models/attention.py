"""Causal attention for CPUs: products of matrices over blocks of queries, each with the keys that it may see.

The CPU kernel of torch's scaled_dot_product_attention computes in fp32 whatever it is given, and its backward runs far
below the speed of a matrix product. With blocks of 64 queries, forward and backward together took 0.9 of its time at 256
tokens and 0.6 at 512 in fp32, and 0.45 and 0.4 in bf16 where the processor multiplies that (one core, heads of width 64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# N batch times heads, T tokens, K width per head, Q queries a block

_BLOCK = 64
# Up to so many tokens the probabilities, T^2 / 2 a head, are kept for backward. Beyond that they are computed again, for a
# fifth more of attention's time, since at 512 tokens they were a fifth of all that a block kept.
KEPT_TOKENS = 256
MAX_TOKENS = 1024  # beyond this torch's kernel is as fast in fp32


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K), each token seeing itself and those before it) v: (B, H, T, K) each, and the result.

    cos, sin: (T, K) as in layers.Rotary; q and k are first turned by them, while they are copied anyway.
    Products in the dtype of the inputs, the softmax in fp32, as in torch's plain ("math") attention.
    """
    return _CausalAttention.apply(q, k, v, cos, sin)


def _turned(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, scale: float = 1.0
) -> torch.Tensor:
    """A contiguous copy of (B, H, T, K) times `scale`, with each pair of numbers turned where there are angles."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if cos is None or sin is None:
        return torch.mul(x, scale, out=y).to(x.dtype)
    half, wide, cos, sin = x.shape[-1] // 2, x.float(), cos * scale, sin * scale
    torch.mul(wide, cos, out=y)
    y[..., :half].addcmul_(wide[..., half:], sin[:, :half])
    y[..., half:].addcmul_(wide[..., :half], sin[:, half:])
    return y.to(x.dtype)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """The blocks of queries, as ranges of tokens."""
    return [(a, min(a + _BLOCK, tokens)) for a in range(0, tokens, _BLOCK)]


def _probabilities(q: torch.Tensor, k: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """(N, Q, b): how much of each token before b the queries a .. b take."""
    scores = torch.bmm(q[:, a:b], k[:, :b].transpose(1, 2))
    later = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
    scores[:, :, a:].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
    ) -> torch.Tensor:
        B, H, T, K = q.shape
        with torch.autocast(q.device.type, enabled=False):
            q = _turned(q, cos, sin, K**-0.5).view(B * H, T, K)
            k, v = _turned(k, cos, sin).view(B * H, T, K), v.reshape(B * H, T, K)
            y = torch.empty_like(q)
            kept = []
            for a, b in _blocks(T):
                p = _probabilities(q, k, a, b)
                y[:, a:b] = torch.bmm(p, v[:, :b])
                if T <= KEPT_TOKENS:
                    kept.append(p)
        ctx.angles = cos, sin
        ctx.save_for_backward(q, k, v, *kept)
        return y.view(B, H, T, K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, K = gradient.shape
        g = gradient.reshape(B * H, T, K)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for number, (a, b) in enumerate(_blocks(T)):
            p = kept[number] if kept else _probabilities(q, k, a, b)
            dp = torch.bmm(g[:, a:b], v[:, :b].transpose(1, 2))  # (N, Q, b)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dv[:, :b] += torch.bmm(p.transpose(1, 2), g[:, a:b])
            dq[:, a:b] = torch.bmm(ds, k[:, :b])
            dk[:, :b] += torch.bmm(ds.transpose(1, 2), q[:, a:b])
        dq, dk, dv = (x.to(gradient.dtype).view(B, H, T, K) for x in (dq, dk, dv))
        cos, sin = ctx.angles
        back = None if sin is None else -sin
        return _turned(dq, cos, back, K**-0.5), _turned(dk, cos, back), dv, None, None
