"""The same config under every launcher and at several world sizes."""

import json
import os
import subprocess
import sys
from statistics import median

import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The tiny config, trained under each launcher."""
    folder = tmp_path_factory.mktemp("launchers")
    started = {}
    for launcher, np in (
        ("plain", 1),
        ("horovodrun-mpi", 2),
        ("horovodrun-gloo", 2),
        ("mpirun", 2),
        ("mpirun", 3),
    ):
        name = f"{launcher}-{np}"
        output = jobs.succeed(
            launcher, np, "train", TINY, "train.precision=fp32", "--run-dir", name, cwd=folder
        )
        started[name] = (folder / name, output)
    return started


def test_every_launcher_trains_as_many_ranks_as_it_was_asked_for(runs):
    for name, (_, output) in runs.items():
        size = int(name.rpartition("-")[2])
        assert (f"{size} ranks ({size} on this host)" if size > 1 else "1 rank,") in output, output


def test_the_controller_is_the_one_that_was_asked_for(runs):
    for name, controller in (
        ("plain-1", "Gloo"),
        ("horovodrun-mpi-2", "MPI"),
        ("horovodrun-gloo-2", "Gloo"),
        ("mpirun-3", "MPI"),
    ):
        assert f"controller {controller}" in runs[name][1]


def test_every_step_sees_the_same_examples_at_any_world_size(runs):
    seen = {
        name: [line["examples"] for line in jobs.metrics(run) if "examples" in line]
        for name, (run, _) in runs.items()
    }
    reference = seen["plain-1"]
    assert len(reference) == 20 and len(set(reference)) == 20
    assert all(examples == reference for examples in seen.values())


def test_losses_agree_to_rounding_at_any_world_size(runs):
    losses = {
        name: [line["loss"] for line in jobs.metrics(run) if "loss" in line]
        for name, (run, _) in runs.items()
    }
    reference = losses["plain-1"]
    assert reference[-1] < reference[0] - 0.5, "nothing was learnt, so nothing is compared"
    for found in losses.values():
        # Sums in another order: fp32 rounding, which 20 steps of training magnify little.
        assert found == pytest.approx(reference, rel=1e-5)


def test_the_run_folder_and_the_summary_say_what_happened(runs):
    run, output = runs["horovodrun-gloo-2"]
    assert "bits per byte" in output and "peak memory of a rank" in output and "sample:" in output
    assert "hvdformer generate" in output
    description = jobs.inspect(run, run.parent)
    assert description["step"] == 20 and description["position"] == 160 and description["world_size"] == 2
    assert len(description["weights_sha256"]) == 64
    assert description["tokens"] == 20 * 8 * 64
    validations = [line for line in jobs.metrics(run) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [10, 20]
    assert description["validation"]["bits_per_byte"] == validations[-1]["bits_per_byte"]
    assert {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "data_seconds",
    } <= set(jobs.metrics(run)[0])


def test_evaluate_gives_the_validation_of_the_end_of_training(runs):
    run, _ = runs["plain-1"]
    stored = jobs.inspect(run, run.parent)["validation"]
    for launcher, np in (("plain", 1), ("mpirun", 3)):
        output = jobs.succeed(launcher, np, "evaluate", str(run), "--json", cwd=run.parent)
        found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        assert found["sequences"] == stored["sequences"]
        assert found["validation_loss"] == pytest.approx(stored["validation_loss"], rel=1e-6)


def test_generate_continues_the_prompt_and_repeats_itself_with_the_same_seed(runs):
    run, _ = runs["plain-1"]
    command = ("generate", str(run), "--prompt", "import ", "--max-new-tokens", "40", "--top-k", "20")
    one, again, other = (
        jobs.succeed("plain", 1, *command, "--seed", seed, cwd=run.parent) for seed in ("1", "1", "2")
    )
    assert one.startswith("import ") and one == again != other


def test_a_launcher_that_horovod_does_not_hear_of_is_refused(tmp_path):
    """Several ranks must never become several runs of one rank."""
    code, output = jobs.run(
        "plain", 1, "train", TINY, "--run-dir", "run", cwd=tmp_path, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"
    )
    assert code == 2 and "torchrun started 2 processes" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()
    code, output = jobs.run(
        "plain", 1, "train", TINY, "--run-dir", "run", cwd=tmp_path, SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4",
        HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo", HOROVOD_LOCAL_RANK="0",
    )  # fmt: skip
    assert code == 2 and "srun (Slurm) started 4 processes" in output and "--mpi=pmix" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher,np", [("plain", 1), ("horovodrun-gloo", 2), ("mpirun", 2)])
def test_doctor_checks_every_collective_on_all_ranks(launcher, np, tmp_path):
    output = jobs.succeed(launcher, np, "doctor", cwd=tmp_path)
    assert "training can work here" in output
    assert f"size: {np}" in output
    assert "allreduce sum torch.float32: ok" in output


def test_doctor_as_json(tmp_path):
    report = json.loads(jobs.succeed("plain", 1, "doctor", "--json", cwd=tmp_path))
    assert report["problems"] == [] and report["horovod_built_with"]["gloo"] is True
    assert set(report["collectives"]["results"].values()) == {"ok"}


def test_threads_give_a_core_to_whoever_else_needs_it(tmp_path):
    """Two threads beside busy processes, each of which has half of a core."""
    command = (
        "train",
        TINY,
        "train.threads=2",
        "train.sample_tokens=0",
        "train.log_every=1",
        "train.steps=6",
        "optim.warmup_steps=2",
        "train.evaluate_every=0",
        "train.final_evaluate_sequences=2",
    )
    took = {}
    neighbours = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        for _ in os.sched_getaffinity(0)
    ]
    try:
        for name, environment in (("ours", {}), ("theirs", {"GOMP_SPINCOUNT": "300000"})):
            jobs.succeed("plain", 1, *command, "--run-dir", name, cwd=tmp_path, **environment)
            took[name] = median(
                [line["step_seconds"] for line in jobs.metrics(tmp_path / name) if "loss" in line]
            )
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    assert took["ours"] < took["theirs"] / 2, took
