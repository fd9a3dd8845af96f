"""This rank's part of the machine: its place in the job, its device and its CPU threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from hvdformer import faults, precision
from hvdformer.config import Config
from hvdformer.distributed import comm, tuning
from hvdformer.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """What `start` found and chose for this rank."""

    world: comm.World
    device: torch.device
    threads: int


@dataclass
class Where:
    """How far this rank is, for the message if it fails, and how long each phase took."""

    step: int = 0
    phase: str = "start"
    who: str = "this process"
    _seconds: dict[str, float] = field(default_factory=dict)  # by phase
    _entered: float = field(default_factory=time.perf_counter)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note where this rank is; a drill's fault may strike here."""
        now = time.perf_counter()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._entered
        self._entered = now
        self.step, self.phase = self.step if step is None else step, phase
        faults.strike(phase, self.step)

    def take_seconds(self, *phases: str) -> dict[str, float]:
        """{"PHASE_seconds": seconds} of these phases; counting starts anew. On a GPU, until the work was queued."""
        taken = {f"{phase}_seconds": self._seconds.get(phase, 0.0) for phase in phases}
        self._seconds = {}
        return taken


def uses_gpu(device: str) -> bool:
    """Whether `train.device` means a GPU here."""
    return device != "cpu" and torch.cuda.is_available()


def start(device: str = "auto", threads: int | None = None) -> Runtime:
    """Join the job and take this rank's device and threads. Every process of the job calls it once, first of all."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device is cuda, but torch finds no GPU here. Use train.device=cpu, or see `hvdformer doctor`."
        )
    on_gpu = uses_gpu(device)
    keep_freed_memory()
    world = comm.connect(on_gpu=on_gpu)
    place = {
        "host": comm.host_name(),
        "cores": sorted(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count() * on_gpu,
    }
    places = comm.gather_json(place, "places")
    if on_gpu and any(sum(p["host"] == q["host"] for q in places) > p["gpus"] for p in places):
        raise comm.Agreed(
            f"{world.local_size} ranks on a host with {place['gpus']} GPUs: start one rank per GPU at most, "
            "or set train.device=cpu",
            UserError.exit_code,
        )
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        neighbours = [rank for rank, other in enumerate(places) if other["host"] == place["host"]]
        threads = tuning.threads_per_rank(
            [places[rank]["cores"] for rank in neighbours],
            neighbours.index(world.rank),
            tuning.usable_cores(),
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return Runtime(
        world,
        torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu"),
        torch.get_num_threads(),
    )


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_ALLOCATOR_SETTINGS = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Have malloc keep the memory of freed tensors for the next ones, unless the user has chosen an allocator.

    By default glibc takes each large tensor from the kernel and gives it back when it is freed. Each step then meets
    tens of thousands of page faults, and the kernel zeroes every page: 10 % of a step in fp32, 15 % in bf16.
    """
    if any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resolve(config: Config, device: torch.device, vocab_size: int, threads: int) -> Config:
    """The config with every choice that depended on the machine or the data filled in."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < vocab_size:
        raise UserError(
            f"model.vocab_size is {wanted} but the data's tokenizer has {vocab_size} ids: "
            f"raise it to at least {vocab_size}, or leave it out"
        )
    train: dict[str, object] = {
        "device": device.type,
        "precision": precision.resolve(config.train.precision, device),
    }
    if config.fusion.kind == "exact":
        train["threads"] = threads  # another number of threads sums in another order: it belongs to the run
    if train["precision"] == "fp16" and device.type != "cuda":
        raise UserError("train.precision=fp16 needs a GPU and there is none here: use bf16 or fp32")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": wanted or vocab_size}),
            "train": config.train.model_copy(update=train),
            "fusion": config.fusion.resolved(),
        }
    )


def seed_everything(parts: Iterable[int]) -> None:
    """Set torch's generators from a counter such as (seed, step, micro-batch), so that no generator state is kept.

    SeedSequence mixes the parts, so that neighbouring steps have unrelated streams.
    """
    torch.manual_seed(int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0]))
