"""Programs that attack the sandbox, and programs that it must leave alone, as tables.

An attack is written so that its success would harm nothing but the canaries of `sandbox_world.World` and is seen: from
outside, on the canaries, or because the program says ESCAPED. It also has to show that it got as far as trying, by what
it prints where the sandbox refuses, so that a slip in the attack cannot pass for a defense.
"""

# ruff: noqa: E501
# A program that is short enough for one string reads better in one.

import dataclasses
import platform
import textwrap

from elpo_jax.tools.base import Status

OK = frozenset({Status.OK})
ERROR = frozenset({Status.ERROR})
TIMEOUT = frozenset({Status.TIMEOUT})
MEMORY = frozenset({Status.MEMORY})
OUTPUT_LIMIT = frozenset({Status.OUTPUT_LIMIT})
CRASH = frozenset({Status.CRASH})
TYPED = OK | ERROR | TIMEOUT | MEMORY | OUTPUT_LIMIT | CRASH  # any end that is the program's own

ESCAPED = "ESCAPED"
REFUSED = "refused"
SECRET_PREFIX = "elpo-secret-"


@dataclasses.dataclass(frozen=True)
class Attack:
    """A program, and what the sandbox has to make of it.

    Attributes:
      name: What it tries, unique in its category.
      code: The program; PRELUDE goes before it unless it is `raw`.
      statuses: How it may end.
      says: Printed where the attack was tried and refused; looked for if the status is ok.
      exit_code: The one it must have; None for any.
      signal: The one it must have died of; None for any.
      stdin: Standard input.
      limits: Fields of `Limits` that differ from the suite's.
      before: A program of somebody else that ran before in the same worker.
      after: A program that has to print, after the attack, what it prints without it, and end well.
      raw: Whether the code stands alone.
      mild: Whether it may be tried where a layer of the sandbox is missing.
      backends: Those that promise to withstand it.
      category: Set by the table.
    """

    name: str
    code: str
    statuses: frozenset[Status] = OK
    says: str = REFUSED
    exit_code: int | None = None
    signal: int | None = None
    stdin: str | bytes | None = None
    limits: dict = dataclasses.field(default_factory=dict)
    before: str = ""
    after: str = ""
    raw: bool = False
    mild: bool = False
    backends: tuple[str, ...] = ("namespaces", "landlock")
    category: str = ""

    def program(self, world: dict) -> str:
        """The code as it is run; `world` holds the values that PRELUDE calls W."""
        if self.raw:
            return self.code
        return PRELUDE.replace("$WORLD", repr(world)) + textwrap.dedent(self.code)


@dataclasses.dataclass(frozen=True)
class Control:
    """An honest program and what it prints, exactly.

    Attributes:
      name: What it uses.
      code: The program.
      stdout: All of its output.
      stdin: Standard input.
      status: How it ends.
      exit_code: Likewise.
      stderr: Strings that its errors hold, in this order; with none, there are no errors.
      mode: "script" or "notebook".
    """

    name: str
    code: str
    stdout: str
    stdin: str | bytes | None = None
    status: Status = Status.OK
    exit_code: int = 0
    stderr: tuple[str, ...] = ()
    mode: str = "script"

    def program(self) -> str:
        return textwrap.dedent(self.code).lstrip("\n")


# Numbers of system calls: x86-64, aarch64. The late ones are the same everywhere.
_NUMBERS = {
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "prlimit64": (302, 261),
    "getpid": (39, 172),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setresuid": (117, 147),
    "setfsuid": (122, 151),
    "setgroups": (116, 159),
    "capset": (126, 91),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "inotify_init1": (294, 26),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "set_mempolicy": (238, 237),
    "mlockall": (151, 230),
    "truncate": (76, 45),
    "socket": (41, 198),
    "sendmmsg": (307, 269),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "mmap": (9, 222),
    "openat2": (437, 437),
    "cachestat": (451, 451),
}
_COLUMN = 1 if platform.machine() == "aarch64" else 0
NUMBERS = {name: numbers[_COLUMN] for name, numbers in _NUMBERS.items() if numbers[_COLUMN] is not None}

# `refused` takes a call of Python that has to fail; `deny` a system call that must not even reach the kernel's code, so
# that wrong arguments (EFAULT, EINVAL, EBADF, ESRCH) show that it did.
PRELUDE = f"""\
import ctypes, errno, os, signal, sys, time
W = $WORLD
N = {NUMBERS!r}
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.sbrk.restype = ctypes.c_void_p

def escaped(*what):
    print("ESC" + "APED", *what, flush=True)

def call(name, *arguments):
    ctypes.set_errno(0)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    value = libc.syscall(ctypes.c_long(N.get(name, name)), *wide)
    return -ctypes.get_errno() if value == -1 else value

def deny(name, *arguments):
    value = call(name, *arguments)
    if value in (-errno.EPERM, -errno.EACCES, -errno.ENOSYS):
        print("refused", name, errno.errorcode[-value], flush=True)
    else:
        escaped(name, errno.errorcode.get(-value, value))
    return value

def refused(what, function, *arguments, **options):
    try:
        value = function(*arguments, **options)
    except (OSError, ValueError) as error:
        print("refused", what, type(error).__name__, error, flush=True)
        return None
    escaped(what, value)
    return value

def childless(what, function, *arguments):
    try:
        child = function(*arguments)
    except OSError as error:
        print("refused", what, error, flush=True)
        return
    if child == 0:
        os._exit(0)
    if child < 0:
        print("refused", what, errno.errorcode.get(-child), flush=True)
        return
    escaped(what, child)

def make(folder):
    path = f"{{folder}}/{{W['token']}}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(path)

def unreadable(path, flags=os.O_RDONLY, dir_fd=None):
    refused(path, lambda: os.read(os.open(path, flags, dir_fd=dir_fd), 200))

"""


# The path of a file of the standard library that the program can open, whatever `__file__` says.
_LIBRARY = """
library = next(path for path in (os.__file__, *(f"{folder}/os.py" for folder in sys.path)) if os.access(path, os.R_OK))
"""


# --- time

_FAST = {"cpu_s": 0.25, "wall_s": 0.4}

TIME = [
    Attack("endless_sum", "import itertools\nsum(itertools.repeat(1))", TIMEOUT),
    Attack("endless_deque", "import collections, itertools\ncollections.deque(itertools.count(), 0)", TIMEOUT),
    Attack("endless_search_in_iterator", "import itertools\n-1 in itertools.cycle((1, 2))", TIMEOUT),
    Attack("regex_catastrophe", "import re\nre.match(r'(a|a?)+$', 'a' * 60 + 'b')", TIMEOUT),
    Attack("power_of_big_integers", "pow(7, 10**9)", TIMEOUT | MEMORY),
    Attack(
        "digits_of_a_big_integer",
        "sys.set_int_max_str_digits(0)\nstr(1 << 8_000_000)",
        TIMEOUT,
    ),
    Attack("factor_a_semiprime", "import sympy\nsympy.factorint((2**127 - 1) * (2**89 - 1) * 10**9 + 1)", TIMEOUT),
    Attack(
        "numpy_without_the_interpreter",
        "import numpy\na = numpy.ones((1200, 1200))\nfor _ in range(10**6): a = a @ a",
        TIMEOUT,
        limits={"memory_mb": 256},
    ),
    Attack("sleep", "time.sleep(600)", TIMEOUT),
    Attack("read_of_an_own_pipe", "r, w = os.pipe()\nos.read(r, 1)", TIMEOUT),
    Attack("open_of_an_own_fifo", "refused('fifo', os.mkfifo, 'fifo')\nopen('fifo').read()", TIMEOUT | ERROR),
    Attack("deadlock", "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", TIMEOUT),
    Attack("wait_for_a_signal", "signal.pause()", TIMEOUT),
    Attack(
        "ignore_every_signal",
        """
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            pass
        """,
        TIMEOUT,
    ),
    Attack(
        "catch_everything",
        """
        def stay():
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    stay()
        for number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
            signal.signal(number, lambda *_: stay())
        stay()
        """,
        TIMEOUT,
    ),
    Attack(
        "threads_burning",
        """
        import hashlib, threading
        def burn():
            while True:
                hashlib.sha256(block).digest()
        block = bytes(1 << 20)
        for _ in range(3):
            threading.Thread(target=burn).start()
        burn()
        """,
        TIMEOUT,
    ),
    Attack(
        "threads_sleeping_after_the_end",
        "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()",
        TIMEOUT,
    ),
    Attack(
        "starve_other_threads",
        """
        import threading
        sys.setswitchinterval(1e6)
        for _ in range(4):
            threading.Thread(target=sum, args=(iter(int, 1),)).start()
        """,
        TIMEOUT,
    ),
    Attack("trap_at_exit", "import atexit\natexit.register(sum, iter(int, 1))", TIMEOUT),
    Attack(
        "trap_in_a_destructor",
        """
        class Trap:
            def __del__(self):
                while True:
                    pass
        trap = Trap()
        del trap
        """,
        TIMEOUT,
    ),
    Attack("trap_in_finally", "try:\n    sys.exit(0)\nfinally:\n    sum(iter(int, 1))", TIMEOUT),
    Attack(
        "trap_in_the_error",
        """
        class Endless(Exception):
            def __str__(self):
                while True:
                    pass
        raise Endless
        """,
        TIMEOUT,
    ),
    Attack(
        "trap_in_flush",
        """
        class Stream:
            def write(self, text):
                return len(text)
            def flush(self):
                while True:
                    pass
        sys.stdout = Stream()
        """,
        TIMEOUT,
    ),
    Attack(
        "lift_the_limits",
        """
        import resource
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE"):
            kind = getattr(resource, name)
            soft, hard = resource.getrlimit(kind)
            if hard == -1:
                escaped(name, "has no limit")
            refused(name, resource.setrlimit, kind, (-1, -1))
            refused(name, resource.prlimit, os.getpid(), kind, (hard + 1, hard + 1))
        while True:
            pass
        """,
        TIMEOUT,
    ),
    Attack(
        "half_asleep",
        """
        while True:
            time.sleep(0.004)
            sum(range(5000))
        """,
        TIMEOUT,
    ),
    Attack("stop_itself", "os.kill(os.getpid(), signal.SIGSTOP)", TIMEOUT),
    Attack(
        "stop_itself_again_and_again",
        """
        import threading
        def wake():
            while True:
                os.kill(os.getpid(), signal.SIGCONT)
        threading.Thread(target=wake).start()
        while True:
            os.kill(os.getpid(), signal.SIGSTOP)
        """,
        TIMEOUT,
    ),
    Attack("read_of_the_terminal", "open('/dev/tty').read()", ERROR | TIMEOUT),
    Attack(
        "endless_import",
        """
        class Finder:
            def find_spec(self, name, path=None, target=None):
                while True:
                    pass
        sys.meta_path.insert(0, Finder())
        import no_such_module_of_ours
        """,
        TIMEOUT,
    ),
]
TIME = [dataclasses.replace(attack, limits=_FAST | attack.limits) for attack in TIME]


# --- memory: the suite's limit is 64 MB, so whoever gets 1 GiB has got past it

