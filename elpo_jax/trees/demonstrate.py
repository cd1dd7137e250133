"""Plays the reference policies of the task families with the real tools.

A demonstration has exactly the shape of an attempt of the agent loop, only that its turns were written as text and
carry no log-probabilities. Many are played side by side, so the tools answer them together.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from elpo_jax.tasks.base import Demonstrator, Family, Task
from elpo_jax.text.chat import Chat
from elpo_jax.text.parser import Turn
from elpo_jax.tools.base import InfrastructureError, State, Status, ToolResult
from elpo_jax.tools.toolbox import Request, ToolBox
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory


@dataclasses.dataclass(eq=False)
class _Play:
    """A demonstration under way: its next turn is `text`."""

    family: Family
    task: Task
    demonstrator: Demonstrator
    state: State | None
    prompt: Segment
    text: str
    steps: list[Step] = dataclasses.field(default_factory=list)
    finish: Finish | None = None


def demonstrate(
    family: Family,
    task: Task,
    toolbox: ToolBox,
    chat: Chat,
    rng: np.random.Generator,
    mistake_rate: float = 0.0,
    key: int = 0,
) -> Trajectory:
    """One graded demonstration.

    Args:
      family: The task's family.
      task: What to demonstrate.
      toolbox: Serves the family's tools.
      chat: Turns text into ids.
      rng: Drives the reference policy.
      mistake_rate: Probability that it slips at a turn (and repairs).
      key: Drives the randomness of the task's world.

    Raises:
      InfrastructureError: If a tool itself broke.
    """
    return _finish([_begin(family, task, chat, rng, mistake_rate, key)], toolbox, chat)[0]


def demonstrations(
    families: Mapping[str, Family],
    tasks: Iterable[Task],
    toolbox: ToolBox,
    chat: Chat,
    *,
    seed: int,
    mistake_rate: float = 0.0,
    together: int = 1024,
) -> Iterator[Trajectory]:
    """One graded demonstration per task, in order; each depends on `seed` and its task alone.

    Where a world is noisy a reference policy can fail: `success` says so.

    Args:
      families: By name.
      tasks: What to demonstrate.
      toolbox: Serves the families' tools.
      chat: Turns text into ids.
      seed: Drives reference policies and worlds.
      mistake_rate: Probability that a reference policy slips at a turn (and repairs).
      together: Demonstrations played side by side.

    Raises:
      InfrastructureError: If a tool itself broke.
    """
    remaining = iter(tasks)
    while block := list(itertools.islice(remaining, together)):
        plays = []
        for task in block:
            rng = np.random.default_rng((seed, task.uid))
            key = int(rng.integers(2**62))
            plays.append(_begin(families[task.family], task, chat, rng, mistake_rate, key))
        yield from _finish(plays, toolbox, chat)


def _begin(family: Family, task: Task, chat: Chat, rng: np.random.Generator, mistake_rate: float, key: int) -> _Play:
    demonstrator = family.demonstrate(task, rng, mistake_rate)
    prompt = Segment(Author.ENVIRONMENT, chat.prompt(task.prompt, family.tools))
    return _Play(family, task, demonstrator, family.start(task, key), prompt, next(demonstrator))


def _finish(plays: list[_Play], toolbox: ToolBox, chat: Chat) -> list[Trajectory]:
    """Plays all to their end: every round takes one turn of each, and the tools answer the round together."""
    live = plays
    while live:
        turns = [(play, Segment(Author.MODEL, chat.turn(play.text))) for play in live]
        parsed = [chat.parse(segment.ids) for _, segment in turns]
        requests = [
            Request(turn.call, play.state)
            for (play, _), turn in zip(turns, parsed, strict=True)
            if turn.call is not None and len(play.steps) < play.task.max_steps
        ]
        answers = iter(toolbox.run_many(requests))
        for (play, segment), turn in zip(turns, parsed, strict=True):
            answered = turn.call is None and turn.error is None
            if answered or len(play.steps) >= play.task.max_steps:
                play.steps.append(Step(segment, state=play.state, text=turn.text))
                play.finish = Finish.ANSWER if answered else Finish.MAX_STEPS
            else:
                result, play.state = next(answers) if turn.call is not None else (turn.error, play.state)
                _answer(play, segment, turn, result, chat)
        live = [play for play in live if play.finish is None]
    return [_graded(play) for play in plays]


def _answer(play: _Play, segment: Segment, turn: Turn, result: ToolResult, chat: Chat) -> None:
    """Records the tool's answer as a step and asks the reference policy for its next turn."""
    if result.status is Status.SANDBOX_ERROR:
        raise InfrastructureError(f"a tool broke while demonstrating {play.task.id} ({result.detail}): try again")
    response = Segment(Author.ENVIRONMENT, chat.response(result))
    play.steps.append(Step(segment, turn.call, result, response, play.state, turn.text))
    play.text = play.demonstrator.send(result)


def _graded(play: _Play) -> Trajectory:
    text = play.steps[-1].text if play.finish is Finish.ANSWER else ""
    grade = play.family.grade(play.task, text, play.state)
    reason = "out of tool calls; " + grade.reason if play.finish is Finish.MAX_STEPS else grade.reason
    steps = tuple(play.steps)
    return Trajectory(play.prompt, steps, play.finish, grade.success, grade.reward, reason, grade.answer)
