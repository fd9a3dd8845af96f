"""Kinds of fusion as whole runs: the same bits where they are promised, through stops and changes of world size."""

import json
import shutil
import signal

import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
STEPS = 40
COMMAND = (
    "train",
    TINY,
    "model.dropout=0.1",
    f"train.steps={STEPS}",
    "train.sample_tokens=0",
    "checkpoint.every=10",
)
EXACT = (*COMMAND, "fusion.kind=exact")


def finals(run, step=STEPS):
    """What has to be equal: weights and optimizer state, and every number that was reported."""
    timings = ("bytes_sent", "total_bytes_sent", "state_bytes")  # a rank of 8 sends more than one of 2
    numbers = [{k: v for k, v in line.items() if k not in timings} for line in jobs.numbers(run)]
    return jobs.weights_and_optimizer(run, step), numbers


@pytest.fixture(scope="module")
def exact_alone(tmp_path_factory):
    """One rank, by precision."""
    runs = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path_factory.mktemp("exact")
        jobs.succeed("plain", 1, *EXACT, f"train.precision={precision}", "--run-dir", "run", cwd=folder)
        runs[precision] = folder / "run"
    return runs


@pytest.mark.parametrize(
    "launcher,np,precision",
    [
        ("mpirun", 2, "fp32"),
        ("horovodrun-gloo", 3, "fp32"),
        ("mpirun", 4, "fp32"),
        ("mpirun", 8, "fp32"),
        ("horovodrun-gloo", 2, "bf16"),
        ("mpirun", 3, "bf16"),
    ],
)
def test_exact_gives_the_same_bits_at_every_world_size(launcher, np, precision, exact_alone, tmp_path):
    command = (*EXACT, f"train.precision={precision}", "--run-dir", "run")
    jobs.succeed(launcher, np, *command, cwd=tmp_path, OMP_NUM_THREADS="")
    assert finals(tmp_path / "run") == finals(exact_alone[precision])


@pytest.mark.parametrize("sizes", [[("mpirun", 2), ("horovodrun-gloo", 3), ("plain", 1)]], ids=["2, 3, 1"])
def test_exact_goes_on_at_other_world_sizes_with_the_same_bits(sizes, exact_alone, tmp_path):
    command = (*EXACT, "train.precision=fp32", "--run-dir", "run")
    for (launcher, np), until in zip(sizes, (13, 27, None), strict=True):
        job = jobs.Job(jobs.command(launcher, np, *command), tmp_path)
        try:
            if until:
                job.wait_for(f"step {until}/")
                job.ranks()[0].send_signal(signal.SIGTERM)
            assert job.wait() == 0, job.output
        finally:
            job.end()
    assert finals(tmp_path / "run") == finals(exact_alone["fp32"])


