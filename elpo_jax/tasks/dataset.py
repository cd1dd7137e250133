"""A data set as a family of tasks: its rows, in order or in a fresh order per pass, with the problem as the prompt.

What differs from the generated families: the training split goes round, the others end; nobody knows how many calls a
row needs, so every task has the difficulty 2 and the same number of calls; and a row is graded by the grader that its
answer needs.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from elpo_jax.tasks.base import SPLITS, Demonstrator, Grade, Split, Task
from elpo_jax.tasks.calculator_marks import ARGUMENTS, turns
from elpo_jax.tasks.prompts import prompt_of
from elpo_jax.tasks.rows import Conversation, DatasetError, Row
from elpo_jax.tools.base import State, Status, Tool

DIFFICULTY = 2

# Of a row's grader, the final turn's text, the reference and the row's meta.
GradeFunction = Callable[[str, str, str, Mapping[str, Any]], Grade]


@dataclasses.dataclass(frozen=True, repr=False)
class RowTask(Task):
    """A task from a row. Its `repr` does not quote the problem, which may be private."""

    def __repr__(self) -> str:
        return f"RowTask(id={self.id!r}, row={self.meta['row']!r})"


class DatasetFamily:
    """The family (`Family` of tasks/base.py).

    Args:
      name: Of the family; a task is "name/split/index".
      splits: Rows by split, as `store.open_splits` gives them.
      tool: The tool that attempts can call.
      grade: Grades a final turn.
      checker: What `grade` does, in words, for protocols.
      max_calls: Calls that an attempt may make; a malformed one counts.
      validation: Share of the training rows that is held out where there is no validation split. The problem's text
        decides, so equal problems are on one side.
      use: "train": no test tasks; "test": only those; "both": all.
      seed: Drives the order of the training tasks.
      plain: Prompts without instructions (`prompts.py`).

    A task's meta holds `row`, the row's id, `split` and `at`, where it is stored, `grader`, and of the row's own meta
    `subject`, `level`, `domain`, `source` and `private`, where they are known.

    Raises:
      DatasetError: If nothing is left to attempt, or the rows are conversations.
      ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        name: str,
        splits: Mapping[Split, Sequence[Row | Conversation]],
        tool: Tool,
        grade: GradeFunction,
        *,
        checker: str,
        max_calls: int = 16,
        validation: float = 0.05,
        use: Literal["train", "test", "both"] = "both",
        seed: int = 0,
        plain: bool = False,
    ):
        if max_calls < 0 or not 0 <= validation < 1:
            raise ValueError(f"max_calls={max_calls} must be 0 or more, and validation={validation} in [0, 1)")
        kept = {"train": ("train", "validation"), "test": ("test",), "both": SPLITS}[use]
        self._splits = {split: rows for split, rows in splits.items() if split in kept and len(rows)}
        if not self._splits:
            there = ", ".join(splits) or "none"
            raise DatasetError(f"data set {name}: no rows for use={use!r} (splits: {there}): correct use, or the path")
        if any(isinstance(rows[0], Conversation) for rows in self._splits.values()):
            raise DatasetError(f"data set {name} holds conversations, which can be imitated but not attempted")
        self.name = name
        self.tools: tuple[Tool, ...] = (tool,)
        self.checker = checker
        self._grade = grade
        self._max_calls = max_calls
        self._validation = validation
        self._seed = seed
        self._plain = plain

    def size(self, split: Split) -> int:
        """Number of rows of a split."""
        return len(self._places(split)[1])

    def task(self, split: Split, index: int, difficulty: int = DIFFICULTY) -> Task:
        """Task number `index` of a split; those of "train" go round, every pass in another order.

        Raises:
          ValueError: For an unknown or empty split, an index outside the split (below 0 for "train"), or a difficulty
            other than 2.
        """
        stored, places = self._places(split)
        if difficulty != DIFFICULTY:
            raise ValueError(f"{self.name} has the difficulty {DIFFICULTY} only, not {difficulty}")
        if not len(places):
            raise ValueError(f"{self.name} has no {split} tasks")
        if index < 0 or (split != "train" and index >= len(places)):
            raise ValueError(f"{self.name}/{split} has the tasks 0 to {len(places) - 1}, not {index}")
        if split == "train":
            epoch, at = divmod(index, len(places))
            at = places[_order(self._seed, epoch, len(places))[at]]
        else:
            at = places[index]
        at = int(at)
        row = self._splits[stored][at]
        name = f"{self.name}/{split}/{index}"
        shown = {key: row.meta[key] for key in ("subject", "level", "domain", "source", "private") if key in row.meta}
        return RowTask(
            id=name,
            uid=int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) >> 1,
            family=self.name,
            prompt=prompt_of(row, training=split == "train", plain=self._plain),
            answer=row.answer,
            max_steps=self._max_calls,
            difficulty=DIFFICULTY,
            meta={"row": row.id, "split": stored, "at": at, "grader": row.grader, **shown},
        )

    def start(self, task: Task, key: int) -> State | None:
        """None: calls share nothing."""
        return None

    def grade(self, task: Task, final_text: str, state: State | None) -> Grade:
        """Grades the final turn by the row's grader."""
        row = self._row(task)
        return self._grade(row.grader, final_text, row.answer, row.meta)

    def demonstrate(self, task: Task, rng: np.random.Generator, mistake_rate: float = 0.0) -> Demonstrator:
        """The row's own solution, with a call for each of its calculator marks.

        It makes no mistakes, whatever `mistake_rate`.

        Raises:
          ValueError: If the row's solution makes no transcript, or one with more calls than an attempt may make.
        """
        row, tool = self._row(task), self.tools[0].name
        try:
            said = self._turns(row)
        except ValueError as error:
            raise ValueError(f"{task.id} (row {row.id}) cannot be demonstrated with {tool}: {error}") from None
        return _play(said)

    def first_irrecoverable(self, task: Task, states: Sequence[State | None]) -> None:
        """None: what spoils an attempt is in its text, not in a world."""
        return None

    def demonstrable(self, split: Split) -> Iterator[int]:
        """The indices of a split, in order and once each, whose tasks can be demonstrated."""
        for index in range(self.size(split)):
            try:
                self._turns(self._row(self.task(split, index)))
            except ValueError:
                continue
            yield index

    def _row(self, task: Task) -> Row:
        return self._splits[task.meta["split"]][task.meta["at"]]

    def _turns(self, row: Row) -> list[str]:
        tool = self.tools[0].name
        if tool not in ARGUMENTS:
            raise ValueError(f"only {' and '.join(ARGUMENTS)} can run its marks")
        said = turns(str(row.meta.get("solution", "")), row.answer, tool)
        if len(said) - 1 > self._max_calls:
            raise ValueError(f"it makes {len(said) - 1} calls, and max_calls is {self._max_calls}")
        return said

    def _places(self, split: Split) -> tuple[Split, Sequence[int] | np.ndarray]:
        """Where a split's rows are: the stored split and the positions in it."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
        if split in ("train", "validation") and "train" in self._splits and "validation" not in self._splits:
            return "train", self._held_out[split]
        return split, range(len(self._splits.get(split, ())))

    @functools.cached_property
    def _held_out(self) -> dict[Split, np.ndarray]:
        """The positions of the training rows that stay, and of those that are held out."""
        rows = self._splits["train"]
        if not self._validation:
            return {"train": np.arange(len(rows)), "validation": np.arange(0)}
        held = np.array([_share(row.problem) < self._validation for row in rows])
        if held.all():
            raise DatasetError(
                f"data set {self.name}: validation={self._validation} leaves none of {len(rows)} rows to train on: "
                "lower it"
            )
        return {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}


def _share(problem: str) -> float:
    """A number in [0, 1) that only the problem's text decides, white space apart."""
    digest = hashlib.blake2b("".join(problem.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@functools.lru_cache(maxsize=16)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one pass."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def _play(said: Sequence[str]) -> Demonstrator:
    for turn in said[:-1]:
        result = yield turn
        while result.status is not Status.OK:  # the tool's own trouble, such as a time-out on a busy machine
            result = yield turn
    yield said[-1]
