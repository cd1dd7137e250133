"""The growth of a tree: the exact budget, eq. 4 and 5, infrastructure failures, and any order of arrival."""

import json
import math

import numpy as np
import pytest
from factories import grow, make_step, make_task, make_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.tools.base import Status
from elpo_jax.trees.grow import Growth, Rollout, SearchConfig, entropy_gap, mean_entropy, suffix_count
from elpo_jax.trees.localize import LOCALIZERS
from elpo_jax.trees.serial import tree_to_json
from elpo_jax.trees.trajectory import Finish, Trajectory
from elpo_jax.trees.tree import Probe, SearchRecord


@st.composite
def configs(draw):
    localizer = draw(st.sampled_from(LOCALIZERS))
    buffer = draw(st.integers(1, 4))
    x_min = draw(st.integers(1, 3))
    return SearchConfig(
        budget=draw(st.integers(buffer + 1, 20)),
        buffer=buffer,
        x_min=x_min,
        x_max=draw(st.integers(x_min, 5)),
        beta=draw(st.sampled_from([0.0, 1.0, 5.0, 1e9])),
        localizer=localizer,
        entropy_window=draw(st.sampled_from([None, 1, 20])),
        infrastructure_retries=draw(st.integers(0, 3)),
    )


def random_world(seed: int, success: float, lost: float):
    """Outcomes that depend on the rollout and on how often it was tried, but not on when."""
    tries: dict[int, int] = {}  # by index

    def attempt(rollout, parent):
        tries[rollout.index] = tries.get(rollout.index, 0) + 1
        rng = np.random.default_rng([seed, rollout.index, tries[rollout.index]])
        if rng.random() < lost:
            return None
        own = int(rng.integers(0, 5))
        statuses = [Status.OK] * rollout.anchor + [list(Status)[int(i)] for i in rng.integers(0, 9, own)]
        entropies = rng.random(len(statuses) + 1)
        return make_trajectory(
            statuses,
            bool(rng.random() < success),
            parent=parent,
            anchor=rollout.anchor,
            entropies=[float(x) for x in entropies],
            seed=rollout.index,
        )

    return attempt, tries


worlds = {
    "seed": st.integers(0, 10**6),
    "success": st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    "lost": st.sampled_from([0.0, 0.1, 0.6, 1.0]),
}


@settings(max_examples=200, deadline=None)
@given(config=configs(), order=st.integers(0, 10**6), **worlds)
def test_the_budget_is_exact_whatever_happens_and_arrival_does_not_matter(config, order, seed, success, lost):
    attempt, tries = random_world(seed, success, lost)
    tree = grow(Growth(make_task(), config, seed), attempt, np.random.default_rng(order))
    again = grow(Growth(make_task(), config, seed), random_world(seed, success, lost)[0])
    assert json.dumps(tree_to_json(tree, decode_token=str)) == json.dumps(tree_to_json(again, decode_token=str))
    assert len(tree.leaves) <= config.budget
    assert tree.truncated == (len(tree.leaves) < config.budget)
    # Every lost rollout had all its retries before the tree was given up, and nothing else gave it up.
    assert tree.infrastructure_failures == sum(tries.values()) - len(tree.leaves)
    assert max(tries.values()) <= 1 + config.infrastructure_retries
    lost_for_good = len(tries) - len(tree.leaves)
    assert tree.truncated == (lost_for_good > 0)
    assert sum(n == 1 + config.infrastructure_retries for n in tries.values()) >= lost_for_good
    probed = [leaf for search in tree.searches for probe in search.probes for leaf in probe.leaves]
    assert sorted(probed) == [i for i, leaf in enumerate(tree.leaves) if leaf.parent is not None]
    for search in tree.searches:
        assert not tree.leaves[search.leaf].trajectory.success and tree.leaves[search.leaf].parent is None
        for probe in search.probes:
            assert config.x_min <= probe.planned <= config.x_max and 1 <= len(probe.leaves) <= probe.planned
            assert all(tree.leaves[i].parent == search.leaf for i in probe.leaves)
            assert all(tree.leaves[i].anchor == probe.step for i in probe.leaves)
    short = [p for s in tree.searches for p in s.probes if len(p.leaves) < p.planned]
    assert not short or tree.truncated or len(tree.leaves) == config.budget  # only the end cuts a probe short
    if config.localizer in ("none", "feedback"):
        assert not probed
    if config.localizer == "none":
        assert not tree.searches


