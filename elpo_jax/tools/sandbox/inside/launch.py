"""Starts a worker: gives up the host's user, enters the isolation, becomes the zygote.

Run by file name with the settings as its only argument and the socket to the host as standard input, in a clean
environment. This process stays: it waits for the worker and for the host, and if either ends, ends the other's side.
"""

import contextlib
import importlib.machinery
import json
import os
import select
import signal
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
from inside import linux, scratch, zygote  # noqa: E402

NOBODY = 65534
UIDS = (1_900_000_000, 60_000)  # nobody's; the second for user namespaces that map only the usual 65,536


def main(settings: dict) -> None:
    """Sets the layers in force and serves; see `backends.py` for the settings.

    Raises:
      OSError: If the kernel refuses a step.
    """
    sys.argv[:] = sys.orig_argv[:] = [zygote.program.NAME]
    sys.path.remove(HERE)
    {"namespaces": _namespaces, "landlock": _landlock, "serve": _serve}[settings["enter"]](settings)


class _Packages:
    """Finds the packages that programs may import, and no others that happen to lie beside them.

    Args:
      folders: Where to look.
      names: Of modules and packages.
    """

    def __init__(self, folders: list[str], names: list[str]):
        self._folders, self._names = folders, frozenset(names)

    def find_spec(self, name: str, path=None, target=None):
        if path is None and name in self._names:
            return importlib.machinery.PathFinder.find_spec(name, self._folders, target)
        return None


def _serve(settings: dict) -> None:
    """What is left to do once this process is where programs may run."""
    sys.meta_path.append(_Packages(settings["site"], settings["names"]))
    zygote.main(settings)


def _drop_user() -> bool:
    """Becomes a user that nobody else is, for good, if this is root. Returns whether it did."""
    if os.geteuid() != 0:
        return False
    try:
        os.setgroups([])
    except PermissionError:
        raise OSError("this is root without the capability to become somebody else (CAP_SETUID, CAP_SETGID)") from None
    for base in UIDS:
        uid = base + int.from_bytes(os.urandom(4)) % (1 << 24 if base > 65535 else 1000)
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            break
        except OSError:
            continue
    else:
        raise OSError("no unused user id can be taken")
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # or its own /proc files would belong to root
    return True


def _watch_over(worker: int, folder: str = "") -> None:
    """Waits until the worker or the host ends; then nothing of the worker is left."""
    poller = select.poll()
    handle = os.pidfd_open(worker)
    poller.register(handle, select.POLLIN)
    poller.register(0, select.POLLHUP)
    poller.poll()
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    if folder:
        scratch.remove(folder)
    os._exit(0)


def _namespaces(settings: dict) -> None:
    layers = settings["layers"]
    binds, devices = settings["binds"], settings["devices"]
    root = os.geteuid() == 0
    trees = []
    if root:  # a folder may be readable for root alone, so root opens it; what is opened is all that goes along
        with contextlib.suppress(PermissionError):  # root of a container that may not mount: then as anybody else
            trees = _open_trees(binds, devices)
    if "uid" in layers:
        _drop_user()
    uid, gid = os.geteuid(), os.getegid()
    flags = linux.NAMESPACES["user"]
    for name in ("mount", "pid", "net", "ipc", "uts"):
        flags |= linux.NAMESPACES[name] if name in layers or name in ("mount", "pid") else 0
    linux.unshare(flags)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    if not trees:
        trees = _open_trees(binds, devices)
    linux.mount("none", "/", "none", linux.MS_REC | linux.MS_PRIVATE)
    if "mount" in layers:
        _enter_root(settings, trees)
    if "uts" in layers:
        linux.set_hostname("sandbox")
    worker = os.fork()
    if worker:
        linux.drop_capabilities()
        _watch_over(worker)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.keep_capability(linux.CAP_SYS_ADMIN)
    python = settings["python"]
    # Nothing else goes along: where things lie outside is nobody's business in there.
    wanted = {
        name: settings[name]
        for name in ("layers", "packages", "site", "names", "scratch", "keep", "fds", "count_threads")
    }
    command = [python["executable"], *python["options"], python["script"], json.dumps(wanted | {"enter": "serve"})]
    os.execve(python["executable"], command, python["environment"])


def _open_trees(binds: list, devices: list) -> list[tuple[int, str, bool]]:
    """Detached copies of mounts, with their target and whether that is a file."""
    trees = []
    for source, target in [*binds, *((device, device) for device in devices)]:
        tree = linux.open_tree(source)
        attributes = linux.ATTR_NOSUID | linux.ATTR_RDONLY
        if source not in devices:
            attributes |= linux.ATTR_NODEV
        linux.set_mount(tree, "", attributes, recursive=True)
        trees.append((tree, target, not os.path.isdir(source)))
    return trees


def _enter_root(settings: dict, trees: list[tuple[int, str, bool]]) -> None:
    """Makes a root of nothing but `trees`, read-only, and goes there."""
    base = next(path for path in ("/tmp", "/dev/shm", "/mnt", "/proc") if os.path.isdir(path))
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("root", base, "tmpfs", flags, "size=1m,nr_inodes=1000,mode=755")
    os.chdir(base)
    for tree, target, is_file in trees:
        path = f"{base}{target}"
        os.makedirs(os.path.dirname(path) if is_file else path, exist_ok=True)
        if is_file:
            os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o644))
        linux.move_mount(tree, path)
        os.close(tree)
    for target, link in settings["links"]:
        os.makedirs(os.path.dirname(f"{base}{link}"), exist_ok=True)
        os.symlink(target, f"{base}{link}")
    os.makedirs(f"{base}/tmp", exist_ok=True)
    linux.pivot_root_here()
    linux.set_mount(linux.AT_FDCWD, "/", linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV, recursive=False)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # open() would want to import a codec, which may be out of reach
    os.write(fd, text.encode())
    os.close(fd)


def _landlock(settings: dict) -> None:
    # Opened while this may be root, and kept at the same numbers: a folder that only root can walk to is reached
    # through its descriptor.
    opened = {path: zygote.out_of_the_way(os.open(path, os.O_PATH)) for path in settings["readable"]}
    dropped = "uid" in settings["layers"] and _drop_user()
    keep = set()

    def reachable(path: str) -> str:
        if os.access(path, os.R_OK | os.X_OK):
            return path
        top = max((p for p in opened if path == p or path.startswith(f"{p}/")), key=len, default=None)
        if top is None:
            return path
        keep.add(opened[top])
        return f"/proc/self/fd/{opened[top]}{path[len(top) :]}"

    sys.path[:] = map(reachable, sys.path)
    site = [reachable(path) for path in settings["site"]]
    for module in list(sys.modules.values()):  # packages remember where the rest of them lies
        if hasattr(module, "__path__"):
            module.__path__ = [reachable(path) for path in module.__path__]
    sys.path_importer_cache.clear()
    file = linux.FS_READ_FILE
    rights = {
        "list": linux.FS_READ_DIR,
        "folder": linux.FS_READ_DIR | file | linux.FS_EXECUTE,
        "file": file,
        "writable": file | linux.FS_WRITE_FILE,
    }
    folder = settings["scratch"]
    if folder:
        os.mkdir(folder, 0o700)
        os.environ["HOME"] = os.environ["TMPDIR"] = folder
    settings |= {
        "fds": [[fd, rights[settings["readable"][path]]] for path, fd in opened.items()],
        "keep": sorted(keep),
        "site": site,
        "count_threads": dropped,
    }
    worker = os.fork()
    if worker:
        _watch_over(worker, folder)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    _serve(settings)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
