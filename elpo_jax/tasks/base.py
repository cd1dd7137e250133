"""A task, and the family that makes, demonstrates and grades it.

A task is a pure function of (seed, split, index, difficulty). Most families are procedural and endless, so a split is
never stored and never overlaps another one; a data set has as many tasks as rows.
"""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from elpo_jax.tools.base import State, Tool, ToolResult

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# A demonstrator yields the text of an assistant turn and is sent the tool's answer; it returns after its final answer.
Demonstrator = Generator[str, ToolResult, None]


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem to attempt.

    Attributes:
      id: Unique and stable: "family/split/index" (plus the difficulty where it is not a function of the index).
      uid: The same as a non-negative 31-bit integer, for PRNG keys.
      family: Name of the family that made it.
      prompt: The user's message.
      answer: Reference answer where there is one, for people and graders; never shown to the model.
      max_steps: Tool calls an attempt may make; a malformed call counts.
      difficulty: Number of tool calls that a flawless attempt needs.
      meta: What the family needs to start and grade an attempt (JSON-serialisable).
    """

    id: str
    uid: int
    family: str
    prompt: str
    answer: str
    max_steps: int
    difficulty: int
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grade:
    """Outcome of an attempt.

    Attributes:
      success: The correctness flag, which drives the search.
      reward: The training signal.
      reason: Short, for people: "correct", "wrong answer: ...", "no answer", "goal not reached: ...".
      answer: Canonical form of what was answered or reached: equal answers are equal strings (maj@k); "" if none.
    """

    success: bool
    reward: float
    reason: str
    answer: str = ""


class Family(Protocol):
    """A family of tasks. Its tools serve all its tasks."""

    name: str
    tools: tuple[Tool, ...]
    checker: str  # what decides whether an attempt succeeded, in words

    def size(self, split: Split) -> int | None:
        """How many different tasks a split has; None for endless."""

    def task(self, split: Split, index: int, difficulty: int) -> Task:
        """Task number `index` >= 0 of a split, with `difficulty` in 2..10 steps. Raises ValueError outside."""

    def start(self, task: Task, key: int) -> State | None:
        """The world before the first call; `key` drives its randomness. None for stateless families."""

    def grade(self, task: Task, final_text: str, state: State | None) -> Grade:
        """Grades an attempt by its last turn's text (which made no call; "" if there is none) and its last state."""

    def demonstrate(self, task: Task, rng: np.random.Generator, mistake_rate: float = 0.0) -> Demonstrator:
        """The reference policy. With `mistake_rate` > 0 it makes mistakes, each repaired before the final answer."""

    def demonstrable(self, split: Split) -> Iterator[int]:
        """The indices of a split's tasks that can be demonstrated, in order; without end where the tasks have none."""

    def first_irrecoverable(self, task: Task, states: Sequence[State | None]) -> int | None:
        """The exact first irrecoverable step of an attempt, for people and tests: nothing that learns may see it.

        Args:
          task: What was attempted.
          states: The world after each of the K steps that a tool or the parser's error answered, in order.

        Returns:
          The smallest m in 1..K after whose step no further calls could reach the goal; K + 1, the final turn, if the
          goal was in reach until then and the attempt ended without it; 0 if it ended with the goal reached; None if
          the family has no oracle.
        """
