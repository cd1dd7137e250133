"""Every localizer against an exact oracle, and what it claims to know when samples are missing."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.tools.base import Status
from elpo_jax.trees.localize import LOCALIZERS, BinarySearch, Localization, make_search

OK = Status.OK


def run(search, reachable):
    """Answers every probe by `reachable(step)`; returns the finished search and the waves of probed steps."""
    waves = []
    while steps := search.propose():
        waves.append(steps)
        search = search.observe({m: [reachable(m)] for m in steps})
    return search, waves


def test_the_inclusive_search_finds_every_step_in_logarithmic_waves():
    cases = 0
    for k in range(65):
        most = math.ceil(math.log2(k + 1))
        for truth in range(1, k + 2):
            search, waves = run(make_search("binary", [OK] * k), lambda m, truth=truth: m < truth)
            assert search.result == Localization(truth, True), (k, truth)
            assert len(waves) <= most and all(len(wave) == 1 for wave in waves), (k, truth)
            cases += 1
    assert cases == sum(k + 1 for k in range(65))


def test_the_printed_search_cannot_name_the_final_turn():
    for k in range(1, 65):
        for truth in range(1, k + 2):
            search, waves = run(make_search("binary_printed", [OK] * k), lambda m, truth=truth: m < truth)
            assert search.result.step == min(truth, k)
            assert search.result.verified == (truth < k), (k, truth)  # step k is never probed
            assert k not in {step for wave in waves for step in wave}
            assert len(waves) <= math.ceil(math.log2(k))
    assert make_search("binary_printed", []).result == Localization(1, True)


def test_the_printed_search_follows_algorithm_1():
    def algorithm_1(k, reachable):
        low, high, probed = 1, k, []
        while low < high:
            m = (low + high) // 2
            probed.append((m,))
            low, high = (m + 1, high) if reachable(m) else (low, m)
        return low, probed

    for k in range(1, 7):
        for pattern in range(2**k):  # recoverability need not be monotone

            def reachable(m, pattern=pattern):
                return bool(pattern >> (m - 1) & 1)

            search, waves = run(make_search("binary_printed", [OK] * k), reachable)
            assert (search.result.step, waves) == algorithm_1(k, reachable)


def test_dense_probes_everything_once():
    for k in range(9):
        for truth in range(1, k + 2):
            search, waves = run(make_search("dense", [OK] * k), lambda m, truth=truth: m < truth)
            assert search.result == Localization(truth, True)
            assert waves == ([tuple(range(1, k + 1))] if k else [])


def test_dense_takes_a_late_success_as_proof_for_every_earlier_step():
    search = make_search("dense", [OK] * 4)
    assert search.observe({1: [True], 2: [False], 3: [False, True], 4: [False]}).result == Localization(4, True)


def test_dense_under_missing_samples():
    search = make_search("dense", [OK] * 3)
    assert search.observe({1: [True]}).result == Localization(2, False)  # step 2 was not sampled
    assert search.observe({1: [True], 2: [False]}, {1: 1, 2: 2, 3: 1}).result == Localization(2, False)
    assert search.observe({1: [True], 2: [False, False]}, {1: 1, 2: 2, 3: 1}).result == Localization(2, True)
    assert search.observe({}).result == Localization(1, False)
    assert search.observe({}).propose() == ()


def test_where_nothing_can_follow_the_last_call_its_prefix_needs_no_probe():
    for localizer in ("binary", "binary_printed", "dense"):
        for k in range(1, 9):
            for truth in range(1, k + 1):
                search = make_search(localizer, [OK] * k, anchors=k - 1)
                search, waves = run(search, lambda m, truth=truth: m < truth)
                assert search.result == Localization(truth, True), (localizer, k, truth)
                assert k not in {step for wave in waves for step in wave}


def test_feedback_names_the_first_fault_without_a_probe():
    for status in Status:
        search = make_search("feedback", [OK, status, Status.ERROR])
        expected = 3 if status in (Status.OK, Status.SANDBOX_ERROR) else 2
        assert search.result == Localization(expected, False)
        assert search.propose() == ()
    assert make_search("feedback", [OK, OK]).result == Localization(0, False)


def test_random_is_uniform_and_probes_its_step_once():
    drawn = Counter()
    for i in range(4000):
        search = make_search("random", [OK] * 4, key=(3, i))
        (step,) = search.propose()
        assert search.result == Localization(step, False)
        after = search.observe({step: [True, True]})
        assert after.propose() == () and after.result == search.result
        drawn[step] += 1
    assert sorted(drawn) == [1, 2, 3, 4]
    assert all(abs(n - 1000) < 150 for n in drawn.values())  # 5.5 standard deviations
    assert make_search("random", [OK] * 9, key=(5, 6)) == make_search("random", [OK] * 9, key=(5, 6))
    alone = make_search("random", [])
    assert alone.propose() == () and alone.result == Localization(1, False)


def test_none_names_nothing():
    search = make_search("none", [Status.ERROR])
    assert search.propose() == () and search.result == Localization(0, False)


def test_without_samples_nothing_moves_and_nothing_is_verified():
    for localizer in ("binary", "binary_printed"):
        start = make_search(localizer, [OK] * 7)
        for outcomes in ({}, {4: []}):
            search = start.observe(outcomes, {4: 2})
            assert (search.low, search.high) == (1, 7)
            assert search.propose() == () and search.result == Localization(1, False)
        assert start.propose() == (4,)  # the value that was observed upon is unchanged


def test_a_probe_that_fell_short_moves_but_does_not_verify():
    search = make_search("binary", [OK])
    assert search.observe({1: [False]}, {1: 2}).result == Localization(1, False)
    assert search.observe({1: [False, False]}, {1: 2}).result == Localization(1, True)
    assert search.observe({1: [True]}, {1: 2}).result == Localization(2, True)  # one success is proof


def test_a_later_complete_probe_repairs_an_incomplete_one():
    short = make_search("binary", [OK] * 3).observe({2: [False]}, {2: 3})
    assert short.observe({1: [False]}).result == Localization(1, True)
    assert short.observe({1: [True]}).result == Localization(2, False)  # rests on the probe that fell short


def test_an_unfinished_search_gives_its_lower_bound_unverified():
    search = make_search("binary", [OK] * 7).observe({4: [True]})
    assert search.result == Localization(5, False) and search.propose() == (6,)


@settings(deadline=None)
@given(
    k=st.integers(0, 20),
    localizer=st.sampled_from(["binary", "binary_printed", "dense"]),
    data=st.data(),
)
def test_verified_means_that_both_neighbours_are_known(k, localizer, data):
    search, samples, planned = make_search(localizer, [OK] * k), {}, {}
    while steps := search.propose():
        outcomes = {m: data.draw(st.lists(st.booleans(), max_size=3)) for m in steps}
        wanted = {m: data.draw(st.integers(max(1, len(o)), 3)) for m, o in outcomes.items()}
        search = search.observe(outcomes, wanted)
        samples |= outcomes
        planned |= wanted
    t, verified = search.result.step, search.result.verified
    assert 1 <= t <= k + 1
    below = t == 1 or any(samples.get(t - 1, ()))
    at = t == k + 1 or (t in samples and not any(samples[t]) and len(samples[t]) == planned[t])
    assert below  # no search goes past a step without a success there
    assert verified <= at
    if localizer != "binary_printed" and all(samples.values()):
        assert verified == at


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"outcomes for steps \[3\], but the search asked for steps \[2\]"):
        BinarySearch(3, True).observe({3: [True]})
    for localizer in LOCALIZERS:
        with pytest.raises(ValueError, match="asked for steps"):
            make_search(localizer, [OK] * 3).observe({9: [True]})
    with pytest.raises(ValueError, match="no localizer 'bisect'; choose one of binary, "):
        make_search("bisect", [])
    with pytest.raises(ValueError, match="anchors must be K - 1 or K, where K = 3"):
        make_search("binary", [OK] * 3, anchors=1)
    with pytest.raises(ValueError, match="anchors must be"):
        make_search("binary", [], anchors=-1)
