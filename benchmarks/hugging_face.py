"""Hugging Face's Trainer on a Llama of the same shape: what most people would use instead.

    torchrun --nproc-per-node 2 -m benchmarks.hugging_face key=value ...

As users run it: a transformers model, a map-style dataset, TrainingArguments with the batch sizes, the number of steps, the
precision and otherwise its own defaults (their AdamW, clipping at 1, DDP over gloo). Shape, number of parameters, sequences
a step and micro-batch are the workload's. Of T tokens it predicts T - 1, and it shuffles in an order of its own.
Prints one JSON object from rank 0: the wall-clock time at the end of each step, and the mean loss.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.workloads import load, open_sequences
from hvdformer.config import ModelConfig
from hvdformer.data.loader import Sequences
from hvdformer.models.decoder import parameter_count
from hvdformer.models.layers import ffn_width


def llama(model: ModelConfig) -> LlamaForCausalLM:
    """transformers' Llama in the shape of hvdformer's default architecture."""
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.width,
            intermediate_size=ffn_width(model),
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads or model.heads,
            max_position_embeddings=model.context_length,
            rms_norm_eps=model.norm_epsilon,
            tie_word_embeddings=model.tie_embeddings,
            use_cache=False,
        )
    )
    ours = parameter_count(model, model.vocab_size or 0)
    theirs = sum(parameter.numel() for parameter in network.parameters())
    assert theirs == ours, f"{theirs:,} parameters there, {ours:,} here: the shapes differ"
    return network


class Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The same sequences, as Trainer takes them."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self._sequences.gather(np.array([number]))[0, :-1])
        return {"input_ids": tokens, "labels": tokens}  # the model shifts the labels itself


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.times.append(time.time())


def main(overrides: list[str]) -> None:
    config = load(overrides)
    train, size = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=llama(config.model),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=train.steps,
                per_device_train_batch_size=train.micro_batch,
                gradient_accumulation_steps=train.global_batch // (train.micro_batch * size),
                bf16=train.precision == "bf16",
                use_cpu=True,
                save_strategy="no",  # nobody else's time has a save in it
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Examples(open_sequences(config)),
            callbacks=[clock],
        )
        outcome = trainer.train()
    if trainer.is_world_process_zero():
        print(json.dumps({"times": clock.times, "loss": outcome.training_loss}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
