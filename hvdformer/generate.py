"""Generation: one token at a time from a key-value cache, with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from hvdformer.models.decoder import Decoder
from hvdformer.models.layers import KeyValueCache


class TextCodec(Protocol):
    """What generation needs of a tokenizer."""

    end_of_document: int

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: list[int]) -> str: ...


def generate(
    model: Decoder,
    tokenizer: TextCodec,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> str:
    """The text that the model puts behind `prompt`, up to the end of the document or `max_new_tokens`.

    An empty prompt begins a new document. The same seed gives the same text on the same machine.
    """
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_document]
    new = generate_ids(model, ids, max_new_tokens, temperature, top_k, top_p, seed, device)
    taken = []
    for token in new:
        if token == tokenizer.end_of_document:
            break
        taken.append(token)
    return tokenizer.decode(taken)


@torch.inference_mode()
def generate_ids(
    model: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Iterator[int]:
    """The new token ids one by one.

    When the context is full, the cache is filled again from the newer half of it: a token then sees between half
    and all of the context length.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    context = model.config.context_length
    ids = list(prompt)
    cache = KeyValueCache(model.config, batch=1, device=device)
    unread = ids[-context:]
    try:
        for _ in range(max_new_tokens):
            if cache.length + len(unread) > context:
                cache.length, unread = 0, ids[-max(1, context // 2) :]
            hidden = model.hidden(torch.tensor([unread], device=device), cache=cache)
            logits = model.unembed(hidden[:, -1]).float().cpu()[0]  # (V,)
            token = sample(logits, temperature, top_k, top_p, generator)
            ids.append(token)
            unread = [token]
            yield token
    finally:
        model.train(was_training)


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> int:
    """Draw a token id from (V,) logits; temperature 0 takes the likeliest.

    top_k keeps the k likeliest; top_p then the smallest set whose probability reaches p (arXiv 1904.09751).
    """
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        logits, ids = logits[:top_k], ids[:top_k]
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # held by the likelier ones
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
