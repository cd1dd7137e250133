"""Error localizers: pure state machines that find the first irrecoverable step of a failed attempt.

A localizer says from which steps to sample continuations (`propose`), is told which of them succeeded (`observe`), and
then names a step (`result`). It knows nothing of models, tools or budgets, so it can be tested against an exact oracle.
"Reachable from prefix(m)" means that steps 1..m, tool responses included, did not yet make failure certain; the first
irrecoverable step is the smallest m whose prefix is unreachable, and K + 1, the final turn, if all K are reachable.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, Self, get_args

import numpy as np

from elpo_jax.tools.base import Status

Localizer = Literal["binary", "binary_printed", "dense", "feedback", "random", "none"]
LOCALIZERS: tuple[Localizer, ...] = get_args(Localizer)


def make_search(
    localizer: Localizer, statuses: Sequence[Status], *, anchors: int | None = None, key: Sequence[int] = (0,)
) -> "ErrorSearch":
    """Starts the search for the first irrecoverable step of one failed attempt.

    Args:
      localizer: Which search.
      statuses: How each of the attempt's K tool calls ended, in order; a malformed call counts (only `feedback` looks
        at the values).
      anchors: How many of the K steps can be continued from: K (the default), or K - 1 where nothing may follow the
        last call, so that its prefix is already known to be unreachable.
      key: Non-negative integers that determine the step which `random` draws.

    Raises:
      ValueError: If there is no such localizer, or `anchors` is neither K nor K - 1.
    """
    steps = len(statuses)
    anchors = steps if anchors is None else anchors
    if anchors < 0 or anchors not in (steps - 1, steps):
        raise ValueError(f"anchors must be K - 1 or K, where K = {steps} is the number of tool calls; got {anchors}")
    match localizer:
        case "binary":
            return BinarySearch(high=anchors, inclusive=True)
        case "binary_printed":
            # The printed loop never probes step K, so its upper end is a guess unless nothing can follow step K.
            return BinarySearch(high=max(steps, 1), inclusive=False, high_known=anchors < steps or steps == 0)
        case "dense":
            return DenseSearch(anchors)
        case "feedback":
            return GivenStep(next((step for step, status in enumerate(statuses, 1) if status.is_fault), 0))
        case "random":
            return GivenStep(_uniform_step(anchors, key), probed=anchors == 0)
        case "none":
            return GivenStep(0)
    raise ValueError(f"there is no localizer {localizer!r}; choose one of {', '.join(LOCALIZERS)}")


def _uniform_step(anchors: int, key: Sequence[int]) -> int:
    """A uniform draw from 1..anchors; 1 if there is no anchor, because the only step is then the final turn."""
    return 1 if anchors == 0 else int(np.random.default_rng(list(key)).integers(1, anchors + 1))


def _checked(search: "ErrorSearch", outcomes: Mapping[int, Sequence[bool]]) -> None:
    """Raises ValueError for outcomes of steps that the search did not ask for."""
    if unasked := sorted(set(outcomes) - set(search.propose())):
        raise ValueError(f"outcomes for steps {unasked}, but the search asked for steps {list(search.propose())}")


def _is_complete(outcomes: Sequence[bool], planned: int | None) -> bool:
    """True where a probe without a success counts as evidence: something, and all that was planned, came back."""
    return len(outcomes) >= max(1, planned or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Localization:
    """What a search found.

    Attributes:
      step: The first irrecoverable step, 1-based; 0 where none was named.
      verified: True where both neighbours of the answer are known: the step before it led to a success (or is the
        prompt), and a complete probe of the step itself did not (or nothing can follow it).
    """

    step: int
    verified: bool


class ErrorSearch(Protocol):
    """One search, as an immutable value."""

    def propose(self) -> tuple[int, ...]:
        """Steps whose prefixes to continue from now, all at once; empty when the search has finished."""

    def observe(self, outcomes: Mapping[int, Sequence[bool]], planned: Mapping[int, int] | None = None) -> Self:
        """The search after one wave of probes.

        Args:
          outcomes: Success of each continuation, by step. A proposed step that is missing or empty was not sampled at
            all (the budget ran out): it moves no bound, and the search ends unverified.
          planned: How many continuations of each step were meant to run; by default as many as came back. A probe that
            fell short without a success still moves the bound, as in Algorithm 1, but leaves the answer unverified; a
            success proves reachability, however few ran.

        Raises:
          ValueError: If an outcome belongs to a step that was not proposed.
        """

    @property
    def result(self) -> Localization:
        """The answer; of an unfinished search, its lower bound, unverified."""


@dataclasses.dataclass(frozen=True, slots=True)
class BinarySearch:
    """Bisection, one step at a time, at m = floor((low + high) / 2).

    Inclusive (the search that made the paper's Figure 4): while low <= high; reachable: low = m + 1, else high = m - 1;
    the answer is low, in 1..K+1. Printed (Algorithm 1): while low < high; reachable: low = m + 1, else high = m; the
    answer is low, in 1..K, and step K is never probed.

    Attributes:
      high: Upper end of the bracket; K at the start.
      inclusive: Which of the two loops.
      low: Lower end of the bracket; `low - 1` is reachable.
      high_known: Whether the upper end was decided by a complete probe, or needs none.
      stopped: Whether the samples ran out.
    """

    high: int
    inclusive: bool
    low: int = 1
    high_known: bool = True
    stopped: bool = False

    @property
    def _open(self) -> bool:
        return self.low <= self.high if self.inclusive else self.low < self.high

    def propose(self) -> tuple[int, ...]:
        return ((self.low + self.high) // 2,) if self._open and not self.stopped else ()

    def observe(self, outcomes: Mapping[int, Sequence[bool]], planned: Mapping[int, int] | None = None) -> Self:
        _checked(self, outcomes)
        if not (steps := self.propose()):
            return self
        (m,) = steps
        samples = outcomes.get(m, ())
        if not samples:
            return dataclasses.replace(self, stopped=True)
        if any(samples):
            return dataclasses.replace(self, low=m + 1)
        complete = _is_complete(samples, (planned or {}).get(m))
        return dataclasses.replace(self, high=m - 1 if self.inclusive else m, high_known=complete)

    @property
    def result(self) -> Localization:
        return Localization(self.low, not self._open and self.high_known)


@dataclasses.dataclass(frozen=True, slots=True)
class DenseSearch:
    """Probes all of 1..K in one wave.

    The answer is the step after the last one that led to a success: a continuation of prefix(m) is also one of every
    shorter prefix, so a miss at an earlier step is a false negative of finite sampling.

    Attributes:
      anchors: Number of steps to probe.
      observed: Whether the wave is in.
      last_reachable: Last step that led to a success; 0, the prompt, if none did.
      known: Steps whose probe was complete and had no success.
    """

    anchors: int
    observed: bool = False
    last_reachable: int = 0
    known: frozenset[int] = frozenset()

    def propose(self) -> tuple[int, ...]:
        return () if self.observed else tuple(range(1, self.anchors + 1))

    def observe(self, outcomes: Mapping[int, Sequence[bool]], planned: Mapping[int, int] | None = None) -> Self:
        _checked(self, outcomes)
        if self.observed:
            return self
        planned = planned or {}
        return dataclasses.replace(
            self,
            observed=True,
            last_reachable=max((m for m, samples in outcomes.items() if any(samples)), default=0),
            known=frozenset(
                m for m, samples in outcomes.items() if not any(samples) and _is_complete(samples, planned.get(m))
            ),
        )

    @property
    def result(self) -> Localization:
        step = self.last_reachable + 1
        return Localization(step, step > self.anchors or step in self.known)


@dataclasses.dataclass(frozen=True, slots=True)
class GivenStep:
    """A step that is named without a search: by tool feedback, by chance, or (0) not at all.

    Never verified, for no outcome can change it. `random` still probes its step once, so that the tree branches there.

    Attributes:
      step: The answer.
      probed: Whether no probe is left to do.
    """

    step: int
    probed: bool = True

    def propose(self) -> tuple[int, ...]:
        return () if self.probed else (self.step,)

    def observe(self, outcomes: Mapping[int, Sequence[bool]], planned: Mapping[int, int] | None = None) -> Self:
        _checked(self, outcomes)
        return dataclasses.replace(self, probed=True)

    @property
    def result(self) -> Localization:
        return Localization(self.step, False)
