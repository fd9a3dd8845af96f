"""`hvdformer launch` with real launchers and real deaths: what is started again, what is not, and what is left behind."""

import json
import os
import signal
import socket

import psutil
import pytest

from hvdformer import launch
from hvdformer.errors import UserError
from tests import jobs, soak

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
TRAIN = ("train", TINY, "train.sample_tokens=0", "train.final_evaluate_sequences=8", "train.evaluate_every=0")
LAUNCHERS = ["mpirun", "horovodrun-gloo"]


def launched(launcher, *arguments, np=2, options=(), **extra):
    """The command, and its run folder."""
    options = ("-np", str(np), "--launcher", launcher, "--backoff", "0.1", *options)
    return [jobs.HVDFORMER, "launch", *options, "--", *TRAIN, *arguments, "--run-dir", "run"]


def finish(command, cwd, timeout=120, **extra):
    job = jobs.Job(command, cwd, **extra)
    try:
        return job.wait(timeout), job.output
    finally:
        job.end()


def attempts(cwd):
    return [json.loads(line) for line in (cwd / "run" / "launch.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("launcher,seed", [("mpirun", 1), ("horovodrun-gloo", 2)])
def test_killed_at_random_a_run_ends_by_itself_in_the_same_bits(launcher, seed, tmp_path):
    """The short form of tests/soak.py, which checks all that it promises."""
    result = soak.soak(tmp_path, launcher, kills=4, steps=60, seed=seed)
    assert result["kills"] == 4


def test_a_poison_step_ends_it_at_the_second_failure(tmp_path):
    faults = ";".join(f"raise:rank=1,step=7,attempt={attempt}" for attempt in range(1, 9))
    code, output = finish(launched("horovodrun-gloo"), tmp_path, HVDFORMER_FAULT=faults)
    assert code == 1
    first, second = attempts(tmp_path)
    for attempt in (first, second):
        assert (attempt["rank"], attempt["step"], attempt["phase"]) == (1, 7, "backward")
        assert attempt["host"] == socket.gethostname() and "asked for" in attempt["message"]
    assert (first["from_step"], second["from_step"]) == (0, 5)
    assert "the same step for the second time" in output
    assert "\n  2: from step 5" in output, "the summary"


def test_a_job_that_stands_still_is_ended_and_started_again(tmp_path):
    command = launched("mpirun", "train.stall_timeout_seconds=8")
    code, output = finish(command, tmp_path, HVDFORMER_FAULT="hang:rank=1,step=7")
    assert code == 0, output
    first, second = attempts(tmp_path)
    assert first["step"] == 7 and "stuck is rank 1 on " in first["message"]
    assert (second["from_step"], second["code"]) == (5, 0)


def test_a_user_mistake_is_not_started_again_and_keeps_its_code_through_horovodrun(tmp_path):
    code, output = finish(launched("horovodrun-gloo", "train.global_batch=1"), tmp_path)
    assert code == 2
    assert output.count("2 ranks but") == 1 and "not started again" in output
    assert [attempt["code"] for attempt in attempts(tmp_path)] == [2]


def test_a_mistake_in_the_config_starts_nothing(tmp_path):
    code, output = finish(launched("mpirun", "train.stepz=1"), tmp_path)
    assert code == 2 and output.count("stepz") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher,number", [("mpirun", signal.SIGTERM), ("horovodrun-gloo", signal.SIGINT)])
def test_a_signal_to_launch_saves_and_ends_without_a_restart(launcher, number, tmp_path):
    job = jobs.Job(launched(launcher, "train.steps=100000", "checkpoint.every=50000"), tmp_path)
    try:
        job.wait_for("step 12/")
        job.process.send_signal(number)
        assert job.wait(30) == (130 if number == signal.SIGINT else 0), job.output
    finally:
        job.end()
    assert f"stopped by {number.name}" in job.output
    (attempt,) = attempts(tmp_path)
    assert attempt["stopped_by"] == number.name
    assert attempt["checkpoint_step"] == attempt["last_step"] >= 12


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo", "horovodrun-mpi"])
def test_kill_9_of_launch_leaves_no_process(launcher, tmp_path):
    job = jobs.Job(launched(launcher, "train.steps=100000"), tmp_path)
    try:
        job.wait_for("step 3/")
        started = psutil.Process(job.process.pid).children(recursive=True)
        assert len(started) >= 3
        job.process.kill()
        _, alive = psutil.wait_procs(started, 20)
        assert not alive
    finally:
        for process in started:
            if process.is_running():
                process.kill()
        job.end()


def test_kill_9_of_the_launcher_itself_leaves_no_rank_in_the_way(tmp_path):
    """A rank that lives on would hold the run folder."""
    job = jobs.Job(launched("mpirun"), tmp_path)
    try:
        job.wait_for("step 7/")
        job.ranks()[0].parent().kill()
        assert job.wait(90) == 0, job.output
    finally:
        job.end()
    assert len(attempts(tmp_path)) == 2 and "in use" not in job.output


# A second host: mpirun reaches it by this script, which runs what ssh would, so it has a daemon and ranks of its own
# and takes them with it when it is gone.
HOST = """#!/bin/sh
# as ssh: HOST COMMAND
[ "$1" = far ] && [ ! -e far.is.gone ] || exit 255
shift
echo $$ >> far.pids
exec sh -c "$*"
"""


@pytest.mark.parametrize("options,code", [(("--min-np", "1"), 0), (("--max-restarts", "1"), 1)])
def test_a_host_that_is_gone_is_left_out_where_fewer_ranks_are_allowed(options, code, tmp_path):
    agent = tmp_path / "agent"
    agent.write_text(HOST)
    agent.chmod(0o755)
    options = ("--hosts", "localhost:1,far:1", "--ssh", str(agent), *options)
    job = jobs.Job(launched("mpirun", "train.steps=40", options=options), tmp_path)
    try:
        job.wait_for("step 12/")
        (tmp_path / "far.is.gone").touch()
        for pid in (tmp_path / "far.pids").read_text().split():
            if psutil.pid_exists(int(pid)):
                daemon = psutil.Process(int(pid))
                for process in [*daemon.children(recursive=True), daemon]:
                    process.kill()
        assert job.wait(90) == code, job.output
    finally:
        job.end()
    first, second = attempts(tmp_path)
    assert (first["np"], first["hosts"], first["unreachable"]) == (2, ["localhost", "far"], ["far"])
    if code == 0:
        assert (second["np"], second["hosts"], second["checkpoint_step"]) == (1, ["localhost"], 40)
        assert "1 rank, without far, from step" in job.output
    else:
        assert not second["is_started"] and "far cannot be reached" in job.output


def failed(number, **values):
    values = {"from_step": 10, "checkpoint_step": 10, "last_step": 13, "code": 1, **values}
    return launch.Attempt(number, 2, [], "mpirun", 0.0, **values)


def gives_up(*each, max_restarts=1000):
    rows = [failed(number + 1, **values) for number, values in enumerate(each)]
    return launch.reason_to_give_up(rows, max_restarts)


ERROR = {"step": 14, "phase": "backward", "has_own_error": True}
KILLED = {"signal": 9, "code": 137}
IN_START = {**KILLED, "last_step": 10}


@pytest.mark.parametrize(
    "history,words",
    [
        ([ERROR], None),
        ([ERROR, ERROR], "same step for the second time"),
        ([ERROR, {**ERROR, "step": 15}], None),
        ([ERROR, {**ERROR, "checkpoint_step": 12}], None),
        ([KILLED] * 4, None),
        ([KILLED] * 5, "same step for the 5th time"),
        ([*[KILLED] * 4, {**KILLED, "last_step": 12}, *[KILLED] * 4], None),
        ([IN_START] * 9, None),
        ([IN_START] * 10, "before the first step"),
        ([*[IN_START] * 5, KILLED, *[IN_START] * 5], None),
        ([{**ERROR, "last_step": 10, "step": 0, "phase": "start"}] * 9, None),
        ([{**ERROR, "code": 2}], "put right"),
        ([KILLED, *[{"is_started": False}] * 9], None),
    ],
)
def test_when_it_gives_up(history, words):
    reason = gives_up(*history)
    assert (reason is None) if words is None else words in reason


def test_restarts_are_counted_and_pauses_double_until_there_is_progress():
    rows = [failed(number, last_step=10 + number) for number in range(1, 12)]
    assert launch.reason_to_give_up(rows[:2], 2) is None
    assert "--max-restarts" in launch.reason_to_give_up(rows[:3], 2)
    assert [launch.backoff(rows[:n], 1.0) for n in (1, 2, 3, 7, 11)] == [1, 2, 4, 60, 60]
    rows.append(failed(12, checkpoint_step=15))
    assert launch.backoff(rows, 1.0) == 1


def test_hosts_are_read_from_the_option_and_the_file():
    assert launch.parse_hosts("a:2,b.org:4, c") == (("a", 2), ("b.org", 4), ("c", 1))
    assert launch.parse_hostfile("# ours\na slots=2\nb:3 # new\n\nc\n") == (("a", 2), ("b", 3), ("c", 1))
    for wrong in ("a:0", "a:x", "", "a,,b", "a:1,a:1"):
        with pytest.raises(UserError):
            launch.parse_hosts(wrong)


@pytest.mark.parametrize(
    "down,expected",
    [
        ((), (4, (("a", 2), ("b", 2)))),
        (("b",), (2, (("a", 2),))),
        (("a", "b"), (0, ())),
    ],
)
def test_ranks_and_hosts_of_the_next_attempt(down, expected):
    plan = launch.Plan((), jobs.ROOT, 4, 2, (("a", 2), ("b", 2)), "mpirun")
    assert launch.place(plan, down) == expected


def test_ranks_if_nobody_says():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "6"}
    assert launch.default_np((("a", 2), ("b", 4)), 64, True, {}) == 6
    assert launch.default_np((), 64, True, slurm) == 6
    assert launch.default_np((), 64, False, {"CUDA_VISIBLE_DEVICES": "0,1,5"}) == 3
    assert launch.default_np((), 1, True, {}) == 1
    assert 1 <= launch.default_np((), 10_000, True, {}) <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "words,returned,expected",
    [
        (
            "mpirun noticed that process rank 1 with PID 0 on node a exited on signal 9 (Killed).",
            137,
            (1, "a", 9, 137),
        ),
        ("  Process name: [[16776,1],3]\n  Exit code:    3\n", 3, (3, None, None, 3)),
        ("first process to do so was:\nProcess name: 2\nExit code: 137\n", 1, (2, None, 9, 137)),
        ("Process name: 1\nExit code: 255\n", 1, (1, None, None, 255)),  # ssh lost its host
        ("srun: error: b: task 5: Exited with exit code 3", 3, (5, "b", None, 3)),
        ("srun: error: b: task 5: Killed", 137, (5, "b", 9, 137)),
        ("no words that are known", 1, (None, None, None, 1)),
        ("", -9, (None, None, None, 137)),
    ],
)
def test_what_launchers_say_of_the_first_to_go(words, returned, expected):
    attempt = launch.Attempt(1, 8, ["a", "b"], "mpirun", 0.0, 0)
    launch._explain(attempt, returned, words, None)
    assert (attempt.rank, attempt.host, attempt.signal, attempt.code) == expected


