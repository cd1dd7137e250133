"""The filter of system calls: an allow-list for x86-64 and aarch64, as a BPF program.

Everything that is not named here fails with EPERM, so a call that a later kernel adds is refused until somebody has
thought about it. What remains lets a program compute, use its descriptors, its scratch folder and its own threads; it
cannot create processes, open sockets, signal or limit anyone else, or ask the kernel for more attack surface than that.
"""

import errno
import platform
import struct

# name: (x86-64, aarch64); None where the architecture has no such call.
_FREE = {
    # descriptors and files
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "dup": (32, 23),
    "dup2": (33, None),
    "sendfile": (40, 71),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getdents": (78, None),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "creat": (85, None),
    "link": (86, None),
    "unlink": (87, None),
    "symlink": (88, None),
    "readlink": (89, None),
    "umask": (95, 166),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "getdents64": (217, 61),
    "fadvise64": (221, 223),
    "epoll_create": (213, None),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "splice": (275, 76),
    "tee": (276, 77),
    "epoll_pwait": (281, 22),
    "timerfd_create": (283, 85),
    "eventfd": (284, None),
    "fallocate": (285, 47),
    "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "renameat2": (316, 276),
    "copy_file_range": (326, 285),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "statx": (332, 291),
    "faccessat2": (439, 439),
    "epoll_pwait2": (441, 441),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    # its own signals, timers and threads
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "exit": (60, 93),
    "wait4": (61, 260),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "arch_prctl": (158, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "waitid": (247, 95),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "membarrier": (324, 283),
    "rseq": (334, 293),
    # what it may know
    "getpid": (39, 172),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getpriority": (140, 141),
    "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "gettid": (186, 178),
    "time": (201, None),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    # of a connected pair of its own
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "getsockopt": (55, 209),
}

# Only where all the files that could be reached are the program's own: Landlock does not govern these.
_OWN_FILES = {
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
}

_SELF = "self"  # stands for the process's own id
_ANY = 0xFFFFFFFF

# What is done with the first alternative whose conditions (argument, mask, value) all hold; if none, it is refused.
_LET, _REFUSE, _END = "let", "refuse", "end"
# A thread like any other: one with descriptors or a folder of its own would not be seen by who counts them.
_CLONE_SHARED = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000
_AF_UNIX, _MSG_OOB, _CLOSE_RANGE_UNSHARE = 1, 1, 2
_O_ACCMODE, _O_TRUNC = 0x3, 0x200
_SIGKILL, _RLIMIT_CPU = 9, 0


def _either(argument: int, *values: int | str) -> list:
    return [(_LET, [(argument, _ANY, value)]) for value in values]


def _opens(flags: int) -> list:
    """No truncating by a descriptor that is opened for reading, which older Landlock takes for a mere read."""
    return [(_LET, [(flags, _O_TRUNC, 0)]), (_LET, [(flags, _O_ACCMODE, 1)]), (_LET, [(flags, _O_ACCMODE, 2)])]


def _signals(number: int) -> list:
    """Itself alone. SIGKILL ends it here and now, in a way that shows that nobody else sent it."""
    return [(_END, [(0, _ANY, _SELF), (number, _ANY, _SIGKILL)]), (_LET, [(0, _ANY, _SELF)])]


_IF = {
    "open": ((2, None), _opens(1)),
    "openat": ((257, 56), _opens(2)),
    "clone": ((56, 220), [(_LET, [(0, _CLONE_SHARED, _CLONE_SHARED)])]),
    "kill": ((62, 129), _signals(1)),
    "tgkill": ((234, 131), _signals(2)),
    "rt_sigqueueinfo": ((129, 138), _signals(1)),
    # Its own limits, downwards; but the kernel's SIGKILL at the limit of CPU time must come from us.
    "prlimit64": (
        (302, 261),
        [
            *((_LET, [(0, _ANY, pid), (2, _ANY, 0), (2.5, _ANY, 0)]) for pid in (0, _SELF)),  # only asks
            (_REFUSE, [(1, _ANY, _RLIMIT_CPU)]),
            *_either(0, 0, _SELF),
        ],
    ),
    "setrlimit": ((160, 164), [(_REFUSE, [(0, _ANY, _RLIMIT_CPU)]), (_LET, [])]),
    # No destination: the pair is connected, and an address could name a socket of somebody else.
    "sendto": ((44, 206), [(_LET, [(3, _MSG_OOB, 0), (4, _ANY, 0), (4.5, _ANY, 0)])]),
    "recvfrom": ((45, 207), [(_LET, [(3, _MSG_OOB, 0)])]),
    "socketpair": ((53, 199), _either(0, _AF_UNIX)),  # as asyncio needs; other families would have modules loaded
    "close_range": ((436, 436), [(_LET, [(2, _CLOSE_RANGE_UNSHARE, 0)])]),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": ((16, 29), _either(1, 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # All but those that send signals, take leases or enlarge pipes. Record locks stay for SQLite's sake; `flock`, which
    # keeps others out with no more than a descriptor for reading, does not.
    "fcntl": ((72, 25), _either(1, 0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),
    # PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_GET_NO_NEW_PRIVS, and naming of memory for malloc
    "prctl": ((157, 167), _either(0, 3, 15, 16, 21, 39, 0x53564D41)),
}

# Where the C library then falls back on a call that can be filtered.
_ABSENT = {"clone3": (435, 435), "openat2": (437, 437)}

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32 = 0x40000000

_LOAD, _AND, _JUMP, _JEQ, _JGE, _RET = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def build(own_files: bool, machine: str = platform.machine()) -> tuple[bytes, list[int]]:
    """The BPF program of an architecture.

    Args:
      own_files: Whether the program can reach no files but its own, so that their modes and times are its own as well.
      machine: "x86_64" or "aarch64".

    Returns:
      The instructions, 8 bytes each, and the places in them where the id of the process belongs, 4 bytes each.

    Raises:
      OSError: If the architecture has no table.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system-call table for {machine}")
    audit, column = _ARCHITECTURES[machine]
    always = [(_LET, [])]
    named = {name: (numbers, always) for name, numbers in (_FREE | (_OWN_FILES if own_files else {})).items()} | _IF
    rules = {numbers[column]: _rule(alternatives) for numbers, alternatives in named.values()}
    rules |= {numbers[column]: [(_RET, 0, 0, _ERRNO | errno.ENOSYS)] for numbers in _ABSENT.values()}
    rules.pop(None, None)  # calls that this architecture does not have
    code = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, audit), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, _X32), (_RET, 0, 0, _KILL)]
    code += _search(_segments(rules))
    own = [8 * index + 4 for index, instruction in enumerate(code) if instruction[3] == _SELF]
    packed = (struct.pack("=HBBI", *rest, 0 if value == _SELF else value) for *rest, value in code)
    return b"".join(packed), own


def _segments(rules: dict[int, list[tuple]]) -> list[tuple[int, list[tuple]]]:
    """First number and instructions of each run of numbers that are treated alike; what has no rule is refused."""
    refused = [(_RET, 0, 0, _ERRNO | errno.EPERM)]
    segments: list[tuple[int, list[tuple]]] = []
    for number in range(max(rules) + 2):
        rule = rules.get(number, refused)
        if not segments or segments[-1][1] != rule:
            segments.append((number, rule))
    return segments


def _search(segments: list[tuple[int, list[tuple]]]) -> list[tuple]:
    """Instructions that find the segment of the number in the accumulator by halving, and act as it says.

    The kernel walks through a filter once for every call there is, whenever one is installed, so a short way counts.
    """
    if len(segments) == 1:
        return segments[0][1]
    half = len(segments) // 2
    low, high = _search(segments[:half]), _search(segments[half:])
    if len(low) <= 255:
        return [(_JGE, len(low), 0, segments[half][0]), *low, *high]
    return [(_JGE, 0, 1, segments[half][0]), (_JUMP, 0, 0, len(low)), *low, *high]  # too far for a conditional jump


def _rule(alternatives: list) -> list[tuple]:
    """Instructions for one call: the first alternative that holds decides; if none does, it is refused."""
    body = [instruction for action, conditions in alternatives for instruction in _alternative(action, conditions)]
    # The last one always holds, or something has to follow; not a look at the number, which is overwritten.
    return body if not alternatives[-1][1] else [*body, (_RET, 0, 0, _ERRNO | errno.EPERM)]


def _alternative(action: str, conditions: list) -> list[tuple]:
    """Instructions that act if all conditions hold and else run to their end."""
    body = []
    for done, (argument, mask, value) in enumerate(conditions):
        left = 3 * (len(conditions) - done) - 2  # to the end: what this and later conditions take, and the return
        body += [(_LOAD, 0, 0, int(16 + 8 * argument)), (_AND, 0, 0, mask), (_JEQ, 0, left, value)]
    return [*body, (_RET, 0, 0, {_LET: _ALLOW, _REFUSE: _ERRNO | errno.EPERM, _END: _KILL}[action])]