def test_eq_5_at_the_values_of_the_paper():
    # X_m before rounding at X_min=1, X_max=3, beta=5, and the rounding threshold |gap| = ln(3) / 5
    config = SearchConfig()
    exact = {-0.5: 1.15, -0.22: 1.50, -0.1: 1.76, 0: 2.0, 0.1: 2.24, 0.22: 2.50, 0.5: 2.85}
    for gap, value in exact.items():
        assert 1 + 2 / (1 + math.exp(-5 * gap)) == pytest.approx(value, abs=6e-3)
    threshold = math.log(3) / 5
    gaps = [-100, -threshold - 1e-6, -threshold + 1e-6, 0, threshold - 1e-6, threshold + 1e-6, 100]
    assert [suffix_count(config, gap) for gap in gaps] == [1, 1, 2, 2, 2, 3, 3]
    assert suffix_count(SearchConfig(x_min=1, x_max=2), 0.0) == 2  # 1.5: halves up
    assert suffix_count(SearchConfig(x_min=2, x_max=3), 0.0) == 3  # 2.5: not to the even number
    assert {suffix_count(SearchConfig(x_min=2, x_max=2), gap) for gap in gaps} == {2}


def test_entropy_gap_by_hand():
    attempt = make_trajectory(2, entropies=[0.2, 0.5, 0.9], tokens=3)
    assert entropy_gap(attempt) == pytest.approx((0.5 - 0.2 + 0.9 - 0.2) / 2)
    assert entropy_gap(make_trajectory(0)) == -math.inf
    turn = make_step(None, tokens=4).turn
    turn.entropies[:] = [0.25, 0.75, 1.0, 2.0]
    assert (mean_entropy(turn), mean_entropy(turn, 2), mean_entropy(turn, 9)) == (1.0, 0.5, 1.0)
    assert mean_entropy(make_step(None, tokens=0).turn) == 0.0


def scripted(statuses_of, success_of=lambda rollout: False, entropies_of=lambda rollout: 0.5):
    def attempt(rollout, parent):
        return make_trajectory(
            statuses_of(rollout),
            success_of(rollout),
            parent=parent,
            anchor=rollout.anchor,
            entropies=entropies_of(rollout),
            seed=rollout.index,
        )

    return attempt


@pytest.mark.parametrize(
    "entropies, selected",
    [
        ({0: [0.5, 0.6, 0.6], 1: [0.5, 0.9, 0.9], 2: [0.5, 0.7, 0.7]}, 1),
        ({0: [0.9, 1.1, 1.1], 1: [0.1, 0.4, 0.4], 2: [0.0, 0.1, 0.1]}, 1),  # the gap counts, not the level
        ({0: [0.5, 0.5, 0.5], 1: [0.5, 0.75, 0.25], 2: [0.5, 0.25, 0.75]}, 0),  # of equals the earliest
        ({0: [0.5, 0.4, 0.4], 1: [0.5, 0.4, 0.6], 2: [0.5, 0.4, 0.65]}, 2),
    ],
)
def test_eq_4_selects_by_entropy_gap(entropies, selected):
    attempt = scripted(lambda r: 2, entropies_of=lambda r: entropies.get(r.index, 0.5))
    tree = grow(Growth(make_task(), SearchConfig(budget=4)), attempt)
    assert [leaf.parent for leaf in tree.leaves] == [None, None, None, selected]


def test_an_attempt_without_tool_calls_is_searched_last_and_for_free():
    attempt = scripted(lambda r: 0 if r.index in (0, 1, 4, 5, 6) else 1, entropies_of=lambda r: 0.1)
    tree = grow(Growth(make_task(), SearchConfig(budget=9, x_max=1)), attempt)
    assert [(s.leaf, s.first_failure, s.verified, s.probes) for s in tree.searches] == [
        (2, 1, True, (Probe(1, (3,), 1),)),
        (4, 1, True, ()),
    ]
    assert [leaf.parent for leaf in tree.leaves] == [None, None, None, 2, None, None, None, None, None]


def test_successes_spend_budget_and_stay_out_of_the_buffer():
    tree = grow(Growth(make_task(), SearchConfig()), scripted(lambda r: 2, lambda r: True))
    assert len(tree.leaves) == 16 and not tree.searches and tree.roots == tuple(range(16))
    waves = waves_of(SearchConfig(budget=6), scripted(lambda r: 2, lambda r: r.index in (0, 1)))
    assert [[r.index for r in wave] for wave in waves] == [[0, 1, 2], [3, 4], [5]]
    assert [r.parent for r in waves[2]] == [2]


def test_failure_is_the_flag_and_not_the_reward():
    def attempt(rollout, parent):
        # A correct answer with reward 0 (say, too long), and a wrong one with a partial reward.
        correct = rollout.index in (0, 1)
        reward = 0.0 if correct else 0.4
        return make_trajectory(1, correct, reward, parent=parent, anchor=rollout.anchor, seed=rollout.index)

    tree = grow(Growth(make_task(), SearchConfig(budget=6)), attempt)
    assert tree.searches[0].leaf == 2 and [leaf.parent for leaf in tree.leaves[:5]] == [None] * 5


