"""The system calls that Python has no function for. Every one raises OSError where the kernel refuses."""

import ctypes
import mmap
import os
import platform
import resource
import signal
import struct

libc = ctypes.CDLL(None, use_errno=True)
_ARM = platform.machine() == "aarch64"

SYS_PIVOT_ROOT = 41 if _ARM else 155
SYS_CAPSET = 91 if _ARM else 126
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446

CLONE_VM, CLONE_FILES = 0x100, 0x400
NAMESPACES = {
    "mount": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, MOVE_FROM_EMPTY_PATH = 1, 4

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
CAP_SYS_ADMIN = 21

# Rights of Landlock by the version of its interface that brought them.
FS_EXECUTE, FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1, 2, 4, 8
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_RIGHTS, _SCOPES = 3, 3  # bind and connect TCP (4); abstract sockets and signals (6)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(libc.syscall(ctypes.c_long(number), *wide), what)


def prctl(option: int, *arguments: int) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    _check(libc.prctl(option, *map(ctypes.c_ulong, padded)), f"prctl {option}")


def unshare(flags: int) -> None:
    _check(libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(libc.setns(fd, flags), "setns")


def set_hostname(name: str) -> None:
    _check(libc.sethostname(name.encode(), len(name)), "sethostname")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _check(
        libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()),
        f"mount {target}",
    )


def unmount(target: str) -> None:
    _check(libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def open_tree(path: str) -> int:
    """A descriptor of a detached copy of the mounts below `path`."""
    flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
    return _syscall(f"open_tree {path}", SYS_OPEN_TREE, AT_FDCWD, ctypes.c_char_p(path.encode()), flags)


def move_mount(tree: int, target: str) -> None:
    empty, where = ctypes.c_char_p(b""), ctypes.c_char_p(target.encode())
    _syscall(f"move_mount {target}", SYS_MOVE_MOUNT, tree, empty, AT_FDCWD, where, MOVE_FROM_EMPTY_PATH)


def set_mount(fd: int, path: str, attributes: int, recursive: bool) -> None:
    data = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, MS_PRIVATE, 0), 32)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _syscall(f"mount_setattr {path}", SYS_MOUNT_SETATTR, fd, ctypes.c_char_p(path.encode()), flags, data, 32)


def pivot_root_here() -> None:
    """Makes the current folder, a mount, the root, and lets go of the old one."""
    here = ctypes.c_char_p(b".")
    _syscall("pivot_root", SYS_PIVOT_ROOT, here, here)
    unmount(".")
    os.chdir("/")


_CAPABILITY_HEADER = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
_CAPABILITIES = ctypes.create_string_buffer(24)


def set_capabilities(permitted: int, inheritable: int) -> None:
    """Sets the effective and permitted set to `permitted`."""
    halves = [(word >> shift) & 0xFFFFFFFF for shift in (0, 32) for word in (permitted, permitted, inheritable)]
    struct.pack_into("=6I", _CAPABILITIES, 0, *halves)
    _syscall("capset", SYS_CAPSET, _CAPABILITY_HEADER, _CAPABILITIES)


def keep_capability(capability: int) -> None:
    """Keeps this one of the process's capabilities, also over an exec."""
    set_capabilities(1 << capability, 1 << capability)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def drop_capabilities() -> None:
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    set_capabilities(0, 0)


class Init:
    """The first process of a new pid namespace: it only waits, so that a program in there is an ordinary process.

    A namespace ends with its first process, and that one ignores the signals it sends itself; a program in that place
    could neither abort nor be told from one that was killed. This one shares our memory, so it costs no copy of it.
    """

    # Private: what a program writes to its copy must not be what this runs on.
    _stack = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _top = ctypes.addressof(ctypes.c_char.from_buffer(_stack)) + (1 << 16)

    def __init__(self):
        wait = ctypes.cast(libc.pause, ctypes.c_void_p)
        flags = CLONE_VM | CLONE_FILES | NAMESPACES["pid"] | signal.SIGCHLD
        self.pid = _check(libc.clone(wait, ctypes.c_void_p(self._top), flags, None), "clone")
        self.fd = os.pidfd_open(self.pid)

    def close(self) -> None:
        """Ends the namespace and everything in it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


class Filter:
    """A seccomp filter that only the process's own id is missing from.

    All of it is laid out beforehand: in a new process even making a buffer takes a while.

    Args:
      program: Instructions, 8 bytes each.
      own: Where in it the process's id belongs.
    """

    def __init__(self, program: bytes, own: list[int]):
        self._code = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(self._code))
        self._header = ctypes.create_string_buffer(header, 16)
        self._own = own

    def install(self, pid: int) -> None:
        """Puts it on this process, for good."""
        for place in self._own:
            struct.pack_into("=I", self._code, place, pid)
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(self._header))


def landlock_version() -> int:
    """The version of the Landlock interface.

    Raises:
      OSError: If this kernel has none, or it is turned off.
    """
    return _syscall("landlock", SYS_LANDLOCK_CREATE, None, 0, 1)


def landlock_ruleset(rules: list[tuple[int, int]]) -> int:
    """A descriptor of a ruleset that allows what `rules` say and nothing else of what this kernel can rule.

    Args:
      rules: Pairs of an O_PATH descriptor and the rights beneath it, all of them if negative.
    """
    version = landlock_version()
    rights = max(bits for since, bits in _FS_RIGHTS.items() if since <= version)
    words = [rights, _NET_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0]
    size = 8 if version < 4 else 16 if version < 6 else 24
    data = ctypes.create_string_buffer(struct.pack("=QQQ", *words)[:size], size)
    ruleset = _syscall("landlock", SYS_LANDLOCK_CREATE, data, size, 0)
    for fd, allowed in rules:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights if allowed < 0 else rights & allowed, fd), 12)
        _syscall("landlock rule", SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    """Puts a ruleset on this process, for good. Needs no_new_privs."""
    _syscall("landlock restrict", SYS_LANDLOCK_RESTRICT, ruleset, 0)


def address_space() -> int:
    """Bytes of address space this process has, to a page; found by trying, since there may be no /proc to ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, 1 << 47 if hard == resource.RLIM_INFINITY else min(1 << 47, hard)
    while high - low > 4096:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, 4096).close()
            high = middle
        except OSError:
            low = middle
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return high
