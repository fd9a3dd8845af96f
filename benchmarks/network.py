"""Kinds of fusion on a slow network: time and bytes to the same validation loss, with the bytes counted on the wire.

    python -m benchmarks.network [--rate 100mbit] [--target-loss X] [--fusion KIND[:key=value ...],...] [key=value ...]

Two network namespaces of this machine are the two hosts: each has its own name, hosts file, shared memory and one end
of a virtual cable, whose sending side `tc tbf` slows down to --rate; `horovodrun --gloo` starts one rank on each over
ssh. Every kind gets the same model, data and learning-rate schedule, and is stopped once its validation loss is at or
below the target, so the time is that until the first validation that is; those of --brief run for a few steps, for
speed and bytes only. Time is that of training, without validation and saving. What is sent is the interface's
tx_bytes on the host that sent more, and beside it what the fusion counts itself (`total_bytes_sent`).

It needs Linux, root, iproute2 (ip, tc) with the kernel's tbf, util-linux (nsenter, unshare) and openssh (ssh, sshd,
ssh-keygen), says what is missing, and takes down what it set up. Writes benchmarks/results/network-RATE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts, end, missing, network
from benchmarks.processes import BIN, ROOT
from benchmarks.throughput import versions
from hvdformer.bench import machine
from hvdformer.compare import Kind, load_configs, parse_kinds
from hvdformer.config import Config
from hvdformer.metrics import read_metrics
from hvdformer.models.decoder import parameter_count

SETTINGS = (
    "model.context_length=128",
    "model.width=256",
    "model.heads=4",
    "train.steps=600",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.device=cpu",
    "train.threads=1",
    "optim.learning_rate=1.5e-3",  # better than the default 3e-3 for allreduce and diloco alike
    "train.log_every=1",
    "train.evaluate_every=20",
    "train.evaluate_sequences=256",
    "checkpoint.every=0",
)
EVERY = 110
FUSION = (
    "allreduce",
    "allreduce:wire=bf16",
    f"local_sgd:every={EVERY}",
    f"diloco:every={EVERY}:outer_momentum=0.5",  # 0.9, the default, overshoots in as few rounds as these
    "zero1",
    "exact",
)
BRIEF_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="100mbit", help="of the network, as tc writes it")
    parser.add_argument("--target-loss", type=float, default=2.15)
    parser.add_argument(
        "--fusion", default=",".join(FUSION), help="the first one is what the others are compared with"
    )
    parser.add_argument("--brief", default="zero1,exact", help=f"kinds that run for {BRIEF_STEPS} steps only")
    parser.add_argument(
        "--out", type=Path, help="of the results  [default: benchmarks/results/network-RATE.json]"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if missing():
        sys.exit("benchmarks.network needs, and does not find:\n  " + "\n  ".join(missing()))
    kinds = parse_kinds(arguments.fusion)
    overrides = {kind.text: settings_of(kind, arguments.overrides) for kind in kinds}
    configs = {kind.text: load_configs(None, overrides[kind.text], [kind])[0] for kind in kinds}
    results = []
    with tempfile.TemporaryDirectory() as name, network(Path(name), 2, arguments.rate) as hosts:
        for kind in kinds:
            is_brief = kind.text in arguments.brief.split(",")
            run = Run(kind.folder(Path(name)), hosts)
            run.train([*overrides[kind.text], *kind.overrides], None if is_brief else arguments.target_loss)
            # Others on the machine take time from the ranks that compute, less so from those that wait for the network.
            busy = {"load_average": os.getloadavg()[0]}
            results.append(
                {"fusion": kind.text, **busy, **run.result(arguments.target_loss, configs[kind.text])}
            )
            print(json.dumps(results[-1]), flush=True)
    config = configs[kinds[0].text]
    report = {
        "command": "python -m benchmarks.network " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "network": f"2 hosts (network namespaces of this machine), tc tbf {arguments.rate} each way",
        "launcher": "horovodrun --gloo, 1 rank a host",
        "parameters": parameter_count(config.model, config.model.vocab_size or 257),
        "settings": [*SETTINGS, *arguments.overrides],
        "target_loss": arguments.target_loss,
        "results": results,
    }
    target = arguments.out or ROOT / "benchmarks" / "results" / f"network-{arguments.rate}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def settings_of(kind: Kind, overrides: list[str]) -> list[str]:
    """Only a fused model can be validated: kinds whose ranks train apart are validated after each fusion."""
    every = [setting.removeprefix("fusion.every=") for setting in kind.overrides if "every=" in setting]
    return [*SETTINGS, *(f"train.evaluate_every={steps}" for steps in every), *overrides]


# A run


@dataclass
class Run:
    """A run on the two hosts, with what the network had carried whenever a step was logged."""

    folder: Path
    hosts: Hosts
    sent: dict[int, int] = field(default_factory=dict)  # by step
    wall_seconds: float = 0.0

    def train(self, overrides: list[str], target_loss: float | None, brief_steps: int = BRIEF_STEPS) -> None:
        """Train until the target is reached, or without one for a few steps."""
        log = self.folder.with_suffix(".log")
        command = ["horovodrun", "--gloo", "--network-interfaces", "eth0", "-np", "2", "-H"]
        command += [",".join(f"{name}:1" for name in self.hosts.names), str(BIN / "hvdformer"), "train"]
        began = time.monotonic()
        job = self.hosts.start(
            self.hosts.names[0], *command, *overrides, "--run-dir", str(self.folder), log=log
        )
        is_done = False
        try:
            while job.poll() is None and not is_done:
                time.sleep(0.02)
                metrics = read_metrics(self.folder)
                steps = [record["step"] for record in metrics if "loss" in record]
                if steps and steps[-1] not in self.sent:
                    self.sent[steps[-1]] = self.hosts.sent()
                losses = [record["validation_loss"] for record in metrics if "validation_loss" in record]
                if target_loss is None:
                    is_done = bool(steps and steps[-1] > brief_steps)
                else:
                    is_done = bool(losses and losses[-1] <= target_loss)
        finally:
            end(job)
            self.hosts.end_sessions()
        self.wall_seconds = time.monotonic() - began
        if job.returncode and not is_done:
            sys.exit(f"{' '.join(command)} ended with {job.returncode}:\n{log.read_text()[-4000:]}")

    def result(self, target_loss: float, config: Config) -> dict[str, Any]:
        """Speed, bytes a step on the wire and as counted, and what it took to the target."""
        metrics = read_metrics(self.folder)
        every = config.fusion.resolved().every or 1
        steps = {record["step"]: record for record in metrics if "loss" in record}
        validations = [record for record in metrics if "validation_loss" in record]
        # Whole rounds, from the end of the first one; the first step is left out for its warm-up.
        marks = [step for step in sorted(self.sent) if step % every == 0]
        first, last = (marks[0] if len(marks) > 1 else min(self.sent)), marks[-1]
        on_wire = (self.sent[last] - self.sent[first]) / (last - first)
        counted = sum(steps[step]["bytes_sent"] for step in range(first + 1, last + 1)) / (last - first)
        seconds = steps[last]["train_seconds"] - steps[first]["train_seconds"]
        found = next((record for record in validations if record["validation_loss"] <= target_loss), None)
        return {
            "steps": max(steps),
            "tokens_per_second": (steps[last]["tokens"] - steps[first]["tokens"]) / seconds,
            "bytes_per_step_on_wire": on_wire,
            "bytes_per_step_counted": counted,
            "target": found
            and {
                "step": found["step"],
                "validation_loss": found["validation_loss"],
                "train_seconds": found["train_seconds"],
                "bytes_on_wire": on_wire * found["step"],
                "bytes_counted": found["total_bytes_sent"],
            },
            "validation": [[record["step"], record["validation_loss"]] for record in validations],
            "training_loss": [[step, steps[step]["loss"]] for step in sorted(steps) if step % 10 == 0],
            "wall_seconds": self.wall_seconds,
        }


def table(report: dict[str, Any]) -> str:
    """For the README: each kind beside the first."""
    lines = [
        f"{report['parameters']:,} parameters, {report['network']}; target: validation loss {report['target_loss']}",
        "| fusion | tokens/s | MB sent a step: on the wire | as counted | step, time to target | sent until then | sooner | of the bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = report["results"][0]["target"]
    for row in report["results"]:
        cells = [
            row["fusion"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['bytes_per_step_on_wire'] / 1e6:.3f}",
            f"{row['bytes_per_step_counted'] / 1e6:.3f}",
        ]
        if (found := row["target"]) is None:
            cells += [f"not reached in {row['steps']} steps", "", "", ""]
        else:
            cells += [
                f"{found['step']}, {found['train_seconds']:.0f} s",
                f"{found['bytes_on_wire'] / 1e6:,.0f} MB",
                f"{base['train_seconds'] / found['train_seconds']:.1f} x" if base else "",
                f"1/{base['bytes_on_wire'] / found['bytes_on_wire']:.1f}" if base else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
