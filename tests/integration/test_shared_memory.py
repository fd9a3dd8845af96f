"""What happens to a collective in memory that the ranks of a host share when a rank is late, gone, or has none."""

import sys
from pathlib import Path

import pytest

from tests import jobs

SUM = """
import os, sys, threading, time
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["HOROVOD_RANK"])
{before}
import torch, horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
hvd.init()
assert hvd.local_size() == hvd.size(), (hvd.local_size(), hvd.size())
numbers = torch.ones(2**20)
hvd.allreduce_(numbers, op=hvd.Sum, name="first")
assert (numbers == hvd.size()).all()
assert (hvd.reducescatter(numbers, op=hvd.Sum, name="part") == hvd.size() ** 2).all()
assert len(hvd.allgather(numbers, name="all")) == hvd.size() * 2**20
assert (hvd.broadcast(numbers + rank, 1, name="copy") == hvd.size() + 1).all()
{after}
print("done", rank, flush=True)
"""

# A second of sums and more, in the midst of which rank 1 is struck; then all is well, or the others hear of it.
SUMS = """
import signal, subprocess
def strike():
    time.sleep(0.1)
    print("strikes", flush=True)
    {strike}
numbers = torch.ones(2**26)
try:
    for turn in range(12):
        if turn == 2 and rank == 1:
            threading.Thread(target=strike, daemon=True).start()
        began = time.monotonic()
        hvd.allreduce_(numbers, op=hvd.Sum, name="big")
except HorovodInternalError as error:
    print("lost contact after", round(time.monotonic() - began, 1), "s:", error, flush=True)
    os._exit(0)
assert (numbers == hvd.size() ** 12).all()
"""

KILL = 'subprocess.Popen(["kill", "-KILL", str(os.getpid())])'


def finish(launcher, np, program, cwd, **extra):
    # A rank that is killed counts as one that has ended well: the launcher lets the others go on.
    rank = ["sh", "-c", '"$0" -c "$1" || [ $? = 137 ]', sys.executable, program]
    job = jobs.Job([*jobs.LAUNCHERS[launcher](np), *rank], cwd, **extra)
    try:
        code = job.wait(120)
    finally:
        job.end()
    return code, job.output


def lost(output):
    return [line for line in output.splitlines() if "lost contact after" in line]


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_it_is_what_horovod_takes_on_one_host(launcher, tmp_path):
    program = SUM.format(before="", after="hvd.shutdown()")
    code, output = finish(launcher, 2, program, tmp_path, HOROVOD_TIMELINE=str(tmp_path / "timeline"))
    assert code == 0 and output.count("done") == 2, output
    text = (tmp_path / "timeline").read_text()
    for collective in ("ALLREDUCE", "REDUCESCATTER", "ALLGATHER", "BROADCAST"):
        assert f"SHARED_MEMORY_{collective}" in text


@pytest.mark.parametrize("launcher,instead", [("mpirun", "MPI"), ("horovodrun-gloo", "GLOO")])
@pytest.mark.parametrize("without", [0, 1, 2])
def test_where_one_rank_cannot_all_send_messages(launcher, instead, without, tmp_path):
    before = f'if rank == {without}: os.environ["HOROVOD_SHARED_MEMORY"] = "0"'
    program = SUM.format(before=before, after="hvd.shutdown()")
    code, output = finish(launcher, 3, program, tmp_path, HOROVOD_TIMELINE=str(tmp_path / "timeline"))
    assert code == 0 and output.count("done") == 3, output
    text = (tmp_path / "timeline").read_text()
    for collective in ("ALLREDUCE", "REDUCESCATTER", "ALLGATHER", "BCAST"):
        assert f"{instead}_{collective}" in text
    assert "SHARED_MEMORY" not in text


def test_a_rank_that_is_gone_is_noticed_by_those_who_wait_for_it(tmp_path):
    program = SUM.format(before="", after=SUMS.format(strike=KILL))
    before = set(Path("/dev/shm").iterdir())
    heard = 0
    for attempt in range(3):  # it may be struck between two sums, and then Gloo notices
        folder = tmp_path / str(attempt)
        folder.mkdir()
        code, output = finish("horovodrun-gloo", 3, program, folder)
        assert code == 0 and len(lost(output)) == 2, output
        seconds = [float(line.split("contact after ")[1].split()[0]) for line in lost(output)]
        assert max(seconds) < 2, output
        heard += output.count("shares memory with this one")
    assert heard > 0, output
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if "horovod" in path.name]


def test_a_rank_that_stands_still_is_waited_for(tmp_path):
    wakes = 'subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])'
    strike = f"{wakes}; os.kill(os.getpid(), signal.SIGSTOP)"
    program = SUM.format(before="", after=SUMS.format(strike=strike))
    code, output = finish("mpirun", 2, program, tmp_path)
    assert code == 0 and "strikes" in output and output.count("done") == 2, output