MEMORY_ = [
    Attack("bytes", "b = bytearray(1 << 30)\nescaped(len(b))", MEMORY),
    Attack(
        "bytes_in_pieces",
        """
        blocks = []
        try:
            while len(blocks) < 512:
                blocks.append(bytearray(1 << 20))
        except MemoryError:
            count = len(blocks)
            del blocks
            print("refused after", count) if count <= 64 else escaped(count)
        else:
            escaped(len(blocks))
        """,
    ),
    Attack("many_small_objects", "x = [str(i) for i in range(10**7)]\nescaped(len(x))", MEMORY),
    Attack("integer", "x = 1 << (1 << 33)\nescaped()", MEMORY),
    Attack("string", "x = 'x' * 10**10\nescaped()", MEMORY),
    Attack("format_width", "x = format(1, '>2000000000')\nescaped()", MEMORY),
    Attack("swallowed_memory_error", "try:\n    bytes(1 << 30)\nexcept MemoryError:\n    print('refused')"),
    Attack("map_private", "import mmap\nrefused('mmap', mmap.mmap, -1, 1 << 30, flags=mmap.MAP_PRIVATE | 0x20)"),
    Attack("map_shared", "import mmap\nrefused('mmap', mmap.mmap, -1, 1 << 30)"),
    Attack("map_without_reserve", "import mmap\nrefused('mmap', mmap.mmap, -1, 1 << 38, flags=0x4022)"),
    Attack(
        "map_again_and_again",
        """
        import mmap
        maps = []
        def grow():
            while len(maps) < 4096:
                maps.append(mmap.mmap(-1, 1 << 18))
                maps[-1].write(bytes(1 << 18))
        refused("maps", grow)
        """,
    ),
    Attack("remap", "import mmap\nrefused('mremap', mmap.mmap(-1, 1 << 20, flags=0x22).resize, 1 << 30)"),
    Attack(
        "break",
        """
        failed = ctypes.c_void_p(-1).value
        print("refused") if libc.sbrk(ctypes.c_long(1 << 30)) == failed else escaped("brk")
        """,
    ),
    Attack("lock_pages", "deny('mlockall', 3)"),
    Attack("numpy", "import numpy\nx = numpy.ones(1 << 27)\nescaped(x.size)", MEMORY),
    Attack("numpy_untouched", "import numpy\nx = numpy.empty(1 << 36, 'u1')\nescaped(x.size)", MEMORY),
    Attack(
        "decompress", "import zlib\nx = zlib.decompress(zlib.compress(bytes(1 << 25)) , 15, 1 << 30)\nescaped()", MEMORY
    ),
    Attack("range_to_list", "x = list(range(10**9))\nescaped()", MEMORY),
    Attack("generator_to_set", "x = {i for i in range(10**9)}\nescaped()", MEMORY),
    Attack(
        "recursion_in_python",
        "sys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
        MEMORY | CRASH | ERROR | TIMEOUT,
    ),
    Attack(
        "recursion_in_c",
        "x = []\nfor _ in range(3 * 10**5): x = [x]\nsys.setrecursionlimit(10**9)\nrepr(x)",
        MEMORY | CRASH | ERROR | TIMEOUT,
    ),
    Attack(
        "threads",
        """
        import threading
        threading.stack_size(32 << 10)
        gate, count = threading.Event(), 1
        try:
            while count < 400:
                threading.Thread(target=gate.wait, daemon=True).start()
                count += 1
            time.sleep(1)
        except (RuntimeError, MemoryError):
            print("refused after", count)
        if count > W["threads"]:
            escaped(count, "threads")
        """,
        OK | MEMORY | ERROR | CRASH,
    ),
    Attack(
        "stacks_of_threads",
        """
        import threading
        threading.stack_size(1 << 30)
        try:
            threading.Thread(target=print).start()
        except (RuntimeError, MemoryError):
            print("refused")
        else:
            escaped()
        """,
    ),
    Attack(
        "buffers_of_pipes",
        """
        import fcntl
        total = 0
        def fill():
            global total
            while total < 256 << 20:
                r, w = os.pipe()
                try:
                    fcntl.fcntl(w, 1031, 1 << 20)
                except OSError:
                    pass
                os.set_blocking(w, False)
                try:
                    while True:
                        total += os.write(w, bytes(1 << 16))
                except BlockingIOError:
                    pass
        refused("pipes", fill)
        print(total >> 20, "MB")
        """,
    ),
    Attack(
        "buffers_of_sockets",
        """
        import socket
        total, pairs = 0, []
        def fill():
            global total
            while total < 256 << 20:
                pair = socket.socketpair()
                pairs.append(pair)
                try:
                    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
                except OSError:
                    pass
                pair[0].setblocking(False)
                try:
                    while True:
                        total += pair[0].send(bytes(1 << 16))
                except BlockingIOError:
                    pass
        refused("sockets", fill)
        print(total >> 20, "MB")
        """,
    ),
    Attack(
        "fill_the_scratch_folder",
        """
        total = 0
        def fill():
            global total
            for index in range(80):
                with open(f"{W['token']}-{index}", "wb", buffering=0) as file:
                    for _ in range(31):
                        total += file.write(bytes(1 << 17))
        refused("files", fill)
        if total > 24 << 20:
            escaped(total >> 20, "MB in a folder of 8")
        """,
        OK | ERROR | MEMORY | OUTPUT_LIMIT,
        mild=True,
    ),
    Attack(
        "fill_the_scratch_folder_by_deleted_files",
        """
        total, kept = 0, []
        def fill():
            global total
            for index in range(24):
                file = open("gone", "wb", buffering=0)
                os.unlink("gone")
                kept.append(file)
                for _ in range(31):
                    total += file.write(bytes(1 << 17))
            time.sleep(0.5)
        refused("files", fill)
        if total > 48 << 20:
            escaped(total >> 20, "MB in a folder of 8")
        """,
        OK | ERROR | MEMORY | OUTPUT_LIMIT,
    ),
    Attack("file_in_memory", "deny('memfd_create', b'x', 0)"),
    Attack("secret_memory", "deny('memfd_secret', 0)"),
    Attack("shared_memory_of_system_v", "deny('shmget', 0, 1 << 30, 0o1600)"),
    Attack(
        "shared_memory_of_posix",
        """
        from multiprocessing import shared_memory
        refused("shm", shared_memory.SharedMemory, W["token"] + "-new", True, 1 << 20)
        """,
    ),
]


# --- processes

PROCESSES = [
    Attack("fork", "childless('fork', os.fork)", mild=True),
    Attack("fork_by_number", "childless('fork', call, 'fork')"),
    Attack("vfork", "childless('vfork', call, 'vfork')"),
    Attack("clone", "childless('clone', call, 'clone', signal.SIGCHLD, 0, 0, 0, 0)", mild=True),
    Attack("clone_sharing_memory", "deny('clone', 0x4000 | 0x100, 0, 0, 0, 0)"),
    Attack("clone_into_a_user_namespace", "childless('clone', call, 'clone', 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)"),
    Attack("clone_high_bits", "childless('clone', call, 'clone', 1 << 32 | signal.SIGCHLD, 0, 0, 0, 0)"),
    Attack(
        "clone3",
        """
        arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD)
        childless("clone3", call, "clone3", ctypes.byref(arguments), 88)
        """,
        mild=True,
    ),
    Attack(
        "many_forks",
        """
        for _ in range(20):
            childless("fork", os.fork)
        """,
    ),
    Attack(
        "fork_from_a_thread",
        "import threading\nthread = threading.Thread(target=childless, args=('fork', os.fork))\nthread.start(); thread.join()",
    ),
    Attack("spawn", "refused('spawn', os.posix_spawn, sys.executable or '/bin/sh', ['x', '-c', ''], {})", mild=True),
    Attack("subprocess", "import subprocess\nrefused('run', subprocess.run, ['/bin/true'])", mild=True),
    Attack("shell", "print('refused') if os.system('exit 0') != 0 else escaped()"),
    Attack("popen", "refused('popen', lambda: os.popen('echo').read() or 1 / 0)"),
    Attack("execute_the_shell", "refused('exec', os.execv, '/bin/sh', ['sh', '-c', 'echo ESC''APED'])", mild=True),
    Attack("execute_python", "refused('exec', os.execv, sys.executable or '/usr/bin/python3', ['python', '-c', ''])"),
    Attack(
        "execute_an_own_file",
        """
        with open("run", "w") as file:
            file.write("#!/bin/sh\\necho ESC''APED\\n")
        try:
            os.chmod("run", 0o755)
        except OSError:
            pass
        refused("exec", os.execv, "./run", ["run"])
        """,
    ),
    Attack(
        "execute_by_descriptor",
        """
        paths = (sys.executable, "/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
        fd = os.open(next(path for path in paths if path and os.access(path, os.R_OK)), os.O_RDONLY)
        deny("execveat", fd, b"", 0, 0, 0x1000)
        refused("fexecve", os.execve, fd, ["x"], {})
        """,
    ),
    Attack(
        "execute_by_the_loader",
        """
        for path in ("/lib64/ld-linux-x86-64.so.2", "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"):
            refused(path, os.execv, path, [path, "/bin/true"])
        """,
    ),
    Attack(
        "multiprocessing",
        """
        import multiprocessing
        for method in ("fork", "spawn", "forkserver"):
            process = multiprocessing.get_context(method).Process(target=print)
            refused(method, process.start)
        """,
    ),
    Attack(
        "pool_of_processes",
        """
        from concurrent.futures import ProcessPoolExecutor
        refused("pool", lambda: ProcessPoolExecutor(1).submit(int).result(1))
        """,
        OK | TIMEOUT | ERROR,
    ),
    Attack(
        "daemon",
        """
        try:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    libc.prctl(15, W["token"].encode()[:15], 0, 0, 0)
                    time.sleep(30)
                os._exit(0)
            escaped("daemon")
        except OSError:
            print("refused")
        """,
    ),
    Attack("terminal", "import pty\nchildless('pty', lambda: pty.fork()[0])"),
    Attack(
        "new_session",
        "refused('setsid', lambda: os.setsid() or escaped('session') or 1)\nrefused('setpgid', os.setpgid, 0, 0)",
    ),
]


# --- files

_HOST_FILES = """
paths = [W["public"], W["private"], W["owned"]]
"""

