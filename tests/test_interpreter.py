"""The code interpreter on the real sandbox: what a program is answered, in every status, and what is remembered."""

import os
import random

import pytest

from elpo_jax.text.tokenizer import ByteTokenizer
from elpo_jax.tools.base import InfrastructureError, Status, ToolCall
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.observation import LEAST_LIMIT, MARKER
from elpo_jax.tools.sandbox import Limits, Sandbox
from elpo_jax.tools.toolbox import Request, ToolBox

LIMITS = Limits(cpu_s=0.4, memory_mb=128, output_kb=16, code_kb=64)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def interpreter(sandbox):
    return CodeInterpreter(sandbox, traceback="last_line", output_chars=200, remembered=0)


@pytest.fixture(scope="module")
def recipe(sandbox):
    return CodeInterpreter(sandbox, reference=True, remembered=0)


def run(interpreter, code):
    result, state = interpreter.run({"code": code}, None)
    assert state is None and (result.stdout, result.stderr) == ("", "")
    return result


# --- what a program is answered


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print(1 + 1)", "2"),
        ("1 + 1", "2"),
        ("x = 20\nx * 2 + 2", "42"),
        ("print('a')\n'b'", "a\n'b'"),
        ("print('a')  # no None after it", "a"),
        ("for i in range(2):\n    print(i)", "0\n1"),
        ("if True:\n    'an expression inside a block is not printed'\nprint('é☃')", "é☃"),
        ("import sys\nprint('to stderr', file=sys.stderr)\nprint('out')", "out\nto stderr"),
        ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(15)", "610"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(3)", "P(x=3)"),
        ("__name__", "'__main__'"),
        ("print('before')\nexit()\nprint('after')", "before"),
        ("from __future__ import annotations\ndef f(x: nothing): pass\nf.__annotations__", "{'x': 'nothing'}"),
        ("import threading\nt = threading.Thread(target=print, args=('t',))\nt.start()\nt.join()", "t"),
        ("import sympy\nsympy.factor(sympy.Symbol('x')**2 - 1)", "(x - 1)*(x + 1)"),
        ("import numpy as np\nint(np.arange(3) @ np.arange(3))", "5"),
        ("print('\\n\\n  a\\n\\n')", "\n\n  a"),
    ],
)
def test_output_and_the_value_of_the_last_expression_are_answered(interpreter, code, text):
    result = run(interpreter, code)
    assert (result.status, result.text, result.detail, result.truncated) == (Status.OK, text, "", False)


@pytest.mark.parametrize(
    "code", ["x = 1", "None", "print()", "# nothing", "import os\nos._exit(0)", "print(' \\t\\n ')"]
)
def test_no_output_is_empty(interpreter, code):
    result = run(interpreter, code)
    assert (result.status, result.text, result.null_output) == (Status.EMPTY, "(no output)", True)


@pytest.mark.parametrize("code", ["", "\n", " \t\r\n\f", "\u3000"])
def test_a_call_without_a_program_is_malformed(interpreter, code):
    result = run(interpreter, code)
    assert (result.status, result.text, result.detail) == (
        Status.MALFORMED,
        "Error: the program is empty.",
        "empty_code",
    )


@pytest.mark.parametrize(
    ("code", "text", "detail"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero", "ZeroDivisionError"),
        ("print('so far')\nundefined", "so far\nNameError: name 'undefined' is not defined", "NameError"),
        ("x = (", "SyntaxError: '(' was never closed (<code>, line 1)", "SyntaxError"),
        ("assert False", "AssertionError", "AssertionError"),
        (
            "class Odd(Exception):\n    __str__ = None\nraise Odd",
            "Odd: <exception str() failed>",
            "Odd",
        ),
        ("import sys\nsys.exit('bad')", "bad\nError: the program ended itself (exit 1)", "exit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError: EOF when reading a line", "EOFError"),
        ("import jax", "ModuleNotFoundError: No module named 'jax'", "ModuleNotFoundError"),
        ("import os\nprint('lost')\nos._exit(3)", "Error: the program ended itself (exit 3)", "exit"),
        ("import os\nos.close(2)\nprint('a')\n1 / 0", "a\nZeroDivisionError", "ZeroDivisionError"),
        ("#" * (64 * 1024 + 1), "Error: the program is longer than 64 KiB", "too_large"),
    ],
)
def test_errors_end_with_the_last_line_of_the_traceback(interpreter, code, text, detail):
    result = run(interpreter, code)
    assert (result.status, result.text, result.detail) == (Status.ERROR, text, detail)


def test_errors_show_where_in_the_program_they_arose(sandbox):
    program = "import statistics\ndef f(x):\n    return statistics.mean(x)\nprint('so far')\nf([])"
    result = run(CodeInterpreter(sandbox), program)
    lines = ["so far", "Traceback (most recent call last):", '  File "<code>", line 5, in <module>', "    f([])"]
    lines += ['  File "<code>", line 3, in f', "    return statistics.mean(x)"]
    lines += ["statistics.StatisticsError: mean requires at least one data point"]
    assert (result.status, result.text.split("\n"), result.exc_type) == (Status.ERROR, lines, "StatisticsError")


