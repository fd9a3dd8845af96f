"""Ends a job that stands still, and says which rank it waits for.

MPI, Gloo and Horovod wait for ever, or end with a word about a connection, when a rank is stopped, hangs in a read or
has lost its network. So every rank runs a thread that tells rank 0 over a TCP connection of its own, several times
within the timeout, where the rank is; and rank 0's thread ends the job when

- a rank has been silent for too long: stopped, swapped out, or its host or network is gone;
- a rank's connection has closed without a goodbye, and its launcher has not ended the job;
- no rank has made progress for too long. The ranks that are not waiting in a collective are then the ones that all
  the others wait for, and they send the Python stack of their training thread.

If rank 0 is the silent one, the others notice by themselves. In an elastic job only the ranks that stand still are
ended; Horovod notices those that are gone, and the others go on without them. A rank that has not noticed long after
the others ends itself, or all would wait for it. Messages are lines of JSON, after a line with a random
token that only the ranks of this job know; nothing else is read from a connection.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hvdformer.distributed import comm
from hvdformer.distributed.comm import World

_MAX_LINE = 65536
_GONE_SECONDS = 3.0  # from the end of a connection to the end of the job, if its launcher does not end it
_START_SECONDS = 120.0  # at least so long for what comes before the first beat: imports, memory, compilation
_LAUNCHER_SECONDS = 3  # for a launcher to end by itself when a rank has ended the job
_STACK_SECONDS = 2.0  # for a stuck rank to send its stack
_DEAF_SECONDS = 15.0  # for a collective to fail when a rank is gone, on top of what Gloo waits for data

_beats = 0
_steps: set[int] = set()  # the first two steps with a beat since the ranks have come together


def beat(step: int | None = None) -> None:
    """Tell that this rank makes progress: called after each piece of work that takes a while, in a step or beside them."""
    global _beats
    _beats += 1
    if step is not None and len(_steps) < 2:
        _steps.add(step)


@dataclass
class _Report:
    """What is known of a rank."""

    host: str
    pid: int
    heard: float  # time of its last message
    moved: float  # time of its last progress
    at: dict[str, Any] = field(default_factory=dict)  # what `_state` gave
    is_gone: bool = False
    has_left: bool = False
    stack: str | None = None

    def place(self, rank: int) -> str:
        step, phase = self.at.get("step", 0), self.at.get("phase", "start")
        return f"rank {rank} on {self.host} (last heard of in step {step}, {phase})"


class Watchdog:
    """The thread of one rank. Every rank makes one, together; `stop` it when the work is done."""

    def __init__(
        self,
        world: World,
        timeout_seconds: float,
        where: Callable[[], tuple[int, str]],
        tell: Callable[[str], None],
    ) -> None:
        """where: the step and the phase that this rank is in, asked from another thread.

        tell: called with what is wrong before this process ends the job.
        """
        self._world, self._where, self._timeout, self._tell = world, where, timeout_seconds, tell
        # Noticed, told and ended within the timeout.
        self._limit = timeout_seconds - min(5.0, 0.3 * timeout_seconds)
        self._interval = min(0.25, timeout_seconds / 10)
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_arm = 0.0
        self._last: tuple[dict[str, Any], float] | None = None  # what `_state` gave, and since when
        _steps.clear()
        if world.size == 1:
            return
        self._peers = comm.gather_json({"host": comm.host_name(), "pid": os.getpid()}, "watchdog ranks")
        is_one_host = len({peer["host"] for peer in self._peers}) == 1
        connection: _Lines | None = None
        if world.rank == 0:
            listener = socket.create_server(("127.0.0.1" if is_one_host else "", 0))
            address = {
                "port": listener.getsockname()[1],
                "addresses": ["127.0.0.1"] if is_one_host else _addresses(),
                "token": secrets.token_hex(16),
            }
            self._token = str(address["token"])
            comm.broadcast_json(address, "watchdog address")
            self._start(self._guard, listener)
        else:
            address = comm.broadcast_json(None, "watchdog address")
            connection = _connect(address["addresses"], address["port"], address["token"], world.rank)
        unreachable = [
            rank
            for rank, is_cut_off in enumerate(comm.gather_json(connection is None, "watchdog"))
            if rank and is_cut_off
        ]
        if unreachable:
            self.note = (
                f"no watch over stalls: {comm.ranks(unreachable)}, the first on {self._peers[unreachable[0]]['host']}, found no "
                f"way to rank 0 on {self._peers[0]['host']} at {', '.join(address['addresses'])}, TCP port {address['port']}"
            )
            self.stop()
            if connection is not None:
                connection.connection.close()
        elif connection is not None:
            self._start(self._report_to_rank_0, connection)

    def _start(self, target: Callable[..., None], channel: object) -> None:
        self._thread = threading.Thread(target=target, args=(channel,), daemon=True, name="watchdog")
        self._thread.start()

    note: str | None = None  # what the user should know of it

    def stop(self) -> None:
        """Say goodbye. The other ranks may still be at work."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5)

    def _state(self) -> dict[str, Any]:
        step, phase = self._where()
        waiting = comm.waiting_for() or ("the gradients of all ranks" if phase == "fusion" else None)
        # All ranks take part in a step: one that is in its second knows that all have done the first.
        is_under_way = len(_steps) == 2
        return {
            "step": step,
            "phase": phase,
            "waiting_for": waiting,
            "beats": _beats,
            "is_under_way": is_under_way,
        }

    def _stack(self) -> str:
        """The Python stack of this rank's training thread."""
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame else "(the training thread has ended)"

    def _arm(self) -> None:
        """Called now and then: if that ends, this process of an elastic job ends within the timeout, with its stacks.

        For a training thread that hangs with Python's lock in hand, so that this thread stands still too. Of any other job
        rank 0 or the launcher ends it; here the others have left by then.
        """
        if self._world.is_elastic and time.monotonic() >= self._next_arm:
            faulthandler.dump_traceback_later(min(self._timeout, threading.TIMEOUT_MAX), exit=True)
            self._next_arm = time.monotonic() + self._timeout / 10

    def _end_if_deaf(self) -> None:
        """Called now and then when another rank of an elastic job is gone: end this one if it does not notice."""
        now, state = time.monotonic(), self._state()
        if self._last is None or state != self._last[0]:
            self._last = state, now
            return
        gloo_seconds = float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", 30))
        limit = gloo_seconds + _DEAF_SECONDS if state["waiting_for"] else self._limit
        if now - self._last[1] > limit:
            what = (
                f"another rank is gone, and rank {self._world.rank} on {comm.host_name()} has not noticed it for {limit:.0f} s "
                f"in step {state['step']}, {state['phase']}:\n{self._stack()}".rstrip()
            )
            self._say("this rank ends itself", [what])
            self._tell(what)
            _leave(1)

    # Ranks 1, 2, ...

    def _report_to_rank_0(self, lines: _Lines) -> None:
        connection = lines.connection
        heard = time.monotonic()
        rank_0_has_left = False
        while not self._stopped.is_set():
            self._arm()
            _send(connection, self._state())
            for message in lines.read(self._interval):
                heard = time.monotonic()
                rank_0_has_left = bool(message.get("left"))
                if message.get("ask") == "stack":
                    _send(connection, {"stack": self._stack()[-_MAX_LINE // 2 :]})
                elif "end" in message:
                    _leave(1)
            # The lowest rank that is left speaks: by the time of the others, the launcher has ended them.
            limit = self._limit if _beats else max(self._limit, _START_SECONDS)
            patience = limit + 5 * (self._world.rank - 1)
            if rank_0_has_left and self._world.is_elastic:
                self._end_if_deaf()
            if time.monotonic() - heard > patience or lines.is_closed:
                if not lines.is_closed:
                    self._end_one(0, self._peers[0]["host"], self._peers[0]["pid"])
                if self._world.is_elastic:
                    rank_0_has_left = True
                    continue
                if lines.is_closed and self._stopped.wait(_GONE_SECONDS + 5 * (self._world.rank - 1)):
                    return
                host = self._peers[0]["host"]
                self._tell_and_end(
                    f"rank 0 on {host} is gone"
                    if lines.is_closed
                    else f"rank 0 on {host} has been silent for {patience:.0f} s: it was stopped or swapped out, or its host "
                    "or network is gone"
                )
        faulthandler.cancel_dump_traceback_later()
        _send(connection, {"bye": True})
        connection.close()

    # Rank 0

    def _guard(self, listener: socket.socket) -> None:
        now = time.monotonic()
        reports = {r: _Report(p["host"], p["pid"], now, now) for r, p in enumerate(self._peers)}
        connections: dict[int, _Lines] = {}
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        next_ping = ticked = now
        while not (self._stopped.is_set() and all(r.has_left or r.is_gone for n, r in reports.items() if n)):
            for key, _ in selector.select(self._interval):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.settimeout(self._interval)
                    selector.register(connection, selectors.EVENT_READ, _Lines(connection))
                    continue
                lines: _Lines = key.data
                messages = lines.read(0.0)
                if lines.rank is None:
                    lines.rank = self._greeted(messages)
                    messages = messages[1:]
                    if lines.rank is not None:
                        connections[lines.rank] = lines
                        _send(lines.connection, {"ok": True})
                if lines.rank is None or lines.is_closed:
                    selector.unregister(key.fileobj)
                    lines.connection.close()
                if lines.rank is not None:
                    self._take(reports[lines.rank], messages)
                    if lines.is_closed and not reports[lines.rank].has_left:
                        reports[lines.rank].is_gone = True
            now, before = time.monotonic(), ticked
            ticked = now
            if now - before > self._limit / 2:
                # This process was stopped itself, and the others did not fail to report: they were not listened to.
                for report in reports.values():
                    report.heard = report.moved = now
            self._take(reports[0], [self._state()])
            if self._stopped.is_set() and now - reports[0].moved > self._limit:
                break  # rank 0's own work is done, and those that are left are the launcher's affair
            if now >= next_ping:
                for lines in connections.values():
                    _send(lines.connection, {"left": self._stopped.is_set()})
                next_ping = now + self._interval
            if self._stopped.is_set():
                faulthandler.cancel_dump_traceback_later()
                continue
            self._arm()
            self._judge(reports, connections, now)
            if self._world.is_elastic and any(r.is_gone or r.has_left for n, r in reports.items() if n):
                self._end_if_deaf()
        faulthandler.cancel_dump_traceback_later()
        listener.close()

    def _greeted(self, messages: list[dict[str, Any]]) -> int | None:
        """The rank that a connection's first message names, if it has the token."""
        if not messages or not secrets.compare_digest(str(messages[0].get("token")), self._token):
            return None
        rank = messages[0].get("rank")
        return rank if isinstance(rank, int) and 0 < rank < self._world.size else None

    def _take(self, report: _Report, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            report.heard = time.monotonic()
            if "bye" in message:
                report.has_left = True
            elif "stack" in message:
                report.stack = str(message["stack"])
            elif message != report.at:
                report.at, report.moved = message, report.heard

    def _judge(self, reports: dict[int, _Report], connections: dict[int, _Lines], now: float) -> None:
        gone = [n for n, r in reports.items() if r.is_gone and now - r.heard > _GONE_SECONDS + self._interval]
        gone = [] if self._world.is_elastic else gone
        here = [(n, r) for n, r in reports.items() if not r.has_left and not r.is_gone]
        has_started = all(r.at.get("beats") for _, r in here) or any(
            r.at.get("is_under_way") for _, r in here
        )
        limit = self._limit if has_started else max(self._limit, _START_SECONDS)
        silent = [n for n, r in here if now - r.heard > limit]
        still = all(now - r.moved > limit for _, r in here)
        if not gone and not silent and not still:
            return
        culprits = gone or silent or [n for n, r in reports.items() if not r.at.get("waiting_for")]
        lines = []
        if gone:
            lines.append("gone without a word: " + ", ".join(reports[n].place(n) for n in gone))
        elif silent:
            lines.append(
                f"nothing was heard for {limit:.0f} s from "
                + ", ".join(reports[n].place(n) for n in silent)
                + ": stopped or swapped out, or the host or its network is gone"
            )
        elif culprits:
            lines.append(
                f"no progress for {limit:.0f} s: stuck is " + ", ".join(reports[n].place(n) for n in culprits)
            )
            lines += self._stacks(culprits[:2], reports, connections)
        else:
            lines.append(f"no progress for {limit:.0f} s, and all ranks wait, for different things:")
        waiting: dict[str, list[int]] = {}
        for number, report in reports.items():
            if number not in culprits and report.at.get("waiting_for"):
                what = f"{report.at['waiting_for']} (step {report.at['step']}, {report.at['phase']})"
                waiting.setdefault(what, []).append(number)
        lines += [f"waiting for {what}: {comm.ranks(numbers)}" for what, numbers in waiting.items()]
        ended = culprits if self._world.is_elastic and culprits else list(reports)
        for number, other in connections.items():
            if number in ended:
                _send(other.connection, {"end": 1})
        for number in culprits:
            self._end_one(number, reports[number].host, reports[number].pid)
            reports[number].is_gone = True
        if 0 in ended:
            self._tell_and_end("\n  ".join(lines))
        self._say("the job goes on without them", lines)

    def _end_one(self, rank: int, host: str, pid: int) -> None:
        """End a process on this host: a stopped one cannot end itself, nor can its launcher always."""
        if rank != self._world.rank and host == comm.host_name():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass

    def _stacks(
        self, culprits: list[int], reports: dict[int, _Report], connections: dict[int, _Lines]
    ) -> list[str]:
        for number in culprits:
            if number == 0:
                reports[0].stack = self._stack()
            elif number in connections:
                _send(connections[number].connection, {"ask": "stack"})
        end = time.monotonic() + _STACK_SECONDS
        while time.monotonic() < end and any(reports[n].stack is None for n in culprits):
            for number in culprits:
                if number in connections:
                    self._take(reports[number], connections[number].read(0.1))
        return [f"rank {n} is in\n{reports[n].stack or '(it does not answer)'}".rstrip() for n in culprits]

    def _tell_and_end(self, what: str) -> None:
        self._say("the job stands still and is ended", [what])
        self._tell(what)
        if len({peer["host"] for peer in self._peers}) > 1:
            with contextlib.suppress(psutil.Error, OSError):  # whatever happens there, this rank leaves
                _end_mpirun()
        _leave(1)

    def _say(self, outcome: str, lines: list[str]) -> None:
        what = "\n  ".join(lines)
        sys.stderr.write(
            f"hvdformer: {outcome} (train.stall_timeout_seconds={self._timeout:g}).\n  {what}\n"
            + ("" if self._world.is_elastic else "  The same command goes on from the last checkpoint.\n")
        )


def parent_mpirun() -> psutil.Process | None:
    """The mpirun that started this rank, where it is on this host."""
    parent = psutil.Process(os.getppid())
    # By how it was called: the process of PyPI's Open MPI has another name.
    names = [Path(word).name for word in parent.cmdline()[:1]]
    return parent if set(names) & {"mpirun", "mpiexec", "orterun", "prterun"} else None


def _end_mpirun() -> None:
    """See to it that mpirun ends soon: it waits for ever for its daemon on a host that is gone."""
    if parent := parent_mpirun():
        # A session of its own, since mpirun ends those of its ranks.
        subprocess.Popen(
            ["sh", "-c", f"sleep {_LAUNCHER_SECONDS}; kill -KILL {parent.pid}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _leave(code: int) -> None:
    sys.stderr.flush()
    os._exit(code)


class _Lines:
    """The JSON objects that arrive on a connection, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank: int | None = None
        self.is_closed = False
        self._rest = b""

    def read(self, timeout: float) -> list[dict[str, Any]]:
        """What has arrived, after waiting at most `timeout` seconds for something."""
        if self.is_closed:
            time.sleep(timeout)
            return []
        self.connection.settimeout(max(timeout, 1e-3))
        try:
            data = self.connection.recv(_MAX_LINE)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        *whole, self._rest = (self._rest + data).split(b"\n")
        self.is_closed = not data or len(self._rest) > _MAX_LINE
        messages = []
        for line in whole:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.is_closed = True
                break
            messages.append(message)
        return messages


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a line; a connection that does not take it is found out by its silence."""
    try:
        connection.settimeout(1.0)
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass


def _connect(addresses: list[str], port: int, token: str, rank: int) -> _Lines | None:
    """A connection to rank 0 by the first of its addresses that works."""
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=3)
        except OSError:
            continue
        _send(connection, {"token": token, "rank": rank})
        # Someone else may have that address here: rank 0 is the one that answers.
        lines = _Lines(connection)
        end = time.monotonic() + 3
        while time.monotonic() < end and not lines.is_closed:
            if lines.read(0.2):
                return lines
        connection.close()
    return None


def _addresses() -> list[str]:
    """The IPv4 addresses of this host, those that other hosts may reach first."""
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name[:15].encode())
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return sorted(set(found), key=lambda address: address.startswith("127."))
