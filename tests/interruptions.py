"""Interrupt a save, again and again, and see that a whole checkpoint always loads.

    python -m tests.interruptions --times 1000

A process does nothing but save, each step with weights that tell the step. Three of four times it is killed by SIGKILL at
a random instant, in the write, the sync, the rename or the removal of an old checkpoint; the others its disk, a small
tmpfs (which needs root), runs full at a random byte. Each time the newest checkpoint has to be whole, with the weights of
its step, and no older than the newest one that the process had reported as saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from hvdformer import checkpoint
from hvdformer.config import CheckpointConfig, Config, FusionConfig
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed.buckets import flatten
from hvdformer.distributed.fusion import Fusion, Share
from hvdformer.errors import RunError
from hvdformer.state import TrainState

FACTS = {"config": Config().model_dump(mode="json"), "world_size": 1, "data_fingerprint": "f", "versions": {}}
DISK_BYTES, CHECKPOINT_BYTES = 2**20, 40_000
MAX_SECONDS = 0.1  # of a process that saves, before the kill


def make_state() -> TrainState:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    fusion = Fusion(
        FusionConfig(),
        flatten(model.named_parameters(), bucket_mib=2.0),
        lambda matrices, vectors: torch.optim.AdamW([*matrices, *vectors]),
        Share(0, 1, 1, 1),
    )
    return TrainState(model, fusion)


def save(folder: Path, state: TrainState, step: int) -> None:
    state.counters.step = step
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(step)
    checkpoint.save(folder, state, Tokenizer.byte().to_json(), FACTS, CheckpointConfig(keep_last=2))


def check(folder: Path, state: TrainState) -> int:
    """The step of the newest checkpoint, which must be whole and hold that step's weights; 0: there is none."""
    path, damages = checkpoint.find_latest(folder)
    assert damages == [], damages
    if path is None:
        return 0
    step = int(checkpoint.read_state(path)["step"])
    checkpoint.load_tensors(path, checkpoint.MODEL_FILE, dict(state.weights()))
    assert all(bool((tensor == step).all()) for _, tensor in state.weights()), path
    return step


def killed_while_saving(folder: Path, state: TrainState, seconds: float) -> None:
    """Fork a process that saves step after step, and kill it after so long."""
    first = check(folder, state) + 1
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            checkpoint.clean(folder)
            for step in range(first, first + 10**6):
                save(folder, state, step)
                os.write(tell, step.to_bytes(8, "little"))
        finally:
            os._exit(1)  # saving never ends by itself
    os.close(tell)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the process that saves ended by itself: {status}"
    with os.fdopen(told, "rb") as pipe:
        saved = pipe.read()
    newest = check(folder, state)
    assert newest >= max(first - 1, int.from_bytes(saved[-8:], "little")), (newest, first, saved[-8:])


def full_while_saving(disk: Path, state: TrainState, chance: random.Random) -> bool:
    """Save on a disk with a random number of bytes left. Whether it ran full."""
    folder = disk / "checkpoints"
    before = check(folder, state)
    filler = disk / "filler"
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize
    filler.write_bytes(b"x" * (free - chance.randrange(CHECKPOINT_BYTES)))
    try:
        save(folder, state, before + 1)
        is_full = False
    except RunError as error:
        assert "No space left on device" in str(error)
        is_full = True
    filler.unlink()
    assert check(folder, state) == before + (not is_full)
    return is_full


def interrupt(folder: Path, times: int, seed: int) -> dict[str, int]:
    """Interrupt that many saves; how many in which way."""
    torch.set_num_threads(1)  # a fork of a process with more of them would hang
    chance, state = random.Random(seed), make_state()
    disk = folder / "disk"
    disk.mkdir()
    (folder / "checkpoints").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    has_disk = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    counts: Counter[str] = Counter()
    try:
        if has_disk:
            save(disk / "checkpoints", state, 1)
        while sum(counts.values()) < times:
            if has_disk and chance.random() < 0.25:
                counts["disk full"] += full_while_saving(disk, state, chance)
            else:
                killed_while_saving(folder / "checkpoints", state, chance.uniform(0, MAX_SECONDS))
                counts["killed"] += 1
    finally:
        if has_disk:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = interrupt(Path(folder), arguments.times, arguments.seed)
        last = max(
            (int(path.name.removeprefix("step-")) for path in Path(folder).glob("checkpoints/step-*")),
            default=0,
        )
    json.dump({**counts, "saves": last, "seconds": round(time.monotonic() - began)}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
