"""Ranks that stop, hang, leave or fail: the job ends in time, with the rank and what it was doing; and disks that fail."""

import time

import psutil
import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
TIMEOUT = 8
COMMAND = (
    "train",
    TINY,
    "train.sample_tokens=0",
    f"train.stall_timeout_seconds={TIMEOUT}",
    "--run-dir",
    "run",
)


def end_after(job, text):
    """Wait for the text, then for the end; exit code and seconds between them."""
    job.wait_for(text)
    began = time.monotonic()
    code = job.wait(120)
    return code, time.monotonic() - began


def assert_gone(ranks):
    """No process is left, but for the moment that a launcher takes to end what it started."""
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    "launcher,fault,says",
    [
        ("mpirun", "freeze:rank=1,step=7", "nothing was heard for 6 s from rank 1 on "),
        ("horovodrun-mpi", "freeze:rank=0,step=7", "rank 0 on "),
        ("horovodrun-gloo", "freeze:rank=1,step=7,phase=data", "nothing was heard for 6 s from rank 1 on "),
        ("horovodrun-gloo", "hang:rank=1,step=7,phase=data", "no progress for 6 s: stuck is rank 1 on "),
    ],
)
def test_a_stalled_rank_is_named_and_the_job_ends_in_time(launcher, fault, says, tmp_path):
    job = jobs.Job(jobs.command(launcher, 2, *COMMAND), tmp_path, HVDFORMER_FAULT=fault)
    try:
        ranks = []
        job.wait_for("step 5/")
        ranks = job.ranks()
        code, seconds = end_after(job, "step 6/")
        assert code != 0
        # Until the launcher has ended the others too; horovodrun gives them some seconds of its own.
        assert seconds < TIMEOUT + 10, f"ended after {seconds:.1f} s\n{job.output}"
        assert says in job.output and job.output.count("the job stands still") == 1, job.output
        assert_gone(ranks)
        if fault.startswith("hang"):
            assert "(last heard of in step 7, data)" in job.output
            assert "threading.Event().wait()" in job.output  # the stack of the stuck rank
            assert "waiting for the gradients of all ranks (step 7, fusion): rank 0" in job.output
    finally:
        job.end()


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
@pytest.mark.parametrize(
    "fault", ["raise:rank=1,step=7", "exit:rank=1,step=7", "kill:rank=0,step=7,phase=fusion"]
)
def test_a_rank_that_fails_ends_all_within_seconds(launcher, fault, tmp_path):
    job = jobs.Job(jobs.command(launcher, 2, *COMMAND), tmp_path, HVDFORMER_FAULT=fault)
    try:
        job.wait_for("step 5/")
        ranks = job.ranks()
        code, seconds = end_after(job, "step 6/")
        assert code != 0 and seconds < 10, job.output
        assert_gone(ranks)
        if fault.startswith("raise"):
            assert "step 7, backward: RuntimeError: asked for by HVDFORMER_FAULT" in job.output
    finally:
        job.end()


def test_work_that_only_rank_0_does_is_no_stall(tmp_path):
    """Sampling takes longer than the timeout here, while the others have nothing to do."""
    command = ("train", TINY, "train.steps=5", "train.stall_timeout_seconds=2", "train.sample_tokens=2000")
    jobs.succeed("mpirun", 2, *command, "model.context_length=32", "--run-dir", "run", cwd=tmp_path)


def test_a_save_that_fails_is_told_and_tried_again(tmp_path):
    output = jobs.succeed("mpirun", 2, *COMMAND, cwd=tmp_path, HVDFORMER_FAULT="full-disk:rank=0,step=10")
    assert "step 10  NOT SAVED, the run goes on and tries again: checkpoint of step 10" in output
    assert "No space left on device" in output
    saved = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000015", "step-00000020"]


def test_a_run_whose_last_save_fails_has_failed(tmp_path):
    code, output = jobs.run("mpirun", 2, *COMMAND, cwd=tmp_path, HVDFORMER_FAULT="full-disk:rank=0,step=20")
    assert code == 1 and output.count("checkpoint of step 20 could not be written") == 1
    assert jobs.inspect(tmp_path / "run", tmp_path)["step"] == 15


def test_a_checkpoint_damaged_on_the_way_is_found_at_the_next_start(tmp_path):
    fault = "corrupt:rank=0,step=10;kill:rank=0,step=13"
    code, _ = jobs.run(
        "plain", 1, *COMMAND, "checkpoint.background=false", cwd=tmp_path, HVDFORMER_FAULT=fault
    )
    assert code == -9
    output = jobs.succeed("plain", 1, *COMMAND, "checkpoint.background=false", cwd=tmp_path)
    assert "step-00000010 is damaged" in output and "going on from step 5" in output


def test_a_run_ends_at_its_time_limit_and_goes_on(tmp_path):
    command = (
        "train",
        TINY,
        "train.sample_tokens=0",
        "train.steps=100000",
        "optim.warmup_steps=5",
        "--run-dir",
        "run",
    )
    output = jobs.succeed("mpirun", 2, *command, "train.max_minutes=0.1", cwd=tmp_path)
    assert "stopped by train.max_minutes after step" in output
    stopped = jobs.inspect(tmp_path / "run", tmp_path)["step"]
    output = jobs.succeed("mpirun", 2, *command, "train.max_minutes=0.1", cwd=tmp_path)
    assert f"going on from step {stopped}" in output


def test_checkpoints_are_kept_as_asked(tmp_path):
    settings = (
        "train.evaluate_every=5",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every=10",
        "checkpoint.keep_best=1",
    )
    jobs.succeed("plain", 1, *COMMAND, "train.steps=30", *settings, cwd=tmp_path)
    kept = {entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()}
    losses = {
        line["step"]: line["validation_loss"]
        for line in jobs.metrics(tmp_path / "run")
        if "validation_loss" in line
    }
    # The last validation takes all sequences; the others compare among themselves.
    best = min((step for step in losses), key=losses.get)
    assert kept == {f"step-{step:08d}" for step in {10, 20, 30, best}}


@pytest.mark.parametrize(
    "value", ["kill", "melt:rank=0,step=1", "nan:rank=0,step=1,phase=save", "kill:rank=x,step=1"]
)
def test_a_fault_that_does_not_parse_is_refused(value, tmp_path):
    code, output = jobs.run("plain", 1, *COMMAND, cwd=tmp_path, HVDFORMER_FAULT=value)
    assert code == 2 and "HVDFORMER_FAULT: " in output and "Traceback" not in output


def test_a_spike_is_left_out_on_all_ranks_alike(tmp_path):
    """One rank's gradient is far too large: no rank takes that step, it is told and counted, and the run goes on."""
    settings = ("train.max_spike_sigma=8", "train.steps=40", "train.log_every=1")
    output = jobs.succeed(
        "mpirun", 2, *COMMAND, *settings, cwd=tmp_path, HVDFORMER_FAULT="spike:rank=1,step=30"
    )
    assert "step 30: gradient norm " in output
    assert output.count("is a spike; nothing is updated") == 1
    skipped = {
        line["step"]: line["skipped_steps"] for line in jobs.metrics(tmp_path / "run") if "grad_norm" in line
    }
    assert (skipped[29], skipped[30], skipped[40]) == (0, 1, 1)
