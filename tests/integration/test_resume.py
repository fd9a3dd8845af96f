"""Stopped in any way and started again with the same command, a run ends in the same bits as an undisturbed one."""

import shutil
import signal

import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
DROPOUT = "model.dropout=0.1"  # so that the random streams have to be resumed too
WORLDS = [("plain", 1), ("mpirun", 2), ("horovodrun-gloo", 2), ("mpirun", 3), ("horovodrun-gloo", 3)]
STEPS = 60
# fp32, whose rounding is what losses of two world sizes agree to
COMMAND = ("train", TINY, DROPOUT, f"train.steps={STEPS}", "train.sample_tokens=0", "train.precision=fp32")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nobody disturbed, made once for each launcher and size."""
    made = {}

    def run(launcher, np):
        if (launcher, np) not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            jobs.succeed(launcher, np, *COMMAND, "--run-dir", "run", cwd=folder)
            made[launcher, np] = folder / "run"
        return made[launcher, np]

    return run


def same(run, reference, step=STEPS):
    assert jobs.weights_and_optimizer(run, step) == jobs.weights_and_optimizer(reference, step)
    assert jobs.numbers(run) == jobs.numbers(reference)


@pytest.mark.parametrize("launcher,np", WORLDS)
def test_kill_9_of_all_ranks_then_the_same_command(launcher, np, undisturbed, tmp_path):
    command = jobs.command(launcher, np, *COMMAND, "--run-dir", "run")
    job = jobs.Job(command, tmp_path)
    try:
        job.wait_for("step 22/")  # between two checkpoints
        job.kill_ranks()
        assert job.wait(20) != 0
    finally:
        job.end()
    assert jobs.metrics(tmp_path / "run")[-1]["step"] < STEPS
    output = jobs.succeed(launcher, np, *COMMAND, "--run-dir", "run", cwd=tmp_path)
    assert "going on from step" in output
    same(tmp_path / "run", undisturbed(launcher, np))


@pytest.mark.parametrize("launcher,np", [("plain", 1), ("mpirun", 2), ("horovodrun-gloo", 2)])
def test_sigterm_to_one_rank_stops_all_after_the_same_step(launcher, np, undisturbed, tmp_path):
    job = jobs.Job(jobs.command(launcher, np, *COMMAND, "--run-dir", "run"), tmp_path)
    try:
        job.wait_for("step 12/")
        job.ranks()[-1].send_signal(signal.SIGTERM) if np > 1 else job.process.send_signal(signal.SIGTERM)
        assert job.wait(20) == 0, job.output
    finally:
        job.end()
    assert "the same command goes on from there" in job.output
    stopped = jobs.inspect(tmp_path / "run", tmp_path)["step"]
    assert 12 <= stopped < STEPS
    jobs.succeed(launcher, np, *COMMAND, "--run-dir", "run", cwd=tmp_path)
    same(tmp_path / "run", undisturbed(launcher, np))


def test_mpirun_hands_sigusr1_to_all_ranks(tmp_path):
    """What a batch system sends ahead of its time limit."""
    job = jobs.Job(jobs.command("mpirun", 2, *COMMAND, "--run-dir", "run"), tmp_path)
    try:
        job.wait_for("step 12/")
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 0, job.output
    finally:
        job.end()
    assert "stopped by SIGUSR1" in job.output


def test_the_second_signal_ends_at_once(tmp_path):
    job = jobs.Job(jobs.command("plain", 1, *COMMAND, "train.steps=100000", "--run-dir", "run"), tmp_path)
    try:
        job.wait_for("step 3/")
        job.process.send_signal(
            signal.SIGSTOP
        )  # so that the first cannot be served before the second is there
        job.process.send_signal(signal.SIGTERM)
        job.process.send_signal(signal.SIGINT)
        job.process.send_signal(signal.SIGCONT)
        assert job.wait(10) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    finally:
        job.end()


def test_another_world_size_goes_on_with_exactly_the_next_examples(undisturbed, tmp_path):
    reference = undisturbed("mpirun", 2)
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000060")
    output = jobs.succeed("mpirun", 3, *COMMAND, "--run-dir", "run", cwd=tmp_path)
    assert "going on from step 55" in output
    ours = [(line["step"], line["examples"]) for line in jobs.metrics(tmp_path / "run") if "examples" in line]
    theirs = [(line["step"], line["examples"]) for line in jobs.metrics(reference) if "examples" in line]
    assert ours == theirs
    losses = [
        [line["loss"] for line in jobs.metrics(run) if "loss" in line]
        for run in (tmp_path / "run", reference)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(undisturbed, tmp_path):
    reference = undisturbed("plain", 1)
    shutil.copytree(reference, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    output = jobs.succeed("plain", 1, *COMMAND, "--run-dir", "run", cwd=tmp_path)
    assert f"step-{STEPS:08d} is damaged" in output and "model.safetensors" in output
    assert f"going on from step {STEPS - 5}" in output
    same(tmp_path / "run", reference)


def test_a_complete_run_says_so_and_changes_nothing(undisturbed, tmp_path):
    reference = undisturbed("plain", 1)
    shutil.copytree(reference, tmp_path / "run")
    output = jobs.succeed("plain", 1, *COMMAND, "--run-dir", "run", cwd=tmp_path)
    assert "this run is complete" in output
    same(tmp_path / "run", reference)


def test_a_new_run_may_begin_at_a_checkpoint_of_another_and_then_goes_on_by_itself(undisturbed, tmp_path):
    command = (*COMMAND, f"train.steps={STEPS + 10}", "checkpoint.keep_last=3", "--run-dir", "longer")
    command = (*command, "--resume", str(undisturbed("plain", 1)))
    assert f"going on from step {STEPS}" in jobs.succeed("plain", 1, *command, cwd=tmp_path)
    run = tmp_path / "longer"
    assert jobs.metrics(run)[0]["step"] == STEPS + 1
    ended = jobs.weights_and_optimizer(run, STEPS + 10)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS + 10:08d}")
    assert f"going on from step {STEPS + 5}" in jobs.succeed("plain", 1, *command, cwd=tmp_path)
    assert jobs.weights_and_optimizer(run, STEPS + 10) == ended
