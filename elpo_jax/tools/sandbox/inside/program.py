"""Runs one program in the process made for it, as `python file.py` would, and ends that process.

All of this is in the program's reach: it may replace, patch or lie to whatever it finds here. So nothing here decides
anything: how the program ended, what it used and printed is seen from outside.
"""

import ast
import atexit
import contextlib
import gc
import io
import linecache
import os
import sys
import threading
import traceback
import types
from typing import NoReturn

NAME = "<code>"
LINE = 300  # characters of a line of a traceback, which may hold a program of one line
LINES = 100  # of a traceback, which may be of a recursion through several functions


def main(code: bytes, mode: str, report: int) -> NoReturn:
    """Runs `code` and exits with its exit code.

    Args:
      code: UTF-8, or not.
      mode: "script", or "notebook" to print the value of a final expression.
      report: Descriptor for the name of the exception that ended it, on a line, and a second line "memory" if it was
        one of the kind MemoryError.
    """
    leave = os._exit
    status = 0
    try:
        status = _run(code, mode)
    except BaseException as error:
        _report(report, error)
        status = 1
        _print(error)
    try:
        if not _finish():
            status = status or 120  # as CPython has it
    except BaseException:
        status = status or 1
    leave(status)


def _finish() -> bool:
    """What an interpreter does at its end: waits for threads, and writes what is still in the buffers of any file.

    Returns:
      Whether it could.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    flushed = _flush(sys.stdout, sys.stderr)
    threading.excepthook = lambda *_: None  # of threads that go on without their names
    module = sys.modules.get("__main__")
    if isinstance(module, types.ModuleType):
        module.__dict__.clear()
    gc.collect()
    return _flush(sys.__stdout__, sys.__stderr__) and flushed


def _flush(*streams: object) -> bool:
    """Whether all that was written could be."""
    done = True
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            done = False
        except Exception:  # closed, detached, or no stream at all
            continue
    return done


def _run(code: bytes, mode: str) -> int:
    """The program's exit code, if no exception ends it."""
    text = code.decode("utf-8", "surrogatepass")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    linecache.cache[NAME] = (len(text), None, io.StringIO(text).readlines(), NAME)  # for tracebacks and inspect
    try:
        if mode == "notebook":
            _run_notebook(text, module.__dict__)
        else:
            exec(compile(text, NAME, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            code = stop.code or 0
            return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF  # as CPython does
        print(stop.code, file=sys.stderr)
        return 1
    return 0


def _run_notebook(text: str, scope: dict) -> None:
    tree = ast.parse(text, NAME)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or _is_print(last.value):
        exec(compile(tree, NAME, "exec", dont_inherit=True), scope)
        return
    tree.body.pop()
    exec(compile(tree, NAME, "exec", dont_inherit=True), scope)
    value = eval(compile(ast.Expression(last.value), NAME, "eval", dont_inherit=True), scope)
    if value is not None:
        print(repr(value))


def _is_print(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print"


def _name(error: BaseException) -> str:
    try:
        return f"{type(error).__name__[:64]}"
    except BaseException:  # a class can be anything
        return "Exception"


def _report(report: int, error: BaseException) -> None:
    memory = "memory\n" if issubclass(type(error), MemoryError) else ""
    os.write(report, f"{_name(error)}\n{memory}".encode("utf-8", "replace"))


def _print(error: BaseException) -> None:
    """The traceback on stderr, from the program's own first frame on."""
    try:
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename != NAME:
            frame = frame.tb_next
        lines = "".join(traceback.format_exception(type(error), error, frame)).splitlines()
        if len(lines) > LINES:
            lines[LINES // 2 : -LINES // 2] = ["  [... lines cut ...]"]
        if sys.stderr is not None:
            for line in lines:
                print(line if len(line) <= LINE else f"{line[:LINE]}...", file=sys.stderr)
    except BaseException:  # the program's own __str__, or no memory left
        with contextlib.suppress(OSError):
            os.write(2, f"{_name(error)}\n".encode("utf-8", "replace"))
