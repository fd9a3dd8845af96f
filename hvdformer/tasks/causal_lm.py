"""Causal language modelling: predict the next token of a sequence; the score is bits per byte."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from hvdformer.config import Config
from hvdformer.data.loader import Batch, Sequences
from hvdformer.data.partition import Blend
from hvdformer.data.shards import open_shards, read_index
from hvdformer.data.standard_library import prepare_standard_library
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed import comm
from hvdformer.distributed.comm import World
from hvdformer.errors import UserError
from hvdformer.models.decoder import Decoder
from hvdformer.models.loss import IGNORED, cross_entropy_sum

# B batch, T tokens, D model width


def build_model(config: Config) -> Decoder:
    """The model of a resolved config with its initial weights, on the CPU: a function of settings and seed alone."""
    assert config.model.vocab_size is not None
    model = Decoder(config.model, config.model.vocab_size)
    model.initialise(config.train.seed)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def loss_sum(model: Decoder, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy in nats over the targets of a micro-batch (a scalar), and the number of targets.

    The token at t + 1 is the target at t. With segments, a document's first token is no target of the one before.
    """
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]  # (B, T) each
    if batch.segments is None:
        hidden, count = model.hidden(inputs), targets.numel()  # (B, T, D)
    else:
        crossing = batch.segments[:, :-1] != batch.segments[:, 1:]
        targets = targets.masked_fill(crossing, IGNORED)
        hidden, count = model.hidden(inputs, batch.segments[:, :-1]), int((~crossing).sum())
    loss = cross_entropy_sum(hidden.flatten(0, 1), model.output_weight, targets.flatten())
    return loss, count


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Mean loss in nats per token as bits per byte of text, which does not depend on the tokenizer."""
    return loss / math.log(2) * tokens / text_bytes


@dataclass(frozen=True)
class Examples:
    """The data of a run, opened for reading by this rank."""

    tokenizer: Tokenizer
    train: list[Sequences]
    weights: list[float]  # of the data sets in `train`
    validation: list[Sequences]
    fingerprint: str


def open_examples(config: Config, world: World) -> Examples:
    """Open the data that the config names; without any, build the default data once per node. Every rank calls it.

    Raises:
        Agreed: a data set is missing or damaged on any rank, or the tokenizers of a blend differ.
    """
    data = config.data
    if data.mix:
        paths, weights = [Path(entry.path) for entry in data.mix], [entry.weight for entry in data.mix]
    elif data.path is not None:
        paths, weights = [Path(data.path)], [1.0]
    else:
        cache = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache()
        # One rank of each node builds it while the others wait for the outcome.
        comm.on_every_rank(
            lambda: prepare_standard_library(cache) if world.local_rank == 0 else None, "build data"
        )
        paths, weights = [comm.on_every_rank(lambda: prepare_standard_library(cache), "find data")], [1.0]
    return comm.on_every_rank(lambda: _open(paths, weights, config), "open data")


def default_cache() -> Path:
    """Where data that hvdformer makes for itself is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdformer"


def _open(paths: list[Path], weights: list[float], config: Config) -> Examples:
    length = config.model.context_length
    train = [Sequences(open_shards(path, "train"), length) for path in paths]
    if len({sequences.shards.tokenizer_fingerprint for sequences in train}) > 1:
        raise UserError(
            "the data sets of data.mix were prepared with different tokenizers: prepare them with one"
        )
    # A data set of a blend may do without a validation split, and a small one may not fill a sequence; one has to.
    validation = [
        Sequences(open_shards(path, "validation"), length)
        for path in paths
        if "validation" in read_index(path).splits
    ]
    validation = [sequences for sequences in validation if len(sequences)]
    for path, sequences in zip(paths, train, strict=True):
        if not len(sequences):
            raise UserError(
                f"{path}: {sequences.shards.num_tokens} tokens are too few for one sequence of "
                f"model.context_length={length}: lower it, or prepare more text"
            )
    if not validation:
        raise UserError(
            f"{', '.join(map(str, paths))}: no validation text of at least model.context_length={length} tokens: lower it, "
            "or prepare with a larger --validation-fraction"
        )
    Blend(weights)  # refuses a weight that is too small, here where all ranks hear of it together
    fingerprints = "".join(sequences.shards.fingerprint for sequences in train)
    return Examples(
        tokenizer=train[0].shards.load_tokenizer(),
        train=train,
        weights=weights,
        validation=validation,
        fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest() if len(paths) > 1 else fingerprints,
    )
