"""The scratch folder where no file system of its own limits and empties it.

It is worked on by descriptors that follow no link: its content, and with it every name in it, is a program's.
"""

import contextlib
import os
import stat

_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def usage(folder: str, most: int) -> tuple[int, int]:
    """Bytes and number of the files below a folder; stops counting above `most` files."""
    size = count = 0
    folders = [folder]
    while folders and count <= most:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    return size, count


def deleted(pid: int) -> int:
    """Bytes of the deleted files that a process holds open."""
    size = 0
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                facts = os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                    size += facts.st_blocks * 512
    return size


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
