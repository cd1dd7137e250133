"""Rewards, against the published arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_jax.tasks.rewards import Reward, open_agentrl, overlong


def shape(reward, success=False, score=None, turns=2, response=0, model=0, most=20480):
    return reward.shape(success, score, turns, response, model, most)


@pytest.mark.parametrize(
    ("kind", "success", "score", "expected"),
    [
        ("zero_one", True, None, 1.0),
        ("zero_one", False, None, 0.0),
        ("zero_one", False, 0.75, 0.75),
        ("zero_one", True, 1.0, 1.0),
        ("plus_minus", True, None, 1.0),
        ("plus_minus", False, None, -1.0),
        ("plus_minus", False, 0.75, 0.5),
        ("open_agentrl", True, None, 1.0),
        ("open_agentrl", False, None, -1.0),
        ("open_agentrl", False, 0.75, 0.75),
        ("open_agentrl", False, 0.0, 0.0),  # a program that passes nothing is better than none
    ],
)
def test_outcomes(kind, success, score, expected):
    assert shape(Reward(kind), success, score) == expected


@pytest.mark.parametrize(
    ("calls", "expected"), [(0, -1.0), (1, -0.9), (2, -0.8), (3, -0.7), (4, -0.6), (5, -0.6), (15, -0.6)]
)
def test_calls_soften_a_failure_up_to_four(calls, expected):
    turns = 2 + 2 * calls
    assert open_agentrl(False, turns) == pytest.approx(expected, abs=1e-12)
    assert open_agentrl(True, turns) == 1.0
    assert open_agentrl(False, turns, constant_penalty=True) == pytest.approx(-1.1, abs=1e-12)  # ELPO, figure 4
    assert open_agentrl(True, turns, constant_penalty=True) == 1.0


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_overlong(tokens, expected):
    assert overlong(tokens, 20480, 4096) == pytest.approx(expected)
    assert overlong(tokens, 20480, 4096, factor=0.5) == pytest.approx(0.5 * expected)
    assert overlong(tokens, 20480, 0) == 0.0


def test_the_penalty_counts_what_it_is_told_to_and_hits_successes_too():
    reward = Reward("plus_minus", overlong_buffer=4096)
    assert shape(reward, True, response=18432, model=1000) == 0.5
    assert shape(reward, False, response=18432, model=1000) == -1.5
    model = Reward("plus_minus", overlong_buffer=4096, overlong_counts="model")
    assert shape(model, True, response=20480, model=1000) == 1.0
    assert shape(model, True, response=20480, model=18432) == 0.5


@given(
    st.sampled_from(["zero_one", "plus_minus", "open_agentrl"]),
    st.none() | st.floats(0, 0.99),
    st.integers(2, 40),
    st.integers(0, 4000),
)
def test_at_the_same_length_a_success_is_worth_more(kind, score, turns, tokens):
    reward = Reward(kind, overlong_buffer=500)
    won, lost = (shape(reward, s, score, turns, tokens, tokens, 4000) for s in (True, False))
    assert won > lost and lost >= -2.1 and won <= 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "best"}, "zero_one, plus_minus, open_agentrl"),
        ({"constant_penalty": True}, "open_agentrl"),
        ({"overlong_buffer": -1}, "0 or more"),
        ({"overlong_factor": float("nan")}, "0 or more"),
        ({"overlong_counts": "all"}, "response or model"),
    ],
)
def test_nonsense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Reward(**arguments)


def test_a_buffer_longer_than_the_response_is_refused():
    with pytest.raises(ValueError, match="longer than a response"):
        shape(Reward(overlong_buffer=300), most=200)
