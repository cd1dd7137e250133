"""Held-out evaluation: avg@k, pass@k and maj@k with bootstrap confidence intervals, always beside their protocol."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from math import comb

import numpy as np

from elpo_jax.rollout.agent import Environment
from elpo_jax.rollout.collect import sample
from elpo_jax.rollout.sampler import Sampler
from elpo_jax.tasks.base import Task
from elpo_jax.trees.trajectory import Trajectory

# Evaluations draw from their own PRNG streams: a training step never has this number.
EVAL_STREAM = 1_000_000_000

_DOUBLES = tuple(2**i for i in range(1, 31))


def average_at_k(success: np.ndarray) -> np.ndarray:
    """bool [tasks, k] -> float64 [tasks], the mean over a task's attempts."""
    return success.mean(axis=1, dtype=np.float64)


def pass_at_k(success: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k: 1 - C(n-c, k) / C(n, k) of bool [tasks, n] with c successes each; float64 [tasks]."""
    n = success.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs between {k} and more attempts per task, not {n}")
    return np.array([1.0 - comb(n - c, k) / comb(n, k) for c in success.sum(axis=1).tolist()])


def majority_at_k(answers: Sequence[Sequence[str]], success: np.ndarray) -> np.ndarray:
    """Is the most frequent answer of a task's attempts right? float64 [tasks].

    Attempts without an answer ("") do not vote. A tie goes to the answer that was given first. With no vote at all the
    task counts as failed. `success` is bool [tasks, k].
    """
    out = np.zeros(len(answers))
    for i, given in enumerate(answers):
        votes = collections.Counter(answer for answer in given if answer)  # insertion order breaks ties
        if votes:
            winner = max(votes, key=votes.__getitem__)
            out[i] = success[i][list(given).index(winner)]
    return out


def bootstrap_interval(values: np.ndarray, samples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap over tasks of the mean of float [tasks]: (low, high)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (samples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(tasks: Sequence[Task], attempts: Sequence[Sequence[Trajectory]], bootstrap: int, seed: int) -> dict:
    """All figures of one family: `attempts[i]` are the k attempts at `tasks[i]`. Keys as in a run's eval/NAME.json.

    The same figures are given over all tasks and, under "by_difficulty", over those of each difficulty: avg@k with "ci"
    and "n" tasks; pass@j for j = 2, 4, ... below k and for k; maj@k; mean tool calls and model tokens of an attempt.
    "per_task" lists the share of successes task by task, for paired comparisons of two policies.
    """
    success = np.array([[a.success for a in row] for row in attempts])
    k = success.shape[1]

    def figure(values: np.ndarray) -> dict:
        return {"value": float(values.mean()), "ci": list(bootstrap_interval(values, bootstrap, seed))}

    def figures(rows: Sequence[int]) -> dict:
        average = figure(average_at_k(success[rows]))
        chosen = [attempts[i] for i in rows]
        flat = [attempt for row in chosen for attempt in row]
        return {
            f"avg@{k}": average["value"],
            "ci": average["ci"],
            "n": len(rows),
            **{f"pass@{j}": figure(pass_at_k(success[rows], j)) for j in (*takewhile(lambda j: j < k, _DOUBLES), k)},
            f"maj@{k}": figure(majority_at_k([[a.answer for a in row] for row in chosen], success[rows])),
            "tool_calls": float(np.mean([sum(s.is_tool_call for s in a.steps) for a in flat])),
            "tokens": float(np.mean([sum(len(s.turn) for s in a.steps) for a in flat])),
        }

    difficulty = np.array([task.difficulty for task in tasks])
    flat = [a for row in attempts for a in row]
    statuses = collections.Counter(s.result.status.value for a in flat for s in a.steps if s.result is not None)
    return {
        **figures(range(len(tasks))),
        "by_difficulty": {str(d): figures(np.flatnonzero(difficulty == d)) for d in sorted(set(difficulty.tolist()))},
        "per_task": average_at_k(success).tolist(),
        "status": dict(statuses),
        "finish": dict(collections.Counter(a.finish.value for a in flat)),
    }


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How an accuracy was measured; printed beside it."""

    split: str
    families: Mapping[str, str]  # how many tasks of each, and of what kind
    k: int  # attempts at each task
    temperature: float
    top_p: float
    seed: int
    max_turn_tokens: int
    context: int
    isolation: str  # of model-written programs
    checkers: Mapping[str, str]  # by family: what decides whether an attempt succeeded
    own_k: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by family, where it is not `k`
    majority_ties: str = "first answer given; empty answers do not vote"
    interval: str = "95 % percentile bootstrap over tasks"

    def k_of(self, family: str) -> int:
        """Attempts at each task of a family."""
        return self.own_k.get(family, self.k)

    def line(self) -> str:
        families, checkers = (
            "; ".join(f"{family}: {text}" for family, text in of.items()) for of in (self.families, self.checkers)
        )
        own = "".join(f" ({family}: {k})" for family, k in self.own_k.items())
        return (
            f"{self.split} split ({families}), k={self.k}{own}, temperature {self.temperature:g}, "
            f"top-p {self.top_p:g}, seed {self.seed}, turn <= {self.max_turn_tokens} tokens, context {self.context}; "
            f"isolation of programs: {self.isolation.replace('unsafe', 'NONE (unsafe)')}; checker: {checkers}; "
            f"maj@k ties: {self.majority_ties}; {self.interval}"
        )


def evaluate(
    name: str,
    tasks: dict[str, list[Task]],
    protocol: Protocol,
    environment: Environment,
    sampler: Sampler,
    bootstrap: int,
    progress: Callable[[int], None] = lambda rollouts: None,
) -> dict:
    """Plays `protocol.k_of(family)` attempts at each family's tasks and returns the content of eval/NAME.json."""
    of: dict[int, list[Trajectory]] = {}
    for k in dict.fromkeys(map(protocol.k_of, tasks)):  # families that share k are played together
        members = [task for family, those in tasks.items() if protocol.k_of(family) == k for task in those]
        done = sum(map(len, of.values()))
        attempts = sample(
            members,
            k,
            environment,
            sampler,
            seed=protocol.seed,
            step=EVAL_STREAM,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            progress=lambda rollouts, done=done: progress(done + rollouts),
        )
        of |= {task.uid: row for task, row in zip(members, attempts, strict=True)}
    return {
        "name": name,
        "protocol": dataclasses.asdict(protocol),
        "families": {
            family: summarise(members, [of[task.uid] for task in members], bootstrap, protocol.seed)
            for family, members in tasks.items()
        },
    }
