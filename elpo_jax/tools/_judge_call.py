"""What the sandbox runs to judge a call-based program: this file, and a call of `main`, which `judge.py` appends.

The program may do anything to this process, so nothing here decides anything: what it returns is written down, and the
host compares. Care is taken only that a program that means well is not hindered, whatever it prints, names or leaves
running. Standard library only, and nothing newer than Python 3.8, as a remote provider's Python is not ours.
"""

import json
import os
import sys
import types


def main(prelude, code, name):
    """Calls a function with the arguments on standard input, one JSON value a line, and writes its value as JSON.

    Nothing is written where the value has no JSON; the function's own output goes nowhere.

    Args:
      prelude: Source that runs before the program, in the same namespace.
      code: The program, which defines the function or a class Solution with such a method.
      name: The function's.
    """
    arguments = [json.loads(line) for line in sys.stdin.buffer.read().decode().split("\n")]
    dumps, write, leave = json.dumps, os.write, os._exit  # as they are before the program can change them
    answer = os.dup(1)
    os.dup2(_nowhere(), 1)
    module = sys.modules["solution"] = types.ModuleType("solution")  # where dataclasses and the like look for it
    exec(compile(prelude, "<prelude>", "exec", dont_inherit=True), module.__dict__)
    exec(compile(code, "<solution>", "exec", dont_inherit=True), module.__dict__)
    value = _function(module, name)(*arguments)
    try:
        text = dumps(value, default=_number).encode()
    except (TypeError, ValueError, RecursionError):
        text = b""
    while text:
        text = text[write(answer, text) :]
    leave(0)  # without waiting for threads, nor for what the program registered for its end


def _nowhere():
    try:
        return os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return 2


def _function(module, name):
    if "Solution" in module.__dict__:
        solution = module.Solution()
        if hasattr(solution, name):
            return getattr(solution, name)
    return getattr(module, name)


def _number(value):
    """A number of another type, as numpy's, as one that JSON has and that equals it."""
    for kind in (int, float):
        try:
            number = kind(value)
            if number == value:
                return number
        except (TypeError, ValueError, OverflowError):
            continue
    raise TypeError
