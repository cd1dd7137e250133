r"""Grades a file of answers.

    python -m elpo_jax.tasks.verify --checker math|strict_box|letter|program IN.jsonl OUT.jsonl

Each line of IN is an object with `id`, `reference` and `response`; for programs the reference is the tests, {"inputs",
"outputs", "fn_name"}, as an object or as JSON in a string. OUT has the same rows in the same order, with `correct` and
`status` (`graders.Graded`) added. All rows are checked before the first is graded, and OUT appears only when it is
complete.
"""

import argparse
import json
import math
import os
import pathlib
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any, get_args

from elpo_jax.tasks.exact import readable
from elpo_jax.tasks.graders import LETTERS, Graders, Kind
from elpo_jax.tasks.rows import DatasetError, answer_text
from elpo_jax.tools.base import InfrastructureError
from elpo_jax.tools.judge import parse_tests
from elpo_jax.tools.sandbox import Sandbox

_AT_ONCE = 1000  # rows


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 1 with a message on standard error."""
    parser = argparse.ArgumentParser(prog="python -m elpo_jax.tasks.verify", description="Grades a file of answers.")
    parser.add_argument("--checker", required=True, choices=get_args(Kind))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for one answer in math-verify")
    parser.add_argument("--exact", action="store_true", help="math without math-verify: undecided counts as wrong")
    parser.add_argument("--all-tests", action="store_true", help="programs: also write the fraction of tests passed")
    parser.add_argument("source", metavar="IN.jsonl", type=pathlib.Path)
    parser.add_argument("target", metavar="OUT.jsonl", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        print(_verify(options))
    except (DatasetError, InfrastructureError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _verify(options: argparse.Namespace) -> str:
    """Grades the file and returns the summary."""
    kind: Kind = options.checker
    if options.workers < 1:
        raise ValueError(f"--workers={options.workers}: it must be 1 or more")
    if not 0 < options.deadline < math.inf:
        raise ValueError(f"--deadline={options.deadline:g}: it must be positive and finite")
    if options.target.exists() and options.target.samefile(options.source):
        raise OSError(f"{options.target} is what is graded: name another file for the output")
    if not options.target.parent.is_dir():
        raise OSError(f"{options.target.parent} is not a folder: make it first")
    rows = read_rows(options.source, kind)
    partial = options.target.with_name(options.target.name + ".partial")
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(workers=options.workers)) if kind == "program" else None
        graders = stack.enter_context(
            Graders(
                symbolic=kind == "math" and not options.exact,
                sandbox=sandbox,
                workers=options.workers,
                deadline_s=options.deadline,
                all_tests=options.all_tests,
            )
        )
        stack.callback(partial.unlink, missing_ok=True)
        with partial.open("w", encoding="utf-8") as out:
            for begin in range(0, len(rows), _AT_ONCE):
                part = rows[begin : begin + _AT_ONCE]
                graded = graders.grade_many(_arguments(kind, row) for row in part)
                for row, grade in zip(part, graded, strict=True):
                    counts["correct"] += grade.success
                    counts[grade.status] += 1
                    added = {"correct": grade.success, "status": grade.status}
                    if grade.score is not None:
                        added["score"] = grade.score
                    out.write(json.dumps(row | added) + "\n")
        os.replace(partial, options.target)
        checker = graders.checker(kind)
    low, high = wilson(counts["correct"], len(rows))
    statuses = ", ".join(f"{counts[name]} {name}" for name in sorted(set(counts) - {"correct"}))
    return (
        f"{options.checker} ({checker}): {counts['correct']} of {len(rows)} correct, "
        f"{100 * counts['correct'] / len(rows):.1f} % (95 % Wilson interval {100 * low:.1f} to {100 * high:.1f} %); "
        f"status: {statuses}"
    )


def read_rows(path: pathlib.Path, kind: Kind) -> list[dict[str, Any]]:
    """The rows of a file, each checked for its kind of grader. Blank lines are skipped.

    Raises:
      DatasetError: If there is no row, or one is not as described above; names the line.
      OSError: If the file cannot be read.
    """
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                _check(row, kind)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{path}:{number}: {error}") from None
            rows.append(row)
    if not rows:
        raise DatasetError(f"{path} has no rows")
    return rows


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a rate.

    Args:
      successes: 0 to `count`.
      count: Trials, at least 1.
    """
    z = 1.959964
    rate = successes / count
    middle = rate + z * z / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _check(row: Any, kind: Kind) -> None:
    if not isinstance(row, dict):
        raise DatasetError("the row is not a JSON object")
    missing = [key for key in ("id", "reference", "response") if key not in row]
    if missing:
        raise DatasetError(f'the row has no "{missing[0]}"')
    if not isinstance(row["response"], str):
        raise DatasetError('"response" must be text: the final turn of the attempt')
    reference = row["reference"]
    if kind == "program":
        try:
            parse_tests(reference)
        except ValueError as error:
            raise DatasetError(f'"reference" must be the tests of a program: {error}') from None
    elif not answer_text(reference):
        raise DatasetError('"reference" is empty')
    elif kind == "math" and not readable(answer_text(reference)):
        raise DatasetError('"reference" is one that no parser reads (a brace without its end, or too long)')
    elif kind == "letter" and answer_text(reference) not in LETTERS:
        raise DatasetError(f'"reference" must be a letter from {LETTERS[0]} to {LETTERS[-1]}')


def _arguments(kind: Kind, row: dict[str, Any]) -> tuple[Kind, str, str, dict[str, Any]]:
    if kind == "program":
        return kind, row["response"], "", {"tests": row["reference"]}
    exactly = kind == "strict_box" and isinstance(row["reference"], str)
    return kind, row["response"], row["reference"] if exactly else answer_text(row["reference"]), {}


if __name__ == "__main__":
    sys.exit(main())
