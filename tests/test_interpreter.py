"""The code interpreter with real processes: every status, isolation between calls, kills, and nothing left behind."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from elpo_jax.tools.base import InfrastructureError, Status, ToolCall
from elpo_jax.tools.interpreter import MAX_CODE_BYTES, CodeInterpreter
from elpo_jax.tools.toolbox import Request, ToolBox

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def interpreter():
    with CodeInterpreter(workers=1, cpu_seconds=0.4, memory_mb=128, output_chars=200, remembered=0) as interpreter:
        yield interpreter


def run(interpreter, code):
    result, state = interpreter.run({"code": code}, None)
    assert state is None
    return result


def children(pid):
    """Processes whose parent is `pid`, zombies included."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def workers_of(pid):
    return [p for p in children(pid) if b"_interpreter_worker.py" in pathlib.Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.fixture
def own_workers():
    """Returns the worker processes that were started since the test began."""
    before = set(workers_of(os.getpid()))
    return lambda: sorted(set(workers_of(os.getpid())) - before)


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=20):
    """Waits for `condition()` to be true and returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


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
        ("import sys\nprint('to stderr', file=sys.stderr)\nprint('out')", "to stderr\nout"),
        ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(15)", "610"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(3)", "P(x=3)"),
        ("__name__", "'__main__'"),
        ("print('before')\nexit()\nprint('after')", "before"),
        ("from __future__ import annotations\ndef f(x: nothing): pass\nf.__annotations__", "{'x': 'nothing'}"),
        ("import threading\nt = threading.Thread(target=print, args=('t',))\nt.start()\nt.join()", "t"),
    ],
)
def test_output_and_the_value_of_the_last_expression_are_answered(interpreter, code, text):
    result = run(interpreter, code)
    assert (result.status, result.text, result.detail) == (Status.OK, text, "")


@pytest.mark.parametrize("code", ["x = 1", "", "None", "print()", "# nothing", "import os\nos._exit(0)"])
def test_no_output_is_empty(interpreter, code):
    assert run(interpreter, code).status is Status.EMPTY


@pytest.mark.parametrize(
    ("code", "text", "detail"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero", "ZeroDivisionError"),
        ("print('so far')\nundefined", "so far\nNameError: name 'undefined' is not defined", "NameError"),
        ("x = (", "SyntaxError: '(' was never closed (<code>, line 1)", "SyntaxError"),
        ("assert False", "AssertionError", "AssertionError"),
        ("class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd", "Odd", "Odd"),
        ("raise type('a b\\nc', (Exception,), {})", "Exception: c", "Exception"),
        ("import sys\nsys.exit('bad')", "SystemExit: bad", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError: EOF when reading a line", "EOFError"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'", "ModuleNotFoundError"),
        ("import os\nprint('lost')\nos._exit(3)", "Error: the program ended itself (exit 3)", "exit"),
        ("import os\nos.kill(os.getpid(), 9)", "Error: the program ended itself (signal SIGKILL)", "SIGKILL"),
        ("import os\nos.kill(os.getpid(), 40)", "Error: the program ended itself (signal 40)", "40"),
        ("import ctypes\nctypes.string_at(0)", "Error: the program ended itself (signal SIGSEGV)", "SIGSEGV"),
        ("#" * (MAX_CODE_BYTES + 1), f"Error: the program is longer than {MAX_CODE_BYTES} bytes", "too_large"),
    ],
)
def test_errors_end_with_the_last_line_of_the_traceback(interpreter, code, text, detail):
    result = run(interpreter, code)
    assert (result.status, result.text, result.detail) == (Status.ERROR, text, detail)


@pytest.mark.parametrize(
    "code", ["\0", "def f(): return f()\nf()", "(" * 300, "print('\\ud800')", "'x' * 10**5 + 1", "\ud800"]
)
def test_odd_programs_are_short_errors(interpreter, code):
    result = run(interpreter, code)
    assert result.status is Status.ERROR and result.detail.isidentifier() and len(result.text) <= 300


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "sum(iter(int, 1))",  # never returns to the interpreter, so no Python handler could stop it
        "try:\n    while True: pass\nexcept BaseException: pass",
        "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass",
        "print('partial')\nimport time\ntime.sleep(1000)",
    ],
)
def test_endless_programs_time_out(interpreter, code):
    result = run(interpreter, code)
    assert (result.status, result.text) == (Status.TIMEOUT, "Error: the program ran longer than 0.4 s")


@pytest.mark.parametrize(
    ("code", "least", "most"),
    [
        ("while True: pass", 0.1, 1.2),
        # The limit of whole seconds behind the exact timer.
        ("import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass", 1.4, 3),
    ],
)
def test_time_is_cpu_time_of_the_program(monkeypatch, code, least, most):
    monkeypatch.setattr("elpo_jax.tools.interpreter.WALL_FACTOR", 1000)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with CodeInterpreter(workers=1, cpu_seconds=0.2) as interpreter:
        result = run(interpreter, code)
    assert (result.status, result.detail) == (Status.TIMEOUT, "cpu")
    assert least < resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < most


@pytest.mark.parametrize(
    "code", ["[0] * 10**10", "x = []\nwhile True: x.append(bytearray(10**6))", "print('a')\nraise MemoryError"]
)
def test_greedy_programs_run_out_of_memory(interpreter, code):
    result = run(interpreter, code)
    assert (result.status, result.text) == (Status.MEMORY, "Error: the program needs more than 128 MB")


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('ab')",
        "import os\nwhile True: os.write(1, b'ab\\n' * 1000)",
        "print('ab\\n' * 67 + 'c')",  # just over, and the program itself ends well
        "print('ab\\n' * 1000)\n1 / 0",
    ],
)
def test_floods_are_cut(interpreter, code):
    result = run(interpreter, code)
    assert (result.status, result.text) == (Status.OUTPUT_LIMIT, ("ab\n" * 67)[:200] + "\n[output cut]")


def test_an_output_of_exactly_the_limit_is_whole(interpreter):
    for character in "a☃\U0001f409":
        result = run(interpreter, f"print({character!r} * 200)")
        assert (result.status, result.text) == (Status.OK, character * 200)


# --- isolation


def test_nothing_leaks_from_one_program_to_the_next(interpreter):
    run(interpreter, "import builtins, math, os, random, sys\nx = 1\nbuiltins.y = 2\nmath.pi = 3\nsys.argv = ['z']")
    run(interpreter, "import os, sys\nos.environ['W'] = '1'\nos.chdir('/tmp')\nsys.path.append('/tmp')\nprint = None")
    probe = "import builtins, math, os, sys\nprint('x' in dir(), hasattr(builtins, 'y'), round(math.pi, 4))\n"
    probe += "print(sys.argv == ['z'], 'W' in os.environ, os.getcwd(), '/tmp' in sys.path)"
    assert run(interpreter, probe).text == "False False 3.1416\nFalse False / False"


@pytest.mark.parametrize(
    "code",
    [
        "open('{target}', 'w')",
        "open('{target}', 'a').write('x')",
        "import os\nos.remove('{target}')",
        "import os\nos.mkdir('{target}.folder')",
        "import shutil\nshutil.rmtree('{folder}')",
        "import pathlib\npathlib.Path('{target}').rename('{target}.2')",
        "import os\nos.fork()",
        "import os\nos.system('touch {target}.3')",
        "import subprocess\nsubprocess.run(['touch', '{target}.4'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(0, 9)",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_accidents_stay_inside(interpreter, tmp_path, code):
    """Not a security boundary, but ordinary Python code cannot touch files, processes or the network."""
    target = tmp_path / "kept"
    target.write_text("precious")
    result = run(interpreter, code.format(target=target, folder=tmp_path))
    assert (result.status, result.detail) == (Status.ERROR, "PermissionError")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and target.read_text() == "precious"


def test_the_environment_is_clean(interpreter, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with CodeInterpreter(workers=1) as fresh:
        names = run(fresh, "import os\nprint(sorted(os.environ))").text
    assert "SECRET_TOKEN" not in names and "HOME" not in names


def test_programs_are_deterministic():
    code = "import random\nprint(random.random(), hash('a'), {'b', 'a', 'c'}, print, lambda: 0, object())"
    texts = set()
    for _ in range(2):
        with CodeInterpreter(workers=1, remembered=0) as interpreter:
            run(interpreter, "x = [object() for _ in range(5000)]\nimport random\nrandom.seed()")
            texts |= {run(interpreter, code).text, run(interpreter, code).text}
    (text,) = texts
    assert "<object object at 0x0>" in text
    with CodeInterpreter(workers=1) as interpreter:
        assert run(interpreter, "print('at 0x7f0011223344 is data')").text == "at 0x7f0011223344 is data"


# --- memory of answers


def test_answers_are_remembered_up_to_a_bound_and_only_if_they_are_certain():
    clock = "import time\nprint(time.time_ns())"
    with CodeInterpreter(workers=1, cpu_seconds=0.3, remembered=2) as interpreter:
        first = run(interpreter, clock)
        assert run(interpreter, clock) is first
        run(interpreter, "1")
        assert run(interpreter, clock) is first  # used last, so "1" is the one to go
        run(interpreter, "2")
        assert run(interpreter, clock) is first
        run(interpreter, "3")
        run(interpreter, "4")
        assert run(interpreter, clock) != first
        for code, status in (("while True: pass", Status.TIMEOUT), ("raise MemoryError", Status.MEMORY)):
            assert run(interpreter, code) is not (again := run(interpreter, code)) and again.status is status
    with CodeInterpreter(workers=1, remembered=0) as interpreter:
        assert run(interpreter, clock) != run(interpreter, clock)


# --- machinery


def test_many_calls_at_once_get_their_own_answers_and_leave_nothing_behind(own_workers):
    requests = [Request(ToolCall("code_interpreter", {"code": f"print({n} * 2)"})) for n in range(150)]
    before = len(os.listdir("/proc/self/fd"))
    with CodeInterpreter(workers=3, remembered=0) as interpreter, ToolBox([interpreter], workers=6) as box:
        assert [result.text for result, _ in box.run_many(requests)] == [str(2 * n) for n in range(150)]
        workers = own_workers()
        assert 1 <= len(workers) <= 3
        until(lambda: not any(children(worker) for worker in workers))  # the last are buried after their answer
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(is_running(worker) for worker in workers)


def test_a_killed_worker_is_replaced_and_the_call_answered_after_a_retry(own_workers):
    slow = "n = 0\nwhile n < 6_000_000: n += 1\nprint(n)"
    with CodeInterpreter(workers=1, remembered=0) as interpreter, ToolBox([interpreter], workers=1) as box:
        answer = box.submit(Request(ToolCall("code_interpreter", {"code": slow})))
        (worker,) = until(own_workers)
        (child,) = until(lambda: children(worker))
        os.kill(worker, signal.SIGKILL)
        result, _ = answer.result(timeout=60)
        assert (result.status, result.text) == (Status.OK, "6000000")
        until(lambda: not is_running(child))  # the orphaned program did not go on
        assert own_workers() not in ([], [worker])


def test_a_worker_that_keeps_dying_is_infrastructure_never_the_model(monkeypatch):
    monkeypatch.setattr("elpo_jax.tools.interpreter._WORKER", ROOT / "no_such_worker.py")
    with CodeInterpreter(workers=1) as interpreter, ToolBox([interpreter]) as box:
        with pytest.raises(InfrastructureError, match="worker of the code interpreter died"):
            run(interpreter, "1")
        ((result, _),) = box.run_many([Request(ToolCall("code_interpreter", {"code": "1"}))])
    assert result.status is Status.INFRASTRUCTURE and "InfrastructureError" in result.detail


def test_a_stuck_worker_is_given_up(own_workers, monkeypatch):
    monkeypatch.setattr("elpo_jax.tools.interpreter.REPLY_SECONDS", 0.5)
    with CodeInterpreter(workers=1, cpu_seconds=0.1, remembered=0) as interpreter:
        until(lambda: answered(interpreter))  # started, however slowly
        (worker,) = own_workers()
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(InfrastructureError, match="no answer in time"):
            run(interpreter, "1")
        assert not is_running(worker)
        assert until(lambda: answered(interpreter)) == "1"


def answered(interpreter):
    try:
        return run(interpreter, "1").text
    except InfrastructureError:
        return None


def test_closing_ends_calls_under_way_and_refuses_later_ones(own_workers):
    interpreter = CodeInterpreter(workers=1, cpu_seconds=30, remembered=0)
    with ToolBox([interpreter], workers=1, retries=0) as box:
        answer = box.submit(Request(ToolCall("code_interpreter", {"code": "while True: pass"})))
        (worker,) = until(own_workers)
        (child,) = until(lambda: children(worker))
        interpreter.close()
        interpreter.close()
        assert answer.result(timeout=20)[0].status is Status.INFRASTRUCTURE
    until(lambda: not is_running(child) and not is_running(worker))
    with pytest.raises(InfrastructureError, match="closed"):
        run(interpreter, "1")


@pytest.mark.parametrize("end", ["exit", "kill", "kill all but the program"])
def test_the_end_of_the_parent_leaves_no_process(end):
    """Whether it ends without closing its interpreter, or is killed while a program runs, alone or with the worker."""
    script = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
from elpo_jax.tools.interpreter import CodeInterpreter
interpreter = CodeInterpreter(workers=1, cpu_seconds=60)
interpreter.run({{"code": "1"}}, None)
print("ready", flush=True)
threading.Thread(target=interpreter.run, args=({{"code": "while True: pass"}}, None), daemon=True).start()
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        (worker,) = until(lambda: workers_of(parent.pid))
        (child,) = until(lambda: children(worker))
        if end == "exit":
            parent.stdin.close()
        else:
            os.kill(parent.pid, signal.SIGSTOP)  # it shall not clean up after its worker
            if end != "kill":
                os.kill(worker, signal.SIGKILL)
            parent.kill()
        parent.wait(timeout=20)
        until(lambda: not is_running(worker) and not is_running(child))
        assert parent.returncode == (0 if end == "exit" else -signal.SIGKILL)


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"cpu_seconds": 0}, {"memory_mb": 8}, {"output_chars": 0}, {"remembered": -1}],
)
def test_senseless_limits_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CodeInterpreter(**options)
