"""The paper's worked example (Figure 4): every printed number, and the order in which its tree grew."""

import json
from pathlib import Path

import numpy as np
from factories import grow, make_task, make_trajectory, make_tree

from elpo_jax.policy.credit import assign
from elpo_jax.policy.recipes import elpo
from elpo_jax.trees.grow import Growth, SearchConfig

FIGURE = json.loads((Path(__file__).parent / "golden_fig4.json").read_text())
SUCCESSES = set(FIGURE["successes"])


def figure_tree():
    shape = [(parent, anchor, n - 1, i in SUCCESSES) for i, (parent, anchor, n) in enumerate(FIGURE["leaves"])]
    return make_tree(shape, failure=FIGURE["reward"]["failure"])


def test_nodes_are_those_of_the_figure():
    nodes = figure_tree().nodes()
    assert {node.id for node in nodes} == {*FIGURE["nodes"], *FIGURE["nodes_not_printed"]}
    assert len(nodes) == 31 and len(FIGURE["nodes"]) == 29


def test_every_printed_number():
    tree = figure_tree()
    credit = assign(tree, elpo())
    index = {node.id: i for i, node in enumerate(tree.nodes())}
    for name, printed in FIGURE["nodes"].items():
        i = index[name]
        ours = [credit.value[i], credit.branch[i], credit.trajectory[i], credit.advantage[i]]
        np.testing.assert_allclose(ours, printed, rtol=0, atol=1e-3, err_msg=name)


def test_numbers_under_the_sample_std():
    tree = figure_tree()
    credit = assign(tree, elpo(ddof=1))
    index = {node.id: i for i, node in enumerate(tree.nodes())}
    for name, numbers in FIGURE["sample_std"].items():
        i = index[name]
        ours = [credit.branch[i], credit.trajectory[i], credit.advantage[i]]
        np.testing.assert_allclose(ours, numbers, rtol=0, atol=1e-3, err_msg=name)


def test_first_wrong_steps():
    tree = figure_tree()
    first_failure = assign(tree, elpo()).first_failure
    found: dict[str, list[int]] = {}
    for leaf, step in enumerate(first_failure):
        if step:
            found.setdefault(tree.nodes()[tree.path(leaf)[step - 1]].id, []).append(leaf)
    assert found == FIGURE["first_wrong"]
    assert sum(map(len, found.values())) == 14


def play(localizer: str):
    """Grows a tree by the figure's script: which attempts succeed, how long they are, and how certain.

    Entropies are chosen so that leaf 0 of (0, 1, 2) and leaf 5 of (5, 6, 7) have the largest gap, and that eq. 5 gives
    X_1 = 2 (gap 0) in both searches and X_2 = 3 (gap 0.5 nat) in the second: the counts that the figure shows.
    """

    def attempt(rollout, parent):
        if rollout.parent is not None:
            return make_trajectory(2, rollout.anchor == 1 and rollout.parent == 5, parent=parent, anchor=rollout.anchor)
        certain = rollout.index not in (0, 5)
        steps = FIGURE["leaves"][rollout.index][2] - 1 if rollout.index not in (10, 11, 12) else 1
        entropies = [0.5, *[0.3 if certain else 0.5] * steps]
        if rollout.index == 5:
            entropies[2] = 1.0
        return make_trajectory(steps, entropies=entropies, seed=rollout.index)

    return grow(Growth(make_task(), SearchConfig(localizer=localizer)), attempt)


def test_the_inclusive_search_grows_the_figure_leaf_by_leaf():
    tree = play("binary")
    assert [[leaf.parent, leaf.anchor, len(leaf.trajectory.steps)] for leaf in tree.leaves][:8] == FIGURE["leaves"][:8]
    assert [[leaf.parent, leaf.anchor] for leaf in tree.leaves] == [leaf[:2] for leaf in FIGURE["leaves"]]
    assert len(tree.leaves) == FIGURE["budget"]
    assert [[s.leaf, s.first_failure] for s in tree.searches] == FIGURE["searches"]  # the last buffer is never searched
    assert all(search.verified for search in tree.searches)
    assert [(p.step, p.leaves, p.planned) for s in tree.searches for p in s.probes] == [
        (1, (3, 4), 2),
        (1, (8, 9), 2),
        (2, (10, 11, 12), 3),
    ]


def test_the_printed_search_stops_before_the_last_step():
    tree = play("binary_printed")
    assert [[leaf.parent, leaf.anchor] for leaf in tree.leaves[:10]] == [leaf[:2] for leaf in FIGURE["leaves"][:10]]
    assert [tree.leaves[i].parent for i in (10, 11, 12)] == [None] * 3  # continuations of leaf 5 in the figure
    first, second = tree.searches[:2]
    assert (first.leaf, first.first_failure, first.verified) == (0, 1, True)
    assert (second.leaf, second.first_failure, second.verified) == (5, 2, False)  # step 2 itself was never probed
    assert [probe.step for probe in second.probes] == [1]
    assert len(tree.leaves) == FIGURE["budget"]


def test_searched_critical_steps_of_the_figure():
    first_failure = assign(play("binary"), elpo(critical="searched")).first_failure
    expected = {0: 1, 3: 1, 4: 1, 5: 2, 10: 2, 11: 2, 12: 2}
    assert {i: int(step) for i, step in enumerate(first_failure) if step} == expected
