"""The policy loss against an independent float64 reference, hand-written tables, and the equalities it must satisfy."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from factories import make_tree, random_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_loss import loss_and_gradient, random_examples, weighted_loss
from test_golden import figure_tree

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.logprob import chunk_columns, summed_loss, token_logprobs
from elpo_jax.model.transformer import apply, init
from elpo_jax.policy import loss as policy_losses
from elpo_jax.policy.batch import Batch, Example, drop_flat, normalise, pack, policy_examples, stack
from elpo_jax.policy.credit import assign
from elpo_jax.policy.loss import error_localized, make_logprobs, make_loss, policy_loss
from elpo_jax.policy.recipes import Recipe, dapo, elpo, grpo

LENGTH, CONSTANT = 64, 40.0
TINY = ModelConfig(vocab_size=97, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=32)
RECIPES = {
    "grpo": grpo(),
    "grpo sequence": grpo(normalisation="sequence"),
    "dapo": dapo(),
    "dr.grpo": grpo(normalisation="constant"),
    "elpo": elpo(),
    "elpo once": elpo(prefix_weight="once"),
    "elpo token once": elpo(normalisation="token", prefix_weight="once"),
    "elpo constant once": elpo(normalisation="constant", prefix_weight="once"),
    "dual clip": elpo(dual_clip=1.6),
    "kl": elpo(kl=0.05),
    "critical weight": elpo(critical_weight=2.5),
    "everything": elpo(lambda_tree=0.3, kl=0.1, dual_clip=2.0, critical_weight=0.5, prefix_weight="once"),
}


def scalars_of(recipe: Recipe, temperature: float = 1.0) -> dict[str, np.float32]:
    return {name: np.float32(x) for name, x in (recipe.scalars() | {"temperature": temperature}).items()}


def batch_of(examples: list[Example], recipe: Recipe) -> Batch:
    return stack(pack(normalise(examples, recipe, CONSTANT), LENGTH, share=False), 8)


@jax.jit
def from_theta(theta, entropy, reference, batch, scalars):
    """Loss, metrics and gradient by theta, where theta[i] is the log-probability of the token with id i."""
    batch = batch.replace(reference_logp=reference[batch.tokens])

    def loss(theta):
        return policy_loss(theta[batch.tokens], entropy[batch.tokens], batch, scalars)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(theta)
    return value, metrics, gradient


def compare(seed: int, recipe: Recipe, noise: float = 0.4):
    """(loss, gradient, metrics) of the package, and (loss, gradient) of the reference, on one random batch."""
    rng = np.random.default_rng(seed)
    examples = random_examples(rng, 12)
    behaviour = np.concatenate([example.behaviour_logp for example in examples])
    logp = (behaviour + rng.normal(size=len(behaviour)) * noise).astype(np.float32)
    reference = (logp + rng.normal(size=len(logp)) * 0.5).astype(np.float32)
    size = 12 * 40  # one shape for all seeds
    theta, other = (np.pad(values, (0, size - len(values))) for values in (logp, reference))
    batch = batch_of(examples, recipe)
    assert batch.tokens.shape == (1, 8, LENGTH)
    value, metrics, gradient = from_theta(theta, np.ones_like(theta), other, batch, scalars_of(recipe))
    cuts = np.cumsum([len(example.tokens) for example in examples])[:-1]
    expected = loss_and_gradient(examples, np.split(logp, cuts), recipe, CONSTANT, np.split(reference, cuts))
    wanted = np.pad(np.concatenate(expected[1]), (0, size - len(logp)))
    return (float(value), np.asarray(gradient), metrics), (expected[0], wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_gradient_equal_the_float64_reference(name, seed):
    (loss, gradient, _), (wanted_loss, wanted) = compare(seed, RECIPES[name])
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.builds(
        elpo,
        lambda_tree=st.floats(0, 1),
        eps_low=st.floats(0.05, 0.4),
        eps_high=st.floats(0.05, 0.5),
        eps_elc=st.floats(0, 0.4),
        critical_weight=st.floats(0, 3),
        dual_clip=st.sampled_from([0.0, 1.2, 3.0]),
        kl=st.floats(0, 1),
        normalisation=st.sampled_from(["sequence", "token", "constant"]),
        prefix_weight=st.sampled_from(["per_leaf", "once"]),
    ),
)
def test_any_recipe_equals_the_reference(seed, recipe):
    (loss, gradient, _), (wanted_loss, wanted) = compare(seed, recipe)
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=2e-6 * largest)
    # The terms of the sum can cancel, so its error is measured against their size.
    assert abs(loss - wanted_loss) <= 1e-5 * np.abs(wanted).sum() + 1e-5 * abs(wanted_loss)


def test_gradient_of_the_reference_is_its_slope():
    """The reference itself, by central differences in float64."""
    rng = np.random.default_rng(5)
    examples = random_examples(rng, 3)
    recipe = RECIPES["everything"]
    logp = [e.behaviour_logp + rng.normal(size=len(e.tokens)) * 0.4 for e in examples]
    reference = [x + rng.normal(size=len(x)) * 0.4 for x in logp]
    _, gradient = loss_and_gradient(examples, logp, recipe, CONSTANT, reference)
    for i, example in enumerate(examples):
        for t in range(len(example.tokens)):
            slopes = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in logp]
                moved[i][t] += step
                slopes.append(loss_and_gradient(examples, moved, recipe, CONSTANT, reference)[0])
            assert (slopes[0] - slopes[1]) / 2e-6 == pytest.approx(gradient[i][t], abs=1e-8)


# Paper eq. 2, 11, 12 with eps_low 0.2, eps_high 0.315, eps_elc 0.115: the ratio is clipped to [0.8, 1.315], and from
# the first irrecoverable step on to [0.685, 1.315]. Each entry: (min(r A, clip(r) A), its derivative by logp).
RATIOS = (0.6, 0.75, 0.9, 1.1, 1.3, 1.4)
CLIP_TABLE = {
    (+1, False): [(0.6, 0.6), (0.75, 0.75), (0.9, 0.9), (1.1, 1.1), (1.3, 1.3), (1.315, 0.0)],
    (+1, True): [(0.6, 0.6), (0.75, 0.75), (0.9, 0.9), (1.1, 1.1), (1.3, 1.3), (1.315, 0.0)],
    (-1, False): [(-0.8, 0.0), (-0.8, 0.0), (-0.9, -0.9), (-1.1, -1.1), (-1.3, -1.3), (-1.4, -1.4)],
    (-1, True): [(-0.685, 0.0), (-0.75, -0.75), (-0.9, -0.9), (-1.1, -1.1), (-1.3, -1.3), (-1.4, -1.4)],
}


def row(steps, first_failure, ratios, advantage) -> tuple[np.ndarray, Batch]:
    """One row [1, T] of tokens with weight one, and the log-probabilities that give the ratios."""
    steps, ratios = np.array([steps], np.int32), np.array([ratios], np.float32)
    behaviour = np.full(steps.shape, -1.0, np.float32)
    signal = np.full(steps.shape, advantage, np.float32)
    batch = Batch(
        tokens=np.zeros_like(steps),
        positions=np.arange(steps.size, dtype=np.int32)[None],
        ends=np.full_like(steps, steps.size),
        previous=np.arange(-1, steps.size - 1, dtype=np.int32)[None],
        steps=steps,
        first_failure=np.full_like(steps, first_failure),
        behaviour_logp=behaviour,
        branch=signal,
        trajectory=signal,
        leaves=np.ones_like(steps),
        weight=np.ones_like(behaviour),
        reference_logp=np.zeros_like(behaviour),
    )
    return (behaviour + np.log(ratios)).astype(np.float32), batch


@pytest.mark.parametrize(("sign", "critical"), CLIP_TABLE)
def test_clip_gradient_table(sign, critical):
    scalars = scalars_of(elpo())
    each = jax.vmap(jax.value_and_grad(lambda logp, batch: policy_loss(logp, logp, batch, scalars)[0]))
    values, slopes = zip(*CLIP_TABLE[sign, critical], strict=True)
    # The critical step itself, and one behind it: both have the relaxed bound. A step before it does not.
    for step, first_failure in [(2, 2), (3, 2)] if critical else [(1, 2), (2, 0)]:
        logp, batch = row([step] * 6, first_failure, RATIOS, sign)
        loss, gradient = each(logp[0], jax.tree.map(lambda x: x[0], batch))
        np.testing.assert_allclose(-loss, values, rtol=1e-6)
        np.testing.assert_allclose(-gradient, slopes, rtol=1e-6, atol=0)


def test_metrics_of_the_clip_table():
    scalars = scalars_of(elpo(dual_clip=1.35))
    for (sign, critical), wanted in {
        (+1, False): {"clip_high": 1, "positive": 6},
        (+1, True): {"clip_high": 1, "positive": 6, "critical": 6},
        (-1, False): {"clip_low": 2, "negative": 6, "dual_clip": 1},
        (-1, True): {"clip_low": 1, "negative": 6, "dual_clip": 1, "critical": 6, "relaxed_only": 1},
    }.items():
        logp, batch = row([2] * 6, 2 if critical else 0, RATIOS, sign)
        _, metrics = policy_loss(logp, np.full((1, 6), 0.5, np.float32), batch, scalars)
        counts = dict.fromkeys(
            ["clip_high", "clip_low", "positive", "negative", "critical", "relaxed_only", "dual_clip", "kl"], 0.0
        )
        sizes = {
            "tokens": 6,
            "entropy": 3.0,
            "ratio_mean": sum(RATIOS),
            "ratio_deviation_max": 0.4,
            "mismatch_mean": sum(abs(np.log(RATIOS))),
            "mismatch_max": -np.log(0.6),
        }
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(counts | sizes | wanted)


def test_error_localized_by_hand():
    steps, failure = [0, 1, 1, 0, 2, 3], [2, 2, 2, 2, 2, 2]
    _, batch = row(steps, 2, [1.0] * 6, 0.0)
    batch = batch.replace(
        branch=np.full((1, 6), 4.0, np.float32),
        trajectory=np.full((1, 6), -2.0, np.float32),
        first_failure=np.array([failure], np.int32),
    )
    scalars = scalars_of(elpo(lambda_tree=0.25, critical_weight=3.0))
    advantage, low, high, weight = error_localized(batch, scalars)
    np.testing.assert_allclose(advantage, [[-0.5] * 6], rtol=1e-6)  # 0.25 * 4 - 0.75 * 2
    np.testing.assert_allclose(low, [[0.2, 0.2, 0.2, 0.2, 0.315, 0.315]], rtol=1e-6)
    np.testing.assert_allclose(high, [[0.315] * 6], rtol=1e-6)
    np.testing.assert_allclose(weight, [[1, 1, 1, 1, 3, 1]], rtol=1e-6)


def test_without_elc_a_first_failure_changes_no_bit():
    rng = np.random.default_rng(1)
    examples = random_examples(rng, 12)
    assert any(example.first_failure for example in examples)
    recipe = elpo(eps_elc=0.0)
    theta = np.concatenate([e.behaviour_logp for e in examples]).astype(np.float32)
    theta += rng.normal(size=len(theta)).astype(np.float32)
    batch = batch_of(examples, recipe)
    blind = batch.replace(first_failure=np.zeros_like(batch.first_failure))
    without = [from_theta(theta, theta, theta, b, scalars_of(recipe)) for b in (batch, blind)]
    relaxed = [from_theta(theta, theta, theta, b, scalars_of(elpo())) for b in (batch, blind)]
    assert without[0][0] == without[1][0]
    np.testing.assert_array_equal(without[0][2], without[1][2])
    assert relaxed[0][0] != relaxed[1][0]  # the batch is one on which ELC does something


def test_environment_and_padding_tokens_are_out_of_the_loss_whatever_they_hold():
    rng = np.random.default_rng(2)
    recipe = elpo(kl=0.1, dual_clip=2.0)
    batch = jax.tree.map(lambda x: x[0], batch_of(random_examples(rng, 12), recipe))
    masked = batch.steps == 0
    logp = batch.behaviour_logp + rng.normal(size=masked.shape).astype(np.float32)
    scalars = scalars_of(recipe)
    step = jax.jit(jax.value_and_grad(policy_loss, has_aux=True))
    (loss, metrics), gradient = step(logp, logp, batch, scalars)
    assert np.any(np.asarray(gradient) != 0)
    for garbage in (np.inf, -np.inf, np.nan, 1e30):

        def spoil(x, garbage=garbage):
            return np.where(masked, np.float32(garbage), x) if x.dtype == np.float32 else x

        spoiled = jax.tree.map(spoil, batch).replace(first_failure=np.where(masked, 1, batch.first_failure))
        (other, others), slope = step(spoil(logp), spoil(logp), spoiled, scalars)
        assert loss == other and metrics == others
        np.testing.assert_array_equal(gradient, slope)
        assert not np.any(np.asarray(slope)[masked])


def test_an_extreme_ratio_stays_finite():
    for sign in (+1, -1):
        logp, batch = row([1, 1, 2], 1, [1.0, 1.0, 1.0], sign)
        logp += np.array([[-200.0, 200.0, 0.0]], np.float32)
        batch = batch.replace(reference_logp=np.array([[100.0, -100.0, -1.0]], np.float32))
        for recipe in (elpo(), elpo(kl=0.1), elpo(dual_clip=3.0)):
            (loss, metrics), gradient = jax.value_and_grad(policy_loss, has_aux=True)(
                logp, logp, batch, scalars_of(recipe)
            )
            assert np.isfinite(loss) and np.all(np.isfinite(gradient))
            assert all(np.isfinite(value) for value in metrics.values())
            assert not np.any(np.asarray(gradient)[0, :2])  # the clamp has no slope


def test_changing_a_scalar_compiles_nothing_new():
    traces = []
    _, batch = row([1, 2], 2, [1.0, 1.0], 1.0)

    @jax.jit
    def step(logp, scalars):
        traces.append(1)
        return policy_loss(logp, logp, batch, scalars)[0]

    recipes = [elpo(), grpo(), elpo(kl=0.1), elpo(dual_clip=3.0, critical_weight=2.0, eps_elc=0.0), dapo()]
    values = {float(step(batch.behaviour_logp + 0.5, scalars_of(r, 0.5 + i))) for i, r in enumerate(recipes)}
    assert len(traces) == 1 and len(values) > 2


def by_token(examples: list[Example]) -> tuple[list[Example], np.ndarray]:
    """The examples with token i of all of them renamed to id i, and the behaviour log-probability of each id."""
    renamed, first = [], 0
    for example in examples:
        ids = np.arange(first, first + len(example.tokens), dtype=np.int32)
        renamed.append(dataclasses.replace(example, tokens=ids))
        first += len(ids)
    return renamed, np.concatenate([example.behaviour_logp for example in examples])


def test_lambda_zero_on_a_flat_tree_is_grpo():
    rng = np.random.default_rng(8)
    success = [True, False, False, True, False, True, False, False]
    tree = make_tree([(None, 0, int(rng.integers(0, 4)), outcome) for outcome in success], failure=-1.1)
    # GRPO by hand: one number per attempt, population std, mean over attempts of token means, symmetric clip.
    rewards = np.where(success, 1.0, -1.1)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    masks = [leaf.trajectory.step_ids() > 0 for leaf in tree.leaves]
    behaviour = np.concatenate([leaf.trajectory.logprobs() for leaf in tree.leaves])
    theta = (behaviour + rng.normal(size=len(behaviour)) * 0.4).astype(np.float32)
    ratio = np.exp(theta.astype(np.float64) - behaviour)
    spread = np.concatenate([np.full(len(mask), a) for mask, a in zip(masks, advantages, strict=True)])
    weight = np.concatenate([mask / (len(masks) * mask.sum()) for mask in masks])
    alive = np.where(spread > 0, ratio <= 1.2, ratio >= 0.8)
    wanted_loss = -np.sum(weight * np.minimum(ratio * spread, np.clip(ratio, 0.8, 1.2) * spread))
    wanted = -weight * alive * ratio * spread

    results = []
    for recipe in (elpo(lambda_tree=0.0, eps_elc=0.0, eps_high=0.2), grpo(ddof=0, normalisation="sequence")):
        examples, _ = by_token(policy_examples(tree, assign(tree, recipe)))
        results.append(from_theta(theta, theta, theta, batch_of(examples, recipe), scalars_of(recipe)))
    for loss, _, gradient in results:
        assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-8)
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][2], results[1][2])


@pytest.mark.parametrize("normalisation", ["token", "constant"])
def test_once_equals_per_leaf_after_explicit_weighting(normalisation):
    """On the tree of the paper's Figure 4: leaving each step to its first leaf is the same as sharing it out."""
    once = elpo(normalisation=normalisation, prefix_weight="once")
    tree = figure_tree()
    nodes = tree.nodes()
    shared = policy_examples(tree, assign(tree, once))
    # A token is (node, index in the turn): copies of one token get one id, so theta holds one number for all of them.
    ids, behaviour = {}, []
    for leaf, example in enumerate(shared):
        for t, step in enumerate(example.steps):
            index = int(np.sum(example.steps[:t] == step))
            name = (tree.path(leaf)[step - 1], index) if step else (leaf, "environment", t)
            if name not in ids:
                ids[name] = len(ids)
                behaviour.append(example.behaviour_logp[t])
            example.tokens[t] = ids[name]
    lone = []
    for leaf, example in enumerate(shared):
        firsts = [0, *(nodes[node].step if nodes[node].leaves[0] == leaf else 0 for node in tree.path(leaf))]
        own = np.array(firsts, np.int32)[example.steps]
        lone.append(dataclasses.replace(example, steps=own, leaves=np.ones_like(example.leaves)))
    theta = np.array(behaviour, np.float32) + np.random.default_rng(9).normal(size=len(ids)).astype(np.float32) * 0.4

    a = from_theta(theta, theta, theta, batch_of(shared, once), scalars_of(once))
    per_leaf = dataclasses.replace(once, prefix_weight="per_leaf")
    b = from_theta(theta, theta, theta, batch_of(lone, per_leaf), scalars_of(once))
    c = from_theta(theta, theta, theta, batch_of(shared, per_leaf), scalars_of(once))
    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5)
    np.testing.assert_allclose(a[2], b[2], rtol=1e-5, atol=1e-7 * np.abs(b[2]).max())
    assert float(c[0]) != pytest.approx(float(b[0]), rel=1e-2)
    # Token terms: two per step, 16 leaves' steps against 31 different ones.
    assert a[1]["tokens"] == 2 * sum(len(tree.path(leaf)) for leaf in range(16))
    assert b[1]["tokens"] == 2 * len(nodes) == 62