FILES = [
    Attack(
        "read", "for path in (W['public'], W['private'], W['owned'], W['writable']):\n    unreadable(path)", mild=True
    ),
    Attack("read_by_relative_path", "unreadable('../' * 40 + W['public'].lstrip('/'))", mild=True),
    Attack("read_by_dot_slash", "unreadable('/./' + '/.././' * 9 + W['public'])", mild=True),
    Attack(
        "read_by_symbolic_link",
        "os.symlink(W['public'], 'link')\nos.symlink('/', 'root')\nunreadable('link')\nunreadable('root' + W['public'])",
        mild=True,
    ),
    Attack(
        "read_by_hard_link",
        """
        for path in (W["public"], W["owned"]):
            refused(path, os.link, path, "link")
        refused("link of a link", os.link, W["owned"], "link", follow_symlinks=False)
        """,
        mild=True,
    ),
    Attack(
        "read_by_links_of_proc",
        """
        for who in ("self", "1", "thread-self", str(os.getppid()), str(W["pid"]), str(W["victim"])):
            for link in ("root", "cwd", f"task/{os.getpid()}/root"):
                unreadable(f"/proc/{who}/{link}{W['public']}")
                if link != "cwd":
                    refused(who, os.listdir, f"/proc/{who}/{link}/etc")
        """,
        mild=True,
    ),
    Attack(
        "read_by_descriptors_of_proc",
        """
        for folder in ("/proc/self/fd", "/dev/fd", "/proc/self/fdinfo", "/proc/self/map_files"):
            refused(folder, os.listdir, folder)
        unreadable(f"/proc/{W['pid']}/fd/{W['held']}")
        unreadable(f"/proc/{os.getppid()}/fd/0")
        """,
        mild=True,
    ),
    Attack(
        "read_below_a_path_descriptor",
        """
        try:
            root = os.open("/", os.O_PATH)
        except OSError:
            print("refused")
        else:
            unreadable(W["public"].lstrip("/"), dir_fd=root)
            os.fchdir(root)
            unreadable(W["public"].lstrip("/"))
        """,
        mild=True,
    ),
    Attack(
        "read_by_handle",
        """
        class Handle(ctypes.Structure):
            _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * 128)]
        handle, mount = Handle(128), ctypes.c_int()
        deny("name_to_handle_at", -100, b".", ctypes.byref(handle), ctypes.byref(mount), 0)
        handle.bytes, handle.type = 8, 1
        handle.data[0] = 2
        deny("open_by_handle_at", -100, ctypes.byref(handle), os.O_RDONLY)
        """,
        mild=True,
    ),
    Attack(
        "read_by_another_call",
        "how = (ctypes.c_uint64 * 3)(0, 0, 0)\ndeny('openat2', -100, W['public'].encode(), how, 24)",
        mild=True,
    ),
    Attack(
        "read_of_the_system",
        """
        for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/cpuinfo", "/proc/mounts", "/proc/net/tcp",
                     "/sys/class/net", "/proc/kallsyms", "/proc/1/cmdline", "/proc/self/mem", "/proc/self/maps",
                     "/var/log", "/boot", "/run"):
            unreadable(path)
        """,
        mild=True,
    ),
    Attack(
        "list_of_the_home",
        """
        for path in (W["home"], W["here"], W["folder"], "/home", "/root", "/etc", "/proc", "/dev/shm", "/var"):
            refused(path, os.listdir, path)
        """,
        mild=True,
    ),
    Attack(
        "devices",
        """
        names = ("mem", "kmsg", "sda", "vda", "nvme0", "tty", "console", "ptmx", "fuse", "kvm", "loop0", "loop-control",
                 "nvidia0", "accel0", "dri/card0", "net/tun", "userfaultfd", "vhost-vsock", "mapper/control", "port")
        for name in names:
            for flags in (os.O_RDONLY, os.O_WRONLY):
                try:
                    os.close(os.open(f"/dev/{name}", flags | os.O_NONBLOCK | os.O_NOCTTY))
                    escaped(name)
                except OSError:
                    pass
        print("refused")
        """,
        mild=True,
    ),
    Attack(
        "make_devices",
        """
        import stat
        for kind, device in ((stat.S_IFCHR, (1, 1)), (stat.S_IFBLK, (254, 0)), (stat.S_IFBLK, (8, 0)), (stat.S_IFCHR, (5, 0))):
            refused("mknod", os.mknod, "device", kind | 0o666, os.makedev(*device))
        """,
        mild=True,
    ),
    Attack(
        "write",
        """
        for path in (W["writable"], W["owned"], W["public"]):
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
                refused(path, lambda: os.write(os.open(path, flags), b"changed"))
        """,
        mild=True,
    ),
    Attack(
        "truncate_by_reading",
        """
        for path in (W["writable"], W["owned"]):
            refused(path, os.open, path, os.O_RDONLY | os.O_TRUNC)
            refused(path, os.open, path, 3 | os.O_TRUNC)
        """,
        mild=True,
    ),
    Attack(
        "truncate_by_path",
        "for path in (W['writable'], W['owned']):\n    refused(path, os.truncate, path, 0)",
        mild=True,
    ),
    Attack(
        "make_in_a_foreign_folder",
        """
        path = f"{W['folder']}/{W['token']}"
        refused("file", os.open, path, os.O_CREAT | os.O_WRONLY)
        refused("creat", lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)))
        refused("unnamed file", os.open, W["folder"], os.O_TMPFILE | os.O_RDWR)
        refused("folder", os.mkdir, path)
        refused("link", os.symlink, "/", path)
        refused("fifo", os.mkfifo, path)
        open("own", "w").close()
        refused("hard link", os.link, "own", path)
        """,
        mild=True,
    ),
    Attack(
        "move_foreign_files",
        """
        refused("away", os.rename, W["owned"], W["owned"] + W["token"])
        refused("here", os.rename, W["writable"], "mine")
        open("own", "w").close()
        refused("over", os.rename, "own", W["writable"])
        refused("exchange", lambda: os.rename("own", W["owned"]))
        refused("folder", os.rename, W["folder"], W["folder"] + W["token"])
        """,
        mild=True,
    ),
    Attack(
        "delete_foreign_files",
        """
        for path in (W["writable"], W["owned"], W["unix"], W["fifo"]):
            refused(path, os.unlink, path)
        refused("folder", os.rmdir, W["empty"])
        """,
        mild=True,
    ),
    Attack(
        "modes_of_foreign_files",
        """
        for path in (W["owned"], W["writable"], W["folder"]):
            refused(path, os.chmod, path, 0o777)
            refused(path, os.utime, path, (0, 0))
            refused(path, os.chown, path, os.getuid(), os.getgid())
        """,
        mild=True,
    ),
    Attack(
        "attributes_of_foreign_files",
        """
        for path in (W["owned"], W["writable"]):
            refused(path, os.setxattr, path, "user.mark", b"x")
            refused(path, os.removexattr, path, "user.mark")
        """,
        mild=True,
    ),
    Attack(
        "set_user_id",
        """
        with open("program", "wb") as file:
            file.write(b"#!/bin/sh\\n")
        try:
            os.chmod("program", 0o4755)
        except OSError:
            pass
        refused("exec", os.execv, "./program", ["program"])
        refused("owner", os.chown, "program", 0, 0)
        """,
    ),
    Attack(
        "change_the_library",
        """
        import json, numpy, sympy
        for module in (os, json, numpy, sympy):
            path, folder = module.__file__, os.path.dirname(module.__file__)
            refused(path, os.open, path, os.O_WRONLY)
            refused(path, os.open, path, os.O_RDWR | os.O_APPEND)
            refused(folder, make, folder)
            refused(folder, make, f"{folder}/__pycache__")
        """,
    ),
    Attack(
        "change_everything_that_is_loaded",
        """
        paths = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        paths |= {getattr(module, "__cached__", None) for module in list(sys.modules.values())}
        paths |= {frame for frame in (sys.argv[:1] + [sys.executable])}
        folders = set(sys.path) | {sys.prefix, sys.base_prefix, os.path.dirname(sys.executable or "/")}
        for path in sorted(filter(None, paths)):
            try:
                os.close(os.open(path, os.O_WRONLY))
                escaped(path)
            except OSError:
                pass
        for folder in sorted(filter(None, folders)):
            try:
                make(folder)
                escaped(folder)
            except OSError:
                pass
        print("refused", len(paths), len(folders))
        """,
    ),
    Attack(
        "change_the_library_by_mapping",
        _LIBRARY
        + """
import mmap
fd = os.open(library, os.O_RDONLY)
refused("mmap", mmap.mmap, fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
address = ctypes.c_void_p(call("mmap", 0, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0))
print("refused") if libc.mprotect(address, 4096, 3) else escaped("mprotect")
""",
    ),
    Attack(
        "look_for_a_place_to_write",
        """
        seen, places = 0, ["/"]
        scratch = os.path.realpath(".")
        while places and seen < 1500:
            place = places.pop()
            seen += 1
            if os.path.realpath(place) == scratch:
                continue
            try:
                make(place)
                escaped(place)
                break
            except OSError:
                pass
            try:
                with os.scandir(place) as entries:
                    places += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                pass
        print("refused", seen)
        """,
        limits={"cpu_s": 2.0},
    ),
    Attack(
        "leave_the_root",
        """
        os.mkdir("jail")
        refused("chroot", os.chroot, "jail")
        os.chdir("../" * 40)
        unreadable(W["public"].lstrip("/"))
        deny("pivot_root", b"/nowhere-at-all", b"/nowhere-at-all")
        """,
        mild=True,
    ),
    Attack(
        "bind_a_foreign_folder",
        "deny('mount', b'/nowhere-at-all', b'/nowhere-at-all', 0, 4096, 0)\ndeny('open_tree', -1, b'nowhere', 1)",
        mild=True,
    ),
    Attack("mount_proc", "deny('mount', b'proc', b'/nowhere-at-all', b'proc', 0, 0)", mild=True),
    Attack(
        "make_the_root_writable",
        "deny('mount', 0, b'/nowhere-at-all', 0, 32 | 4096, 0)\ndeny('mount_setattr', -100, b'/nowhere-at-all', 0, (ctypes.c_uint64 * 4)(0, 1), 32)",
        mild=True,
    ),
    Attack("detach_the_scratch_folder", "deny('umount2', b'/nowhere-at-all', 2)\ndeny('umount2', b'', 2)"),
    Attack("watch_folders", "deny('inotify_init1', 0)\ndeny('fanotify_init', 0, 0)"),
    Attack(
        "too_many_files",
        """
        def make():
            for index in range(200_000):
                os.close(os.open(f"{W['token']}-{index}", os.O_CREAT | os.O_WRONLY))
        refused("files", make)
        """,
        OK | ERROR | MEMORY | OUTPUT_LIMIT,
        limits={"cpu_s": 4.0},
    ),
    Attack(
        "too_many_files_in_a_folder_that_cannot_be_listed",
        """
        os.mkdir("b", 0o300)
        def make():
            for index in range(200_000):
                os.close(os.open(f"b/{index}", os.O_CREAT | os.O_WRONLY))
        refused("files", make)
        """,
        OK | ERROR | MEMORY | OUTPUT_LIMIT,
        limits={"cpu_s": 4.0},
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "too_many_folders",
        """
        def make():
            for _ in range(20000):
                os.mkdir("d")
                os.chdir("d")
        refused("folders", make)
        """,
        OK | ERROR | MEMORY | OUTPUT_LIMIT,
        limits={"cpu_s": 2.0},
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "too_big_a_file",
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        fd = os.open("big", os.O_CREAT | os.O_RDWR)
        refused("sparse", os.ftruncate, fd, 1 << 34)
        refused("hole", os.pwrite, fd, b"x", 1 << 34)
        refused("allocate", os.posix_fallocate, fd, 0, 1 << 30)
        def write():
            os.lseek(fd, 0, os.SEEK_SET)
            for _ in range(1 << 10):
                os.write(fd, bytes(1 << 16))
        refused("write", write)
        if os.stat("big").st_size > 4 << 20:
            escaped(os.stat("big").st_size)
        """,
    ),
    Attack("too_big_a_file_with_the_signal", "open('big', 'wb').write(bytes(1 << 23))\nescaped()", ERROR | CRASH),
    Attack(
        "too_many_descriptors",
        """
        kept = []
        def take():
            while len(kept) < 2048:
                kept.append(os.dup(0))
        refused("descriptors", take)
        if len(kept) > 32:
            escaped(len(kept))
        """,
    ),
    Attack(
        "copy_between_files",
        """
        def copy(path):
            source = os.open(path, os.O_RDONLY)
            target = os.open("copy", os.O_CREAT | os.O_RDWR)
            return os.copy_file_range(source, target, 100) or os.sendfile(1, source, 0, 100)
        for path in (W["public"], W["owned"]):
            refused(path, copy, path)
        """,
        mild=True,
    ),
    Attack("wait_for_a_foreign_fifo", "refused('fifo', os.open, W['fifo'], os.O_RDWR | os.O_NONBLOCK)", mild=True),
]


# --- network

NETWORK = [
    Attack("tcp", "import socket\nrefused('tcp', socket.create_connection, ('127.0.0.1', W['tcp']), 1)", mild=True),
    Attack("tcp_v6", "import socket\nrefused('tcp', socket.create_connection, ('::1', W['tcp']), 1)", mild=True),
    Attack(
        "udp",
        """
        import socket
        def send():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                return s.sendto(b"hello", ("127.0.0.1", W["udp"]))
        refused("udp", send)
        """,
        mild=True,
    ),
    Attack(
        "raw",
        "import socket\nrefused('raw', socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
        mild=True,
    ),
    Attack(
        "ping",
        "import socket\nrefused('ping', socket.socket, socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
        mild=True,
    ),
    Attack(
        "packet", "import socket\nrefused('packet', socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 3)", mild=True
    ),
    Attack(
        "netlink", "import socket\nrefused('netlink', socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 0)", mild=True
    ),
    Attack("vsock", "import socket\nrefused('vsock', socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM)", mild=True),
    Attack(
        "crypto", "import socket\nrefused('alg', socket.socket, socket.AF_ALG, socket.SOCK_SEQPACKET, 0)", mild=True
    ),
    Attack(
        "every_family",
        """
        for family in range(64):
            for kind in (1, 2, 3, 5):
                value = call("socket", family, kind, 0)
                if value >= 0:
                    escaped("socket", family, kind)
        print("refused", errno.errorcode[-value])
        """,
        mild=True,
    ),
    Attack(
        "unix_path",
        """
        import socket
        def connect(path, kind):
            with socket.socket(socket.AF_UNIX, kind) as s:
                s.connect(path)
        refused("stream", connect, W["unix"], socket.SOCK_STREAM)
        refused("datagram", connect, W["unix_datagram"], socket.SOCK_DGRAM)
        """,
        mild=True,
    ),
    Attack(
        "unix_abstract",
        """
        import socket
        def connect(name, kind):
            with socket.socket(socket.AF_UNIX, kind) as s:
                s.connect("\\0" + name)
        refused("stream", connect, W["abstract"], socket.SOCK_STREAM)
        refused("datagram", connect, W["abstract_datagram"], socket.SOCK_DGRAM)
        """,
        mild=True,
    ),
    Attack(
        "pair_sent_to_a_path",
        """
        import socket
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        refused("path", pair[0].sendto, b"hello", W["unix_datagram"])
        refused("abstract", pair[0].sendto, b"hello", "\\0" + W["abstract_datagram"])
        """,
        mild=True,
    ),
    Attack(
        "pair_connected_again",
        """
        import socket
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        refused("path", pair[0].connect, W["unix_datagram"])
        refused("abstract", pair[0].connect, "\\0" + W["abstract_datagram"])
        refused("bind", pair[0].bind, "\\0" + W["token"])
        """,
        mild=True,
    ),
    Attack(
        "pair_with_messages",
        """
        import array, socket
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        refused("address", pair[0].sendmsg, [b"hello"], [], 0, W["unix_datagram"])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        refused("descriptors", pair[0].sendmsg, [b"hello"], rights)
        deny("sendmmsg", pair[0].fileno(), 0, 0, 0)
        """,
        mild=True,
    ),
    Attack(
        "pair_that_listens",
        """
        import socket
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        refused("bind", pair[0].bind, W["token"])
        refused("listen", pair[0].listen)
        refused("accept", pair[0].accept)
        """,
    ),
    Attack(
        "pair_of_another_family",
        "import socket\nfor family in (socket.AF_INET, socket.AF_INET6, 30, 16):\n    refused(family, socket.socketpair, family)",
    ),
    Attack(
        "interfaces",
        """
        import fcntl, socket, struct
        pair = socket.socketpair()
        def names():
            space = ctypes.create_string_buffer(4096)
            reply = fcntl.ioctl(pair[0], 0x8912, struct.pack("iL", 4096, ctypes.addressof(space)))
            return [space[i:i + 16] for i in range(0, struct.unpack("iL", reply)[0], 40)] or 1 / 0
        refused("SIOCGIFCONF", names)
        refused("SIOCGIFNAME", fcntl.ioctl, pair[0], 0x8910, struct.pack("16si20x", b"", 2))
        refused("if_nameindex", socket.if_nameindex)
        """,
        mild=True,
    ),
    Attack(
        "url",
        "import urllib.request\nrefused('url', urllib.request.urlopen, f\"http://127.0.0.1:{W['tcp']}/\", timeout=1)",
        mild=True,
    ),
    Attack("names", "import socket\nrefused('dns', socket.getaddrinfo, 'localhost.example.invalid', 80)", mild=True),
    Attack(
        "server",
        """
        import socket
        refused("server", socket.create_server, ("127.0.0.1", 0))
        refused("unix", lambda: socket.socket(socket.AF_UNIX).bind(W["token"]))
        """,
        mild=True,
    ),
    Attack(
        "asyncio_client",
        """
        import asyncio
        refused("asyncio", asyncio.run, asyncio.open_connection("127.0.0.1", W["tcp"]))
        refused("unix", asyncio.run, asyncio.open_unix_connection(W["unix"]))
        """,
        limits={"cpu_s": 2.0},
    ),
    Attack(
        "socket_from_a_descriptor",
        "import socket\nfor fd in range(64):\n    try:\n        s = socket.socket(fileno=fd)\n    except OSError:\n        pass\n    else:\n        escaped(fd, s)\nprint('refused')",
        mild=True,
    ),
]


# --- output: the limit is 16 KiB

OUTPUT = [
    Attack("flood", "while True: print('x' * 1000)", OUTPUT_LIMIT),
    Attack("flood_of_errors", "while True: sys.stderr.write('x' * 1000)", OUTPUT_LIMIT),
    Attack("flood_of_both", "while True:\n    os.write(1, b'o' * 999)\n    os.write(2, b'e' * 999)", OUTPUT_LIMIT),
    Attack("one_line", "print('x' * 50_000_000, end='')", OUTPUT_LIMIT, limits={"memory_mb": 512}),
    Attack("flood_and_leave", "os.write(1, b'x' * 60_000)\nos._exit(0)", OUTPUT_LIMIT),
    Attack("flood_at_exit", "import atexit\natexit.register(lambda: os.write(1, b'x' * 60_000))", OUTPUT_LIMIT),
    Attack(
        "flood_by_threads",
        "import threading\nfor fd in (1, 2, 1, 2):\n    threading.Thread(target=lambda: [os.write(fd, b'x' * 4096) for _ in iter(int, 1)]).start()",
        OUTPUT_LIMIT,
    ),
    Attack(
        "flood_by_sendfile",
        """
        with open("data", "wb") as file:
            file.write(bytes(1 << 20))
        fd = os.open("data", os.O_RDONLY)
        while True:
            os.sendfile(1, fd, 0, 1 << 20)
        """,
        OUTPUT_LIMIT,
    ),
    Attack(
        "flood_by_splice",
        """
        r, w = os.pipe()
        while True:
            os.write(w, bytes(1 << 12))
            os.splice(r, 1, 1 << 12)
        """,
        OUTPUT_LIMIT,
    ),
    Attack(
        "flood_that_does_not_block",
        "import itertools\nfor fd in (0, 1, 2): os.set_blocking(fd, False)\nfor _ in itertools.repeat(0):\n    try:\n        os.write(1, bytes(4096))\n    except BlockingIOError:\n        pass",
        OUTPUT_LIMIT,
    ),
    Attack(
        "flood_on_every_descriptor",
        "for fd in range(3, 256):\n    try:\n        for _ in range(100): os.write(fd, bytes(1 << 16))\n    except OSError:\n        pass\nprint('refused')",
        TYPED,
    ),
    Attack("huge_error", "raise ValueError('x' * 10_000_000)", ERROR | OUTPUT_LIMIT),
    Attack("huge_exit_message", "sys.exit('x' * 10_000_000)", ERROR | OUTPUT_LIMIT),
    Attack(
        "endless_chain_of_errors",
        """
        error = None
        for index in range(5000):
            new = ValueError(index)
            new.__cause__, error = error, new
        raise error
        """,
        ERROR | OUTPUT_LIMIT | CRASH | MEMORY,
    ),
    Attack(
        "garbage",
        "sys.stdout.buffer.write(bytes(range(256)) * 8)\nsys.stderr.buffer.write(b'\\xff\\xfe\\x00' * 99)",
        says="�",
    ),
    Attack("control_sequences", "print('\\x1b]0;title\\x07\\x1b[2J\\x1b[8m refused \\x1b[6n\\x9b5i\\u202e')"),
    Attack("half_a_character", "os.write(1, 'refused €'.encode()[:-1])"),
    Attack("surrogates", "print('refused')\nprint('\\ud800')", ERROR),
    Attack("nothing_to_write_to", "os.close(1)\nos.close(2)\nprint('x')", TYPED),
    Attack("everything_closed", "os.closerange(0, 256)\nos._exit(7)", ERROR, exit_code=7),
    Attack("everything_closed_and_an_error", "os.closerange(0, 256)\nraise ValueError", ERROR),
    Attack(
        "standard_streams_gone",
        "sys.stdin = sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None\nraise ValueError",
        ERROR,
    ),
    Attack("standard_streams_swapped", "os.dup2(0, 9); os.dup2(1, 0); os.dup2(2, 1)\nos.write(0, b'refused')"),
    Attack("outputs_held_open", "for fd in range(10, 20): os.dup2(1, fd); os.dup2(2, fd)\nprint('refused')"),
    Attack(
        "stdin_changed",
        "try:\n    os.ftruncate(0, 1 << 24); os.pwrite(0, b'x' * 4096, 0)\nexcept OSError:\n    pass\nprint('refused')",
        stdin="abc",
        after="import sys\nprint(repr(sys.stdin.read()))",
    ),
    Attack(
        "stdin_grown_without_end",
        "fd = os.dup(0)\ndef grow():\n    for i in range(1 << 12): os.pwrite(fd, bytes(1 << 16), i << 16)\nrefused('stdin', grow)",
        stdin="abc",
    ),
    Attack(
        "pipe_shrunk",
        "import fcntl\ntry:\n    fcntl.fcntl(1, 1031, 4096)\nexcept OSError:\n    pass\nprint('refused' + 'x' * 10_000)",
    ),
]


# --- spoofed results

_FORGE = """
import json, struct

def forge(**report):
    body = json.dumps(report).encode()
    frames = [body, body + b"\\n", body + b"\\0", b"memory\\n", b"ready\\nok\\n"]
    frames += [struct.pack(kind, len(body)) + body for kind in ("<I", ">I", "<Q", ">Q")]
    frames += [struct.pack(">III", len(body), 0, 0) + body]
    for fd in range(256):
        for frame in frames if fd > 2 else ():
            try:
                os.write(fd, frame)
            except OSError:
                break

"""

SPOOFED = [
    Attack("claims_success_in_text", 'print(\'{"status": "ok", "exit_code": 0}\')\nsys.exit(3)', ERROR, exit_code=3),
    Attack(
        "claims_success_in_frames",
        _FORGE + "forge(status='ok', exit_code=0, ok=True)\nsys.exit(3)",
        ERROR | OUTPUT_LIMIT,
        exit_code=3,
    ),
    Attack(
        "claims_our_failure",
        _FORGE + "forge(status='sandbox_error', cause='', error='worker died')\nsys.exit(3)",
        ERROR | OUTPUT_LIMIT,
        exit_code=3,
    ),
    Attack(
        "claims_success_and_spins",
        _FORGE + "forge(status='ok', exit_code=0)\nwhile True: pass",
        TIMEOUT | OUTPUT_LIMIT,
        limits=_FAST,
    ),
    Attack(
        "claims_success_and_dies",
        _FORGE + "forge(status='ok', exit_code=0)\nos.abort()",
        CRASH | OUTPUT_LIMIT,
        signal=6,
    ),
    Attack(
        "claims_success_over_the_limit", _FORGE + "forge(status='ok', exit_code=0)\nprint('x' * 60_000)", OUTPUT_LIMIT
    ),
    Attack(
        "claims_without_end", _FORGE + "for _ in range(10**5): forge(status='ok', pad='x' * 4096)", TYPED, limits=_FAST
    ),
    Attack("report_closed", "os.closerange(3, 256)\nsys.exit(3)", ERROR, exit_code=3),
    Attack(
        "report_not_utf8",
        "for fd in range(3, 256):\n    try:\n        os.write(fd, b'\\xff\\xfe\\x00\\n' * 20)\n    except OSError:\n        pass\nraise ValueError",
        ERROR,
    ),
    Attack("memory_claimed_by_name", "class MemoryError(Exception): pass\nraise MemoryError", ERROR),
    Attack("timeout_claimed_by_name", "class Timeout(BaseException): pass\nraise Timeout('cpu time limit')", ERROR),
    Attack("name_with_lines", 'raise type(\'ok\\nmemory\\n{"status": "ok"}\', (Exception,), {})', ERROR),
    Attack("name_without_end", "raise type('E' * 100_000, (Exception,), {})", ERROR | OUTPUT_LIMIT),
    Attack("name_with_surrogates", "raise type('E\\udcff\\ud800', (Exception,), {})", ERROR),
    Attack(
        "class_that_lies",
        """
        class Meta(type):
            __name__ = property(lambda cls: 1 / 0)
            def __repr__(cls): raise KeyboardInterrupt
        class Liar(Exception, metaclass=Meta):
            __class__ = property(lambda self: MemoryError)
            def __str__(self): raise SystemExit(0)
            def __repr__(self): raise SystemExit(0)
        raise Liar
        """,
        ERROR | MEMORY,
    ),
    Attack("group_of_errors", "raise BaseExceptionGroup('many', [KeyboardInterrupt(), MemoryError()])", ERROR),
    Attack("interrupt", "raise KeyboardInterrupt", ERROR),
    Attack("generator_exit", "raise GeneratorExit", ERROR),
    Attack("exit_with_a_huge_number", "sys.exit(10**40)", ERROR, exit_code=255),
    Attack("exit_with_an_object", "class X:\n    def __str__(self): raise ValueError\nsys.exit(X())", ERROR),
    Attack("exit_code_of_a_signal", "sys.exit(128 + 9)", ERROR, exit_code=137),
    Attack("exit_beyond_a_byte", "os._exit(256 + 5)", ERROR, exit_code=5),
    Attack(
        "error_hook_that_exits_well", "sys.excepthook = lambda *_: os._exit(0)\nraise ValueError", OK | ERROR, says=""
    ),
    Attack(
        "builtins_replaced",
        """
        import builtins
        for name in ("compile", "exec", "print", "isinstance", "type", "len", "str", "int", "open", "getattr", "repr"):
            setattr(builtins, name, lambda *_, **__: os.abort() or None)
        for name in ("Exception", "BaseException", "MemoryError", "SystemExit", "OSError"):
            setattr(builtins, name, int)
        1 / 0
        """,
        ERROR | CRASH | MEMORY,
    ),
    Attack(
        "builtins_removed",
        "__builtins__.clear() if isinstance(__builtins__, dict) else vars(__builtins__).clear()\nraise_",
        TYPED - OK,
    ),
    Attack("modules_removed", "sys.modules.clear()\nraise ValueError", ERROR),
    Attack(
        "main_replaced",
        "sys.modules['__main__'] = None\nsys.modules['os'] = sys.modules['sys'] = None\nraise ValueError",
        ERROR,
    ),
    Attack(
        "os_replaced",
        """
        real = os._exit
        os._exit = lambda code: real(0)
        os.write = os.close = lambda *_: 0
        raise ValueError("the program may choose its exit code, not the limits")
        """,
        OK | ERROR,
        says="",
    ),
    Attack(
        "frames_of_the_harness",
        """
        frame = sys._getframe()
        while frame is not None:
            for name, value in list(frame.f_globals.items()):
                if callable(value) and name not in ("escaped", "print") and frame.f_globals is not globals():
                    try:
                        frame.f_globals[name] = lambda *_, **__: {"status": "ok", "exit_code": 0}
                    except Exception:
                        pass
            frame = frame.f_back
        while True:
            pass
        """,
        TIMEOUT,
        limits=_FAST,
    ),
    Attack(
        "objects_of_the_harness",
        """
        import gc, types
        for thing in gc.get_objects():
            try:
                if isinstance(thing, types.FunctionType) and thing.__module__ not in (None, "__main__", "os", "sys"):
                    thing.__code__ = (lambda *_, **__: 0).__code__
            except Exception:
                pass
        os.write(1, b"refused")
        os._exit(3)
        """,
        ERROR | CRASH,
        limits={"cpu_s": 2.0},
        after="import json, re\nprint(json.dumps([1]), re.sub('a', 'b', 'cat'))",
    ),
    Attack(
        "exit_from_a_thread",
        "import threading\nthreading.Thread(target=os._exit, args=(9,)).start()\ntime.sleep(60)",
        ERROR,
        exit_code=9,
    ),
    Attack(
        "error_in_a_thread",
        "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start(); t.join()\nprint('refused')",
    ),
    Attack("crash_of_its_memory", "ctypes.string_at(0)", CRASH, signal=11),
    Attack("crash_of_its_stack", "ctypes.memset(ctypes.addressof(ctypes.c_int()) & ~4095, 255, 1 << 24)", CRASH),
    Attack(
        "crash_of_the_interpreter", "ctypes.memset(id(None), 0, 16)\nprint(None)", CRASH | TIMEOUT | ERROR, limits=_FAST
    ),
    Attack("abort", "os.abort()", CRASH, signal=6),
    Attack("kill_itself", "os.kill(os.getpid(), signal.SIGKILL)", CRASH, signal=9),
    Attack("terminate_itself", "os.kill(os.getpid(), signal.SIGTERM)", CRASH, signal=15),
    Attack("time_limit_pretended", "os.kill(os.getpid(), signal.SIGXCPU)", CRASH | TIMEOUT),
    Attack("real_time_signal", "os.kill(os.getpid(), signal.SIGRTMIN + 3)", CRASH),
    Attack(
        "illegal_instruction",
        """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b"\\x0f\\x0b" if os.uname().machine == "x86_64" else bytes(4))
        ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        """,
        CRASH | ERROR,
    ),
]


# --- state left behind: `after` prints the same with and without the attack before it

STATE = [
    Attack(
        "files",
        "open('a', 'w').write('x'); os.makedirs('b/c/d'); os.symlink('/', 'e')\nprint('refused')",
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "folders_that_cannot_be_listed",
        "os.makedirs('a'); open('a/f', 'w').close(); os.mkdir('b', 0o300); open('b/f', 'w').close(); os.mkdir('b/c', 0)\nos.mkdir('d', 0)\nprint('refused')",
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "folders_that_cannot_be_listed_and_are_looked_at",
        "os.mkdir('b', 0o300); open('b/f', 'w').close(); os.mkdir('b/c', 0)\nos.mkdir('d', 0)\ntime.sleep(0.3)\nprint('refused', oct(os.stat('b').st_mode)[-3:])",
        says="refused 300",
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "folders_that_cannot_be_changed",
        """
        os.makedirs("a/b/c")
        open("a/b/c/f", "w").close()
        for path in ("a/b/c", "a/b", "a"):
            try:
                os.chmod(path, 0o500)
            except OSError:
                pass
        print("refused")
        """,
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "deep_folders",
        """
        for _ in range(1000):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        open("f", "w").close()
        print("refused")
        """,
        limits={"files": 4096},
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "odd_names",
        r"""
        for name in (b"\xff\xfe", b"a\nb", b"-rf", b"~", b"$HOME", b"x" * 255, b" ", b"\x1b[2J", "é€".encode()):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
        print("refused")
        """,
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "many_files",
        "for i in range(3000): open(str(i), 'w').close()\nprint('refused')",
        limits={"files": 4096, "cpu_s": 2.0},
        after="import os\nprint(os.listdir('.'))",
    ),
    Attack(
        "scratch_folder_closed",
        "try:\n    os.chmod('.', 0)\nexcept OSError:\n    pass\nprint('refused')",
        after="import os\nopen('f', 'w').close()\nprint(os.listdir('.'))",
    ),
    Attack(
        "scratch_folder_removed",
        "try:\n    os.rmdir(os.getcwd())\nexcept OSError:\n    pass\ntry:\n    os.rename(os.getcwd(), os.getcwd() + 'x')\nexcept OSError:\n    pass\nprint('refused')",
        after="import os\nopen('f', 'w').close()\nprint(os.listdir('.'))",
    ),
    Attack(
        "modules",
        "import math, json\nmath.pi = 3\njson.dumps = None\nsys.modules['random'] = math\nprint('refused')",
        after="import math, json, random\nprint(math.pi, json.dumps([1]), random.__name__)",
    ),
    Attack(
        "builtins",
        "import builtins\nbuiltins.len = lambda x: 7\nbuiltins.print, p = None, print\np('refused')",
        after="print(len('abc'))",
    ),
    Attack(
        "types",
        "from fractions import Fraction\nFraction.__str__ = lambda self: 'x'\nprint('refused')",
        after="from fractions import Fraction\nprint(Fraction(1, 3))",
    ),
    Attack(
        "small_integers",
        "ctypes.c_int.from_address(id(7) + 24).value = 8\nos.write(1, b'refused')\nos._exit(0)",
        after="print(7, 3 + 4, list(range(6, 9)))",
    ),
    Attack(
        "numpy",
        "import numpy as np\nnp.seterr(all='raise'); np.set_printoptions(precision=1); np.random.seed(7); np.array = None\nprint('refused')",
        after="import numpy as np\nprint(np.array([1 / 3]), np.geterr(), np.random.rand())",
    ),
    Attack(
        "sympy",
        "import sympy\nsympy.Symbol.__str__ = lambda self: 'q'\nsympy.pi.__class__.evalf = lambda *_: 3\nsympy.core.cache.clear_cache()\nprint('refused')",
        after="import sympy\nprint(sympy.Symbol('x') + 1, sympy.pi.evalf())",
        limits={"cpu_s": 2.0},
    ),
    Attack(
        "environment",
        "os.environ['MARK'] = '1'; os.environ.pop('PATH', None); os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()\nprint('refused')",
        after="import os, time\nprint(sorted(os.environ), time.tzname)",
    ),
    Attack(
        "working_folder",
        "os.mkdir('a'); os.chdir('a'); os.rmdir('../a')\nprint('refused')",
        after="import os\nprint(os.path.isdir(os.getcwd()), os.listdir('.'))",
    ),
    Attack("umask", "os.umask(0o777)\nprint('refused')", after="import os\nold = os.umask(0)\nprint(oct(old))"),
    Attack(
        "signals",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\nsignal.alarm(1)\nprint('refused')",
        after="import signal\nprint(signal.getsignal(15), signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.alarm(0))",
    ),
    Attack(
        "decimal_context",
        "import decimal\ndecimal.getcontext().prec = 3\ndecimal.DefaultContext.prec = 2\nprint('refused')",
        after="import decimal\nprint(decimal.Decimal(1) / 3)",
    ),
    Attack(
        "locale",
        "import locale\ntry:\n    locale.setlocale(locale.LC_ALL, 'C.UTF-8')\nexcept locale.Error:\n    pass\nprint('refused')",
        after="import locale\nprint(locale.setlocale(locale.LC_ALL))",
    ),
    Attack(
        "random_numbers",
        "import random\nrandom.seed(5); random.random()\nprint('refused')",
        after="import random\nprint(random.random())",
        mild=True,
    ),
    Attack(
        "random_numbers_of_numpy",
        "import numpy\nnumpy.random.seed(5)\nprint('refused')",
        after="import numpy\nprint(numpy.random.rand())",
    ),
    Attack(
        "search_path",
        "sys.path.insert(0, '/tmp'); sys.path_hooks.clear(); sys.meta_path.clear(); sys.dont_write_bytecode = False\nprint('refused')",
        after="import sys, colorsys\nprint('/tmp' in sys.path, len(sys.meta_path))",
    ),
    Attack(
        "limits",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))\nprint('refused')",
        after="import resource\nopen('f', 'w').write('x' * 99)\nprint([resource.getrlimit(k) for k in range(16)])",
    ),
    Attack(
        "interpreter_settings",
        "import gc, threading\nsys.setrecursionlimit(77); gc.disable(); sys.settrace(print); sys.setswitchinterval(9); threading.stack_size(1 << 20); sys.set_int_max_str_digits(0)\nsys.settrace(None)\nprint('refused')",
        after="import gc, sys, threading\nprint(sys.getrecursionlimit(), gc.isenabled(), sys.gettrace(), sys.getswitchinterval(), threading.stack_size(), sys.get_int_max_str_digits())",
    ),
    Attack(
        "warnings",
        "import warnings, logging\nwarnings.simplefilter('ignore'); logging.disable(50); logging.basicConfig(level=0)\nprint('refused')",
        after="import warnings, logging\nprint(len(warnings.filters), logging.root.manager.disable, logging.root.handlers)",
    ),
    Attack(
        "threads",
        "import threading\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nprint('refused')",
        after="import threading\nprint(threading.active_count())",
    ),
    Attack(
        "open_files",
        "kept = [open(f'f{i}', 'w') for i in range(20)]\nprint('refused')\nsys.stdout.flush()\nos.kill(os.getpid(), 9)",
        CRASH,
        after="import os\nfound = []\nfor fd in range(64):\n    try:\n        found.append((fd, os.fstat(fd).st_mode >> 12))\n    except OSError:\n        pass\nprint(found)",
    ),
    Attack(
        "processors",
        "try:\n    os.sched_setaffinity(0, {0})\nexcept OSError:\n    pass\nprint('refused')",
        after="import os\nprint(os.sched_getaffinity(0))",
    ),
    Attack(
        "niceness",
        "try:\n    os.nice(10)\nexcept OSError:\n    pass\nprint('refused')",
        after="import os\nprint(os.getpriority(os.PRIO_PROCESS, 0))",
    ),
    Attack(
        "process_settings",
        "for option in ((4, 0), (29, 10**9), (41, 1), (15, b'renamed')):\n    libc.prctl(*option, 0, 0, 0)\nprint('refused')",
        after="import ctypes\nlibc = ctypes.CDLL(None)\nname = ctypes.create_string_buffer(16)\nlibc.prctl(16, name)\nprint([libc.prctl(option, 0, 0, 0, 0) for option in (3, 30, 42)], name.value != b'renamed')",
    ),
    Attack(
        "flags_of_the_streams",
        "import fcntl\nfor fd in (0, 1, 2): os.set_blocking(fd, False); os.set_inheritable(fd, False)\nprint('refused')",
        after="import os\nprint([os.get_blocking(fd) for fd in (0, 1, 2)])",
    ),
    Attack(
        "position_of_stdin",
        "sys.stdin.read()\nprint('refused')",
        stdin="abc\n",
        after="import sys\nprint(repr(sys.stdin.read()))",
    ),
    Attack(
        "attributes_of_the_scratch_folder",
        "for name in ('user.a', 'trusted.a', 'security.a'):\n    try:\n        os.setxattr('.', name, b'x')\n    except OSError:\n        pass\nprint('refused')",
        after="import os\nprint(os.listxattr('.'))",
    ),
    Attack(
        "locks",
        "import fcntl\nfd = os.open('/dev/zero', os.O_RDONLY)\nrefused('flock', fcntl.flock, fd, fcntl.LOCK_EX)\n"
        "refused('OFD lock', fcntl.fcntl, fd, 37, bytes(32))",
        after="print('free')",
    ),
    Attack(
        "hash_seed",
        "os.environ['PYTHONHASHSEED'] = '9'\nprint('refused')",
        after="print(hash('x'), {'a', 'b', 'c'})",
        mild=True,
    ),
]


# --- secrets

# Walks this process's own readable memory, without a crash: writing to a pipe from an unmapped page only fails. The
# prefix of the suite's secrets is put together here, so that the program itself does not hold it.
_SCAN = """
import gc

def regions():
    end = libc.sbrk(ctypes.c_long(0))
    windows = {id(thing) >> 21 for thing in gc.get_objects(0) + gc.get_objects(1) + gc.get_objects(2)}
    windows |= {id(thing) >> 21 for thing in list(sys.modules.values())}
    windows |= set(range((end - (192 << 20)) >> 21, (end >> 21) + 1))
    windows |= {ctypes.c_void_p.in_dll(libc, "environ").value >> 21}
    windows |= {window + 1 for window in windows}
    r, w = os.pipe()
    os.set_blocking(w, False)
    for window in sorted(windows):
        data = bytearray()
        for page in range(window << 21, (window + 1) << 21, 1 << 14):
            got = libc.write(w, ctypes.c_void_p(page), 1 << 14)
            data += os.read(r, got) if got > 0 else b""
        yield bytes(data)

prefix, found, total = bytes(reversed(b"-terces-ople")), set(), 0
for data in regions():
    total += len(data)
    at = -1
    while (at := data.find(prefix, at + 1)) >= 0:
        found.add(data[at:at + 44])
print("refused", total >> 20, "MB", *[text.decode("latin-1") for text in sorted(found)])
if total < 8 << 20:
    escaped("nothing was searched")
"""
_EARLIER = """
secret = "$EARLIER_CODE"
import sys
text = sys.stdin.read()
print(len(secret), len(text))
"""

SECRETS = [
    Attack("environment", "print('refused', dict(os.environ))", mild=True),
    Attack(
        "environment_of_the_c_library",
        """
        environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
        index = 0
        while environ[index]:
            print(environ[index])
            index += 1
        print("refused")
        """,
        mild=True,
    ),
    Attack(
        "environment_in_proc",
        """
        for who in ("self", "1", str(os.getppid()), str(W["pid"]), str(W["victim"])):
            for name in ("environ", "cmdline", "maps", "mem", "auxv", "stack", "io"):
                unreadable(f"/proc/{who}/{name}")
        """,
        mild=True,
    ),
    Attack("memory", _SCAN, before=_EARLIER, stdin="", limits={"cpu_s": 4.0, "memory_mb": 256}, mild=True),
    Attack(
        "objects",
        """
        import gc
        seen = set()
        prefix = "-terces-ople"[::-1]
        def look(thing, depth):
            if isinstance(thing, str | bytes) and len(thing) < 10**6:
                text = thing if isinstance(thing, str) else thing.decode("latin-1")
                if prefix in text:
                    print(text[text.index(prefix):][:44])
            elif depth and id(thing) not in seen:
                seen.add(id(thing))
                for inner in gc.get_referents(thing):
                    look(inner, depth - 1)
        frame = sys._getframe()
        while frame is not None:
            look(frame.f_locals, 4)
            look(frame.f_globals, 4)
            frame = frame.f_back
        for thing in gc.get_objects():
            look(thing, 1)
        print("refused", len(seen))
        """,
        before=_EARLIER,
        limits={"cpu_s": 4.0, "memory_mb": 256},
    ),
    Attack(
        "arguments",
        "print('refused', sys.argv, sys.orig_argv, vars(sys.flags) if hasattr(sys.flags, '__dict__') else '')",
        mild=True,
    ),
    Attack(
        "inherited_descriptors",
        """
        for fd in range(3, 1024):
            try:
                kind = os.fstat(fd).st_mode >> 12
            except OSError:
                continue
            if any(f"/proc/self/fd/{fd}" in path for path in sys.path):
                continue  # names a folder of the library
            for function, *arguments in ((os.pread, fd, 100, 0), (os.listdir, fd), (os.fchdir, fd)):
                try:
                    escaped(fd, kind, function(*arguments))
                except OSError:
                    pass
        unreadable(W["public"].lstrip("/"))
        try:
            print(os.pread(W["held"], 100, 0))
        except OSError:
            print("refused")
        """,
        mild=True,
    ),
    Attack(
        "files_below_inherited_descriptors",
        """
        for fd in range(3, 1024):
            for path in (W["public"].lstrip("/"), "../" * 9 + W["public"].lstrip("/"), "etc/passwd", "."):
                try:
                    os.open(path, os.O_RDONLY, dir_fd=fd)
                    if path != "." or not any(f"/proc/self/fd/{fd}" in path for path in sys.path):
                        escaped(fd, path)
                except OSError:
                    pass
        print("refused")
        """,
        mild=True,
    ),
    Attack(
        "memory_of_another_process",
        """
        space = ctypes.create_string_buffer(4096)
        local = (ctypes.c_uint64 * 2)(ctypes.addressof(space), 4096)
        remote = (ctypes.c_uint64 * 2)(id(os) & ~4095, 4096)
        for pid in (os.getppid(), 1, W["victim"], W["pid"]):
            deny("process_vm_readv", pid, local, 1, remote, 1, 0)
            deny("process_vm_writev", pid, local, 0, remote, 0, 0)
        """,
        mild=True,
    ),
    Attack(
        "trace_another_process",
        "for pid in (os.getppid(), 1, W['victim'], W['pid']):\n    deny('ptrace', 0x4206, pid, 0, 0)",
        mild=True,
    ),
    Attack("be_traced", "deny('ptrace', 0, 0, 0, 0)", mild=True),
    Attack(
        "descriptors_of_another_process",
        "for pid in (os.getppid(), 1, W['victim'], W['pid']):\n    deny('pidfd_open', pid, 0)\nfor fd in range(3, 64):\n    deny('pidfd_getfd', fd, 0, 0)",
        mild=True,
    ),
    Attack("shared_memory", "deny('shmat', W['shmid'], 0, 0o10000)", mild=True),
    Attack("shared_memory_file", "unreadable(W['shm'])\nrefused('write', os.open, W['shm'], os.O_RDWR)", mild=True),
    Attack(
        "keys",
        "deny('keyctl', 0, -4, 0)\ndeny('keyctl', 6, -4, 0, 0)\ndeny('add_key', b'user', W['token'].encode(), b'x', 1, -4)\ndeny('request_key', b'user', W['token'].encode(), 0, 0)",
        mild=True,
    ),
    Attack(
        "name_of_the_machine",
        "import socket\nprint('refused') if W['machine'] not in (os.uname().nodename, socket.gethostname()) else escaped()",
        mild=True,
        backends=("namespaces",),
    ),
    Attack("kernel_log", "deny('syslog', 3, 0, 0)", mild=True),
    Attack(
        "terminal_input",
        "import fcntl\nfor fd in range(3):\n    for request in (0x5412, 0x540E, 0x5410, 0x541C, 0x5423):\n        refused(hex(request), fcntl.ioctl, fd, request, b'x')",
        mild=True,
    ),
    Attack(
        "user",
        "print('refused', os.getuid(), os.getgid(), os.getgroups()) if os.getuid() and os.geteuid() and os.getgid() else escaped(os.getuid())",
        mild=True,
    ),
]


# --- signals and other processes. The victim has the user id of the sandbox where there is one

SIGNALS = [
    Attack(
        "kill", "for pid in (W['victim'], W['sleeper']):\n    refused('kill', os.kill, pid, signal.SIGKILL)", mild=True
    ),
    Attack(
        "kill_everything", "refused('kill', os.kill, -1, 0)\nrefused('kill', os.kill, -1, signal.SIGURG)", mild=True
    ),
    Attack("kill_the_parent", "for pid in (os.getppid() or 1, 1):\n    refused('kill', os.kill, pid, 0)"),
    Attack(
        "kill_the_group",
        "refused('kill', os.kill, 0, 0)\nrefused('killpg', os.killpg, os.getpgrp() or 1, signal.SIGURG)",
    ),
    Attack(
        "kill_by_other_numbers",
        "for pid in range(1, 200):\n    if pid != os.getpid():\n        refused(pid, os.kill, pid, 0)",
        mild=True,
    ),
    Attack(
        "kill_a_thread",
        "deny('tkill', W['victim'], signal.SIGKILL)\ndeny('tgkill', W['victim'], W['victim'], signal.SIGKILL)",
        mild=True,
    ),
    Attack(
        "queue_a_signal",
        "info = (ctypes.c_int * 32)(signal.SIGKILL, 0, -1)\ndeny('rt_sigqueueinfo', W['victim'], signal.SIGKILL, info)\ndeny('rt_tgsigqueueinfo', W['victim'], W['victim'], signal.SIGKILL, info)",
        mild=True,
    ),
    Attack(
        "kill_by_descriptor",
        "fd = deny('pidfd_open', W['victim'], 0)\ndeny('pidfd_send_signal', max(fd, 0), signal.SIGKILL, 0, 0)",
        mild=True,
    ),
    Attack(
        "kill_by_owner_of_a_pipe",
        """
        import fcntl, struct
        r, w = os.pipe()
        refused("F_SETOWN", fcntl.fcntl, r, 8, W["victim"])
        refused("F_SETSIG", fcntl.fcntl, r, 10, signal.SIGKILL)
        refused("F_SETOWN_EX", fcntl.fcntl, r, 15, struct.pack("ii", 1, W["victim"]))
        try:
            fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        except OSError:
            pass
        os.write(w, b"x")
        """,
        mild=True,
    ),
    Attack(
        "kill_by_owner_of_a_socket",
        """
        import fcntl, socket, struct
        a, b = socket.socketpair()
        for request in (0x8901, 0x8902):
            refused(hex(request), fcntl.ioctl, a, request, struct.pack("i", W["victim"]))
        refused("F_SETSIG", fcntl.fcntl, a, 10, signal.SIGKILL)
        try:
            fcntl.ioctl(a, 0x5452, struct.pack("i", 1))
        except OSError:
            pass
        b.send(b"x")
        """,
        mild=True,
    ),
    Attack(
        "kill_by_limits",
        "import resource\nfor kind in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_AS):\n    refused('prlimit', resource.prlimit, W['victim'], kind, (0, 0))",
        mild=True,
    ),
    Attack(
        "read_limits",
        "import resource\nfor pid in (W['victim'], W['pid']):\n    refused('prlimit', resource.prlimit, pid, resource.RLIMIT_AS)",
        mild=True,
    ),
    Attack(
        "slow_by_priority",
        "refused('nice', os.setpriority, os.PRIO_PROCESS, W['victim'], 19)\nrefused('nice', os.setpriority, os.PRIO_PROCESS, 0, -5)",
        mild=True,
    ),
    Attack(
        "slow_by_scheduler",
        "deny('sched_setscheduler', W['victim'], 5, ctypes.byref(ctypes.c_int(0)))\ndeny('sched_setattr', W['victim'], 0, 0)\nrefused('idle', os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))",
        mild=True,
    ),
    Attack("slow_by_processors", "refused('affinity', os.sched_setaffinity, W['victim'], {0})", mild=True),
    Attack("slow_by_disk", "deny('ioprio_set', 1, W['victim'], 3 << 13)", mild=True),
    Attack(
        "move_pages",
        "deny('migrate_pages', W['victim'], 0, 0, 0)\ndeny('move_pages', W['victim'], 0, 0, 0, 0, 2)\ndeny('process_madvise', 0, 0, 0, 4, 0)",
        mild=True,
    ),
    Attack("compare_processes", "deny('kcmp', W['victim'], W['pid'], 0, 0, 0)", mild=True),
    Attack(
        "wait_for_another",
        "refused('wait', os.waitpid, -1, os.WNOHANG)\nrefused('wait', os.waitpid, W['victim'], os.WNOHANG)",
        mild=True,
    ),
    Attack(
        "timer_on_another",
        "event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL, 4, W['victim'])\ntimer = ctypes.c_void_p()\nprint('refused') if libc.timer_create(0, event, ctypes.byref(timer)) else escaped('timer')",
        mild=True,
    ),
]


# --- system calls that no program needs

_CALLS = {
    "mount": "deny('mount', b'none', b'/nowhere-at-all', b'tmpfs', 0, 0)",
    "umount2": "deny('umount2', b'/nowhere', 0)",
    "new_mount_interface": "deny('fsopen', b'tmpfs', 0)\ndeny('fsmount', -1, 0, 0)\ndeny('open_tree', -1, b'nowhere', 1)\ndeny('move_mount', -1, b'', -100, b'.', 4)",
    "pivot_root": "deny('pivot_root', b'/nowhere-at-all', b'/nowhere-at-all')",
    "chroot": "deny('chroot', b'.')",
    "user_namespace": "deny('unshare', 0x10000000)",
    "other_namespaces": "for flag in (0x20000, 0x20000000, 0x40000000, 0x8000000, 0x4000000, 0x2000000, 0x80):\n    deny('unshare', flag)",
    "separate_files": "deny('unshare', 0x400)\ndeny('unshare', 0x200)",
    "setns": "deny('setns', 0, 0)\ndeny('setns', -1, 0x10000000)",
    "bpf": "deny('bpf', 0, 0, 0)\ndeny('bpf', 5, ctypes.create_string_buffer(120), 120)",
    "perf_event_open": "deny('perf_event_open', ctypes.create_string_buffer(120), 0, -1, -1, 0)",
    "userfaultfd": "deny('userfaultfd', 0)\ndeny('userfaultfd', 1)",
    "io_uring": "deny('io_uring_setup', 8, ctypes.create_string_buffer(120))",
    "aio": "deny('io_setup', 1, ctypes.byref(ctypes.c_uint64()))",
    "personality": "deny('personality', 0x0040000)\ndeny('personality', 8)",
    "reboot": "deny('reboot', 0, 0, 0, 0)",
    "swap": "deny('swapon', b'nowhere', 0)\ndeny('swapoff', b'nowhere')",
    "kexec": "deny('kexec_load', 0, 17, 0, -1)",
    "modules": "deny('init_module', 0, 0, b'')\ndeny('finit_module', -1, b'', 0)\ndeny('delete_module', b'nothing', 2048)",
    "settimeofday": "deny('settimeofday', (ctypes.c_long * 2)(-1, -1), 0)",
    "clock_settime": "deny('clock_settime', 0, (ctypes.c_long * 2)(-1, -1))",
    "adjtimex": "deny('adjtimex', ctypes.create_string_buffer(256))\ndeny('clock_adjtime', 0, ctypes.create_string_buffer(256))",
    "sethostname": "deny('sethostname', b'', -1)",
    "setdomainname": "deny('setdomainname', b'', -1)",
    "become_root": "deny('setuid', 0)\ndeny('setgid', 0)\ndeny('setresuid', 0, 0, 0)\ndeny('setfsuid', 0)",
    "become_another": "deny('setuid', 1)\ndeny('setgroups', 0, 0)",
    "capabilities": "header = (ctypes.c_uint32 * 2)(0x20080522, 0)\ndata = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)\ndeny('capset', header, data)",
    "ports": "deny('iopl', 3)\ndeny('ioperm', 0x80, 1, 1)",
    "segments": "deny('modify_ldt', 1, ctypes.create_string_buffer(16), 16)",
    "quotactl": "deny('quotactl', 0x800007 << 8, 0, 0, 0)",
    "accounting": "deny('acct', b'/nowhere-at-all')",
    "memory_policy": "deny('set_mempolicy', 0, 0, 0)",
    "semaphores": "deny('semget', 0, 1, 0o1600)",
    "message_queues": "deny('msgget', 0, 0o1600)\ndeny('mq_open', W['token'].encode(), 0o102, 0o600, 0)",
    "page_cache": "deny('cachestat', 0, 0, 0, 0)",
    "filter_for_another_supervisor": "deny('seccomp', 1, 8, ctypes.create_string_buffer(16))",
    "filter_removed": "deny('seccomp', 0, 0, 0)\ndeny('prctl', 22, 0, 0, 0, 0)",
    "privileges_regained": "deny('prctl', 38, 0, 0, 0, 0)\ndeny('prctl', 47, 2, 21, 0, 0)\ndeny('prctl', 8, 1, 0, 0, 0)\ndeny('prctl', 28, 1, 0, 0, 0)",
    "memory_map_replaced": "deny('prctl', 35, 8, 0x10000, 0, 0)",
    "parent_that_does_not_kill": "deny('prctl', 1, 0, 0, 0, 0)",
    "reaper_of_orphans": "deny('prctl', 36, 1, 0, 0, 0)",
    "unknown_numbers": "for number in (337, 400, 480, 500, 1000, 4095, 0x3FFFFFFF):\n    deny(number, 0, 0, 0, 0, 0, 0)",
}
_X86 = {
    "numbers_of_x32": Attack("numbers_of_x32", "print(call(0x40000000 | 39))\nescaped('x32')", CRASH),
    "numbers_below_zero": Attack("numbers_below_zero", "print(call(-2))\nescaped('below zero')", CRASH),
    "numbers_of_i386": Attack(
        "numbers_of_i386",
        """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20 (getpid); int 0x80; ret
        function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        escaped("i386", function())
        """,
        CRASH,
    ),
    "fork_of_i386": Attack(
        "fork_of_i386",
        """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b"\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 2 (fork); int 0x80; ret
        child = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        if child == 0:
            os._exit(0)
        escaped("i386", child)
        """,
        CRASH,
    ),
}
_NEEDS = {"ports": "iopl", "segments": "modify_ldt"}  # calls that an architecture may lack
SYSCALLS = [Attack(name, code, mild=True) for name, code in _CALLS.items() if _NEEDS.get(name, "mount") in NUMBERS]
SYSCALLS += list(_X86.values()) if platform.machine() == "x86_64" else []


# --- odd programs

_DEEP = {"cpu_s": 2.0, "memory_mb": 256}

ODD = [
    Attack("nothing", "", says="", raw=True),
    Attack("a_comment", "# nothing", says="", raw=True),
    Attack("zero_bytes", "print(1)\0print(2)", ERROR, raw=True),
    Attack("ten_megabytes", "x = 1\n" * (10 << 20 >> 3), ERROR, raw=True),
    Attack("surrogates", "print('\ud800')\n", ERROR, raw=True),
    Attack("surrogate_names", "\udcff = 1\n", ERROR, raw=True),
    Attack("another_coding", "# coding: utf-7\nprint(1)", OK | ERROR, says="1", raw=True),
    Attack("no_such_coding", "# coding: no-such-thing\nprint(1)", OK | ERROR, says="1", raw=True),
    Attack("byte_order_mark", "\ufeffprint(1)", OK | ERROR, says="1", raw=True),
    Attack("line_ends", "print(1)\r\nprint(2)\r", says="1", raw=True),
    Attack("unfinished", "print((1, 2\n", ERROR, raw=True),
    Attack("return_outside", "return 1", ERROR, raw=True),
    Attack("await_outside", "await x", ERROR, raw=True),
    Attack("tabs_and_spaces", "if 1:\n\tx = 1\n        y = 2\n", ERROR, raw=True),
    Attack("brackets", "(" * 100_000, ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True),
    Attack("closed_brackets", "(" * 190 + ")" * 190, TYPED, says="", raw=True),
    Attack("minus", "-" * 100_000 + "1", ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True, limits=_DEEP),
    Attack("nots", "not " * 50_000 + "1", ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True, limits=_DEEP),
    Attack("attributes", "a" + ".a" * 100_000, ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True, limits=_DEEP),
    Attack("calls", "a" + "()" * 90_000, ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True, limits=_DEEP),
    Attack("sums", "1" + "+1" * 100_000, TYPED, says="", raw=True, limits=_DEEP),
    Attack("assignments", "a=" * 90_000 + "1", TYPED, says="", raw=True, limits=_DEEP),
    Attack("indentation", "".join(" " * i + "if 1:\n" for i in range(300)) + " " * 300 + "x = 1\n", ERROR, raw=True),
    Attack("lambdas", "lambda:" * 40_000 + "1", ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True, limits=_DEEP),
    Attack("comprehensions", "[x " + "for x in [1] " * 16_000 + "]", TYPED, says="", raw=True, limits=_DEEP),
    Attack("format_strings", "f'" + "{" * 30_000, ERROR | OUTPUT_LIMIT, raw=True, limits=_DEEP),
    Attack("big_literal", "x = " + "9" * 200_000, ERROR | OUTPUT_LIMIT, raw=True),
    Attack(
        "folded_powers",
        "x = 2 ** 10**9 ** 2 if 0 else 1\ny = ((((2**100)**100)**100)**100) if 0 else 1\n",
        TYPED,
        says="",
        raw=True,
    ),
    Attack("folded_shift", "x = 1 << 10**9\nprint('x')", TYPED, says="", raw=True, limits=_FAST),
    Attack("folded_repeats", "x = ((((('x' * 4096) * 4096) * 4096) * 4096) * 4096)", MEMORY | ERROR, raw=True),
    Attack("folded_tuples", "x = ((1,) * 256,) * 10**9", MEMORY | ERROR, raw=True),
    Attack(
        "parser_bomb",
        "ast = __import__('ast')\nast.parse('(' * 10**6)\n",
        ERROR | MEMORY | CRASH | OUTPUT_LIMIT,
        raw=True,
    ),
    Attack(
        "literal_bomb", "__import__('ast').literal_eval('[' * 10**5)", ERROR | MEMORY | CRASH | OUTPUT_LIMIT, raw=True
    ),
    Attack(
        "recursion_of_compile",
        "import ast\nx = ast.parse('1', mode='eval')\nfor _ in range(10**5): x.body = ast.UnaryOp(ast.USub(), x.body)\nast.fix_missing_locations(x)\ncompile(x, 'x', 'eval')",
        ERROR | MEMORY | CRASH,
        raw=True,
        limits=_DEEP,
    ),
    Attack("no_stdin", "input()", ERROR, raw=True),
    Attack(
        "stdin_with_zero_bytes",
        "import sys\nprint(sys.stdin.buffer.read() == bytes(range(256)) and 'refused')",
        raw=True,
        stdin=bytes(range(256)),
    ),
    Attack(
        "stdin_not_utf8",
        "import sys\nprint(len(sys.stdin.read()))",
        OK | ERROR,
        says="",
        raw=True,
        stdin=b"\xff\xfe\x80",
    ),
    Attack(
        "stdin_surrogates", "import sys\nsys.stdin.buffer.read()\nprint('refused')", TYPED, raw=True, stdin="\ud800\n"
    ),
    Attack("stdin_never_read", "print('refused')", raw=True, stdin="x" * (4 << 20)),
    Attack(
        "stdin_half_read",
        "print(input()[:3], 'refused')",
        raw=True,
        stdin="abc\n" * (1 << 20),
        limits={"memory_mb": 128},
    ),
    Attack(
        "stdin_closed",
        "import sys\nsys.stdin.close()\nimport os\nos.close(0)\nprint('refused')",
        raw=True,
        stdin="abc",
        statuses=OK | ERROR,
    ),
    Attack(
        "name_of_the_program",
        "print(__name__, 'refused' if '__file__' not in globals() or 'elpo' not in __file__ else __file__)",
        raw=True,
    ),
]


_TABLES = {
    "time": TIME,
    "memory": MEMORY_,
    "processes": PROCESSES,
    "files": FILES,
    "network": NETWORK,
    "output": OUTPUT,
    "spoofed": SPOOFED,
    "state": STATE,
    "secrets": SECRETS,
    "signals": SIGNALS,
    "syscalls": SYSCALLS,
    "odd": ODD,
}
ATTACKS = [dataclasses.replace(attack, category=name) for name, attacks in _TABLES.items() for attack in attacks]


# --- honest programs

CONTROLS = [
    Control("nothing", "", ""),
    Control("unicode", "print('naïve €5 – 数学 🎲', 'ẞ'.lower(), len('🎲'))", "naïve €5 – 数学 🎲 ß 1\n"),
    Control("much_output", "for i in range(600): print('x' * 99)", ("x" * 99 + "\n") * 600),
    Control("much_output_at_once", "import sys\nsys.stdout.write('y' * 61_440)", "y" * 61_440),
    Control("output_on_both", "import sys\nprint('out')\nprint('err', file=sys.stderr)", "out\n", stderr=("err\n",)),
    Control("lines_of_stdin", "print(sum(int(input()) for _ in range(3)))", "6\n", stdin="1\n2\n3\n"),
    Control(
        "stdin_as_a_file",
        "import sys\nprint([line.split() for line in sys.stdin])",
        "[['a', 'b'], ['c']]\n",
        stdin="a b\nc\n",
    ),
    Control(
        "bytes_of_stdin",
        "import sys\nprint(sys.stdin.buffer.readline(), sys.stdin.buffer.read())",
        "b'a\\n' b'\\xff\\x00'\n",
        stdin=b"a\n\xff\x00",
    ),
    Control("stdin_opened", "print(open(0).read().upper())", "ABC\n\n", stdin="abc\n"),
    Control(
        "stdin_by_descriptor",
        "import os\nprint(os.read(0, 2), os.read(0, 9), os.read(0, 9))",
        "b'ab' b'cd' b''\n",
        stdin="abcd",
    ),
    Control("no_stdin", "import sys\nprint(repr(sys.stdin.read()))", "''\n"),
    Control("unicode_of_stdin", "print(input()[::-1])", "€é\n", stdin="é€\n"),
    Control(
        "big_stdin",
        "import sys\nprint(len(sys.stdin.read()), sum(map(int, '1 2'.split())))",
        "4000000 3\n",
        stdin="12345678\n" * 444_444 + "9999",
    ),
    Control(
        "numpy_linear_algebra",
        """
        import numpy as np
        a = np.array([[4.0, 1.0], [2.0, 3.0]])
        print(np.linalg.solve(a, [1.0, 2.0]).round(6), np.linalg.det(a).round(6), np.linalg.eigvals(a).round(6))
        u, s, v = np.linalg.svd(np.arange(12.0).reshape(3, 4))
        print(s.round(4), np.fft.fft([1, 0, 0, 0]).real, np.einsum("ij,ij->", a, a))
        """,
        "[0.1 0.6] 10.0 [5. 2.]\n[22.4093  1.9553  0.    ] [1. 1. 1. 1.] 30.0\n",
    ),
    Control(
        "numpy_large",
        "import numpy as np\nx = np.ones(100 * 2**20 // 8)\nprint(x.nbytes, x.sum())",
        "104857600 13107200.0\n",
    ),
    Control(
        "numpy_save",
        "import numpy as np\nnp.save('x.npy', np.eye(2)); np.savetxt('x.txt', np.eye(2), fmt='%d')\nprint(np.load('x.npy').tolist(), open('x.txt').read().split())",
        "[[1.0, 0.0], [0.0, 1.0]] ['1', '0', '0', '1']\n",
    ),
    Control(
        "numpy_errors",
        "import numpy as np\nnp.zeros(2) + np.zeros(3)",
        "",
        status=Status.ERROR,
        exit_code=1,
        stderr=(
            "Traceback",
            "ValueError: operands could not be broadcast",
        ),
    ),
    Control(
        "sympy",
        """
        from sympy import Eq, Matrix, diff, factor, integrate, limit, oo, sin, solve, sqrt, symbols, exp, Rational
        x, y = symbols("x y")
        print(solve(x**2 - 5 * x + 6, x), solve([x + y - 3, x - y - 1], [x, y]))
        print(integrate(x * exp(-x), (x, 0, oo)), diff(sin(x**2), x), limit(sin(x) / x, x, 0))
        print(factor(x**4 - 1), Matrix([[1, 2], [3, 4]]).inv(), sqrt(50), Rational(1, 3) + Rational(1, 6))
        """,
        "[2, 3] {x: 2, y: 1}\n1 2*x*cos(x**2) 1\n(x - 1)*(x + 1)*(x**2 + 1) Matrix([[-2, 1], [3/2, -1/2]]) 5*sqrt(2) 1/2\n",
    ),
    Control(
        "sympy_text",
        """
        import sympy
        from sympy.parsing.sympy_parser import parse_expr
        print(sympy.latex(sympy.sqrt(2) / 2), sympy.N(sympy.pi, 30), parse_expr("2*x + 1").subs("x", 3))
        print(sympy.factorint(2**32 + 1), sympy.isprime(2**61 - 1), sympy.nsimplify(0.75), sympy.lambdify("x", "x**2")(5))
        """,
        "\\frac{\\sqrt{2}}{2} 3.14159265358979323846264338328 7\n{641: 1, 6700417: 1} True 3/4 25\n",
    ),
    Control(
        "files",
        """
        import os, pathlib, shutil, tempfile
        with open("a.txt", "w") as file:
            file.write("one\\ntwo\\n")
        with open("a.txt", "a") as file:
            file.write("three\\n")
        os.mkdir("d")
        os.rename("a.txt", "d/b.txt")
        pathlib.Path("d/c.bin").write_bytes(bytes(3))
        print(open("d/b.txt").readlines(), sorted(os.listdir("d")), os.path.getsize("d/c.bin"))
        shutil.copyfile("d/b.txt", "e.txt")
        shutil.rmtree("d")
        with open("e.txt", "r+") as file:
            file.seek(4)
            file.truncate()
        print(open("e.txt").read(), os.path.exists("d"))
        os.unlink("e.txt")
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            print(os.path.getsize(file.name))
        with tempfile.TemporaryFile() as file:
            file.write(b"abc")
            file.seek(0)
            print(file.read())
        print(os.listdir("."))
        """,
        "['one\\n', 'two\\n', 'three\\n'] ['b.txt', 'c.bin'] 3\none\n False\n1\nb'abc'\n[]\n",
    ),
    Control(
        "no_such_file",
        "open('missing.txt')",
        "",
        status=Status.ERROR,
        exit_code=1,
        stderr=('File "<code>", line 1', "FileNotFoundError: [Errno 2] No such file or directory: 'missing.txt'"),
    ),
    Control(
        "csv_json_and_regular_expressions",
        """
        import csv, io, json, re
        with open("t.csv", "w", newline="") as file:
            csv.writer(file).writerows([["a", "b"], [1, "x,y"]])
        print(list(csv.DictReader(open("t.csv"))), json.loads(json.dumps({"a": [1, None, "é"]})))
        print(re.sub(r"(\\d+)", lambda m: str(int(m[1]) * 2), "a1b22"), io.StringIO("x\\ny").readlines())
        """,
        "[{'a': '1', 'b': 'x,y'}] {'a': [1, None, 'é']}\na2b44 ['x\\n', 'y']\n",
    ),
    Control(
        "compression_and_hashes",
        """
        import base64, bz2, gzip, hashlib, lzma, zipfile, zlib
        data = b"elpo" * 1000
        print([module.decompress(module.compress(data)) == data for module in (bz2, gzip, lzma, zlib)])
        print(hashlib.sha256(data).hexdigest()[:16], hashlib.md5(data).hexdigest()[:8], base64.b64encode(b"abc").decode())
        with zipfile.ZipFile("z.zip", "w") as archive:
            archive.writestr("a.txt", "hello")
        print(zipfile.ZipFile("z.zip").read("a.txt"))
        """,
        "[True, True, True, True]\n3a84c45aa5abdc72 97359afe YWJj\nb'hello'\n",
    ),
    Control(
        "sqlite",
        """
        import sqlite3
        for name in (":memory:", "file.db"):
            base = sqlite3.connect(name)
            with base:
                base.execute("create table t (a integer primary key, b text)")
                base.executemany("insert into t (b) values (?)", [("x",), ("y",), ("z",)])
            print(base.execute("select b from t where a > 1 order by a desc").fetchall())
            base.close()
        base = sqlite3.connect("file.db")
        base.execute("vacuum")
        print(base.execute("select count(*), sum(a) from t").fetchone())
        """,
        "[('z',), ('y',)]\n[('z',), ('y',)]\n(3, 6)\n",
    ),
    Control(
        "threads",
        """
        import queue, threading
        from concurrent.futures import ThreadPoolExecutor
        box, lock, total = queue.Queue(), threading.Lock(), 0
        def work():
            global total
            while (item := box.get()) is not None:
                with lock:
                    total += item
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads: thread.start()
        for i in range(1000): box.put(i)
        for _ in threads: box.put(None)
        for thread in threads: thread.join()
        with ThreadPoolExecutor(8) as pool:
            print(total, list(pool.map(pow, range(5), [2] * 5)))
        """,
        "499500 [0, 1, 4, 9, 16]\n",
    ),
    Control(
        "thread_after_the_end",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()\nprint('early')",
        "early\nlate\n",
    ),
    Control(
        "asyncio",
        """
        import asyncio
        async def one(i):
            await asyncio.sleep(0.01 * (3 - i))
            return i
        async def main():
            print(await asyncio.gather(*map(one, range(3))))
            print(await asyncio.to_thread(sum, [1, 2]))
            try:
                await asyncio.wait_for(asyncio.sleep(5), 0.01)
            except asyncio.TimeoutError:
                print("late")
        asyncio.run(main())
        """,
        "[0, 1, 2]\n3\nlate\n",
    ),
    Control(
        "socketpair",
        "import socket\na, b = socket.socketpair()\na.sendall(b'hello')\nprint(b.recv(9), a.fileno() != b.fileno())\na.close()\nprint(b.recv(9))",
        "b'hello' True\nb''\n",
    ),
    Control(
        "selectors_and_pipes",
        "import os, selectors\nr, w = os.pipe()\ns = selectors.DefaultSelector()\ns.register(r, selectors.EVENT_READ)\nprint(s.select(0))\nos.write(w, b'x')\nprint(len(s.select(1)), os.read(r, 9))",
        "[]\n1 b'x'\n",
    ),
    Control(
        "numbers",
        """
        import cmath, math, statistics
        from decimal import Decimal, getcontext
        from fractions import Fraction
        getcontext().prec = 30
        print(Decimal(1) / 7, Fraction(1, 3) + Fraction(1, 6), math.comb(50, 25), 2**200 % 10**9)
        print(statistics.mean([1, 2, 4]), statistics.stdev([1, 2, 4]), cmath.sqrt(-4), math.isqrt(10**20), round(2.675, 2))
        """,
        "0.142857142857142857142857142857 1/2 126410606437752 835301376\n"
        "2.3333333333333335 1.5275252316519468 2j 10000000000 2.67\n",
    ),
    Control(
        "dates",
        """
        import time
        from datetime import date, datetime, timedelta, timezone
        from zoneinfo import ZoneInfo
        moment = datetime(2024, 7, 1, 12, tzinfo=timezone.utc)
        print(moment.astimezone(ZoneInfo("Europe/Berlin")), moment.astimezone(ZoneInfo("America/New_York")).tzname())
        print(date(2024, 2, 28) + timedelta(2), datetime.fromtimestamp(0), time.tzname, time.localtime(0).tm_hour)
        """,
        "2024-07-01 14:00:00+02:00 EDT\n2024-03-01 1970-01-01 00:00:00 ('UTC', 'UTC') 0\n",
    ),
    Control(
        "classes",
        """
        import dataclasses, enum, functools, inspect, typing
        @dataclasses.dataclass(order=True)
        class Point:
            x: int
            y: int = 0
        class Color(enum.Enum):
            RED = 1
        @functools.lru_cache
        def fib(n: int) -> int:
            return n if n < 2 else fib(n - 1) + fib(n - 2)
        print(sorted([Point(2), Point(1, 5)]), Color(1), fib(90), typing.get_type_hints(Point), fib.__wrapped__.__annotations__)
        print(inspect.getsource(fib.__wrapped__).splitlines()[0], inspect.signature(Point))
        """,
        "[Point(x=1, y=5), Point(x=2, y=0)] Color.RED 2880067194370816120 {'x': <class 'int'>, 'y': <class 'int'>} "
        "{'n': <class 'int'>, 'return': <class 'int'>}\n@functools.lru_cache (x: int, y: int = 0) -> None\n",
    ),
    Control(
        "source_of_itself",
        "import inspect\ndef f(x):\n    return x + 1  # next\nprint(inspect.getsource(f), f.__module__, f.__code__.co_filename)",
        "def f(x):\n    return x + 1  # next\n __main__ <code>\n",
    ),
    Control(
        "main_guard",
        "def main():\n    print('main', __name__)\nif __name__ == '__main__':\n    main()",
        "main __main__\n",
    ),
    Control(
        "pickle",
        "import pickle\nclass A:\n    def __init__(self): self.x = 1\nprint(pickle.loads(pickle.dumps(A())).x)",
        "1\n",
    ),
    Control("recursion", "def f(n): return n and 1 + f(n - 1)\nprint(f(900))", "900\n"),
    Control(
        "too_deep",
        "def f(n): return f(n + 1)\nf(0)",
        "",
        status=Status.ERROR,
        exit_code=1,
        stderr=("RecursionError: maximum recursion depth exceeded",),
    ),
    Control(
        "generators",
        "import itertools as it\ndef count():\n    n = yield 0\n    while True: n = yield n * 2\ng = count(); next(g)\nprint(g.send(4), list(it.islice(it.accumulate(it.count(1)), 5)), [*it.permutations('ab')], sum(range(10**6)))",
        "8 [1, 3, 6, 10, 15] [('a', 'b'), ('b', 'a')] 499999500000\n",
    ),
    Control("exit_well", "import sys\nprint('x')\nsys.exit()", "x\n"),
    Control("exit_code", "import sys\nprint('x')\nsys.exit(3)", "x\n", status=Status.ERROR, exit_code=3),
    Control("exit_message", "raise SystemExit('no luck')", "", status=Status.ERROR, exit_code=1, stderr=("no luck",)),
    Control("exit_handlers", "import atexit\natexit.register(print, 'last')\nprint('first')", "first\nlast\n"),
    Control(
        "chained_errors",
        """
        try:
            {}["key"]
        except KeyError as error:
            raise ValueError("bad value") from error
        """,
        "",
        status=Status.ERROR,
        exit_code=1,
        stderr=(
            'File "<code>", line 2, in <module>',
            "KeyError: 'key'",
            "direct cause",
            "line 4, in <module>",
            "ValueError: bad value",
        ),
    ),
    Control(
        "syntax_error",
        "x = 1\nprint(x",
        "",
        status=Status.ERROR,
        exit_code=1,
        stderr=('File "<code>", line 2', "SyntaxError: '(' was never closed"),
    ),
    Control(
        "assertion",
        "assert 1 == 2, 'not equal'",
        "",
        status=Status.ERROR,
        exit_code=1,
        stderr=("line 1, in <module>", "AssertionError: not equal"),
    ),
    Control(
        "caught_errors",
        "for f in (lambda: 1 / 0, lambda: [][0], lambda: int('x')):\n    try:\n        f()\n    except Exception as e:\n        print(type(e).__name__)",
        "ZeroDivisionError\nIndexError\nValueError\n",
    ),
    Control(
        "own_signals",
        """
        import signal, time
        signal.signal(signal.SIGUSR1, lambda number, frame: print("got", signal.Signals(number).name))
        signal.raise_signal(signal.SIGUSR1)
        def late(number, frame): raise TimeoutError("late")
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(5)
        except TimeoutError as error:
            print(error)
        """,
        "got SIGUSR1\nlate\n",
    ),
    Control(
        "sleep",
        "import time\nt = time.monotonic(); time.sleep(0.1)\nprint(0.09 < time.monotonic() - t)\nprint(time.time() > 1.6e9, time.process_time() < 5)",
        "True\nTrue True\n",
    ),
    Control(
        "no_processes",
        "import subprocess, os\nfor f in (os.fork, lambda: subprocess.run(['ls'])):\n    try:\n        f()\n    except OSError as error:\n        print(type(error).__name__)",
        "PermissionError\nPermissionError\n",
    ),
    Control(
        "no_network",
        "import urllib.request, urllib.error, socket\ntry:\n    urllib.request.urlopen('http://127.0.0.1:9')\nexcept urllib.error.URLError as error:\n    print(type(error.reason).__name__)\ntry:\n    socket.socket()\nexcept OSError as error:\n    print(type(error).__name__)",
        "PermissionError\nPermissionError\n",
    ),
    Control(
        "map",
        "import mmap\nm = mmap.mmap(-1, 10 << 20)\nm[5:8] = b'abc'\nprint(len(m), m[4:9], m.find(b'c'))\nwith open('f', 'wb') as f: f.write(bytes(9))\nwith open('f', 'r+b') as f, mmap.mmap(f.fileno(), 9) as m: m[0] = 65\nprint(open('f', 'rb').read(2))",
        "10485760 b'\\x00abc\\x00' 7\nb'A\\x00'\n",
    ),
    Control(
        "warnings_and_logs",
        "import logging, warnings\nwarnings.warn('careful')\nlogging.warning('hello')\nlogging.info('quiet')",
        "",
        stderr=("UserWarning: careful", "WARNING:root:hello\n"),
    ),
    Control(
        "text",
        "import textwrap, string, unicodedata, difflib, pprint\nprint(textwrap.fill('aa bb cc', 5), string.ascii_lowercase[:3], unicodedata.name('é'), difflib.get_close_matches('appel', ['apple', 'x']))\npprint.pprint({'b': 1, 'a': [1, 2]})\nprint(f'{1234567.891:,.2f} {255:#x} {\"x\":>3}')",
        "aa bb\ncc abc LATIN SMALL LETTER E WITH ACUTE ['apple']\n{'a': [1, 2], 'b': 1}\n1,234,567.89 0xff   x\n",
    ),
    Control(
        "containers",
        "import array, bisect, collections, copy, heapq\nh = [5, 1, 4]; heapq.heapify(h)\nprint(heapq.heappop(h), bisect.bisect([1, 3, 5], 3), collections.Counter('abca').most_common(1), collections.deque([1, 2, 3], 2), array.array('i', [1, 2]).tobytes().hex(), copy.deepcopy({'a': [1]}))",
        "1 2 [('a', 2)] deque([2, 3], maxlen=2) 0100000002000000 {'a': [1]}\n",
    ),
    Control(
        "foreign_functions",
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.abs(-3), ctypes.sizeof(ctypes.c_double))\ncallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: x + 1)\nprint(callback(4))",
        "3 8\n5\n",
    ),
    Control(
        "imports_of_its_own",
        "open('helper.py', 'w').write('VALUE = 42\\n')\nimport sys\nsys.path.insert(0, '.')\nimport helper\nprint(helper.VALUE)",
        "42\n",
    ),
    Control(
        "environment",
        "import os, getpass, pathlib\nos.environ['X'] = '1'\nprint(os.environ['X'], os.getcwd() == os.path.abspath('.'), pathlib.Path.home().is_absolute(), os.cpu_count() > 0)",
        "1 True True True\n",
    ),
    Control("notebook_value", "x = 2\nx + 3", "5\n", mode="notebook"),
    Control("notebook_print", "print(4)", "4\n", mode="notebook"),
    Control("notebook_nothing", "x = 5\nNone", "", mode="notebook"),
    Control("script_value", "x = 2\nx + 3", ""),
]
