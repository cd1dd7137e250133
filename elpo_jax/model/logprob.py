"""Log-probabilities and entropies of tokens, without ever holding the logits of a whole batch.

The same arithmetic serves the sampler (one token's logits at hand) and the trainer (hidden states in chunks), so the
probability ratio at the first update is one up to rounding. Letters: B rows, T tokens, D model width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elpo_jax.model.config import ROWS, ModelConfig
from elpo_jax.model.transformer import Params, unembed

SummedLoss = Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]

CHUNK_TOKENS = 512  # more is no faster on CPUs; much less, and adding up the gradient of the head costs too much


@jax.custom_vjp
def logprob_and_entropy(logits: jax.Array, tokens: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given tokens at a temperature, and entropy of the whole distribution at temperature 1.

    Args:
      logits: float32 [..., V], at temperature 1.
      tokens: int32 [...].
      temperature: Scalar > 0 that divides the logits for the log-probability; it has no gradient.

    Returns:
      logp float32 [...] and entropy float32 [...] (paper eq. 3), both in nats. No gradient flows through the entropy,
      which is a measurement.
    """
    return _logprob_forward(logits, tokens, temperature)[0]


def _logprob_forward(logits, tokens, temperature):
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    below = logits - largest
    weights = jnp.exp(below)
    total = weights.sum(axis=-1)
    entropy = jnp.log(total) - jnp.sum(weights * below, axis=-1) / total
    # At temperature 1, that of most training, the sum is there already.
    scaled = jax.lax.cond(temperature == 1, lambda: total, lambda: jnp.sum(jnp.exp(below / temperature), axis=-1))
    scaled_total = jnp.log(scaled) + largest[..., 0] / temperature
    return (chosen / temperature - scaled_total, entropy), (logits, tokens, temperature, scaled_total)


def _logprob_backward(kept, slopes):
    """Elementwise from the logits, so that nothing else of their size is kept."""
    logits, tokens, temperature, scaled_total = kept
    probabilities = jnp.exp(logits / temperature - scaled_total[..., None])
    slope = (slopes[0] / temperature)[..., None]
    return slope * (_is_token(logits, tokens) - probabilities), None, None


logprob_and_entropy.defvjp(_logprob_forward, _logprob_backward)


def _is_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == tokens[..., None]


