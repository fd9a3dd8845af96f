"""Kill a run at random, again and again, and see that it always ends by itself in the bits of an undisturbed one.

    python -m tests.soak --kills 100 --launcher mpirun

A run of the tiny model goes under `hvdformer launch`. SIGKILL strikes one rank or all, while they start, between two
steps or in the middle of writing a checkpoint. When a run is done before the kills are, the next one begins. Each must
end with code 0 and no hand on it; with the weights, optimizer state and metrics of the undisturbed run; and an attempt
must go on from the newest checkpoint, so that no more than the steps since that one are done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests import jobs

NP, CHECKPOINT_EVERY = 2, 5
MOMENTS = {"start": 0.15, "step": 0.5, "save": 0.35}  # shares of the kills
START_SECONDS, STEP_SECONDS = 6.0, 0.1  # of which a random part passes before the kill
MAX_STEPS = 10  # of an attempt before the kill


def soak(folder: Path, launcher: str, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Run until that many kills have struck. Prints figures after each run, and returns the last of them.

    Raises:
        AssertionError: a promise is broken.
    """
    train = (
        "train",
        str(jobs.ROOT / "configs" / "tiny.yaml"),
        f"train.steps={steps}",
        f"checkpoint.every={CHECKPOINT_EVERY}",
        "model.dropout=0.1",  # so that the random streams have to be resumed too
        "train.evaluate_every=0",
        "train.final_evaluate_sequences=8",
        "train.sample_tokens=0",
    )
    began = time.monotonic()
    jobs.succeed(launcher, NP, *train, "--run-dir", "undisturbed", cwd=folder)
    chance = random.Random(seed)
    struck: Counter[str] = Counter()
    redone: list[int] = []
    num_attempts = num_runs = 0
    figures: dict[str, Any] = {}
    while sum(struck.values()) < kills:
        num_runs += 1
        run = folder / f"run-{num_runs}"
        options = ("-np", str(NP), "--launcher", launcher, "--max-restarts", "1000", "--backoff", "0.1")
        job = jobs.Job([jobs.HVDFORMER, "launch", *options, "--", *train, "--run-dir", run.name], folder)
        try:
            seen: set[int] = set()
            while sum(struck.values()) < kills and (moment := strike(job, run, chance, seen)):
                struck[moment] += 1
            assert job.wait(600) == 0, job.output
        finally:
            job.end()
        undisturbed = folder / "undisturbed"
        assert jobs.weights_and_optimizer(run, steps) == jobs.weights_and_optimizer(undisturbed, steps)
        assert jobs.numbers(run) == jobs.numbers(undisturbed)
        attempts = [json.loads(line) for line in (run / "launch.jsonl").read_text().splitlines()]
        redone += check_attempts(run, attempts)
        num_attempts += len(attempts)
        figures = {
            "launcher": launcher,
            "seed": seed,
            "kills": sum(struck.values()),
            "moments": dict(struck),
            "runs": num_runs,
            "attempts": num_attempts,
            "steps": num_runs * steps,
            "steps_done_again": sum(redone),
            "most_done_again_at_once": max(redone),
            "checkpoint_every": CHECKPOINT_EVERY,
            "seconds": round(time.monotonic() - began),
        }
        print(json.dumps(figures), flush=True)
    return figures


def strike(job: jobs.Job, run: Path, chance: random.Random, seen: set[int]) -> str | None:
    """Wait for ranks that are not in `seen`, then for a random moment, and kill. The kind of moment; None: the job ended."""
    moment = chance.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    victims = chance.choice([[0], [1], [0, 1]])
    part, num_steps = chance.random(), chance.randint(1, MAX_STEPS)
    ranks: list[psutil.Process] = []
    while len(ranks) < NP:
        if job.process.poll() is not None:
            return None
        time.sleep(0.05)
        ranks = [rank for rank in job.ranks() if rank.pid not in seen]
    seen |= {rank.pid for rank in ranks}
    printed = len(job.output)
    if moment == "start":
        time.sleep(part * START_SECONDS)
    else:
        while len(re.findall(r"\bstep \d+/", job.output[printed:])) < num_steps:
            if not any(
                rank.is_running() for rank in ranks
            ):  # of an attempt that the kill before had ended already
                return strike(job, run, chance, seen)
            time.sleep(0.02)
        if moment == "step":
            time.sleep(part * STEP_SECONDS)
        else:
            while not any(run.glob("checkpoints/.incomplete-*")) and any(rank.is_running() for rank in ranks):
                time.sleep(0.001)
            time.sleep(part * 0.05)
    alive = [ranks[victim] for victim in victims if ranks[victim].is_running()]
    for rank in alive:
        try:
            rank.kill()
        except psutil.NoSuchProcess:
            alive = []
    return moment if alive else None


def check_attempts(run: Path, attempts: list[dict[str, Any]]) -> list[int]:
    """Each attempt must have gone on from the newest checkpoint; the steps that each failure had done again."""
    redone = []
    for number, (before, after) in enumerate(itertools.pairwise(attempts), 1):
        assert before["attempt"] == number and before["code"] != 0
        assert after["from_step"] == before["checkpoint_step"] >= before["from_step"]
        redone.append(max(0, before["last_step"] - before["checkpoint_step"]))
        assert redone[-1] <= CHECKPOINT_EVERY, attempts
    # What the ranks say themselves of where they went on; those killed in their start said nothing.
    from_steps = iter([attempt["from_step"] for attempt in attempts])
    for told in re.findall(r"going on from step (\d+)", (run / "run.log").read_text()):
        assert int(told) in from_steps, f"went on from step {told}, which is not the newest checkpoint"
    return redone or [0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--launcher", choices=["mpirun", "horovodrun-mpi", "horovodrun-gloo"], default="mpirun"
    )
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), arguments.launcher, arguments.kills, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
