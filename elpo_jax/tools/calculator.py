"""A calculator tool: exact arithmetic over + - * / ** and parentheses.

Numbers are integers and fractions, so nothing is rounded but what is printed of a result that has no finite decimal.
Length, nesting, exponents and the size of every intermediate value are bounded, so an answer takes at most a few
milliseconds whatever the model writes. The grammar, from loosest to tightest:

    sum = product (("+" | "-") product)*        product = signed (("*" | "/") signed)*
    signed = "-" signed | power                 power = atom ("**" signed)?         atom = number | "(" sum ")"
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NoReturn

from elpo_jax.tools.base import State, Status, ToolResult

MAX_CHARS = 1000
MAX_DEPTH = 50  # parentheses, signs and powers within each other
MAX_EXPONENT = 1000
MAX_BITS = 1024  # of any numerator or denominator, so at most 309 digits
MAX_PLACES = 12  # decimals that are printed; a result that needs more is printed as a fraction

_TOKEN = re.compile(r"\s*(?:((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)|(\*\*|[-+*/()]))")


class CalculatorError(ValueError):
    """An expression has no value here; `kind` says why, the message is for the model."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression.

    Raises:
      CalculatorError: Of kind "syntax", "division_by_zero", "exponent", "too_large", "too_long" or "too_deep".
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError("too_long", f"the expression is longer than {MAX_CHARS} characters")
    parser = _Parser(_tokens(expression))
    value = parser.sum(0)
    if parser.next is not None:
        parser.unexpected()
    return value


def format_value(value: Fraction) -> str:
    """An integer or a finite decimal as such; otherwise the fraction and an approximation ("2/3, about 0.666667")."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**MAX_PLACES
    if scaled.denominator == 1:
        whole, places = divmod(abs(scaled.numerator), 10**MAX_PLACES)
        return f"{'-' * (value < 0)}{whole}.{places:0{MAX_PLACES}}".rstrip("0")
    return f"{value}, about {float(value):.6g}"


class Calculator:
    """The tool `calculator` (see `elpo_jax.tools.base.Tool`). It has no state and needs no process of its own."""

    name = "calculator"
    description = "Evaluates an arithmetic expression exactly. Operators: + - * / ** and parentheses."
    parameters: Mapping[str, Any] = MappingProxyType(
        {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
            "additionalProperties": False,
        }
    )
    in_process = True

    def run(self, arguments: Mapping[str, Any], state: State | None) -> tuple[ToolResult, State | None]:
        try:
            return ToolResult(Status.OK, format_value(evaluate(arguments["expression"]))), state
        except CalculatorError as error:
            return ToolResult(Status.ERROR, f"Error: {error}", error.kind), state


def _tokens(expression: str) -> list[Fraction | str]:
    """Numbers as fractions, operators as text."""
    tokens: list[Fraction | str] = []
    expression = expression.rstrip()
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            character = expression[position:].lstrip()[0]
            raise CalculatorError("syntax", f"unexpected {character!r}")
        number, operator = match.groups()
        tokens.append(operator if number is None else _bounded(Fraction(number)))
        position = match.end()
    return tokens


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("too_large", "the numbers get too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise CalculatorError("exponent", f"exponents must be whole and at most {MAX_EXPONENT}")
    if base == 0 and exponent < 0:
        raise CalculatorError("division_by_zero", "division by zero")
    # A b-bit number has a power of more than (b - 1) * exponent bits: refused before it is computed.
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if bits * abs(exponent) > MAX_BITS:
        raise CalculatorError("too_large", "the numbers get too large")
    return _bounded(base ** int(exponent))


class _Parser:
    """Recursive descent over tokens; the methods are the rules of the grammar and return the value."""

    def __init__(self, tokens: list[Fraction | str]):
        self._tokens = tokens
        self._position = 0

    @property
    def next(self) -> Fraction | str | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _take(self) -> Fraction | str | None:
        token = self.next
        self._position += 1
        return token

    def unexpected(self) -> NoReturn:
        if self.next is None:
            raise CalculatorError("syntax", "the expression is incomplete")
        shown = self.next if isinstance(self.next, str) else format_value(self.next)
        raise CalculatorError("syntax", f"unexpected {shown!r}")

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = _bounded(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while self.next in ("*", "/"):
            divide = self._take() == "/"
            factor = self.signed(depth)
            if divide and factor == 0:
                raise CalculatorError("division_by_zero", "division by zero")
            value = _bounded(value / factor if divide else value * factor)
        return value

    def signed(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise CalculatorError("too_deep", "the expression is nested too deeply")
        if self.next == "-":
            self._take()
            return -self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Fraction:
        base = self.atom(depth)
        if self.next == "**":
            self._take()
            return _power(base, self.signed(depth + 1))
        return base

    def atom(self, depth: int) -> Fraction:
        if isinstance(self.next, Fraction):
            return self._take()
        if self.next != "(":
            self.unexpected()
        self._take()
        value = self.sum(depth + 1)
        if self.next != ")":
            self.unexpected()
        self._take()
        return value