def token_logprobs(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array | float,
    previous: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token given what precedes it in its branch, aligned to the token itself.

    Hidden state t-1 predicts token t, or the one that `previous` names. The logits exist for [B, chunk, V] at a time
    and are computed again in the backward pass, so memory does not grow with T * V. A loss that is a sum over tokens
    needs no second computation: `summed_loss`.

    Args:
      config: The network.
      params: Its parameters (the head is read).
      hidden: [B, T, D], from `apply`.
      tokens: int32 [B, T].
      temperature: Scalar > 0, traced; divides the logits exactly as it divided the sampler's.
      previous: int32 [B, T], column of the token before each one in its branch, -1 where there is none. None where that
        is the column before.
      chunk: Columns whose logits exist at once; None for about `CHUNK_TOKENS` tokens of a device.

    Returns:
      logp and entropy, float32 [B, T], as in `logprob_and_entropy`; 0 where there is no token before: in column 0, and
      where `previous` is -1.

    Raises:
      ValueError: If the shapes disagree.
    """
    one = jax.checkpoint(functools.partial(_logprobs, config), prevent_cse=False)
    head, columns = _head(config, params), _aligned(hidden, tokens, previous)
    parts = _split(columns, chunk or chunk_columns(*tokens.shape))
    _, out = jax.lax.scan(lambda _, part: (None, one(head, part, temperature)), None, parts)
    return _join(out, tokens.shape[1])


def summed_loss(
    fn: SummedLoss,
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array | float,
    batch: Any,
    scalars: Any,
    previous: jax.Array | None = None,
    read: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`fn(logp, entropy, batch, scalars)` of the token log-probabilities, for an `fn` that only sums over tokens.

    A chunk of columns then says by itself what its gradient is, which is computed in the forward pass while its logits
    are at hand: three products with the head instead of the four of `token_logprobs`. Tokens that `fn` does not read,
    such as a prompt's, a tool's and padding, go to the end of their row, and chunks that hold none but these in all B
    rows are skipped. Without a gradient it is `fn(*token_logprobs(...), batch, scalars)`.

    Args:
      fn: (logp, entropy, batch, scalars) -> (loss, metrics), a function without free variables that are traced. The
        loss is a sum over tokens; so are the metrics, but those whose name ends in "_max": maxima, at least 0.
      config: As for `token_logprobs`, like all that is not named here.
      params: The gradient is for the head, and through `hidden` for the rest.
      hidden: [B, T, D].
      tokens: int32 [B, T].
      temperature: No gradient flows to it.
      batch: Pytree of arrays [B, T, ...], cut into the same chunks. No gradient flows to it. With `read`, its columns
        come to `fn` in another order, and numbers of columns in it mean nothing any more.
      scalars: Pytree of what `fn` needs whole. No gradient flows to it.
      previous: int32 [B, T] or None.
      read: bool [B, T], tokens that add anything to the sums and maxima; None for all. `fn` may be given others too,
        and has to leave them out.
      chunk: Columns.

    Returns:
      The loss, float32 [], and the metrics.
    """
    needed = jnp.int32(tokens.shape[1])
    if read is not None:
        if previous is None:
            previous = jnp.broadcast_to(jnp.arange(-1, tokens.shape[1] - 1), tokens.shape)
        order = jnp.argsort(~read, axis=1)  # stable
        tokens, previous, batch = jax.tree.map(lambda x: _reorder(x, order), (tokens, previous, batch))
        needed = read.sum(axis=1).max()
    columns = _aligned(hidden, tokens, previous)
    chunk = chunk or chunk_columns(*tokens.shape)
    return _summed(fn, config, chunk, _head(config, params), columns, needed, temperature, batch, scalars)


def _reorder(x: jax.Array, order: jax.Array) -> jax.Array:
    """The columns of x [B, T, ...] in the order int32 [B, T]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(fn, config, chunk, head, columns, needed, temperature, batch, scalars):
    """Columns from `needed`, int32 [], on add nothing, and where there is a gradient their chunks are skipped."""
    _, out = jax.lax.scan(
        lambda _, part: (None, _logprobs(config, head, part, temperature)), None, _split(columns, chunk)
    )
    return fn(*_join(out, columns.tokens.shape[1]), batch, scalars)


def _summed_forward(fn, config, chunk, head, columns, needed, temperature, batch, scalars):
    def loss(head, hidden, part, batch):
        return fn(*_logprobs(config, head, part._replace(hidden=hidden), temperature), batch, scalars)

    def step(total, xs):
        start, part, batch = xs

        def compute():
            out, (of_head, of_hidden) = jax.value_and_grad(loss, (0, 1), has_aux=True)(head, part.hidden, part, batch)
            return jax.tree.map(jnp.add, total, of_head), (out, of_hidden)

        def skip():
            _, rest = jax.eval_shape(compute)
            return total, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)

        return jax.lax.cond(start < needed, compute, skip)

    parts, examples = _split((columns, batch), chunk)
    starts = chunk * jnp.arange(len(parts.tokens))
    zeros = jax.tree.map(jnp.zeros_like, head)
    of_head, ((losses, metrics), of_hidden) = jax.lax.scan(step, zeros, (starts, parts, examples))
    metrics = {name: x.max(axis=0) if name.endswith("_max") else x.sum(axis=0) for name, x in metrics.items()}
    return (losses.sum(), metrics), (of_head, _join(of_hidden, columns.tokens.shape[1]))


def _summed_backward(fn, config, chunk, kept, slopes):
    slope, _ = slopes
    of_head, of_hidden = jax.tree.map(lambda x: (slope * x).astype(x.dtype), kept)
    return of_head, _Columns(of_hidden, None, None), None, None, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def chunk_columns(rows: int, length: int, parts: int | None = None) -> int:
    """Columns of a chunk whose logits have at most about `CHUNK_TOKENS` tokens on each device; all chunks are as long.

    Args:
      rows: B, on all devices.
      length: T.
      parts: Into how many parts the rows are split; None for what the mesh in use says (`jax.set_mesh`).
    """
    if parts is None:
        mesh = jax.sharding.get_abstract_mesh()
        split = set(mesh.shape) - set(mesh.manual_axes)  # what a shard_map has split is split already
        parts = math.prod(mesh.shape[axis] for axis in ROWS if axis in split)
    longest = max(16, CHUNK_TOKENS // -(-rows // parts))
    return -(-length // -(-length // longest))


class _Columns(NamedTuple):
    """What predicts each token of a row, aligned to the token."""

    hidden: jax.Array  # [B, T, D]
    tokens: jax.Array  # int32 [B, T]
    known: jax.Array  # bool [B, T], false where nothing precedes the token


def _aligned(hidden: jax.Array, tokens: jax.Array, previous: jax.Array | None) -> _Columns:
    if tokens.shape != hidden.shape[:2]:
        raise ValueError(f"tokens must be [B, T] = {hidden.shape[:2]}, not {tokens.shape}")
    if previous is None:
        known = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape)
        return _Columns(jnp.roll(hidden, 1, axis=1), tokens, known)
    if previous.shape != tokens.shape:
        raise ValueError(f"previous must be [B, T] like tokens, not {previous.shape} and {tokens.shape}")
    return _Columns(jnp.take_along_axis(hidden, previous[..., None], axis=1, mode="clip"), tokens, previous >= 0)


def _logprobs(config: ModelConfig, head: Params, columns: _Columns, temperature) -> tuple[jax.Array, jax.Array]:
    logits = unembed(config, head, columns.hidden)
    return jax.tree.map(
        lambda x: jnp.where(columns.known, x, 0.0), logprob_and_entropy(logits, columns.tokens, temperature)
    )


def _head(config: ModelConfig, params: Params) -> Params:
    name = "embed" if config.tied else "head"
    return {name: params[name]}


def _split(tree: Any, chunk: int) -> Any:
    """[B, T, ...] -> [n, B, chunk, ...], with zeros at the end: tokens that nothing precedes."""

    def split(x):
        count = -(-x.shape[1] // chunk)
        x = jnp.pad(x, ((0, 0), (0, count * chunk - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(len(x), count, chunk, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join(tree: Any, length: int) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length], tree)
