"""Tokens per second of the same training step, side by side and alternating: hvdformer, DDP, and the limit.

    python -m benchmarks.throughput [--np 2] [--repeats 5] [--busy] [key=value ...]

- hvdformer under horovodrun (Gloo) and under mpirun (MPI), with its default settings;
- torch DDP over gloo (benchmarks/ddp.py), the same model, data and step;
- the limit: as many single hvdformer processes side by side, each with a rank's share of the work and no
  communication at all.

Each is started as a user starts it, one thread a rank; the first steps are left out. The order turns from one repeat
to the next, and ratios are taken within a repeat, so that a machine whose speed drifts does not decide. Writes
benchmarks/results/throughput-npN.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hvdformer.config import load_config

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WARMUP_STEPS = 5
QUIET = (
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.final_evaluate_sequences=2",
    "train.sample_tokens=0",
    "checkpoint.every=0",
)
BURN_HALF_A_CORE = "import time\nwhile True:\n    end = time.perf_counter() + 0.01\n    while time.perf_counter() < end: pass\n    time.sleep(0.01)"


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **extra,
    }


def run_hvdformer(launcher: list[str], overrides: list[str]) -> float:
    """Tokens per second of one hvdformer run."""
    return together([(launcher, overrides)])


def together(commands: list[tuple[list[str], list[str]]], **extra: str) -> float:
    """Tokens per second of hvdformer runs that go on side by side, added up."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(len(commands))]
        started = [
            subprocess.Popen(
                [*launcher, str(BIN / "hvdformer"), "train", *QUIET, *overrides, "--run-dir", str(folder)],
                env=environment(**extra),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for (launcher, overrides), folder in zip(commands, folders, strict=True)
        ]
        for process in started:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(f"{process.args} ended with {process.returncode}:\n{errors}")
        total = 0.0
        for folder in folders:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "loss" in line][WARMUP_STEPS - 1 :]
            total += (lines[-1]["tokens"] - lines[0]["tokens"]) / (lines[-1]["time"] - lines[0]["time"])
        return total


def run_ddp(size: int, overrides: list[str]) -> float:
    """Tokens per second of DDP over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ddp", *overrides],
            cwd=ROOT,
            env=environment(
                RANK=str(rank),
                WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                OMP_NUM_THREADS="1",
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("the DDP run failed")
    times = json.loads(outputs[0].splitlines()[-1])["times"][WARMUP_STEPS - 1 :]
    config = load_config(None, overrides)
    return config.train.global_batch * config.model.context_length * (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--np", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--busy", action="store_true", help="with another process that burns half a core beside it"
    )
    parser.add_argument("--only", nargs="*", help="variants to run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    size = arguments.np
    overrides = [
        f"train.steps={arguments.steps}",
        "optim.warmup_steps=5",
        "train.device=cpu",
        *arguments.overrides,
    ]
    config = load_config(None, overrides)
    alone = [*overrides, f"train.global_batch={config.train.global_batch // size}"]
    mpirun = ["mpirun", "-np", str(size), "--oversubscribe", "--bind-to", "none"]
    variants: dict[str, Callable[[], float]] = {
        "limit": lambda: together([([], alone)] * size, OMP_NUM_THREADS="1"),
        "hvdformer, Gloo": lambda: run_hvdformer(["horovodrun", "--gloo", "-np", str(size)], overrides),
        "hvdformer, MPI": lambda: run_hvdformer(mpirun, overrides),
        "DDP, gloo": lambda: run_ddp(size, overrides),
    }
    variants = {name: run for name, run in variants.items() if not arguments.only or name in arguments.only}
    together([([], [*overrides, "train.steps=6"])])  # builds the default data, and fills the page cache
    burner = subprocess.Popen([sys.executable, "-c", BURN_HALF_A_CORE]) if arguments.busy else None
    results: dict[str, list[float]] = {name: [] for name in variants}
    try:
        for repeat in range(arguments.repeats):
            order = list(variants)[repeat % len(variants) :] + list(variants)[: repeat % len(variants)]
            for name in order:
                results[name].append(variants[name]())
                print(f"repeat {repeat + 1}: {name}: {results[name][-1]:,.0f} tokens/s", flush=True)
    finally:
        if burner:
            burner.kill()
    rows = summary(results)
    print(table(rows))
    target = ROOT / "benchmarks" / "results" / f"throughput-np{size}{'-busy' if arguments.busy else ''}.json"
    target.write_text(
        json.dumps(
            {
                "command": "python -m benchmarks.throughput " + " ".join(sys.argv[1:]),
                "date": time.strftime("%Y-%m-%d"),
                "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
                "torch": torch.__version__,
                "np": size,
                "settings": overrides,
                "tokens_per_second": results,
                "summary": rows,
            },
            indent=1,
        )
        + "\n"
    )


def summary(results: dict[str, list[float]]) -> list[dict[str, object]]:
    """Median and spread of each variant, and the median of its ratios within a repeat."""
    return [
        {
            "variant": name,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            **{
                f"of {other}": statistics.median(a / b for a, b in zip(values, results[other], strict=True))
                for other in ("limit", "DDP, gloo")
                if other in results
            },
        }
        for name, values in results.items()
    ]


def table(rows: list[dict[str, object]]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{v:,.0f}"
            if isinstance(v, float) and v > 100
            else f"{v:.3f}"
            if isinstance(v, float)
            else str(v)
            for v in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_name() -> str:
    try:
        return next(
            line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
