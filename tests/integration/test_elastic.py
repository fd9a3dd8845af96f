"""Elastic training in place: ranks are killed, freeze and join, and the run stays the same run."""

import contextlib
import json
import os
import socket
import sys
import time

import psutil
import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
SETTINGS = (
    "train",
    TINY,
    "train.sample_tokens=0",
    "train.final_evaluate_sequences=8",
    "model.dropout=0.1",
    "train.log_every=1",
)
HOSTS = ("localhost", "127.0.0.1", socket.gethostname())  # Horovod takes each name for a host of its own


# Rank 1 goes while rank 0 hands over one tensor after the other, which all wait for rank 1.
LOSE_CONTACT = """
import os, time, torch, horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
hvd.init()
if hvd.rank() == 1:
    time.sleep(1)
    os._exit(0)
handles = []
try:
    while True:
        handles.append(hvd.allreduce_async(torch.ones(4), name=f"tensor {len(handles)}", op=hvd.Sum))
        time.sleep(1e-4 * (len(handles) > 500))
except HorovodInternalError:
    pass
for handle in handles:
    try:
        hvd.synchronize(handle)
    except HorovodInternalError:
        continue
    raise SystemExit("a tensor was reduced")
print("every one of", len(handles), "tensors is answered")
"""


def elastic(cwd, *arguments, np=3, options=()):
    """horovodrun with a host discovery script that prints the file `hosts`, which a test may change."""
    (cwd / "hosts").write_text("".join(f"{name}:1\n" for name in HOSTS[:np]))
    script = cwd / "discover.sh"
    script.write_text(f"#!/bin/sh\ncat {cwd}/hosts\n")
    os.chmod(script, 0o755)
    options = ("--min-np", "1", "--max-np", "3", "--host-discovery-script", str(script), *options)
    launcher = ["horovodrun", "--gloo", "--network-interfaces", "lo", "-np", str(np), *options]
    return [*launcher, jobs.HVDFORMER, *SETTINGS, *arguments, "--run-dir", "run"]


def finish(command, cwd, **extra):
    job = jobs.Job(command, cwd, **extra)
    try:
        assert job.wait(180) == 0, job.output
        return job.output
    finally:
        job.end()


def sizes(output):
    """World sizes of the run, one after the other."""
    return [int(line.split(": ")[1].split()[0]) for line in output.splitlines() if "hvdformer 0." in line]


