"""The policy network against an independent float64 one, and the equalities between its ways of being called."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.model import cache as kv
from elpo_jax.model.cache import block_lengths, fork, locate, new_cache, new_parked
from elpo_jax.model.config import ModelConfig, RopeScaling, config_from_json, count_params
from elpo_jax.model.logprob import logprob_and_entropy, summed_loss, token_logprobs
from elpo_jax.model.transformer import apply, dense, init, rms_norm, swiglu, unembed

BASE = ModelConfig(vocab_size=61, d_model=24, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=40)
FULL = dataclasses.replace(BASE, qk_norm=True, qkv_bias=True, tied=False)
forward = functools.cache(lambda config: jax.jit(functools.partial(apply, config)))


@functools.cache
def parameters(config: ModelConfig):
    """Random parameters of a size like the initial ones, but norms and biases are not all ones and zeros."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        start = 1.0 if "norm" in path[-1].key else 0.0
        return (start + rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 0.1)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: init(config, jax.random.key(0))))


def random_tokens(*shape, seed=0, vocab=BASE.vocab_size):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def count_up(rows, length):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


def close_gradient(a, b):
    """Elements of a gradient are sums that may cancel, so the error is measured against the largest."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * np.abs(b).max())


# Against the independent forward


@pytest.mark.parametrize("qk_norm,qkv_bias,tied", list(itertools.product([False, True], repeat=3)))
def test_forward_equals_float64_numpy(qk_norm, qkv_bias, tied):
    config = dataclasses.replace(BASE, qk_norm=qk_norm, qkv_bias=qkv_bias, tied=tied)
    params, tokens = parameters(config), random_tokens(3, 19)
    hidden, cache = forward(config)(params, tokens, count_up(3, 19))
    assert cache is None and hidden.dtype == jnp.float32
    logits = unembed(config, params, hidden)
    for row in range(3):
        expected, expected_logits = numpy_model.forward(config, params, tokens[row])
        close(hidden[row], expected)
        close(logits[row], expected_logits)


@pytest.mark.parametrize(
    "change",
    [
        {"kv_heads": 1},
        {"kv_heads": 4},
        {"rope_theta": 5e5},
        {"norm_eps": 1e-2},
        {"remat": "full"},
        {"remat": "dots"},
        {"scan_layers": True},
        {"head_dim": 2},
    ],
)
def test_every_other_option_equals_float64_numpy(change):
    config = dataclasses.replace(FULL, **change)
    tokens = random_tokens(1, 150)  # three blocks of attention, the last one shorter
    hidden, _ = forward(config)(parameters(config), tokens, count_up(1, 150))
    close(hidden[0], numpy_model.forward(config, parameters(config), tokens[0])[0])


@pytest.mark.parametrize("config", [BASE, FULL], ids=["tied", "untied"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_token_logprobs_equal_float64_numpy(config, temperature, chunk):
    params, tokens = parameters(config), random_tokens(2, 17)
    hidden, _ = forward(config)(params, tokens, count_up(2, 17))
    logp, entropy = jax.jit(functools.partial(token_logprobs, config, chunk=chunk))(params, hidden, tokens, temperature)
    assert logp.shape == entropy.shape == (2, 17) and logp.dtype == entropy.dtype == jnp.float32
    for row in range(2):
        expected, expected_entropy = numpy_model.logprobs(config, params, tokens[row], temperature)
        close(logp[row], expected)
        close(entropy[row], expected_entropy)


def test_gradient_of_the_logprobs_equals_finite_differences():
    """Through the whole network, in a random direction of each parameter."""
    tokens = random_tokens(1, 9)
    params = parameters(FULL)
    weight = np.random.default_rng(1).normal(size=9)

    def loss(params):
        hidden, _ = apply(FULL, params, tokens, count_up(1, 9))
        logp, _ = token_logprobs(FULL, params, hidden, tokens, 0.6, chunk=4)
        return jnp.sum(logp[0] * weight)

    gradient = jax.jit(jax.grad(loss))(params)
    for number, (path, g) in enumerate(jax.tree_util.tree_leaves_with_path(gradient)):
        direction = np.random.default_rng(number).normal(size=g.shape)

        def moved(sign, path=path, direction=direction):
            step = jax.tree_util.tree_map_with_path(
                lambda at, x: x.astype(np.float64) + sign * 1e-5 * direction if at == path else x, params
            )
            return (numpy_model.logprobs(FULL, step, tokens[0], 0.6)[0] * weight).sum()

        slope = (moved(1) - moved(-1)) / 2e-5
        assert np.vdot(g, direction) == pytest.approx(slope, rel=1e-3, abs=2e-4), jax.tree_util.keystr(path)


def tree_columns():
    """Rows of seven tokens: one is a sequence; in the other 1 and 3 both follow 0, 5 follows 3, and 6 begins anew."""
    return np.array([[-1, 0, 1, 2, 3, 4, 5], [-1, 0, 1, 0, 3, 3, -1]], np.int32)


def full_logprobs(config, params, hidden, tokens, previous, temperature):
    """By plain indexing and all logits at once."""
    before = jnp.stack([h[p] for h, p in zip(hidden, np.maximum(previous, 0), strict=True)])
    head = params["embed"].T if config.tied else params["head"]
    scaled = jax.nn.log_softmax(before @ head / temperature)
    return jnp.stack([row[np.arange(7), ids] for row, ids in zip(scaled, tokens, strict=True)])


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_a_token_can_follow_any_column_of_its_row(chunk):
    params, tokens, previous = parameters(FULL), random_tokens(2, 7), tree_columns()
    hidden = np.random.default_rng(6).normal(size=(2, 7, FULL.d_model)).astype(np.float32)
    logp, entropy = token_logprobs(FULL, params, hidden, tokens, 0.6, previous, chunk)
    expected = full_logprobs(FULL, params, hidden, tokens, previous, 0.6)
    close(logp, np.where(previous >= 0, expected, 0.0))
    assert not np.any(entropy[previous < 0]) and np.all(entropy[previous >= 0] > 0)
    sequence, _ = token_logprobs(FULL, params, hidden, tokens, 0.6, chunk=chunk)
    np.testing.assert_array_equal(sequence[0], logp[0])
    with pytest.raises(ValueError, match="previous must be"):
        token_logprobs(FULL, params, hidden, tokens, 0.6, previous[:1])


def curved(logp, entropy, batch, scalars):
    """A loss whose gradient depends on the value."""
    ratio = jnp.exp(logp - batch["old"])
    loss = jnp.sum(batch["weight"] * jnp.minimum(ratio, scalars["high"] * batch["old"] ** 2))
    return loss, {"entropy": entropy.sum(), "ratio_max": jnp.max(jnp.where(batch["weight"] == 0, 0.0, ratio))}


@pytest.mark.parametrize("config", [BASE, FULL], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("previous", [None, tree_columns()], ids=["sequences", "tree"])
def test_a_summed_loss_equals_autodiff_of_all_logits(config, chunk, previous):
    """Value, metrics and every gradient, with a factor behind the loss."""
    rng = np.random.default_rng(7)
    params, tokens = parameters(config), random_tokens(2, 7)
    hidden = rng.normal(size=(2, 7, config.d_model)).astype(np.float32)
    columns = np.broadcast_to(np.arange(-1, 6), (2, 7)) if previous is None else previous
    batch = {"old": rng.normal(size=(2, 7)) - 3, "weight": rng.normal(size=(2, 7)) * (columns >= 0)}
    batch = {name: x.astype(np.float32) for name, x in batch.items()}
    scalars = {"high": np.float32(0.1)}

    def whole(params, hidden):
        logp = full_logprobs(config, params, hidden, tokens, columns, 0.7)
        return 3 * curved(logp, logp, batch, scalars)[0]

    def fused(params, hidden):
        out = summed_loss(curved, config, params, hidden, tokens, 0.7, batch, scalars, previous, chunk=chunk)
        return 3 * out[0], out[1]

    value, wanted = jax.value_and_grad(whole, (0, 1))(params, hidden)
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))(params, hidden)
    close(loss, value)
    jax.tree.map(close_gradient, gradient, wanted)
    assert sum(np.any(g) for g in jax.tree.leaves(gradient)) == 2, "the head and the hidden states"
    assert not np.any(wanted[1][0][6]), "nothing follows the last token"
    logp, entropy = token_logprobs(config, params, hidden, tokens, 0.7, previous)
    close(metrics["entropy"], entropy.sum())
    close(metrics["ratio_max"], np.exp(logp - batch["old"])[columns >= 0].max())
    without, same = fused(params, hidden)
    close(without, value)
    jax.tree.map(close, same, metrics)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("columns", [(), (2,), (2, 5)], ids=["none", "one", "two"])
@pytest.mark.parametrize("previous", [None, tree_columns()], ids=["sequences", "tree"])
def test_logits_of_tokens_that_nobody_reads_are_not_computed(chunk, columns, previous):
    """Hidden states that only skipped chunks would read may be nan."""
    rng = np.random.default_rng(8)
    params, tokens = parameters(BASE), random_tokens(2, 7)
    hidden = rng.normal(size=(2, 7, BASE.d_model)).astype(np.float32)
    read = np.zeros((2, 7), bool)
    read[0, list(columns)] = True
    read[1, [3] if columns else []] = True
    batch = {"old": rng.normal(size=(2, 7)) - 3, "weight": rng.normal(size=(2, 7)) * read}
    batch = {name: x.astype(np.float32) for name, x in batch.items()}
    scalars = {"high": np.float32(0.1)}
    before = np.broadcast_to(np.arange(-1, 6), (2, 7)) if previous is None else previous

    def masked(logp, entropy, batch, scalars):
        return curved(logp, jnp.where(batch["weight"] == 0, 0.0, entropy), batch, scalars)

    def loss(hidden, params, read):
        return summed_loss(masked, BASE, params, hidden, tokens, 0.7, batch, scalars, previous, read, chunk)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (wanted, metrics), slopes = gradient(hidden, params, np.ones_like(read))
    poisoned = np.full_like(hidden, np.nan)
    for row, some in enumerate(read):
        # What predicts the tokens that are read, and the first others, which fill the chunks up; -1 is column 6.
        filled = np.argsort(~some, kind="stable")[: chunk * -(-len(columns) // chunk)]
        known = before[row, [*filled, *np.flatnonzero(some)]]
        poisoned[row, known] = hidden[row, known]
    (value, same), found = gradient(poisoned, params, read)
    close(value, wanted)
    jax.tree.map(close, same, metrics)
    jax.tree.map(close_gradient, found, slopes)
    assert bool(columns) == any(np.any(g) for g in jax.tree.leaves(found))


def test_entropy_carries_no_gradient_and_extreme_logits_stay_finite():
    logits = jnp.array([[200.0, -200.0, 0.0], [0.0, 0.0, 0.0]])
    logp, entropy = logprob_and_entropy(logits, jnp.array([1, 2]), 0.5)
    close(logp, [-800.0, -np.log(3)])
    close(entropy, [0.0, np.log(3)])
    # Temperature 1 is a case of its own: what lies on both sides of it agrees with it.
    for temperature in (1.0, 1.0 + 1e-6):
        logp, entropy = logprob_and_entropy(logits, jnp.array([1, 2]), temperature)
        close(logp, [-400.0, -np.log(3)])
        close(entropy, [0.0, np.log(3)])
    slope = jax.grad(lambda x: logprob_and_entropy(x, jnp.array([1, 2]), 1.0)[1].sum())(logits)
    assert not np.any(slope)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_norm_and_swiglu_are_the_slopes_of_float64(dtype):
    """Central differences of the formulas in NumPy; in bfloat16 arguments and results are rounded, nothing between."""
    rng = np.random.default_rng(9)
    x, other, slope = (jnp.asarray(rng.normal(size=(2, 3, 8)) * 2, dtype) for _ in range(3))
    scale = jnp.asarray(rng.normal(size=8), jnp.float32)
    exact = [np.asarray(y, np.float64) for y in (x, other, scale, slope)]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1) * scale

    def gated(gate, up):
        return gate / (1 + np.exp(-gate)) * up

    for ours, formula, inputs, precise in (
        (lambda x, scale: rms_norm(x, scale, 0.1), norm, (x, scale), (exact[0], exact[2])),
        (swiglu, gated, (x, other), exact[:2]),
    ):
        out, back = jax.vjp(ours, *inputs)
        rounding = 2**-8 if dtype == "bfloat16" else 1e-5
        assert out.dtype == dtype
        np.testing.assert_allclose(np.asarray(out, np.float64), formula(*precise), rtol=rounding, atol=rounding)
        for i, (gradient, argument) in enumerate(zip(back(slope), inputs, strict=True)):
            assert gradient.dtype == argument.dtype
            wanted = np.zeros(argument.shape)
            for at in np.ndindex(argument.shape):
                ends = []
                for step in (1e-6, -1e-6):
                    moved = [y.copy() for y in precise]
                    moved[i][at] += step
                    ends.append((formula(*moved) * exact[3]).sum())
                wanted[at] = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(np.asarray(gradient, np.float64), wanted, rtol=rounding, atol=rounding)


# Ways of being called


def test_cached_decode_equals_full_forward_on_ragged_rows():
    """Prompts of different lengths, padded on the left or the right, then one token at a time; some rows pause."""
    rows, length, prompts = 4, 24, np.array([3, 9, 1, 14])
    params, tokens = parameters(FULL), random_tokens(rows, length)
    full, _ = forward(FULL)(params, tokens, count_up(rows, length))
    width = int(prompts.max())
    for left in (False, True):
        cache = new_cache(FULL, rows, length)
        prompt, positions = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        for row, n in enumerate(prompts):
            where = slice(width - n, width) if left else slice(0, n)
            prompt[row, where], positions[row, where] = tokens[row, :n], np.arange(n)
        hidden, cache = forward(FULL)(params, prompt, positions, cache)
        for row in range(rows):
            close(np.asarray(hidden)[row][positions[row] >= 0], full[row, : prompts[row]])
        at = prompts.copy()
        step = 0
        while (at < length).any():
            step += 1
            # A row that is done, or that pauses now, is padding.
            active = (at < length) & ((step + np.arange(rows)) % 3 > 0)
            position = np.where(active, at, -1).astype(np.int32)[:, None]
            token = tokens[np.arange(rows), np.minimum(at, length - 1)][:, None]
            hidden, cache = forward(FULL)(params, token, position, cache)
            assert np.isfinite(hidden).all()
            for row in np.flatnonzero(active):
                close(hidden[row, 0], full[row, at[row]])
            at += active


def test_padding_is_neither_written_nor_attended():
    params, tokens = parameters(FULL), random_tokens(2, 6)
    cache = new_cache(FULL, 2, 8)
    _, cache = forward(FULL)(params, tokens, count_up(2, 6), cache)
    nothing = np.full((2, 3), -1, np.int32)
    _, same = forward(FULL)(params, random_tokens(2, 3, seed=5), nothing, cache)
    jax.tree.map(np.testing.assert_array_equal, cache, same)
    beyond = np.full((2, 1), 8, np.int32)  # past the end: dropped, not clamped onto the last column
    _, same = forward(FULL)(params, tokens[:, :1], beyond, cache)
    jax.tree.map(np.testing.assert_array_equal, cache, same)


def test_fork_equals_recompute():
    """Rows 2 and 3 take over row 0 after 7 tokens and go on differently; row 1 is untouched, row 9 does not exist."""
    params, tokens = parameters(FULL), random_tokens(4, 12)
    _, cache = forward(FULL)(params, tokens, count_up(4, 12), new_cache(FULL, 4, 16))
    source, target = np.array([0, 0, 1, 3, 2], np.int32), np.array([2, 3, 9, 1_000_000, -1], np.int32)
    cache, _ = jax.jit(fork)(cache, None, source, np.zeros(5, np.int32), target, np.zeros(5, np.int32))
    branched = tokens.copy()
    branched[2:, :7] = tokens[0, :7]
    tail = random_tokens(4, 5, seed=3)
    branched[2:, 7:] = tail[2:]
    one_more = random_tokens(4, 1, seed=4)
    expected, _ = forward(FULL)(params, np.concatenate([branched, one_more], 1), count_up(4, 13))
    positions = np.where(np.arange(4)[:, None] >= 2, np.arange(7, 12), -1).astype(np.int32)
    hidden, cache = forward(FULL)(params, tail, positions, cache)
    close(hidden[2:], expected[2:, 7:12])
    hidden, _ = forward(FULL)(params, one_more, np.full((4, 1), 12, np.int32), cache)
    close(hidden[:, 0], expected[:, 12])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_rows_behind_a_trunk_equal_rows_that_hold_everything(data):
    """Two groups of two rows: prompts become trunks, rows begin behind any part of them, and forks move between bases.

    Short blocks in a longer cache, so that some are looked into and some are not.
    """
    params, length, room = parameters(FULL), 20, 32
    draw = lambda most: data.draw(st.integers(0, most))  # noqa: E731
    tokens = random_tokens(4, length, seed=draw(99))
    trunk, base = [draw(9) + 1, draw(9) + 1], np.array([0, 0, 0, 0], np.int32)
    for row in range(4):
        base[row] = draw(trunk[row // 2])
        tokens[row, : base[row]] = tokens[row - row % 2, : base[row]]
    full, _ = forward(FULL)(params, tokens, count_up(4, length))
    cache = new_cache(FULL, 4, room, groups=2, block=4)
    # Rows 0 and 2 compute the prompts, which are then copied to the trunks.
    prompts = np.where(np.arange(10) < np.repeat(trunk, 2)[:, None], np.arange(10), -1).astype(np.int32)
    none = np.zeros(4, np.int32)
    _, cache = forward(FULL)(params, tokens[:, :10], prompts, cache, where=locate(prompts, none))
    lift = jax.jit(fork)
    cache, _ = lift(cache, None, np.array([0, 2]), none[:2], np.array([4, 5]), none[:2])
    # Half of what is left in one call that names the rows, backwards; then they are decoded.
    middle = (base + length) // 2
    order = np.array([3, 1, 0, 2], np.int32)
    columns = np.arange(length)
    positions = np.where((columns >= base[:, None]) & (columns < middle[:, None]), columns, -1).astype(np.int32)
    where = locate(positions[order], base[order], order)
    hidden, cache = forward(FULL)(params, tokens[order], positions[order], cache, where=where)
    for i, row in enumerate(order):
        close(hidden[i, base[row] : middle[row]], full[row, base[row] : middle[row]])
    # Row 3 moves to row 1, and row 0 to row 3, each behind what the new trunk has in common with it (here: nothing).
    cache, _ = lift(cache, None, np.array([3, 0]), base[[3, 0]], np.array([1, 3]), none[:2])
    tokens, full, middle = tokens[[0, 3, 2, 0]], np.asarray(full)[[0, 3, 2, 0]], middle[[0, 3, 2, 0]]
    base = np.where(np.arange(4) % 2 == 1, 0, base).astype(np.int32)
    for step in range(int((length - middle).max())):
        at = middle + step
        position = np.where(at < length, at, -1).astype(np.int32)[:, None]
        token = tokens[np.arange(4), np.minimum(at, length - 1)][:, None]
        hidden, cache = forward(FULL)(params, token, position, cache, where=locate(position, base))
        for row in np.flatnonzero(at < length):
            close(hidden[row, 0], full[row, at[row]])


@pytest.mark.parametrize("length", [1, 100, 160, 256, 640, 20480])
def test_blocks_cover_a_row_and_double(length):
    sizes = block_lengths(length, 128)
    assert sum(sizes) == length and (len(sizes) == 1 or sizes[0] == 128)
    ends = np.cumsum(sizes)
    for before, end in itertools.pairwise(ends):
        assert 1.5 * before <= end <= 3 * before


def test_fork_reads_all_rows_before_it_writes():
    cache = new_cache(BASE, 3, 4)
    cache = jax.tree.map(lambda x: x + jnp.arange(3.0).reshape(3, 1, 1, 1), cache)
    swapped, _ = fork(cache, None, jnp.array([0, 1]), jnp.zeros(2, int), jnp.array([1, 0]), jnp.zeros(2, int))
    for leaf in jax.tree.leaves(swapped):
        assert [float(leaf[row].min()) for row in range(3)] == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("staged", [0, 2**28])  # one layer at a time, and all at once
def test_parked_rows_hold_whole_sequences_and_change_places_with_rows(staged, monkeypatch):
    """Two groups of two rows and four parked rows; every value is another."""
    monkeypatch.setattr(kv, "STAGED_BYTES", staged)

    def numbered(tree):
        count = itertools.count(1)
        return jax.tree.map(lambda x: (jnp.arange(x.size) + 1e5 * next(count)).reshape(x.shape), tree)

    def columns(rows):  # of a layer: [row, column, ...]
        k, v = (np.concatenate(x, axis) for x, axis in ((rows.k, 3), (rows.v, 2)))
        return np.concatenate([np.moveaxis(k, 3, 1), np.moveaxis(v, 2, 1)], axis=2)

    cache = numbered(new_cache(BASE, 4, 12, groups=2, block=4))
    parked = numbered(new_parked(BASE, 4, 12, block=4))
    # Row 3 behind 5 tokens of trunk 1 changes places with parked row 2, which goes behind 7; parked row 0 is lifted to
    # trunk 0, row 0 is parked whole in row 3, and a parked row moves.
    moves = np.array([(3, 5, 8, 0), (8, 0, 3, 7), (6, 0, 4, 0), (0, 0, 9, 0), (9, 0, 7, 0), (1, 0, -1, 0)], np.int32)
    between = f"f32[{len(moves)},{2 * (BASE.layers if staged else 1)},{BASE.kv_heads},{12 * BASE.head_dim}]"
    assert between in str(jax.make_jaxpr(lambda *arrays: fork(*arrays))(cache, parked, *moves.T))
    once = jax.jit(lambda *arrays: fork(*arrays))  # a function of its own, so that it is traced anew
    moved, aside = once(cache, parked, *moves.T)
    for before, after, waited, waits in zip(cache, moved, parked, aside, strict=True):
        own, trunk, old = columns(before.own), columns(before.trunk), columns(waited)
        new, lifted, spare = columns(after.own), columns(after.trunk), columns(waits)
        np.testing.assert_array_equal(new[:3], own[:3])
        np.testing.assert_array_equal(new[3, :5], old[2, 7:])
        np.testing.assert_array_equal(lifted, [old[0], trunk[1]])
        np.testing.assert_array_equal(spare, [old[0], old[3], np.concatenate([trunk[1, :5], own[3, :7]]), own[0]])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 11), st.integers(0, 1000))
def test_rewind_equals_recompute(keep, seed):
    """After 12 tokens the row goes back to `keep` of them and on with others; what lay behind leaves no trace."""
    params, tokens, other = parameters(FULL), random_tokens(1, 12), random_tokens(1, 12, seed=seed)
    _, cache = forward(FULL)(params, tokens, count_up(1, 12), new_cache(FULL, 1, 16))
    mixed = np.concatenate([tokens[:, :keep], other[:, keep:]], axis=1)
    expected, _ = forward(FULL)(params, mixed, count_up(1, 12))
    positions = np.where(np.arange(12) >= keep, np.arange(12), -1).astype(np.int32)[None]
    hidden, _ = forward(FULL)(params, other, positions, cache)
    close(hidden[:, keep:], expected[:, keep:])


def packed_rows():
    """Three sequences packed into two rows with padding at the end, and the same sequences in rows of their own."""
    lengths, length, longest = (70, 50, 90), 140, 90  # over the boundaries of the blocks that attention works in
    tokens = random_tokens(3, longest, seed=2)
    packed = {name: np.zeros((2, length), np.int32) for name in ("tokens", "ends")}
    packed["positions"] = np.full((2, length), -1, np.int32)
    padded = {"tokens": np.zeros((3, longest), np.int32), "positions": np.full((3, longest), -1, np.int32)}
    places = [(0, 0), (0, 70), (1, 0)]
    for sequence, (n, (row, start)) in enumerate(zip(lengths, places, strict=True)):
        where = (row, slice(start, start + n))
        packed["tokens"][where], packed["ends"][where] = tokens[sequence, :n], start + n
        packed["positions"][where] = np.arange(n)
        padded["tokens"][sequence, :n], padded["positions"][sequence, :n] = tokens[sequence, :n], np.arange(n)
    return packed, padded, lengths, places


def test_packed_equals_padded_in_hidden_and_gradient():
    config, params = FULL, parameters(FULL)
    packed, padded, lengths, places = packed_rows()
    weights = np.random.default_rng(3).normal(size=(3, 90, config.d_model)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def sequences(params, batch, cut):
        hidden, _ = apply(config, params, **batch)
        total = sum((hidden[row, s : s + n] * w[:n]).sum() for (row, s, n), w in zip(cut, weights, strict=True))
        return total, hidden

    gradient = jax.value_and_grad(sequences, has_aux=True)
    cuts = tuple((row, start, n) for n, (row, start) in zip(lengths, places, strict=True))
    (a, hidden_a), grad_a = gradient(params, packed, cuts)
    (b, hidden_b), grad_b = gradient(params, padded, tuple((i, 0, n) for i, n in enumerate(lengths)))
    for i, (row, start, n) in enumerate(cuts):
        close(hidden_a[row, start : start + n], hidden_b[i, :n])
    close(a, b, 1e-4)
    jax.tree.map(close_gradient, grad_a, grad_b)


def test_rows_of_padding_are_finite_and_carry_no_gradient():
    params = parameters(FULL)
    packed, _, _, _ = packed_rows()
    blank = {"tokens": np.zeros((2, 140), np.int32), "positions": np.full((2, 140), -1, np.int32)}
    blank["ends"] = np.zeros((2, 140), np.int32)
    both = {name: np.concatenate([packed[name], blank[name]]) for name in packed}

    def loss(params, batch):
        hidden, _ = apply(FULL, params, **batch)
        logp, _ = token_logprobs(FULL, params, hidden, batch["tokens"], 1.0)
        return jnp.sum(jnp.where(batch["positions"] > 0, logp, 0.0)), (hidden, logp)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    with_blank, outputs = gradient(params, both)
    without, _ = gradient(params, packed)
    alone, _ = gradient(params, blank)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((outputs, with_blank)))
    assert all(not np.any(x) for x in jax.tree.leaves(alone))
    jax.tree.map(close_gradient, with_blank, without)


def test_initial_scales():
    """Matrices keep the variance of what they read; what writes to the residual stream is smaller by sqrt(2 L)."""
    config = ModelConfig(vocab_size=512, d_model=256, layers=2, heads=8, kv_heads=2, head_dim=32, d_ff=512)
    params = init(config, jax.random.key(0))
    block = params["layers_1"]
    for matrix, deviation in (
        (params["embed"], 256**-0.5),
        (block["attn"]["q"], 256**-0.5),
        (block["attn"]["o"], 256**-0.5 / 2),
        (block["mlp"]["down"], 512**-0.5 / 2),
    ):
        assert float(matrix.std()) == pytest.approx(deviation, rel=0.02)
    assert np.all(block["attn_norm"] == 1) and not np.allclose(block["attn"]["q"], params["layers_0"]["attn"]["q"])


@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"scan_layers": True}, {"scan_layers": True, "remat": "full"}]
)
def test_neither_remat_nor_the_loop_over_layers_changes_names_or_gradients(change):
    other = dataclasses.replace(FULL, **change)
    params = parameters(FULL)
    jax.tree.map(np.testing.assert_array_equal, params, parameters(other))
    tokens = random_tokens(2, 8)
    target = np.random.default_rng(5).normal(size=(2, 8, FULL.d_model))

    def gradient(config):
        return jax.jit(jax.grad(lambda p: jnp.sum(apply(config, p, tokens, count_up(2, 8))[0] * target)))

    assert ("remat" in str(jax.make_jaxpr(gradient(other))(params))) == ("remat" in change)
    jax.tree.map(close_gradient, gradient(FULL)(params), gradient(other)(params))


def test_layers_are_lowered_once_and_compiled_once_in_a_loop_whatever_their_number():
    def products(layers, **change):
        config = dataclasses.replace(BASE, layers=layers, **change)
        params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        loss = jax.grad(lambda p: apply(config, p, count_up(1, 8), count_up(1, 8))[0].sum())
        lowered = jax.jit(loss).lower(params)
        return lowered.as_text().count("dot_general"), lowered.compile().as_text().count(" dot(")

    few, many = products(2), products(6)
    assert many[0] == few[0] and many[1] == 3 * few[1] > 0
    assert products(6, scan_layers=True) == products(2, scan_layers=True)


def test_bfloat16_runs_and_stays_close():
    config = dataclasses.replace(FULL, dtype="bfloat16")
    params, tokens = parameters(FULL), random_tokens(2, 16)
    exact, _ = forward(FULL)(params, tokens, count_up(2, 16))
    hidden, _ = forward(config)(params, tokens, count_up(2, 16))
    assert hidden.dtype == jnp.bfloat16 and unembed(config, params, hidden).dtype == jnp.float32
    assert np.abs(np.asarray(hidden, np.float32) - exact).max() < 0.1
    wanted, _ = token_logprobs(FULL, params, exact, tokens, 1.0)
    logp, _ = token_logprobs(config, params, hidden, tokens, 1.0)
    assert np.abs(logp - wanted).max() < 0.1 and np.abs(logp - wanted).max() > 0
    cache = new_cache(config, 2, 16)
    assert cache[0].own.k[0].dtype == jnp.bfloat16
    _, cache = forward(config)(params, tokens[:, :15], count_up(2, 15), cache)
    last, _ = forward(config)(params, tokens[:, 15:], np.full((2, 1), 15, np.int32), cache)
    assert np.abs(np.asarray(last[:, 0], np.float32) - exact[:, 15]).max() < 0.1
    gradient = jax.jit(jax.grad(lambda p: apply(config, p, tokens, count_up(2, 16))[0].astype(jnp.float32).std()))(
        params
    )
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    half = dataclasses.replace(config, param_dtype="bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(parameters(half)))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(parameters(config)))


@pytest.mark.parametrize("axis", [0, 1])
def test_products_in_bfloat16_round_only_their_operands_and_results(axis):
    """Against float64: the parameter's gradient is not rounded at all, everything else once."""
    rng = np.random.default_rng(8)
    x, slope = (jnp.asarray(rng.normal(size=(2, 30, n)), jnp.bfloat16) for n in (24, 40))
    matrix = rng.normal(size=(24, 40)).astype(np.float32)
    out, back = jax.vjp(lambda x, m: dense(x, m, "bfloat16", axis), x, matrix.T if axis else matrix)
    of_x, of_matrix = back(slope)
    assert (out.dtype, of_x.dtype, of_matrix.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = [np.asarray(y, np.float64) for y in (x, slope, jnp.asarray(matrix, jnp.bfloat16))]
    close(out, exact[0] @ exact[2], 2**-8)
    close(of_x, exact[1] @ exact[2].T, 2**-8)
    wanted = np.einsum("BTI,BTO->IO", *exact[:2])
    close(of_matrix.T if axis else of_matrix, wanted)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers do as they are told")
@pytest.mark.parametrize("tied", [True, False])
def test_no_product_with_a_parameter_has_float32_operands_in_bfloat16(tied):
    """Which XLA's CPU backend makes of products that it cannot do in bfloat16, at a multiple of the time."""
    config = dataclasses.replace(BASE, vocab_size=96, d_model=64, d_ff=160, dtype="bfloat16", tied=tied)

    def loss(params, tokens):
        hidden, _ = apply(config, params, tokens, count_up(4, 32))
        return summed_loss(lambda logp, *_: (logp.sum(), {}), config, params, hidden, tokens, 1.0, (), ())[0]

    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    dtypes = dict(re.findall(r"%([\w.-]+) = (\w+)\[", text)) | dict(re.findall(r"([\w.-]+): (\w+)\[", text))
    products = re.findall(r"= f32\[\d+,\d+\]\S* dot\(%([\w.-]+), %([\w.-]+)\)", text)  # attention has more axes
    assert len(products) == 3 * (2 * 7 + 1)
    assert {dtypes[name] for pair in products for name in pair} == {"bf16"}


# What is compiled


def test_the_logits_of_a_batch_never_exist():
    config = dataclasses.replace(BASE, vocab_size=4099)
    rows, length, chunk = 4, 128, 16
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))

    def loss(params, hidden, tokens):
        logp, entropy = token_logprobs(config, params, hidden, tokens, 0.6, chunk=chunk)
        return jnp.sum(logp), entropy

    hidden = jax.ShapeDtypeStruct((rows, length, config.d_model), jnp.float32)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(shapes, hidden, tokens).compile()
    sizes = {
        int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    }
    assert rows * chunk * config.vocab_size in sizes  # the text does name the shapes of its buffers
    assert max(sizes) < rows * length * config.vocab_size / 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * length * config.vocab_size / 2


