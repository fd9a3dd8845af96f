"""The parts of a Transformer block: normalisation, rotary positions, attention with a cache, feed-forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hvdformer.config import ModelConfig
from hvdformer.models.attention import MAX_TOKENS, causal_attention
from hvdformer.precision import product_dtype

# B batch, T tokens in this call, S tokens attended to (T, and with a cache those before), D model width,
# H query heads, G key/value heads, K width per head


def by_hand(x: torch.Tensor) -> bool:
    """Whether the functions below that are made for a CPU are to be used: not while torch.compile fuses torch's own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def make_norm(config: ModelConfig) -> nn.Module:
    """RMSNorm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450) as in GPT-2."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=config.norm_epsilon)
    return nn.LayerNorm(config.width, eps=config.norm_epsilon, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """On a CPU in half of the passes over memory that torch's own takes there, and without keeping x / rms(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return _RMSNorm.apply(x, self.weight, self.eps) if by_hand(x) else super().forward(x)


def _inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(..., D) -> (..., 1), in fp32."""
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return rms.add_(epsilon).rsqrt_()


def _rms_norm_gradients(
    gradient: torch.Tensor, normal: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x and of the weight. gradient: of the result; normal: x / rms(x), which is overwritten."""
    product = gradient * normal
    weight_gradient = product.sum(list(range(product.ndim - 1)))
    mean = product.mul_(weight).mean(-1, keepdim=True)
    return (gradient * weight).sub_(normal.mul_(mean)).mul_(inverse), weight_gradient


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.float()
        inverse = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        return *_rms_norm_gradients(gradient, x * inverse, inverse, weight), None


def linear_of_norm(norm: nn.Module, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """linear(norm(x)). By hand without keeping norm(x), which one multiplication in backward brings back."""
    if isinstance(norm, RMSNorm) and by_hand(x):
        return _LinearOfRMSNorm.apply(x, norm.weight, norm.eps, linear.weight, linear.bias)
    return linear(norm(x))


class _LinearOfRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        epsilon: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x.float()
        inverse = _inverse_rms(x, epsilon)
        y, matrix = _linear((x * inverse).mul_(gain), weight, bias)
        ctx.save_for_backward(x, inverse, gain, matrix)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, gain, matrix = ctx.saved_tensors
        normal = x * inverse
        of_y, *of_linear = _linear_gradients(gradient, normal * gain, matrix, ctx.has_bias)
        return *_rms_norm_gradients(of_y.float(), normal, inverse, gain), None, *of_linear


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's result, and its weight as it was multiplied: in the dtype of autocast where that is on."""
    dtype = product_dtype(x)
    matrix = weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), matrix, None if bias is None else bias.to(dtype)), matrix


def _linear_gradients(
    gradient: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of the (..., D) input, and in fp32 of the weight and of the bias."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    of_weight = rows.t() @ x.to(matrix.dtype).reshape(-1, x.shape[-1])
    return gradient @ matrix, of_weight.float(), rows.sum(0).float() if has_bias else None


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864), with the halves of a head paired as in Llama."""

    def __init__(self, head_width: int, context_length: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)  # (K/2,)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)  # (S, K/2)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        # cos for both halves, and sin with the sign that the first half takes: x * cos + swapped(x) * sin
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1), persistent=False)

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Turn (B, heads, T, K) by the angles of the positions start .. start + T."""
        end = start + x.shape[-2]
        swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)  # (second half, first half)
        return (x * self.cos[start:end] + swapped * self.sin[start:end]).to(x.dtype)


class KeyValueCache:
    """Keys and values of the tokens so far, for generation one token at a time. Memory: 2 L B G S K numbers."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        kv_heads = config.kv_heads or config.heads
        shape = (config.layers, batch, kv_heads, config.context_length, config.width // config.heads)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the (B, G, T, K) keys and values of one layer behind the others; give all of them, (B, G, S, K)."""
        end = self.length + k.shape[-2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal multi-head attention with grouped queries (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_width = config.width // config.heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(
            config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=config.bias
        )
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(
        self,
        x: torch.Tensor,
        norm: nn.Module,
        rotary: Rotary | None,
        mask: torch.Tensor | None,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D) of norm(x). mask: (B, 1, T, S), true where a token may look; None: at all before it."""
        B, T, D = x.shape
        H, G, K = self.heads, self.kv_heads, self.head_width
        q, k, v = linear_of_norm(norm, self.query_key_value, x).split([H * K, G * K, G * K], dim=-1)
        q = q.view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
        k = k.view(B, T, G, K).transpose(1, 2)  # (B, G, T, K)
        v = v.view(B, T, G, K).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        by_blocks = by_hand(x) and mask is cache is None and dropout == 0 and T <= MAX_TOKENS
        if rotary is not None and not by_blocks:
            start = cache.length if cache is not None else 0
            q, k = rotary(q, start), rotary(k, start)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, K)
        if G != H:
            # SDPA's enable_gqa took 12 % less of the attention's time on a CPU, but on GPUs it has no
            # memory-efficient kernel for fp32 or for a document mask, and torch 2.4 does not know it.
            k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)  # (B, H, S, K)
        if by_blocks:
            angles = () if rotary is None else (rotary.cos[:T], rotary.sin[:T])
            y = causal_attention(q, k, v, *angles)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout
            )
        return self.output(y.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), or two layers with GELU between them as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        hidden = ffn_width(config)
        gates = 2 if config.activation == "swiglu" else 1
        self.input = nn.Linear(config.width, gates * hidden, bias=config.bias)  # swiglu: gate, then up
        self.output = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """(B, T, D) -> (B, T, D) of norm(x)."""
        x = linear_of_norm(norm, self.input, x)
        if self.activation == "swiglu":
            if by_hand(x):
                return _LinearOfSwiGLU.apply(x, self.output.weight, self.output.bias)
            gate, up = x.chunk(2, dim=-1)
            return self.output(F.silu(gate) * up)
        return self.output(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class _LinearOfSwiGLU(torch.autograd.Function):
    """A linear layer of silu(gate) * up, which is computed again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        y, matrix = _linear(F.silu(gate).mul_(up), weight, bias)
        ctx.save_for_backward(x, matrix)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        of_x = torch.empty_like(x)
        # Until the gradients are there, their places hold what they are made of.
        silu, product = gate_gradient, up_gradient = of_x.chunk(2, dim=-1)
        torch.mul(torch.ops.aten.silu.out(gate, out=silu), up, out=product)
        of_product, *of_linear = _linear_gradients(gradient, product, matrix, ctx.has_bias)
        torch.mul(of_product, silu, out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=gate_gradient)
        return of_x, *of_linear


def ffn_width(config: ModelConfig) -> int:
    """Hidden width of the feed-forward part: as set, or 4 D; for swiglu 8/3 D (equal parameters), in multiples of 64."""
    if config.ffn_width is not None:
        return config.ffn_width
    if config.activation != "swiglu":
        return 4 * config.width
    return -(-8 * config.width // 3 // 64) * 64


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, rotary: Rotary | None, mask: torch.Tensor | None, cache: KeyValueCache | None
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(x, self.attention_norm, rotary, mask, cache))
        return x + self.dropout(self.feed_forward(x, self.feed_forward_norm))
