"""From a rollout tree to per-step credit: tree reward, advantages, and critical and recovered steps (paper eq. 6-10).

All of it is float64 on the host: in float32 the rounding noise of equal rewards, divided by the eps of eq. 7 and 8,
becomes an advantage of up to 0.1. Only masks and these numbers cross to the device; the loss mixes them (see
`policy.loss`), so `Credit.advantage` is for people and for tests.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from elpo_jax.policy.recipes import Critical, Recipe
from elpo_jax.trees.tree import Node, RolloutTree

EPS = 1e-6  # added to the std in eq. 7 and 8
TIE = 1e-8  # rewards that differ by less are equal


def assign(tree: RolloutTree, recipe: Recipe) -> "Credit":
    """The credit of every node and leaf of a tree.

    Args:
      tree: A finished tree.
      recipe: Its `ddof`, `lambda_tree` and `critical` are used.

    Raises:
      ValueError: If a reward is not finite.
    """
    nodes = tree.nodes()
    rewards = np.array([leaf.trajectory.reward for leaf in tree.leaves], np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError(f"task {tree.task.id}: the rewards must be finite, got {rewards.tolist()}")
    values = tree_rewards(nodes, rewards)
    branch = branch_advantages(nodes, values, recipe.ddof)
    trajectory = trajectory_advantages(nodes, rewards, recipe.ddof)
    return Credit(
        value=values,
        branch=branch,
        trajectory=trajectory,
        advantage=recipe.lambda_tree * branch + (1.0 - recipe.lambda_tree) * trajectory,
        first_failure=first_failures(tree, recipe.critical),
        recovered=tuple(_recovered(tree, leaf) for leaf in range(len(tree.leaves))),
    )


def normalise(rewards: np.ndarray, ddof: int = 0) -> np.ndarray:
    """(r - mean) / (std + eps) of a group (eq. 7 and 8), float64 [n]; exactly 0 if all are equal, or if there is one.

    Args:
      rewards: float64 [n].
      ddof: 0 for the population std (which the numbers in the paper's Figure 4 have), 1 for the sample std.
    """
    if len(rewards) < 2 or np.ptp(rewards) < TIE:
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / (rewards.std(ddof=ddof) + EPS)


def tree_rewards(nodes: Sequence[Node], rewards: np.ndarray) -> np.ndarray:
    """r(s) of every node (eq. 6), float64 [nodes]: a leaf's reward, or the mean over direct children (not over leaves).

    Args:
      nodes: Parents before children.
      rewards: float64 [leaves].
    """
    values = np.zeros(len(nodes))
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        values[index] = values[list(node.children)].mean() if node.children else rewards[node.leaves[0]]
    return values


def branch_advantages(nodes: Sequence[Node], values: np.ndarray, ddof: int = 0) -> np.ndarray:
    """Branch advantages (eq. 7), float64 [nodes]: normalised among siblings, and repeated below while nothing branches.

    The prompt counts as a branching node over the first steps of all independent attempts. A tie replaces what would be
    inherited by 0. Where nothing branches from the prompt on, there is nothing to compare and the advantage is 0.
    """
    out = np.zeros(len(nodes))
    first_steps = [index for index, node in enumerate(nodes) if node.parent is None]
    if first_steps:
        out[first_steps] = normalise(values[first_steps], ddof)
    for index, node in enumerate(nodes):  # parents come before their children
        children = list(node.children)
        if len(children) == 1:
            out[children] = out[index]
        elif children:
            out[children] = normalise(values[children], ddof)
    return out


def trajectory_advantages(nodes: Sequence[Node], rewards: np.ndarray, ddof: int = 0) -> np.ndarray:
    """Trajectory advantages (eq. 8, 9), float64 [nodes]: the mean, over a node's leaves, of the leaves' advantages."""
    per_leaf = normalise(rewards, ddof)
    return np.array([per_leaf[list(node.leaves)].mean() for node in nodes], np.float64)


def first_failures(tree: RolloutTree, critical: Critical) -> np.ndarray:
    """The first irrecoverable step of each leaf, int32 [leaves]; 0 for a success, and where none is known.

    `first_wrong`: of every failed leaf, the step of the earliest node on its path whose leaves all failed.

    `searched`: a search names a step of the attempt that it searched, and so a node of the tree. Every failed leaf
    through that node shares its critical step: a continuation from an anchor at or after the critical step has the step
    in its prefix, and fails because of it. A failed continuation from an earlier anchor went its own way; nothing is
    known about it. A step through which some leaf succeeded is not irrecoverable, whatever names it (`random` draws it
    before it is probed). `verified`: likewise, from verified searches only.
    """
    out = np.zeros(len(tree.leaves), np.int32)
    if critical == "first_wrong":
        nodes = tree.nodes()
        for leaf in _failed(tree):
            out[leaf] = next(nodes[i].step for i in tree.path(leaf) if _all_failed(tree, nodes[i]))
        return out
    for record in tree.searches:
        if record.first_failure == 0 or (critical == "verified" and not record.verified):
            continue
        node = tree.nodes()[tree.path(record.leaf)[record.first_failure - 1]]
        if not _all_failed(tree, node):
            continue
        for leaf in node.leaves:
            if out[leaf] == 0 or node.step < out[leaf]:
                out[leaf] = node.step
    return out


def irrecoverable_steps(
    tree: RolloutTree, leaf: int, most: int = 3, critical: Critical = "first_wrong"
) -> tuple[int, ...]:
    """The first, second, ... irrecoverable steps of a leaf, ascending: what a person would repair, in this order.

    The first is the one that credit uses (`first_failures`) and has priority: once it is made, every later prefix is
    lost, so no sample can tell a later step's own share. A later step is counted where the tree holds evidence of its
    own against it: its tool call was a fault, or continuations were sampled from it and all of them failed.

    Args:
      tree: A finished tree.
      leaf: Which leaf.
      most: How many steps to return at most.
      critical: How the first one is determined.

    Returns:
      At most `most` steps; none for a success, and where no first one is known.
    """
    first = int(first_failures(tree, critical)[leaf])
    if first == 0:
        return ()
    nodes = [tree.nodes()[index] for index in tree.path(leaf)]
    later = [node.step for node in nodes[first:] if _is_fault(tree, node) or len(node.children) > 1]
    return (first, *later)[:most]


def _recovered(tree: RolloutTree, leaf: int) -> tuple[int, ...]:
    """Steps of a leaf whose tool call was a fault and after which some leaf succeeded: repaired, not critical."""
    nodes = [tree.nodes()[index] for index in tree.path(leaf)]
    return tuple(node.step for node in nodes if _is_fault(tree, node) and not _all_failed(tree, node))


def _is_fault(tree: RolloutTree, node: Node) -> bool:
    result = tree.leaves[node.leaves[0]].trajectory.steps[node.step - 1].result
    return result is not None and result.status.is_fault


def _failed(tree: RolloutTree) -> list[int]:
    return [index for index, leaf in enumerate(tree.leaves) if not leaf.trajectory.success]


def _all_failed(tree: RolloutTree, node: Node) -> bool:
    return not any(tree.leaves[leaf].trajectory.success for leaf in node.leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class Credit:
    """What a tree says about its steps. Nodes are indexed as in `RolloutTree.nodes()`, leaves as in `.leaves`.

    Attributes:
      value: float64 [nodes], tree reward (eq. 6).
      branch: float64 [nodes], branch advantage (eq. 7).
      trajectory: float64 [nodes], trajectory advantage (eq. 8, 9).
      advantage: float64 [nodes], hierarchical advantage (eq. 10).
      first_failure: int32 [leaves], first irrecoverable step; 0 = none.
      recovered: Per leaf, the steps whose fault was repaired.
    """

    value: np.ndarray
    branch: np.ndarray
    trajectory: np.ndarray
    advantage: np.ndarray
    first_failure: np.ndarray
    recovered: tuple[tuple[int, ...], ...]
