"""The device half of the sampler: jitted fork, prefill and decode over one static cache of slots.

Slots are split over the mesh axes `data` and `fsdp`, and each shard decodes and prefills its own slots without talking
to the others; only a fork may cross. A row's samples are a function of its own request and the parameters alone. The
functions are cached, so that a second sampler of the same shapes compiles nothing.
Letters: B slots, R rows of a prefill, T tokens of a prefill, V vocabulary, n steps of a visit.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elpo_jax.model import cache as kv
from elpo_jax.model.config import ROWS, ModelConfig
from elpo_jax.model.logprob import logprob_and_entropy
from elpo_jax.model.transformer import Params, apply, unembed

WHOLE = PartitionSpec()

# Columns of the control array int32 [B, 8], one row per slot.
TOKEN, POSITION, REMAINING, BASE, STREAM = 0, 1, 2, 3, slice(4, 8)
CONTROL_WIDTH = 8


class State(NamedTuple):
    """All that the sampler has on the device; `fork`, `rewind`, prefill and decode each turn one into the next.

    Attributes:
      cache: Of every slot and every trunk.
      parked: Parked rows, which only a fork reads or writes; None where there are none.
      control: int32 [B, 8]. For each slot the last token of its sequence (which is not in the cache yet), its position,
        how many tokens may still be sampled (0 for an idle slot), how many of its tokens the trunk holds, and the
        request's four stream integers.
    """

    cache: kv.Cache
    parked: kv.Parked | None
    control: jax.Array


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that split the slots."""
    return tuple(name for name in ROWS if name in mesh.shape)


def place_params(params: Params, mesh: Mesh, dtype: str) -> Params:
    """Parameters as decoding needs them: whole in every shard of the slots, still split over the other axes.

    Gathering them once spares the decode loop a gather of every matrix for every token, and matrices are cast once to
    the compute dtype, as every product would cast them. What is there already is not copied; arrays of other devices
    are copied to all devices of the mesh.
    """
    rows = row_axes(mesh)

    def keep(axes):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name not in rows) or None

    def place(x):
        sharding = getattr(x, "sharding", None)
        known = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        spec = PartitionSpec(*map(keep, sharding.spec)) if known else WHOLE
        x = x.astype(dtype) if x.ndim > 1 and x.dtype != dtype else x  # before it is gathered
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, params)


def cache_sharding(config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """Slots over the row axes, key/value heads over `tensor` where it divides them; the same for every array."""
    parts = mesh.shape.get("tensor", 0)
    heads = "tensor" if parts and config.kv_heads % parts == 0 else None
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh), heads))


def make_state(
    config: ModelConfig, mesh: Mesh, slots: int, length: int, group: int, block: int, parking: int = 0
) -> State:
    """An empty state, split by slot (see `empty_state`)."""
    return _state_maker(config, mesh, slots, length, group, block, parking)()


@functools.cache
def _state_maker(config: ModelConfig, mesh: Mesh, *sizes: int) -> Callable[[], State]:
    return jax.jit(functools.partial(empty_state, config, *sizes), out_shardings=state_sharding(config, mesh))


