"""The judge: published rules of comparison, honest programs of every style pass, dishonest ones gain nothing."""

import decimal
import json
import math
import os
import signal
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.tools.judge import (
    Judge,
    Judgement,
    ProgramTests,
    Verdict,
    output_difference,
    parse_tests,
    value_difference,
)
from elpo_jax.tools.sandbox import InfrastructureError, Limits, Sandbox

QUICK = Limits(cpu_s=1.0, memory_mb=512, output_kb=64, wall_s=1.5)
ADD = ProgramTests(("1 2\n", "30 4\n", "-5 5"), ("3", "34\n", "0"))
JOIN = ProgramTests(('[1, 2]\n"x"', "[]\nnull"), ('[1, 2, "x"]', "[null]"), "join")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def judge(sandbox):
    return Judge(sandbox, QUICK)


# --- comparison


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True),
        ("\n  3  \n\n", "3", True),
        ("3\r\n4\r\n", "3\n4", True),
        ("1 2\n3", "1 2\n\n3", False),
        ("1\n2", "1 2", False),
        ("1 2 3", "1  2\t3", True),  # as numbers
        ("a b", "a  b", False),
        ("3.0 1e2 .5 +7 -0", "3 100 0.50 7. 0", True),
        ("0.1", "0.10000000000000001", False),  # exact, where a float would not see the difference
        ("50000000000000000", "50000000000000001", False),
        ("1.0 a", "1 a", False),  # a line counts as numbers or as text
        ("NaN", "NaN", True),  # as text
        ("nan", "NaN", False),
        ("Infinity 1", "inf 1.0", False),
        ("1_000", "1000", False),
        ("٣", "3", False),
        ("３", "3", False),
        ("0x10", "16", False),
        ("1e3", "1E+3", True),
        ("1e1000000000", "1e1000000000", True),
        ("1e999999999", "1e999999998", False),
        ("1e9999999999999999999", "2e9999999999999999999", False),
        ("YES", "yes", False),
        ("the answer is 3", "3", False),
        ("3 3", "3", False),
        ("", "3", False),
        ("True", "1", False),
    ],
)
def test_outputs_are_compared_line_by_line_as_text_or_exact_numbers(printed, expected, same):
    assert (output_difference(printed, expected) == "") is same
    assert (output_difference(expected, printed) == "") is same


TOKENS = st.sampled_from(["1", "1.0", "01", "10e-1", "2", "-0", "0", "0.0", "a", "A", "1a", ".", "e5", "+1", "9" * 40])
SPACES = st.sampled_from([" ", "  ", "\t", "\n", "\n\n", " \n"])
TEXTS = st.lists(st.tuples(TOKENS, SPACES), max_size=8).map(lambda parts: "".join(map("".join, parts)))


def published(printed, expected):
    """The published rule, for ASCII without infinities and NaN."""

    def decimals(line):
        try:
            return [decimal.Decimal(token) for token in line.split()]
        except decimal.InvalidOperation:
            return None

    lines = [[line.strip() for line in text.strip().split("\n")] for text in (printed, expected)]
    return len(lines[0]) == len(lines[1]) and all(
        a == b or (decimals(a) is not None and decimals(a) == decimals(b)) for a, b in zip(*lines, strict=True)
    )


@settings(max_examples=1000, deadline=None)
@given(TEXTS, TEXTS)
def test_outputs_are_the_same_where_the_published_rule_says_so(printed, expected):
    assert (output_difference(printed, expected) == "") is published(printed, expected)


def test_even_huge_outputs_are_compared_quickly():
    many = "1.0 " * 300_000
    for printed, expected, same in (
        ("9" * 5_000_000 + ".0", "9" * 5_000_000, True),
        ("9" * 5_000_000 + ".1", "9" * 5_000_000, False),
        (many, many.replace(".0", ""), True),
        ("1\n" * 1_000_000, "1\n" * 1_000_000, True),
    ):
        began = time.process_time()
        assert (output_difference(printed, expected) == "") is same
        assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("[1, 2]", "[1,2]", True),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ("1.0", "1", True),
        ("true", "1", True),  # as published: == of Python
        ("null", "0", False),
        ("null", "false", False),
        ('"1"', "1", False),
        ("0.30000000000000004", "0.3", False),
        ("NaN", "NaN", False),
        ("[NaN]", "[NaN]", False),  # nor by identity
        ("Infinity", "Infinity", True),
        ('"caf\\u00e9"', '"café"', True),
        ("9" * 9_000, "9" * 9_000, True),
        ("9" * 9_000, "9" * 8_999 + "8", False),
        ("9" * 60_000, "9" * 60_000, False),
        ("[1, 2] 3", "[1, 2]", False),
        ("[1, 2]\n[1, 2]", "[1, 2]", False),
        ("", "null", False),
        ("[" * 100_000, "[]", False),
        ("[" * 100_000 + "]" * 100_000, "[" * 100_000 + "]" * 100_000, False),
        ("[" + "0," * 500_000 + "0]", "[0]", False),
        ("\ufffd", '"\ufffd"', False),
    ],
)
def test_values_are_compared_as_json(answer, expected, same):
    began = time.process_time()
    assert (value_difference(answer, expected) == "") is same
    assert time.process_time() - began < 1
    assert len(value_difference(answer, expected)) < 300


