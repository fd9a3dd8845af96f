"""Every way to get it wrong: one clear message, the right exit code, no traceback, and every rank gone in seconds."""

import os
import shutil
import subprocess
import time

import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")


def refused(launcher, np, *arguments, cwd, says, code=2, **extra):
    """Run a command that must end with one message; the output."""
    began = time.monotonic()
    found, output = jobs.run(launcher, np, *arguments, cwd=cwd, timeout=60, **extra)
    seconds = time.monotonic() - began
    assert found == code, output
    assert output.count("hvdformer: ") == 1, f"not exactly one message:\n{output}"
    for text in [says] if isinstance(says, str) else says:
        assert text in output, output
    assert "Traceback" not in output, output
    assert seconds < 25, f"took {seconds:.0f} s"  # the start of the ranks included
    return output


@pytest.mark.parametrize("launcher,np", [("plain", 1), ("mpirun", 2), ("horovodrun-gloo", 2)])
def test_faults_in_the_config(launcher, np, tmp_path):
    says = [
        "3 faults found",
        "train.stepz: no such setting; did you mean train.steps?",
        "model.heads: found 'x'",
        "optim.learning_rate",
    ]
    refused(
        launcher, np, "train", TINY, "train.stepz=1", "model.heads=x", "optim.learning_rate=-1", "--run-dir", "run", cwd=tmp_path, says=says
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_config_that_does_not_parse(tmp_path):
    (tmp_path / "broken.yaml").write_text("train: [\n")
    refused("plain", 1, "train", "broken.yaml", cwd=tmp_path, says="does not parse as YAML")
    refused("plain", 1, "train", "missing.yaml", cwd=tmp_path, says="no such config file")


def test_more_ranks_than_micro_batches(tmp_path):
    refused("mpirun", 3, "train", TINY, "train.global_batch=2", cwd=tmp_path, says="3 ranks but")


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(
        "mpirun",
        2,
        "train",
        TINY,
        "--run-dir",
        "file/run",
        cwd=tmp_path,
        says=["file/run cannot be written", "--run-dir"],
    )


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_run_folder_at_the_start(small_disk, tmp_path):
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 65536))
    refused(
        "mpirun",
        2,
        "train",
        TINY,
        "--run-dir",
        "disk/run",
        cwd=tmp_path,
        says=["MiB of free space", "one checkpoint needs"],
    )


def test_a_disk_that_fills_in_mid_run_keeps_what_was_saved(small_disk, tmp_path):
    """Two checkpoints of 0.5 MB fit, the five that are to be kept do not: the run goes on, and has failed at its end."""
    small = ("train.steps=35", "train.final_evaluate_sequences=8", "train.sample_tokens=0")
    output = refused(
        "mpirun", 2, "train", TINY, "checkpoint.keep_last=5", *small, "--run-dir", "disk/run", cwd=tmp_path, code=1,
        says=["NOT SAVED, the run goes on", "No space left on device", "Checkpoints written before are untouched"],
    )  # fmt: skip
    saved = output.count("  saved ")
    assert saved >= 2
    assert jobs.inspect(small_disk / "run", tmp_path)["step"] == saved * 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    jobs.succeed("plain", 1, "train", TINY, "train.sample_tokens=0", "--run-dir", "run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("launcher,np", [("plain", 1), ("mpirun", 2)])
def test_the_run_folder_of_another_config(launcher, np, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    says = [
        "holds a run with another config",
        "train.steps: 30 here, 20 there",
        "model.dropout: 0.5 here, 0.0 there",
    ]
    refused(
        launcher,
        np,
        "train",
        TINY,
        "train.steps=30",
        "model.dropout=0.5",
        "--run-dir",
        "run",
        cwd=tmp_path,
        says=says,
    )


def test_resume_never_in_a_folder_with_checkpoints(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    refused("plain", 1, "train", TINY, "train.sample_tokens=0", "--run-dir", "run", "--resume", "never", cwd=tmp_path, says="holds checkpoints already")  # fmt: skip


def test_a_missing_checkpoint(tmp_path):
    refused(
        "mpirun",
        2,
        "train",
        TINY,
        "--run-dir",
        "new",
        "--resume",
        "nowhere",
        cwd=tmp_path,
        says="no such checkpoint",
    )
    for command in ("evaluate", "generate", "inspect"):
        refused("plain", 1, command, "nowhere", cwd=tmp_path, says="no such checkpoint")


@pytest.mark.parametrize("launcher,np", [("plain", 1), ("mpirun", 2)])
def test_a_checkpoint_of_another_model(launcher, np, finished, tmp_path):
    refused(
        launcher, np, "train", TINY, "model.width=64", "--run-dir", "new", "--resume", str(finished), cwd=tmp_path,
        says=["is a checkpoint of another model", "is [257, 32] there and [257, 64] here"],
    )  # fmt: skip


def test_every_checkpoint_damaged(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for weights in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-7])
    refused(
        "mpirun",
        2,
        "train",
        TINY,
        "train.sample_tokens=0",
        "--run-dir",
        "run",
        cwd=tmp_path,
        says="every checkpoint is damaged",
    )
    refused("plain", 1, "generate", "run", cwd=tmp_path, says="no whole checkpoint left")


def test_two_runs_in_one_folder(tmp_path):
    command = ("train", TINY, "train.steps=100000", "train.sample_tokens=0", "--run-dir", "run")
    job = jobs.Job(jobs.command("plain", 1, *command), tmp_path)
    try:
        job.wait_for("step 1/")
        refused("plain", 1, *command, cwd=tmp_path, says="is in use by another run")
    finally:
        job.end()


def test_data_that_is_not_there(tmp_path):
    refused(
        "mpirun",
        2,
        "train",
        TINY,
        "data.path=nowhere",
        cwd=tmp_path,
        says=["nowhere is no complete data set", "hvdformer prepare"],
    )


def test_a_prompt_for_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("x")
    refused("plain", 1, "generate", "file", cwd=tmp_path, says="no such checkpoint")


def test_two_configs(tmp_path):
    code, output = jobs.run("plain", 1, "train", "a.yaml", "b.yaml", cwd=tmp_path)
    assert code == 2 and "expected one CONFIG.yaml at most" in output


def test_a_rank_that_dies_ends_all_within_seconds(tmp_path):
    for launcher in ("mpirun", "horovodrun-mpi", "horovodrun-gloo"):
        command = ("train", TINY, "train.steps=100000", "--run-dir", launcher)
        job = jobs.Job(jobs.command(launcher, 3, *command), tmp_path)
        try:
            job.wait_for("step 3/")
            ranks = job.ranks()
            assert len(ranks) == 3
            ranks[1].kill()
            began = time.monotonic()
            assert job.wait(10) != 0
            while any(rank.is_running() and rank.status() != "zombie" for rank in ranks):
                assert time.monotonic() - began < 10, "a rank outlived the job"
                time.sleep(0.05)
        finally:
            job.end()


def test_dry_run_starts_nothing(tmp_path):
    output = jobs.succeed(
        "plain", 1, "train", str(jobs.ROOT / "configs" / "llama-1b.yaml"), "--dry-run", cwd=tmp_path
    )
    assert (
        "parameters: 1,235,8" in output
        and "memory per rank" in output
        and "steps: 50000 of 524,288 tokens" in output
    )
    assert not (tmp_path / "runs").exists()
    output = jobs.succeed("mpirun", 2, "train", TINY, "--dry-run", cwd=tmp_path)
    assert output.count("parameters:") == 1
