"""How far `hvdformer plan` is off: against published runs of Horovod, and against runs on this machine.

    python -m benchmarks.plan_check --published            needs nothing: prints the table of docs/plan.md
    python -m benchmarks.plan_check --network              the same for benchmarks/results/network-100mbit.json
    python -m benchmarks.plan_check [--np 2 4] [--repeats 3] [--steps 25] [key=value ...]

The last one measures allreduces of several sizes under mpirun at the smallest of --np, fits latency and bandwidth to
them, trains at np 1, and predicts step time, exposed communication and bytes of every --np, each kind of fusion in
--kinds; then it trains there too, in turn, and prints prediction beside measurement. Nothing of the runs at --np goes
into the predictions. Each rank has one thread.

Where ranks fill the cores, a CPU moves the bytes in time that it would else compute in: contention is 1. Beyond that the
ranks share the cores: computing takes ranks / cores times as long, and so does a collective.
Writes benchmarks/results/plan-check.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import BIN, QUIET, ROOT, environment
from hvdformer.bench import machine
from hvdformer.plan import Cluster, Kind, Work, fit_allreduce, kinds, parse_rate, predict

# Published runs
#
# (name, parameters, bytes a gradient, images or sequences a step and GPU, of them a second on one GPU, GPUs, a node,
#  network of a node, links in it, algorithm, published efficiency, source)
#
# Parameters are those of the models' papers. One GPU: TensorFlow's benchmarks on a P100 (DGX-1, May 2017, batch 64,
# synthetic data): Inception V3 142, VGG-16 154 images/s. They have no ResNet-101: Horovod's docs/benchmarks give 1,656.82
# images/s on 16 GPUs, taken here as 16 times one. BERT-large: NVIDIA DeepLearningExamples, TensorFlow, 1 V100 32 GB,
# sequences of 128, batch 64, mixed precision: 168.63 sequences/s. The networks are those of the sources of the
# efficiencies; PCIe 3.0 x16 within the P100 nodes (assumed), NVLink of a V100 (150 GB/s one way, data sheet).
# Horovod's runs of 2017 and 2018: NCCL before 2.4 had rings only. Its fusion buffer was 64 MB.
_WARMUP_STEPS = 5
PCIE3, NVLINK2 = 15.75e9, 150e9
UBER = "Horovod README: arXiv 1802.05799"
PUBLISHED: tuple[dict[str, Any], ...] = (
    {"name": "Inception V3", "parameters": 23.8e6, "batch": 64, "rate": 142, "gpus": 512, "efficiency": 0.90},
    {
        "name": "ResNet-101",
        "parameters": 44.5e6,
        "batch": 64,
        "rate": 1656.82 / 16,
        "gpus": 512,
        "efficiency": 0.90,
    },
    {"name": "VGG-16", "parameters": 138.4e6, "batch": 64, "rate": 154, "gpus": 512, "efficiency": 0.68},
    {"name": "Inception V3", "parameters": 23.8e6, "batch": 64, "rate": 142, "gpus": 128, "efficiency": 0.90},
    {
        "name": "ResNet-101",
        "parameters": 44.5e6,
        "batch": 64,
        "rate": 1656.82 / 16,
        "gpus": 128,
        "efficiency": 0.90,
    },
    {"name": "VGG-16", "parameters": 138.4e6, "batch": 64, "rate": 154, "gpus": 128, "efficiency": 0.79},
    {
        "name": "BERT-large",
        "parameters": 336e6,
        "batch": 64,
        "rate": 168.63,
        "gpus": 256,
        "efficiency": 0.70,
        "per_node": 8,
        "bandwidth": "100Gbit",
        "intra": NVLINK2,
        "width": 2,
        "algorithm": "auto",
    },
)
FUSION_BUFFER_MIB = 64
BACKWARD_SHARE = 2 / 3
LINK_EFFICIENCY = 0.8


def published(link_efficiency: float = LINK_EFFICIENCY) -> list[dict[str, Any]]:
    """Each published run with what the model says of it: one set of constants for all of them."""
    rows = []
    for point in PUBLISHED:
        seconds = point["batch"] / point["rate"]
        work = Work(seconds, BACKWARD_SHARE * seconds, 0.0, round(point["parameters"]), None)
        width = point.get("width", 4)
        cluster = Cluster(
            size=point["gpus"],
            per_node=point.get("per_node", 4),
            bandwidth=parse_rate(point.get("bandwidth", "25Gbit")) * link_efficiency,
            intra_bandwidth=point.get("intra", PCIE3) * link_efficiency,
            algorithm=point.get("algorithm", "ring"),
        )
        kind = Kind("allreduce", (("allreduce", width, "backward"),), 8)
        # predict() counts buckets in fp32 gradients: the buffer holds twice as many of 16 bits.
        bucket = FUSION_BUFFER_MIB * 4 / width
        result = predict(kind, work, cluster, bucket, 1)
        unhidden = seconds / (seconds + result["communication_seconds"])
        rows.append(
            {
                "model": point["name"],
                "gpus": point["gpus"],
                "published": point["efficiency"],
                "predicted": result["efficiency"],
                "error": result["efficiency"] / point["efficiency"] - 1,
                "without_overlap": unhidden,
                "step_seconds_one_gpu": seconds,
                "communication_seconds": result["communication_seconds"],
                "exposed_seconds": result["exposed_communication_seconds"],
            }
        )
    return rows


def published_table() -> str:
    lines = [
        "| model | GPUs | one GPU's step | communication | of it exposed | efficiency published | predicted | error | without overlap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in published():
        lines.append(
            f"| {row['model']} | {row['gpus']} | {1000 * row['step_seconds_one_gpu']:.0f} ms "
            f"| {1000 * row['communication_seconds']:.0f} ms | {1000 * row['exposed_seconds']:.0f} ms "
            f"| {100 * row['published']:.0f} % | {100 * row['predicted']:.0f} % | {100 * row['error']:+.0f} % "
            f"| {100 * row['without_overlap']:.0f} % |"
        )
    for efficiency in (0.6, 0.7, 0.9):
        shown = ", ".join(
            f"{row['model']} on {row['gpus']} {100 * row['predicted']:.0f} %" for row in published(efficiency)
        )
        lines.append(f"\nIf links reach {efficiency:g} of nominal: {shown}.")
    return "\n".join(lines)


# Two hosts on a slow network: benchmarks/results/network-100mbit.json, measured by benchmarks.network


def network() -> list[dict[str, Any]]:
    """Each kind of that file with the model's step. Only computing is taken from it: what local_sgd's step leaves."""
    report = json.loads((ROOT / "benchmarks" / "results" / "network-100mbit.json").read_text())
    settings = dict(setting.split("=") for setting in report["settings"])
    tokens = int(settings["train.global_batch"]) * int(settings["model.context_length"])
    num_micro_batches = int(settings["train.global_batch"]) // int(settings["train.micro_batch"])
    rate = parse_rate("100mbit") * LINK_EFFICIENCY
    cluster = Cluster(size=2, per_node=1, bandwidth=rate, intra_bandwidth=rate, base_latency=0.0, cycle=0.01)
    by_name = {kind.name: kind for kind in kinds(num_micro_batches)}

    def split(fusion: str) -> tuple[Kind, int]:
        name = fusion if fusion in by_name else fusion.split(":")[0]
        every = [int(part[6:]) for part in fusion.split(":") if part.startswith("every=")]
        return by_name[name], every[0] if every else 1

    def step(kind: Kind, every: int, compute: float) -> dict[str, Any]:
        work = Work(compute, BACKWARD_SHARE * compute, 0.0, report["parameters"], None)
        return predict(kind, work, cluster, 2, every)

    measured = {entry["fusion"]: tokens / entry["tokens_per_second"] for entry in report["results"]}
    calibration = next(fusion for fusion in measured if fusion.startswith("local_sgd"))
    kind, every = split(calibration)
    compute = measured[calibration] - step(kind, every, 0.0)["step_seconds"]
    rows = []
    for fusion, seconds in measured.items():
        kind, every = split(fusion)
        found = step(kind, every, compute)
        rows.append(
            {
                "fusion": fusion,
                "bytes_sent": found["bytes_sent"],
                "predicted": found["step_seconds"],
                "measured": seconds,
                "error": found["step_seconds"] / seconds - 1,
                "is_calibration": fusion == calibration,
            }
        )
    return rows


def network_table() -> str:
    lines = ["| fusion | sent a step | step predicted | measured | error |", "|---|---|---|---|---|"]
    for row in network():
        error = "0, by which computing is known" if row["is_calibration"] else f"{100 * row['error']:+.0f} %"
        lines.append(
            f"| {row['fusion']} | {row['bytes_sent'] / 1e6:.2f} MB | {row['predicted']:.2f} s | {row['measured']:.2f} s | {error} |"
        )
    return "\n".join(lines)


# This machine

SIZES = (2**14, 2**17, 2**19, 2**21, 2**23)
KINDS = ("allreduce", "allreduce:wire=bf16", "exact", "zero1", "local_sgd")


def measure_allreduces() -> None:
    """Inside the ranks: print {bytes: median seconds} of allreduces, one at a time."""
    import horovod.torch as hvd
    import torch

    from hvdformer import runtime
    from hvdformer.distributed import comm

    here = runtime.start("cpu", 1)
    found = {}
    for nbytes in SIZES:
        tensor = torch.ones(nbytes // 4)
        seconds = []
        for _ in range(40):
            hvd.barrier()
            began = time.perf_counter()
            hvd.synchronize(hvd.allreduce_async_(tensor, name="measured", op=hvd.Sum))
            seconds.append(time.perf_counter() - began)
            tensor.fill_(1.0)
        found[nbytes] = statistics.median(seconds[5:])
    if here.world.is_first:
        print(json.dumps(found), flush=True)
    comm.disconnect()


def mpirun(size: int) -> list[str]:
    return ["mpirun", "-np", str(size), "--oversubscribe", "--bind-to", "none"]


def allreduces(size: int, cycle_ms: float) -> list[dict[str, float]]:
    """Measured allreduces at a world size, without half a cycle of waiting, which the model adds by itself."""
    done = subprocess.run(
        [*mpirun(size), sys.executable, "-m", "benchmarks.plan_check", "--inside-ranks"],
        cwd=ROOT,
        env=environment(1, HOROVOD_CYCLE_TIME=str(cycle_ms)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        {"np": size, "bytes": int(nbytes), "seconds": max(seconds - cycle_ms / 2000, 1e-5)}
        for nbytes, seconds in found.items()
    ]


def train(size: int, kind: str, steps: int, overrides: list[str]) -> dict[str, float]:
    """Medians over the steps of a run, and what its fusion keeps."""
    name, *settings = kind.split(":")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(BIN / "hvdformer"),
            "train",
            *QUIET,
            *overrides,
            f"train.steps={steps}",
            f"fusion.kind={name}",
        ]
        command += [f"fusion.{setting}" for setting in settings] + ["--run-dir", f"{folder}/run"]
        done = subprocess.run(
            [*(mpirun(size) if size > 1 else []), *command],
            env=environment(1),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{kind} at np {size} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        lines = [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    steps_logged = [line for line in lines if "loss" in line][_WARMUP_STEPS:]
    last = next(line for line in reversed(lines) if "state_bytes" in line)
    medians = {
        key: statistics.median(line[key] for line in steps_logged)
        for key in ("step_seconds", "fusion_seconds")
    }
    # Kinds that fuse now and then: what counts is the mean, over whole rounds.
    if name in ("local_sgd", "diloco"):
        medians["step_seconds"] = statistics.mean(line["step_seconds"] for line in steps_logged)
    mean_bytes = statistics.mean(line["bytes_sent"] for line in [li for li in lines if "loss" in li])
    low, _, high = statistics.quantiles((line["step_seconds"] for line in steps_logged), n=4)
    return {**medians, "low": low, "high": high, "bytes_sent": mean_bytes, "state_bytes": last["state_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--inside-ranks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--np", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan-check.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.inside_ranks:
        measure_allreduces()
    elif arguments.published:
        print(published_table())
    elif arguments.network:
        print(network_table())
    else:
        check(arguments)


def check(arguments: argparse.Namespace) -> None:
    from hvdformer.config import load_config
    from hvdformer.distributed.tuning import usable_cores
    from hvdformer.models.decoder import parameter_count

    overrides = ["train.device=cpu", "optim.warmup_steps=5", *arguments.overrides]
    config = load_config(None, overrides)
    parameters = parameter_count(config.model, 257)
    cores = usable_cores()
    cycle = 1.0  # Horovod's own, which tuning.py leaves to a Horovod that sleeps when it is idle
    smallest = min(arguments.np)
    fitted_on = allreduces(smallest, 1.0)
    latency, bandwidth = fit_allreduce(fitted_on)
    every = 5
    chosen = [kind for kind in arguments.kinds.split(",") if kind]
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for repeat in range(arguments.repeats):
        cases = [(1, "allreduce"), *((size, kind) for size in arguments.np for kind in chosen)]
        turn = repeat % len(cases)
        for size, kind in cases[turn:] + cases[:turn]:
            spelled = f"{kind}:every={every}" if kind in ("local_sgd", "diloco") else kind
            result = train(size, spelled, arguments.steps, overrides)
            runs.setdefault((size, kind), []).append(result)
            print(
                f"repeat {repeat + 1}: np {size} {kind}: {1000 * result['step_seconds']:.0f} ms a step",
                flush=True,
            )

    def median(size: int, kind: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[size, kind])

    num_micro_batches = config.train.global_batch // config.train.micro_batch
    alone = median(1, "allreduce", "step_seconds")
    fixed = median(1, "allreduce", "fusion_seconds")  # clipping and the like: every rank does all of it
    by_name = {kind.name: kind for kind in kinds(num_micro_batches)}
    rows = []
    for size in arguments.np:
        slowdown = max(1.0, size / cores)
        # The global batch is the same at every size: a rank computes its share, but clips and updates the whole model.
        share = 1 / size
        compute = (alone - fixed) * share + fixed
        window = (alone - fixed) * share * 2 / 3 / (num_micro_batches / size)
        work = Work(compute, window, 0.0, parameters, config.train.global_batch * config.model.context_length)
        cluster = Cluster(
            size=size,
            per_node=size,
            bandwidth=bandwidth / slowdown,
            intra_bandwidth=bandwidth / slowdown,
            latency=latency * slowdown,
            intra_latency=latency * slowdown,
            base_latency=0.0,
            cycle=cycle / 1000,
            contention=1.0 if size >= cores else 0.0,
        )
        for name in chosen:
            predicted = predict(
                by_name[name], work.slowed(slowdown), cluster, config.fusion.bucket_mib, every
            )
            measured = median(size, name, "step_seconds")
            state = by_name[name].state * parameters / (size if by_name[name].shared else 1)
            rows.append(
                {
                    "np": size,
                    "fusion": f"{name}:every={every}" if name == "local_sgd" else name,
                    "predicted_step_seconds": predicted["step_seconds"],
                    "measured_step_seconds": measured,
                    "step_error": predicted["step_seconds"] / measured - 1,
                    "measured_quartiles": [median(size, name, "low"), median(size, name, "high")],
                    "predicted_exposed_seconds": predicted["exposed_communication_seconds"],
                    "measured_exposed_seconds": median(size, name, "fusion_seconds") - fixed * slowdown,
                    "predicted_speedup": alone / predicted["step_seconds"],
                    "measured_speedup": alone / measured,
                    "predicted_bytes_sent": predicted["bytes_sent"],
                    "measured_bytes_sent": median(size, name, "bytes_sent"),
                    "predicted_state_bytes": state,
                    "measured_state_bytes": median(size, name, "state_bytes"),
                }
            )
    report = {
        "command": "python -m benchmarks.plan_check " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "parameters": parameters,
        "settings": overrides,
        "latency_seconds": latency,
        "bandwidth_bytes_per_second": bandwidth,
        "allreduce": fitted_on,
        "allreduce_not_used": [p for size in arguments.np if size != smallest for p in allreduces(size, 1.0)],
        "step_seconds_np_1": alone,
        "fusion_seconds_np_1": fixed,
        "rows": rows,
        "published": published(),
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def table(report: dict[str, Any]) -> str:
    lines = [
        f"np 1: {1000 * report['step_seconds_np_1']:.0f} ms a step; allreduce at np {report['allreduce'][0]['np']}: "
        f"latency {1e6 * report['latency_seconds']:.0f} us, {report['bandwidth_bytes_per_second'] / 1e9:.2f} GB/s",
        "| np | fusion | step predicted | measured (quartiles of its steps) | error | exposed predicted | measured | speed-up predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        low, high = row["measured_quartiles"]
        lines.append(
            f"| {row['np']} | {row['fusion']} | {1000 * row['predicted_step_seconds']:.0f} ms "
            f"| {1000 * row['measured_step_seconds']:.0f} ms ({1000 * low:.0f} to {1000 * high:.0f}) "
            f"| {100 * row['step_error']:+.0f} % | {1000 * row['predicted_exposed_seconds']:.0f} ms "
            f"| {1000 * row['measured_exposed_seconds']:.0f} ms "
            f"| {row['predicted_speedup']:.2f} | {row['measured_speedup']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
