"""benchmarks/gpu.sh and what it runs, as far as they go without a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import jobs
from tests.gpu import test_gpu

SCRIPT = str(jobs.ROOT / "benchmarks" / "gpu.sh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run benchmarks/gpu.sh itself")
def test_without_a_gpu_it_says_so_once_and_ends_with_2(tmp_path):
    done = subprocess.run(
        [SCRIPT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=jobs.environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "no NVIDIA GPU here" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="what should be missing is here")
def test_with_a_gpu_but_nothing_else_it_names_all_that_is_missing(tmp_path):
    """A stand-in for nvidia-smi that lists a GPU; torch finds none, and no nvcc is on the PATH."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA Test (UUID: GPU-0)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for program in ("env", "bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    environment = jobs.environment(PYTHON=sys.executable, PATH=str(tmp_path))
    environment.pop("CUDA_HOME", None)
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "a torch in" in done.stderr
    assert "nvcc" in done.stderr or Path("/usr/local/cuda/bin/nvcc").exists()


@pytest.mark.skipif(not jobs.has("shellcheck"), reason="shellcheck is not installed")
def test_the_script_passes_shellcheck():
    done = subprocess.run(
        ["shellcheck", SCRIPT], capture_output=True, text=True, env=jobs.environment(), check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_measurement_runs_on_a_cpu(tmp_path):
    """The same code as on a GPU, at sizes that take seconds."""
    out = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--small",
        "--rounds",
        "2",
        "--steps",
        "2",
    ]
    job = jobs.Job([*command, "--out", str(out)], tmp_path, PYTHONPATH=str(jobs.ROOT))
    try:
        assert job.wait(240) == 0, job.output
    finally:
        job.end()
    report = json.loads(out.read_text())
    assert max(report["matrix_product_tflops_bf16"].values()) > 0
    variants = {row["variant"]: row for row in report["variants"]}
    assert list(variants) == ["plain PyTorch", "hvdformer", "DDP", "hvdformer train, whole program"]
    for row in variants.values():
        low, high = row["tokens_per_second_min_max"]
        assert 0 < low <= row["tokens_per_second"] <= high
        # MFU is tokens/s in units of the peak: no more than that.
        flops = row["tokens_per_second"] * report["flops_per_token"]
        assert row["mfu"] == pytest.approx(flops / max(report["matrix_product_tflops_bf16"].values()) / 1e12)
    assert variants["plain PyTorch"]["overhead_over_plain"] == 0
    assert report["waits_for_the_gpu_in_a_step"] is None
    assert "| hvdformer |" in job.output and "MFU" in job.output


def test_the_tests_for_a_gpu_skip_with_the_reason(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-rs",
        "-q",
        "-p",
        "no:cacheprovider",
        "--color=no",
    ]
    job = jobs.Job(
        [
            *command,
            "--rootdir",
            str(jobs.ROOT),
            "-c",
            str(jobs.ROOT / "setup.cfg"),
            str(jobs.ROOT / "tests" / "gpu"),
        ],
        tmp_path,
    )
    try:
        assert job.wait(120) == 0, job.output
    finally:
        job.end()
    assert "torch finds no NVIDIA GPU here" in job.output and " passed" not in job.output


@pytest.mark.parametrize("np", [1, 2])
def test_the_collectives_that_are_tested_on_gpus_are_right_on_cpus(np, tmp_path):
    """The same program, so that it is the GPU which is tested there."""
    launcher = jobs.LAUNCHERS["mpirun" if np > 1 else "plain"](np)
    job = jobs.Job(
        [*launcher, sys.executable, "-c", test_gpu.COLLECTIVES, "cpu"], tmp_path, PYTHONPATH=str(jobs.ROOT)
    )
    try:
        assert job.wait(120) == 0, job.output
    finally:
        job.end()
    assert job.output.count("all collectives are right") == np


def test_the_step_that_is_watched_for_waits_runs_on_a_cpu(tmp_path):
    shutil.copytree(jobs.ROOT / "configs", tmp_path / "configs")
    job = jobs.Job([sys.executable, "-c", test_gpu.WAITS, "cpu", "bf16"], tmp_path, PYTHONPATH=str(jobs.ROOT))
    try:
        assert job.wait(120) == 0, job.output
    finally:
        job.end()
    assert "waits []" in job.output
