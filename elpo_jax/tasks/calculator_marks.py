r"""Turns GSM8K's solutions into transcripts of tool calls, for a cold start on real data.

The solutions mark what was calculated, "48/2 = <<48/2=24>>24 clips": the text before a mark and a call with its
expression become a turn, and the text goes on as written after the tool's answer. A solution without marks, or with one
that the calculator does not reproduce, makes no transcript: it would teach to calculate without the tool, or to
disbelieve it. `python -m elpo_jax.tasks.calculator_marks PATH` runs every mark and says which are not reproduced.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction

from elpo_jax.tasks.published import PUBLISHED
from elpo_jax.tasks.readers import find_sources, raw_rows, read_row
from elpo_jax.tasks.rows import DatasetError, Row
from elpo_jax.tasks.store import MANIFEST, open_rows
from elpo_jax.text.parser import call_text
from elpo_jax.tools.base import Status, Tool, ToolCall, ToolResult
from elpo_jax.tools.calculator import Calculator
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.toolbox import Request, ToolBox

ARGUMENTS = {"calculator": "expression", "code_interpreter": "code"}  # of the tools that can run an expression

_MARK = re.compile(r"<<([^<>]*)>>")
_NUMBER = re.compile(r"-?[0-9]{0,40}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,2})?")
_FRACTION = re.compile(r"(-?[0-9]+/[0-9]+), about .*")  # how the calculator writes what has no finite decimal


@dataclasses.dataclass(frozen=True)
class Mark:
    """One marked calculation.

    Attributes:
      expression: What was calculated; "" if the mark has not the form <<expression=value>>.
      value: Its value, as written.
      begin: Where the mark begins in the solution.
      end: Where it ends.
    """

    expression: str
    value: str
    begin: int
    end: int


def find_marks(solution: str) -> list[Mark]:
    """The marks of a solution, in order."""
    marks = []
    for found in _MARK.finditer(solution):
        expression, equals, value = found[1].partition("=")
        well_formed = equals and "=" not in value
        marks.append(Mark(*((expression, value) if well_formed else ("", found[1])), *found.span()))
    return marks


def mismatch(mark: Mark, result: ToolResult) -> str | None:
    """Why a tool's answer does not reproduce a mark; None if it does.

    A value with decimals may be rounded at its last one; a program's float may be off by one part in 10^9.
    """
    if result.status is not Status.OK:
        return f"{result.status}: {result.text.strip()}"
    fraction = _FRACTION.fullmatch(result.text.strip())
    answer = Fraction(fraction[1]) if fraction else _number(result.text.strip())
    value = _number(mark.value.replace(",", "").lstrip("$"))
    if answer is None or value is None:
        return f"{'the mark' if value is None else 'the answer'} is no number"
    decimals = len(mark.value.partition(".")[2])
    if abs(answer - value) > max(Fraction(decimals > 0, 2 * 10**decimals), abs(value) / 10**9):
        return f"the answer is {result.text.strip()}"
    return None


def turns(solution: str, answer: str, tool: str) -> list[str]:
    r"""The assistant's turns of a transcript: one call per mark, then the rest of the solution and `\boxed{answer}`.

    Args:
      solution: With marks.
      answer: What goes into the box.
      tool: Name of the tool that is called, a key of `ARGUMENTS`.

    Raises:
      ValueError: If it has no marks, or one that the calculator does not reproduce.
    """
    marks = find_marks(solution)
    if not marks:
        raise ValueError("its solution has no calculator marks (<<48/2=24>>)")
    said, at = [], 0
    for mark in marks:
        result, _ = Calculator().run({"expression": mark.expression}, None)
        why = mismatch(mark, result)
        if why is not None:
            raise ValueError(f"the calculator does not reproduce {solution[mark.begin : mark.end]} ({why})")
        said.append(solution[at : mark.begin] + call_text(tool, {ARGUMENTS[tool]: mark.expression}))
        at = mark.end
    return [*said, f"{solution[at:].rstrip()}\nThe answer is \\boxed{{{answer}}}."]


@dataclasses.dataclass(frozen=True)
class Audit:
    """How a tool did on all marks.

    Attributes:
      rows: Solutions.
      unmarked: Those without a mark.
      broken: Those with a mark that is not reproduced.
      marks: Number of marks.
      misses: Of each mark that is not reproduced: the row's id, the mark and why.
    """

    rows: int
    unmarked: int
    broken: int
    marks: int
    misses: tuple[tuple[str, str, str], ...]


def audit(rows: Iterable[Row], tool: Tool, workers: int = 2) -> Audit:
    """Runs every marked expression with a tool.

    Args:
      rows: With a solution.
      tool: "calculator" or "code_interpreter".
      workers: Calls of a slow tool at once.
    """
    found = [(row.id, find_marks(str(row.meta.get("solution", "")))) for row in rows]
    expressions = list(dict.fromkeys(mark.expression for _, marks in found for mark in marks))
    calls = [Request(ToolCall(tool.name, {ARGUMENTS[tool.name]: expression})) for expression in expressions]
    with ToolBox([tool], workers=workers) as box:
        results = dict(zip(expressions, (result for result, _ in box.run_many(calls)), strict=True))
    misses = [
        (identity, f"<<{mark.expression}={mark.value}>>", why)
        for identity, marks in found
        for mark in marks
        if (why := mismatch(mark, results[mark.expression])) is not None
    ]
    return Audit(
        rows=len(found),
        unmarked=sum(not marks for _, marks in found),
        broken=len({identity for identity, _, _ in misses}),
        marks=sum(len(marks) for _, marks in found),
        misses=tuple(misses),
    )


def _number(text: str) -> Fraction | None:
    """A decimal number, exactly; None if it is none."""
    return Fraction(text) if _NUMBER.fullmatch(text) and any(c.isdigit() for c in text.partition("e")[0]) else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m elpo_jax.tasks.calculator_marks",
        description="Runs the marked calculations of GSM8K.",
    )
    parser.add_argument("path", help="the published train.jsonl, or the folder that `prepare` made")
    parser.add_argument("--tool", choices=list(ARGUMENTS), default="calculator")
    options = parser.parse_args(arguments)
    try:
        rows = _rows(pathlib.Path(options.path))
        if options.tool == "calculator":
            done = audit(rows, Calculator())
        else:
            with CodeInterpreter() as interpreter:
                done = audit(rows, interpreter)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{error}")
    reproduced = done.marks - len(done.misses)
    print(f"{done.rows} solutions, {done.unmarked} without a mark, {done.broken} with one that is not reproduced")
    print(f"{reproduced} of {done.marks} marks are reproduced ({100 * reproduced / max(1, done.marks):.3f} %)")
    for identity, mark, why in done.misses:
        print(f"  row {identity}: {mark}: {why}")


def _rows(path: pathlib.Path) -> list[Row]:
    if (path / MANIFEST).is_file():
        rows = list(open_rows(path, "train"))
    else:
        gsm8k = PUBLISHED["gsm8k"]
        raws = [raw for source in find_sources(path, gsm8k) if source.split() != "test" for _, raw in raw_rows(source)]
        rows = [read_row(raw, number, gsm8k) for number, raw in enumerate(raws)]
    if not all(isinstance(row, Row) for row in rows):
        raise DatasetError(f"{path} holds no problems with solutions")
    return rows


if __name__ == "__main__":
    main()
