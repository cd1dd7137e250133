"""Grows one rollout tree per task, all of them at once.

Each task's `Growth` is a sequential state machine that decides from which prefixes to sample; this loop runs many of
them side by side, so the sampler's batch stays full although one search has to wait for its probes.
"""

from collections import deque
from collections.abc import Callable, Sequence

from elpo_jax.rollout.agent import Environment, Start, play
from elpo_jax.rollout.sampler import Sampler
from elpo_jax.tasks.base import Task
from elpo_jax.tools.base import InfrastructureError
from elpo_jax.trees.grow import Growth, SearchConfig
from elpo_jax.trees.trajectory import Segment, Trajectory
from elpo_jax.trees.tree import RolloutTree


def collect(
    tasks: Sequence[Task],
    search: SearchConfig,
    environment: Environment,
    sampler: Sampler,
    *,
    seed: int,
    step: int,
    temperature: float,
    top_p: float = 1.0,
    progress: Callable[[int], None] = lambda rollouts: None,
) -> list[RolloutTree]:
    """One tree per task, in order, each of at most `search.budget` attempts (paper Algorithm 1).

    Args:
      tasks: Distinct tasks.
      search: Budget, buffer, localizer and continuation counts.
      environment: Tools, families and chat format.
      sampler: With the policy's parameters loaded.
      seed: Seeds worlds and the random localizer.
      step: Training step; part of every PRNG stream.
      temperature: Sampling temperature.
      top_p: Share of the probability that is sampled from.
      progress: Called with the number of attempts finished so far.
    """
    growths = {task.uid: Growth(task, search, seed) for task in tasks}
    if len(growths) < len(tasks):
        raise ValueError("a batch names the same task twice: each task grows one tree")
    prompts = {task.uid: environment.prompt(task) for task in tasks}
    leaves: dict[int, dict[int, Trajectory]] = {task.uid: {} for task in tasks}
    waiting: deque[Start] = deque()
    ended = 0

    def propose(growth: Growth, uid: int, prompt: Segment) -> None:
        for rollout in growth.propose():
            parent = () if rollout.parent is None else leaves[uid][rollout.parent].steps[: rollout.anchor]
            waiting.append(Start(growth.task, prompt, parent, rollout.index))

    def starts(free: int) -> list[Start]:
        return [waiting.popleft() for _ in range(min(free, len(waiting)))]

    def finished(start: Start, trajectory: Trajectory | None) -> None:
        nonlocal ended
        uid = start.task.uid
        if trajectory is not None:
            leaves[uid][start.attempt] = trajectory
        growths[uid].observe(start.attempt, trajectory)
        propose(growths[uid], uid, prompts[uid])
        ended += 1
        progress(ended)

    for task in tasks:
        propose(growths[task.uid], task.uid, prompts[task.uid])
    play(environment, sampler, starts, finished, seed=seed, step=step, temperature=temperature, top_p=top_p)
    return [growths[task.uid].tree() for task in tasks]


def sample(
    tasks: Sequence[Task],
    k: int,
    environment: Environment,
    sampler: Sampler,
    *,
    seed: int,
    step: int,
    temperature: float,
    top_p: float = 1.0,
    progress: Callable[[int], None] = lambda rollouts: None,
) -> list[list[Trajectory]]:
    """`k` independent attempts at each task, in order (evaluation). Attempts lost to our machinery are played again.

    Raises:
      InfrastructureError: If the tools keep failing; an accuracy over what is left would be biased.
    """
    search = SearchConfig(budget=k, localizer="none")
    trees = collect(
        tasks,
        search,
        environment,
        sampler,
        seed=seed,
        step=step,
        temperature=temperature,
        top_p=top_p,
        progress=progress,
    )
    for tree in trees:
        if len(tree.leaves) < k:
            raise InfrastructureError(
                f"{tree.infrastructure_failures} attempts at {tree.task.id} were lost to tool failures of ours; "
                "no accuracy is reported over what is left: see `python -m elpo_jax.tools.sandbox check`, and run again"
            )
    return [[leaf.trajectory for leaf in tree.leaves] for tree in trees]
