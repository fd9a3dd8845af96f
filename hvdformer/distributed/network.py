"""The way from host to host: what is checked before Horovod connects the ranks, and what is said if it takes long.

MPI waits for ever on a network that leads nowhere, and Gloo ends the process by an abort. Neither names the network.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil

from hvdformer.distributed.launcher import Launch
from hvdformer.errors import UserError

START_TIMEOUT = "HVDFORMER_START_TIMEOUT"  # seconds until a rank that cannot connect ends the job
_START_TIMEOUT_SECONDS = 600.0
_WORD_SECONDS = 20.0  # Gloo aborts after 30 (HOROVOD_GLOO_TIMEOUT_SECONDS)

# Networks that a host has for itself, with the same address on every host: those of containers and virtual machines.
_OWN_NETWORK = re.compile(
    r"docker\d+|br-[0-9a-f]{12}|virbr\d+|lxcbr\d+|lxdbr\d+|podman\d+|cni-podman\d+|cni\d+"
)
_USED = ("HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude")


class NoWay(UserError):
    """This host has no way to the others: what only its own ranks know, so that one of them has to tell it."""


def interfaces() -> dict[str, str]:
    """{interface: IPv4 address and length of the network} of this host's interfaces that are up, without the loopback."""
    found = {}
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and name in states and states[name].isup:
                length = ipaddress.ip_network(f"0.0.0.0/{address.netmask or '255.255.255.255'}").prefixlen
                if not address.address.startswith("127."):
                    found[name] = f"{address.address}/{length}"
    return found


def of(address: str) -> str:
    """The network of an address with its length: 10.99.0.0/24 of 10.99.0.1/24. Pure."""
    return str(ipaddress.ip_interface(address).network)


def shared(hosts: list[dict[str, str]]) -> list[str]:
    """The networks on which each of these hosts has an interface with an address of its own. Pure.

    hosts: what `interfaces` gives on each of them, one entry a host.
    """
    networks = [{of(address): address for address in host.values()} for host in hosts]
    common = set(networks[0]).intersection(*networks[1:])
    return sorted(name for name in common if len({host[name] for host in networks}) == len(hosts))


def check(launch: Launch | None, environment: Mapping[str, str]) -> None:
    """Look whether this rank of horovodrun's Gloo has the interface that was asked for, and reaches horovodrun.

    Raises:
        NoWay: it does not.
    """
    if launch is None or "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in environment:
        return
    wanted = environment.get("HOROVOD_GLOO_IFACE", "")
    names = psutil.net_if_addrs()
    if wanted and wanted not in names:
        raise NoWay(
            f"rank {launch.rank} on {socket.gethostname()}: there is no network interface {wanted} here, which Gloo is to "
            f"use, but {_listed(interfaces()) or 'none'}. {_advice(interfaces())}"
        )
    address = environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"], environment.get("HOROVOD_GLOO_RENDEZVOUS_PORT", "")
    if not address[1].isdecimal():
        return
    try:
        socket.create_connection((address[0], int(address[1])), timeout=10).close()
    except OSError as error:
        raise NoWay(
            f"rank {launch.rank} on {socket.gethostname()} does not reach horovodrun at {address[0]}, port {address[1]} "
            f"({error.strerror or error}): that is not an address of a network which the hosts share, or a firewall is between "
            f"them. Interfaces here: {_listed(interfaces())}. {_advice(interfaces())}"
        ) from None


@contextmanager
def waiting_for_ranks(launch: Launch | None, *, is_elastic: bool) -> Iterator[None]:
    """Within it this rank connects to the others: rank 0 tells if that takes long, and every rank ends if it takes too long.

    Ranks of one host do not need a network. Those of an elastic job have Horovod's own time limits.
    """
    is_needed = launch is not None and 1 < launch.size != launch.local_size and not is_elastic
    if launch is None or not is_needed:
        yield
        return
    is_connected = threading.Event()
    threading.Thread(target=_watch, args=(launch, is_connected), daemon=True, name="connect").start()
    try:
        yield
    finally:
        is_connected.set()


def _watch(launch: Launch, is_connected: threading.Event) -> None:
    limit = _start_timeout(os.environ)
    first = min(_WORD_SECONDS, limit)
    if is_connected.wait(first):
        return
    if launch.rank == 0:
        _tell(explain(launch, interfaces(), os.environ, first, limit))
    if is_connected.wait(limit - first):
        return
    if launch.rank == 0:
        _tell(f"the other ranks are not there after {limit:.0f} s ({START_TIMEOUT}): ended")
    sys.stderr.flush()
    os._exit(1)


def explain(
    launch: Launch, here: Mapping[str, str], environment: Mapping[str, str], seconds: float, limit: float
) -> str:
    """What may keep the ranks from each other, and what to try. Pure."""
    used = [f"{name}={environment[name]}" for name in _USED if environment.get(name)]
    own = [name for name in here if _OWN_NETWORK.fullmatch(name)]
    others = "1 other rank" if launch.size == 2 else f"{launch.size - 1} other ranks"
    lines = [
        f"rank {launch.rank} on {socket.gethostname()} has waited {seconds:.0f} s for {others}, and waits "
        f"{limit - seconds:.0f} s more. Either not all have started yet, or the hosts do not reach each other on the network "
        f"in use ({', '.join(used) or 'all interfaces that are up'}).",
        f"Interfaces of this host: {_listed(here) or 'none that is up'}."
        + (f" {', '.join(own)}: a network within each host, which leads to no other one." if own else ""),
        _advice(here),
    ]
    return "\n  ".join(lines)


def _advice(here: Mapping[str, str]) -> str:
    name = next((name for name in here if not _OWN_NETWORK.fullmatch(name)), "eth0")
    return (
        f"Name an interface that all hosts share, {name} if it is that: horovodrun --network-interfaces {name}, or mpirun "
        f"--mca btl_tcp_if_include {name} --mca oob_tcp_if_include {name} (docs/troubleshooting.md)"
    )


def _listed(here: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in here.items())


def _start_timeout(environment: Mapping[str, str]) -> float:
    try:
        return float(environment.get(START_TIMEOUT, ""))
    except ValueError:
        return _START_TIMEOUT_SECONDS


def _tell(message: str) -> None:
    sys.stderr.write(f"hvdformer: {message}\n")
    sys.stderr.flush()