def test_dropping_flat_examples_changes_no_gradient():
    rng = np.random.default_rng(10)
    examples = random_examples(rng, 12)
    flat = [dataclasses.replace(e, branch=0 * e.branch, trajectory=0 * e.trajectory) for e in examples[:4]]
    weighted = normalise(flat + examples[4:], elpo(), CONSTANT)
    theta = np.concatenate([e.behaviour_logp for e in weighted])
    theta = (theta + 0.3 * rng.normal(size=len(theta))).astype(np.float32)
    kept = drop_flat(weighted, kl=0.0)
    assert len(kept) == 8
    whole, part = (
        from_theta(theta, theta, theta, stack(pack(e, LENGTH), 8), scalars_of(elpo())) for e in (weighted, kept)
    )
    assert float(whole[0]) == pytest.approx(float(part[0]), rel=1e-5)
    np.testing.assert_array_equal(whole[2], part[2])


TREE_RECIPES = {
    "elpo": elpo(),
    "searched": elpo(critical="searched", eps_elc=0.3, critical_weight=2.0),
    "verified once": elpo(critical="verified", prefix_weight="once", kl=0.1, lambda_tree=0.3),
    "token once": elpo(critical="searched", normalisation="token", prefix_weight="once", dual_clip=1.5),
    "token": elpo(normalisation="token", kl=0.02, critical_weight=0.0),
    "constant": elpo(critical="verified", normalisation="constant", kl=0.1),
    "constant once": elpo(critical="searched", normalisation="constant", prefix_weight="once", critical_weight=3.0),
}


