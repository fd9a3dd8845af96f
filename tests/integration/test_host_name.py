"""A host whose own name has no address: Gloo would abort without a word, so the word comes before it."""

import os
import shutil

import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
RENAMED = ["unshare", "--uts", "sh", "-c", 'hostname nowhere1 && exec "$@"', "sh"]  # for these processes only


@pytest.mark.skipif(os.geteuid() != 0, reason="another host name takes root")
@pytest.mark.skipif(not shutil.which("unshare"), reason="not installed: unshare")
@pytest.mark.parametrize("launcher,np,code", [("plain", 1, 2), ("horovodrun-gloo", 2, 2), ("mpirun", 2, 0)])
def test_a_host_name_without_an_address(launcher, np, code, tmp_path):
    command = jobs.command(launcher, np, "train", TINY, "train.sample_tokens=0", "--run-dir", "run")
    job = jobs.Job([*RENAMED, *command], tmp_path)
    try:
        found = job.wait(120)
    finally:
        job.end()
    assert found == code, job.output
    assert job.output.count("the name of this host, nowhere1, has no address") == (1 if code else 0)
    assert "terminate called" not in job.output and "backtrace" not in job.output
