"""Judges programs by the rules of LiveCodeBench: each test is a standard input and what must be printed, or the
arguments of a function and what it must return.

Every test is a fresh run in the sandbox, and the expected answer never goes there: this process compares. So a program
can lie about what it computed, but it cannot know what would be right. Against the published checker, on purpose:

- Programs see a real standard input, and what they patch, define or leave running has no effect on the comparison.
- A token is a number if it is an ASCII numeral; NaN, infinities, "1_000" and other digits are text.
- What a function returns is compared as JSON, so tuples equal lists at any depth and the keys of a dict are text.
  Otherwise `==` decides as published: True equals 1, and floats must be equal exactly.
- Time is CPU time, and a submission has a budget of it for all its tests together.

As published: what a program printed counts, not its exit code, if no exception ended it; the names of eighteen modules
are there without an import; a program has lost at its first failure.
"""

import dataclasses
import decimal
import enum
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from elpo_jax.tools.base import Status, ToolResult
from elpo_jax.tools.sandbox import Limits, Sandbox

# Six CPU seconds per test are LiveCodeBench's. Address space is generous, as programs reserve big thread stacks.
LIMITS = Limits(cpu_s=6.0, memory_mb=2048, output_kb=8192)
BUDGET_S = 120.0
DIGITS = 50_000  # of the longest integer, here as in the program
SHOWN = 100  # characters of an answer in a judgement's detail

_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing"
)
_PRELUDE = "\n".join([*(f"from {name} import *" for name in _MODULES.split()), f"import {', '.join(_MODULES.split())}"])
_SETUP = f"""
import sys
sys.setrecursionlimit(50_000)
if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits({DIGITS})
"""
_CALL = pathlib.Path(__file__).with_name("_judge_call.py").read_text(encoding="utf-8")
_NUMERAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,9})?")


class Verdict(enum.StrEnum):
    """What was found. The set is closed."""

    PASSED = "passed"  # every test
    WRONG_ANSWER = "wrong_answer"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    RUNTIME_ERROR = "runtime_error"  # an exception, a signal, a program that does not compile or lacks the function
    DATA_ERROR = "data_error"  # the tests are unusable
    SANDBOX_ERROR = "sandbox_error"  # our machinery broke

    @property
    def is_fault(self) -> bool:
        """True where the program failed; neither `is_fault` nor `PASSED` means that nothing is known of it."""
        return self not in (Verdict.PASSED, Verdict.DATA_ERROR, Verdict.SANDBOX_ERROR)


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one submission.

    Attributes:
      verdict: Of the first test that was not passed, or `PASSED`.
      passed: Tests that were passed, in order, so also the index of the one that was not.
      total: Number of tests; 0 where they are unusable.
      detail: What went wrong, in a line. It may quote the expected answer: not for the model.
      cpu_s: CPU seconds of all runs.
    """

    verdict: Verdict
    passed: int
    total: int
    detail: str = ""
    cpu_s: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramTests:
    """The tests of one problem.

    Attributes:
      inputs: Standard inputs or, with `fn_name`, arguments: one JSON value per line.
      outputs: What must be printed or, with `fn_name`, returned, as one JSON value.
      fn_name: Name of the function, or of the method of a class Solution; None for programs that read and print.

    Raises:
      ValueError: If there is no test, a program that prints nothing would pass all of them, or something is not text,
        has no counterpart or is not JSON where it should be.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fn_name: str | None = None

    def __post_init__(self):
        if not self.inputs or len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs")
        for index, (given, expected) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if not isinstance(given, str) or not isinstance(expected, str):
                raise ValueError(f"test {index}: input and output must be strings")
            try:
                (given + expected).encode()
                for text in [*_argument_lines(given), expected] if self.fn_name is not None else ():
                    _decoded(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"test {index}: {error}") from None
        if self.fn_name is None:
            if not any(expected.strip() for expected in self.outputs):
                raise ValueError("every expected output is blank")
        elif not isinstance(self.fn_name, str) or not self.fn_name.isidentifier():
            raise ValueError(f"fn_name={self.fn_name!r} is not a name")


