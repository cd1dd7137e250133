"""avg@k, pass@k, maj@k and their intervals against brute force, and a family's figures against a table by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
from factories import make_task, make_trajectory

from elpo_jax.tools.base import Status
from elpo_jax.train.evaluate import Protocol, average_at_k, bootstrap_interval, majority_at_k, pass_at_k, summarise
from elpo_jax.trees.trajectory import Finish


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


OK = Status.OK
# Five attempts at each of three tasks: statuses of the tool calls, and the answer; "42" is right.
PLAYED = {
    "two steps, 2 of 5": [
        ([OK], "42"),
        ([OK, Status.ERROR], "41"),
        ([], ""),
        ([Status.MALFORMED, Status.TIMEOUT, OK], "41"),
        ([Status.EMPTY], "42"),
    ],
    "two steps, 0 of 5": [([], "41")] * 5,
    "three steps, 3 of 5": [([OK, OK], "7"), ([OK, OK], "7"), *[([OK, OK], "42")] * 3],
}


def attempts(rows):
    """Turns of three tokens each; an attempt without an answer was cut by its token limit."""
    out = []
    for seed, (statuses, answer) in enumerate(rows):
        attempt = make_trajectory(statuses, answer == "42", tokens=3, seed=seed)
        finish = Finish.ANSWER if answer else Finish.LENGTH
        out.append(dataclasses.replace(attempt, answer=answer, finish=finish))
    return out


def tasks(*difficulties):
    return [dataclasses.replace(make_task(uid), difficulty=d) for uid, d in enumerate(difficulties)]


def test_figures_of_a_family_by_hand():
    found = summarise(tasks(2, 2, 3), [attempts(rows) for rows in PLAYED.values()], bootstrap=200, seed=4)

    def figure(*values):
        return {"value": pytest.approx(np.mean(values)), "ci": list(bootstrap_interval(np.array(values), 200, 4))}

    # pass@2 of 2 in 5: 1 - C(3,2)/C(5,2) = 0.7; of 3 in 5: 1 - C(2,2)/C(5,2) = 0.9. The first task's vote is a tie of
    # "42" and "41", which "42" wins, for it was given first.
    two = {
        "avg@5": pytest.approx(0.2),
        "ci": figure(0.4, 0.0)["ci"],
        "n": 2,
        "pass@2": figure(0.7, 0.0),
        "pass@4": figure(1.0, 0.0),
        "pass@5": figure(1.0, 0.0),
        "maj@5": figure(1.0, 0.0),
        "tool_calls": pytest.approx(7 / 10),
        "tokens": pytest.approx(3 * (7 + 10) / 10),  # a turn per call and a last one
    }
    three = {
        "avg@5": pytest.approx(0.6),
        "ci": figure(0.6)["ci"],
        "n": 1,
        "pass@2": figure(0.9),
        "pass@4": figure(1.0),
        "pass@5": figure(1.0),
        "maj@5": figure(1.0),
        "tool_calls": 2.0,
        "tokens": 9.0,
    }
    assert found == {
        "avg@5": pytest.approx(1 / 3),
        "ci": figure(0.4, 0.0, 0.6)["ci"],
        "n": 3,
        "pass@2": figure(0.7, 0.0, 0.9),
        "pass@4": figure(1.0, 0.0, 1.0),
        "pass@5": figure(1.0, 0.0, 1.0),
        "maj@5": figure(1.0, 0.0, 1.0),
        "tool_calls": pytest.approx(17 / 15),
        "tokens": pytest.approx(3 * (17 + 15) / 15),
        "by_difficulty": {"2": two, "3": three},
        "per_task": [pytest.approx(0.4), 0.0, pytest.approx(0.6)],
        "status": {"ok": 13, "error": 1, "malformed": 1, "timeout": 1, "empty": 1},
        "finish": {"answer": 14, "length": 1},
    }
    assert found["ci"][0] < 1 / 3 < found["ci"][1]


@pytest.mark.parametrize("k, doubles", [(1, [1]), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])])
def test_pass_is_given_at_doubles_up_to_k(k, doubles):
    found = summarise(tasks(2), [attempts([([OK], "42")] * k)], bootstrap=10, seed=0)
    assert [key for key in found if key.startswith("pass@")] == [f"pass@{j}" for j in doubles]
    assert {found[f"pass@{j}"]["value"] for j in doubles} == {found[f"avg@{k}"], found[f"maj@{k}"]["value"]} == {1.0}


def test_figures_do_not_depend_on_the_order_of_the_tasks_but_for_their_list():
    rows = [attempts(rows) for rows in PLAYED.values()]
    one = summarise(tasks(3, 2, 4), rows, bootstrap=50, seed=0)
    other = summarise(tasks(3, 2, 4)[::-1], rows[::-1], bootstrap=50, seed=0)
    assert list(one["by_difficulty"]) == ["2", "3", "4"] and one["by_difficulty"] == other["by_difficulty"]
    assert one["per_task"] == other["per_task"][::-1] and one["avg@5"] == pytest.approx(other["avg@5"])


def test_the_protocol_says_everything_that_a_figure_depends_on():
    protocol = Protocol(
        split="test",
        families={"wordmath": "200 tasks, 2 steps and 1 calls of slack", "ledger": "100 tasks, noise 0.25"},
        k=8,
        temperature=0.6,
        top_p=0.9,
        seed=3,
        max_turn_tokens=64,
        context=256,
        isolation="namespaces",
        checkers={"wordmath": "exact"},
        majority_ties="first",
        interval="95 % bootstrap",
    )
    assert protocol.line() == (
        "test split (wordmath: 200 tasks, 2 steps and 1 calls of slack; ledger: 100 tasks, noise 0.25), k=8, "
        "temperature 0.6, top-p 0.9, seed 3, turn <= 64 tokens, context 256; "
        "isolation of programs: namespaces; checker: wordmath: exact; maj@k ties: first; 95 % bootstrap"
    )
    unsafe = dataclasses.replace(protocol, isolation="unsafe")
    assert "isolation of programs: NONE (unsafe); " in unsafe.line()
    others = {"families": {"wordmath": "5 tasks"}, "checkers": {"wordmath": "none"}, "own_k": {"ledger": 4}}
    for name, value in vars(protocol).items():  # no part of it is left out
        other = others.get(name) or value + ("!" if isinstance(value, str) else 1)
        assert dataclasses.replace(protocol, **{name: other}).line() != protocol.line(), name
