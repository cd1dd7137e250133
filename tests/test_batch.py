"""Packing loses nothing, weights are what the equations say, and every token gets the credit of its node."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from factories import make_trajectory, make_tree, random_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_loss import random_examples
from test_golden import FIGURE, figure_tree

from elpo_jax.policy.batch import (
    Example,
    demonstration_example,
    drop_flat,
    empty,
    first_fit_decreasing,
    normalise,
    pack,
    policy_examples,
    stack,
)
from elpo_jax.policy.credit import assign
from elpo_jax.policy.recipes import elpo
from elpo_jax.tools.base import Status
from elpo_jax.trees.trajectory import Author, Segment

FIELDS = ("tokens", "steps", "behaviour_logp", "branch", "trajectory", "weight")


def example_of(steps, leaves=None, **fields) -> Example:
    steps = np.array(steps, np.int32)
    zeros = np.zeros(len(steps), np.float32)
    leaves = np.ones(len(steps), np.int32) if leaves is None else np.array(leaves, np.int32)
    return Example(
        **{"task": "t", "tokens": steps, "steps": steps, "first_failure": 0, "behaviour_logp": zeros}
        | {"branch": zeros, "trajectory": zeros, "leaves": leaves}
        | fields
    )


def reached(example: Example) -> np.ndarray:
    """int32 [T]: the example's first irrecoverable step, at its tokens and all behind it."""
    first = example.first_failure
    return np.where((first > 0) & (example.steps >= first), first, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(25, 80))
def test_packing_loses_and_mixes_nothing(seed, count, length):
    examples = random_examples(np.random.default_rng(seed), count)
    if count:
        examples = normalise(examples, elpo(), 1.0)
    batch = pack(examples, length)
    found = {}
    for row in range(batch.tokens.shape[0]):
        for start in np.flatnonzero(batch.positions[row] == 0):
            where = np.arange(start, batch.ends[row, start])
            np.testing.assert_array_equal(batch.ends[row, where], where[-1] + 1)
            np.testing.assert_array_equal(batch.positions[row, where], np.arange(len(where)))
            np.testing.assert_array_equal(batch.previous[row, where[1:]], where[:-1])
            found[int(batch.tokens[row, start])] = (row, where)
    for example in examples:
        row, where = found.pop(int(example.tokens[0]))
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name)[row, where], getattr(example, name))
        np.testing.assert_array_equal(batch.leaves[row, where], example.steps > 0)
        np.testing.assert_array_equal(batch.first_failure[row, where], reached(example))
    assert not found
    padding = batch.ends == 0
    blanks = {"tokens": 0, "positions": -1, "previous": -1, "steps": 0, "first_failure": 0, "leaves": 0, "weight": 0}
    for name, blank in blanks.items():
        assert np.all(getattr(batch, name)[padding] == blank)
    again = pack(examples, length)
    assert all(np.array_equal(getattr(batch, f.name), getattr(again, f.name)) for f in dataclasses.fields(batch))


def test_first_fit_decreasing_by_hand():
    # 7 | 6 | 5 5 | then 4 goes behind the 6, and 3 behind the 7. The two 5s keep their order.
    assert first_fit_decreasing([3, 7, 5, 5, 4, 6], 10) == [[1, 0], [5, 4], [2, 3]]
    assert first_fit_decreasing([], 10) == []


def test_a_trajectory_that_does_not_fit_is_named():
    (long,) = normalise([example_of([0, *[1] * 9], task="ledger/train/7")], elpo(), 1.0)
    assert pack([long], 10).tokens.shape == (1, 10)
    with pytest.raises(
        ValueError, match=r"ledger/train/7.* 10 tokens does not fit into rows of 9; raise the row length"
    ):
        pack([long], 9)


def test_weights_are_not_forgotten():
    with pytest.raises(ValueError, match="call normalise"):
        pack([example_of([0, 1])], 4)
    with pytest.raises(ValueError, match="no model token"):
        normalise([example_of([0, 0])], elpo(), 1.0)


def test_the_first_token_cannot_be_the_models():
    with pytest.raises(ValueError, match="begin every trajectory with a prompt"):
        example_of([1, 1])


