"""Start a job on all ranks, watch it, and start it again after a failure, until it is done or cannot be.

The job goes on from its last whole checkpoint by itself (`train --resume auto`). What is decided here, and by which
rule, stands in docs/restarts.md; `reason_to_give_up` and `place` hold the rules.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from hvdformer import failures
from hvdformer.distributed import launcher, tuning
from hvdformer.errors import UserError

LOG_FILE = "launch.jsonl"
FAILURES_FILE = ".failures.jsonl"
ATTEMPT = "HVDFORMER_ATTEMPT"  # 1, 2, 3, ... in the environment of the ranks; faults.py reads it
METRICS_FILE = (
    "metrics.jsonl"  # as in metrics.py, which loads torch; this process waits for days and stays small
)

# A batch job cannot type a password, and a host that is off must not hold up the others for minutes.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"

_MAX_BACKOFF_SECONDS = 60.0
# Failures in a row at the same place, with no new checkpoint, before launch gives up:
_MAX_SAME_ERROR = 2  # an error raised in a step: the same input gives it again
_MAX_SAME_STEP = 5  # killed in one and the same step: memory that is too small for it, not chance
_MAX_SAME_START = (
    10  # before the first step: a file server or port may come back; some five minutes of pauses
)
_PROBE_SECONDS = 30
_GRACE_SECONDS = 5.0  # what processes get to end by themselves once their job is over

Say = Callable[[str], None]
Hosts = tuple[tuple[str, int], ...]  # (name, slots)


@dataclass(frozen=True)
class Plan:
    """What is to be started, and how often."""

    arguments: tuple[str, ...]  # of hvdformer: train ...
    run_dir: Path
    np: int
    min_np: int
    hosts: Hosts  # empty: this machine, or what the batch system allotted
    launcher: str  # mpirun, horovodrun-mpi, horovodrun-gloo or srun; plain: one process without a launcher
    launcher_arguments: tuple[str, ...] = ()
    ssh: str = SSH
    max_restarts: int = 10
    backoff_seconds: float = 1.0


@dataclass
class Attempt:
    """One start of the job and how it ended: a line of launch.jsonl."""

    attempt: int
    np: int
    hosts: list[str]
    launcher: str
    began: float  # seconds since 1970
    from_step: int  # of the checkpoint that it went on from; 0: none
    seconds: float = 0.0
    code: int = 0  # as this program would exit with it
    signal: int | None = None  # that ended the first process to go
    rank: int | None = None
    host: str | None = None
    step: int | None = None  # in which the failing rank was, as far as it could tell
    phase: str | None = None
    message: str | None = None
    stopped_by: str | None = None  # the signal that asked for it
    has_own_error: bool = False  # a rank raised it; otherwise processes or hosts merely went away
    unreachable: list[str] = field(default_factory=list)  # hosts, when asked after it
    is_started: bool = True  # False: too few hosts, nothing was started
    last_step: int = 0  # newest in metrics.jsonl
    checkpoint_step: int = 0  # newest after it

    @property
    def is_past_start(self) -> bool:
        """Whether it failed in a step of training."""
        return max(self.last_step, self.step or 0) > self.from_step

    @property
    def place(self) -> tuple[int, int]:
        """Where it failed: the newest checkpoint, and the step as exactly as it is known; 0: before the first one."""
        step = self.last_step + 1 if self.step is None else self.step
        return self.checkpoint_step, step if self.is_past_start else 0

    def describe(self) -> str:
        """How it ended, in one clause."""
        if self.stopped_by:
            return f"stopped by {self.stopped_by}, saved up to step {self.checkpoint_step}"
        if self.code == 0:
            return f"ended well at step {self.checkpoint_step}"
        if not self.is_started:
            return self.message or ""
        who = (
            "the job"
            if self.rank is None
            else f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        )
        if self.signal is not None:
            how = f"was ended by {_signal_name(self.signal)}"
        elif self.message is not None:
            how = f"failed ({' '.join(self.message.split())[:300]})"
        else:
            how = f"ended with code {self.code}"
        where = f"after step {self.last_step}" if self.step is None else f"in step {self.step}, {self.phase}"
        gone = f", and {', '.join(self.unreachable)} cannot be reached" if self.unreachable else ""
        return f"{who} {how} {where}{gone}"


def launch(plan: Plan, say: Say) -> int:
    """Run the job until it is done, was stopped or cannot go on. Returns the exit code for this program.

    say: tells the user one message.

    Raises:
        UserError: the run folder cannot be written, or the numbers of ranks do not fit together.
    """
    slots = sum(slots for _, slots in plan.hosts)
    if plan.hosts and plan.np > slots:
        raise UserError(f"-np is {plan.np} but the hosts have {slots} slots: lower -np or give NAME:SLOTS")
    if plan.min_np > plan.np:
        raise UserError(f"--min-np is {plan.min_np} but -np is {plan.np}: lower --min-np")
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        log = (plan.run_dir / LOG_FILE).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run folder {plan.run_dir} cannot be written: {error.strerror}. Choose another one with --run-dir."
        ) from None
    _adopt_orphans()
    attempts: list[Attempt] = []
    down: set[str] = set()
    with log, _Stop() as stop:
        while True:
            attempt = _attempt(plan, len(attempts) + 1, down, stop, say)
            attempts.append(attempt)
            if attempt.code not in (0, UserError.exit_code) and not stop.number:
                down = _unreachable(plan)
                attempt.unreachable = sorted(down)
            log.write(json.dumps(asdict(attempt)) + "\n")
            log.flush()
            if attempt.code == 0 or stop.number:
                break
            reason = reason_to_give_up(attempts, plan.max_restarts)
            if reason:
                say(f"not started again: {reason}")
                break
            pause = backoff(attempts, plan.backoff_seconds)
            say(
                f"attempt {attempt.attempt}: {attempt.describe()}; again from step {attempt.checkpoint_step} in "
                f"{pause:g} s (restart {len(attempts)} of {plan.max_restarts})"
            )
            if stop.wait(pause):
                attempt.code = 128 + stop.number
                break
    is_told = attempts[-1].code in (0, UserError.exit_code) or stop.number != 0
    if len(attempts) > 1 or not is_told:
        say(summary(attempts))
    return attempts[-1].code


def reason_to_give_up(attempts: Sequence[Attempt], max_restarts: int) -> str | None:
    """Why the job is not started again after the last of these failed attempts; None: it is. Pure."""
    last = attempts[-1]
    if last.code == UserError.exit_code:
        return "the message above says what to put right (exit code 2)."
    same = _num_same_place(attempts)
    limit = _MAX_SAME_ERROR if last.has_own_error else _MAX_SAME_STEP
    if last.is_past_start and same >= limit:
        return f"it is the same step for the {_ordinal(same)} time, with no new checkpoint since."
    if same >= _MAX_SAME_START:
        return f"it is the {_ordinal(same)} failure in a row before the first step. `hvdformer doctor` says what works here."
    if len(attempts) > max_restarts:
        return f"that was restart {max_restarts} of {max_restarts} (--max-restarts)."
    return None


def _num_same_place(attempts: Sequence[Attempt]) -> int:
    """How many of the last attempts failed at one and the same place."""
    started = [attempt for attempt in reversed(attempts) if attempt.is_started]
    num = 0
    for attempt in started:
        if attempt.place != started[0].place:
            break
        num += 1
    return num if attempts[-1].is_started else 0


def backoff(attempts: Sequence[Attempt], first_seconds: float) -> float:
    """The pause before the next attempt: doubled for each failure in a row without a new checkpoint. Pure."""
    num = 0
    for attempt in reversed(attempts):
        if attempt.checkpoint_step > attempt.from_step:
            break
        num += 1
    return min(_MAX_BACKOFF_SECONDS, first_seconds * 2.0 ** min(max(num - 1, 0), 30))


def place(plan: Plan, down: Collection[str]) -> tuple[int, Hosts]:
    """The ranks and hosts of the next attempt when the hosts in `down` are left out; 0 ranks: too few are left. Pure."""
    if not plan.hosts:
        return plan.np, ()
    hosts = tuple((name, slots) for name, slots in plan.hosts if name not in down)
    np = min(plan.np, sum(slots for _, slots in hosts))
    return (np, hosts) if np >= plan.min_np else (0, hosts)


def summary(attempts: Sequence[Attempt]) -> str:
    """All attempts, one line each."""
    lines = [
        f"  {a.attempt}: from step {a.from_step}, {a.seconds:.0f} s, {_ranks(a.np)}: {a.describe()}"
        for a in attempts
    ]
    return "\n".join([f"{len(attempts)} attempt{'s' * (len(attempts) > 1)}", *lines])


# Starting


def _attempt(plan: Plan, number: int, down: Collection[str], stop: _Stop, say: Say) -> Attempt:
    """Start the job once and wait for its end."""
    np, hosts = place(plan, down)
    from_step = newest_checkpoint(plan.run_dir)
    attempt = Attempt(number, np, [name for name, _ in hosts], plan.launcher, time.time(), from_step)
    attempt.checkpoint_step = attempt.last_step = from_step
    if np == 0:
        left = sum(slots for _, slots in hosts)
        attempt.is_started, attempt.code = False, 1
        attempt.message = (
            f"{', '.join(sorted(down))} cannot be reached, {_ranks(left)} would remain of {plan.np}, "
            f"and {plan.min_np} are needed (--min-np)"
        )
        return attempt
    if number > 1 or np < plan.np:
        without = f", without {', '.join(sorted(down))}" if down else ""
        say(f"attempt {number}: {_ranks(np)}{without}, from step {from_step}")

    report = (plan.run_dir / FAILURES_FILE).absolute()
    report.write_text("")
    environment = {**os.environ, ATTEMPT: str(number), failures.VARIABLE: str(report)}
    # The run that attempt 1 began is this one: --resume never means no other.
    arguments = (*plan.arguments, "--resume", "auto") if number > 1 and _is_new_only(plan) else plan.arguments
    rank_command = [*program(), *arguments]
    before = _identity(plan.run_dir / METRICS_FILE)
    command = [*launcher_command(plan, np, hosts, environment), *rank_command]
    job = _Job(command, environment, rank_command, reads_stderr=plan.launcher != "plain")
    returned = job.wait(stop)

    attempt.seconds = time.time() - attempt.began
    attempt.checkpoint_step = newest_checkpoint(plan.run_dir)
    if _identity(plan.run_dir / METRICS_FILE) != before:  # opened anew when training begins
        attempt.last_step = newest_metric_step(plan.run_dir)
    if returned != 0:
        _explain(attempt, returned, job.last_words(), failures.first(report))
    attempt.stopped_by = _signal_name(stop.number) if stop.number else None
    report.unlink(missing_ok=True)
    return attempt


def launcher_command(plan: Plan, np: int, hosts: Hosts, environment: Mapping[str, str]) -> list[str]:
    """The launcher with its flags, to be followed by the command of a rank. Pure but for where programs lie."""
    listed = ",".join(f"{name}:{slots}" for name, slots in hosts)
    if plan.launcher == "plain":
        return []
    if plan.launcher == "srun":
        command = ["srun", "--ntasks", str(np)]
        command += ["--mpi", "pmix"]  # the one that Open MPI is started by
        command += ["--kill-on-bad-exit=1"]  # or the other ranks wait for the one that is gone
        command += ["--nodelist", ",".join(name for name, _ in hosts)] if hosts else []
        return [*command, *plan.launcher_arguments]
    if plan.launcher.startswith("horovodrun"):
        command = ["horovodrun", "--" + plan.launcher.removeprefix("horovodrun-"), "-np", str(np)]
        # Its cache holds for an hour which hosts can be reached, also when they no longer can.
        command += ["-H", listed, "--disable-cache"] if hosts else []
        mpirun = shutil.which("mpirun")
        if hosts and mpirun and plan.launcher == "horovodrun-mpi" and not _names_mpi_args(plan):
            # As with mpirun by its whole path, below: its daemon and libraries on the other hosts.
            command += [f"--mpi-args=--prefix {Path(mpirun).parent.parent}"]
        # No --verbose: it prints every variable of the environment, secrets included.
        # With ranks on this machine only, horovodrun takes the loopback interface, and fails if another one is named.
        is_local = all(_is_this_machine(name) for name, _ in hosts)
        return [
            *command,
            *(_without_interfaces(plan.launcher_arguments) if is_local else plan.launcher_arguments),
        ]
    # By its whole path, mpirun finds its daemon in the same place on the other hosts too.
    command = [shutil.which("mpirun") or "mpirun", "-np", str(np)]
    command += ["--bind-to", "none"]  # a rank has threads of its own; bound to one core, they queue there
    command += ["--map-by", "slot"]  # neighbouring ranks on one host
    if hosts:
        command += ["--host", listed, "--mca", "plm_rsh_agent", plan.ssh]
    elif not _in_batch_system(environment):
        command += ["--oversubscribe"]  # more ranks than cores are refused otherwise; here -np is meant
    if os.geteuid() == 0:
        command += [
            "--allow-run-as-root"
        ]  # in a container one is root, and mpirun wants to hear that this is meant
    for name in sorted(environment):  # settings hold for the ranks on the other hosts too
        if name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES):
            command += ["-x", name]
    return [*command, *plan.launcher_arguments]


def _names_mpi_args(plan: Plan) -> bool:
    return any(word.partition("=")[0] == "--mpi-args" for word in plan.launcher_arguments)


def _without_interfaces(arguments: Sequence[str]) -> list[str]:
    option = "--network-interfaces"
    return [
        word
        for before, word in zip(("", *arguments), arguments, strict=False)
        if option not in (before, word) and not word.startswith(f"{option}=")
    ]


_FORWARDED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
_FORWARDED_PREFIXES = ("HVDFORMER_", "HOROVOD_", "NCCL_", "OMP_", "MKL_")


def program() -> list[str]:
    """This hvdformer, as a command that needs no PATH."""
    script = Path(sys.executable).with_name("hvdformer")
    return [sys.executable, str(script)] if script.exists() else [sys.executable, "-m", "hvdformer"]


def _is_new_only(plan: Plan) -> bool:
    return "--resume=never" in plan.arguments or ("--resume", "never") in zip(
        plan.arguments, plan.arguments[1:], strict=False
    )


# What is started where: choices made once


def choose_launcher(wanted: str, np: int, hosts: Hosts, environment: Mapping[str, str]) -> str:
    """The launcher for `auto`, or the one that is asked for.

    Raises:
        UserError: the one that is asked for is not here, or this process is a rank itself.
    """
    outer = launcher.detect(environment)
    if outer is not None and outer.size > 1:
        raise UserError(
            f"launch starts the ranks itself, but {outer.launcher} started it {outer.size} times: start it once."
        )
    if wanted == "auto":
        if np == 1 and not hosts:
            return "plain"
        if _in_slurm_allocation(environment) and shutil.which("srun"):
            return "srun"
        return "mpirun" if shutil.which("mpirun") and _horovod_has_mpi() else "horovodrun-gloo"
    program = wanted.partition("-")[0]
    if shutil.which(program) is None:
        raise UserError(f"--launcher {wanted}: there is no {program} on the PATH. Try --launcher auto.")
    return wanted


def default_np(hosts: Hosts, num_micro_batches: int, on_cpu: bool, environment: Mapping[str, str]) -> int:
    """Ranks, if the user does not say: all slots of the hosts, or all tasks of the Slurm allocation, or one per GPU of
    this machine, or one per core; never more than there are micro-batches in a step.
    """
    if hosts:
        np = sum(slots for _, slots in hosts)
    elif _in_slurm_allocation(environment):
        np = int(environment["SLURM_NTASKS"])
    else:
        np = (0 if on_cpu else num_gpus(environment)) or tuning.usable_cores()
    return min(np, num_micro_batches)


def parse_hosts(text: str) -> Hosts:
    """a:2,b:4 as (name, slots); without a number one slot.

    Raises:
        UserError: not of that form.
    """
    hosts = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w.-]+)(?::([1-9]\d*))?\s*", part)
        if not match:
            raise UserError(f"--hosts: {part!r}, expected NAME or NAME:SLOTS, separated by commas")
        hosts.append((match[1], int(match[2] or 1)))
    return _distinct(hosts)


def parse_hostfile(text: str) -> Hosts:
    """Lines NAME, NAME:SLOTS or NAME slots=SLOTS; what follows # is a comment.

    Raises:
        UserError: another line, or none.
    """
    hosts: list[tuple[str, int]] = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        match = re.fullmatch(r"([\w.-]+)(?:(?::|\s+slots\s*=\s*)([1-9]\d*))?(\s+max.slots\s*=\s*\d+)?", line)
        if line and not match:
            raise UserError(f"--hostfile: {line!r}, expected NAME, NAME:SLOTS or NAME slots=SLOTS")
        if match:
            hosts.append((match[1], int(match[2] or 1)))
    if not hosts:
        raise UserError("--hostfile: no host in it")
    return _distinct(hosts)


def _distinct(hosts: Sequence[tuple[str, int]]) -> Hosts:
    names = [name for name, _ in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{', '.join(twice)} is listed more than once: give each host once, with all its slots"
        )
    return tuple(hosts)


def _in_slurm_allocation(environment: Mapping[str, str]) -> bool:
    """In a batch script or salloc, for several tasks."""
    tasks = environment.get("SLURM_NTASKS", "")
    return "SLURM_JOB_ID" in environment and tasks.isdecimal() and int(tasks) > 1


def _in_batch_system(environment: Mapping[str, str]) -> bool:
    """Where mpirun takes hosts and slots from the batch system, and exceeding them would take others' cores."""
    return any(name in environment for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PE_HOSTFILE"))


def num_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that the ranks may use, without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return len(list(filter(None, environment["CUDA_VISIBLE_DEVICES"].split(","))))
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _horovod_has_mpi() -> bool:
    """Asked in a process of its own: Horovod and torch have no place in this one, which waits for days."""
    program = "import sys, horovod.torch as hvd; sys.exit(0 if hvd.mpi_built() else 1)"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


# Hosts


def _unreachable(plan: Plan) -> set[str]:
    """The hosts that do not answer ssh. This machine is not asked; under srun, Slurm knows its nodes."""
    if plan.launcher == "srun":
        return set()
    names = [name for name, _ in plan.hosts if not _is_this_machine(name)]
    probes = {
        name: subprocess.Popen(
            [*shlex.split(plan.ssh), name, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for name in names
    }
    end = time.monotonic() + _PROBE_SECONDS
    down = set()
    for name, probe in probes.items():
        try:
            answer = probe.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            probe.kill()
            answer = probe.wait()
        if answer != 0:
            down.add(name)
    return down


def _is_this_machine(name: str) -> bool:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    ours = {address.address for card in psutil.net_if_addrs().values() for address in card}
    return bool(found & ours) or any(address.startswith("127.") for address in found)


# Watching


class _Stop:
    """The signals that ask this program to stop, while it is entered."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.is_urgent = False  # there was a second
        self._asked = threading.Event()

    def __enter__(self) -> _Stop:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.is_urgent |= self.number != 0 and number != signal.SIGUSR1  # as in signals.py
        self.number = self.number or number
        self._asked.set()

    def wait(self, seconds: float) -> bool:
        """Pause, but not longer than until someone asks to stop. Whether someone did."""
        return self._asked.wait(seconds)


# Holds the reading end of a pipe that only we can write to. It ends when we do, in whichever way, kill -9 too: then the
# launcher gets SIGTERM, upon which it ends its ranks, also on other hosts, and a single process saves and ends.
# Asking the kernel for a signal at the parent's death is not enough: horovodrun puts a shell between us and mpirun.
_GUARD = "trap '' TERM INT HUP; read _; kill -TERM 0"


class _Job:
    """A launcher and all the processes that it started."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        rank_command: Sequence[str],
        reads_stderr: bool,
    ) -> None:
        """reads_stderr: pass the launcher's messages through and keep the last of them; one process keeps its terminal."""
        self._rank_command = list(rank_command)
        self._told: set[int] = set()
        self._tail = bytearray()
        # Guard and launcher are a process group of their own, so Ctrl-C in the terminal comes to us alone: launchers
        # would end the ranks at once.
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD],
            stdin=subprocess.PIPE,
            preexec_fn=lambda: os.setpgid(0, 0),
        )
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE if reads_stderr else None,
            preexec_fn=lambda: os.setpgid(0, self._guard.pid),
        )
        self._reader = threading.Thread(target=self._pass_stderr, daemon=True)
        self._reader.start()

    def wait(self, stop: _Stop) -> int:
        """Until no process of the job is left. Returns the launcher's code, negative for a signal."""
        while True:
            try:
                returned = self._process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                if stop.is_urgent:
                    self._end()
                elif stop.number:
                    self._ask_to_stop(stop.number)
        self._end()
        self._reader.join(_GRACE_SECONDS)
        return returned

    def last_words(self) -> str:
        """The end of what the job wrote to stderr."""
        return self._tail.decode(errors="replace")

    def _ask_to_stop(self, number: int) -> None:
        """Hand the signal to the ranks, also to those that start only now: they finish the step, save and end.

        Not to the launcher, which would not let them save.
        """
        ranks = [process for process in _descendants() if self._is_rank(process)]
        for rank in ranks:
            if rank.pid not in self._told:
                self._told.add(rank.pid)
                _send(rank, number)
        if not ranks and not self._told and self._process.poll() is None:
            # All of them are on other hosts, or not there yet. mpirun and srun forward SIGUSR1; horovodrun ends its ranks.
            forwards = Path(str(self._process.args[0])).name in ("mpirun", "srun")  # type: ignore[index]
            self._told.add(self._process.pid)
            self._process.send_signal(signal.SIGUSR1 if forwards else signal.SIGTERM)

    def _is_rank(self, process: psutil.Process) -> bool:
        try:
            return process.cmdline()[: len(self._rank_command)] == self._rank_command
        except psutil.Error:
            return False

    def _end(self) -> None:
        """Leave no process of the job behind; launchers get the time to end their ranks, also those elsewhere."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        _, alive = psutil.wait_procs(_descendants(), _GRACE_SECONDS)
        while alive:
            for process in alive:
                _send(process, signal.SIGKILL)
            psutil.wait_procs(alive, _GRACE_SECONDS)
            alive = _descendants()

    def _pass_stderr(self) -> None:
        if self._process.stderr is None:
            return
        with self._process.stderr as source:
            while chunk := os.read(source.fileno(), 2**16):
                self._tail += chunk
                del self._tail[: -(2**16)]
                while chunk:
                    chunk = chunk[os.write(2, chunk) :]


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _adopt_orphans() -> None:
    """Descendants whose parents die become children of this process, so that none is lost sight of."""
    pr_set_child_subreaper = 36  # of linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, ctypes.c_ulong(1), 0, 0, 0)


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


# How it ended

# What launchers say of the process that went first: its rank, then what is known of host, signal and code.
_WORDS = tuple(
    re.compile(pattern)
    for pattern in (
        r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on signal (?P<signal>\d+)",  # mpirun
        r"Process name: \[\[\d+,\d+\],(?P<rank>\d+)\]\s+Exit code:\s+(?P<code>\d+)",  # mpirun
        r"Process name: (?P<rank>\d+)\s+Exit code: (?P<code>\d+)",  # horovodrun --gloo
        r"srun: error: (?P<host>\S+): task (?P<rank>\d+): Exited with exit code (?P<code>\d+)",
        r"srun: error: (?P<host>\S+): task (?P<rank>\d+): Killed",
    )
)


def _explain(attempt: Attempt, returned: int, words: str, failure: failures.Failure | None) -> None:
    """Put into the attempt what a rank's own report, the launcher's last words and its code tell together."""
    attempt.code = 128 - returned if returned < 0 else returned
    if attempt.launcher == "plain":
        attempt.rank, attempt.host = 0, socket.gethostname()
        attempt.signal = -returned if returned < 0 else None
    if failure is not None:
        attempt.step, attempt.phase = failure.step, failure.phase
    if failure is not None and not failure.is_consequence:
        attempt.code, attempt.rank, attempt.host = failure.code, failure.rank, failure.host
        attempt.message, attempt.has_own_error = failure.message, not failure.is_stall
        return
    match = next(filter(None, (pattern.search(words) for pattern in _WORDS)), None)
    if match is None:
        return
    told = match.groupdict()
    attempt.rank = int(told["rank"])
    attempt.host = told.get("host") or (None if attempt.hosts else socket.gethostname())
    if "signal" in told:
        attempt.signal = int(told["signal"])
    elif "code" not in told:
        attempt.signal = int(signal.SIGKILL)
    elif 128 < int(told["code"]) <= 128 + 64:  # as a shell gives a signal; ssh's 255 is none
        attempt.signal = int(told["code"]) - 128
    attempt.code = 128 + attempt.signal if attempt.signal else int(told["code"])


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint by its name, which it has only when it is whole; 0: none."""
    steps = (entry.name.removeprefix("step-") for entry in (run_dir / "checkpoints").glob("step-*"))
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def newest_metric_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl; 0: none."""
    try:
        with open(run_dir / METRICS_FILE, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            steps = re.findall(rb'^\{"step": (\d+),.*\}$', file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(steps[-1]) if steps else 0


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is replaced or written."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