def parse_tests(sample: str | Mapping[str, Any]) -> ProgramTests:
    """Tests from the form in which LiveCodeBench hands them to its checker.

    Args:
      sample: {"inputs": [...], "outputs": [...], "fn_name": null or a name}, or such an object as JSON. `fn_name` may
        be missing.

    Raises:
      ValueError: If it is anything else, or the tests are unusable (see `ProgramTests`).
    """
    if isinstance(sample, str):
        try:
            sample = json.loads(sample)
        except RecursionError:
            raise ValueError("the tests are nested too deeply") from None
    if not isinstance(sample, Mapping):
        raise ValueError("the tests are not an object")
    inputs, outputs = sample.get("inputs"), sample.get("outputs")
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple):
        raise ValueError("the tests need lists of inputs and outputs")
    return ProgramTests(tuple(inputs), tuple(outputs), sample.get("fn_name"))


class Judge:
    """Judges submissions, from any number of threads. Closing the sandbox is the caller's.

    Args:
      sandbox: Runs the programs.
      limits: Of one test. Nothing that a test expects may be longer than its `output_kb`.
      budget_s: CPU seconds that all tests of a submission may take together; `math.inf` for none.
    """

    def __init__(self, sandbox: Sandbox, limits: Limits = LIMITS, budget_s: float = BUDGET_S):
        if not budget_s > 0:
            raise ValueError(f"Judge(budget_s={budget_s}): it must be positive")
        self._sandbox = sandbox
        self._limits = limits
        self._budget_s = budget_s

    def judge(self, code: str, tests: ProgramTests | str | Mapping[str, Any]) -> Judgement:
        """Runs a program on one test after another until one is not passed.

        Args:
          code: The program, without fences.
          tests: As such, or as `parse_tests` takes them; what that refuses is a data error.

        Raises:
          InfrastructureError: If the sandbox is closed or has been broken for long.
        """
        try:
            tests = tests if isinstance(tests, ProgramTests) else parse_tests(tests)
        except ValueError as error:
            return Judgement(Verdict.DATA_ERROR, 0, 0, str(error))
        total, cpu_s = len(tests.inputs), 0.0
        if len(code.encode("utf-8", "surrogatepass")) > self._limits.code_kb << 10:
            return Judgement(Verdict.RUNTIME_ERROR, 0, total, f"the program is longer than {self._limits.code_kb} KiB")
        program = _program(code, tests.fn_name)
        for index, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
            verdict, detail, spent = self._try(program, tests.fn_name, given, expected, self._budget_s - cpu_s)
            cpu_s += spent
            if verdict is not Verdict.PASSED:
                return Judgement(verdict, index, total, f"test {index}: {detail}", cpu_s)
        return Judgement(Verdict.PASSED, total, total, "", cpu_s)

    def _try(self, program: str, fn_name: str | None, given: str, expected: str, left_s: float):
        """Verdict, detail and CPU seconds of one test, where `left_s` is left of the budget."""
        limits = self._limits
        if fn_name is not None:
            given = "\n".join(_argument_lines(given))
        if len(given.encode()) > limits.stdin_mb << 20:
            return Verdict.DATA_ERROR, f"the input is longer than {limits.stdin_mb} MiB", 0.0
        if len(expected.encode()) > limits.output_kb << 10:
            return Verdict.DATA_ERROR, f"the expected output is longer than {limits.output_kb} KiB", 0.0
        if left_s < 0.01:
            return Verdict.TIME_LIMIT, f"the budget of {self._budget_s:g} s is used up", 0.0
        # Quoted, a program takes up to four times its length.
        code_kb = min(4 * limits.code_kb + 16, 16384)
        limits = dataclasses.replace(limits, cpu_s=min(limits.cpu_s, left_s), wall_s=limits.wall, code_kb=code_kb)
        result = self._sandbox.run(program, given, limits=limits)
        verdict, detail = _verdict(result)
        if verdict is Verdict.PASSED:
            detail = (
                output_difference(result.stdout, expected)
                if fn_name is None
                else value_difference(result.stdout, expected)
            )
            verdict = Verdict.WRONG_ANSWER if detail else Verdict.PASSED
        return verdict, detail, result.cpu_s