@pytest.mark.parametrize(
    "code", ["\0", "def f(): return f()\nf()", "(" * 300, "print('\\ud800')", "'x' * 10**5 + 1", "\ud800"]
)
def test_odd_programs_are_short_errors(interpreter, code):
    result = run(interpreter, code)
    assert result.status is Status.ERROR and result.detail.isidentifier() and len(result.text) <= 200


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import os\nprint('seen', flush=True)\nos.abort()", "SIGABRT"),
        ("import os\nprint('seen', flush=True)\nos.kill(os.getpid(), 9)", "SIGKILL"),
        ("import ctypes\nprint('seen', flush=True)\nctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_a_crash_names_the_signal(interpreter, code, name):
    result = run(interpreter, code)
    assert (result.status, result.detail) == (Status.CRASH, name)
    assert result.text == f"seen\nError: the program ended itself (signal {name})"


@pytest.mark.parametrize(
    ("code", "text", "detail"),
    [
        ("print('partial', flush=True)\nwhile True: pass", "ran longer than 0.4 s (CPU time)", "cpu"),
        ("try:\n    while True: pass\nexcept BaseException: pass", "ran longer than 0.4 s (CPU time)", "cpu"),
        ("print('partial', flush=True)\nimport time\ntime.sleep(1000)", "took longer than 1.6 s", "wall"),
    ],
)
def test_endless_programs_time_out(interpreter, code, text, detail):
    result = run(interpreter, code)
    assert (result.status, result.text, result.detail) == (Status.TIMEOUT, f"Error: the program {text}", detail)


@pytest.mark.parametrize("code", ["[0] * 10**10", "x = []\nwhile True: x.append(bytearray(10**6))"])
def test_greedy_programs_run_out_of_memory(interpreter, code):
    result = run(interpreter, code)
    assert (result.status, result.text) == (Status.MEMORY, "Error: the program needs more than 128 MB")


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('ab')",
        "import os\nwhile True: os.write(1, b'ab\\n' * 1000)",
        "import sys\nprint('lost?', file=sys.stderr)\nwhile True: print('ab')",
        "import sys\nprint('lost?')\nwhile True: sys.stderr.write('ab\\n')",
    ],
)
def test_a_flood_is_stopped_and_shown_in_part(interpreter, code):
    texts = {run(interpreter, code).text for _ in range(3)}
    (text,) = texts
    result = run(interpreter, code)
    assert result.status is Status.OUTPUT_LIMIT and result.truncated and len(text) <= 200
    assert text.startswith("ab\nab\n") and MARKER in text
    assert text.endswith("\nab\na\nError: the program printed more than 16 KiB")


@pytest.mark.parametrize("character", "a☃\U0001f409")
def test_a_longer_output_loses_its_middle(interpreter, sandbox, character):
    result = run(interpreter, f"print({character!r} * 200)")
    assert (result.status, result.text, result.truncated) == (Status.OK, character * 200, False)
    result = run(interpreter, f"print({character!r} * 201)")
    assert (result.status, result.text, result.truncated) == (Status.OK, character * 89 + MARKER + character * 89, True)
    tokens = CodeInterpreter(sandbox, tokenizer=ByteTokenizer(), output_tokens=100, output_chars=1000, remembered=0)
    room = (100 - len(MARKER)) // 2 // len(character.encode()) * character
    assert run(tokens, f"print({character!r} * 201)").text == room + MARKER + room
    result = run(interpreter, "print('ab\\n' * 1000)\n1 / 0")
    assert result.status is Status.ERROR and result.truncated and len(result.text) == 200
    assert result.text.endswith("\nab\nZeroDivisionError: division by zero")


def test_programs_repeat_their_answers(sandbox):
    code = "import random\nimport numpy as np\n"
    code += "print(random.random(), np.random.rand(), hash('a'), {'b', 'a', 'c'}, print, lambda: 0, object())"
    interpreter = CodeInterpreter(sandbox, remembered=0)
    run(interpreter, "x = [object() for _ in range(5000)]\nimport random\nrandom.seed()")
    texts = {run(interpreter, code).text for _ in range(4)}
    with Sandbox(1, LIMITS) as other:
        texts.add(run(CodeInterpreter(other), code).text)
    (text,) = texts
    assert "<object object at 0x0>" in text


# --- the reference recipe


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("x = 3\nx * 2", Status.OK, "6\n"),
        ("print(1)", Status.OK, "1\n"),
        ("```python\n2 + 2\n```", Status.OK, "4\n"),
        ("print", Status.EMPTY, ""),
        ("", Status.EMPTY, ""),
        ("None", Status.OK, "None\n"),
        ("print('x' * 300)", Status.OK, "x" * 128 + "...(truncated)..." + "x" * 127 + "\n"),
        ("import time\nprint(time.sleep(100))", Status.TIMEOUT, "no stdout here"),
        ("print([0] * 10**10)", Status.MEMORY, "no stdout here"),
    ],
)
def test_the_reference_recipe_answers_as_it_does(recipe, code, status, text):
    result = run(recipe, code)
    assert (result.status, result.text) == (status, text)


