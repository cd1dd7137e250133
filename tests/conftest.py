"""One tiny run, made once as a user would make it, that several tests look at; and the order of the files.

With pytest-xdist (`-n`) the tests of a file share a process, and all processes share the tiny run.

Most of the tests' time is XLA's. So programs of the tests are compiled without LLVM's optimisations and by the older of
XLA's two code generators for CPUs, since compiling takes longer than what they save, unless
JAX_DISABLE_MOST_OPTIMIZATIONS=false; the runs of `start` are compiled as a user's.
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}
OLDER = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}

ROOT = pathlib.Path(__file__).parents[1]
TINY = "tests/tiny.py"
# Files that take longest begin first where processes share the work; a long one at the end would keep the others idle.
LONG = ("run", "sampler", "bench", "collect", "plan", "fuzz_tools", "loss", "tree_attention")


def is_known(flags):
    """Whether XLA knows them: it ends a process that asks for one that it has no more."""
    environment = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
    return done.returncode == 0


# Before JAX is imported; processes inherit both.
quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true") == "true"
if quick and "PYTEST_XDIST_WORKER" not in os.environ and is_known(OLDER):
    os.environ |= OLDER


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {f"test_{name}.py": place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: rank.get(item.path.name, len(rank)))  # stable: the order of a file is kept


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this session of pytest, the same one in each of its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compile_cache(shared_folder):
    """All tiny runs compile the same programs; once is enough."""
    return str(shared_folder / "compile_cache")


@pytest.fixture(scope="session")
def start(compile_cache):
    """Starts a run of tests/tiny.py in a folder and returns the process, output and errors captured."""

    def popen(workdir, *more, cache=compile_cache):
        command = [sys.executable, "-m", "experiments.run", TINY, "--workdir", str(workdir), *more]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | OPTIMISED | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture(scope="session")
def tiny_run(shared_folder, start):
    """The folder of a finished, undisturbed run. Tests leave it as it is."""
    workdir = shared_folder / "tiny"
    # The process that comes first makes it, and the others wait.
    with open(shared_folder / "tiny.made", "a") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        if os.fstat(made.fileno()).st_size == 0:
            shutil.rmtree(workdir, ignore_errors=True)  # of one that failed
            process = start(workdir)
            output, errors = process.communicate(timeout=900)
            assert process.returncode == 0, output + errors
            made.write("yes")
    return workdir
