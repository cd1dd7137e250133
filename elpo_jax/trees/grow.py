"""How a rollout tree grows: what to sample next for one prompt, under an exact budget (paper Algorithm 1).

`Growth` is a state machine without models or tools: it proposes rollouts, is told how they ended, and gives the tree.
It alternates between independent attempts, until a buffer holds enough failures, and the search for the first
irrecoverable step of one of them. A wave is judged only when all of it is in, so the tree does not depend on the order
in which rollouts arrive.
"""

import dataclasses
import math

import numpy as np

from elpo_jax.tasks.base import Task
from elpo_jax.trees.localize import LOCALIZERS, ErrorSearch, Localizer, make_search
from elpo_jax.trees.trajectory import Finish, Segment, Trajectory
from elpo_jax.trees.tree import Leaf, Probe, RolloutTree, SearchRecord, check_leaf


def mean_entropy(turn: Segment, window: int | None = None) -> float:
    """Mean of the entropies (eq. 3, nats) of a turn's first `window` tokens, or of all; 0 for a turn without tokens."""
    values = turn.entropies[:window]
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0


def step_gap(trajectory: Trajectory, m: int, window: int | None = None) -> float:
    """H_m^tool - H_root in nats: mean entropy of the turn after tool call m, less that of the first turn."""
    return mean_entropy(trajectory.steps[m].turn, window) - mean_entropy(trajectory.steps[0].turn, window)


def entropy_gap(trajectory: Trajectory, window: int | None = None) -> float:
    """H_tool - H_root in nats (eq. 4): the mean of the step gaps over all tool calls that a turn followed.

    Minus infinity without any, so that such an attempt, which has no step to search, is selected last.
    """
    steps = trajectory.num_tool_steps
    return sum(step_gap(trajectory, m, window) for m in range(1, steps + 1)) / steps if steps else -math.inf


def suffix_count(config: "SearchConfig", gap: float) -> int:
    """X_m = X_min + (X_max - X_min) * sigmoid(beta * (H_m^tool - H_root)) (eq. 5), halves rounded up.

    The paper's Figure 4 excludes rounding down: eq. 5 stays below X_max, and the figure samples X_max continuations.
    """
    sigmoid = 0.5 * (1.0 + math.tanh(0.5 * config.beta * gap))
    return math.floor(config.x_min + (config.x_max - config.x_min) * sigmoid + 0.5)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How the rollouts of one prompt are spent. The defaults are the paper's (Table 2).

    Attributes:
      budget: N_total: completed rollouts, independent attempts and continuations alike.
      buffer: B_max: failures to collect before one of them is searched.
      x_min: X_min of eq. 5: continuations per probe at least.
      x_max: X_max of eq. 5: continuations per probe at most.
      beta: Slope of eq. 5, per nat of entropy gap.
      localizer: How the first irrecoverable step is found. `none` and `feedback` sample the whole budget as independent
        attempts at once; `feedback` then names a step in every failed one, for that costs no rollout.
      entropy_window: Tokens at the start of a turn whose entropies are averaged; None for the whole turn.
      infrastructure_retries: How often one lost rollout is sampled again, outside the budget. A rollout that is lost
        once more ends the tree with what it has.

    Raises:
      ValueError: If a number is out of range.
    """

    budget: int = 16
    buffer: int = 3
    x_min: int = 1
    x_max: int = 3
    beta: float = 5.0
    localizer: Localizer = "binary"
    entropy_window: int | None = None
    infrastructure_retries: int = 3

    def __post_init__(self):
        if self.localizer not in LOCALIZERS:
            raise ValueError(f"search.localizer {self.localizer!r} is unknown; choose one of {', '.join(LOCALIZERS)}")
        for name in ("budget", "buffer", "x_min"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} is {getattr(self, name)}; it must be at least 1")
        if self.x_max < self.x_min:
            raise ValueError(f"search.x_max is {self.x_max}; it must be at least x_min, {self.x_min}")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"search.beta is {self.beta}; it must be a finite number of at least 0")
        if self.entropy_window is not None and self.entropy_window < 1:
            raise ValueError(f"search.entropy_window is {self.entropy_window}; use None for the whole turn")
        if self.infrastructure_retries < 0:
            raise ValueError(f"search.infrastructure_retries is {self.infrastructure_retries}; it must be at least 0")
        if self.probes and self.buffer >= self.budget:
            raise ValueError(
                f"search.buffer is {self.buffer} and search.budget is {self.budget}: nothing would be left to search; "
                f"use a smaller buffer, a larger budget, or localizer='none'"
            )

    @property
    def probes(self) -> bool:
        """Whether the localizer spends rollouts on continuations."""
        return self.localizer not in ("none", "feedback")


@dataclasses.dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt to sample.

    Attributes:
      index: Its place in the rollout order; a rollout that was lost is proposed again under the same index.
      parent: The rollout whose prefix it continues; None for an independent attempt.
      anchor: m: it starts from prefix(m) of `parent`, and from the world after step m; 0 for an independent attempt.
    """

    index: int
    parent: int | None = None
    anchor: int = 0


