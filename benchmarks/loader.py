"""Tokens per second of the loader alone, on one core, to sequences of 1,024: `python -m benchmarks.loader`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch

from hvdformer.data.loader import BatchLoader, Sequences
from hvdformer.data.shards import open_shards, write_data_set
from hvdformer.data.tokenizer import Tokenizer

CONTEXT_LENGTH = 1024


def tokens_per_second(folder: Path, micro_batch: int, document_mask: bool, seconds: float) -> float:
    """Tokens that a loop which does nothing else gets from the loader in a second."""
    loader = BatchLoader(
        [Sequences(open_shards(folder), CONTEXT_LENGTH)],
        weights=[1.0],
        seed=1,
        micro_batch=micro_batch,
        num_micro_batches=128 // micro_batch,
        rank=0,
        size=1,
        document_mask=document_mask,
        shuffle=True,
        device=torch.device("cpu"),
    )
    position = 0
    for _ in range(20):
        loader.step(position)
        position += 128
    began, first = time.perf_counter(), position
    while time.perf_counter() - began < seconds:
        loader.step(position)
        position += 128
    elapsed = time.perf_counter() - began
    loader.close()
    return (position - first) * CONTEXT_LENGTH / elapsed


@click.command()
@click.option(
    "--tokens", default=100_000_000, show_default=True, help="Size of the data set, in documents of 1,000."
)
@click.option("--repeats", default=5, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Of each measurement.")
@click.option("--json", "as_json", is_flag=True)
def main(tokens: int, repeats: int, seconds: float, as_json: bool) -> None:
    """128 sequences a step, shuffled; the median of alternating repeats, and its range."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = np.random.default_rng(0).integers(0, 257, 1000)
        write_data_set(folder, Tokenizer.byte(), {"train": [(document, 1000)] * (tokens // 1000)}, ["random"])
        for _ in range(repeats):
            for micro_batch in (2, 16):
                for document_mask in (False, True):
                    key = f"micro-batch {micro_batch}" + (", document mask" if document_mask else "")
                    rates.setdefault(key, []).append(
                        tokens_per_second(folder, micro_batch, document_mask, seconds)
                    )
    if as_json:
        print(
            json.dumps(
                {"cores": 1, "cpu": platform.processor() or platform.machine(), "tokens_per_second": rates}
            )
        )
    else:
        for key, values in rates.items():
            print(
                f"{key:28s} {statistics.median(values) / 1e6:7.1f} M tokens/s  "
                f"({min(values) / 1e6:.1f} to {max(values) / 1e6:.1f})"
            )


if __name__ == "__main__":
    main()
