"""What attacks on the sandbox could harm, and how a program's process looks from outside.

A `World` is a set of canaries on the host: files, sockets, shared memory, environment variables, processes. `harm` says
what happened to them. `Anatomy` is what `/proc` tells of a program's process: whether every layer is there.
"""

import base64
import contextlib
import ctypes
import os
import pathlib
import resource
import secrets
import socket
import stat
import subprocess
import tempfile
import threading
import time

from sandbox_attacks import SECRET_PREFIX

from elpo_jax.tools.sandbox import Limits, Sandbox

_IPC_RMID, _SHM_SIZE = 0, 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmdt.argtypes = [ctypes.c_void_p]


class World:
    """Canaries. A context manager; make it before the sandbox that is to be attacked, and `adopt` its user after."""

    def __init__(self):
        self._stack = contextlib.ExitStack()
        # A thread or process name has 15 bytes.
        self.token = "elpo" + secrets.token_hex(5)
        names = ("public", "private", "owned", "held", "environment", "argument", "shm", "system_v", "code", "stdin")
        self.secrets = {name: SECRET_PREFIX + secrets.token_hex(16) for name in names}
        self._victim: subprocess.Popen | None = None

    def __enter__(self) -> "World":
        with self._stack:
            self._build()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        # Not below pytest's folder, which only its owner can enter: the sandbox has to keep these out, not a parent.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="canary-"))
        self._stack.callback(self._remove)
        self.folder.chmod(0o777)
        self.files = {}
        for name, mode in (("public", 0o644), ("private", 0o600), ("owned", 0o600), ("writable", 0o666)):
            self.files[name] = self.folder / name
            self.files[name].write_text(self.secrets.get(name, "nothing") + "\n")
            self.files[name].chmod(mode)
        (self.folder / "empty").mkdir()
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        fifo.chmod(0o666)
        self._fifo = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self._stack.callback(os.close, self._fifo)

        self._sockets: dict[str, socket.socket] = {}
        self._listen("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        port = self._sockets["tcp"].getsockname()[1]
        with contextlib.suppress(OSError):  # a machine without IPv6
            self._listen("tcp6", socket.AF_INET6, socket.SOCK_STREAM, ("::1", port))
        self._listen("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        for name, kind in (("unix", socket.SOCK_STREAM), ("unix_datagram", socket.SOCK_DGRAM)):
            self._listen(name, socket.AF_UNIX, kind, str(self.folder / name))
            (self.folder / name).chmod(0o777)
            self._listen(f"abstract_{name}", socket.AF_UNIX, kind, f"\0{self.token}-{name}")

        with open(self.folder / "held", "w+") as file:
            file.write(self.secrets["held"] + "\n")
            file.flush()
            self.held = os.dup(file.fileno())
        self._stack.callback(os.close, self.held)
        os.set_inheritable(self.held, True)
        (self.folder / "held").unlink()

        self.environment = {"ELPO_CANARY": self.secrets["environment"], "CANARY_API_KEY": self.secrets["environment"]}
        os.environ.update(self.environment)
        self._stack.callback(lambda: [os.environ.pop(name, None) for name in self.environment])

        self.shm = pathlib.Path("/dev/shm") / self.token
        if self.shm.parent.is_dir():
            self.shm.write_text(self.secrets["shm"])
            self.shm.chmod(0o666)
            self._stack.callback(self.shm.unlink, missing_ok=True)
        self._shmid = _libc.shmget(0, _SHM_SIZE, 0o1666)
        if self._shmid >= 0:
            self._stack.callback(_libc.shmctl, self._shmid, _IPC_RMID, None)
            self._system_v(write=self.secrets["system_v"].encode())

        self._sleeper = self._sleep()
        self.adopt(os.getuid())

    def _remove(self) -> None:
        """Removes the folder and never descends: what an attack put there, a mount even, must not be followed."""
        for path in list(self.folder.iterdir()) if self.folder.exists() else []:
            with contextlib.suppress(OSError):
                path.rmdir() if path.name == "empty" else path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _listen(self, name: str, family: int, kind: int, address) -> None:
        listener = self._stack.enter_context(socket.socket(family, kind))
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen(64)
        listener.setblocking(False)
        self._sockets[name] = listener

    def _sleep(self, **options) -> subprocess.Popen:
        command = ["/bin/sh", "-c", "read line", self.secrets["argument"]]
        environment = {"ELPO_CANARY": self.secrets["environment"]}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, cwd="/", **options)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def _system_v(self, write: bytes = b"") -> bytes:
        address = _libc.shmat(self._shmid, None, 0)
        try:
            if write:
                ctypes.memmove(address, write, len(write))
            return ctypes.string_at(address, _SHM_SIZE).rstrip(b"\0")
        finally:
            _libc.shmdt(address)

    def adopt(self, uid: int) -> None:
        """Gives the canaries to the user of the sandbox, so that not only the user id protects them."""
        if self._victim is not None:
            self._victim.kill()
            self._victim.wait()
        options = {"user": uid, "group": uid, "extra_groups": []} if uid != os.getuid() else {}
        self._victim = self._sleep(**options)
        if options:
            for path in (self.folder, *self.folder.iterdir()):
                if path.name not in ("private", "public"):
                    os.chown(path, uid, uid)
        until(lambda: all(_state(process.pid) == "S" for process in (self._victim, self._sleeper)))
        self._paths = (self.folder, *sorted(self.folder.iterdir()))
        self._before = self._snapshot()

    def values(self, limits: Limits) -> dict:
        """What attacks are told: where the canaries are, but not their secrets, and their limits."""
        return {
            **{name: str(path) for name, path in self.files.items()},
            "folder": str(self.folder),
            "empty": str(self.folder / "empty"),
            "fifo": str(self.folder / "fifo"),
            "unix": str(self.folder / "unix"),
            "unix_datagram": str(self.folder / "unix_datagram"),
            "abstract": f"{self.token}-unix",
            "abstract_datagram": f"{self.token}-unix_datagram",
            "tcp": self._sockets["tcp"].getsockname()[1],
            "udp": self._sockets["udp"].getsockname()[1],
            "held": self.held,
            "shm": str(self.shm),
            "shmid": max(self._shmid, 0),
            "pid": os.getpid(),
            "sleeper": self._sleeper.pid,
            "victim": self._victim.pid,
            "home": os.path.expanduser("~"),
            "here": os.getcwd(),
            "token": self.token,
            "machine": os.uname().nodename,
            "threads": limits.threads,
        }

    def revealed(self, text: str) -> list[str]:
        """Secrets in a text, plain or encoded."""
        found = []
        for name, secret in self.secrets.items():
            forms = (
                secret,
                secret[::-1],
                secret.encode().hex(),
                base64.b64encode(secret.encode()).decode().rstrip("="),
            )
            if any(form[:40] in text for form in forms):
                found.append(f"the secret {name!r} got out")
        return found

    def harm(self) -> list[str]:
        """What happened to the canaries since `adopt`; takes some milliseconds."""
        found = []
        now = self._snapshot()
        for name, before in self._before.items():
            if now.get(name) != before:
                found.append(f"{name} was {before!r} and is {now.get(name)!r}")
        for name, listener in self._sockets.items():
            try:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(100)
                found.append(f"something reached the {name} socket")
            except BlockingIOError:
                pass
        with contextlib.suppress(BlockingIOError):
            os.read(self._fifo, 100)
            found.append("something reached the fifo")
        places = ["/", "/tmp", "/var/tmp", "/dev/shm", "/run", os.getcwd(), os.path.expanduser("~"), str(self.folder)]
        for place in places:
            with contextlib.suppress(OSError):
                left = [name for name in os.listdir(place) if self.token in name and f"{place}/{name}" != str(self.shm)]
                found += [f"{place}/{name} was made" for name in left]
        with contextlib.suppress(AssertionError):  # a worker clears up after it has answered
            until(lambda: not self._left_in_memory(), 5)
        found += [f"{path} was left" for path in self._left_in_memory()[:20]]
        for pid in all_processes():
            with contextlib.suppress(OSError):
                if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == self.token[:15]:
                    found.append(f"process {pid} was left behind")
        return found

    def _left_in_memory(self) -> list[str]:
        return [
            f"{folder}/{name}"
            for folder, folders, files in os.walk("/dev/shm")
            for name in (*folders, *files)
            if self.token in name and f"{folder}/{name}" != str(self.shm)
        ]

    def _snapshot(self) -> dict:
        shot = {
            "the folder": sorted(os.listdir(self.folder)) if self.folder.exists() else None,
            "the host's name": os.uname().nodename,
            "the host's niceness": os.getpriority(os.PRIO_PROCESS, 0),
            "the host's processors": os.sched_getaffinity(0),
            "the host's limits": [resource.getrlimit(kind) for kind in range(16)],
            "the host's folder": os.getcwd(),
            "the host's clock": round((time.time() - time.monotonic()) / 60),
            "the shared memory": self._system_v() if self._shmid >= 0 else b"",
            "the shared memory file": self.shm.read_bytes() if self.shm.exists() else b"",
        }
        for path in self._paths:
            if not path.exists():
                shot[f"{path.name}'s facts"] = "gone"
                continue
            facts = path.lstat()
            shot[f"{path.name}'s facts"] = (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_nlink, facts.st_size)
            if stat.S_ISREG(facts.st_mode):
                shot[f"{path.name}'s text"] = (path.read_text(), facts.st_mtime_ns, os.listxattr(path))
        for name, process in (("sleeper", self._sleeper), ("victim", self._victim)):
            pid = process.pid
            if process.poll() is not None:
                shot[name] = "dead"
                continue
            status = _status(pid)
            shot[name] = (
                status["State"][:1],
                status["TracerPid"],
                os.getpriority(os.PRIO_PROCESS, pid),
                os.sched_getscheduler(pid),
                os.sched_getaffinity(pid),
                pathlib.Path(f"/proc/{pid}/limits").read_text(),
                pathlib.Path(f"/proc/{pid}/oom_score_adj").read_text(),
            )
        return shot


class Anatomy:
    """A program's process, seen from outside while it sleeps.

    Attributes:
      status: Lines of its `status` file.
      limits: Soft and hard limit by name, as text.
      namespaces: Their identities by name, and those of this process.
      mounts: (place, options, kind, options of the file system) of each.
      environment: Names and values the process was started with.
      descriptors: What each open descriptor is.
      interfaces: Of its network.
      hostname: Of its machine, as it sees it.
    """

    def __init__(self, pid: int):
        proc = pathlib.Path(f"/proc/{pid}")
        self.status = _status(pid)
        self.limits = {}
        for line in (proc / "limits").read_text().splitlines()[1:]:
            self.limits[line[:26].strip()] = (line[26:47].strip(), line[47:68].strip())
        names = ("user", "mnt", "pid", "net", "ipc", "uts")
        self.namespaces = {
            name: (os.readlink(proc / "ns" / name), os.readlink(f"/proc/self/ns/{name}")) for name in names
        }
        self.mounts = []
        for line in (proc / "mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.split(" ", 2)
            self.mounts.append((fields.split()[4], set(fields.split()[5].split(",")), kind, set(options.split(","))))
        entries = (proc / "environ").read_bytes().split(b"\0")
        self.environment = dict(entry.decode("utf-8", "replace").partition("=")[::2] for entry in entries if entry)
        self.descriptors = {}
        for entry in os.listdir(proc / "fd"):
            flags = (proc / "fdinfo" / entry).read_text().split("flags:")[1].split()[0]
            target = os.readlink(proc / "fd" / entry)
            self.descriptors[int(entry)] = "path" if int(flags, 8) & os.O_PATH else target
        self.interfaces = [line.split(":")[0].strip() for line in (proc / "net/dev").read_text().splitlines()[2:]]
        self.parent = int(self.status["PPid"])

    def missing(self, backend: str, limits: Limits, world: World) -> list[str]:
        """Layers of the sandbox that are not there, in words."""
        found = []

        def expect(holds: bool, what: str) -> None:
            if not holds:
                found.append(what)

        users = self.status["Uid"].split() + self.status["Gid"].split()
        expect("0" not in users, f"the user is root: {users}")
        if os.getuid() == 0:
            expect(len(set(users)) == 1 and int(users[0]) > 1000, f"users and groups are {users}")
            expect(self.status["Groups"].split() in ([], users[:1]), f"groups are {self.status['Groups']}")
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            expect(int(self.status[name], 16) == 0, f"{name} is {self.status[name]}")
        expect(self.status["NoNewPrivs"] == "1", "it could gain privileges")
        expect(self.status["Seccomp"] == "2", "system calls are not filtered")
        for name, (theirs, ours) in self.namespaces.items():
            if backend == "namespaces":
                expect(theirs != ours, f"the namespace {name} is the host's")
        if backend == "namespaces":
            self._expect_root(expect, limits)
            expect(self.interfaces in ([], ["lo"]), f"network interfaces: {self.interfaces}")
            expect(self.status["NSpid"].split()[-1] in ("1", "2"), f"process ids: {self.status['NSpid']}")
        self._expect_limits(expect, limits)
        expect(not set(self.environment) & set(world.environment), "it was started with the host's environment")
        allowed = {"PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX"}
        strange = {
            n
            for n in self.environment
            if n not in allowed and not n.startswith("PYTHON") and not n.endswith("_NUM_THREADS")
        }
        expect(not strange, f"environment variables: {sorted(strange)}")
        expect(self.environment.get("PYTHONHASHSEED") == "0", "hashes are not seeded")
        kinds = {fd: target.partition(":")[0] for fd, target in self.descriptors.items() if target != "path"}
        expect(set(kinds) <= {0, 1, 2, 3}, f"open descriptors: {self.descriptors}")
        expect(all(kinds.get(fd) == "pipe" for fd in (1, 2)), f"output goes to {self.descriptors}")
        expect("socket" not in kinds.values(), f"open sockets: {self.descriptors}")
        return found

    def _expect_root(self, expect, limits: Limits) -> None:
        scratch = [mount for mount in self.mounts if mount[0] == "/tmp"]
        expect(len(scratch) == 1, f"scratch folders: {scratch}")
        if len(scratch) != 1:
            return
        _, flags, kind, options = scratch[0]
        sizes = {f"size={limits.scratch_mb << 10}k", f"size={limits.scratch_mb}m"}
        expect(kind == "tmpfs" and {"nosuid", "nodev"} <= flags, f"the scratch folder is a {kind} with {flags}")
        expect(bool(options & sizes) and f"nr_inodes={limits.files}" in options, f"the scratch folder has {options}")
        for place, flags, kind, _ in self.mounts:
            known = (
                "/",
                "/tmp",
                "/python",
                "/usr",
                "/lib",
                "/dev/null",
                "/dev/zero",
                "/dev/random",
                "/dev/urandom",
                "/nix",
            )
            near = any(place == top or (top != "/" and place.startswith((top + "/", "/lib"))) for top in known)
            expect(near and place not in ("/dev", "/usr"), f"{place} is mounted")
            expect(kind not in ("proc", "sysfs", "cgroup", "cgroup2", "devpts"), f"{place} is a {kind}")
            expect("ro" in flags or place == "/tmp", f"{place} can be written")
            expect("nosuid" in flags, f"programs in {place} can change the user")
            expect("nodev" in flags or place.startswith("/dev/"), f"{place} can hold devices")

    def _expect_limits(self, expect, limits: Limits) -> None:
        for name, most in (
            ("Max cpu time", limits.cpu_s + 3),
            ("Max file size", limits.file_mb << 20),
            ("Max open files", limits.open_files),
            ("Max core file size", 0),
            ("Max locked memory", 1 << 20),
            ("Max msgqueue size", 1 << 20),
            ("Max address space", (limits.memory_mb << 20) + (2 << 30)),
        ):
            soft, hard = self.limits[name]
            expect(hard != "unlimited" and int(hard) <= most and soft == hard, f"{name} is {soft}, {hard}")


def observe(sandbox: Sandbox, limits: Limits) -> Anatomy:
    """Runs a program that sleeps and looks at its process."""
    code = "import ctypes, time\nctypes.CDLL(None).prctl(15, b'elpo-watched', 0, 0, 0)\ntime.sleep(0.8)\nprint('slept')"
    results = []
    thread = threading.Thread(target=lambda: results.append(sandbox.run(code, limits=limits)))
    thread.start()
    try:
        pid = until(lambda: next((pid for pid in descendants(os.getpid()) if _name(pid) == "elpo-watched"), None))
        return Anatomy(pid)
    finally:
        thread.join()
        if not results or results[0].stdout != "slept\n":
            raise AssertionError(f"the program that was to be looked at ended otherwise: {results}")


def all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(pid: int) -> set[int]:
    """Processes below a process, zombies included."""
    parents = {}
    for process in all_processes():
        with contextlib.suppress(OSError):
            parents[process] = int(pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        new = {process for process, parent in parents.items() if parent in new} - found
        found |= new
    return found


def memory_of(pids: set[int]) -> int:
    """Bytes that processes share or have, counted once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration):
            lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) << 10
    return total


def until(condition, seconds: float = 20.0):
    """Waits for `condition()` to be true and returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)
    return value


def _name(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _state(pid: int) -> str:
    return _status(pid)["State"][:1]


def _status(pid: int) -> dict[str, str]:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