def empty_state(config: ModelConfig, slots: int, length: int, group: int, block: int, parking: int = 0) -> State:
    """A state in which every slot is idle.

    Args:
      config: The network.
      slots: B.
      length: Columns of a row, of a trunk and of a parked row.
      group: Slots that share a trunk (see `model.cache`); none do where it is 1.
      block: Columns of their first block.
      parking: P, parked rows.
    """
    cache = kv.new_cache(config, slots, length, slots // group if group > 1 else 0, block)
    parked = kv.new_parked(config, parking, length, block) if parking else None
    return State(cache, parked, jnp.zeros((slots, CONTROL_WIDTH), jnp.int32))


def state_sharding(config: ModelConfig, mesh: Mesh) -> State:
    """Where the arrays of the cache and of the parked rows, all of them, and the control array lie."""
    rows = cache_sharding(config, mesh)
    return State(rows, rows, NamedSharding(mesh, PartitionSpec(row_axes(mesh))))


@functools.cache
def make_fork(config: ModelConfig, mesh: Mesh) -> Callable:
    """Compiles (state, forks int32 [R, 4]) -> state, which is donated: `model.cache.fork` of R rows.

    The columns of `forks` are a source, how many tokens of its trunk come before it, a target, and behind how many
    tokens of its own trunk it will begin, numbered as there. A target of -1 marks padding. Only the copied rows cross
    between shards.
    """
    axes = row_axes(mesh)
    shards = math.prod(mesh.shape[axis] for axis in axes)

    def exchange(row):
        # As bits, which keeps them, and because XLA's CPU backend aborts on sums of bfloat16 over devices.
        return jax.lax.psum(row.view(jnp.uint32), axes).view(row.dtype)

    def fork(cache, parked, forks):
        return kv.fork(cache, parked, *forks.T, jax.lax.axis_index(axes), shards, exchange)

    split = PartitionSpec(axes)
    mapped = _per_shard(fork, mesh, (split, split, WHOLE), (split, split))

    def run(state, forks):
        cache, parked = mapped(state.cache, state.parked, forks)
        return State(cache, parked, state.control)

    return jax.jit(run, donate_argnums=0, out_shardings=state_sharding(config, mesh))


@functools.cache
def make_rewind(config: ModelConfig, mesh: Mesh) -> Callable:
    """Compiles (state, rows int32 [R], control int32 [R, 8]) -> state, which is donated.

    Each slot goes to the position that its row of `control` names, back or on; what lies behind in the cache is not
    seen again. A row outside 0..B-1 marks padding.
    """

    def rewind(state, rows, control):
        return state._replace(control=state.control.at[rows].set(control, mode="drop"))

    return jax.jit(rewind, donate_argnums=0, out_shardings=state_sharding(config, mesh))


@functools.cache
def make_prefill(config: ModelConfig, mesh: Mesh, trunks: bool = False) -> Callable:
    """Compiles (params, state, rows, base, tokens, positions) -> state, which is donated.

    Each shard gets R rows: `rows` int32 [shards * R] are indices among the shard's own slots (or trunks), and one past
    its last marks padding; `base` int32 [shards * R] says how many tokens of its trunk come before a slot's row;
    `tokens` and `positions` are int32 [shards * R, T], positions -1 at padding.
    """

    def prefill(params, cache, rows, base, tokens, positions):
        if trunks:
            alone = tuple(kv.LayerCache(layer.trunk, None) for layer in cache)
            _, alone = apply(config, params, tokens, positions, alone, where=kv.locate(positions, rows=rows))
            return tuple(layer._replace(trunk=filled.own) for layer, filled in zip(cache, alone, strict=True))
        _, cache = apply(config, params, tokens, positions, cache, where=kv.locate(positions, base, rows))
        return cache

    split = PartitionSpec(row_axes(mesh))
    mapped = _per_shard(prefill, mesh, (WHOLE, split, split, split, split, split), split)

    def run(params, state, *rows):
        return state._replace(cache=mapped(params, state.cache, *rows))

    return jax.jit(run, donate_argnums=1, out_shardings=state_sharding(config, mesh))


@functools.cache
def make_decode(config: ModelConfig, mesh: Mesh, stop_ids: tuple[int, ...], seed: int, steps: int) -> Callable:
    """Compiles (params, state, sampling) -> (state, out): up to `steps` tokens for every slot.

    `sampling` is float32 [2], the temperature and top-p. `out` is int32 [steps, 3, B]: the sampled id (-1 where the
    slot was idle), its log-probability and the entropy, both as the bits of a float32. A slot that sampled a stop id
    idles from then on. The state is donated.
    """
    # An id that is never sampled keeps the comparison below well-formed without stop ids.
    stops = jnp.array(stop_ids or (-1,), jnp.int32)

    def decode(params, cache, start, sampling):
        temperature, top_p = sampling
        base = jnp.where(start[:, REMAINING] > 0, start[:, BASE], 0)  # what idle slots share need not be read
        uniforms = stream_uniforms(seed, start[:, STREAM], start[:, POSITION] + 1, steps)

        def step(carry, u):
            cache, token, position, remaining = carry
            active = remaining > 0
            where = kv.locate(jnp.where(active, position, -1)[:, None], base)
            hidden, cache = apply(config, params, token[:, None], position[:, None], cache, where=where)
            logits = unembed(config, params, hidden[:, 0])
            drawn = sample(logits, u, temperature, top_p)
            logp, entropy = logprob_and_entropy(logits, drawn, _divisor(temperature))
            out = jnp.stack([jnp.where(active, drawn, -1), _bits(logp), _bits(entropy)])
            stopped = jnp.any(drawn[:, None] == stops, axis=1)
            token, position = jnp.where(active, drawn, token), position + active
            remaining = jnp.where(stopped, 0, jnp.maximum(remaining - 1, 0))
            return (cache, token, position, remaining), out

        carry = (cache, start[:, TOKEN], start[:, POSITION], start[:, REMAINING])
        (cache, *now), out = jax.lax.scan(step, carry, uniforms)
        return cache, start.at[:, :BASE].set(jnp.stack(now, axis=1)), out

    split, columns = PartitionSpec(row_axes(mesh)), PartitionSpec(None, None, row_axes(mesh))
    mapped = _per_shard(decode, mesh, (WHOLE, split, split, WHOLE), (split, split, columns))

    def run(params, state, sampling):
        cache, control, out = mapped(params, state.cache, state.control, sampling)
        return State(cache, state.parked, control), out

    shardings = state_sharding(config, mesh), NamedSharding(mesh, columns)
    return jax.jit(run, donate_argnums=1, out_shardings=shardings)


def stream_uniforms(seed: int, streams: jax.Array, positions: jax.Array, steps: int) -> jax.Array:
    """The uniform numbers that decide the next tokens: one per token, from what identifies the token.

    Args:
      seed: The sampler's.
      streams: int32 [B, 4], bits of the request's unsigned (step, task, attempt, turn).
      positions: int32 [B], index in its sequence of the first token to sample.
      steps: n, tokens to sample.

    Returns:
      float32 [n, B] in [0, 1): of fold_in(... fold_in(key(seed), step) ..., turn), position).
    """

    def row(stream, position):
        key = jax.random.key(seed)
        for part in stream:
            key = jax.random.fold_in(key, part)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position + jnp.arange(steps))
        return jax.vmap(jax.random.uniform)(keys)

    return jax.vmap(row, out_axes=1)(jax.lax.bitcast_convert_type(streams, jnp.uint32), positions)


