"""Imports point one way, and what is cheap to import stays so."""

import ast
import subprocess
import sys
import time

import pytest

from tests import jobs

PACKAGE = jobs.ROOT / "hvdformer"
LEVELS = [
    {"errors"},
    {"config", "horovod_source"},
    {
        "data",
        "models",
        "distributed",
        "optim",
        "metrics",
        "precision",
        "signals",
        "faults",
        "guards",
        "horovod_build",
    },
    {"tasks", "runtime", "generate", "failures"},
    {"state", "checkpoint", "run_folder", "doctor", "plan"},
    {"agreement", "reports", "run", "initialise", "evaluate", "inspection"},
    {"train"},
    {"compare", "elastic", "launch", "bench", "bench_rank"},
    {"cli", "__main__"},
]


def level(part):
    return next(number for number, parts in enumerate(LEVELS) if part in parts)


def imports(file):
    """(part of hvdformer, whether inside a function) for each import in a file."""
    tree = ast.parse(file.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                (node.module if node.module != "hvdformer" else f"hvdformer.{alias.name}", node in top)
                for alias in node.names
            )
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")


def part_of(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    own = level(part_of(file))
    for name, _ in imports(file):
        if name.startswith("hvdformer.") and name != "hvdformer.__version__":
            part = name.split(".")[1]
            assert level(part) <= own, f"{file.name} imports {name}, which stands above it"
            if part in ("data", "models", "distributed") and own == 2:
                assert part == part_of(file), f"{file.name} imports its sibling {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_horovod_and_mpi_stay_behind_their_door(file):
    for name, at_top in imports(file):
        if name.split(".")[0] in ("horovod", "mpi4py"):
            assert not at_top, "loaded inside functions only"
            allowed = (
                ("distributed", "elastic", "doctor")
                if name.startswith("horovod")
                else ("data", "doctor", "distributed")
            )
            assert part_of(file) in allowed


@pytest.mark.parametrize(
    "module,unloaded",
    [
        ("hvdformer", ["torch", "horovod", "mpi4py", "numpy"]),
        ("hvdformer.cli", ["torch", "horovod", "mpi4py", "numpy", "pydantic", "tokenizers"]),
        ("hvdformer.config", ["torch", "horovod", "mpi4py"]),
        ("hvdformer.train", ["horovod", "mpi4py", "rich", "transformers"]),
    ],
)
def test_what_an_import_does_not_load(module, unloaded):
    program = f"import sys, {module}; print([m for m in {unloaded!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=jobs.environment()
    )
    assert done.stdout.strip() == "[]"


def test_help_answers_within_0_3_seconds():
    """The best of five, since a busy machine can delay any one of them."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run(
            [jobs.HVDFORMER, "--help"], capture_output=True, text=True, check=True, env=jobs.environment()
        )
        seconds.append(time.perf_counter() - began)
    assert "horovodrun -np 2 hvdformer train" in done.stdout
    assert min(seconds) < 0.3, seconds
