"""Hosts with several networks of which one connects them, and ssh that does not work: what the user sees."""

import pytest

from benchmarks.hosts import SWITCH, sh
from tests import jobs
from tests.cluster.test_hosts import TINY, Job
from tests.integration.test_troubleshooting import PAGE, assert_told

MPIRUN = str(jobs.BIN / "mpirun")
DOCTOR = (jobs.HVDFORMER, "doctor")
BOTH = "-x", "PATH", "-x", "PYTHONPATH"


@pytest.fixture(scope="module")
def hosts(three_hosts):
    """Two hosts that share eth0 alone: eth1 swallows everything, and docker0 has the same address on both."""
    names = three_hosts.names[:2]
    for number, name in enumerate(names, 1):
        for interface, address in (("eth1", f"10.98.0.{number}/24"), ("docker0", "172.17.0.1/16")):
            other = ("type", "veth", "peer", "name", f"{interface}-{number}", "netns", SWITCH)
            sh("ip", "link", "add", interface, "netns", name, *other)
            sh("ip", "-n", SWITCH, "link", "set", f"{interface}-{number}", "up")
            sh("ip", "-n", name, "address", "add", address, "dev", interface)
            sh("ip", "-n", name, "link", "set", interface, "up")
        # Somebody is there, but nothing comes back: what a firewall does.
        sh(
            "ip",
            "-n",
            name,
            "neigh",
            "add",
            f"10.98.0.{3 - number}",
            "lladdr",
            "02:00:00:00:00:01",
            "dev",
            "eth1",
        )
    yield three_hosts
    for name in names:
        for interface in ("eth1", "docker0"):
            sh("ip", "-n", name, "link", "delete", interface)


def mpirun(hosts, *flags):
    listed = ",".join(f"{name}:1" for name in hosts.names[:2])
    return [MPIRUN, "-np", "2", "--host", listed, "--bind-to", "none", *flags, *BOTH]


def horovodrun(hosts, kind, *flags):
    listed = ",".join(f"{name}:1" for name in hosts.names[:2])
    prefix = [f"--mpi-args=--prefix {jobs.BIN.parent}"] if kind == "mpi" else []
    return ["horovodrun", f"--{kind}", *prefix, "--disable-cache", *flags, "-np", "2", "-H", listed]


def end_of(hosts, folder, command, code=None, timeout=120, **environment):
    with Job(hosts, folder, *command, **environment) as job:
        found = job.wait(timeout)
        text = " ".join(job.output().split())
    assert found != 0 if code is None else found == code, text
    return text


@pytest.mark.parametrize("interface", [None, "eth1", "docker0"])
def test_mpirun_on_a_network_that_leads_nowhere(interface, hosts, tmp_path):
    """MPI would wait for ever, without a word or nearly so."""
    flags = ["--mca", "btl_tcp_if_include", interface] if interface else []
    command = [*mpirun(hosts, *flags), *DOCTOR]
    text = end_of(hosts, tmp_path, command, HVDFORMER_START_TIMEOUT="30")
    assert_told(text, "has waited 20 s for")
    assert text.count("has waited") == 1
    used = f"OMPI_MCA_btl_tcp_if_include={interface}" if interface else "all interfaces that are up"
    assert f"the network in use ({used})" in text
    assert "eth0 10.99.0.1/24" in text and "eth1 10.98.0.1/24" in text
    assert "docker0: a network within each host" in text
    assert "the other ranks are not there after 30 s (HVDFORMER_START_TIMEOUT)" in text
    if interface == "docker0":  # otherwise it depends on which address MPI tries first
        expected = "Open MPI accepted a TCP connection from what appears to be a another Open MPI process"
        assert_told(text, expected)


def test_the_interface_that_all_hosts_share_works(hosts, tmp_path):
    flags = ["--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"]
    text = end_of(hosts, tmp_path, [*mpirun(hosts, *flags), *DOCTOR], code=0)
    first, second = hosts.names[:2]
    assert "10.99.0.0/24: works" in text
    assert f"10.98.0.0/24: {first} does not reach {second}, {second} does not reach {first}" in text
    assert "172.17.0.0/16:" not in text  # each has it for itself
    flags = ["--mca", "btl_tcp_if_include", "10.99.0.0/24"]
    end_of(hosts, tmp_path, [*mpirun(hosts, *flags), *DOCTOR], code=0)


def test_mpiruns_own_words_on_a_network_that_leads_nowhere(hosts, tmp_path):
    """Not even our ranks are started, so nobody says a word."""
    with Job(hosts, tmp_path, *mpirun(hosts, "--mca", "oob_tcp_if_include", "eth1"), *DOCTOR) as job:
        with pytest.raises(AssertionError, match="still running"):
            job.wait(15)
        assert job.output() == ""
    assert "nothing at all, not even from hvdformer" in PAGE