def test_weights_by_hand():
    # Two leaves of one tree share step 1 (2 tokens); the first goes on with 2 tokens, the second with 4.
    examples = [
        example_of([0, 1, 1, 0, 2, 2], leaves=[1, 2, 2, 1, 1, 1]),
        example_of([0, 1, 1, 0, 2, 2, 2, 2], leaves=[1, 2, 2, 1, 1, 1, 1, 1]),
    ]
    wanted = {
        # 1/2 of the mean over 4, and of the mean over 6 tokens.
        ("sequence", "per_leaf"): ([0, 1 / 8, 1 / 8, 0, 1 / 8, 1 / 8], [0, *[1 / 12] * 2, 0, *[1 / 12] * 4]),
        # 10 token terms.
        ("token", "per_leaf"): ([0, 0.1, 0.1, 0, 0.1, 0.1], [0, 0.1, 0.1, 0, *[0.1] * 4]),
        ("constant", "per_leaf"): ([0, 0.05, 0.05, 0, 0.05, 0.05], [0, 0.05, 0.05, 0, *[0.05] * 4]),
        # Weighted means over 2 * 1/2 + 2 = 3 and 2 * 1/2 + 4 = 5 tokens.
        ("sequence", "once"): ([0, 1 / 12, 1 / 12, 0, 1 / 6, 1 / 6], [0, *[1 / 20] * 2, 0, *[1 / 10] * 4]),
        # 8 different tokens; the shared ones have 1/8 together.
        ("token", "once"): ([0, 1 / 16, 1 / 16, 0, 1 / 8, 1 / 8], [0, *[1 / 16] * 2, 0, *[1 / 8] * 4]),
        ("constant", "once"): ([0, 0.025, 0.025, 0, 0.05, 0.05], [0, *[0.025] * 2, 0, *[0.05] * 4]),
    }
    for (normalisation, prefix_weight), rows in wanted.items():
        recipe = elpo(normalisation=normalisation, prefix_weight=prefix_weight)
        for example, row in zip(normalise(examples, recipe, constant=10.0), rows, strict=True):
            np.testing.assert_allclose(example.weight, row, rtol=1e-6, err_msg=f"{normalisation} {prefix_weight}")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["sequence", "token"]), st.sampled_from(["per_leaf", "once"]))
def test_means_have_total_weight_one(seed, normalisation, prefix_weight):
    examples = random_examples(np.random.default_rng(seed), 7)
    weighted = normalise(examples, elpo(normalisation=normalisation, prefix_weight=prefix_weight), 1.0)
    assert sum(float(e.weight.sum()) for e in weighted) == pytest.approx(1.0, rel=1e-5)
    assert all(not np.any(e.weight[e.steps == 0]) for e in weighted)
    if normalisation == "sequence":
        assert [float(e.weight.sum()) for e in weighted] == pytest.approx([1 / 7] * 7, rel=1e-5)


def test_flat_examples_are_dropped_but_stay_counted():
    signal = np.array([0, 1, 1], np.float32)
    flat, branch, trajectory = (
        example_of([0, 1, 1]),
        example_of([0, 1, 1], branch=signal),
        example_of([0, 1, 1], trajectory=-signal),
    )
    examples = normalise([flat, branch, trajectory], elpo(), 1.0)
    kept = drop_flat(examples, kl=0.0)
    assert kept == examples[1:]
    assert [list(e.weight) for e in kept] == [pytest.approx([0, 1 / 6, 1 / 6])] * 2  # 1/3 each, not 1/2
    assert drop_flat(examples, kl=0.1) == examples


