"""Speed of the kinds of fusion on two hosts, by the speed of the network: tokens/s, and the bytes that really cross.

    python -m benchmarks.fusion_hosts [--rates 1gbit,100mbit] [--fusion KIND[:key=value ...],...] [--steps 20] [key=value ...]

The hosts are those of benchmarks/network.py: two network namespaces of this machine, one rank on each, `horovodrun --gloo`.
Every kind trains for so many steps after the first, which is left out; kinds that fuse every few steps are measured over
whole rounds. Bytes are tx_bytes of the interface, a step, on the host that sends more, with TCP's and Horovod's own; the time
that the bytes alone take at the network's speed is beside it. Training time without validation and saving. It needs root
and says what is missing. Results are added to benchmarks/results/fusion-hosts.json: rates and kinds may be measured in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hosts import missing, network
from benchmarks.network import SETTINGS, Run, settings_of
from benchmarks.processes import ROOT
from benchmarks.throughput import versions
from hvdformer.bench import machine
from hvdformer.compare import load_configs, parse_kinds
from hvdformer.models.decoder import parameter_count

# adasum is not there: it needs MPI. every=10: what is in a round is what is measured, so that longer rounds can be told.
FUSION = "allreduce,allreduce:wire=bf16,exact,zero1,local_sgd:every=10,diloco:every=10"
RESULTS = ROOT / "benchmarks" / "results" / "fusion-hosts.json"
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="1gbit,100mbit", help="of the network, as tc writes them")
    parser.add_argument("--fusion", default=FUSION)
    parser.add_argument("--steps", type=int, default=20, help="that are measured; a multiple of `every`")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if missing():
        sys.exit("benchmarks.fusion_hosts needs, and does not find:\n  " + "\n  ".join(missing()))
    kinds = parse_kinds(arguments.fusion)
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rates": {}}
    for rate in arguments.rates.split(","):
        rows = []
        with tempfile.TemporaryDirectory() as name, network(Path(name), 2, rate) as hosts:
            for kind in kinds:
                # No validation in between: nothing but steps crosses the network.
                settings = settings_of(kind, [*arguments.overrides, "train.evaluate_every=0"])
                config = load_configs(None, settings, [kind])[0]
                run = Run(kind.folder(Path(name)), hosts)
                run.train([*settings, *kind.overrides], None, brief_steps=arguments.steps)
                found = run.result(0.0, config)
                sent = found["bytes_per_step_on_wire"]
                row = {
                    "fusion": kind.text,
                    "tokens_per_second": found["tokens_per_second"],
                    "bytes_per_step_on_wire": sent,
                    "bytes_per_step_counted": found["bytes_per_step_counted"],
                    "network_seconds_per_step": sent * 8 / bits_per_second(rate),
                    "load_average": os.getloadavg()[0],
                }
                rows.append(row)
                print(json.dumps({"rate": rate, **row}), flush=True)
        measured = {row["fusion"] for row in rows}
        kept = [row for row in report["rates"].get(rate, []) if row["fusion"] not in measured]
        report["rates"][rate] = [*kept, *rows]
    report |= {
        "command": "python -m benchmarks.fusion_hosts",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "network": "2 hosts (network namespaces of this machine), tc tbf RATE each way; horovodrun --gloo, 1 rank a host",
        "parameters": parameter_count(config.model, config.model.vocab_size or 257),
        "settings": [*SETTINGS, *arguments.overrides, "train.evaluate_every=0"],
        "steps": arguments.steps,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def bits_per_second(rate: str) -> float:
    """100mbit, as tc writes it, in bits a second."""
    unit = rate.lstrip("0123456789.")
    return float(rate.removesuffix(unit)) * BITS[unit]


def table(report: dict[str, Any]) -> str:
    """For docs/fusion.md: a row a kind, a column a rate."""
    rates = report["rates"]
    lines = [
        "| fusion | MB sent a step | " + " | ".join(f"tokens/s at {rate}" for rate in rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    first = next(iter(rates.values()))
    for row in first:
        speeds = []
        for rows in rates.values():
            speed = {other["fusion"]: other["tokens_per_second"] for other in rows}
            ratio = speed[row["fusion"]] / speed[first[0]["fusion"]] if row["fusion"] in speed else 0.0
            speeds.append(f"{speed.get(row['fusion'], 0):,.0f} ({ratio:.2f})")
        cells = [f"`{row['fusion']}`", f"{row['bytes_per_step_on_wire'] / 1e6:.2f}", *speeds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
