"""Validation over all ranks: each takes its share of the sequences, and sums and counts are added up once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hvdformer import checkpoint, runtime
from hvdformer.config import Config, config_from_dict
from hvdformer.data.loader import Sequences, evaluation_batches
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed import comm
from hvdformer.distributed.comm import World
from hvdformer.distributed.watchdog import beat
from hvdformer.errors import UserError
from hvdformer.metrics import LossSum
from hvdformer.models.decoder import Decoder
from hvdformer.precision import autocast
from hvdformer.runtime import Runtime
from hvdformer.tasks import causal_lm


@torch.inference_mode()
def evaluate(
    model: Decoder,
    validation: Sequence[Sequences],
    config: Config,
    world: World,
    device: torch.device,
    max_sequences: int,
) -> dict[str, Any]:
    """Loss on the first sequences of each data set, `max_sequences` in all (0: every one). Every rank calls it.

    Returns, on every rank, validation_loss in nats per token, bits_per_byte, and the number of sequences and targets
    that they were taken over.
    """
    model.eval()
    losses, num_targets, num_sequences = LossSum(device), 0, 0
    for sequences in validation:
        batches = evaluation_batches(
            sequences,
            micro_batch=config.train.micro_batch,
            rank=world.rank,
            size=world.size,
            max_examples=-(-max_sequences // len(validation)) or len(sequences),
            document_mask=config.data.document_mask,
            device=device,
        )
        for batch in batches:
            with autocast(device, config.train.precision):
                batch_loss, count = causal_lm.loss_sum(model, batch)
            losses.add(batch_loss)
            num_targets += count
            num_sequences += len(batch.tokens)
            beat()
    model.train()
    *totals, targets, examples = comm.sum_over_ranks(
        [*losses.totals(), num_targets, num_sequences], "evaluate"
    )
    loss = LossSum.mean(totals, targets)
    tokens = sum(sequences.shards.num_tokens for sequences in validation)
    text_bytes = sum(sequences.shards.num_bytes for sequences in validation)
    return {
        "validation_loss": loss,
        "bits_per_byte": causal_lm.bits_per_byte(loss, tokens, text_bytes),
        "sequences": examples,
        "targets": targets,
    }


def evaluate_checkpoint(path: Path, overrides: Sequence[str], here: Runtime) -> dict[str, Any]:
    """Validate a stored checkpoint over all ranks, on the whole validation split. Every rank calls it.

    Rank 0 reads the checkpoint and broadcasts it, so that the other hosts need not see the file. `overrides` are
    key=value settings over those that the checkpoint was trained with.
    """
    device, world = here.device, here.world

    def read() -> dict[str, Any]:
        found = checkpoint.resolve(path)
        stored = checkpoint.read_state(found)
        # The device is this machine's, not the one of the training.
        stored["config"]["train"]["device"] = "auto"
        return {"path": str(found), "config": stored["config"], "step": stored["step"]}

    found = comm.on_rank_0(read, "read checkpoint")
    config = comm.on_every_rank(lambda: config_from_dict(found["config"], found["path"], overrides), "config")
    examples = causal_lm.open_examples(config, world)
    config = comm.on_every_rank(
        lambda: runtime.resolve(config, device, examples.tokenizer.vocab_size, here.threads), "resolve"
    )
    comm.on_rank_0(lambda: _check_model(config, Path(found["path"])), "check model")
    model = causal_lm.build_model(config).to(device)
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    comm.on_rank_0(
        lambda: checkpoint.load_tensors(Path(found["path"]), checkpoint.MODEL_FILE, dict(weights)), "load"
    )
    comm.broadcast_tensors(weights, "weights")
    result = evaluate(model, examples.validation, config, world, device, max_sequences=0)
    return {"checkpoint": found["path"], "step": found["step"], **result}


def load_model(path: Path) -> tuple[Decoder, Tokenizer, torch.device]:
    """The model and tokenizer of a checkpoint, ready to generate, on this machine's GPU if it has one."""
    found = checkpoint.resolve(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = checkpoint.read_config(found)
    _check_model(config, found)
    model = causal_lm.build_model(config).to(device)
    checkpoint.load_tensors(
        found,
        checkpoint.MODEL_FILE,
        {name: parameter.detach() for name, parameter in model.named_parameters()},
    )
    return model.eval(), Tokenizer.load(found / checkpoint.TOKENIZER_FILE), device


def _check_model(config: Config, path: Path) -> None:
    """Refuse a config that is not that of the checkpoint's weights before any memory is taken for its model."""
    specs = checkpoint.tensor_specs(path, checkpoint.MODEL_FILE)
    if config.model.vocab_size is None or config.model.layers > len(specs):
        raise UserError(
            f"{path}: its config has {config.model.layers} layers and {config.model.vocab_size} ids, but there are "
            f"{len(specs)} tensors: it was not written by hvdformer"
        )
    with torch.device("meta"):
        model = Decoder(config.model, config.model.vocab_size)
    checkpoint.check_shapes(
        path, checkpoint.MODEL_FILE, {name: list(p.shape) for name, p in model.named_parameters()}
    )
