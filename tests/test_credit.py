"""Advantages against an independent reference, ties, critical and recovered steps, and the recipes."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from factories import grow, make_task, make_trajectory, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import trees

from elpo_jax.policy.credit import assign, first_failures, irrecoverable_steps, normalise
from elpo_jax.policy.recipes import Recipe, dapo, elpo, grpo
from elpo_jax.tools.base import Status
from elpo_jax.trees.grow import Growth, SearchConfig
from elpo_jax.trees.localize import LOCALIZERS
from elpo_jax.trees.tree import Leaf, RolloutTree, SearchRecord

OK, ERROR = Status.OK, Status.ERROR


def flat_tree(rewards, steps=2):
    trajectories = [make_trajectory(steps, r > 0, r, seed=i) for i, r in enumerate(rewards)]
    return RolloutTree(make_task(), tuple(map(Leaf, trajectories)))


def reference(tree, ddof, tree_weight):
    """Eq. 6-10 by recursion over the leaves' step objects, with the statistics module; (r, branch, traj, A) by id."""
    rewards = [leaf.trajectory.reward for leaf in tree.leaves]

    def spread(values):
        deviation = statistics.pstdev if ddof == 0 else statistics.stdev
        n = len(values)
        if n < 2 or max(values) - min(values) < 1e-8:
            return [0.0] * n
        return [(v - statistics.fmean(values)) / (deviation(values) + 1e-6) for v in values]

    per_leaf = spread(rewards)
    out = {}

    def groups(members, depth):
        found = {}
        for leaf in members:
            steps = tree.leaves[leaf].trajectory.steps
            if depth < len(steps):
                found.setdefault(id(steps[depth]), []).append(leaf)
        return list(found.values())

    def value(members, depth):  # of the node whose step has index depth
        below = groups(members, depth + 1)
        return statistics.fmean(value(g, depth + 1) for g in below) if below else rewards[members[0]]

    def descend(members, depth, inherited):
        children = groups(members, depth)
        values = [value(g, depth) for g in children]
        branches = [inherited] if len(children) == 1 else spread(values)
        for group, r, b in zip(children, values, branches, strict=True):
            t = statistics.fmean(per_leaf[leaf] for leaf in group)
            out[f"s{depth + 1}:{group[0]}"] = (r, b, t, tree_weight * b + (1 - tree_weight) * t)
            descend(group, depth + 1, b)

    descend(list(range(len(tree.leaves))), 0, 0.0)
    return out


@settings(max_examples=100, deadline=None)
@given(trees(), st.integers(0, 1), st.sampled_from([0.0, 0.5, 0.7, 1.0]))
def test_advantages_equal_an_independent_reference(tree, ddof, tree_weight):
    credit = assign(tree, elpo(ddof=ddof, lambda_tree=tree_weight))
    expected = reference(tree, ddof, tree_weight)
    ours = np.stack([credit.value, credit.branch, credit.trajectory, credit.advantage], 1)
    assert ours.dtype == np.float64
    assert set(expected) == {node.id for node in tree.nodes()}
    np.testing.assert_allclose(ours, [expected[node.id] for node in tree.nodes()], rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(trees(), st.integers(0, 1))
def test_trajectory_advantages_have_mean_zero_over_a_tree(tree, ddof):
    credit = assign(tree, elpo(ddof=ddof))
    last = [tree.path(leaf)[-1] for leaf in range(len(tree.leaves))]
    assert abs(credit.trajectory[last].mean()) < 1e-9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=16), st.integers(0, 1))
def test_lambda_0_on_a_flat_tree_is_grpo(rewards, ddof):
    tree = flat_tree(rewards)
    credit = assign(tree, elpo(lambda_tree=0.0, ddof=ddof))
    group = np.array(rewards, np.float64)
    expected = np.zeros(len(group))
    if len(group) > 1 and np.ptp(group) >= 1e-8:
        expected = (group - np.mean(group)) / (np.std(group, ddof=ddof) + 1e-6)
    for leaf in range(len(rewards)):
        np.testing.assert_array_equal(credit.advantage[list(tree.path(leaf))], np.full(3, expected[leaf]))
    same = assign(tree, grpo(ddof=ddof))
    np.testing.assert_array_equal(same.advantage, credit.advantage)
    # A flat tree branches only at the prompt, where siblings are the leaves: both advantages are the same.
    np.testing.assert_array_equal(credit.branch, credit.trajectory)


def test_grpo_is_faithful_to_the_sample_std():
    credit = assign(flat_tree([1.0, 0.0, 0.0, 0.0]), grpo())
    assert credit.advantage[0] == pytest.approx(0.75 / (statistics.stdev([1, 0, 0, 0]) + 1e-6))
    assert credit.advantage[0] == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize("n", range(1, 17))
def test_equal_rewards_give_exactly_zero(n):
    assert not normalise(np.full(n, -1.1)).any()
    credit = assign(flat_tree([-1.1] * n), elpo())
    assert not credit.advantage.any() and not credit.branch.any() and not credit.trajectory.any()
    # Node values that are means of different numbers of equal rewards tie as well.
    shape = [(None, 0, 1, False)] * n + [(i, 1, 1, False) for i in range(n) for _ in range(i + 1)]
    assert not assign(make_tree(shape, failure=-1.1), elpo()).branch.any()