def tree_examples(seed: int, recipe: Recipe) -> list[Example]:
    """Weighted leaves of three random trees."""
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng) for _ in range(3)]
    examples = [example for tree in trees for example in policy_examples(tree, assign(tree, recipe))]
    for example in examples:  # ratios to an untrained network between exp(-0.6) and exp(0.6)
        near = 1.2 * (example.behaviour_logp + 0.5) - np.log(TINY.vocab_size)
        example.behaviour_logp[:] = np.where(example.steps > 0, near, 0)
    return drop_flat(normalise(examples, recipe, CONSTANT), recipe.kl)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TREE_RECIPES)
def test_tree_packed_equals_unpacked(name, seed):
    """Loss, gradient by every parameter and metrics where shared tokens are computed once, or once per part."""
    recipe = TREE_RECIPES[name]
    examples, params = tree_examples(seed, recipe), init(TINY, jax.random.key(seed))
    scalars = scalars_of(recipe, 0.8)
    results = []
    for length, share in ((LENGTH, False), (LENGTH, True), (max(len(e.tokens) for e in examples), True)):
        batch = stack(pack(examples, length, share), 8)
        reference = jnp.sin(7.0 * batch.behaviour_logp) * 0.3 + batch.behaviour_logp
        results.append((accumulated(params, batch.replace(reference_logp=np.asarray(reference)), scalars), batch))
    ((loss, gradient), metrics), whole = results[0]
    assert all(batch.leaves.max() > 1 for _, batch in results[1:]) and whole.leaves.max() == 1
    for ((other, slope), others), batch in results[1:]:
        assert (batch.positions >= 0).sum() < (whole.positions >= 0).sum()
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
        assert float(other) == pytest.approx(float(loss), rel=1e-5, abs=1e-6 * largest)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), slope, gradient
        )
        for metric, value in metrics.items():
            fold = np.max if metric.endswith("_max") else np.sum
            np.testing.assert_allclose(fold(others[metric]), fold(value), rtol=2e-5, atol=1e-5, err_msg=metric)


