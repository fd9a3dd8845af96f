"""Describe what lies on disk (a checkpoint, a run, a shard folder) or what a config would start, in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdformer import checkpoint
from hvdformer.config import Config, load_config, to_yaml
from hvdformer.data.shards import open_shards, read_index
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.errors import UserError
from hvdformer.metrics import read_metrics
from hvdformer.models.decoder import estimate_memory, parameter_count
from hvdformer.runtime import uses_gpu


def inspect(path: Path, verify: bool) -> dict[str, Any]:
    """What a checkpoint, run folder or shard folder holds; checkpoints and, with `verify`, shards are checked whole."""
    if (path / "index.json").is_file():
        return inspect_shards(path, verify)
    if verify:
        raise UserError(f"{path} is no shard folder: --verify is for those. Checkpoints are always checked.")
    found = checkpoint.resolve(path)
    state = checkpoint.read_state(found)
    description = {
        "checkpoint": str(found),
        **{key: value for key, value in state.items() if key != "config"},
        "parameters": sum(
            math.prod(shape) for shape, _ in checkpoint.tensor_specs(found, checkpoint.MODEL_FILE).values()
        ),
        "config": state["config"],
    }
    if (path / "checkpoints").is_dir():
        description["checkpoints"] = sorted(entry.name for entry in (path / "checkpoints").glob("step-*"))
        description["last_metrics"] = next(iter(read_metrics(path)[-1:]), None)
    return description


def dry_run(config_path: Path | None, overrides: Sequence[str], run_dir: Path) -> str:
    """The resolved config and what it would cost, as text; nothing is written or started."""
    config = load_config(config_path, overrides)
    vocab_size = config.model.vocab_size or _vocab_size(config)
    train = config.train
    targets = train.global_batch * config.model.context_length
    precision = "fp32" if train.precision == "auto" else train.precision
    memory = estimate_memory(
        config.model,
        vocab_size,
        train.micro_batch,
        precision,
        activation_checkpointing=train.activation_checkpointing,
        on_cpu=not uses_gpu(train.device),
    )
    lines = [
        to_yaml(config).rstrip(),
        "---",
        f"parameters: {parameter_count(config.model, vocab_size):,}",
        f"steps: {train.steps} of {targets:,} tokens, {train.steps * targets:,} in all",
        f"micro-batches a step: {train.global_batch // train.micro_batch}, so at most as many ranks",
        f"memory per rank, estimated for {precision}:",
        *(f"  {name}: {size / 2**20:,.1f} MiB" for name, size in memory.items()),
        f"  in all: {sum(memory.values()) / 2**20:,.1f} MiB, besides torch itself",
        f"run folder: {run_dir}",
    ]
    return "\n".join(lines)


def _vocab_size(config: Config) -> int:
    path = config.data.mix[0].path if config.data.mix else config.data.path
    return Tokenizer.byte().vocab_size if path is None else open_shards(Path(path), "train").vocab_size


def inspect_shards(folder: Path, verify: bool) -> dict[str, Any]:
    """Counts, lengths and a few decoded beginnings of the documents of a data set.

    Raises:
        UserError: damaged; with `verify`, also when a shard does not have its sha256.
    """
    index = read_index(folder)
    tokenizer = None
    splits = {}
    for split in index.splits:
        shards = open_shards(folder, split)
        tokenizer = tokenizer or shards.load_tokenizer()
        if verify:
            shards.verify()
        lengths = np.concatenate([np.diff(shard.ends.astype(np.int64), prepend=0) for shard in shards.shards])
        beginnings = [
            shards.read(int(start), 64) for start in np.cumsum([0, *lengths[:2]]) if start < shards.num_tokens
        ]
        splits[split] = {
            "tokens": shards.num_tokens,
            "documents": shards.num_documents,
            "text_bytes": shards.num_bytes,
            "bytes_per_token": shards.num_bytes / max(shards.num_tokens, 1),
            "longest_document": int(lengths.max(initial=0)),
            "median_document": float(np.median(lengths)) if len(lengths) else 0.0,
            "shards": len(shards.shards),
            "begins_with": [tokenizer.decode(ids.tolist()) for ids in beginnings[:3]],
        }
    return {
        "data": str(folder),
        "fingerprint": index.fingerprint,
        "vocab_size": index.vocab_size,
        "tokenizer_sha256": index.tokenizer_sha256,
        "sources": list(index.sources[:10]),
        "verified": verify,
        "splits": splits,
    }