def test_a_tie_replaces_what_would_be_inherited():
    tree = make_tree([(None, 0, 2, False), (None, 0, 1, True), (0, 1, 2, False)])
    credit = assign(tree, elpo())
    by_id = {node.id: credit.branch[i] for i, node in enumerate(tree.nodes())}
    assert by_id["s1:0"] == pytest.approx(-1, abs=1e-5) and by_id["s2:1"] == by_id["s1:1"] == -by_id["s1:0"]
    assert by_id["s2:0"] == by_id["s3:0"] == by_id["s2:2"] == 0.0


def test_a_single_chain_has_no_signal():
    credit = assign(make_tree([(None, 0, 3, True)]), elpo())
    assert credit.value.tolist() == [1.0] * 4 and not credit.advantage.any()


def test_rewards_must_be_finite():
    with pytest.raises(ValueError, match="rewards must be finite"):
        assign(flat_tree([1.0, math.inf]), elpo())


SEARCHED = [
    (None, 0, [OK, ERROR, OK, ERROR], False),  # 0: searched
    (None, 0, [ERROR, OK], True),  # 1
    (0, 2, [OK, ERROR, OK], True),  # 2: repairs the error of step 2
    (0, 3, [OK, ERROR, OK, OK], False),  # 3: shares the critical step 3
    (0, 1, [OK, OK, ERROR], False),  # 4: went its own way before it
    (None, 0, [OK], False),  # 5: never searched
]


def searched_tree(step=3, verified=True):
    return make_tree(SEARCHED, searches=(SearchRecord(0, "binary", step, verified),))


def test_first_wrong_concerns_every_failure():
    assert assign(searched_tree(), elpo()).first_failure.tolist() == [3, 0, 0, 3, 2, 1]
    assert assign(searched_tree(), elpo()).first_failure.dtype == np.int32


def test_searched_concerns_those_that_share_the_critical_step():
    first_failure = assign(searched_tree(), elpo(critical="searched")).first_failure
    assert first_failure.tolist() == [3, 0, 0, 3, 0, 0]
    # Named too early, which `random` may do: leaf 2 succeeded through step 2, so it is not irrecoverable for any leaf.
    assert not assign(searched_tree(2), elpo(critical="searched")).first_failure.any()
    assert assign(searched_tree(4), elpo(critical="searched")).first_failure.tolist() == [4, 0, 0, 0, 0, 0]
    assert not assign(searched_tree(0), elpo(critical="searched")).first_failure.any()
    final = assign(searched_tree(5), elpo(critical="searched"))  # K + 1, the final answer
    assert final.first_failure.tolist() == [5, 0, 0, 0, 0, 0]


def test_the_earliest_of_several_searches_has_priority():
    for steps in ((4, 3), (3, 4)):
        searches = tuple(SearchRecord(0, "binary", step, True) for step in steps)
        tree = make_tree(SEARCHED, searches=searches)
        assert assign(tree, elpo(critical="searched")).first_failure.tolist() == [3, 0, 0, 3, 0, 0]


def test_verified_leaves_out_what_was_not_probed():
    for verified in (True, False):
        first_failure = assign(searched_tree(verified=verified), elpo(critical="verified")).first_failure
        assert first_failure.any() == verified


def test_repaired_faults_are_recovered_and_not_critical():
    credit = assign(searched_tree(), elpo())
    # Step 2 of leaf 0 was repaired by leaf 2, so it is recovered for all that share it; step 4 was not.
    assert credit.recovered == ((2,), (1,), (2,), (2,), (), ())
    for leaf, steps in enumerate(credit.recovered):
        assert credit.first_failure[leaf] not in steps


@settings(max_examples=50, deadline=None)
@given(trees())
def test_recovered_and_critical_exclude_each_other(tree):
    credit = assign(tree, elpo())
    for index, leaf in enumerate(tree.leaves):
        first = credit.first_failure[index]
        assert (first == 0) == leaf.trajectory.success
        faults = {
            number
            for number, step in enumerate(leaf.trajectory.steps, 1)
            if step.result is not None and step.result.status.is_fault
        }
        if leaf.trajectory.success:
            assert set(credit.recovered[index]) == faults
        else:  # before the first wrong step everything was saved by some other leaf, after it nothing
            assert set(credit.recovered[index]) == {step for step in faults if step < first}


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(LOCALIZERS), st.sampled_from(["searched", "verified"]), st.integers(0, 10**6))
def test_what_a_search_names_is_critical_only_where_nothing_succeeded_through_it(localizer, critical, seed):
    def attempt(rollout, parent):
        rng = np.random.default_rng([seed, rollout.index])
        statuses = [OK] * rollout.anchor + [(OK, ERROR)[i] for i in rng.integers(0, 2, rng.integers(0, 4))]
        if parent is not None:
            statuses[: rollout.anchor] = [step.result.status for step in parent.steps[: rollout.anchor]]
        success = bool(rng.random() < 0.4)
        return make_trajectory(statuses, success, parent=parent, anchor=rollout.anchor, seed=rollout.index)

    tree = grow(Growth(make_task(), SearchConfig(localizer=localizer), seed), attempt)
    first_failure = first_failures(tree, critical)
    for record in tree.searches:  # of the searches that ask before they name, every one is heeded
        if record.first_failure and localizer != "random" and (critical == "searched" or record.verified):
            assert 0 < first_failure[record.leaf] <= record.first_failure
    for leaf, step in enumerate(first_failure):
        through = [] if step == 0 else tree.nodes()[tree.path(leaf)[step - 1]].leaves
        assert not any(tree.leaves[other].trajectory.success for other in through)
        assert step not in assign(tree, elpo()).recovered[leaf]


