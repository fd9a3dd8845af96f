"""One engine and one build of each image for all tests; what was measured is shown at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image import engine as engines

FIGURES: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", metavar="TORCH", help="also build the image for GPUs, with this torch: 25 GB of disk"
    )
    parser.addoption("--keep", metavar="DIR", help="keep the engine's images in DIR, for the next call")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines to be shown at the end."""
    return FIGURES


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """A running engine that has the base image."""
    missing = engines.missing()
    if missing:
        # Not skipped: these tests are only ever asked for by name.
        pytest.fail(f"not here: {', '.join(missing)}", pytrace=False)
    keep = request.config.getoption("--keep", None)
    folder = Path(keep).resolve() if keep else Path(tempfile.mkdtemp(prefix="hvdformer-image-"))
    try:
        with engines.engine(folder) as running:
            running.make_base()
            yield running
    finally:
        if not keep:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image(engine: engines.Engine) -> str:
    """The image for CPUs."""
    engine.build("hvdformer")
    return "hvdformer"


@pytest.fixture(scope="session")
def ssh_image(engine: engines.Engine, image: str) -> str:
    engine.build("hvdformer-ssh", target="ssh")
    return "hvdformer-ssh"
