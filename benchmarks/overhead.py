"""What safety costs: runs with checkpoints in the background, or with comparisons of the replicas, beside runs without.

    python -m benchmarks.overhead [--repeats 5] [--steps 120] [key=value ...]

Each run is `mpirun -np 2 hvdformer train` with the default model, timed from its tenth step to its last one by the times in
metrics.jsonl, saves and all. With and without alternate, the order turns, and a ratio is taken within a repeat:

- saves: checkpoint.every=20 against none;
- saves, waited for: the same with checkpoint.background=false;
- comparisons: train.check_replicas_every=10 against none. The default is one every 100 steps, so its cost is a tenth.

Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.processes import BIN, ROOT, environment
from hvdformer.bench import machine

WARMUP_STEPS = 10
BASE = (
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.final_evaluate_sequences=2",
    "train.sample_tokens=0",
    "train.device=cpu",
)
VARIANTS = {
    "without": ("checkpoint.every=0", "train.check_replicas_every=0"),
    "saves": ("checkpoint.every=20", "train.check_replicas_every=0"),
    "saves, waited for": (
        "checkpoint.every=20",
        "train.check_replicas_every=0",
        "checkpoint.background=false",
    ),
    "comparisons": ("checkpoint.every=0", "train.check_replicas_every=10"),
}


def seconds_per_step(settings: list[str]) -> float:
    """Wall-clock time between two steps, whatever is done in it, the last step with its final save left out."""
    with tempfile.TemporaryDirectory() as name:
        command = [
            "mpirun",
            "-np",
            "2",
            "--oversubscribe",
            "--bind-to",
            "none",
            str(BIN / "hvdformer"),
            "train",
        ]
        done = subprocess.run(
            [*command, *settings, "--run-dir", f"{name}/run"],
            env=environment(1),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        lines = [json.loads(line) for line in (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][WARMUP_STEPS:-1]
    return (steps[-1]["time"] - steps[0]["time"]) / (len(steps) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=132)
    parser.add_argument("--only", nargs="*", help="variants to run, beside the one without")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    names = [name for name in VARIANTS if not arguments.only or name in ("without", *arguments.only)]
    common = [*BASE, f"train.steps={arguments.steps}", *arguments.overrides]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(arguments.repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(seconds_per_step([*common, *VARIANTS[name]]))
            print(f"repeat {repeat + 1}: {name}: {1000 * seconds[name][-1]:.1f} ms a step", flush=True)
    costs = {
        name: sorted(on / off - 1 for on, off in zip(seconds[name], seconds["without"], strict=True))
        for name in names[1:]
    }
    for name, values in costs.items():
        print(f"{name}: {statistics.median(values):+.2%} ({values[0]:+.2%} to {values[-1]:+.2%})")
    report = {
        "command": "python -m benchmarks.overhead " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "torch": torch.__version__,
        "settings": {"all": common, **{name: VARIANTS[name] for name in names}},
        "seconds_per_step": seconds,
        "cost": {name: statistics.median(values) for name, values in costs.items()},
    }
    (ROOT / "benchmarks" / "results" / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