def sample(logits: jax.Array, uniform: jax.Array, temperature: jax.Array, top_p: jax.Array | float = 1.0) -> jax.Array:
    """Draws from softmax(logits / temperature) by the inverse of its cumulative sum; the largest logit where it is 0.

    The sum has two levels, blocks of about sqrt(V) ids and the ids of one block, so its rounding errors are those of
    short sums. Whatever they are, an id of probability 0 is never returned.

    Args:
      logits: float32 [B, V].
      uniform: float32 [B] in [0, 1), one number per row.
      temperature: float32 scalar >= 0, traced.
      top_p: float32 scalar in (0, 1], traced; below 1 only the ids of `nucleus` are drawn.

    Returns:
      int32 [B].
    """

    def inverse_cdf():
        vocab = logits.shape[1]
        block = 2 ** (vocab.bit_length() // 2)
        weights = jnp.exp((logits - jnp.max(logits, axis=1, keepdims=True)) / temperature)
        weights = jax.lax.cond(top_p < 1, lambda: nucleus(weights, top_p), lambda: weights)
        weights = jnp.pad(weights, ((0, 0), (0, -vocab % block))).reshape(len(weights), -1, block)
        sums = jnp.sum(weights, axis=2)
        chosen, rest = _pick(sums, uniform * jnp.sum(sums, axis=1))
        inside, _ = _pick(jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0], rest)
        return chosen * block + inside

    return jax.lax.cond(temperature > 0, inverse_cdf, lambda: jnp.argmax(logits, axis=1).astype(jnp.int32))


def nucleus(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """The largest weights that together have at least the share `top_p`; 0 for all others. Equal ones stay together.

    Found without sorting: non-negative floats are ordered as their bits are, so 31 halvings find the exact threshold.

    Args:
      weights: float32 [B, V], at least 0 and at most 1.
      top_p: float32 scalar in (0, 1].

    Returns:
      float32 [B, V].
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    enough = top_p * jnp.sum(weights, axis=1)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        holds = jnp.sum(jnp.where(bits >= middle[:, None], weights, 0.0), axis=1) >= enough
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    rows = len(weights)
    start = jnp.zeros(rows, jnp.int32), jnp.full(rows, jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1)
    low, _ = jax.lax.fori_loop(0, 31, halve, start)
    return jnp.where(bits >= low[:, None], weights, 0.0)


def _pick(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index whose cumulative weight exceeds `target`, and what of `target` is left over inside it.

    Only indices of positive weight count, because a parallel cumulative sum need not be monotone; the last of them is
    taken where rounding put `target` at or beyond the total. float32 [B, n] and [B] -> int32 [B], float32 [B].
    """
    cumulative = jnp.cumsum(weights, axis=1)
    index = jnp.arange(weights.shape[1], dtype=jnp.int32)
    positive = weights > 0
    first = jnp.min(jnp.where(positive & (cumulative > target[:, None]), index, weights.shape[1]), axis=1)
    last = jnp.max(jnp.where(positive, index, 0), axis=1)
    found = jnp.minimum(first, last)
    before = jnp.take_along_axis(cumulative - weights, found[:, None], axis=1)[:, 0]
    return found, jnp.maximum(target - before, 0.0)


def _divisor(temperature: jax.Array) -> jax.Array:
    """What divides the logits of recorded log-probabilities: greedy tokens get those of temperature 1."""
    return jnp.where(temperature > 0, temperature, 1.0)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _per_shard(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    """Runs `fn` once per shard of the slots; the other mesh axes stay the compiler's, as the parameters need them."""
    return jax.shard_map(
        fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=frozenset(row_axes(mesh)), check_vma=False
    )
