"""Which isolation this machine offers: what each backend asks of a worker, and the self-test that chooses one.

A backend counts as working only if programs that try to break out of it, run at start-up, could not.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Sequence

from elpo_jax.tools.base import InfrastructureError

INSIDE = pathlib.Path(__file__).with_name("inside")

# What stands between a program and the machine, in the order in which it is set up. `tests/test_sandbox_attacks.py`
# holds that none of them could be left out unnoticed.
LAYERS = {
    "namespaces": (
        *("uid", "mount", "pid", "net", "ipc", "uts", "environment"),  # once per worker
        *("tmpfs", "rlimits", "capabilities", "no_new_privs", "close_fds", "seed", "seccomp"),  # once per program
    ),
    "landlock": (
        *("uid", "environment"),
        *("rlimits", "no_new_privs", "landlock", "close_fds", "seed", "seccomp", "watch"),
    ),
    "unsafe": ("environment", "rlimits", "close_fds", "seed", "watch"),
}

# Strongest first.
LOCAL = ("namespaces", "landlock")

_OPTIONS = ["-s", "-S", "-P", "-B", "-X", "utf8"]  # -I is not among them: it ignores PYTHONHASHSEED
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "MALLOC_ARENA_MAX": "1",  # an arena per thread is 64 MiB of address space
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/libx32", "/lib", "/lib64", "/nix/store", "/usr/share/zoneinfo")


class SandboxUnavailable(InfrastructureError):
    """No backend isolates programs on this machine; the message says what failed and what would help."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How to start a worker: the command, its environment, and the settings, its last argument as JSON."""

    command: Sequence[str]
    environment: dict[str, str]
    settings: dict


def launch(backend: str, packages: Sequence[str], without: Sequence[str], scratch: str) -> Launch:
    """What starts a worker of a backend.

    Args:
      backend: "namespaces", "landlock" or "unsafe".
      packages: Distributions that programs can import.
      without: Layers to leave out, for tests that want to see them missed.
      scratch: A folder that does not exist yet, on a file system in memory; "" for none. Namespaces need none.

    Raises:
      SandboxUnavailable: If a package is not installed.
      ValueError: If a layer is unknown.
    """
    if unknown := set(without) - set(LAYERS[backend]):
        raise ValueError(f"the backend {backend} has no layer {', '.join(sorted(unknown))}")
    layers = [layer for layer in LAYERS[backend] if layer not in without]
    site = package_paths(tuple(packages))
    prefix = pathlib.Path(sys.base_prefix)
    libraries = [prefix / name for name in dict.fromkeys(("lib", sys.platlibdir)) if (prefix / name).is_dir()]
    outside = str(pathlib.Path(sys._base_executable).resolve())
    loader = os.environ.get("LD_LIBRARY_PATH", "")
    inside_root = backend == "namespaces" and "mount" in layers
    settings = {
        "enter": "namespaces" if backend == "namespaces" else "landlock",
        "layers": layers,
        "packages": [name.replace("-", "_") for name in packages],
        "names": sorted({path.name.partition(".")[0] for path in site}),
        "keep": [],
        "fds": [],
        "count_threads": True,
        "scratch": "/tmp" if backend == "namespaces" else scratch,
    }
    environment = _ENVIRONMENT | ({} if "environment" in layers else dict(os.environ))
    script = str(INSIDE / "launch.py")
    if inside_root:
        settings |= {
            "site": ["/python/site"],
            "binds": [
                [outside, "/python/bin/python3"],
                [str(INSIDE), "/python/inside"],
                *([str(path), f"/python/{path.name}"] for path in libraries),
                *([str(path), f"/python/site/{path.name}"] for path in site),
                *([path, path] for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path)),
            ],
            "links": [[os.readlink(path), path] for path in _SYSTEM if os.path.islink(path)],
            "devices": [path for path in _DEVICES if os.path.exists(path)],
            "python": {
                "executable": "/python/bin/python3",
                "options": _OPTIONS,
                "script": "/python/inside/launch.py",
                "environment": environment
                | {"PYTHONHOME": "/python", "LD_LIBRARY_PATH": ":".join(f"/python/{p.name}" for p in libraries)},
            },
        }
    else:
        folders = sorted({str(path.parent) for path in site})
        readable = dict.fromkeys(folders, "list")
        everything = [*map(str, libraries), *map(str, site), *_SYSTEM, *_DEVICES]
        readable |= {path: "folder" if os.path.isdir(path) else "file" for path in everything if os.path.exists(path)}
        readable |= {"/dev/null": "writable"}
        settings |= {
            "site": folders,
            "readable": readable,
            "binds": [],
            "links": [],
            "devices": [],
            "python": {"executable": outside, "options": _OPTIONS, "script": script, "environment": environment},
        }
    start = environment | ({"LD_LIBRARY_PATH": loader} if loader else {})
    return Launch([outside, *_OPTIONS, script], start, settings)


@functools.cache
def package_paths(packages: tuple[str, ...]) -> list[pathlib.Path]:
    """The files and folders of installed distributions and of what they need.

    Raises:
      SandboxUnavailable: If one is not installed.
    """
    found: dict[str, list[pathlib.Path]] = {}
    waiting = list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise SandboxUnavailable(
                f"programs are to import {name}, which is not installed: pip install -r requirements.txt, or leave it "
                "out of the sandbox's packages"
            ) from None
        tops = {
            file.parts[0] for file in distribution.files or () if not file.parts[0].startswith(("..", "__pycache__"))
        }
        paths = [pathlib.Path(distribution.locate_file(top)).resolve() for top in sorted(tops)]
        found[name] = [path for path in paths if not path.name.endswith(".dist-info") and path.exists()]
        for requirement in distribution.requires or ():
            if ";" not in requirement:
                waiting.append(re.match(r"[A-Za-z0-9._-]+", requirement)[0])
    return [path for paths in found.values() for path in paths]


def fixes() -> str:
    """Two commands that would give this machine a backend."""
    apparmor = pathlib.Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if apparmor.exists() and apparmor.read_text().strip() == "1":
        first = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    elif pathlib.Path("/proc/sys/kernel/unprivileged_userns_clone").exists():
        first = "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    else:
        first = "sudo sysctl -w user.max_user_namespaces=15000"
    container = pathlib.Path("/.dockerenv").exists() or pathlib.Path("/run/.containerenv").exists()
    second = (
        "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined ... (this is a container)"
        if container
        else f"boot Linux 5.13 or newer with lsm=landlock,... on its command line (this is {platform.release()})"
    )
    return f"  1. {first}\n  2. {second}"


def supported_platform() -> str:
    """Why no local backend can work here, or ""."""
    if sys.platform != "linux":
        return f"programs are isolated by the Linux kernel, and this is {sys.platform}"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"there is no system-call table for {platform.machine()}"
    return ""
