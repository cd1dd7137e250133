"""What a run writes down: metrics as JSON lines, and small JSON files that are replaced in one move.

A row that was written is never rewritten while the run goes on; a run that is resumed from step s first drops every
row after s, so that the file reads as if nothing had happened. Numbers that JSON cannot hold (NaN and the infinities)
become null. A process that is killed can leave one torn line, at the end, and every reader and writer here expects it.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """`value` as JSON can hold it.

    Args:
      value: A scalar of Python, numpy or jax (0-d), None, a string, or dicts, lists and tuples of such.

    Returns:
      The same with every number as int or float, non-finite ones as None, and tuples as lists.

    Raises:
      TypeError: If there is anything else in it, such as an array of more than one number.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return finite(value.item())
    raise TypeError(f"cannot write {type(value).__name__} as JSON: reduce it to a number or turn it into a list first")


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file at `path` in one move, and makes its folder if there is none.

    A reader sees the old text or the new one, never a part. A kill can leave a ".NAME-partial" beside it, which the
    next write takes over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name.replace('.', '-')}-partial")  # found by no pattern that finds the file
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON. Raises TypeError for what `finite` does not accept."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value that `write_json` wrote.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or delete it to have it written again") from None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; none where there is no file. A torn last line is left out.

    Raises:
      ValueError: If a line before the last one is not a JSON object: the file was damaged by something else.
    """
    return [row for row, _ in _rows(Path(path))]


class MetricsLog:
    """A metrics file open for appending: one JSON object a line, each with an integer "step"."""

    def __init__(self, path: str | Path, always: Mapping[str, Any] | None = None):
        """Opens `path`, makes its folder, and cuts off a line that a kill left unfinished.

        Args:
          path: The file.
          always: Scalars that are added to every row.
        """
        self._always = dict(always or {})
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._open(_end_of_whole_lines(self._path))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and hands it to the operating system, so that it outlives this process.

        Args:
          row: "step" (int) and numbers, strings or None by name; see `finite`.

        Raises:
          ValueError: If "step" is missing or not an integer.
          TypeError: If a value is not a scalar.
        """
        row = finite({**row, **self._always})
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f'a metrics row needs an integer "step", got {step!r}')
        self._file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> None:
        """Forces the rows to the disk: called before a checkpoint counts as saved, so that none of its rows is lost."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drops every row with a step greater than `step` (a resumed run is about to write them again)."""
        kept = [line for row, line in _rows(self._path) if row["step"] <= step]
        self._file.close()
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._open(self._path.stat().st_size)

    def close(self) -> None:
        """Syncs and closes the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _open(self, size: int) -> None:
        self._file = self._path.open("ab")
        self._file.truncate(size)


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Every whole row with the line it came from."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or torn
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number} is not a metrics row: remove that line to go on without it")
        rows.append((row, line.decode()))
    return rows


def _end_of_whole_lines(path: Path) -> int:
    """Size in bytes of the file without a torn last line."""
    return path.read_bytes().rfind(b"\n") + 1


def _sync_directory(path: Path) -> None:
    """Makes a rename in the folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
