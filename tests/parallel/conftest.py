"""These tests run inside the ranks, at any world size: `mpirun -np 3 python -m pytest tests/parallel`.

Every rank runs every test. tests/integration/test_parallel.py starts them at sizes 2 and 3 under both launchers.
"""

import pytest
import torch

from hvdformer.distributed import comm


@pytest.fixture(scope="session")
def world():
    torch.set_num_threads(1)
    joined = comm.connect()
    yield joined
    comm.disconnect()


@pytest.fixture(autouse=True)
def together(world, request):
    """Begin each test together, so that a rank that failed one is not taken for a slow one in the next."""
    names = comm.gather_json(request.node.nodeid, f"begin {request.node.nodeid}")
    assert names == [request.node.nodeid] * world.size
