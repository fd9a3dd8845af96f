"""What a run says of itself when it begins and ends."""

from __future__ import annotations

import platform
import signal
from pathlib import Path
from typing import Any

import torch

import hvdformer
from hvdformer import runtime
from hvdformer.config import Config
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed import comm
from hvdformer.generate import generate
from hvdformer.metrics import duration
from hvdformer.models.decoder import Decoder
from hvdformer.state import TrainState
from hvdformer.tasks.causal_lm import Examples

TIME_IS_UP = signal.SIGALRM  # stands for train.max_minutes among the signals that stop a run


def versions() -> dict[str, str]:
    """The versions that decide what a run computes."""
    return {
        "hvdformer": hvdformer.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "horovod": comm.horovod_version(),
    }


def opening(
    config: Config,
    run_dir: Path,
    here: runtime.Runtime,
    model: torch.nn.Module,
    examples: Examples,
    step: int,
) -> list[str]:
    """The lines that say what is about to run."""
    world, train = here.world, config.train
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks ({world.local_size} on this host)"
    chosen = ", ".join(
        f"{name}={value}" for name, value, _ in world.choices if not name.startswith("HOROVOD_CROSS")
    )
    lines = [
        f"hvdformer {hvdformer.__version__}: {ranks}, {here.device.type}, {here.threads} threads a rank, "
        f"{train.precision}, controller {world.controller}, CPU operations {world.operations}",
        f"chosen for Horovod here: {chosen or 'nothing, all of it was set already'}",
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"data: {sum(s.shards.num_tokens for s in examples.train):,} tokens to train on",
        f"{train.steps} steps of {train.global_batch} x {config.model.context_length} tokens in micro-batches of "
        f"{train.micro_batch}; run folder {run_dir}",
    ]
    if step == train.steps:
        lines.append(
            f"this run is complete at step {step}: nothing is left to train. For another run choose a new --run-dir."
        )
    elif step:
        lines.append(f"going on from step {step}")
    return lines


def closing(
    config: Config,
    run_dir: Path,
    state: TrainState,
    validation: dict[str, Any] | None,
    peaks: list[int],
    signalled: int,
) -> list[str]:
    """The closing summary."""
    counters = state.counters
    lines = [
        f"{counters.step} steps, {counters.tokens:,} tokens in {duration(counters.train_seconds)} of training; "
        f"peak memory of a rank {max(peaks) / 2**20:,.0f} MiB"
    ]
    if counters.step < config.train.steps:
        by = f" by {signal.Signals(signalled).name}" if signalled else ""
        by = " by train.max_minutes" if signalled == TIME_IS_UP else by
        lines.append(
            f"stopped{by} after step {counters.step} of {config.train.steps}, saved; the same command goes on from there"
        )
        return lines
    if validation is not None:
        lines.append(
            f"validation loss {validation['validation_loss']:.4f}, {validation['bits_per_byte']:.3f} bits per byte"
        )
    lines.append(f"checkpoint: {run_dir / 'checkpoints' / f'step-{counters.step:08d}'}")
    lines.append(f"sample from it: hvdformer generate {run_dir} --prompt {config.train.sample_prompt!r}")
    return lines


def sample(config: Config, model: Decoder, tokenizer: Tokenizer, device: torch.device) -> str:
    """A sample of text from the trained model."""
    text = generate(
        model,
        tokenizer,
        config.train.sample_prompt,
        max_new_tokens=config.train.sample_tokens,
        temperature=0.7,
        seed=config.train.seed,
        device=device,
    )
    return f"sample:\n{config.train.sample_prompt}{text}"
