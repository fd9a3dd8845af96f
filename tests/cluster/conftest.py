"""Hosts for the tests, or the reason why there are none."""

import pytest

from benchmarks import hosts
from tests.cluster import slurm


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory):
    """hvdformer1, hvdformer2 and hvdformer3."""
    if hosts.missing():
        pytest.skip(f"not here: {', '.join(hosts.missing())}")
    with hosts.network(tmp_path_factory.mktemp("hosts"), 3) as three:
        yield three


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Slurm on two hosts."""
    missing = hosts.missing() + slurm.missing()
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    # munge wants every folder on the way to its socket to be open to all.
    folder = tmp_path_factory.mktemp("slurm")
    with hosts.network(tmp_path_factory.mktemp("hosts"), 2) as two, slurm.slurm(two, folder) as cluster:
        yield cluster
