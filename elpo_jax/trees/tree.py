"""The rollout tree: every attempt at one task under one rollout budget.

A leaf is a whole attempt; it names the earlier leaf whose prefix it continues and shares that prefix's `Step` objects.
A node is one step of one or more leaves; the prompt is the root above all first steps and is not a node.
Two independent attempts never share a node, even where their text coincides.
"""

import dataclasses
import functools
from collections.abc import Sequence

from elpo_jax.tasks.base import Task
from elpo_jax.trees.localize import Localizer
from elpo_jax.trees.trajectory import Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One attempt in its tree.

    Attributes:
      trajectory: The attempt, from the prompt to its end.
      parent: The earlier leaf whose prefix it continues; None for an independent attempt (a root).
      anchor: Number of leading steps it shares with `parent`; 0 for a root.
    """

    trajectory: Trajectory
    parent: int | None = None
    anchor: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """The continuations that a search sampled from one prefix.

    Attributes:
      step: The anchor m: prefix(m) was continued.
      leaves: The continuations.
      planned: How many were to be sampled (X_m, eq. 5); more than came back only where the tree ended first.
    """

    step: int
    leaves: tuple[int, ...]
    planned: int


@dataclasses.dataclass(frozen=True, slots=True)
class SearchRecord:
    """One finished search (one entry of the paper's C_crit).

    Attributes:
      leaf: The failed attempt that was searched.
      localizer: Which search.
      first_failure: The step it named, 1-based; 0 for none.
      verified: See `localize.Localization`.
      probes: In the order in which they were decided.
    """

    leaf: int
    localizer: Localizer
    first_failure: int
    verified: bool
    probes: tuple[Probe, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One step of the tree.

    Attributes:
      id: "s{step}:{first leaf}".
      step: 1-based.
      parent: Index of the node of the step before; None at step 1, below the prompt.
      children: Indices of the nodes of the next step.
      leaves: All leaves through this node, ascending. The first one created it; their number is how often its tokens
        enter a loss that counts prefixes once per leaf.
    """

    id: str
    step: int
    parent: int | None
    children: tuple[int, ...]
    leaves: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutTree:
    """All attempts at one task.

    Attributes:
      task: The task.
      leaves: In rollout order.
      searches: In the order in which they ended.
      infrastructure_failures: Attempts that were lost through no fault of the model; they are not leaves.
      truncated: True where these failures ended the tree before its budget was spent.

    Raises:
      ValueError: If a leaf or a search does not fit the leaves before it.
    """

    task: Task
    leaves: tuple[Leaf, ...]
    searches: tuple[SearchRecord, ...] = ()
    infrastructure_failures: int = 0
    truncated: bool = False

    def __post_init__(self):
        for index, leaf in enumerate(self.leaves):
            check_leaf(leaf, index, self.leaves)
        for record in self.searches:
            _check_search(self, record)

    @property
    def roots(self) -> tuple[int, ...]:
        """Leaves that are independent attempts: an unbiased sample, while continuations all start from failures."""
        return tuple(index for index, leaf in enumerate(self.leaves) if leaf.parent is None)

    def nodes(self) -> tuple[Node, ...]:
        """All nodes, by creating leaf and then by step, so that a parent comes before its children."""
        return self._layout[0]

    def path(self, leaf: int) -> tuple[int, ...]:
        """Node indices of a leaf's steps 1, 2, ..., in order."""
        return self._layout[1][leaf]

    @functools.cached_property
    def _layout(self) -> tuple[tuple[Node, ...], tuple[tuple[int, ...], ...]]:
        """Nodes, and each leaf's path."""
        origins: list[tuple[int, int, int | None]] = []  # creating leaf, step, parent node
        paths: list[tuple[int, ...]] = []
        for index, leaf in enumerate(self.leaves):
            path = [] if leaf.parent is None else list(paths[leaf.parent][: leaf.anchor])
            for step in range(leaf.anchor + 1, len(leaf.trajectory.steps) + 1):
                origins.append((index, step, path[-1] if path else None))
                path.append(len(origins) - 1)
            paths.append(tuple(path))
        children: list[list[int]] = [[] for _ in origins]
        leaves: list[list[int]] = [[] for _ in origins]
        for node, (_, _, parent) in enumerate(origins):
            if parent is not None:
                children[parent].append(node)
        for index, path in enumerate(paths):
            for node in path:
                leaves[node].append(index)
        nodes = tuple(
            Node(f"s{step}:{first}", step, parent, tuple(children[node]), tuple(leaves[node]))
            for node, (first, step, parent) in enumerate(origins)
        )
        return nodes, tuple(paths)


def check_leaf(leaf: Leaf, index: int, leaves: Sequence[Leaf]) -> None:
    """Checks that a leaf adds at least one step of its own to a prefix that it shares, by identity, with its parent.

    Args:
      leaf: The leaf.
      index: Its place in the tree.
      leaves: At least the leaves up to its parent.

    Raises:
      ValueError: If it does not; the message names the leaf.
    """
    steps = leaf.trajectory.steps
    if len(steps) <= leaf.anchor:
        raise ValueError(f"leaf {index} has {len(steps)} steps, so it adds none after its anchor {leaf.anchor}")
    if leaf.parent is None:
        if leaf.anchor != 0:
            raise ValueError(f"leaf {index} has no parent but anchor {leaf.anchor}; a root has anchor 0")
        return
    if not 0 <= leaf.parent < index:
        raise ValueError(f"leaf {index} continues leaf {leaf.parent}; a parent is an earlier leaf")
    parent = leaves[leaf.parent].trajectory
    if not 1 <= leaf.anchor < len(parent.steps):
        raise ValueError(
            f"leaf {index} branches after step {leaf.anchor} of leaf {leaf.parent}, which has {len(parent.steps)} "
            f"steps; an anchor is a step that another one follows"
        )
    shared = zip(steps[: leaf.anchor], parent.steps[: leaf.anchor], strict=True)
    if leaf.trajectory.prompt is not parent.prompt or any(mine is not theirs for mine, theirs in shared):
        raise ValueError(
            f"leaf {index} does not share its first {leaf.anchor} steps with leaf {leaf.parent}; build a continuation "
            f"from the parent's own prompt and Step objects"
        )


def _check_search(tree: RolloutTree, record: SearchRecord) -> None:
    """Raises ValueError if a search names leaves or steps that are not in the tree."""
    named = (record.leaf, *(leaf for probe in record.probes for leaf in probe.leaves))
    if any(not 0 <= leaf < len(tree.leaves) for leaf in named):
        raise ValueError(
            f"the search of leaf {record.leaf} names leaves that a tree of {len(tree.leaves)} does not have"
        )
    steps = len(tree.leaves[record.leaf].trajectory.steps)
    if not 0 <= record.first_failure <= steps:
        raise ValueError(f"the search of leaf {record.leaf} names step {record.first_failure} of {steps}")