def test_the_cause_is_told_and_not_what_followed_from_it(tmp_path):
    report = tmp_path / "failures.jsonl"
    followed = launch.failures.Failure(1.0, 1, 0, "a", 7, "fusion", "lost contact with another rank", True)
    cause = launch.failures.Failure(2.0, 1, 3, "b", 7, "backward", "RuntimeError: x", False)
    lines = [json.dumps(vars(failure)) for failure in (followed, cause)]
    report.write_text(lines[0] + "\n" + lines[1] + "\n" + lines[1][:20])
    assert launch.failures.first(report) == cause
    report.write_text(lines[0])
    assert launch.failures.first(report) == followed


@pytest.mark.parametrize(
    "name,words",
    [
        (
            "mpirun",
            ["-np 2", "--bind-to none", "--host a:1,b:1", "-x HVDFORMER_ATTEMPT", "-x PATH", "-x NCCL_DEBUG"],
        ),
        ("horovodrun-mpi", ["horovodrun --mpi -np 2", "-H a:1,b:1"]),
        ("horovodrun-gloo", ["horovodrun --gloo -np 2", "-H a:1,b:1"]),
        ("srun", ["srun --ntasks 2", "--mpi pmix", "--nodelist a,b"]),
    ],
)
def test_the_command_of_a_launcher(name, words):
    hosts = (("a", 1), ("b", 1))
    environment = {"PATH": "x", "HVDFORMER_ATTEMPT": "1", "NCCL_DEBUG": "INFO", "MY_SECRET": "s"}
    plan = launch.Plan((), jobs.ROOT, 2, 2, hosts, name, ("--more", "words"))
    command = " ".join(launch.launcher_command(plan, 2, hosts, environment))
    assert all(word in command for word in words) and command.endswith("--more words")
    assert "SECRET" not in command and "--oversubscribe" not in command


def test_horovodrun_is_given_no_interface_when_only_this_machine_is_left():
    more = ("--network-interfaces", "eth0", "-i", "key", "--network-interfaces=eth0")
    both = (("localhost", 1), ("far.invalid", 1))
    plan = launch.Plan((), jobs.ROOT, 2, 1, both, "horovodrun-gloo", more)
    assert launch.launcher_command(plan, 2, both, {})[-5:] == list(more)
    assert launch.launcher_command(plan, 1, both[:1], {})[-3:] == ["--disable-cache", "-i", "key"]


def test_the_launcher_if_nobody_says():
    def choose(environment, hosts=(), np=2):
        return launch.choose_launcher("auto", np, hosts, environment)

    assert choose({}, np=1) == "plain"
    expected = "mpirun" if jobs.has("mpirun") else "horovodrun-gloo"
    assert choose({}) == expected
    with pytest.raises(UserError, match="start it once"):
        choose({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"})