def _program(code: str, fn_name: str | None) -> str:
    """What the sandbox runs. The submission is quoted, so it is a file of its own, with its own __future__ imports."""
    setup = f"exec({_SETUP!r}, {{}})\n"
    if fn_name is not None:
        return f"{setup}{_CALL}\nmain({_PRELUDE!r}, {code!r}, {fn_name!r})\n"
    return f"{setup}exec({_PRELUDE!r})\nexec(compile({code!r}, '<solution>', 'exec', dont_inherit=True))\n"


def _verdict(result: ToolResult) -> tuple[Verdict, str]:
    """What a run says by itself; `PASSED` where the answer has to be looked at."""
    if result.status is Status.OK or (result.status is Status.ERROR and not result.exc_type):
        return Verdict.PASSED, ""
    if result.status is Status.SANDBOX_ERROR:
        return Verdict.SANDBOX_ERROR, result.detail
    verdict = {
        Status.TIMEOUT: Verdict.TIME_LIMIT,
        Status.MEMORY: Verdict.MEMORY_LIMIT,
        Status.OUTPUT_LIMIT: Verdict.OUTPUT_LIMIT,
    }.get(result.status, Verdict.RUNTIME_ERROR)
    last = result.stderr.rstrip().rpartition("\n")[2] if result.status is Status.ERROR else ""
    return verdict, _cut(last) or result.detail or str(result.status)


def output_difference(printed: str, expected: str) -> str:
    """Where two outputs differ; "" if they count as the same."""
    got, wanted = _lines(printed), _lines(expected)
    if len(got) != len(wanted):
        return f"{len(got)} lines, not {len(wanted)}"
    for number, (line, other) in enumerate(zip(got, wanted, strict=True), 1):
        if line != other and not _same_numbers(line, other):
            return f"line {number}: {_cut(line)!r}, not {_cut(other)!r}"
    return ""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_numbers(line: str, other: str) -> bool:
    """Whether two lines consist of numbers that are exactly the same, one by one."""
    tokens, others = line.split(), other.split()
    return len(tokens) == len(others) and all(
        _NUMERAL.fullmatch(a) and _NUMERAL.fullmatch(b) and decimal.Decimal(a) == decimal.Decimal(b)
        for a, b in zip(tokens, others, strict=True)
    )


def value_difference(answer: str, expected: str) -> str:
    """How a returned value differs from the expected one, both JSON; "" if they are equal."""
    # A value that equals the expected one cannot be much longer; any other is not worth this process's time.
    if len(answer) <= 16 * len(expected) + 4096:
        try:
            if _decoded(answer) == _decoded(expected):
                return ""
        except (ValueError, RecursionError):
            return f"{_cut(answer)!r} is not a JSON value" if answer else "no JSON value was returned"
    return f"{_cut(answer)}, not {_cut(expected)}"


def _decoded(text: str) -> Any:
    """A JSON value; ValueError or RecursionError if it is none or too big. Each NaN is a new one, so equal to none."""
    return json.loads(text, parse_int=_integer, parse_constant=float)


def _integer(text: str) -> int | decimal.Decimal:
    """An integer of up to `DIGITS` digits. Long ones are decimals, which equal integers and take linear time."""
    if len(text) <= 4000:
        return int(text)
    if len(text) > DIGITS:
        raise ValueError("an integer is too long")
    return decimal.Decimal(text)


def _argument_lines(text: str) -> list[str]:
    return text.strip().split("\n")


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
