r"""Grades final turns: mathematics, letters of options, programs, and the reference recipe's strict box.

Mathematics is read from the last `\boxed{}` and compared exactly (`exact.py`); only what that leaves undecided goes to
math-verify, in a worker with a deadline (`math_worker.py`). Programs are judged in the sandbox. A checker's time-out or
error is a failed attempt and says so in `Graded.status`; a checker that cannot work at all raises.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

from elpo_jax.tasks.base import Grade
from elpo_jax.tasks.boxed import last_boxed
from elpo_jax.tasks.exact import LONGEST_READABLE, canonical_key, compare, forget, plain_latex
from elpo_jax.tasks.math_worker import WorkerPool
from elpo_jax.tools import judge
from elpo_jax.tools.base import InfrastructureError
from elpo_jax.tools.sandbox import Limits, Sandbox

Kind = Literal["math", "letter", "program", "strict_box"]
Status = Literal["ok", "no_answer", "undecided", "timeout", "error"]
Row = tuple[str, str, str, Mapping[str, Any] | None]  # kind, text, reference, meta

LETTERS = ("A", "B", "C", "D")
_SYMBOLIC = "elpo_jax.tasks._symbolic:equivalent"
_SHOWN = 40  # characters of an answer in a reason


@dataclasses.dataclass(frozen=True)
class Graded(Grade):
    """A grade, and how sure it is. Its `reward` is 1 for success and else the score or 0.

    Attributes:
      status: "ok", decided; "no_answer"; "undecided", not equal as far as anyone could tell; "timeout" and "error", of
        the checker. Success implies "ok".
      score: Fraction of a program's tests that were passed, where asked for; else None.
    """

    status: Status = "ok"
    score: float | None = None


class Graders:
    """All graders, from any number of threads.

    Args:
      symbolic: Ask math-verify about what the exact comparison leaves undecided; without it that counts as different,
        which is another protocol (`checker` names it).
      sandbox: Runs programs; its owner closes it. None: no programs.
      workers: Processes for math-verify; also the rows that `grade_many` works on at once.
      deadline_s: Seconds for one answer in a worker.
      memory_mb: Address space of a worker.
      program_limits: Of one test of a program.
      all_tests: Run all tests of a program and score the fraction that is passed, as the reference recipe does; without
        it a program has lost at its first failure, as in LiveCodeBench. Success needs all tests in both.
      _function: For tests: what the workers call instead of math-verify.

    Raises:
      ImportError: If math-verify is needed and not installed.
      ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        *,
        symbolic: bool = True,
        sandbox: Sandbox | None = None,
        workers: int = 2,
        deadline_s: float = 5.0,
        memory_mb: int = 1024,
        program_limits: Limits = judge.LIMITS,
        all_tests: bool = False,
        _function: str = _SYMBOLIC,
    ):
        if not 0 < deadline_s < float("inf"):
            raise ValueError(f"Graders(deadline_s={deadline_s}): it must be positive and finite")
        if symbolic and _function == _SYMBOLIC and importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "math answers are graded with math-verify, which is not installed: install math-verify[antlr4-13-2], "
                "or compare them exactly only (symbolic=False, --exact)"
            )
        self._pool = WorkerPool(_function, workers, memory_mb) if symbolic else None
        self._judge = judge.Judge(sandbox, program_limits) if sandbox is not None else None
        self._workers = workers
        self._deadline_s = deadline_s
        self._all_tests = all_tests

    def __enter__(self) -> "Graders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()

    def checker(self, kind: Kind) -> str:
        """What a grader does, in words, for protocols."""
        if kind == "math":
            then = (
                f"then math-verify ({self._deadline_s:g} s)" if self._pool else "no math-verify: undecided is different"
            )
            return f"last \\boxed{{}} of the final turn, exact, {then}"
        if kind == "letter":
            return "letter A to D in the last \\boxed{} of the final turn"
        if kind == "strict_box":
            return "strict box: in the last 100 characters of the final turn, equal as text"
        tests = "fraction of all tests" if self._all_tests else "tests until one fails"
        return f"last fenced program of the final turn, {tests}, success if all are passed"

    def grade(self, kind: Kind, text: str, reference: str, meta: Mapping[str, Any] | None = None) -> Graded:
        r"""Grades the final turn of an attempt.

        Args:
          kind: "math"; "letter", A to D in the last box; "program", the last fenced block against `meta["tests"]`;
            "strict_box", see `strict_box`.
          text: The final turn only: a `\boxed{}` that a tool printed is not an answer.
          reference: What is right. Not read for programs.
          meta: A program's `tests`, as `judge.parse_tests` takes them.

        Returns:
          The grade. Its `answer` is the same for answers that are written differently but equal, for votes.

        Raises:
          InfrastructureError: If a worker cannot be started, or the sandbox or its machinery is broken.
          ValueError: If the reference is no answer of this kind, or programs are asked for without a sandbox.
        """
        if kind == "program":
            return self._program(text, (meta or {}).get("tests"))
        if kind not in get_args(Kind):
            raise ValueError(f"no grader is called {kind!r}: there are {', '.join(get_args(Kind))}")
        if not reference.strip():
            raise ValueError("the reference answer is empty")
        if kind == "math":
            return self._math(text, reference)
        if kind == "letter":
            return _letter(text, reference)
        answer = strict_box(text)
        return _graded(answer == reference, answer)

    def grade_many(self, rows: Iterable[Row]) -> list[Graded]:
        """Grades rows of `grade`'s arguments, several at once; the results are in order."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(lambda row: self.grade(*row), rows))

    def _math(self, text: str, reference: str) -> Graded:
        answer, reference = last_boxed(text), last_boxed(reference) or reference.strip()
        if not answer:
            return _graded(False, None)
        found = compare(answer, reference)
        if found == "equal":
            return _graded(True, canonical_key(reference))
        key = canonical_key(answer)
        if found == "different":
            return _graded(False, key, shown=answer)
        if self._pool is None:
            return _unsure("undecided", key, "not equal as written, and nothing else was tried")
        if max(len(answer), len(reference)) > LONGEST_READABLE:
            return _unsure("undecided", key, f"longer than {LONGEST_READABLE} characters")
        reply = self._pool.call(plain_latex(answer), plain_latex(reference), deadline_s=self._deadline_s)
        if reply.status == "ok":
            if reply.value is None:
                return _unsure("undecided", key, "the answer or the reference cannot be read")
            # Votes for what is right are counted together, however it is written.
            return _graded(reply.value, canonical_key(reference) if reply.value else key, shown=answer)
        return _unsure("timeout" if reply.status == "timeout" else "error", key, f"{reply.status}: {reply.detail}")

    def _program(self, text: str, tests: Any) -> Graded:
        if self._judge is None:
            raise ValueError("programs are graded in a sandbox: pass Graders(sandbox=...)")
        if tests is None:
            raise ValueError('a program needs meta["tests"] = {"inputs", "outputs", "fn_name"}')
        code = last_fenced(text)
        if code is None:
            return dataclasses.replace(_graded(False, None), reason="no answer: no fenced program")
        found = self._run_all(code, tests) if self._all_tests else self._judge.judge(code, tests)
        if found.verdict is judge.Verdict.SANDBOX_ERROR:
            raise InfrastructureError(f"a program could not be judged: {found.detail}")
        if found.verdict is judge.Verdict.DATA_ERROR:
            return _unsure("error", "", f"the tests are unusable: {found.detail}")
        success = found.verdict is judge.Verdict.PASSED
        score = found.passed / found.total if self._all_tests else None
        reason = "correct" if success else f"{found.verdict}: {found.passed} of {found.total} tests passed"
        return Graded(success, float(success) if score is None else score, reason, str(found.verdict), "ok", score)

    def _run_all(self, code: str, tests: Any) -> judge.Judgement:
        """As the judge, but with the number of all tests that are passed; those beyond the CPU budget are not."""
        try:
            tests = judge.parse_tests(tests)
        except ValueError as error:
            return judge.Judgement(judge.Verdict.DATA_ERROR, 0, 0, str(error))
        pairs = list(zip(tests.inputs, tests.outputs, strict=True))
        # A test that expects nothing cannot stand alone: a program that prints nothing would pass it.
        speaking = next((pair for pair in pairs if pair[1].strip()), pairs[0])
        passed, cpu_s, verdict = 0, 0.0, judge.Verdict.PASSED
        for pair in pairs:
            if cpu_s >= judge.BUDGET_S:
                verdict = judge.Verdict.TIME_LIMIT if verdict is judge.Verdict.PASSED else verdict
                break
            alone = [pair] if pair[1].strip() or tests.fn_name is not None else [pair, speaking]
            one = self._judge.judge(code, judge.ProgramTests(*zip(*alone, strict=True), tests.fn_name))
            if one.verdict in (judge.Verdict.SANDBOX_ERROR, judge.Verdict.DATA_ERROR):
                return one
            cpu_s += one.cpu_s
            passed += one.passed > 0
            if one.passed == 0 and verdict is judge.Verdict.PASSED:
                verdict = one.verdict
        return judge.Judgement(verdict, passed, len(pairs), "", cpu_s)


def strict_box(text: str) -> str | None:
    r"""What the reference recipe's reward takes for the answer; None if it finds none.

    Only the last 100 of the last 300 characters are looked at, and the whole of `\boxed{...}` must be in them. The last
    box that begins there is the only one tried, escaped braces count as braces, and nothing is stripped. The recipe
    looks at all of the response, tool answers included; here, as for all graders, the text is the final turn.
    """
    text = text[-300:][-100:]
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin += len("\\boxed{")
    depth = 1
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin:i]
    return None


def last_fenced(text: str) -> str | None:
    """The last complete block between lines of ```, whatever its language; None if there is none.

    A line of ``` with a language begins a block, also within one that was never closed. The indentation of that line is
    taken off the block.
    """
    block: list[str] | None = None
    indent, last = 0, None
    for line in text.split("\n"):
        mark = line.strip()
        if not mark.startswith("```") or "`" in mark.lstrip("`"):
            if block is not None:
                block.append(line.rstrip("\r")[min(indent, len(line) - len(line.lstrip())) :])
        elif block is not None and not mark.strip("`"):
            block, last = None, "\n".join(block)
        else:
            block, indent = [], len(line) - len(line.lstrip())
    return last


def throughput(graders: Graders, rows: list[Row]) -> float:
    """Distinct rows per second of `grade_many`, each graded once and none read before.

    The first row is graded before the clock starts, since it starts what is needed, and does not count.

    Raises:
      ValueError: If fewer than two rows are distinct.
    """
    first, *others = {row[:3]: row for row in rows}.values()
    if not others:
        raise ValueError("throughput needs two rows or more that are distinct")
    graders.grade(*first)
    forget()
    began = time.perf_counter()
    graders.grade_many(others)
    return len(others) / (time.perf_counter() - began)


def _letter(text: str, reference: str) -> Graded:
    right = _letter_of(reference)
    if right is None:
        raise ValueError(f"the reference must be a letter from {LETTERS[0]} to {LETTERS[-1]}")
    answer = last_boxed(text)
    return _graded(bool(answer) and _letter_of(answer) == right, canonical_key(answer) if answer else None)


def _letter_of(answer: str) -> str | None:
    key = canonical_key(answer)
    return key if key in LETTERS else None


def _graded(success: bool, answer: str | None, shown: str | None = None) -> Graded:
    if answer is None:
        return Graded(False, 0.0, "no answer", "", "no_answer")
    reason = "correct" if success else f"wrong answer: got {_cut(shown or answer)}"
    return Graded(success, float(success), reason, answer)


def _unsure(status: Status, answer: str, why: str) -> Graded:
    return Graded(False, 0.0, f"{status}: {why}", answer, status)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
