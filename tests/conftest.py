"""One tiny run, made once as a user would make it, that several tests look at."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TINY = "tests/tiny.py"


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """All tiny runs compile the same programs; once is enough."""
    return str(tmp_path_factory.mktemp("compile_cache"))


@pytest.fixture(scope="session")
def start(compile_cache):
    """Starts a run of tests/tiny.py in a folder and returns the process, output and errors captured."""

    def popen(workdir, *more, cache=compile_cache):
        command = [sys.executable, "-m", "experiments.run", TINY, "--workdir", str(workdir), *more]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, start):
    """The folder of a finished, undisturbed run. Tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    process = start(workdir)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, output + errors
    return workdir