def seconds_to(run, step):
    """Between the ends of this step and the one before."""
    times = {line["step"]: line["time"] for line in jobs.metrics(run) if "time" in line}
    return times[step] - times[step - 1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run at np 2 that nobody disturbs, 150 steps; its state and metrics at 30 are those of a run of 30."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    runs = {}
    for steps in (30, 150):
        jobs.succeed(
            "mpirun",
            2,
            *SETTINGS,
            "fusion.kind=exact",
            f"train.steps={steps}",
            "--run-dir",
            str(steps),
            cwd=cwd,
        )
        runs[steps] = cwd / str(steps)
    return runs


def assert_same(run, other, steps):
    """The same weights, optimizer state and metrics, but for what depends on the number of ranks."""
    assert jobs.weights_and_optimizer(run, steps) == jobs.weights_and_optimizer(other, steps)
    assert losses(run) == losses(other)


def losses(run):
    of_ranks = {"bytes_sent", "total_bytes_sent", "state_bytes"}
    return [{k: v for k, v in line.items() if k not in of_ranks} for line in jobs.numbers(run)]


@pytest.mark.parametrize(
    "fault,expected_sizes",
    [
        ("kill:rank=0,step=12", [3, 2]),
        ("kill:rank=2,step=12,phase=update;kill:rank=0,step=18,phase=fusion", [3, 2, 1]),
        ("kill:rank=1,step=20,phase=evaluation", [3, 2]),
        ("kill:rank=0,step=15,phase=save", [3, 2]),
    ],
)
def test_the_others_go_on_in_place_with_the_same_bits(fault, expected_sizes, undisturbed, tmp_path):
    output = finish(elastic(tmp_path, "fusion.kind=exact", "train.steps=30"), tmp_path, HVDFORMER_FAULT=fault)
    assert sizes(output) == expected_sizes
    assert_same(tmp_path / "run", undisturbed[30], 30)


def test_a_rank_that_is_killed_and_one_that_joins_leave_the_bits_alone(undisturbed, tmp_path):
    """The host of the killed rank comes back after some seconds, and a process on it joins."""
    command = elastic(
        tmp_path,
        "fusion.kind=exact",
        "train.steps=150",
        options=("--blacklist-cooldown-range", "1", "2"),
    )
    output = finish(command, tmp_path, HVDFORMER_FAULT="kill:rank=1,step=12")
    assert sizes(output)[:3] == [3, 2, 3]
    assert "hosts have come or gone: connecting anew" in output
    assert_same(tmp_path / "run", undisturbed[150], 150)
    assert seconds_to(tmp_path / "run", 12) < 5  # 0.6 on a quiet machine


def test_a_host_can_be_taken_away(undisturbed, tmp_path):
    job = jobs.Job(elastic(tmp_path, "fusion.kind=exact", "train.steps=150"), tmp_path)
    try:
        job.wait_for("step 5/")
        (tmp_path / "hosts").write_text(f"{HOSTS[0]}:1\n{HOSTS[2]}:1\n")
        assert job.wait(180) == 0, job.output
    finally:
        job.end()
    assert "has been removed from elastic job" in job.output
    assert sizes(job.output) == [3, 2]
    assert_same(tmp_path / "run", undisturbed[150], 150)


def shared_slots(job):
    """Slots of a MiB, two a rank, in the memory that each rank shares with the others."""
    shared = []
    for rank in job.ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            maps = rank.memory_maps(grouped=False)
            shared += [line.size // 2**20 for line in maps if line.path.startswith("/memfd:horovod")]
    return shared


def test_ranks_of_one_host_share_memory_anew_when_one_is_taken_away(undisturbed, tmp_path):
    command = elastic(tmp_path, "fusion.kind=exact", "train.steps=150")
    (tmp_path / "hosts").write_text("localhost:3\n")
    job = jobs.Job(command, tmp_path)
    try:
        job.wait_for("step 5/")
        assert shared_slots(job) == [6, 6, 6]
        (tmp_path / "hosts").write_text("localhost:2\n")
        job.wait_for("2 ranks (2 on this host)")
        while shared_slots(job) != [4, 4]:
            assert job.process.poll() is None, f"{shared_slots(job)}\n{job.output}"
            time.sleep(0.02)
        assert job.wait(180) == 0, job.output
    finally:
        job.end()
    assert "3 ranks (3 on this host)" in job.output and "2 ranks (2 on this host)" in job.output
    assert_same(tmp_path / "run", undisturbed[150], 150)


def test_a_frozen_rank_is_taken_out_and_named(undisturbed, tmp_path):
    command = elastic(tmp_path, "fusion.kind=exact", "train.steps=30", "train.stall_timeout_seconds=8")
    output = finish(command, tmp_path, HVDFORMER_FAULT="freeze:rank=1,step=12")
    assert "nothing was heard for 6 s from rank 1 on " in output
    assert sizes(output) == [3, 2]
    assert jobs.weights_and_optimizer(tmp_path / "run", 30) == jobs.weights_and_optimizer(undisturbed[30], 30)


@pytest.mark.parametrize(
    "fault,settings,message",
    [
        (
            "hang:rank=2,step=12",
            ("fusion.kind=exact", "train.stall_timeout_seconds=8"),
            "another rank is gone, and rank 2 on ",
        ),
        (  # as if it waited for the others
            "hang:rank=0,step=12,phase=fusion",
            ("fusion.kind=local_sgd", "fusion.every=5"),
            "another rank is gone, and rank 0 on ",
        ),
        (
            "deadlock:rank=0,step=12",
            ("fusion.kind=exact", "train.stall_timeout_seconds=8"),
            "Timeout (0:00:08)!",
        ),
    ],
)
def test_a_rank_that_does_not_notice_that_another_is_gone_ends_itself(fault, settings, message, tmp_path):
    """Otherwise the others would wait for it, once they have connected anew."""
    output = finish(
        elastic(tmp_path, "train.steps=15", *settings),
        tmp_path,
        HVDFORMER_FAULT=f"kill:rank=1,step=12;{fault}",
    )
    assert message in output and "in strike" in output  # the stack
    assert sizes(output) == [3, 1]
    steps = [line["step"] for line in jobs.metrics(tmp_path / "run") if "grad_norm" in line]
    assert steps == list(range(1, 16))


@pytest.mark.parametrize("settings", [("fusion.kind=zero1",), ("fusion.kind=local_sgd", "fusion.every=5")])
def test_kinds_whose_state_is_lost_with_a_rank_go_back_to_the_checkpoint(settings, tmp_path):
    command = elastic(tmp_path, "train.steps=30", "train.global_batch=12", *settings)
    output = finish(command, tmp_path, HVDFORMER_FAULT="kill:rank=1,step=13")
    assert sizes(output) == [3, 2] and "going on from step 10" in output
    steps = [line["step"] for line in jobs.metrics(tmp_path / "run") if "grad_norm" in line]
    assert steps == list(range(1, 31))


def test_zero1_saves_before_its_ranks_change(tmp_path):
    """Its state is shared out over the ranks, but none of it is lost when a host is taken away."""
    job = jobs.Job(elastic(tmp_path, "fusion.kind=zero1", "train.steps=100", "checkpoint.every=0"), tmp_path)
    try:
        job.wait_for("step 5/")
        (tmp_path / "hosts").write_text(f"{HOSTS[0]}:1\n{HOSTS[2]}:1\n")
        assert job.wait(180) == 0, job.output
    finally:
        job.end()
    assert sizes(job.output) == [3, 2] and "going on from step " in job.output


def test_horovod_answers_whoever_waits_when_contact_is_lost(tmp_path):
    """As published it hangs: its thread lets go of tensors, for which it needs Python's lock, with a lock of its own."""
    command = [*jobs.LAUNCHERS["horovodrun-gloo"](2), sys.executable, "-c", LOSE_CONTACT]
    assert "tensors is answered" in finish(command, tmp_path)


def test_cycle_time_is_refused_by_name(tmp_path):
    job = jobs.Job(elastic(tmp_path), tmp_path, HOROVOD_CYCLE_TIME="5")
    try:
        assert job.wait(120) != 0
    finally:
        job.end()
    assert "HOROVOD_CYCLE_TIME is set" in job.output and "crashes when the ranks" in job.output


def test_metrics_hold_every_step_once_when_the_writer_dies(tmp_path):
    output = finish(
        elastic(tmp_path, "train.steps=30"), tmp_path, HVDFORMER_FAULT="kill:rank=0,step=12,phase=data"
    )
    assert sizes(output) == [3, 2]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" in line] == list(range(1, 31))
    assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20, 30]