# --- tests as data


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested"),
        ("[]", "not an object"),
        ("{}", "lists of inputs and outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": "12", "outputs": "34"}, "lists"),
        ({"inputs": [1], "outputs": ["1"]}, "test 0: input and output must be strings"),
        ({"inputs": ["1", "1"], "outputs": ["1", None]}, "test 1: input and output must be strings"),
        ({"inputs": ["1"], "outputs": ["\ud800"]}, "test 0"),
        ({"inputs": ["1", "2"], "outputs": [" ", "\n"]}, "blank"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": ""}, "not a name"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": 3}, "not a name"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f(0)#"}, "not a name"),
        ({"inputs": ["1\n2,"], "outputs": ["1"], "fn_name": "f"}, "test 0"),
        ({"inputs": ["1\n\n2"], "outputs": ["1"], "fn_name": "f"}, "test 0"),
        ({"inputs": [""], "outputs": ["1"], "fn_name": "f"}, "test 0"),
        ({"inputs": ["1"], "outputs": ["one"], "fn_name": "f"}, "test 0"),
        ({"inputs": ["1"], "outputs": [""], "fn_name": "f"}, "test 0"),
        ({"inputs": ["1"], "outputs": ["[" * 100_000], "fn_name": "f"}, "test 0"),
        ({"inputs": ["1"], "outputs": ["9" * 60_000], "fn_name": "f"}, "too long"),
    ],
)
def test_unusable_tests_are_a_data_error_and_never_a_pass(judge, sample, message):
    with pytest.raises(ValueError, match=message):
        parse_tests(sample)
    judgement = judge.judge("print(1)", sample)
    assert judgement.verdict is Verdict.DATA_ERROR and (judgement.passed, judgement.total) == (0, 0)
    assert message in judgement.detail


def test_tests_that_do_not_fit_the_limits_are_a_data_error(sandbox):
    judge = Judge(sandbox, Limits(output_kb=1, stdin_mb=1))
    for tests in (
        ProgramTests(("", ""), ("1", "1" * 1025)),
        ProgramTests(("", "1" * ((1 << 20) + 1)), ("1", "1")),
    ):
        judgement = judge.judge("print(1)", tests)
        assert judgement.verdict is Verdict.DATA_ERROR and (judgement.passed, judgement.total) == (1, 2)


def test_the_published_form_is_read():
    sample = {"inputs": ["1 2"], "outputs": ["3"], "fn_name": None}
    assert parse_tests(sample) == parse_tests(json.dumps(sample)) == ProgramTests(("1 2",), ("3",), None)
    assert parse_tests({"inputs": ("[1]\n2\n",), "outputs": ["3\n"], "fn_name": "f"}).fn_name == "f"


# --- honest programs

# Python 3.11 recurses through C, as a cached function does, as far as the stack goes; later ones have limits of their
# own for it, which nothing can raise.
THROUGH_C = 20_000 if sys.version_info < (3, 12) else 300