def test_stacking_pads_with_rows_that_count_nothing():
    examples = normalise(random_examples(np.random.default_rng(0), 40), elpo(), 1.0)
    rows = pack(examples, 25)
    for micro_rows in (1, 3, 4, 64):
        batch = stack(rows, micro_rows)
        count = batch.tokens.shape[0]
        assert batch.tokens.shape == (count, micro_rows, 25)
        assert count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) and count * micro_rows >= len(rows.tokens)
        assert count == 1 or 3 * (count - -(-len(rows.tokens) // micro_rows)) < count
        for field in dataclasses.fields(batch):
            flat = getattr(batch, field.name).reshape(-1, 25)
            np.testing.assert_array_equal(flat[: len(rows.tokens)], getattr(rows, field.name))
            np.testing.assert_array_equal(
                flat[len(rows.tokens) :], getattr(empty(len(flat) - len(rows.tokens), 25), field.name)
            )
    assert stack(pack([], 25), 4).tokens.shape == (1, 4, 25)


def test_every_token_of_the_paper_figure_has_the_credit_of_its_node():
    tree = figure_tree()
    examples = policy_examples(tree, assign(tree, elpo()))
    assert len(examples) == 16
    checked = 0
    for number, (leaf, example) in enumerate(zip(tree.leaves, examples, strict=True)):
        np.testing.assert_array_equal(example.tokens, leaf.trajectory.ids())
        np.testing.assert_array_equal(example.behaviour_logp, leaf.trajectory.logprobs())
        start = len(leaf.trajectory.prompt)
        assert not np.any(example.steps[:start])
        for step, node in zip(leaf.trajectory.steps, (tree.nodes()[i] for i in tree.path(number)), strict=True):
            turn = slice(start, start + len(step.turn))
            assert set(example.steps[turn]) == {node.step} and set(example.leaves[turn]) == {len(node.leaves)}
            if node.id in FIGURE["nodes"]:
                _, branch, trajectory, _ = FIGURE["nodes"][node.id]
                np.testing.assert_allclose(example.branch[turn], branch, atol=1e-3)
                np.testing.assert_allclose(example.trajectory[turn], trajectory, atol=1e-3)
                checked += 1
            start = turn.stop
            for name in ("steps", "branch", "trajectory"):  # the tool's answer has no step and no credit
                assert not np.any(getattr(example, name)[start : start + len(step.response or ())])
            start += len(step.response or ())
        assert start == len(example.tokens)
    assert checked > 29  # shared nodes are seen once per leaf
    wrong = {leaf: int(node.split(":")[0][1:]) for node, leaves in FIGURE["first_wrong"].items() for leaf in leaves}
    assert [example.first_failure for example in examples] == [wrong.get(leaf, 0) for leaf in range(16)]


def test_a_tree_by_hand():
    """Two roots and a continuation of the first, beside a demonstration."""
    tree = make_tree([(None, 0, 1, False), (None, 0, 0, True), (0, 1, 1, False)])
    assert [len(leaf.trajectory.ids()) for leaf in tree.leaves] == [10, 5, 10]  # 3 + 2 + 3 + 2, 3 + 2, (8) + 2
    examples = normalise(policy_examples(tree, assign(tree, elpo())), elpo(normalisation="constant"), constant=1 / 3)
    batch = pack([*examples, demonstration_example(make_trajectory(0))], 24)
    assert batch.tokens.shape == (1, 24)
    row = jax.tree.map(lambda values: values[0], batch)
    one, two, three = (leaf.trajectory.ids() for leaf in tree.leaves)
    # prompt 3 | shared step 2 + 3 | end of leaf 0: 2 | end of leaf 2: 2 | leaf 1: 2 | demonstration 5 | padding 5
    np.testing.assert_array_equal(row.tokens[:14], [*one, *three[8:], *two[3:]])
    np.testing.assert_array_equal(row.ends, [14] * 3 + [12] * 5 + [10] * 2 + [12] * 2 + [14] * 2 + [19] * 5 + [0] * 5)
    np.testing.assert_array_equal(row.positions[:14], [*range(10), 8, 9, 3, 4])
    np.testing.assert_array_equal(row.previous[:14], [-1, *range(9), 7, 10, 2, 12])
    # Both failed attempts went wrong at the step that they share.
    np.testing.assert_array_equal(row.steps[:14], [0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 2, 1, 1])
    np.testing.assert_array_equal(row.first_failure[:14], [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(row.leaves, [0, 0, 0, 2, 2, 0, 0, 0, *[1] * 6, 0, 0, 0, 1, 1, *[0] * 5])
    np.testing.assert_allclose(row.weight, row.leaves, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@hypothesis.example(22483, 0, "first_wrong")  # trees that are cut leave more gaps than they save
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from(["first_wrong", "searched", "verified"]))
def test_every_branch_is_found_in_the_packed_trees(seed, spare, critical):
    """Whatever the row length: the ancestors of a leaf's last token are its tokens, with its credit; none is lost."""
    rng = np.random.default_rng(seed)
    recipe = elpo(critical=critical)
    trees = [random_tree(rng) for _ in range(3)]
    examples = [example for tree in trees for example in policy_examples(tree, assign(tree, recipe))]
    examples = normalise([examples[i] for i in rng.permutation(len(examples))], recipe, 1.0)
    length = max(len(example.tokens) for example in examples) + spare
    batch = pack(examples, length)
    assert batch.tokens.shape[0] <= pack(examples, length, share=False).tokens.shape[0]
    branches = {}
    for row, column in np.argwhere(batch.positions >= 0):
        where = [k for k in range(column + 1) if column < batch.ends[row, k]]
        assert len(where) == batch.positions[row, column] + 1
        np.testing.assert_array_equal(batch.positions[row, where], np.arange(len(where)))
        np.testing.assert_array_equal(batch.previous[row, where[1:]], where[:-1])
        branches.setdefault(tuple(batch.tokens[row, where]), []).append((row, where))
    for example in examples:
        credit = {name: getattr(example, name) for name in FIELDS if name != "weight"}
        credit["first_failure"] = reached(example)
        place = next(
            place
            for place in branches[tuple(example.tokens)]
            if all(np.array_equal(getattr(batch, name)[place], values) for name, values in credit.items())
        )
        assert np.all(batch.weight[place] >= 0.999 * example.weight)
        assert np.all(batch.leaves[place] >= (example.steps > 0))
    assert batch.leaves.sum() == sum(int((example.steps > 0).sum()) for example in examples)
    assert batch.weight.sum() == pytest.approx(1.0, rel=1e-5)
    assert not np.any(batch.leaves[batch.steps == 0]) and np.all(batch.leaves[batch.steps > 0] > 0)


def test_attempts_that_disagree_on_a_shared_token_are_not_merged_silently():
    tree = make_tree([(None, 0, 1, False), (0, 1, 1, True)])
    one, other = normalise(policy_examples(tree, assign(tree, elpo())), elpo(), 1.0)
    pack([one, other], 24)
    for change in ({"first_failure": 1}, {"branch": other.branch + 1}, {"behaviour_logp": 2 * other.behaviour_logp}):
        ((name, _),) = change.items()
        with pytest.raises(ValueError, match=f"share a step disagree on its {name}.*rl.share_prefixes=False"):
            pack([one, dataclasses.replace(other, **change)], 24)
        assert pack([one, dataclasses.replace(other, **change)], 24, share=False).leaves.max() == 1


def test_a_tree_that_is_longer_than_a_row_is_cut_into_branches():
    tree = figure_tree()
    examples = normalise(policy_examples(tree, assign(tree, elpo())), elpo(), 1.0)
    longest = max(len(example.tokens) for example in examples)
    alone = sum(len(example.tokens) for example in examples)
    used = [int((pack(examples, length).positions >= 0).sum()) for length in (longest, 2 * longest, 1000)]
    nodes = tree.nodes()
    turns = [tree.leaves[node.leaves[0]].trajectory.steps[node.step - 1] for node in nodes]
    assert used[2] == 3 + sum(len(step.turn) + len(step.response or ()) for step in turns)
    assert alone > used[0] >= used[1] >= used[2]
    assert (pack(examples, 1000, share=False).positions >= 0).sum() == alone


def test_number_of_token_terms_on_the_paper_figure():
    tree = figure_tree()
    examples = policy_examples(tree, assign(tree, elpo()))
    terms = {}
    for prefix_weight in ("per_leaf", "once"):
        weighted = normalise(examples, elpo(normalisation="constant", prefix_weight=prefix_weight), constant=1 / 16)
        terms[prefix_weight] = sum(float(example.weight.sum()) for example in weighted)
    tokens = [[len(step.turn) for step in leaf.trajectory.steps] for leaf in tree.leaves]
    assert terms["per_leaf"] == pytest.approx(sum(map(sum, tokens)))
    assert terms["once"] == pytest.approx(sum(tokens[n.leaves[0]][n.step - 1] for n in tree.nodes()))
    assert terms["per_leaf"] > terms["once"] == pytest.approx(2 * 31)


def test_only_sampled_trajectories_train_a_policy():
    tree = make_tree([(None, 0, 1, True), (None, 0, 1, False)])
    step = tree.leaves[1].trajectory.steps[1]
    silent = dataclasses.replace(step, turn=Segment(Author.MODEL, step.turn.ids))
    trajectory = dataclasses.replace(tree.leaves[1].trajectory, steps=(tree.leaves[1].trajectory.steps[0], silent))
    leaves = (tree.leaves[0], dataclasses.replace(tree.leaves[1], trajectory=trajectory))
    broken = dataclasses.replace(tree, leaves=leaves)
    with pytest.raises(ValueError, match=r"toy/train/7: leaf 1 has model tokens without log-probabilities"):
        policy_examples(broken, assign(broken, elpo()))


def test_demonstrations_weigh_one_per_model_token():
    trajectory = make_trajectory([Status.ERROR, Status.OK], success=True)
    example = demonstration_example(trajectory, "wordmath/train/3")
    np.testing.assert_array_equal(example.tokens, trajectory.ids())
    np.testing.assert_array_equal(example.weight, trajectory.step_ids() > 0)
    assert example.weight.sum() == sum(len(step.turn) for step in trajectory.steps)
    assert pack([example], 32).weight.sum() == example.weight.sum()
