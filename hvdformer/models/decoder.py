"""A decoder-only Transformer: modern by default, GPT-2 or Llama by settings; plain single-device PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdformer.config import ModelConfig
from hvdformer.models.attention import KEPT_TOKENS, MAX_TOKENS
from hvdformer.models.layers import Block, KeyValueCache, Rotary, ffn_width, make_norm
from hvdformer.models.loss import rows_of_a_chunk

# B batch, T tokens, S tokens attended to, D model width, V vocabulary


class Decoder(nn.Module):
    """Token ids in, next-token logits out."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(vocab_size, config.width)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context_length, config.width) if learned else None
        self.rotary = (
            None
            if learned
            else Rotary(config.width // config.heads, config.context_length, config.rope_theta or 10_000.0)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, vocab_size, bias=False)

    def forward(
        self, tokens: torch.Tensor, segments: torch.Tensor | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """(B, T) int64 -> logits (B, T, V).

        segments: (B, T) document number of each token; attention then stays within a document.
        cache: keys and values of the tokens before; it takes up those of this call.
        """
        return self.unembed(self.hidden(tokens, segments, cache))

    def hidden(
        self, tokens: torch.Tensor, segments: torch.Tensor | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """The (B, T, D) output of the last block, normalised: what the output layer reads."""
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        # One position too few would broadcast, without an error.
        assert start + T <= self.config.context_length, (start, T)
        assert segments is None or start == 0, "the cache does not know the documents of the tokens it holds"
        x = self.embedding(tokens)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + T]
        x = self.dropout(x)
        mask = _mask(T, start, segments, tokens.device)
        for block in self.blocks:
            if cache is not None:
                # Past `block.compile()`: each layer, and shapes that grow with every token, would compile anew.
                x = block.forward(x, self.rotary, mask, cache)
            elif self.activation_checkpointing and self.training:
                x = checkpoint(block, x, self.rotary, mask, cache, use_reentrant=False)
            else:
                x = block(x, self.rotary, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @property
    def output_weight(self) -> torch.Tensor:
        """(V, D): what a hidden state is multiplied by to give the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return F.linear(hidden, self.output_weight)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the weights as GPT-2 does: normal with deviation 0.02, and 0.02 / sqrt(2 L) where a residual is added."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / (2 * len(self.blocks)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # gain of a normalisation
                parameter.fill_(1)
            else:
                parameter.normal_(
                    0, residual if name.endswith("output.weight") else 0.02, generator=generator
                )


def _mask(T: int, start: int, segments: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """(B or 1, 1, T, S), true where a token may look; None where plain causal attention says it all."""
    if segments is None and start == 0:
        return None
    causal = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
    if segments is None:
        return causal[None, None]
    return (segments[:, :, None] == segments[:, None, :])[:, None] & causal


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Number of parameters, without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config, vocab_size).parameters())


def estimate_memory(
    config: ModelConfig,
    vocab_size: int,
    micro_batch: int,
    precision: str,
    activation_checkpointing: bool,
    on_cpu: bool,
) -> dict[str, int]:
    """Bytes that a rank needs for training: weights, gradients and AdamW's moments in fp32, and what a micro-batch takes.

    "activations" are kept from forward until backward, counted from the code of a block; "backward" lives for a moment
    of it: a chunk of the logits, or one block, whichever is more. Attention is taken to keep no T x T matrix, as flash and
    memory-efficient kernels do, but on a CPU half of one where ours does; with dropout it may. A GPU in 16 bit has the
    logits of a chunk in fp32 as well, 50 MB at 50k ids, which is left out.
    precision: "fp32", "bf16" or "fp16"; in the latter two autocast also holds a 16-bit copy of the weights.
    """
    assert precision in ("fp32", "bf16", "fp16"), precision
    parameters = parameter_count(config, vocab_size)
    tokens = micro_batch * config.context_length
    width, kv_heads = config.width, config.kv_heads or config.heads
    item = 4 if precision == "fp32" else 2
    is_swiglu = config.activation == "swiglu"
    # Both norms of a block: their inputs are fp32 in every precision.
    norms = 2 * width
    if on_cpu and config.dropout == 0 and config.context_length <= MAX_TOKENS:
        attention = 3 * width  # copies of q, k and v
        if config.context_length <= KEPT_TOKENS:
            attention += config.heads * config.context_length // 2
    else:
        attention = width + 2 * (width // config.heads) * kv_heads  # views of one projection
        if config.positions == "rotary" or kv_heads != config.heads:
            attention += 2 * width  # copies: q and k turned, or k and v repeated
    # and the output of attention, those of both norms, and the product of SwiGLU, where they are not computed again
    attention += width if on_cpu and config.norm == "rmsnorm" else 3 * width
    feed_forward = ffn_width(config) * (3 if is_swiglu and not on_cpu else 2)
    block = tokens * (4 * norms + item * (attention + feed_forward))
    # As each is used up in backward, the gradients of the feed-forward come to half of what it kept, or half as much again.
    backward = tokens * item * (3 * feed_forward if is_swiglu and on_cpu else feed_forward) // 2
    if activation_checkpointing:
        # Blocks keep their input, and are recomputed one by one when the logits are gone.
        activations, backward = tokens * 4 * width * config.layers, block + backward
    else:
        activations = block * config.layers
    # The loss: logits of a chunk, and the gradient of the output layer, which waits for that of the embedding if tied.
    logits = min(tokens, rows_of_a_chunk(vocab_size)) * vocab_size * item
    output_layer = vocab_size * width * (4 if precision == "fp32" else 6)
    waiting = 4 * vocab_size * width if config.tie_embeddings else 0
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": activations,
        "backward": max(logits + output_layer, backward + waiting),
    }
    if precision != "fp32":
        memory["16-bit weights"] = 2 * parameters
    return memory
