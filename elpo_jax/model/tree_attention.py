"""Attention over rows of trees in depth-first order, without scores that outlive the call.

In that order a token's descendants follow it without a gap, so one integer per key is the whole mask: the query in
column q sees the key in column k iff k <= q < ends[k]. A packed chain is a tree without branches, a row of one sequence
has ends = T, and a key with ends = 0 (padding) is seen by none.

Scores exist for one block of queries and one of keys at a time. Blocks of which no query sees any key are skipped: in a
tree of many branches these are most. The backward pass keeps q, k, v, the output and one number per query (the
logarithm of its softmax denominator), and computes the scores again.

Letters: B rows, T tokens, H query heads, K key/value heads, G = H/K, N head width, M = T * G.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from elpo_jax.model.config import ROWS

# Not -inf: a query that may attend to nothing (padding) then gets a uniform average, which is finite, and so is its
# gradient.
MASKED = -1e30

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_cut = jax.lax.dynamic_slice_in_dim
_put = jax.lax.dynamic_update_slice_in_dim


def attend(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array, implementation: str = "blocks") -> jax.Array:
    """Grouped-query softmax attention of every token to its ancestors and itself; the softmax is float32.

    - "blocks", the default: plain XLA, for every backend and mesh; a block is skipped where no row of the batch needs
      it. Run and measured on CPUs.
    - "pallas": the kernels of `tree_kernel`, for a TPU; each row skips for itself. On other backends the interpreter
      runs them. Each device of the mesh in use (`jax.set_mesh`, or a `shard_map` around the call) runs them on its own
      rows and heads. No TPU has run them yet.
    - "cudnn": `jax.nn.dot_product_attention`, for GPUs, with the mask written out: B * T * T elements, and no block is
      skipped but those above the diagonal, so for short rows. It takes bfloat16 only. No GPU has run it here yet.

    Args:
      q: [B, T, H, N].
      k: [B, K, N, T].
      v: [B, K, T, N].
      ends: int32 [B, T], one past the column of each token's last descendant, or of itself; 0 at padding.
      implementation: See above.

    Returns:
      [B, T, H, N] in the dtype of `v`; 0 for queries that see no key, but what nobody should read with "cudnn".
    """
    match implementation:
        case "blocks":
            return _by_blocks(q, k, v, ends)
        case "pallas":
            return _by_kernel(q, k, v, ends)
    return _by_library(q, k, v, ends, implementation)


def block_length(tokens: int) -> int:
    """Queries, and keys, of a block, in rows of that many tokens.

    Small blocks compute less of what nobody sees, which trees have much of; large ones cost less each. Rows of up to
    512 tokens hold chains more than trees, and where rows are very long, blocks are too many.
    """
    longest = 64 if 512 < tokens <= 8192 else 128
    return -(-tokens // -(-tokens // longest))


def _by_blocks(q, k, v, ends):
    rows, tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    block = block_length(tokens)
    count = -(-tokens // block)
    padding = (0, count * block - tokens)
    # One matrix [T * G, N] per row and key/value head: with further axes XLA's CPU backend is ten times slower.
    q = (q * width**-0.5).reshape(rows, tokens, kv_heads, group, width).swapaxes(1, 2)
    q = jnp.pad(q, ((0, 0), (0, 0), padding, (0, 0), (0, 0))).reshape(rows, kv_heads, -1, width)
    k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), padding))
    v = jnp.pad(v, ((0, 0), (0, 0), padding, (0, 0)))
    out = _blockwise(q, k, v, jnp.pad(ends, ((0, 0), padding)), block)
    out = out.reshape(rows, kv_heads, count * block, group, width)[:, :, :tokens]
    return out.swapaxes(1, 2).reshape(rows, tokens, heads, width)


def _by_kernel(q, k, v, ends):
    from elpo_jax.model import tree_kernel  # Pallas takes a second to import, and most runs do without it

    rows, tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    padding = (0, -tokens % tree_kernel.BLOCK)
    q = jnp.pad((q * width**-0.5).swapaxes(1, 2), ((0, 0), (0, 0), padding, (0, 0)))
    k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), padding))
    v = jnp.pad(v, ((0, 0), (0, 0), padding, (0, 0)))
    q = q.reshape(rows, kv_heads, heads // kv_heads, -1, width)
    interpret = jax.default_backend() != "tpu"
    kernel = functools.partial(tree_kernel.attend_blocks, block=tree_kernel.BLOCK, interpret=interpret)
    out = _on_each_device(kernel, q, k, v, jnp.pad(ends, ((0, 0), padding)))
    return out.reshape(rows, heads, -1, width)[:, :, :tokens].swapaxes(1, 2)


def _on_each_device(kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
    """Each device attends to its own rows and key/value heads, the first two axes: XLA cannot split a kernel.

    What a `shard_map` around this has split is split already; axes that do not divide the arrays are not used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if not axes:
        return kernel(q, k, v, ends)
    rows = tuple(axis for axis in ROWS if axis in axes)
    rows = rows if len(q) % math.prod(mesh.shape[axis] for axis in rows) == 0 else ()
    heads = "tensor" if "tensor" in axes and k.shape[1] % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(rows, heads)
    specs = (split, split, split, PartitionSpec(rows))
    return jax.shard_map(kernel, in_specs=specs, out_specs=split, axis_names=axes, check_vma=False)(q, k, v, ends)


