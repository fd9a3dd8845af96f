"""What the tests of this folder need and is not here: python -m tests.cluster"""

import re
import sys

from benchmarks import hosts
from tests.cluster import slurm

missing = hosts.missing() + slurm.missing()
if missing:
    packages = sorted(set(re.findall(r"\(package ([\w-]+)\)", " ".join(missing))))
    lines = ["tests/cluster needs, and does not find:", *(f"  {what}" for what in missing)]
    if packages:
        lines.append(f"On Debian, as root: apt-get install --no-install-recommends {' '.join(packages)}")
    sys.exit("\n".join(lines))