STDIO = {
    "input": "a, b = map(int, input().split())\nprint(a + b)",
    "main guard": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "readline": "import sys\ninput = sys.stdin.readline\nprint(sum(map(int, input().split())))",
    "buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "buffer lines": "import sys\nfor line in sys.stdin.buffer:\n    print(sum(map(int, line.split())))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "os.read": "import os\nprint(sum(map(int, os.read(0, 99).split())))",
    "BytesIO": "import io, os, sys\nsys.stdin = io.BytesIO(os.read(0, os.fstat(0).st_size))\n"
    "print(sum(map(int, sys.stdin.readline().split())))",
    "write": "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.read().split()))))",
    "buffered at exit": "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
    "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint(sum(map(int, input().split())))",
    "descriptor 1": "import os\nout = os.fdopen(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
    "detached": "import sys\nout = sys.stdout.detach()\nout.write(str(sum(map(int, input().split()))).encode())",
    "destructor": "class A:\n    def __del__(self):\n        print(sum(map(int, input().split())))\na = A()\na.a = a",
    "os.write": "import os\nos.write(1, str(sum(map(int, input().split()))).encode())",
    "no imports": "d = defaultdict(int)\nfor x in input().split():\n    d['s'] += int(x)\n"
    "print(d['s'] if inf > sqrt(2) else 0)",
    "typing": "def f(x: List[int]) -> Optional[int]:\n    return sum(x)\nprint(f([int(x) for x in input().split()]))",
    "future": "from __future__ import annotations\ndef f(x: Nothing) -> Nobody:\n    return sum(x)\n"
    "print(f(map(int, input().split())))",
    "shadows": "sum_, list, print_ = sum, 3, print\nstr = json = sys = os = 0\nprint(sum_(map(int, input().split())))",
    "float": "print(float(sum(map(int, input().split()))))",
    "exit": "print(sum(map(int, input().split())))\nexit()",
    "exit code": "import sys\nprint(sum(map(int, input().split())))\nsys.exit(1)",
    "os._exit": "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)",
    "stderr": "import sys\nprint('debug ' * 99, file=sys.stderr)\nprint(sum(map(int, input().split())))",
    "numpy": "import numpy as np\nprint(np.array(input().split(), dtype=int).sum())",
    "dataclass": "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n    y: int\n"
    "p = P(*map(int, input().split()))\nprint(p.x + p.y)",
    "thread": "import sys, threading\nsys.setrecursionlimit(1 << 25)\nthreading.stack_size(1 << 27)\n"
    "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
    "def main():\n    assert depth(60_000) == 60_000\n    print(sum(map(int, input().split())))\n"
    "t = threading.Thread(target=main)\nt.start()\nt.join()",
    "recursion": "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
    "assert depth(40_000) == 40_000\nprint(sum(map(int, input().split())))",
    "cached recursion": "@cache\ndef depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
    f"assert depth({THROUGH_C}) == {THROUGH_C}\nprint(sum(map(int, input().split())))",
    "long integers": "assert len(str(10**40_000)) == 40_001\nprint(sum(map(int, input().split())))",
    "unicode": "# ünïcödé 🎈\nπ = 'π'\nprint(sum(map(int, input().split())) if len(π) == 1 else 0)",
    "file": "open('x', 'w').write(input())\nprint(sum(map(int, open('x').read().split())))",
}


@pytest.mark.parametrize("style", STDIO)
def test_programs_that_read_and_print_pass_in_every_style(judge, style):
    assert judge.judge(STDIO[style], ADD) == Judgement(Verdict.PASSED, 3, 3)


CALL = {
    "method": "class Solution:\n    def join(self, a: List[Any], b: Optional[str]) -> List:\n        return a + [b]",
    "function": "def join(a, b):\n    return a + [b]",
    "static": "class Solution:\n    @staticmethod\n    def join(a, b):\n        return a + [b]",
    "function beside a class": "class Solution:\n    pass\ndef join(a, b):\n    return a + [b]",
    "tuple": "def join(a, b):\n    return *a, b",
    "numpy": "import numpy as np\ndef join(a, b):\n    return [np.int64(x) for x in a] + [b]",
    "other numbers": "from fractions import Fraction\nfrom decimal import Decimal\n"
    "def join(a, b):\n    return [Fraction(x) if x % 2 else Decimal(x) for x in a] + [b]",
    "subclasses": "class L(list):\n    pass\nclass S(str):\n    def __repr__(self):\n        return '?'\n"
    "def join(a, b):\n    return L(a + [b and S(b)])",
    "prints": "print('top')\ndef join(a, b):\n    print('debug', a, b)\n    return a + [b]",
    "prints to the descriptor": "import os\ndef join(a, b):\n    os.write(1, b'[0]')\n    return a + [b]",
    "prints a lot": "def join(a, b):\n    for _ in range(2000):\n        print('debug' * 100)\n    return a + [b]",
    "redirects": "import sys, io\nsys.stdout = io.StringIO()\ndef join(a, b):\n    return a + [b]",
    "closes": "import sys\nsys.stdout.close()\nsys.stdin.close()\ndef join(a, b):\n    return a + [b]",
    "shadows": "json = sys = os = print = open = len = str = list = 0\ndumps = write = main = module = value = 1\n"
    "def join(a, b):\n    return a + [b]",
    "breaks json": "import json, os\njson.dumps = os.write = os._exit = None\ndef join(a, b):\n    return a + [b]",
    "main guard": "def join(a, b):\n    return a + [b]\nif __name__ == '__main__':\n    print(join(input(), input()))",
    "future": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P:\n    x: Nothing\ndef join(a: List[P], b) -> P:\n    return P(a + [b]).x",
    "in place": "def join(a, b):\n    a.append(b)\n    return a",
    "threads left": "import threading, time\ndef join(a, b):\n"
    "    threading.Thread(target=time.sleep, args=(60,)).start()\n    return a + [b]",
    "atexit": "import atexit, os\natexit.register(lambda: os.write(1, b'!'))\ndef join(a, b):\n    return a + [b]",
    "helper classes": "class Node:\n    def __init__(self, v):\n        self.v = v\n    def __getattr__(self, name):\n"
    "        return self\nclass Solution:\n    def __getattr__(self, name):\n"
    "        return lambda a, b: Node(a + [b]).v",
    "cache": "class Solution:\n    def join(self, a, b):\n        @cache\n        def f(i):\n"
    f"            return 0 if i == 0 else 1 + f(i - 1)\n        assert f({THROUGH_C}) == {THROUGH_C}\n"
    "        return a + [b]",
}