def test_an_interface_that_is_not_there(hosts, tmp_path):
    text = end_of(hosts, tmp_path, [*mpirun(hosts, "--mca", "oob_tcp_if_include", "eth9"), *DOCTOR])
    expected = (
        "None of the TCP networks specified to be included for out-of-band communications could be found"
    )
    assert_told(text, expected)
    text = end_of(hosts, tmp_path, [*mpirun(hosts, "--mca", "btl_tcp_if_include", "eth9"), *DOCTOR])
    assert_told(text, "An invalid value was given for btl_tcp_if_include")
    assert_told(text, "unable to reach each other for MPI communications")
    text = end_of(hosts, tmp_path, [*horovodrun(hosts, "gloo", "--network-interfaces", "eth9"), *DOCTOR])
    assert_told(text, "KeyError: 'eth9'")


@pytest.mark.parametrize("kind", ["gloo", "mpi"])
def test_horovodrun_is_told_the_network(kind, hosts, tmp_path):
    """Its own look at the networks takes longer than it waits, where one swallows everything."""
    text = end_of(hosts, tmp_path, [*horovodrun(hosts, kind), *DOCTOR])
    assert_told(text, "Timed out waiting for tasks to start. Please check connectivity between servers")
    command = horovodrun(hosts, kind, "--network-interfaces", "eth0")
    assert "training can work here" in end_of(hosts, tmp_path, [*command, *DOCTOR], code=0)


def test_gloo_on_a_network_that_leads_nowhere(hosts, tmp_path):
    """Gloo aborts; before that, we say why."""
    text = end_of(hosts, tmp_path, [*horovodrun(hosts, "gloo", "--network-interfaces", "eth1"), *DOCTOR])
    assert_told(text, "does not reach horovodrun at")
    assert f"rank 1 on {hosts.names[1]} does not reach horovodrun at 10.98.0.1" in text


def test_a_firewall_between_the_ranks_of_gloo(hosts, tmp_path):
    """The ranks reach horovodrun, but not each other."""
    command = horovodrun(hosts, "gloo", "--network-interfaces", "eth0")
    program = 'if [ "$HOROVOD_RANK" = 1 ]; then sleep 60; fi; exec "$@"'
    text = end_of(hosts, tmp_path, [*command, "bash", "-c", program, "bash", *DOCTOR])
    assert_told(text, "has waited 20 s for", "Wait timeout after 30 seconds for key(s)")
    assert_told(text, "HOROVOD_GLOO_TIMEOUT_SECONDS")


def test_ssh_that_does_not_work(hosts, tmp_path):
    keys = hosts.folder / "ssh"
    for name, expected in (
        ("authorized_keys", "Permission denied (publickey"),
        ("config", "Host key verification failed"),
    ):
        (keys / name).rename(keys / "away")
        (keys / "known_hosts").unlink(missing_ok=True)
        try:
            text = end_of(hosts, tmp_path, [*mpirun(hosts), "true"])
        finally:
            (keys / "away").rename(keys / name)
        assert_told(text, expected, "ORTE was unable to reliably start one or more daemons")


def test_mpirun_without_its_path(hosts, tmp_path):
    text = end_of(hosts, tmp_path, ["mpirun", *mpirun(hosts)[1:], "true"])
    assert_told(text, "orted: command not found")
    program = "from mpi4py import MPI"
    command = mpirun(hosts, "--mca", "orte_launch_agent", str(jobs.BIN / "orted"))[1:]
    text = end_of(hosts, tmp_path, ["mpirun", *command, "python", "-c", program])
    assert_told(
        text, "But I couldn't open the help file", "help-pmix", "An error occurred in MPI_Init_thread"
    )


def test_a_host_with_another_version(hosts, tmp_path):
    init = jobs.ROOT / "hvdformer" / "__init__.py"
    (tmp_path / "other.py").write_text(init.read_text() + '__version__ = "0.0.9"\n')
    command = [*mpirun(hosts, "--mca", "btl_tcp_if_include", "eth0"), jobs.HVDFORMER, "train", TINY]
    hosts.change(hosts.names[1], "mount", "--bind", str(tmp_path / "other.py"), str(init))
    try:
        text = end_of(hosts, tmp_path, [*command, "--run-dir", "run"], code=2)
    finally:
        hosts.change(hosts.names[1], "umount", str(init))
    assert_told(text, "has another versions than rank 0")
    assert f"rank 1 on {hosts.names[1]}" in text and "hvdformer '0.0.9'" in text
