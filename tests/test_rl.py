"""The policy-gradient loop's figures: what a row of its log says of trees and updates."""

import types

import numpy as np
import pytest
from factories import make_tree

from elpo_jax.config import RlConfig
from elpo_jax.policy.credit import assign
from elpo_jax.policy.recipes import elpo
from elpo_jax.report.log import MetricsLog, read_metrics
from elpo_jax.tools.base import InfrastructureError, Status
from elpo_jax.tools.sandbox import Sandbox
from elpo_jax.train import rl
from elpo_jax.train.rl import rollout_metrics, stop_if_truncated, update_metrics
from elpo_jax.trees.tree import Probe, SearchRecord


def test_update_metrics_are_means_per_token_and_maxima_and_tell_the_first_update_apart():
    first = {
        "tokens": 10.0, "clip_low": 2.0, "entropy": 5.0, "ratio_deviation_max": 1e-6, "mismatch_max": 1e-5,
        "mismatch_mean": 2e-5, "loss": 1.0, "grad_norm": 3.0, "lr": 0.1, "skipped": 0.0,
    }  # fmt: skip
    second = first | {
        "tokens": 30.0, "clip_low": 0.0, "entropy": 3.0, "ratio_deviation_max": 0.5, "mismatch_max": 0.4,
        "mismatch_mean": 6.0, "loss": 0.0, "skipped": 1.0,
    }  # fmt: skip
    row = update_metrics([first, second])
    assert row["loss/tokens"] == 40 and row["loss/clip_low"] == 2 / 40 and row["loss/entropy"] == 8 / 40
    assert row["loss/ratio_deviation_max"] == 0.5 and row["loss/mismatch_max"] == 0.4
    assert row["loss/mismatch_mean"] == pytest.approx(6.00002 / 40)
    assert row["loss/first_ratio_deviation_max"] == 1e-6 and row["loss/first_mismatch_max"] == 1e-5
    assert row["loss/first_mismatch_mean"] == pytest.approx(2e-6), "per token of the first update"
    assert row["loss"] == 0.5 and row["grad_norm"] == 3.0 and row["skipped"] == 1.0


def test_rollout_metrics_count_each_sampled_token_once_and_average_roots_per_prompt():
    mixed = make_tree(
        [
            (None, 0, [Status.OK, Status.ERROR], False),  # searched
            (None, 0, [Status.OK], True),
            (0, 1, [Status.OK, Status.OK], True),  # samples one call and one answer of its own
            (0, 1, [Status.OK, Status.MALFORMED], False),
        ],
        searches=(SearchRecord(0, "binary", 2, True, (Probe(1, (2, 3), 2),)),),
    )
    flat = make_tree([(None, 0, 0, False), (None, 0, 0, False)], infrastructure_failures=3)
    credits = [assign(tree, elpo()) for tree in (mixed, flat)]
    row = rollout_metrics([mixed, flat], credits)
    turns = 3 + 2 + 2 + 2 + 1 + 1  # own turns of each leaf; two tokens each, by the factory
    assert row["rollout/rollouts"] == 6 and row["rollout/model_tokens"] == 2 * turns
    assert row["rollout/tool_calls"] == 2 + 1 + 1 + 1 and row["rollout/infrastructure_failures"] == 3
    assert row["rollout/success"] == 2 / 6
    assert row["rollout/root_success"] == pytest.approx((1 / 2 + 0) / 2), "continuations are no sample of the policy"
    assert row["rollout/entropy"] == pytest.approx(0.5)
    assert row["tree/searches"] == 1 and row["tree/verified"] == 1.0 and row["tree/mixed"] == 0.5
    # first_wrong: leaf 0 fails from its second step on, leaf 3 likewise, both leaves of the other tree at once.
    assert row["tree/first_failure_mean"] == pytest.approx(np.mean([2, 2, 1, 1]))
    assert row["status/ok"] == 3 / 5 and row["status/error"] == 1 / 5 and row["status/malformed"] == 1 / 5


