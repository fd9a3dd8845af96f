"""Two hosts on a slow network: network namespaces, ssh between them, and the bytes that really cross the cable."""

import json
import subprocess
import sys

import pytest

from benchmarks.hosts import is_up, missing
from tests import jobs


@pytest.mark.skipif(bool(missing()), reason=f"not here: {', '.join(missing())}")
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
