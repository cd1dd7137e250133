"""The shell scripts: what they install and when, and what they say to arguments they do not take."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def bash(*command, **environment):
    settings = os.environ | {"EXTRA": "", "PYTHON": sys.executable} | environment
    return subprocess.run(["bash", *map(str, command)], cwd=ROOT, env=settings, capture_output=True, text=True)


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_quickstart_explains_itself(flag):
    done = bash("experiments/quickstart.sh", flag)
    assert done.returncode == 0 and "quickstart.sh [WORKDIR [--set KEY=VALUE ...]]" in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout


def test_the_quickstart_takes_no_option_for_a_folder(tmp_path):
    done = bash("experiments/quickstart.sh", "--set", "seed=1", VENV=tmp_path / "venv")
    assert done.returncode == 2 and "quickstart.sh runs/mine --set seed=1" in done.stderr and not done.stdout
    assert not (ROOT / "--set").exists() and not (tmp_path / "venv").exists()


def test_each_list_of_requirements_is_installed_once(tmp_path):
    log = tmp_path / "log"
    script(tmp_path / "venv/bin/python", f'[ "$3" = --version ] || echo "$*" >> {log}')
    script(tmp_path / "venv/bin/activate")
    for extra in ("", "tests/requirements.txt", "", "tests/requirements.txt"):
        done = bash("-c", "set -euo pipefail; . experiments/env.sh", VENV=tmp_path / "venv", EXTRA=extra)
        assert done.returncode == 0, done.stderr
    installed = [line.split()[-1] for line in log.read_text().splitlines()]
    assert installed == ["requirements.txt", "tests/requirements.txt"]
    (tmp_path / "venv/.installed-requirements.txt").write_text("an older list")
    bash("-c", ". experiments/env.sh", VENV=tmp_path / "venv")
    assert log.read_text().splitlines()[2].endswith("-r requirements.txt")


def test_an_environment_without_pip_is_made_again(tmp_path):
    """What a Debian without python3-venv leaves: a folder with a python and no pip."""
    script(tmp_path / "venv/bin/python", "exit 1")
    script(tmp_path / "python", '[ "$1" = -c ] || { echo "python $*"; exit 1; }')
    done = bash("-c", ". experiments/env.sh", VENV=tmp_path / "venv", PYTHON=tmp_path / "python")
    assert done.returncode == 1 and done.stdout == f"python -m venv {tmp_path / 'venv'}\n", done