@pytest.mark.parametrize("name", TREE_RECIPES)
def test_tree_packed_loss_equals_the_float64_reference(name):
    """The network and the loss in NumPy, one attempt at a time, against trees that are laid out once."""
    recipe = TREE_RECIPES[name]
    examples, params = tree_examples(5, recipe), init(TINY, jax.random.key(0))
    batch = pack(examples, LENGTH)
    reference = np.where(batch.steps > 0, batch.behaviour_logp - 0.25, 0).astype(np.float32)
    loss, metrics = jax.jit(make_loss(TINY))(params, batch.replace(reference_logp=reference), scalars_of(recipe))
    logp = [numpy_model.logprobs(TINY, params, example.tokens, 1.0)[0] for example in examples]
    references = [example.behaviour_logp.astype(np.float64) - 0.25 for example in examples]
    wanted = 0.0
    for example, own, other in zip(examples, logp, references, strict=True):
        wanted += weighted_loss(example, own, other, recipe)
    assert float(loss) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert metrics["tokens"] == sum(int((example.steps > 0).sum()) for example in examples)


def policy_batch(seed: int, recipe: Recipe, count: int = 12) -> tuple[list[Example], dict]:
    """Weighted random examples with behaviour log-probabilities near those of a tiny network, and its parameters."""
    rng = np.random.default_rng(seed)
    params = init(TINY, jax.random.key(seed))
    examples = [
        dataclasses.replace(
            example,
            tokens=rng.integers(0, TINY.vocab_size, len(example.tokens)).astype(np.int32),
            behaviour_logp=np.where(
                example.steps > 0, -np.log(TINY.vocab_size) + rng.normal(size=len(example.tokens)) * 0.8, 0
            ).astype(np.float32),
        )
        for example in random_examples(rng, count)
    ]
    return normalise(examples, recipe, CONSTANT), params