def test_second_and_third_irrecoverable_steps():
    statuses = [OK, OK, ERROR, OK, OK, Status.TIMEOUT]
    tree = make_tree(
        [
            (None, 0, statuses, False),
            (0, 1, [OK, OK], True),  # so step 1 is recoverable, and step 2 is the first irrecoverable one
            (0, 2, [OK, OK, OK], False),  # probes step 2
            (0, 5, [*statuses[:5], OK], False),  # probes step 5
        ]
    )
    assert irrecoverable_steps(tree, 0, 9) == (2, 3, 5, 6)  # first wrong, fault, failed probe, fault
    assert irrecoverable_steps(tree, 0) == (2, 3, 5)
    assert irrecoverable_steps(tree, 0, 1) == (2,)
    assert irrecoverable_steps(tree, 1) == ()
    assert irrecoverable_steps(tree, 2) == (2,)
    assert irrecoverable_steps(tree, 0, critical="searched") == ()


def test_recipes_have_the_published_numbers():
    assert elpo().scalars() == {
        "lambda_tree": 0.5,
        "eps_low": 0.2,
        "eps_high": 0.315,
        "eps_elc": 0.115,
        "critical_weight": 1.0,
        "dual_clip": 0.0,
        "kl": 0.0,
    }
    search = elpo().search
    assert (search.budget, search.buffer, search.x_min, search.x_max, search.beta) == (16, 3, 1, 3, 5.0)
    assert (elpo().ddof, elpo().normalisation, elpo().prefix_weight, search.localizer) == (
        0,
        "sequence",
        "per_leaf",
        "binary",
    )
    for recipe, name, eps_high in ((grpo(), "grpo", 0.2), (dapo(), "dapo", 0.28)):
        assert (recipe.name, recipe.ddof, recipe.normalisation) == (name, 1, "token")
        assert (recipe.lambda_tree, recipe.eps_low, recipe.eps_high, recipe.eps_elc) == (0.0, 0.2, eps_high, 0.0)
        assert recipe.search.localizer == "none" and recipe.search.budget == 16
    assert dapo(name="x", eps_high=0.3).eps_high == 0.3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "../x"}, "cannot name a folder"),
        ({"lambda_tree": 1.5}, "lambda_tree is 1.5; it must be between 0 and 1"),
        ({"lambda_tree": -0.1}, "lambda_tree is -0.1"),
        ({"eps_low": math.nan}, "eps_low is nan"),
        ({"eps_elc": 0.8}, r"eps_low \+ eps_elc is 1.0"),
        ({"dual_clip": 0.5}, "dual_clip is 0.5; it must be more than 1, or 0"),
        ({"ddof": 2}, "ddof is 2"),
        ({"critical": "all"}, "critical is 'all'; choose one of first_wrong, searched, verified"),
        ({"normalisation": "mean"}, "normalisation is 'mean'"),
        ({"prefix_weight": "twice"}, "prefix_weight is 'twice'"),
        ({"critical": "searched", "search": SearchConfig(localizer="none")}, "needs searches"),
        ({"search": SearchConfig(localizer="feedback")}, "critical='first_wrong' does not read: choose critical='sear"),
        ({"critical": "verified", "search": SearchConfig(localizer="feedback")}, "critical='verified' does not read"),
    ],
)
def test_impossible_recipes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        elpo(**fields)


def test_feedback_names_the_critical_step_without_a_rollout():
    statuses = {0: [OK, ERROR, OK], 1: [ERROR], 2: [OK]}

    def attempt(rollout, parent):
        return make_trajectory(statuses.get(rollout.index, 1), rollout.index not in statuses, seed=rollout.index)

    recipe = elpo(critical="searched", search=SearchConfig(budget=4, localizer="feedback"))
    credit = assign(grow(Growth(make_task(), recipe.search), attempt), recipe)
    assert credit.first_failure.tolist() == [2, 1, 0, 0]
    assert credit.recovered == ((), (), (), ())


def test_scalars_are_all_the_numbers_of_a_recipe():
    numbers = {field.name for field in dataclasses.fields(Recipe) if field.type in (float, "float")}
    assert set(elpo().scalars()) == numbers
    with pytest.raises(TypeError, match="epsilon_low"):
        elpo(epsilon_low=0.1)
