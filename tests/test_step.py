"""The train step: sums over micro-batches, AdamW against NumPy, schedules, and steps that are refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.logprob import token_logprobs
from elpo_jax.model.transformer import apply
from elpo_jax.train.mesh import MeshConfig, make_mesh, shardings
from elpo_jax.train.state import TrainState, init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ModelConfig(vocab_size=40, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=24, qkv_bias=True)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def language_loss(params, batch, scalars):
    hidden, _ = apply(CONFIG, params, batch["tokens"], batch["positions"])
    logp, entropy = token_logprobs(CONFIG, params, hidden, batch["tokens"], 1.0)
    return scalars["scale"] * -jnp.sum(batch["weight"] * logp), {"entropy": entropy.sum(), "entropy_max": entropy.max()}


def language_batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 40, (8, 12)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12)),
        "weight": rng.uniform(0, 0.05, (8, 12)).astype(np.float32),
    }


def split(batch, micro: int):
    return jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[1:]), batch)


def toy_state(optimizer) -> TrainState:
    """Parameters with names that the sharding table knows, small enough for NumPy."""
    rng = np.random.default_rng(1)
    params = {"embed": rng.normal(size=(3, 2)), "final_norm": rng.normal(size=2)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, jax.random.key(0), zero + 0)


def toy_loss(params, batch, scalars):
    """Its gradient is the sum over the rows of `x`, scaled, and of `y`."""
    value = jnp.sum(params["embed"] * batch["x"].sum(0)) * scalars["scale"] + jnp.sum(
        params["final_norm"] * batch["y"].sum(0)
    )
    return value, {}


def toy_batch(seed=0, micro=1):
    rng = np.random.default_rng(seed)
    batch = {"x": rng.normal(size=(micro, 4, 3, 2)), "y": rng.normal(size=(micro, 4, 2))}
    return jax.tree.map(lambda x: x.astype(np.float32), batch)


ONE = {"scale": np.float32(1)}


def test_micro_batches_only_sum(mesh):
    """1x8, 2x4 and 8x1 rows: the same loss, metrics, gradient norm and parameters."""
    optimizer = make_optimizer(OptimizerConfig(lr=1e-2, eps=1e-3), 10)
    start = init_state(CONFIG, optimizer, jax.random.key(0), mesh)
    results = []
    for micro in (1, 2, 8):
        step = make_train_step(language_loss, optimizer, mesh)
        state, metrics = step(jax.tree.map(jnp.copy, start), split(language_batch(), micro), ONE)
        results.append((state.params, metrics))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params, results[0][0])
    assert min(jax.tree.leaves(moved)) > 1e-4
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], other)


def test_update_equals_adamw_in_numpy(mesh):
    """Two clipped steps with warm-up; decay touches the matrix and not the vector."""
    config = OptimizerConfig(lr=0.1, warmup_steps=2, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=0.7)
    optimizer = make_optimizer(config, 10)
    state = toy_state(optimizer)
    step = make_train_step(toy_loss, optimizer, mesh)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for t in (1, 2):
        batch = toy_batch(t, micro=3)
        state, metrics = step(state, batch, {"scale": np.float32(2)})
        grads = {"embed": 2 * batch["x"].sum((0, 1), dtype=np.float64), "final_norm": batch["y"].sum((0, 1))}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 0.7 and float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        lr = 0.1 * t / 2
        assert float(metrics["lr"]) == pytest.approx(lr)
        for name, decay in (("embed", 0.3), ("final_norm", 0.0)):
            g = grads[name] * 0.7 / norm
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            adam = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-3)
            params[name] = params[name] - lr * (adam + decay * params[name])
            np.testing.assert_allclose(state.params[name], params[name], rtol=1e-5, atol=1e-6)
    assert int(state.step) == 2 and int(state.skipped) == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(mesh, poison):
    """Even after it, the run is bit for bit the one without it: moments, schedule and counts did not move."""
    optimizer = make_optimizer(OptimizerConfig(lr=0.1, warmup_steps=3, schedule="cosine"), 10)
    step = make_train_step(toy_loss, optimizer, mesh)
    bad = toy_batch(5, micro=2)
    bad["x"][1, 2, 0, 0] = poison  # one number in one micro-batch; 3e38 is finite but its square is not
    with_bad, metrics_bad = toy_state(optimizer), None
    without = toy_state(optimizer)
    for seed, batch in ((0, toy_batch(0, 2)), (5, bad), (1, toy_batch(1, 2))):
        before = jax.tree.map(np.asarray, (with_bad.params, with_bad.opt_state, with_bad.step))
        with_bad, metrics = step(with_bad, batch, ONE)
        if seed == 5:
            metrics_bad = metrics
            after = (with_bad.params, with_bad.opt_state, with_bad.step)
            jax.tree.map(np.testing.assert_array_equal, before, after)
        else:
            without, metrics_good = step(without, batch, ONE)
    jax.tree.map(
        np.testing.assert_array_equal,
        (with_bad.params, with_bad.opt_state, with_bad.step),
        (without.params, without.opt_state, without.step),
    )
    assert int(metrics_bad["skipped"]) == int(with_bad.skipped) == int(metrics["skipped"]) == 1
    assert not np.isfinite(metrics_bad["grad_norm"])
    assert float(metrics["lr"]) == float(metrics_good["lr"]) and int(metrics_good["skipped"]) == 0
    np.testing.assert_array_equal(jax.random.key_data(with_bad.key), jax.random.key_data(jax.random.key(0)))


def test_a_loss_that_is_not_finite_is_refused_though_its_gradient_is(mesh):
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def loss(params, batch, scalars):
        return jnp.sum(params["embed"] * batch["x"].sum(0)) + scalars["offset"], {}

    start = toy_state(optimizer)
    embed = np.asarray(start.params["embed"])
    state, metrics = make_train_step(loss, optimizer, mesh)(start, toy_batch(), {"offset": np.float32(np.nan)})
    assert np.isfinite(metrics["grad_norm"]) and int(state.skipped) == 1
    np.testing.assert_array_equal(state.params["embed"], embed)


def test_metrics_are_summed_and_those_named_max_are_maxima(mesh):
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def loss(params, batch, scalars):
        value, _ = toy_loss(params, batch, scalars)
        return value, {"total": batch["x"].sum(), "largest_max": batch["x"].max()}

    batch = toy_batch(3, micro=4)
    state = toy_state(optimizer)
    wanted = float(np.vdot(state.params["embed"], batch["x"].sum((0, 1))))
    wanted += float(np.vdot(state.params["final_norm"], batch["y"].sum((0, 1))))
    _, metrics = make_train_step(loss, optimizer, mesh)(state, batch, ONE)
    assert float(metrics["total"]) == pytest.approx(batch["x"].sum(), rel=1e-4)
    assert float(metrics["largest_max"]) == batch["x"].max()
    assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)


def test_the_state_is_donated_and_scalars_compile_nothing_new(mesh):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    traces = []

    def loss(params, batch, scalars):
        traces.append(1)
        return toy_loss(params, batch, scalars)

    step = make_train_step(loss, optimizer, mesh)
    start = toy_state(optimizer)
    state, _ = step(jax.device_put(start, shardings(mesh, start)), toy_batch(), ONE)
    first = len(traces)
    again, _ = step(state, toy_batch(), {"scale": np.float32(3)})
    again, _ = step(again, toy_batch(), {"scale": np.float32(4)})
    assert len(traces) == first > 0
    assert state.params["embed"].is_deleted() and not again.params["embed"].is_deleted()


FIRST_STEP = """
import json, pathlib, sys, time
import jax
from experiments.run import keep_programs
keep_programs(pathlib.Path(sys.argv[1]))
counts = {}
jax.monitoring.register_event_listener(lambda event, **_: counts.update({event: counts.get(event, 0) + 1}))
from elpo_jax.config import Config
from elpo_jax.policy.batch import empty, stack
from elpo_jax.policy.loss import make_loss
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.state import init_state
from elpo_jax.train.step import make_optimizer, make_train_step
began, config, steps = time.perf_counter(), Config(), []
mesh = make_mesh(MeshConfig())
with jax.set_mesh(mesh):
    optimizer = make_optimizer(config.rl.optimizer, 100)
    state = init_state(config.model, optimizer, jax.random.key(0), mesh)
    step = make_train_step(make_loss(config.model), optimizer, mesh)
    scalars = {name: jax.numpy.float32(x) for name, x in (config.algo.scalars() | {"temperature": 1.0}).items()}
    for _ in range(3):
        state, metrics = step(state, stack(empty(4, 32), 4), scalars)
        jax.block_until_ready(metrics)
        steps.append(sum(counts.get(f"/jax/compilation_cache/cache_{kind}", 0) for kind in ("hits", "misses")))
        seconds = time.perf_counter() - began if len(steps) == 1 else seconds