def test_failed_continuations_do_not_enter_the_buffer_and_the_rest_of_it_is_dropped():
    tree = grow(Growth(make_task(), SearchConfig(budget=12, x_min=2, x_max=2)), scripted(lambda r: 1))
    assert [leaf.parent for leaf in tree.leaves] == [None] * 3 + [0] * 2 + [None] * 3 + [5] * 2 + [None] * 2
    assert [search.leaf for search in tree.searches] == [0, 5]


def test_all_continuations_run_even_after_a_success():
    attempt = scripted(lambda r: 1, lambda r: r.parent is not None)
    waves = waves_of(SearchConfig(budget=8, x_min=3, x_max=3), attempt)
    assert [len(wave) for wave in waves] == [3, 3, 2]


def test_a_budget_that_ends_inside_a_search_leaves_it_unverified():
    attempt = scripted(lambda r: 7)
    (cut,) = grow(Growth(make_task(), SearchConfig(budget=4, x_min=2, x_max=2)), attempt).searches
    assert cut == SearchRecord(0, "binary", 1, False, (Probe(4, (3,), 2),))
    (between,) = grow(Growth(make_task(), SearchConfig(budget=5, x_min=2, x_max=2)), attempt).searches
    assert between == SearchRecord(0, "binary", 1, False, (Probe(4, (3, 4), 2),))
    reachable = scripted(lambda r: 7, lambda r: r.parent is not None)
    (right,) = grow(Growth(make_task(), SearchConfig(budget=5, x_min=2, x_max=2)), reachable).searches
    assert (right.first_failure, right.verified) == (5, False)


def test_dense_probes_all_steps_in_one_wave_as_far_as_the_budget_goes():
    attempt = scripted(lambda r: 4, lambda r: r.anchor == 1)
    config = SearchConfig(budget=12, localizer="dense", x_min=2, x_max=2)
    waves = waves_of(config, attempt)
    assert [[r.anchor for r in wave] for wave in waves] == [[0, 0, 0], [1, 1, 2, 2, 3, 3, 4, 4], [0]]
    assert grow(Growth(make_task(), config), attempt).searches[0].first_failure == 2
    short = SearchConfig(budget=6, localizer="dense", x_min=2, x_max=2)
    (search,) = grow(Growth(make_task(), short), attempt).searches
    assert search == SearchRecord(0, "dense", 2, False, (Probe(1, (3, 4), 2), Probe(2, (5,), 2)))


def test_random_probes_one_drawn_step_and_repeats_itself():
    config = SearchConfig(localizer="random")
    first = grow(Growth(make_task(), config, seed=3), scripted(lambda r: 5))
    same = grow(Growth(make_task(), config, seed=3), scripted(lambda r: 5))
    assert first.searches == same.searches
    assert all(len(s.probes) == 1 and s.probes[0].step == s.first_failure for s in first.searches)
    drawn = {
        search.first_failure
        for seed in range(30)
        for search in grow(Growth(make_task(), config, seed=seed), scripted(lambda r: 5)).searches
    }
    assert drawn == {1, 2, 3, 4, 5}


def test_none_and_feedback_spend_the_budget_in_one_wave():
    statuses = {1: [Status.OK, Status.ERROR], 2: [Status.EMPTY], 3: [Status.OK]}
    attempt = scripted(lambda r: statuses.get(r.index, 1), lambda r: r.index not in statuses)
    for localizer in ("none", "feedback"):
        waves = waves_of(SearchConfig(budget=5, localizer=localizer), attempt)
        assert [len(wave) for wave in waves] == [5]
    assert not grow(Growth(make_task(), SearchConfig(localizer="none")), attempt).searches
    tree = grow(Growth(make_task(), SearchConfig(localizer="feedback")), attempt)
    assert [(s.leaf, s.first_failure, s.verified) for s in tree.searches] == [
        (1, 2, False),
        (2, 1, False),
        (3, 0, False),
    ]


def waves_of(config, attempt):
    """What each round proposes when all of it is answered before the next question."""
    growth, waves, seen = Growth(make_task(), config), [], {}
    while not growth.done:
        wave = growth.propose()
        assert growth.propose() == []  # handed out once
        waves.append(wave)
        for rollout in wave:
            assert not growth.done
            seen[rollout.index] = attempt(rollout, None if rollout.parent is None else seen[rollout.parent])
            growth.observe(rollout.index, seen[rollout.index])
    return waves


def test_a_lost_rollout_is_sampled_again_outside_the_budget():
    config = SearchConfig(budget=4, localizer="none", infrastructure_retries=1)
    growth = Growth(make_task(), config)
    assert [r.index for r in growth.propose()] == [0, 1, 2, 3]
    for index in (3, 1):
        growth.observe(index, None)
    growth.observe(0, make_trajectory(0))
    assert growth.propose() == []  # the rest of the wave first
    growth.observe(2, make_trajectory(0))
    assert growth.propose() == [Rollout(1), Rollout(3)]
    growth.observe(3, make_trajectory(0))
    growth.observe(1, make_trajectory(0))
    tree = growth.tree()
    assert (len(tree.leaves), tree.infrastructure_failures, tree.truncated) == (4, 2, False)


