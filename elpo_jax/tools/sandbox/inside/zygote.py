"""The worker: forks one process per program, watches it, and reports how it ended.

It is the only trusted process beside the host's. A request on the socket is three lengths (4 bytes each, big-endian)
and then a JSON object, the program and its standard input; a reply is four lengths, a JSON object, stdout, stderr and
what came through the report pipe. Programs, inputs and outputs go from descriptor to descriptor and never through this
process's memory, of which every later program gets a copy.
"""

import builtins
import contextlib
import fcntl
import gc
import json
import math
import os
import random
import resource
import select
import signal
import struct
import sys
import time
from typing import NoReturn

from inside import heat, linux, program, scratch, seccomp

HOST = 0  # the socket to the host
TICK_S = 0.1  # how often a running program is looked at
SLEEP_S = 0.5  # over how long it is judged asleep or not: on a busy machine a program gets a core now and then
WATCH_S = 0.02  # how often where nothing else limits its files and threads
AWAKE = 0.01  # the least share of that time that a program computes for if it is not asleep
CORES = len(os.sched_getaffinity(0))
READY = b"ready"
REPORT_BYTES = 512
STACK_BYTES = 64 << 20  # of the main thread, for recursion through C; what is used of it counts as memory
EXIT = os._exit


class Worker:
    """Runs programs under one set of layers.

    Args:
      settings: "layers", the names of those that are in force; "packages", to load; "fds", for Landlock, descriptors of
        what may be read; "keep", descriptors that programs inherit; "scratch", the folder of programs,
        or ""; "count_threads", whether the user has no processes but ours, so that the kernel can limit their number.
    """

    def __init__(self, settings: dict):
        self._layers = frozenset(settings["layers"])
        self._scratch = settings["scratch"]
        self._keep = sorted(settings["keep"])
        self._count_threads = settings["count_threads"]
        self._pipe = os.pipe()
        builtins.exit = builtins.quit = sys.exit  # `site` would, which is not loaded
        # Of programs: nothing is read from it here.
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        heat.load(settings["packages"])
        self._random = "numpy" in settings["packages"]
        self._filter = None
        if "seccomp" in self._layers:
            self._filter = linux.Filter(*seccomp.build(own_files="mount" in self._layers))
        self._ruleset = -1
        if "landlock" in self._layers:
            folder = os.open(self._scratch, os.O_PATH | os.O_CLOEXEC) if self._scratch else -1
            rules = [(fd, allowed) for fd, allowed in settings["fds"]] + ([(folder, -1)] if folder >= 0 else [])
            self._ruleset = out_of_the_way(linux.landlock_ruleset(rules))
        self._home = os.pidfd_open(os.getpid()) if "pid" in self._layers else -1
        self._init: linux.Init | None = None
        self._mounted: tuple[int, int] | None = None
        gc.collect()
        gc.freeze()  # keeps the copies' collectors from touching, and so copying, these pages
        self._base = linux.address_space()
        self._modules = [name for name in sys.modules if name.partition(".")[0] == "inside"]

    def serve(self) -> None:
        """Answers requests until the host is gone."""
        os.write(HOST, b"\n")  # ready
        self._prepare((0, 0))
        while (request := self._receive()) is not None:
            self._run(*request)
            self._prepare(self._mounted or (0, 0))

    def _receive(self) -> tuple[dict, int, int] | None:
        """The settings of a program, and descriptors of its code and its standard input."""
        header = _read(12)
        if header is None:
            return None
        sizes = struct.unpack(">III", header)
        settings = _read(sizes[0])
        files = [self._receive_file(size) for size in sizes[1:]]
        return None if settings is None or None in files else (json.loads(settings), *files)

    def _receive_file(self, size: int) -> int | None:
        file = os.memfd_create("file")
        reader, writer = self._pipe
        while size:
            count = os.splice(HOST, writer, min(size, 1 << 16))
            if not count:
                return None
            size -= count
            while count:
                count -= os.splice(reader, file, count)
        os.lseek(file, 0, os.SEEK_SET)
        return file

    def _prepare(self, size: tuple[int, int]) -> None:
        """Makes what the next program finds: an empty scratch folder and an empty pid namespace."""
        if self._init is not None:
            self._init.close()
            self._init = None
        if "tmpfs" in self._layers:
            if self._mounted is not None:
                linux.unmount(self._scratch)
            if size != (0, 0):
                options = f"size={size[0]},nr_inodes={size[1]},mode=700"
                flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
                linux.mount("scratch", self._scratch, "tmpfs", flags, options)
            self._mounted = size if size != (0, 0) else None
        elif self._scratch:
            scratch.empty(self._scratch)
            os.utime(self._scratch, (0, 0))  # when it was last written to is nobody's business
        if "pid" in self._layers:
            self._init = linux.Init()

    def _run(self, settings: dict, code: int, stdin: int) -> None:
        """Runs one program and sends how it ended."""
        limits = settings["limits"]
        size = (limits["scratch"], limits["files"])
        if "tmpfs" in self._layers and self._mounted != size:
            self._prepare(size)
        caps = (limits["output"], limits["output"], REPORT_BYTES)
        pipes = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in caps]
        # What a program's process says before any of the program runs: with this it is ready, else the failure is ours.
        # It is closed by then, so a program can neither say it nor take it back, and so not pass its failure off as
        # one of ours.
        prologue, prologue_end = map(out_of_the_way, os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        began = time.monotonic()
        if self._init is not None:
            linux.setns(self._init.fd, linux.NAMESPACES["pid"])
        child = os.fork()
        if child == 0:
            self._become(settings, code, stdin, [writer for _, writer in pipes], prologue_end)
        if self._init is not None:
            linux.setns(self._home, linux.NAMESPACES["pid"])
        for fd in (code, stdin, prologue_end, *(writer for _, writer in pipes)):
            os.close(fd)
        sinks = [_Sink(reader, cap) for (reader, _), cap in zip(pipes, caps, strict=True)]
        cause, status, usage = self._watch(child, sinks, limits, began)
        said = os.read(prologue, REPORT_BYTES)
        os.close(prologue)
        self._answer(sinks, said, cause, status, usage, time.monotonic() - began)
        for sink in sinks:
            sink.close()

    def _watch(self, child: int, sinks: list["_Sink"], limits: dict, began: float):
        """Keeps what a program prints until its process has ended, and ends it where it passes a limit.

        Returns:
          "cpu", "wall", "output", "files" or "threads" if that limit ended it, else ""; the wait status; the usage.
        """
        clock = ~child << 3 | 2  # the CPU clock of all threads of a process
        handle = os.pidfd_open(child)
        by_fd = {sink.reader: sink for sink in sinks}
        poller = select.poll()
        for fd in (handle, *by_fd):
            poller.register(fd, select.POLLIN)
        poller.register(HOST, select.POLLHUP)
        cause, asleep, last, used, watched = "", 0.0, began, 0.0, began
        judged, used_then, sleep = began, 0.0, min(SLEEP_S, limits["wall"] / 4)
        tick = WATCH_S if "watch" in self._layers else TICK_S
        ended = False
        while not (ended or cause):
            left = (limits["cpu"] - used) / CORES
            ready = [fd for fd, _ in poller.poll(max(1.0, 1000 * min(tick, left, sleep)))]
            if HOST in ready:
                os.kill(child, signal.SIGKILL)
                os._exit(0)
            for fd in by_fd.keys() & ready:
                if by_fd[fd].drain():
                    poller.unregister(fd)
                if by_fd[fd].is_over:
                    cause = "output"
            ended = handle in ready
            now = time.monotonic()
            if not (ended or cause) and now - watched >= tick and "watch" in self._layers:
                cause = self._excess(child, limits)
                watched = time.monotonic()
            if not (ended or cause) and (now - last >= min(TICK_S, sleep) or left < TICK_S):
                used, last = time.clock_gettime(clock), now
                if now - judged >= sleep:
                    if used - used_then < AWAKE * (now - judged):
                        asleep += now - judged
                    judged, used_then = now, used
                if used >= limits["cpu"]:
                    cause = "cpu"
                elif asleep >= limits["wall"] or now - began >= limits["hard_wall"]:
                    cause = "wall"
        if cause:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        os.close(handle)
        for sink in sinks:
            sink.drain()
        if not cause and any(sink.is_over for sink in sinks):
            cause = "output"
        # Measured after its end, so that it does not depend on when it was last looked at.
        if not cause and usage.ru_utime + usage.ru_stime >= limits["cpu"]:
            cause = "cpu"
        return cause, status, usage

    def _excess(self, child: int, limits: dict) -> str:
        """What the program has too much of, where nothing but looking at it limits that."""
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"/proc/{child}/stat", encoding="utf-8", errors="replace") as file,
        ):
            if int(file.read().rpartition(")")[2].split()[17]) > limits["threads"]:
                return "threads"
        if self._scratch:
            size, count = scratch.usage(self._scratch, limits["files"])
            size += scratch.deleted(child, self._scratch, limits["file"])
            if size > limits["scratch"] or count > limits["files"]:
                return "files"
        return ""

    def _answer(self, sinks: list["_Sink"], said: bytes, cause: str, status: int, usage, wall: float) -> None:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if self._filter is not None and not cause:
            if number == signal.SIGKILL:
                cause = "outside"  # a program's own SIGKILL, and it alone, ends as SIGSYS
            elif number == signal.SIGSYS:
                number = signal.SIGKILL
        reply = {
            "said": said.decode("utf-8", "replace"),
            "cause": cause,
            "exit_code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": number,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "wall_s": wall,
            "max_rss": usage.ru_maxrss * 1024,
            "own_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        head = json.dumps(reply).encode()
        os.write(HOST, struct.pack(">IIII", len(head), *(sink.size for sink in sinks)) + head)
        for sink in sinks:
            sink.send(HOST)

    def _become(self, settings: dict, code: int, stdin: int, writers: list[int], prologue_end: int) -> NoReturn:
        """Turns this process into the program's own, layer by layer, and runs it."""
        try:
            layers, limits = self._layers, settings["limits"]
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            text = os.read(code, os.fstat(code).st_size + 1)
            for target, source in enumerate((stdin, *writers)):
                os.dup2(source, target)
                fcntl.fcntl(target, fcntl.F_SETFL, fcntl.fcntl(target, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            if self._scratch:
                os.chdir(self._scratch)
            os.umask(0o077)
            if "rlimits" in layers:
                self._limit(limits)
            if layers & {"capabilities", "landlock"}:
                linux.drop_capabilities()
            if "no_new_privs" in layers:
                linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            if self._ruleset >= 0:
                linux.landlock_restrict(self._ruleset)
            if "close_fds" in layers:
                first = 4
                for keep in [*sorted([*self._keep, prologue_end]), 1 << 20]:
                    os.closerange(first, keep)
                    first = keep + 1
            if "seed" in layers:
                random.seed(0)
                if self._random:
                    sys.modules["numpy"].random.seed(0)
            if self._filter is not None:
                self._filter.install(os.getpid())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Out of the way of a program's imports; kept, since to take them apart would take a millisecond.
            ours = [sys.modules.pop(name) for name in self._modules]  # noqa: F841
            os.write(prologue_end, READY)
            os.close(prologue_end)
        except BaseException as error:
            os.write(prologue_end, f"{type(error).__name__}: {error}".encode()[:REPORT_BYTES])
            EXIT(1)
        try:
            program.main(text, settings["mode"], 3)
        finally:  # whatever a program made of the functions that it calls: it must not come back from there
            EXIT(1)

    def _limit(self, limits: dict) -> None:
        cpu = math.ceil(limits["cpu"]) + 1
        for kind, value in (
            (resource.RLIMIT_AS, self._base + limits["memory"]),
            (resource.RLIMIT_CPU, cpu),
            (resource.RLIMIT_STACK, STACK_BYTES),
            (resource.RLIMIT_FSIZE, limits["file"]),
            (resource.RLIMIT_NOFILE, limits["open_files"]),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_NICE, 0),
            (resource.RLIMIT_RTPRIO, 0),
            (resource.RLIMIT_SIGPENDING, 256),
            # The namespace's other processes count as well: this worker, what waits for it, and an init.
            (resource.RLIMIT_NPROC, limits["threads"] + 3 if self._count_threads else -1),
        ):
            hard = resource.getrlimit(kind)[1]
            if value >= 0:
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(kind, (value, value))


def _read(size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(HOST, min(size - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def out_of_the_way(fd: int) -> int:
    """The same descriptor under a number that a program's own four do not take."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


class _Sink:
    """Keeps what comes out of a pipe, in a file that no program sees.

    Args:
      reader: The pipe's end, which does not block.
      cap: Bytes to keep.
    """

    def __init__(self, reader: int, cap: int):
        self.reader = reader
        self.is_over = False
        self.size = 0
        self._cap = cap
        self._file = os.memfd_create("output")

    def drain(self) -> bool:
        """Takes what is there. Returns whether the pipe has ended."""
        while not self.is_over:
            # One byte beyond the cap shows that there is more.
            try:
                count = os.splice(self.reader, self._file, self._cap + 1 - self.size, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return False
            except OSError:  # whatever a program put into its pipe
                return True
            if not count:
                return True
            self.size += count
            if self.size > self._cap:
                self.size, self.is_over = self._cap, True
        return False

    def send(self, to: int) -> None:
        sent = 0
        while sent < self.size:
            sent += os.sendfile(to, self._file, sent, self.size - sent)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self._file)


def main(settings: dict) -> None:
    """Serves the host on descriptor 0, a socket, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    Worker(settings).serve()
