"""What is said of a host's networks, and a rank that cannot reach horovodrun."""

import socket
import time

import psutil
import pytest

from hvdformer.distributed import network
from hvdformer.distributed.launcher import Launch
from hvdformer.errors import UserError

RANK_1 = Launch("horovodrun (Gloo)", 1, 4, 1, 2)


def test_the_interfaces_are_those_of_this_host():
    found = network.interfaces()
    for name, address in found.items():
        ours = [a.address for a in psutil.net_if_addrs()[name] if a.family == socket.AF_INET]
        assert address.split("/")[0] in ours
    assert "lo" not in found


def test_shared_networks():
    first = {"eth0": "10.99.0.1/24", "docker0": "172.17.0.1/16", "ib0": "10.1.0.1/16"}
    second = {"enp3s0": "10.99.0.2/24", "docker0": "172.17.0.1/16"}
    # The network counts, not the name; and one where both have the same address joins nothing.
    assert network.shared([first, second]) == ["10.99.0.0/24"]
    assert network.shared([first, second, {"eth0": "192.168.0.1/24"}]) == []
    assert network.shared([first]) == ["10.1.0.0/16", "10.99.0.0/24", "172.17.0.0/16"]


def test_the_advice_names_an_interface_that_may_lead_elsewhere():
    here = {"docker0": "172.17.0.1/16", "br-0123456789ab": "172.18.0.1/16", "ib0": "10.1.0.1/16"}
    text = network.explain(RANK_1, here, {"OMPI_MCA_btl_tcp_if_include": "docker0"}, 20, 600)
    assert "docker0, br-0123456789ab: a network within each host" in text
    assert "(OMPI_MCA_btl_tcp_if_include=docker0)" in text
    assert "--network-interfaces ib0" in text and "--mca btl_tcp_if_include ib0" in text
    assert "20 s for 3 other ranks" in text and "waits 580 s more" in text
    # A bridge that a host made over its own card, with a name of its own, is a way to others.
    assert "--network-interfaces br0" in network.explain(RANK_1, {"br0": "10.0.0.1/8"}, {}, 20, 600)


def test_an_interface_that_is_not_here():
    environment = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_IFACE": "eth99"}
    with pytest.raises(UserError, match="no network interface eth99 here"):
        network.check(RANK_1, environment)


def test_horovodrun_that_is_not_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environment = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
        network.check(RANK_1, environment)
    with pytest.raises(UserError, match=f"does not reach horovodrun at 127.0.0.1, port {port}"):
        network.check(RANK_1, environment)
    network.check(None, environment)
    network.check(RANK_1, {})  # MPI


@pytest.mark.parametrize("launch", [None, Launch("mpirun (Open MPI)", 0, 2, 0, 2)])
def test_no_word_where_no_network_is_needed(launch, capfd, monkeypatch):
    monkeypatch.setenv(network.START_TIMEOUT, "0.05")
    with network.waiting_for_ranks(launch, is_elastic=False):
        time.sleep(0.3)  # the process would be ended
    assert capfd.readouterr().err == ""
