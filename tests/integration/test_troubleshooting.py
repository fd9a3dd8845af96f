"""The messages of docs/troubleshooting.md, made for real: what Open MPI and Horovod say on one machine."""

import os
import re
import shutil
import sys

import pytest

from tests import jobs

PAGE = (jobs.ROOT / "docs" / "troubleshooting.md").read_text()
TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
IS_ROOT = os.geteuid() == 0
MPIRUN = str(jobs.BIN / "mpirun") if (jobs.BIN / "mpirun").exists() else shutil.which("mpirun")

# Rank 1 comes to the allreduce 9 seconds late.
LATE = """
import time, torch, horovod.torch as hvd
hvd.init()
time.sleep(9 * hvd.rank())
hvd.allreduce(torch.ones(1), name="late")
"""


def output(command, cwd, code=None, **extra):
    """Run to its end, which is a bad one unless a code is given."""
    job = jobs.Job(command, cwd, **extra)
    try:
        found = job.wait(120)
    finally:
        job.end()
    assert found != 0 if code is None else found == code, job.output
    return " ".join(job.output.split())  # Open MPI wraps its lines


def assert_told(text, *fragments):
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in:\n{text}"
        assert fragment in PAGE, f"{fragment!r} is not in docs/troubleshooting.md"


@pytest.mark.skipif(not IS_ROOT, reason="is about root")
def test_as_root(tmp_path):
    unset = ["env", "-u", "OMPI_ALLOW_RUN_AS_ROOT", "-u", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]
    found = output([*unset, "mpirun", "-np", "1", "true"], tmp_path)
    assert_told(found, "mpirun has detected an attempt to run as root")


def test_more_ranks_than_cores(tmp_path):
    found = output(["mpirun", "-np", str((os.cpu_count() or 1) + 1), "true"], tmp_path)
    assert_told(found, "There are not enough slots available in the system")


def test_without_ssh(tmp_path):
    found = output([MPIRUN, "-np", "1", "--mca", "plm_rsh_agent", "no-ssh", "true"], tmp_path)
    assert_told(
        found, 'The value of the MCA parameter "plm_rsh_agent" was set to a path that could not be found'
    )


@pytest.mark.skipif(not jobs.has("ssh"), reason="ssh is not installed")
def test_a_host_that_does_not_exist(tmp_path):
    found = output([MPIRUN, "-np", "1", "--host", "nowhere.invalid:1", "true"], tmp_path)
    assert_told(found, "Could not resolve hostname", "ORTE was unable to reliably start one or more daemons")
    found = output(["horovodrun", "-np", "1", "-H", "nowhere.invalid:1", "true"], tmp_path)
    assert_told(found, "could not connect to some hosts via ssh")


def test_torchrun(tmp_path):
    command = ["torchrun", "--no-python", "--nproc-per-node=2", jobs.HVDFORMER, "train", TINY]
    found = output(command, tmp_path)
    assert_told(found, "started 2 processes, but Horovod sees one: they would train apart")


def test_a_rank_that_is_killed(tmp_path):
    script = 'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then kill -9 $$; fi; sleep 30'
    found = output(["mpirun", "--oversubscribe", "-np", "2", "bash", "-c", script], tmp_path)
    expected = "Primary job terminated normally, but 1 process returned a non-zero exit code"
    if expected in found:  # one or the other, depending on what mpirun hears first
        assert_told(found, expected)
    else:
        assert_told(found, "noticed that process rank 1", "exited on signal 9")


def test_a_rank_that_comes_late(tmp_path):
    # Over MPI: over Gloo Horovod says nothing.
    command = [*jobs.LAUNCHERS["mpirun"](2), sys.executable, "-c", LATE]
    found = output(command, tmp_path, code=0, HOROVOD_STALL_CHECK_TIME_SECONDS="2")
    expected = "One or more tensors were submitted to be reduced, gathered or broadcasted by subset of ranks"
    assert_told(found, expected, "Missing ranks")


@pytest.mark.skipif(
    not IS_ROOT or not shutil.which("unshare"), reason="another /dev/shm takes root and unshare"
)
def test_too_little_shared_memory(tmp_path):
    small = 'mount --make-rprivate / && mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    apart = ["unshare", "--mount", "sh", "-c", small, "sh"]
    program = "from mpi4py import MPI; MPI.COMM_WORLD.barrier()"
    found = output([*apart, *jobs.LAUNCHERS["mpirun"](2), sys.executable, "-c", program], tmp_path, code=0)
    expected = "there is not enough space for /dev/shm"
    if expected in found:  # Open MPI loses this message of its own every fifth time
        assert_told(found, expected)
    else:
        assert_told(found, "ORTE_ERROR_LOG", "show_help.c")
    command = [*apart, *jobs.LAUNCHERS["horovodrun-gloo"](2), jobs.HVDFORMER, "doctor"]
    assert "/dev/shm has 2 MiB free" in output(command, tmp_path)


def test_what_is_marked_as_made_in_the_tests_is():
    """The fragments of the rows with a * are looked for by a test."""
    tests = "".join(
        path.read_text()
        for folder in ("integration", "cluster")
        for path in (jobs.ROOT / "tests" / folder).glob("*.py")
    )
    marked = [line.split("|")[1] for line in PAGE.splitlines() if re.match(r"\| .* \* \|", line)]
    fragments = [fragment for cell in marked for fragment in re.findall(r"`([^`]+)`", cell)]
    assert len(fragments) > 25
    missing = [fragment for fragment in fragments if fragment not in tests]
    assert missing == []
