"""What is trained in the benchmarks: models by size and vocabulary, and the data for them, prepared once into the cache.

A name is SIZE-VOCABULARY, and the size counts all parameters, the embedding too (it is the output layer as well). `default`
is the model that `hvdformer train` trains without a config, on bytes.

The data is the text of Python's standard library, prepared as a user would: `hvdformer prepare --tokenizer bpe:8192`. For 50k
the tokenizer is trained with 50,257 ids, of which 10 MB of text fill some 47,700; the model has all 50,257, as GPT-2 has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hvdformer.config import Config, load_config
from hvdformer.data.loader import BatchLoader, Sequences
from hvdformer.data.shards import INDEX_FILE, open_shards
from hvdformer.data.standard_library import documents, prepare_standard_library
from hvdformer.tasks import causal_lm


@dataclass(frozen=True)
class Workload:
    """A model and a step. The step takes a few hundred milliseconds to seconds on a core or two."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    context_length: int  # tokens
    global_batch: int  # sequences a step
    micro_batch: int


VOCABULARIES = {"8k": 8192, "50k": 50257}
WORKLOADS = {
    "7m-8k": Workload(8192, 256, 6, 4, 256, 8, 2),  # 6,917,376 parameters
    "7m-50k": Workload(50257, 128, 3, 2, 256, 8, 2),  # 7,072,768
    "30m-8k": Workload(8192, 512, 8, 8, 256, 8, 2),  # 29,893,120
    "30m-50k": Workload(50257, 384, 6, 6, 256, 8, 2),  # 29,920,512
    "100m-8k": Workload(8192, 768, 13, 12, 512, 4, 1),  # 98,324,736
    "100m-50k": Workload(50257, 640, 14, 10, 512, 4, 1),  # 101,569,280
}
NAMES = ("default", *WORKLOADS)


def settings(name: str) -> list[str]:
    """The workload as key=value settings of hvdformer; its data is prepared if it is not there yet."""
    if name == "default":
        prepare_standard_library(causal_lm.default_cache())
        return ["model.vocab_size=257"]
    load = WORKLOADS[name]
    return [
        f"model.vocab_size={load.vocab_size}",
        f"model.width={load.width}",
        f"model.layers={load.layers}",
        f"model.heads={load.heads}",
        f"model.context_length={load.context_length}",
        f"train.global_batch={load.global_batch}",
        f"train.micro_batch={load.micro_batch}",
        f"data.path={prepare_data(load.vocab_size)}",
    ]


def prepare_data(vocab_size: int) -> Path:
    """The folder in the cache with the standard library's text, tokenized by a BPE of this many ids at most."""
    source = prepare_standard_library(causal_lm.default_cache())  # its name changes with the library
    folder = source.with_name(f"{source.name}-bpe-{vocab_size}")
    if not (folder / INDEX_FILE).is_file():
        text = source.with_name(f"{source.name}.jsonl")
        text.write_text("".join(json.dumps({"text": document}) + "\n" for _, document in documents()))
        command = [sys.executable, "-m", "hvdformer", "prepare", str(text), "--out", str(folder)]
        options = ["--tokenizer", f"bpe:{vocab_size}", "--validation-fraction", "0.05"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        text.unlink()
    return folder


def open_sequences(config: Config) -> Sequences:
    """The training split of a workload's data."""
    folder = (
        Path(config.data.path) if config.data.path else prepare_standard_library(causal_lm.default_cache())
    )
    return Sequences(open_shards(folder, "train"), config.model.context_length)


def open_loader(config: Config, rank: int, size: int) -> BatchLoader:
    """The micro-batches of one of `size` processes: the same examples as hvdformer's own ranks read."""
    from torch import device

    return BatchLoader(
        [open_sequences(config)],
        weights=[1.0],
        seed=config.train.seed,
        micro_batch=config.train.micro_batch,
        num_micro_batches=config.train.global_batch // config.train.micro_batch,
        rank=rank,
        size=size,
        document_mask=False,
        shuffle=True,
        device=device("cpu"),
    )


def load(overrides: list[str]) -> Config:
    """The settings that a rank of a benchmark was given; every choice has to be among them."""
    config = load_config(None, overrides)
    assert config.model.vocab_size is not None and config.train.precision != "auto", overrides
    return config
