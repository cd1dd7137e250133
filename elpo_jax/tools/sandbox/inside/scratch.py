"""The scratch folder where no file system of its own limits and empties it.

It is worked on by descriptors that follow no link: its content, and with it every name in it, is a program's.
"""

import contextlib
import math
import os
import stat

MOST_GONE = 20  # folders that vanish while they are counted, until that is no accident
MOST_WAITING = 200  # open folders with subfolders that are not counted yet

_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def usage(folder: str, most: int) -> tuple[float, int]:
    """Bytes and number of the files below a folder, however deep; stops counting above `most` files.

    Folders that may not be listed are counted as well: else a program's end would depend on whether somebody looked.
    What cannot be counted is infinite: what may not be entered, is moved under our feet, or waits in too many folders.
    """
    size, count, gone = 0, 0, 0
    waiting: list[tuple[int, list[str]]] = []  # open folders, and the subfolders of each that are not counted yet
    name, within, finished = folder, None, None
    try:
        while count <= most:
            try:
                here, inner = _listed(name, within), []
            except FileNotFoundError:
                gone += 1
                if gone > MOST_GONE:
                    return math.inf, count
            else:
                waiting.append((here, inner))
                with os.scandir(here) as entries:
                    for entry in entries:
                        count += 1
                        with contextlib.suppress(FileNotFoundError):
                            size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            inner.append(entry.name)
            if finished is not None:
                os.close(finished)
                finished = None
            while waiting and not waiting[-1][1]:
                os.close(waiting.pop()[0])
            if not waiting:
                return size, count
            if len(waiting) > MOST_WAITING:
                return math.inf, count
            within, names = waiting[-1]
            name = names.pop()
            if not names:  # closed when its last subfolder is open, so a mere nesting keeps none open
                finished = waiting.pop()[0]
        return size, count
    except OSError:
        return math.inf, count
    finally:
        for descriptor in [*(descriptor for descriptor, _ in waiting), *([] if finished is None else [finished])]:
            os.close(descriptor)


def deleted(pid: int, folder: str, unknown: int) -> int:
    """Bytes of the deleted files of a folder that a process still has open or mapped.

    Args:
      pid: The process.
      folder: Where they were.
      unknown: What to count for a file that is only mapped, whose size does not show.
    """
    sizes: dict[int, int] = {}
    with contextlib.suppress(OSError):
        device = os.stat(folder).st_dev
        for task in os.listdir(f"/proc/{pid}/task"):  # the first may have ended before the others
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{pid}/task/{task}/fd"):
                    with contextlib.suppress(OSError):
                        facts = os.stat(f"/proc/{pid}/task/{task}/fd/{fd}")
                        if facts.st_nlink == 0 and facts.st_dev == device and stat.S_ISREG(facts.st_mode):
                            sizes[facts.st_ino] = facts.st_blocks * 512
                break
        with open(f"/proc/{pid}/maps", "rb") as maps:
            for line in maps:
                if line.endswith(b" (deleted)\n") and os.fsencode(f" {folder}/") in line:
                    sizes.setdefault(int(line.split()[4]), unknown)
    return sum(sizes.values())


def empty(folder: str) -> None:
    """Removes what is in a folder, however deep: subfolders are first moved up, so no path grows long."""
    with _opened(folder) as top:
        while names := _names(top):
            for name, is_folder in names:
                if not is_folder:
                    os.unlink(name, dir_fd=top)
                    continue
                with _opened(name, top) as inner:
                    for child, child_is_folder in _names(inner):
                        if child_is_folder:
                            with _opened(child, inner):  # a folder must be writable to be moved
                                os.rename(child, f".{os.urandom(8).hex()}", src_dir_fd=inner, dst_dir_fd=top)
                        else:
                            os.unlink(child, dir_fd=inner)
                os.rmdir(name, dir_fd=top)


def remove(folder: str) -> None:
    """Removes the folder as well, if it is there."""
    with contextlib.suppress(OSError):
        empty(folder)
        os.rmdir(folder)


def _listed(name: str, within: int | None) -> int:
    """A descriptor to list a folder with; one that may not be read has its mode again when this returns."""
    try:
        return os.open(name, os.O_RDONLY | _FOLDER, dir_fd=within)
    except PermissionError:
        place = os.open(name, os.O_PATH | _FOLDER, dir_fd=within)
    try:
        mode = stat.S_IMODE(os.fstat(place).st_mode)
        os.chmod(f"/proc/self/fd/{place}", mode | stat.S_IRUSR)
        try:
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.chmod(f"/proc/self/fd/{place}", mode)
    finally:
        os.close(place)


def _names(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


@contextlib.contextmanager
def _opened(name: str, within: int | None = None):
    """A descriptor of a folder, which is made accessible to its owner."""
    place = os.open(name, os.O_PATH | _FOLDER, dir_fd=within)
    try:
        if stat.S_IMODE(os.fstat(place).st_mode) != 0o700:
            os.chmod(f"/proc/self/fd/{place}", 0o700)
        folder = os.open(name, os.O_RDONLY | _FOLDER, dir_fd=within)
    finally:
        os.close(place)
    try:
        yield folder
    finally:
        os.close(folder)