@dataclasses.dataclass(frozen=True)
class _Searching:
    """The search in progress: of which leaf, its state, and the probes so far."""

    leaf: int
    search: ErrorSearch
    probes: tuple[Probe, ...] = ()


class Growth:
    """Grows the tree of one prompt. Ask `propose`, report with `observe`, until `done`; then take `tree`.

    The budget counts every rollout that was completed. A lost one (an infrastructure failure) is proposed again once
    the rest of its wave is in, outside the budget; once a rollout was lost after its last of `infrastructure_retries`,
    the tree ends with what it has and is marked `truncated`. So a tree loses at most `infrastructure_retries + 1` times
    its budget. A retry keeps the index of the rollout, and with it the PRNG stream: the fault is taken to be transient,
    and the tree becomes the one that would have grown without it. Another stream would also favour what does not
    provoke the fault.

    All X_m continuations of a probe run, even after a success. Failed continuations do not enter the buffer. Failures
    that are still in the buffer when the budget is spent are not searched: Figure 4 never does, although Algorithm 1 as
    printed would name step 1 for one of them without a probe.
    """

    def __init__(self, task: Task, config: SearchConfig, seed: int = 0):
        """Starts with the first wave of independent attempts; `seed` drives the `random` localizer."""
        self.task = task
        self._config = config
        self._seed = seed
        self._leaves: list[Leaf] = []
        self._buffer: list[int] = []
        self._records: list[SearchRecord] = []
        self._searching: _Searching | None = None
        self._infrastructure_failures = 0
        self._truncated = False
        self._wave: tuple[Rollout, ...] = ()
        self._planned: dict[int, int] = {}  # X_m of the wave's probes
        self._retries = 0  # of the wave: what is still lost after a round was lost in every round before it
        self._ready: list[Rollout] = []
        self._running: dict[int, Rollout] = {}
        self._results: dict[int, Trajectory | None] = {}
        self._advance()

    @property
    def done(self) -> bool:
        """True when nothing is left to propose or to wait for."""
        return not self._wave

    def propose(self) -> list[Rollout]:
        """All rollouts that can start now, each handed out once; empty while others are awaited, and at the end."""
        out, self._ready = self._ready, []
        self._running.update({rollout.index: rollout for rollout in out})
        return out

    def observe(self, index: int, trajectory: Trajectory | None) -> None:
        """Reports how a proposed rollout ended, in any order.

        Args:
          index: `Rollout.index`.
          trajectory: The whole attempt, which shares its parent's prompt and first `anchor` steps by identity; None if
            the infrastructure failed.

        Raises:
          ValueError: If that rollout is not running, or the attempt does not fit it, or lacks the entropies that the
            search needs.
        """
        if index not in self._running:
            raise ValueError(f"rollout {index} is not running; it was not proposed, or was reported before")
        if trajectory is not None:
            self._check(self._running[index], trajectory)
        self._results[index] = trajectory
        del self._running[index]
        if not self._running:  # `propose` handed out all of the round at once
            self._finish_round()

    def tree(self) -> RolloutTree:
        """The finished tree.

        Raises:
          RuntimeError: If it is still growing.
        """
        if not self.done:
            raise RuntimeError(f"the tree of task {self.task.id} is still growing; report every rollout first")
        return RolloutTree(
            self.task, tuple(self._leaves), tuple(self._records), self._infrastructure_failures, self._truncated
        )

    def _check(self, rollout: Rollout, trajectory: Trajectory) -> None:
        """Raises ValueError if an attempt is not the one that was asked for."""
        if trajectory.finish == Finish.INFRASTRUCTURE:
            raise ValueError(f"rollout {rollout.index} was lost to the infrastructure; report None, not its trajectory")
        check_leaf(Leaf(trajectory, rollout.parent, rollout.anchor), rollout.index, self._leaves)
        if trajectory.steps[-1].response is not None:
            raise ValueError(f"rollout {rollout.index} ends with a tool response that no turn follows; give it none")
        if self._config.probes and any(step.turn.entropies is None for step in trajectory.steps):
            raise ValueError(
                f"rollout {rollout.index} has turns without entropies, which eq. 4 and 5 need; record them"
            )

    def _finish_round(self) -> None:
        """All that was handed out is back: samples the lost rollouts again, or judges the wave."""
        lost = [rollout for rollout in self._wave if self._results[rollout.index] is None]
        self._infrastructure_failures += len(lost)
        if lost and self._retries < self._config.infrastructure_retries:
            self._retries += 1
            self._ready = lost
            return
        self._truncated = bool(lost)
        self._absorb()
        self._advance()

    def _absorb(self) -> None:
        """Makes leaves of the wave, in the order of its indices, and tells the buffer or the search."""
        probed: dict[int, list[int]] = {step: [] for step in self._planned}
        for rollout in self._wave:
            trajectory = self._results[rollout.index]
            if trajectory is None:
                continue
            self._leaves.append(Leaf(trajectory, rollout.parent, rollout.anchor))
            leaf = len(self._leaves) - 1
            if rollout.parent is not None:
                probed[rollout.anchor].append(leaf)
            elif not trajectory.success:
                self._buffer.append(leaf)
        if self._searching is not None:
            outcomes = {
                step: [self._leaves[leaf].trajectory.success for leaf in found] for step, found in probed.items()
            }
            probes = tuple(Probe(step, tuple(found), self._planned[step]) for step, found in probed.items() if found)
            self._searching = dataclasses.replace(
                self._searching,
                search=self._searching.search.observe(outcomes, self._planned),
                probes=self._searching.probes + probes,
            )
        self._wave, self._planned, self._results = (), {}, {}

    def _advance(self) -> None:
        """Decides the next wave; leaves it empty at the end."""
        left = 0 if self._truncated else self._config.budget - len(self._leaves)
        if self._config.localizer == "feedback" and not left:
            for leaf in self._buffer:
                self._start_search(leaf)
                self._end_search()
        if self._searching is not None:
            if left and self._searching.search.propose():
                self._launch_probes(left)
                return
            self._end_search()
        if self._config.probes and left and len(self._buffer) == self._config.buffer:
            self._start_search(self._select())
            self._buffer = []
            self._advance()  # a search that needs no probe ends at once
            return
        if left:
            wave = min(self._config.buffer - len(self._buffer), left) if self._config.probes else left
            self._launch([(None, 0)] * wave)

    def _select(self) -> int:
        """tau* (eq. 4): the failure whose turns after tool calls are the least certain; of equals, the earliest."""
        window = self._config.entropy_window
        return max(self._buffer, key=lambda leaf: (entropy_gap(self._leaves[leaf].trajectory, window), -leaf))

    def _start_search(self, leaf: int) -> None:
        trajectory = self._leaves[leaf].trajectory
        statuses = [step.result.status for step in trajectory.steps if step.result is not None]
        search = make_search(
            self._config.localizer,
            statuses,
            anchors=trajectory.num_tool_steps,
            key=(self._seed, self.task.uid, leaf),
        )
        self._searching = _Searching(leaf, search)

    def _end_search(self) -> None:
        found = self._searching.search.result
        self._records.append(
            SearchRecord(
                self._searching.leaf, self._config.localizer, found.step, found.verified, self._searching.probes
            )
        )
        self._searching = None

    def _launch_probes(self, left: int) -> None:
        """Starts X_m continuations of every step that the search proposes, as far as the budget goes."""
        leaf = self._searching.leaf
        trajectory = self._leaves[leaf].trajectory
        self._planned = {
            step: suffix_count(self._config, step_gap(trajectory, step, self._config.entropy_window))
            for step in self._searching.search.propose()
        }
        starts = [(leaf, step) for step, count in self._planned.items() for _ in range(count)]
        self._launch(starts[:left])

    def _launch(self, starts: list[tuple[int | None, int]]) -> None:
        first = len(self._leaves)
        self._wave = tuple(Rollout(first + i, parent, anchor) for i, (parent, anchor) in enumerate(starts))
        self._retries = 0
        self._ready = list(self._wave)
