"""avg@k, pass@k, maj@k and their intervals against brute force."""

import itertools

import numpy as np
import pytest

from elpo_jax.train.evaluate import average_at_k, bootstrap_interval, majority_at_k, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    rng = np.random.default_rng(0)
    success = rng.random((30, 7)) < rng.random((30, 1))
    for k in range(1, 8):
        brute = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in success]
        np.testing.assert_allclose(pass_at_k(success, k), brute, atol=1e-12)
    np.testing.assert_allclose(pass_at_k(success, 1), average_at_k(success))
    with pytest.raises(ValueError, match="pass@8"):
        pass_at_k(success, 8)


def test_majority_ties_go_to_the_first_answer_and_silence_does_not_vote():
    answers = [["1", "2", "2"], ["1", "2"], ["2", "1"], ["", "", "3"], ["", ""], ["", "5", "4", "4", "5"]]
    right = ["2", "1", "1", "3", "", "5"]
    width = max(map(len, answers))
    success = np.zeros((len(answers), width), bool)
    for i, row in enumerate(answers):
        success[i, : len(row)] = [a == right[i] and a != "" for a in row]
    np.testing.assert_array_equal(majority_at_k(answers, success), [1, 1, 0, 1, 0, 1])


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        values = (rng.random(80) < 0.4).astype(float)
        low, high = bootstrap_interval(values, 400, trial)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 300 <= 0.985
    assert bootstrap_interval(np.ones(5), 100, 0) == (1.0, 1.0)