@pytest.mark.parametrize("lost", [1, 9, 16])
def test_a_wave_of_losses_is_retried_however_many_they_are(lost):
    """GRPO samples its whole budget at once: a hiccup that hits most of the wave must not end the tree."""
    seen = set()

    def attempt(rollout, parent):
        if rollout.index < lost and rollout.index not in seen:
            seen.add(rollout.index)
            return None
        return make_trajectory(1, seed=rollout.index)

    tree = grow(Growth(make_task(), SearchConfig(localizer="none")), attempt)
    assert (len(tree.leaves), tree.infrastructure_failures, tree.truncated) == (16, lost, False)


def test_every_wave_has_its_own_retries():
    seen = {}

    def attempt(rollout, parent):
        seen[rollout.index] = seen.get(rollout.index, 0) + 1
        if seen[rollout.index] == 1:
            return None
        return make_trajectory(2, parent=parent, anchor=rollout.anchor, seed=rollout.index)

    tree = grow(Growth(make_task(), SearchConfig(infrastructure_retries=1)), attempt)
    assert (len(tree.leaves), tree.infrastructure_failures, tree.truncated) == (16, 16, False)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_rollout_that_stays_lost_ends_the_tree_with_what_it_has(retries):
    config = SearchConfig(budget=9, x_min=3, x_max=3, infrastructure_retries=retries)

    def attempt(rollout, parent):
        if rollout.index in (3, 4):
            return None
        return make_trajectory(2, parent=parent, anchor=rollout.anchor, seed=rollout.index)

    tree = grow(Growth(make_task(), config), attempt)
    assert (len(tree.leaves), tree.infrastructure_failures, tree.truncated) == (4, 2 * (1 + retries), True)
    assert tree.leaves[3].trajectory.steps[-1].turn.ids.tolist() == make_step(None, seed=502).turn.ids.tolist()
    assert tree.searches == (SearchRecord(0, "binary", 1, False, (Probe(1, (3,), 3),)),)


def test_misuse_is_named():
    growth = Growth(make_task(), SearchConfig())
    with pytest.raises(RuntimeError, match="toy/train/7 is still growing"):
        growth.tree()
    with pytest.raises(ValueError, match="rollout 0 is not running"):
        growth.observe(0, make_trajectory(1))
    growth.propose()
    with pytest.raises(ValueError, match="rollout 5 is not running"):
        growth.observe(5, make_trajectory(1))
    plain = make_trajectory(1)
    lost = Trajectory(plain.prompt, plain.steps, Finish.INFRASTRUCTURE, False, 0.0)
    with pytest.raises(ValueError, match="rollout 0 was lost to the infrastructure; report None"):
        growth.observe(0, lost)
    with pytest.raises(ValueError, match="rollout 0 ends with a tool response that no turn follows"):
        growth.observe(0, Trajectory(plain.prompt, plain.steps[:1], Finish.MAX_STEPS, False, 0.0))
    turn = plain.steps[0].turn
    bare = type(plain.steps[0])(type(turn)(turn.author, turn.ids))
    with pytest.raises(ValueError, match="rollout 0 has turns without entropies"):
        growth.observe(0, Trajectory(plain.prompt, (bare,), Finish.ANSWER, False, 0.0))
    growth.observe(0, plain)  # a refused report changes nothing
    with pytest.raises(ValueError, match="rollout 0 is not running"):
        growth.observe(0, plain)
    for index in (1, 2):
        growth.observe(index, make_trajectory(1))
    assert growth.propose()[0] == Rollout(3, 0, 1)
    with pytest.raises(ValueError, match="leaf 3 does not share its first 1 steps with leaf 0"):
        growth.observe(3, make_trajectory(1, parent=make_trajectory(1), anchor=1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"localizer": "bisect"}, "'bisect' is unknown; choose one of binary"),
        ({"budget": 0}, "budget is 0; it must be at least 1"),
        ({"buffer": 0}, "buffer is 0"),
        ({"x_min": 0}, "x_min is 0"),
        ({"x_min": 3, "x_max": 2}, "x_max is 2; it must be at least x_min, 3"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"entropy_window": 0}, "entropy_window is 0; use None"),
        ({"infrastructure_retries": -1}, "infrastructure_retries is -1"),
        ({"budget": 3}, "nothing would be left to search; use a smaller buffer"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**fields)


def test_a_small_flat_budget_is_possible():
    assert SearchConfig(budget=1, localizer="none").budget == 1
