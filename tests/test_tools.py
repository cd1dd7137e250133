"""The calculator against Python's own arithmetic, and the tool box: order, validation, retries, threads."""

import re
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_jax.tools.base import InfrastructureError, Status, ToolCall, ToolResult
from elpo_jax.tools.calculator import (
    MAX_BITS,
    MAX_CHARS,
    MAX_DEPTH,
    Calculator,
    CalculatorError,
    evaluate,
    format_value,
)
from elpo_jax.tools.toolbox import Request, ToolBox

# --- calculator

NUMBERS = st.integers(0, 999).map(str) | st.sampled_from(["0.5", "12.25", ".1", "3.", "2e3", "1.5e-2"])
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " * "]), inner).map("".join),
        st.tuples(inner, st.sampled_from(["**", " ** "]), st.sampled_from(["0", "2", "3", "-1", "(1+1)"])).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=10,
)


@given(EXPRESSIONS)
def test_values_are_those_of_python_with_fractions(text):
    """Python's grammar and Fraction arithmetic decide: precedence, associativity, signs and exactness."""
    try:
        value = evaluate(text)
    except CalculatorError as error:
        if error.kind == "division_by_zero":
            with pytest.raises(ZeroDivisionError):
                reference(text)
        else:
            assert error.kind in ("too_large", "exponent")
        return
    assert value == reference(text)
    assert evaluate(format_value(value).split(",")[0]) == value  # what is printed can be calculated with


def reference(text: str) -> Fraction:
    return Fraction(eval(re.sub(r"[0-9.]+(e-?[0-9]+)?", lambda number: f"Fraction('{number[0]}')", text)))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1 + 2 * 3", "7"),
        ("-2 ** 2", "-4"),
        ("2 ** 3 ** 2", "512"),
        ("2 ** -1", "0.5"),
        ("0.1 + 0.2", "0.3"),
        ("7 / 2 / 2", "1.75"),
        ("-1 / 8", "-0.125"),
        ("- - 3", "3"),
        ("2 / 3", "2/3, about 0.666667"),
        ("1 / 3e12", "1/3000000000000, about 3.33333e-13"),
        ("2 ** 1000 / 3", f"{2**1000}/3, about 3.5717e+300"),
        ("10 ** 20 + 1", "100000000000000000001"),
    ],
)
def test_results_are_printed_exactly(text, shown):
    assert Calculator().run({"expression": text}, None) == (ToolResult(Status.OK, shown), None)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "syntax"),
        ("(1 + 2", "syntax"),
        ("1 + 2)", "syntax"),
        ("1 2", "syntax"),
        ("1 +", "syntax"),
        ("1 // 2", "syntax"),
        ("1,000", "syntax"),
        ("__import__('os')", "syntax"),
        ("٣ + 1", "syntax"),
        ("1_000", "syntax"),
        ("1 / (2 - 2)", "division_by_zero"),
        ("0 ** -1", "division_by_zero"),
        ("4 ** 0.5", "exponent"),
        ("2 ** 10 ** 100", "exponent"),
        ("9 ** 999", "too_large"),
        ("9 ** 300 * 9 ** 300", "too_large"),
        ("1e999", "too_large"),
        ("9" * 400, "too_large"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "too_deep"),
        ("-" * (MAX_DEPTH + 1) + "1", "too_deep"),
        ("1" + "**1" * (MAX_DEPTH + 1), "too_deep"),
        ("1" + "+1" * MAX_CHARS, "too_long"),
    ],
)
def test_refusals_are_typed_errors(text, kind):
    result, _ = Calculator().run({"expression": text}, None)
    assert result.status is Status.ERROR and result.detail == kind and result.text.startswith("Error: ")
    assert len(result.text) < 80


@given(st.text(alphabet="0123456789.+-*/() eE", max_size=40) | st.text(max_size=20))
def test_any_text_has_a_bounded_value_or_a_typed_error(text):
    try:
        value = evaluate(text)
    except CalculatorError:
        return
    assert max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS


# --- tool box


