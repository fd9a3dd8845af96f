"""Run tests/parallel inside real ranks, at sizes 2 to 4, over MPI and over Gloo."""

import sys

import pytest

from tests import jobs


@pytest.mark.parametrize(
    "launcher,np",
    [("mpirun", 2), ("mpirun", 3), ("mpirun", 4), ("horovodrun-gloo", 2), ("horovodrun-gloo", 3)],
)
def test_parallel_suite(launcher, np, tmp_path):
    pytest_command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--color=no",
        str(jobs.ROOT / "tests" / "parallel"),
    ]
    job = jobs.Job([*jobs.LAUNCHERS[launcher](np), *pytest_command, "--rootdir", str(jobs.ROOT)], tmp_path)
    try:
        code = job.wait(240)
    finally:
        job.end()
    assert code == 0, job.output
    assert job.output.count(" passed") == np and "skipped" not in job.output, job.output
