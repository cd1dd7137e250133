"""The endless stream of tasks that training and evaluation draw from: one integer is the whole cursor."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from elpo_jax.tasks.base import SPLITS, Family, Split, Task


@dataclasses.dataclass(frozen=True)
class TaskStream:
    """Task number n of a split, as a pure function of n.

    Attributes:
      families: By name; task n of a split belongs to family n mod the number of those with tasks in it.
      difficulties: By family; drawn from uniformly, independently for every n.
      seed: Seeds that draw.
    """

    families: Mapping[str, Family]
    difficulties: Mapping[str, tuple[int, ...]]
    seed: int

    def names(self, split: Split) -> list[str]:
        """The families that have tasks in a split."""
        return [name for name, family in self.families.items() if family.size(split) != 0]

    def task(self, split: Split, n: int) -> Task:
        """Task number n >= 0 of a split, over its families in turn."""
        names = self.names(split)
        return self.family_task(names[n % len(names)], split, n // len(names))

    def first(self, family: str, split: Split, count: int) -> list[Task]:
        """The first `count` tasks of a family's split, or all where it has fewer."""
        size = self.families[family].size(split)
        return [self.family_task(family, split, i) for i in range(count if size is None else min(count, size))]

    def family_task(self, family: str, split: Split, index: int) -> Task:
        """Task number index >= 0 of one family's split."""
        where = (self.seed, list(self.families).index(family), SPLITS.index(split), index)
        difficulty = int(np.random.default_rng(where).choice(self.difficulties[family]))
        return self.families[family].task(split, index, difficulty)
