"""The scratch folder where no file system of its own limits and empties it."""

import contextlib
import os
import stat


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
    while True:
        with os.scandir(folder) as entries:
            found = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        if not found:
            return
        for path, is_folder in found:
            if not is_folder:
                os.unlink(path)
                continue
            if stat.S_IMODE(os.lstat(path).st_mode) != 0o700:
                os.chmod(path, 0o700)
            with os.scandir(path) as entries:
                children = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, child_is_folder in children:
                if child_is_folder:
                    os.chmod(child, 0o700)
                    os.rename(child, f"{folder}/.{os.urandom(8).hex()}")
                else:
                    os.unlink(child)
            os.rmdir(path)


def remove(folder: str) -> None:
    """Removes the folder as well, if it is there."""
    with contextlib.suppress(OSError):
        empty(folder)
        os.rmdir(folder)
