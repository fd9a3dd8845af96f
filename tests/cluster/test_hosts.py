"""Several hosts, as network namespaces with an sshd each: launchers, hosts that differ, and a cable that is pulled."""

import json
import subprocess
import time

import pytest

from benchmarks.hosts import end
from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
TIMEOUT = 10  # train.stall_timeout_seconds


class Job:
    """A command on the first host."""

    def __init__(self, hosts, folder, *command, **environment):
        self.hosts = hosts
        self.log = folder / f"output-{time.monotonic_ns()}.txt"
        settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(jobs.ROOT)} | environment
        self.process = hosts.start(hosts.names[0], *command, log=self.log, cwd=folder, **settings)

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text, timeout=120):
        began = time.monotonic()
        while text not in self.output():
            assert self.process.poll() is None and time.monotonic() - began < timeout, self.output()
            time.sleep(0.05)

    def wait(self, timeout=240):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self.process)
        self.hosts.end_sessions()


def launcher(name, hosts):
    """One rank on each host; the commands of docs/hosts.md."""
    listed = ",".join(f"{host}:1" for host in hosts)
    if name == "mpirun":
        return [str(jobs.BIN / "mpirun"), "-np", str(len(hosts)), "--host", listed, "--bind-to", "none",
                "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0",
                "-x", "PATH", "-x", "PYTHONPATH"]  # fmt: skip
    kind = "--" + name.removeprefix("horovodrun-")
    found = [f"--mpi-args=--prefix {jobs.BIN.parent}"] if kind == "--mpi" else []
    return ["horovodrun", kind, *found, "--network-interfaces", "eth0", "-np", str(len(hosts)), "-H", listed]


LAUNCHERS = ("horovodrun-gloo", "horovodrun-mpi", "mpirun")


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_trains_on_several_hosts(name, number, three_hosts, tmp_path):
    command = [*launcher(name, three_hosts.names[:number]), jobs.HVDFORMER, "train", TINY]
    with Job(three_hosts, tmp_path, *command, "train.sample_tokens=0", "--run-dir", "run") as job:
        assert job.wait() == 0, job.output()
    assert f"{number} ranks (1 on this host)" in job.output()
    assert f"controller {'Gloo' if 'gloo' in name else 'MPI'}" in job.output()
    losses = [line["loss"] for line in jobs.metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_pulled_cable_ends_the_job_in_time_and_names_the_host(name, three_hosts, tmp_path):
    hosts = three_hosts.names[:2]
    command = [*launcher(name, hosts), jobs.HVDFORMER, "train", TINY, "train.steps=100000"]
    command += [f"train.stall_timeout_seconds={TIMEOUT}", "--run-dir", "run"]
    with Job(three_hosts, tmp_path, *command) as job:
        job.wait_for("step 12/")
        three_hosts.cut(hosts[1])
        began = time.monotonic()
        try:
            code = job.wait(TIMEOUT + 20)
        finally:
            three_hosts.cut(hosts[1], up=True)
        seconds = time.monotonic() - began
    assert code != 0
    assert f"on {hosts[1]}" in job.output() and "host or its network is gone" in job.output(), job.output()
    assert seconds < TIMEOUT + 5, f"{seconds:.0f} s"  # 5 s for the launcher to take down what it started


@pytest.mark.parametrize("name", ["mpirun", "horovodrun-mpi", "horovodrun-gloo"])
def test_launch_goes_on_without_the_host_that_is_cut_off(name, three_hosts, tmp_path):
    hosts = three_hosts.names[:2]
    words = "--mca btl_tcp_if_include eth0" if name == "mpirun" else "--network-interfaces eth0"
    command = [jobs.HVDFORMER, "launch", "--launcher", name, "--launcher-arguments", words]
    command += [
        "--hosts",
        ",".join(f"{host}:1" for host in hosts),
        "--min-np",
        "1",
        "--ssh",
        "ssh -o ConnectTimeout=3",
    ]
    command += ["--", "train", TINY, "train.steps=60", f"train.stall_timeout_seconds={TIMEOUT}"]
    with Job(three_hosts, tmp_path, *command, "train.sample_tokens=0", "--run-dir", "run") as job:
        job.wait_for("step 12/")
        three_hosts.cut(hosts[1])
        try:
            assert job.wait() == 0, job.output()
        finally:
            three_hosts.cut(hosts[1], up=True)
    assert f"without {hosts[1]}" in job.output() and "going on from step" in job.output()
    attempts = [json.loads(line) for line in (tmp_path / "run" / "launch.jsonl").read_text().splitlines()]
    assert attempts[0]["unreachable"] == [hosts[1]] and attempts[-1]["code"] == 0


def test_a_host_with_other_data_is_found_before_the_first_step(three_hosts, tmp_path):
    """The same path on all hosts, but not the same files behind it."""
    for name in ("one", "two"):
        text = tmp_path / f"text-{name}"
        text.mkdir()
        for number in range(20):
            (text / f"{number}.txt").write_text(f"{name} {number} " * 300)
        fraction = ("--validation-fraction", "0.2")
        jobs.succeed("plain", 1, "prepare", str(text), "--out", f"data-{name}", *fraction, cwd=tmp_path)
    hosts = three_hosts.names[:2]
    data = str(tmp_path / "data-one")
    command = [*launcher("mpirun", hosts), jobs.HVDFORMER, "train", TINY, f"data.path={data}"]
    three_hosts.change(hosts[1], "mount", "--bind", str(tmp_path / "data-two"), data)
    try:
        with Job(three_hosts, tmp_path, *command, "--run-dir", "run") as job:
            assert job.wait() == 2, job.output()
        assert f"rank 1 on {hosts[1]} has another data_fingerprint than rank 0 on {hosts[0]}" in job.output()
    finally:
        three_hosts.change(hosts[1], "umount", data)
    three_hosts.change(hosts[1], "mount", "-t", "tmpfs", "tmpfs", data)
    try:
        with Job(three_hosts, tmp_path, *command, "--run-dir", "run") as job:
            assert job.wait() == 2, job.output()
        assert "on rank 1: " in job.output() and data in job.output()
    finally:
        three_hosts.change(hosts[1], "umount", data)


def test_hosts_with_other_numbers_of_cores_train(three_hosts, tmp_path):
    """Threads follow the cores of each host, unless the bits are to depend on nothing (fusion.kind=exact)."""
    hosts = three_hosts.names[:2]
    three_hosts.change(hosts[1], "taskset", "--cpu-list", "--pid", "0", "$PID")
    try:
        command = [*launcher("mpirun", hosts), jobs.HVDFORMER, "train", TINY, "train.sample_tokens=0"]
        with Job(three_hosts, tmp_path, *command, "--run-dir", "run") as job:
            assert job.wait() == 0, job.output()
    finally:
        three_hosts.change(hosts[1], "taskset", "--cpu-list", "--pid", f"0-{jobs.os.cpu_count() - 1}", "$PID")