@pytest.mark.parametrize("style", CALL)
def test_functions_pass_in_every_style(judge, style):
    assert judge.judge(CALL[style], JOIN) == Judgement(Verdict.PASSED, 2, 2)


def test_values_of_every_kind_come_back(judge):
    values = ["café\u2028🎈", 1e300, -0.1, 2**80, True, None, [[], {}], {"a": {"b": [1.5]}}, 5e-324]
    written = [*map(json.dumps, values), "1" + "0" * 6000]
    code = f"values = {values!r} + [10**6000]\ndef f(index):\n    return values[index]"
    tests = ProgramTests(tuple(map(str, range(len(written)))), tuple(written), "f")
    assert judge.judge(code, tests) == Judgement(Verdict.PASSED, 10, 10)


# --- wrong, broken and dishonest ones

BAD = {
    "wrong": ("print(3)", Verdict.WRONG_ANSWER, 1),
    "nothing": ("", Verdict.WRONG_ANSWER, 0),
    "more": ("print(sum(map(int, input().split())))\nprint()\nprint('done')", Verdict.WRONG_ANSWER, 0),
    "to stderr": ("import sys\nprint(sum(map(int, input().split())), file=sys.stderr)", Verdict.WRONG_ANSWER, 0),
    "syntax": ("print((", Verdict.RUNTIME_ERROR, 0),
    "null": ("print(1)\0", Verdict.RUNTIME_ERROR, 0),
    "surrogate": ("print('\ud800')", Verdict.RUNTIME_ERROR, 0),
    "long": ("#" * 300_000, Verdict.RUNTIME_ERROR, 0),
    "exception": ("print(sum(map(int, input().split())))\nraise ValueError('no')", Verdict.RUNTIME_ERROR, 0),
    "no more input": ("input()\ninput()", Verdict.RUNTIME_ERROR, 0),
    "signal": ("import os\nprint(3, flush=True)\nos.abort()", Verdict.RUNTIME_ERROR, 0),
    "endless": ("while True: pass", Verdict.TIME_LIMIT, 0),
    "endless in C": ("print(3, flush=True)\nsum(iter(int, 1))", Verdict.TIME_LIMIT, 0),
    "catches": ("while True:\n    try:\n        while True: pass\n    except: pass", Verdict.TIME_LIMIT, 0),
    "sleeps": ("import time\ntime.sleep(60)", Verdict.TIME_LIMIT, 0),
    "memory": ("x = [0] * 10**9", Verdict.MEMORY_LIMIT, 0),
    "output": ("print('x' * 10**6)", Verdict.OUTPUT_LIMIT, 0),
    "says True": ("print(True)\nprint('passed')", Verdict.WRONG_ANSWER, 0),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_goes_wrong_is_told_apart(judge, kind):
    code, verdict, passed = BAD[kind]
    judgement = judge.judge(code, ADD)
    assert (judgement.verdict, judgement.passed, judgement.total) == (verdict, passed, 3)
    assert judgement.verdict.is_fault and judgement.detail and "\n" not in judgement.detail


CALL_BAD = {
    "wrong": ("def join(a, b):\n    return [1, 2, 'x']", Verdict.WRONG_ANSWER, 1),
    "nothing": ("def join(a, b):\n    pass", Verdict.WRONG_ANSWER, 0),
    "missing": ("def other(a, b):\n    return a + [b]", Verdict.RUNTIME_ERROR, 0),
    "arguments": ("def join(a):\n    return a", Verdict.RUNTIME_ERROR, 0),
    "raises": ("def join(a, b):\n    raise KeyError(a)", Verdict.RUNTIME_ERROR, 0),
    "syntax": ("def join(a, b:\n    return a + [b]", Verdict.RUNTIME_ERROR, 0),
    "set": ("def join(a, b):\n    return {1, 2}", Verdict.WRONG_ANSWER, 0),
    "cycle": ("def join(a, b):\n    a.append(a)\n    return a", Verdict.WRONG_ANSWER, 0),
    "deep": (
        "def join(a, b):\n    for _ in range(10**5):\n        a = [a]\n    return a",
        Verdict.WRONG_ANSWER,
        0,
    ),
    "equals everything": (
        "class E(list):\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef join(a, b):\n    return E()",
        Verdict.WRONG_ANSWER,
        0,
    ),
    "equal object": (
        "class E:\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef join(a, b):\n    return E()",
        Verdict.WRONG_ANSWER,
        0,
    ),
    "lying integer": (
        "class I(int):\n    __repr__ = __str__ = lambda _: '[1, 2, \"x\"]'\ndef join(a, b):\n    return I(3)",
        Verdict.WRONG_ANSWER,
        0,
    ),
    "exits": ("import sys\ndef join(a, b):\n    sys.exit(0)", Verdict.WRONG_ANSWER, 0),
    "exits first": ("raise SystemExit", Verdict.WRONG_ANSWER, 0),
    "writes early": (
        "import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'true')\n    except OSError: pass\nos._exit(0)",
        Verdict.WRONG_ANSWER,
        0,
    ),
    "writes a prefix": (
        "import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'[')\n    except OSError: pass\n"
        "def join(a, b):\n    return a + [b]",
        Verdict.WRONG_ANSWER,
        0,
    ),
    "endless": ("def join(a, b):\n    while True: pass", Verdict.TIME_LIMIT, 0),
    "floods": (
        "import os\ndef join(a, b):\n    return 'x' * 10**6",
        Verdict.OUTPUT_LIMIT,
        0,
    ),
    "memory": ("def join(a, b):\n    return [0] * 10**9", Verdict.MEMORY_LIMIT, 0),
    "generator": ("def join(a, b):\n    yield from a", Verdict.WRONG_ANSWER, 0),
    "nan": ("def join(a, b):\n    return float('nan')", Verdict.WRONG_ANSWER, 0),
    "huge integer": ("def join(a, b):\n    return 10**60_000", Verdict.WRONG_ANSWER, 0),
    "kills itself": ("import os\ndef join(a, b):\n    os.kill(os.getpid(), 9)", Verdict.RUNTIME_ERROR, 0),
}


@pytest.mark.parametrize("kind", CALL_BAD)
def test_what_goes_wrong_in_functions_is_told_apart(judge, kind):
    code, verdict, passed = CALL_BAD[kind]
    judgement = judge.judge(code, JOIN)
    assert (judgement.verdict, judgement.passed, judgement.total) == (verdict, passed, 2)
    assert judgement.detail and "\n" not in judgement.detail


# Looks for a word, which it knows backwards, in all that it can read, and answers with it.
SEEK = """
import gc, os, sys
def seek(word):
    found = []
    def look(data, place):
        if isinstance(data, bytes):
            data = data.decode('latin-1')
        if isinstance(data, str) and word in data:
            found.append(place)
    frame = sys._getframe()
    while frame:
        for scope in (frame.f_locals, frame.f_globals):
            for name, value in list(scope.items()):
                if name not in ('word', 'data', 'scope', 'value'):
                    look(repr(value)[:10**5], f'frame {name}')
        frame = frame.f_back
    for item in gc.get_objects():
        if type(item) is dict:
            for value in list(item.values()):
                if value is not word:
                    look(value, 'gc')
        elif type(item) in (list, tuple):
            for value in item:
                if value is not word:
                    look(value, 'gc')
    for text in [*sys.argv, *os.environ, *os.environ.values(), os.getcwd(), *sys.orig_argv]:
        look(text, 'argv, env')
    for fd in range(64):
        try:
            os.lseek(fd, 0, 0)
        except OSError:
            pass
        if fd in (1, 2):
            continue
        try:
            os.set_blocking(fd, False)
            look(os.read(fd, 10**6), f'fd {fd}')
        except OSError:
            pass
    for folder in ('.', '..', '/tmp', '/proc/self', '/proc/self/fd', '/proc/1', '/proc', '/dev/shm', '/run'):
        try:
            for name in os.listdir(folder):
                look(name, folder)
                path = os.path.join(folder, name)
                if os.path.isfile(path):
                    look(open(path, 'rb').read(10**6), path)
        except OSError:
            pass
    return found
"""


@pytest.mark.parametrize("fn_name", [None, "f"])
def test_the_expected_answer_is_nowhere_in_the_programs_process(sandbox, fn_name):
    """The control: with the word in its input, the same program finds it and passes."""
    judge = Judge(sandbox)
    secret = "xylophone-7719"
    hunt = f"{SEEK}\nword = {secret[::-1]!r}[::-1]\n"
    hunt += "print(word if seek(word) else 'not there')" if fn_name is None else "found = seek(word)\n"
    hunt += "" if fn_name is None else "def f(x):\n    return word if found or word in x else 'not there'"
    quoted = secret if fn_name is None else json.dumps(secret)
    nothing = "nothing" if fn_name is None else '"nothing"'
    hidden = judge.judge(hunt, ProgramTests((nothing,), (quoted,), fn_name))
    assert hidden.verdict is Verdict.WRONG_ANSWER and "not there" in hidden.detail
    assert judge.judge(hunt, ProgramTests((quoted,), (quoted,), fn_name)).verdict is Verdict.PASSED


def test_a_test_knows_nothing_of_the_one_before(judge):
    """A program that answers by counting its own runs would know the order of the tests."""
    code = (
        "import os, tempfile\nmarks = ['mark', os.path.join(tempfile.gettempdir(), 'mark')]\n"
        "print(sum(os.path.exists(m) for m in marks))\n"
        "for m in marks:\n    try: open(m, 'w').write('x')\n    except OSError: pass"
    )
    assert judge.judge(code, ProgramTests(("", "", ""), ("0", "0", "1"))).passed == 2


# --- budget, ours, threads


def test_the_first_failure_ends_it_and_the_budget_is_shared(sandbox):
    spin = "import time\nwhile time.process_time() < 0.4: pass\nprint(1)"
    tests = ProgramTests(("",) * 6, ("1",) * 6)
    spent = Judge(sandbox, QUICK, budget_s=1.0).judge(spin, tests)
    assert spent.verdict is Verdict.TIME_LIMIT and spent.passed == 2 and 0.9 < spent.cpu_s < 1.4
    assert Judge(sandbox, QUICK, budget_s=math.inf).judge(spin, tests).verdict is Verdict.PASSED
    calls = sandbox.counters()["calls"]
    assert Judge(sandbox, QUICK).judge("print(2)", tests).passed == 0
    assert sandbox.counters()["calls"] == calls + 1
    for budget in (0, -1, math.nan):
        with pytest.raises(ValueError, match="budget_s"):
            Judge(sandbox, QUICK, budget_s=budget)


def test_our_failures_are_not_the_programs():
    with Sandbox(workers=1, retries=0) as sandbox:
        judge = Judge(sandbox)
        assert judge.judge(STDIO["input"], ADD).verdict is Verdict.PASSED
        (worker,) = sandbox._live
        timer = threading.Timer(1.0, os.kill, (worker.pid, signal.SIGKILL))
        timer.start()
        judgement = judge.judge("print(3, flush=True)\nwhile True: pass", ADD)
        timer.join()
        assert judgement.verdict is Verdict.SANDBOX_ERROR and not judgement.verdict.is_fault
        assert judgement.detail
        assert judge.judge(STDIO["input"], ADD).verdict is Verdict.PASSED
    with pytest.raises(InfrastructureError):
        judge.judge(STDIO["input"], ADD)


def test_faults_are_those_of_the_program():
    assert {v for v in Verdict if not v.is_fault} == {Verdict.PASSED, Verdict.DATA_ERROR, Verdict.SANDBOX_ERROR}


def test_many_threads_judge_at_once(judge):
    programs = [f"print(sum(map(int, input().split())) + {n % 2})" for n in range(24)]
    judgements = [None] * len(programs)

    def work(first):
        for index in range(first, len(programs), 6):
            judgements[index] = judge.judge(programs[index], ADD)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [judgement.verdict for judgement in judgements] == [Verdict.PASSED, Verdict.WRONG_ANSWER] * 12