@pytest.mark.parametrize(
    "code",
    [
        "for i in range(3):\n    print(i)",
        "x = 1\nif x:\n    x += 1",
        "def f():\n    return 5",
        "x = 5\nx += 1",
        "5\n# This gives us the answer",
        "x = 5\nassert x == 5",
        "import math",
    ],
)
def test_what_the_reference_recipe_breaks_is_whole_here(recipe, interpreter, code):
    broken = run(recipe, code)
    assert broken.status is Status.ERROR and broken.exc_type in ("SyntaxError", "IndentationError")
    assert "print(" in broken.text and "Error: " in broken.text
    assert run(interpreter, code).status in (Status.OK, Status.EMPTY)


def test_the_reference_recipe_has_its_own_description(recipe, interpreter):
    assert recipe.description == "A tool for executing code."
    assert interpreter.description == CodeInterpreter.description != recipe.description
    assert recipe.name == interpreter.name == "code_interpreter" and recipe.parameters == interpreter.parameters


# --- memory of answers


@pytest.mark.parametrize("reference", [False, True])
def test_answers_are_remembered_up_to_a_bound_and_only_if_they_are_certain(sandbox, reference):
    clock = "import time\nprint(time.time_ns())"
    interpreter = CodeInterpreter(sandbox, remembered=2, reference=reference)
    first = run(interpreter, clock)
    assert run(interpreter, clock) is first
    run(interpreter, "1")
    assert run(interpreter, clock) is first  # used last, so "1" is the one to go
    run(interpreter, "2")
    assert run(interpreter, clock) is first
    run(interpreter, "3")
    run(interpreter, "4")
    assert run(interpreter, clock) != first
    for code, status in (
        ("while True: pass\nprint()", Status.TIMEOUT),
        ("print([0] * 10**10)", Status.MEMORY),
        ("while True: print(1)\nprint()", Status.OUTPUT_LIMIT),
        ("import os\nprint(os.abort())", Status.CRASH),
        ("#" * 2**17, Status.ERROR),
    ):
        assert run(interpreter, code) is not (again := run(interpreter, code)) and again.status is status
    forgetful = CodeInterpreter(sandbox, remembered=0, reference=reference)
    assert run(forgetful, clock) != run(forgetful, clock)


def test_what_is_remembered_is_small(sandbox):
    interpreter = CodeInterpreter(sandbox)
    code = "print('x' * 16_000)  " + "#" * 30_000
    result = run(interpreter, code)
    assert run(interpreter, code) is result and len(result.text) <= 1000
    assert max(len(key) for key in interpreter._answers) <= 64
    assert result.out_bytes == 16_001 and result.cpu_s > 0 and result.backend == sandbox.backend


# --- machinery


def test_many_calls_at_once_get_their_own_answers_and_leave_nothing_behind():
    codes = [f"print({n % 75} * 2)" for n in range(300)]
    random.Random(0).shuffle(codes)
    requests = [Request(ToolCall("code_interpreter", {"code": code})) for code in codes]
    before = len(os.listdir("/proc/self/fd"))
    with Sandbox(2, LIMITS) as sandbox:
        interpreter = CodeInterpreter(sandbox)
        with ToolBox([interpreter], workers=6) as box:
            answers = box.run_many(requests)
        assert [result.text for result, _ in answers] == [str(int(code[6:-5]) * 2) for code in codes]
        assert 75 <= sandbox.counters()["calls"] < 300  # the rest were remembered
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interpreter_closes_only_a_sandbox_of_its_own(sandbox):
    with CodeInterpreter(sandbox) as guest:
        assert run(guest, "1").text == "1"
    assert sandbox.run("print(2)").stdout == "2\n"
    with CodeInterpreter() as owner, ToolBox([owner], retries=0) as box:
        assert run(owner, "1").text == "1"
        owner.close()
        owner.close()
        with pytest.raises(InfrastructureError, match="closed"):
            run(owner, "2")
        request = Request(ToolCall("code_interpreter", {"code": "3"}))
        assert box.submit(request).result()[0].status is Status.SANDBOX_ERROR
        assert run(owner, "1").text == "1"  # remembered


def test_limits_may_be_narrower_than_the_sandboxs(sandbox):
    narrow = CodeInterpreter(sandbox, limits=Limits(cpu_s=0.1, memory_mb=64))
    assert run(narrow, "while True: pass").text == "Error: the program ran longer than 0.1 s (CPU time)"
    assert run(narrow, "[0] * 10**10").text == "Error: the program needs more than 64 MB"


@pytest.mark.parametrize(
    "options",
    [
        {"output_chars": LEAST_LIMIT - 1},
        {"output_tokens": LEAST_LIMIT - 1},
        {"remembered": -1},
        {"traceback": "all"},
    ],
)
def test_senseless_arguments_are_refused(sandbox, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CodeInterpreter(sandbox, **options)