def test_a_tree_that_our_failures_ended_stops_the_run_with_a_remedy():
    whole = make_tree([(None, 0, 1, False)], infrastructure_failures=2)
    stop_if_truncated([whole])
    cut = make_tree([(None, 0, 1, False)], infrastructure_failures=9, truncated=True)
    with pytest.raises(InfrastructureError, match=r"9 attempts at 1 of 2 prompts .*--resume"):
        stop_if_truncated([whole, cut])


def test_a_row_has_what_the_sandbox_did_in_its_step_validation_included(monkeypatch, tmp_path):
    """Real programs, some of which are lost; what the sandbox did before the loop is in no row."""
    tree = make_tree([(None, 0, 1, False), (None, 0, 1, True)])
    with Sandbox(workers=1, packages=()) as sandbox:
        attempt, broken = sandbox._attempt, []

        def attempt_or_fail(*program):
            sandbox._breaker.clear()
            if broken:
                raise InfrastructureError(broken.pop())
            return attempt(*program)

        def collect(tasks, *rest, step, **more):
            assert sandbox.run_many(["print(1)"] * (step + 2))[-1].stdout == "1\n"
            return [tree] * len(tasks)

        def validate(step):
            broken.extend(["worker died"] * 4)  # a program and all its retries, and one attempt at the next
            statuses = [result.status for result in sandbox.run_many(["print(2)"] * 3)]
            assert statuses == [Status.SANDBOX_ERROR, Status.OK, Status.OK]
            return {"eval/wordmath/avg@1": 0.5}

        sandbox._attempt = attempt_or_fail
        monkeypatch.setattr(rl, "collect", collect)
        monkeypatch.setattr(rl, "update", lambda config, recipe, learner, state, *_: (state, {}))
        learner = types.SimpleNamespace(
            first_task=0,
            seed=0,
            temperature=1.0,
            environment=types.SimpleNamespace(sandbox=sandbox),
            stream=types.SimpleNamespace(task=lambda split, n: n),
            sampler=types.SimpleNamespace(load=lambda params, version: None, occupancy=0.5),
            validate=validate,
        )
        sandbox.run("print(0)")
        with MetricsLog(tmp_path / "metrics.jsonl") as log:
            rl.train_rl(
                RlConfig(steps=3, prompts=2, updates=1, eval_every=2, dump_every=0), elpo(), learner,
                types.SimpleNamespace(params=None), start=0, meta={}, log=log, dumps=tmp_path,
                checkpoints=types.SimpleNamespace(save=lambda *_: None),
            )  # fmt: skip
        rows = read_metrics(tmp_path / "metrics.jsonl")
        names = ("calls", "sandbox_errors", "retries", "restarts", "paused_s")
        found = [[row[f"sandbox/{name}"] for name in names] for row in rows]
        assert found == [[2, 0, 0, 0, 0], [3 + 3, 1, 2 + 1, 3 + 1, 0], [4, 0, 0, 0, 0]]
        totals = sandbox.counters()
        assert totals.pop("calls") == 1 + sum(row["sandbox/calls"] for row in rows)
        assert totals == {name: sum(row[f"sandbox/{name}"] for row in rows) for name in names[1:]}


def test_the_loop_neither_trains_on_a_cut_tree_nor_records_it(monkeypatch, tmp_path):
    cut = make_tree([(None, 0, 1, False), (None, 0, 1, True)], infrastructure_failures=9, truncated=True)
    monkeypatch.setattr(rl, "collect", lambda tasks, *rest, **more: [cut] * len(tasks))
    learner = types.SimpleNamespace(
        first_task=0,
        seed=0,
        temperature=1.0,
        environment=types.SimpleNamespace(sandbox=None),
        stream=types.SimpleNamespace(task=lambda split, n: n),
        sampler=types.SimpleNamespace(load=lambda params, version: None),
        step_fn=lambda *_: pytest.fail("trained on it"),
    )
    state, log = types.SimpleNamespace(params=None), MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(InfrastructureError, match="--resume"):
        rl.train_rl(
            RlConfig(prompts=2, updates=1), elpo(), learner, state, start=0, meta={}, log=log, dumps=tmp_path / "dumps",
            checkpoints=types.SimpleNamespace(save=lambda *_: pytest.fail("saved it")),
        )  # fmt: skip
    assert not (tmp_path / "dumps").exists() and read_metrics(tmp_path / "metrics.jsonl") == []
