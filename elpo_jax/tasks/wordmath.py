r"""The wordmath family: short arithmetic stories, solved one operation at a time with the code interpreter.

The operation has to be inferred from each sentence, units imply conversions, and some numbers are not needed. A task is
a pure function of (seed, split, index, difficulty). The numbers that a prompt shows decide which split it belongs to,
so no prompt, nor one that differs from it in wording only, can occur in two splits. Graded on the final `\boxed{}`.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elpo_jax.tasks.base import SPLITS, Demonstrator, Grade, Split, Task
from elpo_jax.tasks.boxed import grade_boxed
from elpo_jax.tasks.stories import draw_plot, tell
from elpo_jax.text.parser import call_text
from elpo_jax.tools.base import State, Status, Tool

EASIEST, HARDEST = 2, 10

# How often the reference policy makes each kind of mistake, and what it says when it starts the step again. Mostly ones
# that the tool's answer gives away: of a wrong operation nothing tells the imitator when to repair and when to go on.
MISTAKES = {"operation": 0.1, "number": 0.1, "typo": 0.3, "malformed": 0.3, "silent": 0.2}
REPAIRS = {
    "operation": ("Wait, wrong step.", "No, that is wrong."),
    "number": ("Wait, wrong number.", "No, that is wrong."),
    "typo": ("Fix the code.",),
    "malformed": ("Fix the call.",),
    "silent": ("Show the value.",),
}


def split_of(numbers: Sequence[int]) -> Split:
    """The split to which a prompt belongs that shows these numbers in digits, in any order."""
    text = " ".join(map(str, sorted(numbers)))
    return SPLITS[int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % len(SPLITS)]


class WordMath:
    """The family (`Family` of tasks/base.py).

    Args:
      interpreter: The tool that runs the programs, named "code_interpreter", with one argument "code".
      seed: Other seeds give other tasks.
      slack: Tool calls an attempt may make beyond its difficulty.

    A task's meta holds `chain`, the arithmetic as [operator, left, right] with operands that are integers or "#k" for
    the result of operation k (1-based), `results`, the value of each operation, and `distractors`, the numbers in the
    prompt that no answer needs.
    """

    name = "wordmath"
    checker = "last \\boxed{} of the final turn, exact number"

    def __init__(self, interpreter: Tool, seed: int = 0, slack: int = 2):
        if interpreter.name != "code_interpreter":
            raise ValueError(f"wordmath needs the tool code_interpreter, not {interpreter.name}")
        if slack < 0:
            raise ValueError(f"slack={slack} must be 0 or more: an attempt needs as many calls as its difficulty")
        self.tools: tuple[Tool, ...] = (interpreter,)
        self._seed = seed
        self._slack = slack

    def size(self, split: Split) -> None:
        """None: endless."""
        return None

    def task(self, split: Split, index: int, difficulty: int) -> Task:
        """Task number `index` of a split, with `difficulty` operations.

        Raises:
          ValueError: For an unknown split, a negative index or a difficulty outside 2..10.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
        if index < 0:
            raise ValueError(f"task index {index} must be 0 or more")
        if not EASIEST <= difficulty <= HARDEST:
            raise ValueError(f"wordmath has difficulties {EASIEST} to {HARDEST}, not {difficulty}")
        name = f"{self.name}/{split}/{index}/d{difficulty}"
        rng = random.Random(f"{self._seed}/{name}")
        plot = draw_plot(rng, difficulty)
        while split_of(plot.numbers()) != split:
            plot = draw_plot(rng, difficulty)
        distractors = [*plot.idle, *([] if plot.date is None else [plot.date])]
        return Task(
            id=name,
            uid=int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) >> 1,
            family=self.name,
            prompt=tell(plot, rng),
            answer=str(plot.results[-1]),
            max_steps=difficulty + self._slack,
            difficulty=difficulty,
            meta={
                "chain": [list(operation) for operation in plot.chain],
                "results": list(plot.results),
                "distractors": distractors,
            },
        )

    def start(self, task: Task, key: int) -> State | None:
        """None: programs share nothing."""
        return None

    def grade(self, task: Task, final_text: str, state: State | None) -> Grade:
        r"""Compares the last `\boxed{}` of the final turn with the answer, as numbers."""
        return grade_boxed(final_text, task.answer)

    def demonstrate(self, task: Task, rng: np.random.Generator, mistake_rate: float = 0.0) -> Demonstrator:
        """One operation per turn, each on the results that the tool gave, then the answer.

        Before each operation it slips with probability `mistake_rate`, again and again while calls are left to redo it.
        """
        dice = random.Random(int(rng.integers(2**62)))
        spare = task.max_steps - task.difficulty
        results: list[str] = []
        for number in range(task.difficulty):
            said = ""
            while spare > 0 and dice.random() < mistake_rate:
                spare -= 1
                kind = dice.choices(tuple(MISTAKES), tuple(MISTAKES.values()))[0]
                yield said + _mistaken_turn(kind, task, number, results, dice)
                said = dice.choice(REPAIRS[kind]) + "\n"
            turn = said + _call(_program(_expression(task.meta["chain"][number], results), dice))
            result = yield turn
            while result.status is not Status.OK:  # the tool's own trouble, such as a time-out on a busy machine
                result = yield turn
            results.append(result.text.strip())
        yield f"The answer is \\boxed{{{results[-1]}}}."

    def demonstrable(self, split: Split) -> Iterator[int]:
        """All of them."""
        return itertools.count()

    def first_irrecoverable(self, task: Task, states: Sequence[State | None]) -> None:
        """None: what a wrong result has spoiled is in the attempt's text, not in a world."""
        return None


