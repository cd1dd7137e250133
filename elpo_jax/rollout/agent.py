"""The agent loop: plays attempts to their end, many at once, while their tools run on the host.

Token-in, token-out: an attempt is the ids that were sampled and the ids the environment appended; text is decoded only
for the tool parser and the grader. One visit of the loop dispatches a burst of decoding to the device and meanwhile
starts the tools of the turns that ended in the visit before, so host and device overlap. An answer is waited for at a
fixed number of visits, hence the schedule, and with it every number, does not depend on how long a tool took.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from elpo_jax.rollout.sampler import Completion, Request, Sampler
from elpo_jax.tasks.base import Family, Grade, Task
from elpo_jax.tasks.rewards import Reward
from elpo_jax.text.chat import Chat
from elpo_jax.text.parser import Turn
from elpo_jax.tools.base import InfrastructureError, State, Status, ToolResult
from elpo_jax.tools.sandbox import Sandbox
from elpo_jax.tools.toolbox import Request as ToolRequest
from elpo_jax.tools.toolbox import ToolBox
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory, segments


@dataclasses.dataclass(frozen=True)
class Environment:
    """Everything an attempt meets outside the policy."""

    families: Mapping[str, Family]
    toolboxes: Mapping[str, ToolBox]  # by family: a tool that a task does not offer is unknown to it
    chat: Chat
    max_turn_tokens: int
    sandbox: Sandbox | None = None  # where the tools run programs; None where none of them does
    reward: Reward = Reward()
    tool_visits: int = 1  # after how many visits of the sampler an answer is waited for

    @property
    def isolation(self) -> str:
        """What keeps model-written programs apart from this machine; "none needed" where there are none."""
        return "none needed" if self.sandbox is None else self.sandbox.backend

    def prompt(self, task: Task) -> Segment:
        """The opening tokens of a task, up to where the model's first turn begins."""
        return Segment(Author.ENVIRONMENT, self.chat.prompt(task.prompt, self.families[task.family].tools))

    def check(self, task: Task, context: int) -> None:
        """Raises ValueError if the task's prompt leaves no room for a turn."""
        length = len(self.prompt(task))
        if length + self.max_turn_tokens > context:
            row = f" (row {task.meta['row']})" if "row" in task.meta else ""
            raise ValueError(
                f"the prompt of {task.id}{row} has {length} tokens and a turn may have {self.max_turn_tokens}, more "
                f"than sampler.context={context}: raise sampler.context, choose lower difficulties, or leave the row "
                "out of the data set"
            )
        if self.reward.overlong_buffer > context - length:
            raise ValueError(
                f"reward.overlong_buffer={self.reward.overlong_buffer} is longer than what sampler.context={context} "
                f"leaves for an attempt at {task.id}, {context - length} tokens: lower it"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Where an attempt begins: the prompt, or the state after the last of `steps` of another attempt."""

    task: Task
    prompt: Segment  # one object per task, so that its attempts share it
    steps: tuple[Step, ...]
    attempt: int  # number within the task's tree; part of the PRNG stream


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A turn whose tool is at work."""

    attempt: "_Live"
    segment: Segment
    turn: Turn
    future: Future[tuple[ToolResult, State | None]] | None  # None where the turn is no call that a tool could take

    def result(self) -> tuple[ToolResult, State | None]:
        """The answer and the world after it, as soon as they are there."""
        return (self.turn.error, self.attempt.state) if self.future is None else self.future.result()


@dataclasses.dataclass(eq=False)
class _Live:
    """An attempt under way."""

    start: Start
    steps: list[Step]
    state: State | None
    ticket: int = -1


def world_key(*parts: int) -> int:
    """A 63-bit key for the randomness of one attempt's world, from what identifies the attempt."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def play(
    environment: Environment,
    sampler: Sampler,
    starts: Callable[[int], Sequence[Start]],
    finished: Callable[[Start, Trajectory | None], None],
    *,
    seed: int,
    step: int,
    temperature: float,
    top_p: float = 1.0,
) -> None:
    """Plays attempts until `starts` has none left and all have ended.

    Args:
      environment: Tools, families and chat format.
      sampler: With the policy's parameters loaded.
      starts: Called with the number of free slots; returns at most that many attempts to begin now. Called again after
        attempts have ended, so a search can decide its next wave.
      finished: Called once per attempt, in a reproducible order; with None if our machinery failed it.
      seed: Seeds the worlds (the sampler has its own seed).
      step: Training step; part of the PRNG stream.
      temperature: Sampling temperature; 0 is greedy.
      top_p: Share of the probability that is sampled from.
    """
    live: dict[int, _Live] = {}
    ended: list[Completion] = []
    at_work: deque[list[_Call]] = deque([] for _ in range(environment.tool_visits - 1))
    while True:
        for start in starts(sampler.free_slots):
            attempt = _Live(start, list(start.steps), _world(environment, start, seed, step))
            _continue(attempt, environment, sampler, live, finished, step)
        if not live and not any(at_work):
            return
        sampler.start_visit(temperature, top_p)
        at_work.append(_call(ended, environment, sampler, live, finished))
        _answer(at_work.popleft(), environment, sampler, live, finished, step)
        ended = sampler.finish_visit()


def _world(environment: Environment, start: Start, seed: int, step: int) -> State | None:
    key = world_key(seed, step, start.task.uid, start.attempt)
    if not start.steps:
        return environment.families[start.task.family].start(start.task, key)
    state = start.steps[-1].state
    return None if state is None else state.fork(key)


def _call(ended, environment, sampler, live, finished) -> list[_Call]:
    """Parses the turns that ended, and starts their tools or ends their attempts."""
    calls = []
    for completion in ended:
        attempt = live.pop(completion.ticket)
        attempt.ticket = completion.ticket
        turn = environment.chat.parse(completion.segment.ids)
        answered = sum(s.is_tool_call for s in attempt.steps)
        wants_tool = completion.stopped and (turn.call is not None or turn.error is not None)
        if not wants_tool or answered >= attempt.start.task.max_steps:
            attempt.steps.append(Step(completion.segment, state=attempt.state, text=turn.text))
            finish = Finish.ANSWER if completion.stopped else Finish.LENGTH
            _end(attempt, Finish.MAX_STEPS if wants_tool else finish, environment, sampler, finished)
            continue
        toolbox = environment.toolboxes[attempt.start.task.family]
        future = toolbox.submit(ToolRequest(turn.call, attempt.state)) if turn.call is not None else None
        calls.append(_Call(attempt, completion.segment, turn, future))
    return calls


def _answer(calls: list[_Call], environment, sampler, live, finished, step) -> None:
    """Waits for tools, and lets their attempts go on."""
    for call in calls:
        attempt, segment, turn = call.attempt, call.segment, call.turn
        result, attempt.state = call.result()
        if result.status is Status.SANDBOX_ERROR:
            sampler.release(attempt.ticket)
            finished(attempt.start, None)
            continue
        response = _response(environment, sampler, attempt, segment, result)
        attempt.steps.append(Step(segment, turn.call, result, response, attempt.state, turn.text))
        _continue(attempt, environment, sampler, live, finished, step)


def _response(environment, sampler, attempt, segment: Segment, result: ToolResult) -> Segment | None:
    """The environment's tokens; None where the context has no room for them and one more token."""
    ids = environment.chat.response(result)
    used = sum(map(len, segments(attempt.start.prompt, tuple(attempt.steps)))) + len(segment)
    return Segment(Author.ENVIRONMENT, ids) if used + len(ids) < sampler.context else None


def _continue(attempt: _Live, environment, sampler, live, finished, step) -> None:
    """Asks the sampler for the attempt's next turn, or ends it where the context is full."""
    if attempt.steps and attempt.steps[-1].response is None:
        _end(attempt, Finish.LENGTH, environment, sampler, finished)
        return
    prefix = segments(attempt.start.prompt, tuple(attempt.steps))
    room = sampler.context - sum(map(len, prefix))
    stream = (step, attempt.start.task.uid, attempt.start.attempt, len(attempt.steps) + 1)
    live[sampler.submit(Request(prefix, stream, min(room, environment.max_turn_tokens)))] = attempt


def _end(attempt: _Live, finish: Finish, environment, sampler, finished) -> None:
    """Grades the attempt by its final answer and its last world, and gives its slot back.

    An attempt that a broken grader could not grade is lost: nothing is learnt from it.
    """
    sampler.release(attempt.ticket)
    task = attempt.start.task
    text = attempt.steps[-1].text if finish is Finish.ANSWER else ""
    try:
        grade = environment.families[task.family].grade(task, text, attempt.state)
    except InfrastructureError:
        finished(attempt.start, None)
        return
    reason = {Finish.MAX_STEPS: "out of tool calls; ", Finish.LENGTH: "cut by a token limit; "}.get(finish, "")
    trajectory = Trajectory(
        attempt.start.prompt,
        tuple(attempt.steps),
        finish,
        grade.success,
        _reward(environment, sampler, attempt, grade),
        reason + grade.reason,
        grade.answer,
    )
    finished(attempt.start, trajectory)


def _reward(environment: Environment, sampler: Sampler, attempt: _Live, grade: Grade) -> float:
    """What the attempt is trained on, by what it came to and how long it was."""
    prompt, steps = attempt.start.prompt, tuple(attempt.steps)
    return environment.reward.shape(
        grade.success,
        getattr(grade, "score", None),
        turns=2 + 2 * sum(step.response is not None for step in steps),
        response_tokens=sum(map(len, segments(prompt, steps))) - len(prompt),
        model_tokens=sum(len(step.turn) for step in steps),
        max_tokens=sampler.context - len(prompt),
    )