KINDS = {
    "bf16": ("fusion.wire=bf16",),
    "adasum": ("fusion.kind=adasum",),
    "exact": ("fusion.kind=exact",),
    "local_sgd": ("fusion.kind=local_sgd", "fusion.every=5", "train.evaluate_every=10"),
    "diloco": ("fusion.kind=diloco", "fusion.every=5", "train.evaluate_every=10"),
    "zero1": ("fusion.kind=zero1",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_each_kind_ends_in_the_same_bits(kind, tmp_path):
    launcher = "mpirun" if kind in ("adasum", "exact", "diloco") else "horovodrun-gloo"
    command = (*COMMAND, *KINDS[kind])
    jobs.succeed("mpirun" if kind == "adasum" else launcher, 2, *command, "--run-dir", "whole", cwd=tmp_path)
    job = jobs.Job(jobs.command(launcher, 2, *command, "--run-dir", "killed"), tmp_path)
    try:
        job.wait_for("step 24/")
        job.kill_ranks()
        assert job.wait(20) != 0
    finally:
        job.end()
    output = jobs.succeed(launcher, 2, *command, "--run-dir", "killed", cwd=tmp_path)
    assert "going on from step 20" in output or "going on from step 10" in output
    assert finals(tmp_path / "killed") == finals(tmp_path / "whole")


def test_a_stop_waits_for_the_fusion_of_kinds_that_train_apart(tmp_path):
    command = (*COMMAND, *KINDS["diloco"], "--run-dir", "run")
    job = jobs.Job(jobs.command("mpirun", 2, *command), tmp_path)
    try:
        job.wait_for("step 11/")
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 0, job.output
    finally:
        job.end()
    stopped = jobs.inspect(tmp_path / "run", tmp_path)["step"]
    assert stopped % 5 == 0 and 10 < stopped < STEPS


def test_a_checkpoint_of_each_kind_is_one_for_all_the_others(tmp_path):
    """Ten steps each, at changing world sizes; what two ranks do with zero1 and allreduce is the same to the bit."""
    chain = [
        ("allreduce", 2, ()),
        ("zero1", 3, KINDS["zero1"]),
        ("diloco", 2, KINDS["diloco"]),
        ("exact", 3, KINDS["exact"]),
        ("local_sgd", 3, KINDS["local_sgd"]),
    ]
    start: tuple[str, ...] = ()
    for number, (kind, np, settings) in enumerate(chain, start=1):
        command = (
            "train",
            TINY,
            f"train.steps={10 * number}",
            "train.sample_tokens=0",
            "checkpoint.every=10",
        )
        output = jobs.succeed("mpirun", np, *command, *settings, "--run-dir", kind, *start, cwd=tmp_path)
        assert number == 1 or f"going on from step {10 * number - 10}" in output
        start = ("--resume", kind)
    for kind, settings in (("allreduce", ()), ("zero1", KINDS["zero1"])):
        command = ("train", TINY, "train.steps=60", "train.sample_tokens=0", "checkpoint.every=10", *settings)
        jobs.succeed("mpirun", 2, *command, "--run-dir", f"last-{kind}", *start, cwd=tmp_path)
    assert jobs.weights_and_optimizer(tmp_path / "last-zero1", 60) == jobs.weights_and_optimizer(
        tmp_path / "last-allreduce", 60
    )


@pytest.mark.parametrize(
    "launcher,np,settings,says",
    [
        ("mpirun", 3, ("fusion.kind=adasum",), "fusion.kind=adasum cannot work here: 3 ranks"),
        ("horovodrun-gloo", 2, ("fusion.kind=adasum",), "CPU operations are Gloo"),
        (
            "plain",
            1,
            ("fusion.kind=exact", "fusion.wire=bf16"),
            "fusion.wire=bf16 has no effect with fusion.kind=exact",
        ),
        ("plain", 1, ("fusion.every=5",), "fusion.every has no effect with fusion.kind=allreduce"),
        ("plain", 1, ("fusion.kind=diloco",), "train.evaluate_every is 10 but fusion.every is 50"),
        ("plain", 1, ("fusion.outer_momentum=0.5",), "fusion.outer_momentum has no effect"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(launcher, np, settings, says, tmp_path):
    code, output = jobs.run(launcher, np, "train", TINY, *settings, "--run-dir", "run", cwd=tmp_path)
    assert code in (1, 2) and output.count(says) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["allreduce", "exact", "zero1", "local_sgd"])
def test_a_nan_ends_the_run_with_rank_and_parameter_named(kind, tmp_path):
    settings = KINDS.get(kind, ())
    launcher = "horovodrun-gloo" if kind == "zero1" else "mpirun"
    code, output = jobs.run(
        launcher,
        2,
        *COMMAND,
        *settings,
        "--run-dir",
        "run",
        cwd=tmp_path,
        HVDFORMER_FAULT="nan:rank=1,step=7",
    )
    assert code == 1
    assert output.count("step 7: the gradient is infinite or NaN, first on rank 1 on ") == 1
    assert "rank 0 on" not in output.split("first on")[1] and "other parameters" in output
    assert all(line["loss"] is not None for line in jobs.metrics(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["allreduce", "exact"])
def test_a_nan_may_be_skipped_on_all_ranks_alike(kind, tmp_path):
    settings = (*COMMAND, *KINDS.get(kind, ()), "train.nonfinite=skip", "--run-dir", "run")
    output = jobs.succeed("mpirun", 2, *settings, cwd=tmp_path, HVDFORMER_FAULT="nan:rank=1,step=7")
    assert output.count("Nothing is updated in this step") == 1
    lines = [line for line in jobs.metrics(tmp_path / "run") if "grad_norm" in line]
    assert [line["skipped_steps"] for line in lines[5:8]] == [0, 1, 1]
    assert lines[6]["grad_norm"] is None and lines[7]["grad_norm"] is not None
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and all(json.loads(line) for line in text.splitlines())


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    faults = ";".join(f"nan:rank=0,step={step}" for step in range(5, 20))
    command = (*COMMAND, "train.nonfinite=skip", "--run-dir", "run")
    code, output = jobs.run("plain", 1, *command, cwd=tmp_path, HVDFORMER_FAULT=faults)
    assert code == 1 and "step 14: " in output and "It is the 10th step in a row" in output
    shutil.rmtree(tmp_path / "run")