def _by_library(q, k, v, ends, implementation):
    columns = jnp.arange(q.shape[1])
    mask = (columns <= columns[:, None]) & (columns[:, None] < ends[:, None])  # [B, query, key]
    keys, values = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
    return jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None], implementation=implementation)


def softmax_reference(scores: jax.Array) -> jax.Array:
    """What a softmax over the last axis subtracts from its scores: the least multiple of log 2 above all of them.

    References of other blocks differ from it by multiples of log 2, so weights differ by powers of two, which rounding
    to bfloat16 does not see: an output hardly depends on where its keys were cut into blocks, and the sampler, whose
    blocks are others than the trainer's, agrees with it.

    Args:
      scores: float32 [..., S].

    Returns:
      float32 [..., 1], up to rounding.
    """
    return jnp.ceil(scores.max(axis=-1, keepdims=True) / math.log(2)) * math.log(2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array, block: int) -> jax.Array:
    """softmax(q k) v, [B, K, M, N], of q [B, K, M, N], k [B, K, N, T] and v [B, K, T, N]; the block divides T."""
    return _forward(q, k, v, ends, block)[0]


def _forward(q, k, v, ends, block):
    pairs, needed = _visible_blocks(ends, block)
    size = block * (q.shape[2] // ends.shape[1])

    def body(n, state):
        at, key = pairs[n] * jnp.array([size, block])
        scores = _scores(q, k, ends, *pairs[n], block)
        out, highest, total = (_cut(x, at, size, 2) for x in state)
        new = jnp.maximum(highest, softmax_reference(scores))
        weights, shrink = jnp.exp(scores - new), jnp.exp(highest - new)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        out = out * shrink + _dot("BKMS,BKSN->BKMN", weights.astype(v.dtype), _cut(v, key, block, 2))
        return tuple(_put(x, part, at, 2) for x, part in zip(state, (out, new, total), strict=True))

    column = (*q.shape[:3], 1)
    state = jnp.zeros(q.shape, jnp.float32), jnp.full(column, MASKED, jnp.float32), jnp.zeros(column, jnp.float32)
    out, highest, total = jax.lax.fori_loop(0, needed, body, state)
    # A query that has seen nothing holds an average over masked keys, or nothing at all.
    seen = highest > MASKED / 2
    out = jnp.where(seen, out / jnp.where(seen, total, 1.0), 0.0).astype(v.dtype)
    normaliser = jnp.where(seen, highest + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
    return out, (q, k, v, ends, out, normaliser)


def _backward(block, kept, slope):
    q, k, v, ends, out, normaliser = kept
    pairs, needed = _visible_blocks(ends, block)
    size = block * (q.shape[2] // ends.shape[1])
    inner = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def body(n, state):
        at, key = pairs[n] * jnp.array([size, block])
        mine, my_slope, my_normaliser, my_inner = (_cut(x, at, size, 2) for x in (q, slope, normaliser, inner))
        weights = jnp.exp(_scores(q, k, ends, *pairs[n], block) - my_normaliser)
        by_weights = _dot("BKMN,BKSN->BKMS", my_slope, _cut(v, key, block, 2))
        by_scores = (weights * (by_weights - my_inner)).astype(q.dtype)
        parts = (
            (_dot("BKMS,BKNS->BKMN", by_scores, _cut(k, key, block, 3)), at, 2),
            # Both as [N, S]: for [S, N], XLA's CPU backend would transpose the weights, which takes thrice as long.
            (_dot("BKMN,BKMS->BKNS", mine, by_scores), key, 3),
            (_dot("BKMN,BKMS->BKNS", my_slope, weights.astype(slope.dtype)), key, 3),
        )
        return tuple(
            _put(x, _cut(x, start, part.shape[axis], axis) + part, start, axis)
            for x, (part, start, axis) in zip(state, parts, strict=True)
        )

    by_q, by_k, by_v = jax.lax.fori_loop(0, needed, body, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, k)))
    return by_q.astype(q.dtype), by_k.astype(k.dtype), by_v.swapaxes(2, 3).astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def _visible_blocks(ends: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """(block of queries, block of keys) of all pairs on or below the diagonal, those that any row needs first.

    Returns:
      int32 [pairs, 2], and how many of them are needed, int32.
    """
    count = ends.shape[1] // block
    pairs = jnp.stack(jnp.tril_indices(count), axis=1).astype(jnp.int32)
    last = ends.reshape(-1, count, block).max(axis=(0, 2))  # [count], one past the last query that sees any key
    needed = last[pairs[:, 1]] > pairs[:, 0] * block
    return pairs[jnp.flatnonzero(needed, size=len(pairs))], needed.sum()


def _scores(q, k, ends, i, j, block):
    """float32 [B, K, block * G, block] of the i-th block of queries and the j-th of keys, MASKED where not visible."""
    rows, kv_heads = k.shape[:2]
    size = block * (q.shape[2] // ends.shape[1])
    scores = _dot("BKMN,BKNS->BKMS", _cut(q, i * size, size, 2), _cut(k, j * block, block, 3))
    query, key = (x * block + jnp.arange(block) for x in (i, j))
    visible = (key <= query[:, None]) & (query[:, None] < _cut(ends, j * block, block, 1)[:, None])  # [B, query, key]
    scores = scores.reshape(rows, kv_heads, block, -1, block)
    return jnp.where(visible[:, None, :, None], scores, MASKED).reshape(rows, kv_heads, size, block)
