"""Installing: the lists of packages agree with each other, and a failing step says what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from course import ROOT

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")


def requirements():
    """The requirements of the package with the extras that are installed, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["lab"], *extras["clip"], *extras["homework"], *extras["dev"]]
    listed = [Requirement(text) for text in texts if not text.startswith("lecture26")]
    return {requirement.name: requirement for requirement in listed}


def locked():
    """The requirements of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_environment_has_the_ranges_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {}
    for line in environment:
        if isinstance(line, str):
            name, _, versions = line.partition(" ")
            conda[name] = set(filter(None, versions.split(",")))
    expected = {
        CONDA_NAMES.get(name, name): set(filter(None, str(requirement.specifier).split(",")))
        for name, requirement in requirements().items()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected["python"] = set(project["requires-python"].split(","))
    expected["pip"] = set()
    assert conda == expected
    assert environment[-1] == {"pip": ["-e ."]}


def test_lock_pins_every_requirement_within_its_range():
    pins = {}
    for pin in locked():
        pins.setdefault(pin.name, []).append(pin)
    for name, requirement in requirements().items():
        assert canonicalize_name(name) in pins, f"{name} is not in requirements.lock"
        for pin in pins[canonicalize_name(name)]:
            (version,) = pin.specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), f"{pin} is not within {requirement}"


def test_lock_holds_exact_versions_and_no_places():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|--|file:|@", text)
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in locked())


def test_lock_leaves_the_cuda_packages_to_torch():
    assert not [pin.name for pin in locked() if re.match("nvidia|cuda|triton", pin.name)]


def install(folder, **variables):
    """Run tools/install.sh for the virtual environment folder/venv, folder/bin first on the PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", **variables}
    command = ["sh", str(ROOT / "tools" / "install.sh"), str(folder / "venv")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def program(path, text):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def wrong_python(folder):
    """A PATH on which every Python is of a version that does not fit."""
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        program(folder / "bin" / name, "exit 1")


def test_named_python_that_does_not_fit(tmp_path):
    program(tmp_path / "bin" / "old", "exit 1")
    outcome = install(tmp_path, PYTHON=str(tmp_path / "bin" / "old"))
    assert outcome.returncode == 1
    assert "bin/old is not a Python 3.11, 3.12 or 3.13" in outcome.stderr


def test_no_python_that_fits(tmp_path):
    wrong_python(tmp_path)
    outcome = install(tmp_path)
    assert outcome.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 found" in outcome.stderr and "make lab PYTHON=" in outcome.stderr


def test_first_python_that_fits_is_taken(tmp_path):
    wrong_python(tmp_path)
    program(tmp_path / "bin" / "python3.11", 'case "$1" in -c) exit 0;; *) echo "asked: $*"; exit 1;; esac')
    outcome = install(tmp_path)
    assert "asked: -m venv" in outcome.stdout
    assert "python3-venv is needed" in outcome.stderr


@pytest.mark.parametrize(("torch", "free", "enough"), [("", 7, False), ("", 9, True), ("cpu", 3, True)])
def test_disk_space(tmp_path, torch, free, enough):
    wrong_python(tmp_path)
    program(tmp_path / "bin" / "python3.12", '[ "$1" = -c ]')
    program(tmp_path / "bin" / "df", f"echo head; echo disk 1 1 {free}000000 1 /")
    outcome = install(tmp_path, TORCH=torch)
    assert outcome.returncode == 1
    assert ("free disk space" in outcome.stderr) != enough
    assert ("make lab TORCH=cpu" in outcome.stderr) != enough


def test_without_network(tmp_path):
    """pip fails: the message says what to look at."""
    program(tmp_path / "venv" / "bin" / "python", 'case "$1 $3" in "-m install") exit 1;; esac')
    outcome = install(tmp_path)
    assert outcome.returncode == 1
    assert "Without a network" in outcome.stderr


def test_nbgraders_menus_are_kept_out_of_jupyterlab(tmp_path):
    """Installing ends with it; whatever nbgrader adds to the server and the browser is off."""
    program(tmp_path / "venv" / "bin" / "python", 'echo "asked: $*"')
    outcome = install(tmp_path)
    assert outcome.returncode == 0
    assert outcome.stdout.splitlines()[-1] == "asked: tools/quiet_jupyter.py"

    script = ROOT / "tools" / "quiet_jupyter.py"
    run = f"runpy.run_path({str(script)!r}, run_name='__main__')"
    code = f"import runpy, sys; sys.prefix = {str(tmp_path)!r}; {run}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    of_environment = tmp_path / "etc" / "jupyter"
    page = json.loads((of_environment / "labconfig" / "page_config.json").read_text())
    assert page["disabledExtensions"]["@jupyter/nbgrader"]
    brought = json.loads((Path(sys.prefix) / "etc/jupyter/jupyter_server_config.d/nbgrader.json").read_text())
    off = {}
    for file in (of_environment / "jupyter_server_config.d").iterdir():
        off |= json.loads(file.read_text())["ServerApp"]["jpserver_extensions"]
    assert off == dict.fromkeys(brought["ServerApp"]["jpserver_extensions"], False)


def test_environment_that_was_left_half_made_is_made_anew(tmp_path):
    program(tmp_path / "venv" / "bin" / "python", 'case "$2" in pip) exit 1;; esac')
    wrong_python(tmp_path)
    program(tmp_path / "bin" / "python3.11", 'case "$1" in -c) exit 0;; *) echo "asked: $*"; exit 1;; esac')
    assert f"asked: -m venv --clear {tmp_path / 'venv'}" in install(tmp_path).stdout


@pytest.mark.parametrize(
    ("system", "advice"),
    [
        ("MINGW64_NT-10.0 x86_64", "follow 'Without make' in README.md"),
        ("Darwin x86_64", "no packages for Macs with Intel processors"),
    ],
)
def test_system_that_it_is_not_for(tmp_path, system, advice):
    program(tmp_path / "bin" / "uname", f"echo {system}")
    outcome = install(tmp_path)
    assert outcome.returncode == 1
    assert advice in outcome.stderr


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    inner = {"help", "lint", "tests", "nbval"}  # the parts of `make test`
    assert {target for target in targets.split() if f"make {target} " not in shown} == inner


def test_continuous_integration_calls_make_test_and_make_browser():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    text = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test\n" in text and text.endswith("exec make browser\n")
