"""Two hosts on a slow network: network namespaces, ssh between them, and the bytes that really cross the cable."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks.hosts import is_up, missing, network
from tests import jobs

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not here: {', '.join(missing())}")

RATE, SECONDS = "100mbit", 0.1  # a rank sends this long
EXCHANGE = f"""
import time, torch, horovod.torch as hvd
hvd.init()
num_bytes = int({SECONDS} * 100e6 / 8)
one, many = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(2 * num_bytes, dtype=torch.uint8)
for name, call in (("alltoall", lambda: hvd.alltoall(many, name="a")), ("allgather", lambda: hvd.allgather(one, name="g"))):
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    if hvd.rank() == 0:
        print(f"{{name}}: {{sorted(seconds)[4]:.3f}} s", flush=True)
"""


def test_two_hosts_send_while_they_receive(tmp_path):
    """Gloo as published takes twice the time: the rank that is later receives after it has sent."""
    with network(tmp_path, 2, RATE) as hosts:
        (tmp_path / "exchange.py").write_text(EXCHANGE)
        command = ["horovodrun", "--gloo", "--network-interfaces", "eth0", "-np", "2"]
        command += ["-H", ",".join(f"{name}:1" for name in hosts.names)]
        command += [sys.executable, str(tmp_path / "exchange.py")]
        log = tmp_path / "log"
        assert hosts.start(hosts.names[0], *command, log=log).wait(120) == 0, log.read_text()
    found = {name: float(seconds) for name, seconds in re.findall(r"(\w+): ([\d.]+) s", log.read_text())}
    assert set(found) == {"alltoall", "allgather"}
    for name, seconds in found.items():
        assert seconds < 1.5 * SECONDS, name


def test_the_bytes_that_a_fusion_counts_cross_the_network(tmp_path):
    fusion = "allreduce,allreduce:wire=bf16,zero1,exact,diloco:every=10"
    command = [sys.executable, "-m", "benchmarks.network", "--rate", "400mbit", "--fusion", fusion]
    command += ["--brief", fusion, "--out", str(tmp_path / "results.json")]
    command += ["model.width=128", "model.layers=2", "train.evaluate_sequences=8"]
    done = subprocess.run(
        command,
        cwd=jobs.ROOT,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    found = {row["fusion"]: row for row in report["results"]}
    for kind, row in found.items():
        # TCP, its acknowledgements and Horovod's negotiation come on top of the payload.
        assert 1.0 < row["bytes_per_step_on_wire"] / row["bytes_per_step_counted"] < 1.25, kind
    assert found["allreduce"]["bytes_per_step_counted"] == pytest.approx(4 * report["parameters"], rel=1e-3)
    halved = (
        found["allreduce:wire=bf16"]["bytes_per_step_on_wire"] / found["allreduce"]["bytes_per_step_on_wire"]
    )
    assert halved == pytest.approx(0.5, abs=0.05)
    assert not is_up(), "left behind"