@jax.jit
def accumulated(params, batch: Batch, scalars):
    """((loss, gradient), metrics) of micro-batches [M, B, T]: the sums of the first two, every one's metrics."""
    loss_fn = make_loss(TINY)

    def body(total, micro):
        (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, micro, scalars)
        return jax.tree.map(jnp.add, total, (loss, gradient)), metrics

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(body, zero, batch)


def assert_same_gradients(ours, theirs, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
        assert np.abs(b).max() > 0


@pytest.mark.parametrize("normalisation", ["sequence", "token", "constant"])
def test_micro_batches_add_up(normalisation):
    recipe = elpo(normalisation=normalisation)
    examples, params = policy_batch(0, recipe, 24)
    rows = jax.tree.map(lambda x: x[:8], pack(examples, 28))
    assert rows.tokens.shape == (8, 28)
    results = [accumulated(params, stack(rows, b), scalars_of(recipe)) for b in (8, 4, 1)]
    (loss, gradient), _ = results[0]
    for (other, slope), metrics in results[1:]:
        assert other == pytest.approx(float(loss), rel=1e-5)
        assert_same_gradients(slope, gradient)
        assert metrics["tokens"].sum() == results[0][1]["tokens"].sum() == (rows.steps > 0).sum()
        np.testing.assert_allclose(metrics["mismatch_max"].max(), results[0][1]["mismatch_max"].max(), rtol=1e-5)


def test_packed_equals_padded():
    recipe = elpo(kl=0.01)
    examples, params = policy_batch(3, recipe)
    packed = pack(examples, LENGTH)
    alone = [pack([example], 28) for example in examples]
    padded = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    assert (packed.positions == 0).sum() == (padded.positions == 0).sum() == len(examples)
    assert packed.tokens.shape[0] < padded.tokens.shape[0]
    results = [accumulated(params, stack(rows, len(rows.tokens)), scalars_of(recipe, 0.7)) for rows in (packed, padded)]
    assert results[0][0][0] == pytest.approx(float(results[1][0][0]), rel=1e-5)
    assert_same_gradients(results[0][0][1], results[1][0][1])
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][name], rtol=2e-5, err_msg=name)