@pytest.mark.parametrize("tokens_per_call", [1, 3])
def test_a_decode_loop_writes_the_cache_in_place(tokens_per_call):
    """Inside a scan over a donated cache there is no copy of a layer, and no room for one."""
    config, rows, length = dataclasses.replace(BASE, head_dim=64), 8, 512
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: new_cache(config, rows, length))

    def decode(params, cache, tokens, positions):
        def step(carry, _):
            cache, positions = carry
            hidden, cache = apply(config, params, tokens, positions, cache)
            return (cache, positions + tokens_per_call), hidden

        return jax.lax.scan(step, (cache, positions), None, length=10)

    ids = jax.ShapeDtypeStruct((rows, tokens_per_call), jnp.int32)
    compiled = jax.jit(decode, donate_argnums=1).lower(params, cache, ids, ids).compile()
    text = compiled.as_text()
    for size in block_lengths(length, 128):
        layer = f"{rows},{config.kv_heads},({config.head_dim},{size}|{size},{config.head_dim})"
        assert re.search(rf"f32\[{layer}\]", text)
        assert not re.search(rf"= f32\[{layer}\]\S* copy\(", text)
    bytes_of_k = 4 * rows * config.kv_heads * config.head_dim * length
    assert compiled.memory_analysis().temp_size_in_bytes < bytes_of_k
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * config.layers * bytes_of_k