class Add:
    """A stateful tool: the world is the sum so far."""

    name = "add"
    description = "Adds."
    parameters = {  # noqa: RUF012
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1}, "note": {"type": "string"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    in_process = True

    def __init__(self):
        self.threads = []

    def run(self, arguments, state):
        self.threads.append(threading.current_thread())
        return ToolResult(Status.OK, str(state + arguments["n"])), state + arguments["n"]


class Waits(Add):
    """Answers only once two calls are under way."""

    name = "waits"
    in_process = False

    def __init__(self):
        super().__init__()
        self.barrier = threading.Barrier(2)

    def run(self, arguments, state):
        self.barrier.wait(timeout=20)
        return super().run(arguments, state)


class Flaky(Add):
    """Breaks the given number of times before it works."""

    name = "flaky"

    def __init__(self, failures):
        super().__init__()
        self.failures = list(failures)
        self.calls = 0

    def run(self, arguments, state):
        self.calls += 1
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure, None
        return super().run(arguments, state)


def request(name, state=0, **arguments):
    return Request(ToolCall(name, arguments), state)


def test_answers_come_in_order_with_their_own_worlds():
    with ToolBox([Add(), Waits()], workers=2) as box:
        requests = [request("waits" if n % 3 == 0 else "add", state=1000 * n, n=n) for n in range(1, 31)]
        answers = box.run_many(requests)
    assert [(result.text, state) for result, state in answers] == [(str(1001 * n), 1001 * n) for n in range(1, 31)]


def test_quick_tools_run_here_and_waiting_ones_on_the_pool_together():
    add, waits = Add(), Waits()
    with ToolBox([add, waits], workers=2) as box:
        first, second = box.submit(request("waits", n=1)), box.submit(request("waits", n=2))
        quick = box.submit(request("add", n=3))
        assert quick.done() and quick.result()[1] == 3
        assert (first.result()[1], second.result()[1]) == (1, 2)
    assert add.threads == [threading.main_thread()]
    assert len(set(waits.threads)) == 2 and threading.main_thread() not in waits.threads
    assert not any(thread.is_alive() for thread in waits.threads)  # the box ended its threads
    with pytest.raises(RuntimeError):
        box.submit(request("waits", n=1))


@pytest.mark.parametrize(
    ("name", "arguments", "status", "words"),
    [
        ("sub", {}, Status.UNKNOWN_TOOL, ["'sub'", "Tools: add, calculator"]),
        ("x" * 999, {}, Status.UNKNOWN_TOOL, ["xxx...'"]),
        ("add", {}, Status.MALFORMED, ["'n' is missing", "add takes: n, note"]),
        ("add", {"n": "1"}, Status.MALFORMED, ["'n'", "integer"]),
        ("add", {"n": True}, Status.MALFORMED, ["'n'", "integer"]),
        ("add", {"n": 0}, Status.MALFORMED, ["'n'", "minimum 1"]),
        ("add", {"n": 1, "note": None}, Status.MALFORMED, ["'note'", "string"]),
        ("add", {"n": 1, "y" * 999: "z" * 9999}, Status.MALFORMED, ["yyy...'", "is not an argument"]),
        ("calculator", {"code": "1"}, Status.MALFORMED, ["calculator takes: expression"]),
    ],
)
def test_calls_that_do_not_fit_are_answered_for_the_model(name, arguments, status, words):
    with ToolBox([Add(), Calculator()]) as box:
        result, state = box.submit(Request(ToolCall(name, arguments), 5)).result()
    assert result.status is status and state == 5
    assert all(word in result.text for word in words) and len(result.text) < 120
    assert status is Status.UNKNOWN_TOOL or result.detail == "arguments"


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize(
    ("failures", "retries", "status", "calls", "detail"),
    [
        ([ValueError("bug")], 2, Status.OK, 2, ""),
        ([InfrastructureError("gone"), "no result"], 2, Status.OK, 3, ""),
        ([MemoryError(), RecursionError(), KeyError("x")], 2, Status.SANDBOX_ERROR, 3, "KeyError: 'x'"),
        (["no result"], 0, Status.SANDBOX_ERROR, 1, "TypeError: it answered with a str"),
        ([Unprintable()], 0, Status.SANDBOX_ERROR, 1, "Unprintable"),
        # The sandbox has tried again already.
        ([ToolResult(Status.SANDBOX_ERROR, "", "worker died")], 2, Status.SANDBOX_ERROR, 1, "worker died"),
        ([ValueError("bug"), ToolResult(Status.SANDBOX_ERROR, "", "lost")], 2, Status.SANDBOX_ERROR, 2, "lost"),
    ],
)
def test_a_tool_that_breaks_is_tried_again_and_never_raises(in_process, failures, retries, status, calls, detail):
    tool = Flaky(failures)
    tool.in_process = in_process
    with ToolBox([tool], retries=retries) as box:
        ((result, state),) = box.run_many([request("flaky", state=7, n=1)])
    assert (result.status, result.detail, tool.calls) == (status, detail, calls)
    assert state == (8 if status is Status.OK else 7)  # the world before the call, whatever the tool made of it


def test_a_tool_that_answers_with_an_error_is_not_retried():
    tool = Flaky([ToolResult(Status.ERROR, "no", "refused")])
    with ToolBox([tool]) as box:
        ((result, _),) = box.run_many([request("flaky", n=1)])
    assert (result, tool.calls) == (ToolResult(Status.ERROR, "no", "refused"), 1)


def test_a_wrong_tool_box_is_refused():
    class NoSchema(Add):
        name = "none"
        parameters = {"type": "objekt"}  # noqa: RUF012

    for tools, options, message in (
        ([Add(), Add()], {}, "share a name"),
        ([NoSchema()], {}, "tool none are no valid JSON schema"),
        ([], {"workers": 0}, "workers=0"),
        ([], {"retries": -1}, "retries=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            ToolBox(tools, **options)
