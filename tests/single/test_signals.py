"""A wish to stop that is heard twice is one wish; a second SIGTERM or SIGINT is not."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from hvdformer.signals import StopRequest
stop = StopRequest()
stop.install()
for number in sys.argv[1:]:
    os.kill(os.getpid(), int(number))
print(stop.number)
"""


@pytest.mark.parametrize(
    "numbers,code",
    [
        ([signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1], 0),  # LSF to all processes, and mpirun on its own
        ([signal.SIGTERM, signal.SIGUSR1], 0),
        ([signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM),
        ([signal.SIGUSR1, signal.SIGINT], 128 + signal.SIGINT),
    ],
)
def test_a_second_signal(numbers, code):
    command = [sys.executable, "-c", PROGRAM, *(str(int(number)) for number in numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code == 0:
        assert done.stdout.strip() == str(int(numbers[0]))