# Configuration


def test_parameter_names_and_count():
    for config in (BASE, FULL, dataclasses.replace(BASE, kv_heads=1, qkv_bias=True)):
        assert sum(x.size for x in jax.tree.leaves(parameters(config))) == count_params(config)
    leaves = jax.tree_util.tree_leaves_with_path(parameters(FULL))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    attention = {f"attn/{n}" for n in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm")}
    block = attention | {"attn_norm", "mlp_norm", "mlp/gate", "mlp/up", "mlp/down"}
    assert names == {"embed", "final_norm", "head"} | {f"layers_{i}/{name}" for i in range(2) for name in block}


def test_published_shapes_fit():
    """Parameter counts of published models that this module is to load, from their configurations."""
    qwen25_7b = ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, 1e6, qkv_bias=True, tied=False)
    assert count_params(qwen25_7b) == 7_615_616_512
    qwen3_4b = ModelConfig(151936, 2560, 36, 32, 8, 128, 9728, 1e6, qk_norm=True, tied=True)
    assert count_params(qwen3_4b) == 4_022_468_096
    llama3_8b = ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 5e5, 1e-5, tied=False)
    assert count_params(llama3_8b) == 8_030_261_248


@pytest.mark.parametrize(
    "change,named",
    [
        ({"kv_heads": 3}, "model.heads=4 is not a multiple of model.kv_heads=3"),
        ({"head_dim": 7}, "model.head_dim=7 must be even"),
        ({"layers": 0}, "model.layers must be a positive integer, not 0"),
        ({"d_ff": 2.5}, "model.d_ff must be a positive integer, not 2.5"),
        ({"attention": "flash"}, "model.attention must be one of blocks, pallas, cudnn, not 'flash'"),
        ({"attention": "cudnn"}, "model.attention=cudnn needs model.dtype=bfloat16, not float32"),
        ({"dtype": "float16"}, "model.dtype must be one of float32, bfloat16, not 'float16'"),
        ({"rope_theta": 0.0}, "model.rope_theta must be positive"),
        ({"norm_eps": float("inf")}, "model.norm_eps must be positive"),
        ({"remat": True}, "model.remat must be one of none, dots, full, not True"),
    ],
)
def test_an_impossible_network_is_an_error_that_names_the_field(change, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(
    "scaling,named",
    [
        ({"kind": "dynamic"}, "model.rope_scaling.kind must be one of none, linear, llama3, yarn, not 'dynamic'"),
        ({"kind": "linear", "factor": 0.5}, "model.rope_scaling.factor must be a number of at least 1, not 0.5"),
        ({"kind": "yarn", "factor": float("nan")}, "model.rope_scaling.factor must be a number of at least 1, not nan"),
        ({"kind": "yarn", "factor": 4.0}, "model.rope_scaling.original_context must be the context of the pretraining"),
        (
            {"kind": "llama3", "factor": 8.0, "original_context": 8192, "low_freq_factor": 4.0},
            "model.rope_scaling.low_freq_factor=4.0 must be positive and less than model.rope_scaling.high_freq_factor",
        ),
        (
            {"kind": "yarn", "factor": 8.0, "original_context": 8192, "beta_slow": 0.0},
            "model.rope_scaling.beta_slow=0.0 must be positive",
        ),
        (
            {"kind": "yarn", "factor": 8.0, "original_context": 8192, "attention_factor": -1.0},
            "model.rope_scaling.attention_factor must be at least 0",
        ),
    ],
)
def test_an_impossible_rope_scaling_is_an_error_that_names_the_field(scaling, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        RopeScaling(**scaling)


def test_a_config_survives_json_and_can_be_a_key():
    config = dataclasses.replace(FULL, rope_scaling=RopeScaling("yarn", 4.0, 32768), source="folder")
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_json(values) == config and hash(config_from_json(values)) == hash(config)
    assert config_from_json({k: v for k, v in values.items() if k not in ("rope_scaling", "source")}) == FULL
    with pytest.raises(ValueError, match="unknown numbers of a network: experts"):
        config_from_json(values | {"experts": 8})
    with pytest.raises(ValueError, match="damaged"):
        config_from_json({"vocab_size": 8})


def test_linear_scaling_divides_the_positions():
    config = dataclasses.replace(FULL, rope_scaling=RopeScaling("linear", 3.0))
    params, tokens = parameters(FULL), random_tokens(1, 9)
    stretched, _ = forward(config)(params, tokens, 3 * count_up(1, 9))
    close(stretched, forward(FULL)(params, tokens, count_up(1, 9))[0])


def test_wrong_calls_are_errors():
    params, tokens = parameters(BASE), random_tokens(2, 4)
    positions, cache = count_up(2, 4), new_cache(BASE, 2, 8)
    for match, arguments in {
        "tokens and positions": (tokens, positions[:, :3]),
        "ends must be": (tokens, positions, None, positions[:1]),
        "a cache row holds one sequence": (tokens, positions, cache, positions),
        "2 layers of 3 rows": (tokens, positions, new_cache(BASE, 3, 8)),
    }.items():
        with pytest.raises(ValueError, match=match):
            apply(BASE, params, *arguments)
    with pytest.raises(ValueError, match="at least one row"):
        new_cache(BASE, 0, 8)
    with pytest.raises(ValueError, match="tokens must be"):
        token_logprobs(BASE, params, jnp.zeros((2, 4, 24)), tokens[:, :3], 1.0)