kinds = {kind: counts.get(f"/jax/compilation_cache/cache_{kind}", 0) for kind in ("hits", "misses")}
print(json.dumps(kinds | {"steps": steps, "seconds": seconds}))
"""


def test_a_second_process_compiles_nothing_and_a_second_step_neither(tmp_path):
    runs = []
    for _ in range(2):
        command = [sys.executable, "-c", FIRST_STEP, str(tmp_path)]
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    first, second = runs
    assert first["misses"] > 0 and second["misses"] == 0
    assert second["hits"] == first["hits"] + first["misses"] > 0
    assert second["seconds"] < first["seconds"]
    for run in runs:
        assert run["steps"][0] == run["steps"][2], "no program is looked for after the first step"


def test_bfloat16_parameters_are_refused(mesh):
    """They are the only copy: an update of 1/512 of a value would leave it as it is, step after step."""
    assert jnp.bfloat16(1) + jnp.bfloat16(1 / 512) == jnp.bfloat16(1)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    state = init_state(half, optimizer, jax.random.key(0), mesh)
    named = "model.param_dtype=bfloat16 cannot be trained.*param_dtype=float32, and model.dtype=bfloat16 to compute"
    with pytest.raises(ValueError, match=named):
        make_train_step(language_loss, optimizer, mesh)(state, split(language_batch(), 2), ONE)
    assert not state.params["embed"].is_deleted()


def test_computing_in_bfloat16_trains_float32_parameters_by_less_than_its_rounding(mesh):
    half = dataclasses.replace(CONFIG, dtype="bfloat16")

    def loss(params, batch, scalars):
        hidden, _ = apply(half, params, batch["tokens"], batch["positions"])
        logp, _ = token_logprobs(half, params, hidden, batch["tokens"], 1.0)
        return -jnp.sum(batch["weight"] * logp), {}

    optimizer = make_optimizer(OptimizerConfig(lr=1e-5, weight_decay=0.0), 10)
    state = init_state(half, optimizer, jax.random.key(0), mesh)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = make_train_step(loss, optimizer, mesh)(state, split(language_batch(), 2), ONE)
    floats = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)} and metrics["grad_norm"].dtype == jnp.float32
    norms = before["final_norm"], np.asarray(state.params["final_norm"])
    assert (norms[0] != norms[1]).all()
    assert np.array_equal(*(x.astype(jnp.bfloat16) for x in norms))  # bfloat16 ones would not have moved


def test_schedules():
    def rates(steps, total, **options):
        optimizer = make_optimizer(OptimizerConfig(lr=2.0, **options), total)
        return [float(optimizer.learning_rate(step)) for step in steps]

    assert rates([0, 5, 99], 10) == [2.0, 2.0, 2.0]
    np.testing.assert_allclose(rates([0, 1, 3, 4, 9], 10, warmup_steps=4), [0.5, 1.0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(rates([2, 6, 10, 50], 10, warmup_steps=2, schedule="linear"), [2.0, 1.0, 0.0, 0.0])
    cosine = rates([0, 2, 4, 6, 10], 10, warmup_steps=2, schedule="cosine")
    np.testing.assert_allclose(cosine, [1.0, 2.0, 2.0 * 0.5 * (1 + np.cos(np.pi / 4)), 1.0, 0.0], atol=1e-6)


def test_without_a_clip_norm_the_gradient_is_used_whole(mesh):
    """With b1=0 and a huge eps the update is proportional to the gradient, so its size shows."""
    moved = []
    for clip in (0.0, 0.5):
        optimizer = make_optimizer(OptimizerConfig(lr=1.0, b1=0.0, eps=1e6, weight_decay=0.0, clip_norm=clip), 10)
        before = np.asarray(toy_state(optimizer).params["embed"])
        step = make_train_step(toy_loss, optimizer, mesh)
        state, metrics = step(toy_state(optimizer), toy_batch(), {"scale": np.float32(1e6)})
        assert float(metrics["grad_norm"]) > 1e6  # what is reported is not clipped
        moved.append(np.abs(np.asarray(state.params["embed"]) - before).max())
    assert moved[0] > 0.1 and moved[1] < 1e-5


def test_the_first_loss_is_that_of_a_uniform_guess_and_training_lowers_it(mesh):
    optimizer = make_optimizer(OptimizerConfig(lr=1e-2, schedule="linear"), 60)
    state = init_state(CONFIG, optimizer, jax.random.key(0), mesh)
    step = make_train_step(language_loss, optimizer, mesh)
    batch = language_batch()
    batch["weight"] = np.where(np.arange(12) > 0, 1 / 88, 0.0).astype(np.float32) * np.ones((8, 1), np.float32)
    losses = []
    for _ in range(60):
        state, metrics = step(state, split(batch, 2), ONE)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(40), rel=0.25) and losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "options,named",
    [
        ({"schedule": "step"}, "optimizer.schedule='step' must be one of constant, cosine, linear"),
        ({"lr": -1.0}, "optimizer.lr=-1.0 must not be negative"),
        ({"b2": 1.0}, "optimizer.b2=1.0 must be at least 0 and below 1"),
        ({"eps": 0.0}, "optimizer.eps=0.0 must be positive"),
        ({"warmup_steps": -3}, "optimizer.warmup_steps=-3 must not be negative"),
    ],
)
def test_impossible_numbers_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        OptimizerConfig(**options)


def test_impossible_runs_are_named(mesh):
    with pytest.raises(ValueError, match="warmup_steps=10 leaves no step of 10 for the cosine schedule"):
        make_optimizer(OptimizerConfig(warmup_steps=10, schedule="cosine"), 10)
    assert float(make_optimizer(OptimizerConfig(lr=1.0, warmup_steps=10), 10).learning_rate(20)) == 1.0
