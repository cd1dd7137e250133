"""Small real trajectories, tasks and trees for tests."""

from collections.abc import Callable, Sequence

import numpy as np

from elpo_jax.tasks.base import Task
from elpo_jax.tools.base import Status, ToolCall, ToolResult
from elpo_jax.trees.grow import Growth, Rollout
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory
from elpo_jax.trees.tree import Leaf, RolloutTree, SearchRecord

PROMPT = Segment(Author.ENVIRONMENT, np.array([1, 2, 3], np.int32))


def make_task(uid: int = 7) -> Task:
    return Task(
        id=f"toy/train/{uid}",
        uid=uid,
        family="toy",
        prompt="Do it.",
        answer="42",
        max_steps=9,
        difficulty=3,
        meta={"n": 1},
    )


def make_step(status: Status | None, entropy: float = 0.5, tokens: int = 2, *, seed: int = 0) -> Step:
    """A step of `tokens` random ids whose entropies are all `entropy`; `status` None is a final turn without a call."""
    rng = np.random.default_rng(seed)
    turn = Segment(
        Author.MODEL,
        rng.integers(4, 90, tokens).astype(np.int32),
        -rng.random(tokens).astype(np.float32),
        np.full(tokens, entropy, np.float32),
    )
    if status is None:
        return Step(turn, text="\\boxed{42}")
    call = None if status == Status.MALFORMED else ToolCall("calculator", {"expression": f"{seed} + 1"})
    response = Segment(Author.ENVIRONMENT, np.array([2, 60 + seed % 9, 3], np.int32))
    return Step(turn, call, ToolResult(status, f"saw {seed}", "cause"), response, text=f"call {seed}")


def make_trajectory(
    statuses: Sequence[Status] | int,
    success: bool = False,
    reward: float | None = None,
    *,
    parent: Trajectory | None = None,
    anchor: int = 0,
    entropies: Sequence[float] | float = 0.5,
    tokens: int = 2,
    seed: int = 0,
) -> Trajectory:
    """An attempt with these tool calls (a number: that many `ok` ones) and a final answer.

    Args:
      statuses: Of all tool calls, those of the shared prefix included.
      success: Whether it succeeded.
      reward: By default 1 or 0.
      parent: Attempt whose first `anchor` steps it shares by identity.
      anchor: Number of shared steps.
      entropies: Of each turn, the final one included, or of all.
      tokens: Per turn.
      seed: Determines the ids.
    """
    statuses = [Status.OK] * statuses if isinstance(statuses, int) else list(statuses)
    turns = [*statuses, None]
    values = [entropies] * len(turns) if isinstance(entropies, int | float) else list(entropies)
    shared = () if parent is None else parent.steps[:anchor]
    own = tuple(make_step(turns[i], values[i], tokens, seed=100 * seed + i) for i in range(anchor, len(turns)))
    return Trajectory(
        PROMPT if parent is None else parent.prompt,
        shared + own,
        Finish.ANSWER,
        success,
        float(success) if reward is None else reward,
        "correct" if success else "wrong answer",
        "42" if success else "41",
    )


def make_tree(
    shape: Sequence[tuple[int | None, int, Sequence[Status] | int, bool]], *, failure: float = 0.0, **fields
) -> RolloutTree:
    """A tree from (parent, anchor, statuses, success) of each leaf; `fields` go to `RolloutTree`."""
    leaves: list[Leaf] = []
    for index, (parent, anchor, statuses, success) in enumerate(shape):
        above = None if parent is None else leaves[parent].trajectory
        reward = 1.0 if success else failure
        trajectory = make_trajectory(statuses, success, reward, parent=above, anchor=anchor, seed=index)
        leaves.append(Leaf(trajectory, parent, anchor))
    return RolloutTree(make_task(), tuple(leaves), **fields)


def random_tree(rng: np.random.Generator, roots: int = 3, levels: int = 3) -> RolloutTree:
    """Roots, continuations of failed ones from random steps, continuations of those, ...; searches that named a step.

    Some searches name a step that a continuation survived, some are not verified, and lengths and rewards differ.
    """
    leaves: list[Leaf] = []
    searches: list[SearchRecord] = []

    def attempt(parent: int | None, anchor: int) -> None:
        above = None if parent is None else leaves[parent].trajectory
        calls = max(anchor, int(rng.integers(0, 4))) + int(parent is not None and rng.integers(0, 2))
        success = bool(rng.random() < 0.35)
        reward = 1.0 if success else float(rng.choice([0.0, -0.5, -1.1]))
        trajectory = make_trajectory(
            calls,
            success,
            reward,
            parent=above,
            anchor=anchor,
            tokens=int(rng.integers(1, 4)),
            seed=int(rng.integers(10**6)),
        )
        leaves.append(Leaf(trajectory, parent, anchor))

    for _ in range(roots):
        attempt(None, 0)
    former: list[int] = []
    for _ in range(levels - 1):
        own = range(len(leaves))
        failed = [i for i in own if i not in former and not leaves[i].trajectory.success]
        former = list(own)
        for leaf in failed:
            steps = len(leaves[leaf].trajectory.steps)
            for _ in range(int(rng.integers(0, 4)) if steps > 1 else 0):
                attempt(leaf, int(rng.integers(1, steps)))
            named = int(rng.integers(0, steps + 1))
            searches.append(SearchRecord(leaf, "binary", named, bool(rng.random() < 0.6)))
    return RolloutTree(make_task(), tuple(leaves), tuple(searches))


def grow(
    growth: Growth,
    attempt: Callable[[Rollout, Trajectory | None], Trajectory | None],
    rng: np.random.Generator | None = None,
) -> RolloutTree:
    """Runs a `Growth` to its end, in an order of arrival that `rng` draws.

    Args:
      growth: To run.
      attempt: Given a rollout and its parent's trajectory, how it ended; None for an infrastructure failure.
      rng: None for the order of proposal.
    """
    trajectories: dict[int, Trajectory] = {}
    running: list[Rollout] = []
    while not growth.done:
        running += growth.propose()
        rollout = running.pop(0 if rng is None else int(rng.integers(len(running))))
        parent = None if rollout.parent is None else trajectories[rollout.parent]
        trajectory = attempt(rollout, parent)
        if trajectory is not None:
            trajectories[rollout.index] = trajectory
        growth.observe(rollout.index, trajectory)
    assert not running and not growth.propose()
    return growth.tree()