def test_targets_of_environment_tokens_do_not_reach_the_parameters():
    recipe = elpo(kl=0.01)
    examples, params = policy_batch(4, recipe)
    batch = pack(examples, LENGTH)
    others = np.where(batch.steps > 0, batch.tokens, (batch.tokens * 7 + 3) % TINY.vocab_size)
    assert np.any(others != batch.tokens)

    @jax.jit
    def gradients(targets):
        def loss(params):
            hidden, _ = apply(TINY, params, batch.tokens, batch.positions, ends=batch.ends)
            return policy_loss(
                *token_logprobs(TINY, params, hidden, targets, 1.0, batch.previous), batch, scalars_of(recipe)
            )[0]

        return jax.value_and_grad(loss)(params)

    ours, theirs = gradients(batch.tokens), gradients(others)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    wrong = gradients(np.where(batch.steps > 0, (batch.tokens + 1) % TINY.vocab_size, batch.tokens))
    assert wrong[0] != ours[0]  # a model token's target does matter


def test_the_loss_names_the_tokens_that_it_reads(monkeypatch):
    """So that nobody computes the logits of the others."""
    examples, params = policy_batch(4, elpo())
    batch, read = pack(examples, LENGTH), []

    def noting(*args):
        read.append(args[-1])
        return summed_loss(*args)

    monkeypatch.setattr(policy_losses, "summed_loss", noting)
    make_loss(TINY)(params, batch, scalars_of(elpo()))
    np.testing.assert_array_equal(read, [batch.steps > 0])
    assert 0.1 < np.mean(read) < 0.9