def _call(code: str) -> str:
    return call_text("code_interpreter", {"code": code})


def _expression(operation: Sequence, results: Sequence[str]) -> str:
    operator, *operands = operation
    left, right = (results[int(o[1:]) - 1] if isinstance(o, str) else str(o) for o in operands)
    return f"{left} {operator} {right}"


def _program(expression: str, dice: random.Random) -> str:
    """A program that shows the value: mostly the bare expression."""
    return expression if dice.random() < 0.9 else dice.choice((f"x = {expression}\nx", f"print({expression})"))


def _mistaken_turn(kind: str, task: Task, number: int, results: Sequence[str], dice: random.Random) -> str:
    """A turn that gets operation `number` (0-based) wrong in the given way."""
    operation = task.meta["chain"][number]
    expression = _expression(operation, results)
    if kind == "malformed":
        call = _call(expression)
        return dice.choice((call.replace("}}", "}"), call.replace('"}}', "}}"), call.replace('"arguments": ', "")))
    if kind == "silent":
        return _call(f"x = {expression}")
    if kind == "typo":
        left, operator, right = expression.split(" ")
        return _call(dice.choice((f"x {operator} {right}", f"{left} {operator} + * {right}", f"({expression}")))
    return _call(_expression(_wrong(kind, operation, task.meta, number, dice), results))


def _wrong(kind: str, operation: Sequence, meta: Mapping[str, Any], number: int, dice: random.Random) -> list:
    """The operation with another operator, or with another number, such that its value differs."""
    operator, *operands = operation
    if kind == "operation":
        options = [[o, *operands] for o in ("+", "-", "*", "//") if o != operator]
    else:
        literals = [side for side in (0, 1) if not isinstance(operands[side], str)] or [1]
        side = dice.choice(literals)
        others = [o for step in meta["chain"] for o in step[1:] if not isinstance(o, str)] + meta["distractors"]
        others = [n for n in others if n not in operands] or [dice.randrange(2, 100)]
        options = [[operator, *(n if at == side else o for at, o in enumerate(operands))] for n in others]
    options = [option for option in options if _value(option, meta["results"]) != meta["results"][number]]
    # With operands of 2 and more, this one is always wrong.
    return dice.choice(options) if options else ["-" if operator in "+*" else "+", *operands]


def _value(operation: Sequence, results: Sequence[int]) -> int:
    operator, *operands = operation
    left, right = (results[int(o[1:]) - 1] if isinstance(o, str) else o for o in operands)
    return {"+": left + right, "-": left - right, "*": left * right, "//": left // right}[operator]
