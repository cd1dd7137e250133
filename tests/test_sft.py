"""The cold start: cross-entropy of the model's tokens alone, and rows that come once per epoch, resumed or not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from factories import make_trajectory
from hypothesis import given
from hypothesis import strategies as st

from elpo_jax.config import SftConfig
from elpo_jax.model.config import ModelConfig
from elpo_jax.model.logprob import summed_loss
from elpo_jax.model.transformer import init
from elpo_jax.policy import loss as policy_loss
from elpo_jax.policy.batch import Batch, demonstration_example, pack
from elpo_jax.train.sft import make_sft_loss, rows_at, train_sft

TINY = ModelConfig(vocab_size=97, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=32)


@pytest.fixture(scope="module")
def params():
    return init(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def demonstrations() -> list:
    return [make_trajectory(i % 4, tokens=2 + i, seed=i) for i in range(6)]


@pytest.fixture(scope="module")
def batch(demonstrations) -> Batch:
    """Several packed transcripts to a row, with weights as of a loop that saw other batches before."""
    packed = pack([demonstration_example(t) for t in demonstrations], 64)
    assert (packed.positions == 0).sum() > len(packed.tokens) and (packed.steps == 0).any()
    return packed.replace(weight=packed.weight / 50)


@jax.jit
def loss_and_gradient(params, batch):
    (value, metrics), gradient = jax.value_and_grad(make_sft_loss(TINY), has_aux=True)(params, batch, {})
    return value, metrics, gradient


def test_the_loss_is_the_cross_entropy_of_the_models_tokens(params, batch, demonstrations):
    value, metrics, _ = loss_and_gradient(params, batch)
    wanted = entropy = 0.0
    for trajectory in demonstrations:  # each alone, in float64
        logp, entropies = numpy_model.logprobs(TINY, params, trajectory.ids(), 1.0)
        model = trajectory.step_ids() > 0
        wanted -= logp[model].sum() / 50
        entropy += entropies[model].sum() / 50
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-5)


def test_only_the_models_tokens_are_learned(params, batch, monkeypatch):
    """Neither the weight nor the target of a token that the environment wrote reaches the loss or the gradient."""
    value, _, gradient = loss_and_gradient(params, batch)
    model = batch.steps > 0
    heavy = batch.replace(weight=np.where(model, batch.weight, 7.0).astype(np.float32))
    other = loss_and_gradient(params, heavy)
    assert other[0] == value
    jax.tree.map(np.testing.assert_array_equal, other[2], gradient)

    @jax.jit
    def with_targets(targets):
        """The loss and its gradient where the network reads the batch's tokens but has to predict these."""

        def summed(fn, config, params, hidden, tokens, *rest):
            return summed_loss(fn, config, params, hidden, targets, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(policy_loss, "summed_loss", summed)
            return jax.value_and_grad(make_sft_loss(TINY), has_aux=True)(params, batch, {})

    others = (batch.tokens * 7 + 3) % TINY.vocab_size
    (same, _), same_gradient = with_targets(batch.tokens)
    (masked, _), masked_gradient = with_targets(np.where(model, batch.tokens, others))
    assert float(same) == pytest.approx(float(value)) and masked == same
    jax.tree.map(np.testing.assert_array_equal, masked_gradient, same_gradient)
    for row, t in np.argwhere(model)[::5]:  # while each of the model's own targets counts
        changed = batch.tokens.copy()
        changed[row, t] = (changed[row, t] + 1) % TINY.vocab_size
        assert with_targets(changed)[0][0] != same


def test_the_loss_falls_by_its_gradient(params, batch):
    value, _, gradient = loss_and_gradient(params, batch)
    square = sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(gradient))
    step = 1e-2 / square
    moved = jax.tree.map(lambda p, g: p - step * g, params, gradient)
    assert float(value) - float(loss_and_gradient(moved, batch)[0]) == pytest.approx(1e-2, rel=0.1)


@given(rows=st.integers(1, 9), available=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_every_row_comes_once_per_epoch(rows, available, seed):
    """Also where a batch spans the end of an epoch, or several epochs."""
    epochs = 3
    steps = -(-epochs * available // rows)
    seen = np.concatenate([rows_at(step, rows, available, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * available : (epoch + 1) * available]) == list(range(available))
    np.testing.assert_array_equal(rows_at(steps - 1, rows, available, seed), seen[-rows:])  # a function of the step


def test_epochs_and_seeds_have_their_own_order():
    orders = {tuple(rows_at(epoch, 40, 40, seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


class Kept:
    """Stands where the log and the checkpoints do."""

    def __init__(self):
        self.rows, self.saved = [], []

    def write(self, row):
        self.rows.append(row)

    def sync(self):
        pass

    def save(self, step, state, meta):
        self.saved.append((step, state, meta))


def test_a_resumed_loop_sees_the_same_batches(batch):
    rng = np.random.default_rng(0)
    data = jax.tree.map(lambda x: np.concatenate([x] * 7)[:7], batch)
    data = data.replace(tokens=rng.integers(0, 97, data.tokens.shape).astype(np.int32))
    config = SftConfig(steps=9, rows=4, micro_rows=2, save_every=5)

    def loop(state, start):
        batches, kept = [], Kept()

        def step_fn(state, batch, scalars):
            batches.append(batch)
            return state + 1, {"loss": np.float32(state)}

        last = train_sft(config, state, step_fn, data, start=start, seed=3, meta={"m": 1}, checkpoints=kept, log=kept)
        return last, batches, kept

    last, whole, kept = loop(0, start=0)
    assert last == 9 and [(step, state) for step, state, _ in kept.saved] == [(5, 5), (9, 9)]
    assert [row["step"] for row in kept.rows] == list(range(1, 10))
    again, rest, resumed = loop(5, start=5)
    assert again == 9 and [row["step"] for row in resumed.rows] == [6, 7, 8, 9]
    for a, b in zip(whole[5:], rest, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    for step, micro in enumerate(whole):
        assert micro.tokens.shape == (2, 2, data.tokens.shape[1])
        np.testing.assert_array_equal(micro.tokens.reshape(4, -1), data.tokens[rows_at(step, 4, 7, 3)])
        assert micro.weight.sum() == pytest.approx(1.0) and not micro.weight[micro.steps == 0].any()
        assert len(np.unique(micro.weight[micro.steps > 0])) == 1  # the mean over the batch's tokens