def test_temperature_divides_the_logits_of_the_ratio_but_not_of_the_entropy():
    examples, params = policy_batch(6, elpo())
    batch = pack(examples, LENGTH)
    loss_fn = jax.jit(make_loss(TINY))
    hot, cold = (loss_fn(params, batch, scalars_of(elpo(), t))[1] for t in (1.0, 0.5))
    assert hot["entropy"] == cold["entropy"]
    logp = jax.jit(make_logprobs(TINY, 0.5))(params, batch)
    exact = batch.replace(behaviour_logp=np.asarray(logp))  # a sampler at temperature 0.5 would have recorded this
    assert loss_fn(params, exact, scalars_of(elpo(), 0.5))[1]["ratio_deviation_max"] < 1e-5
    assert loss_fn(params, exact, scalars_of(elpo(), 1.0))[1]["ratio_deviation_max"] > 1e-2


def test_logprobs_are_those_of_a_softmax_in_float64():
    examples, params = policy_batch(7, grpo())
    batch = pack(examples, LENGTH)
    logp = np.asarray(jax.jit(make_logprobs(TINY, 0.6))(params, batch))
    hidden, _ = jax.jit(apply, static_argnums=0)(TINY, params, batch.tokens, batch.positions, ends=batch.ends)
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["embed"], np.float64).T / 0.6
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for b, t in np.argwhere(batch.steps > 0):  # the state before a token predicts it
        assert logp[b, t] == pytest.approx(exact[b, t - 1, batch.tokens[b, t]], rel=1e-5)


EIGHT_DEVICES = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import test_loss as t
assert jax.device_count() == 8
recipe = t.elpo(kl=0.01)
examples, params = t.policy_batch(0, recipe, 24)
batch = t.stack(t.pack(examples, 28), 16)
scalars = t.scalars_of(recipe)
(loss, one), _ = t.accumulated(params, batch, scalars)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
copied = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
with jax.set_mesh(mesh):
    (other, eight), _ = t.accumulated(copied, spread, scalars)
assert len(jax.tree.leaves(eight)[0].sharding.device_set) == 8
assert abs(float(other - loss)) <= 1e-5 * abs(float(loss)), (other, loss)
t.assert_same_gradients(jax.device_get(eight), jax.device_get(one))
print("same gradients")
"""


def test_eight_devices_equal_one():
    here = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "same gradients" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(("rows", "length", "columns"), [(1, 1152, 384), (4, 288, 96), (16, 160, 32), (1, 100, 100)])
def test_chunks_of_the_head_are_equally_long(rows, length, columns):
    """None computes padding that a shorter one would not: 1,152 tokens are three chunks of 384, not of 512."""
    assert chunk_columns(rows, length, parts=1) == columns
