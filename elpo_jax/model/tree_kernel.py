"""Attention over rows of trees as Pallas kernels for TPUs, forward and backward.

The same function as `tree_attention._blockwise`, but a row skips the blocks that it does not see itself, whatever its
neighbours need. A table in scalar memory names, for each block of queries, the blocks of keys that any of them sees;
the grid walks through the table, so a block that is skipped is neither loaded nor multiplied. Its last axis is as long
as the longest line of the table: shorter lines repeat their last entry, which is loaded no second time.

The block is 256 columns. A step multiplies [G * 256, N] with [N, 256]: at G = 4 and N = 128 in bfloat16 that is 67
MFLOP, 0.3 us at the 197 TFLOP/s of a v5e, about what a step of a grid costs by itself, so 128 would wait for the grid;
512 would double what is computed for nothing along the diagonal and where a branch ends. 256 is also the width of the
matrix unit of a v6e, and twice that of older ones. In fast memory a step of the largest kernel holds 0.4 MB of blocks
of q, k, v and the slope, twice for the pipeline, the sums in float32 (0.3 MB), and scores and their gradients, 3 times
G * 256 * 256 * 4 bytes = 3 MB: a third of the 16 MB that a kernel may take by default, at any row length.

What has been run: the interpreter on a CPU, against the portable path, and the lowering to Mosaic. No TPU has run it
yet. On a mesh, call it inside `jax.shard_map` over rows and key/value heads: XLA cannot split a kernel by itself.

Letters: B rows, T tokens, K key/value heads, G query heads of each, N head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elpo_jax.model.tree_attention import MASKED, softmax_reference

BLOCK = 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array, block: int = BLOCK, interpret: bool = False
) -> jax.Array:
    """softmax(q k) v with a float32 softmax; 0 for queries that see no key.

    Args:
      q: [B, K, G, T, N], already divided by sqrt(N).
      k: [B, K, N, T].
      v: [B, K, T, N].
      ends: int32 [B, T], one past the column of each token's last descendant, or of itself; 0 at padding.
      block: Columns of a block; it divides T, and on a TPU is a multiple of 128.
      interpret: Run by the interpreter, on any backend.

    Returns:
      [B, K, G, T, N] in the dtype of `v`.
    """
    return _forward(q, k, v, ends, block, interpret)[0]


def _forward(q, k, v, ends, block, interpret):
    rows, kv_heads, group, tokens, width = q.shape
    seen, counts = _table(_visible(ends, block))
    tile = _tile(group, block, width)
    call = _call(
        _forward_kernel,
        grid=(rows, kv_heads, tokens // block, seen.shape[2]),
        inputs=[tile.query, tile.key, tile.value, tile.ends],
        outputs=[tile.query, tile.number],
        shapes=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)],
        scratch=[(group, block, width), (group, block, 1), (group, block, 1)],
        interpret=interpret,
    )
    out, normaliser = call(seen, counts, q, k, v, ends[:, None])
    return out, (q, k, v, ends, out, normaliser)


def _forward_kernel(seen, counts, q, k, v, ends, out, normaliser, sums, highest, total):
    row, i, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        sums[...], total[...] = jnp.zeros(sums.shape), jnp.zeros(total.shape)
        highest[...] = jnp.full(highest.shape, MASKED)

    @pl.when(n < counts[row, i])
    def _():
        scores = _scores(q[...], k[...], ends[...], i, seen[row, i, n])
        new = jnp.maximum(highest[...], softmax_reference(scores))
        weights, shrink = jnp.exp(scores - new), jnp.exp(highest[...] - new)
        highest[...] = new
        total[...] = total[...] * shrink + weights.sum(axis=-1, keepdims=True)
        sums[...] = sums[...] * shrink + _dot(weights.astype(v.dtype), v[...], 1, 0).reshape(sums.shape)

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        some = highest[...] > MASKED / 2
        divisor = jnp.where(some, total[...], 1.0)
        out[...] = jnp.where(some, sums[...] / divisor, 0.0).astype(out.dtype)
        normaliser[...] = jnp.where(some, highest[...] + jnp.log(divisor), 0.0)[..., 0]


def _backward(block, interpret, kept, slope):
    q, k, v, ends, out, normaliser = kept
    rows, kv_heads, group, tokens, width = q.shape
    inner = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    arrays = q, k, v, ends[:, None], slope, normaliser, inner
    visible = _visible(ends, block)

    def call(kernel, table, by_key, outputs, like, scratch):
        seen, counts = table
        tile = _tile(group, block, width, by_key)
        inputs = [tile.query, tile.key, tile.value, tile.ends, tile.query, tile.number, tile.number]
        return _call(
            kernel,
            grid=(rows, kv_heads, tokens // block, seen.shape[2]),
            inputs=inputs,
            outputs=[getattr(tile, name) for name in outputs],
            shapes=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
            scratch=scratch,
            interpret=interpret,
        )(seen, counts, *arrays)

    (by_q,) = call(_query_kernel, _table(visible), False, ["query"], [q], [(group, block, width)])
    by_k, by_v = call(
        _key_kernel, _table(visible.swapaxes(1, 2)), True, ["key", "value"], [k, v], [(width, block), (block, width)]
    )
    return by_q, by_k, by_v, None


attend_blocks.defvjp(_forward, _backward)


def _query_kernel(seen, counts, q, k, v, ends, slope, normaliser, inner, by_q, sums):
    row, i, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        sums[...] = jnp.zeros(sums.shape)

    @pl.when(n < counts[row, i])
    def _():
        _, by_scores = _slopes(q, k, v, ends, slope, normaliser, inner, i, seen[row, i, n])
        sums[...] += _dot(by_scores.astype(k.dtype), k[...], 1, 1).reshape(sums.shape)

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        by_q[...] = sums[...].astype(by_q.dtype)


def _key_kernel(seen, counts, q, k, v, ends, slope, normaliser, inner, by_k, by_v, sums_k, sums_v):
    row, j, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        sums_k[...], sums_v[...] = jnp.zeros(sums_k.shape), jnp.zeros(sums_v.shape)

    @pl.when(n < counts[row, j])
    def _():
        weights, by_scores = _slopes(q, k, v, ends, slope, normaliser, inner, seen[row, j, n], j)
        sums_k[...] += _dot(q[...], by_scores.astype(q.dtype), 0, 0)
        sums_v[...] += _dot(weights.astype(slope.dtype), slope[...], 0, 0)

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        by_k[...], by_v[...] = sums_k[...].astype(by_k.dtype), sums_v[...].astype(by_v.dtype)


def _slopes(q, k, v, ends, slope, normaliser, inner, i, j):
    """Softmax weights of a block, and the gradient by its scores, float32 [G, block, block] each."""
    weights = jnp.exp(_scores(q[...], k[...], ends[...], i, j) - normaliser[...][..., None])
    by_weights = _dot(slope[...], v[...], 1, 1).reshape(weights.shape)
    return weights, weights * (by_weights - inner[...][..., None])


def _scores(q, k, ends, i, j):
    """float32 [G, block, block] of the i-th block of queries and the j-th of keys, MASKED where not visible."""
    group, block, _ = q.shape
    query = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
    key = j * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
    visible = (key <= query) & (query < ends)  # ends is [1, block], of the keys
    return jnp.where(visible, _dot(q, k, 1, 0).reshape(group, block, block), MASKED)


def _dot(a, b, contract_a: int, contract_b: int):
    """Product of two matrices in float32; heads and queries of [G, block, *] are one axis."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


def _visible(ends, block):
    """bool [B, queries, keys] of blocks: does any query of the one see any key of the other?"""
    blocks = jnp.arange(ends.shape[1] // block)
    last = ends.reshape(ends.shape[0], -1, block).max(axis=2)
    return (blocks <= blocks[:, None]) & (last[:, None] > blocks[:, None] * block)


def _table(visible):
    """For each line of blocks the true ones, first, and how many: int32 [B, blocks, blocks] and [B, blocks]."""
    counts = visible.sum(axis=2, dtype=jnp.int32)
    order = jnp.argsort(~visible, axis=2, stable=True).astype(jnp.int32)
    place = jnp.minimum(jnp.arange(visible.shape[2]), jnp.maximum(counts - 1, 0)[..., None])
    return jnp.take_along_axis(order, place, axis=2), counts


class _tile:
    """Which block of each array a step of the grid (row, head, block, place in the table) works on.

    The third axis counts blocks of queries, and the table names keys; `by_key`, the other way round.
    """

    def __init__(self, group: int, block: int, width: int, by_key: bool = False):
        def spec(shape, axis, query, heads=True):
            def index(row, head, own, n, seen, counts):
                at = own if query != by_key else seen[row, own, n]
                where = [row, head, *[0] * (len(shape) - 2)] if heads else [row, *[0] * (len(shape) - 1)]
                where[axis] = at
                return tuple(where)

            return pl.BlockSpec(shape, index)

        self.query = spec((None, None, group, block, width), 3, query=True)
        self.number = spec((None, None, group, block), 3, query=True)
        self.key = spec((None, None, width, block), 3, query=False)
        self.value = spec((None, None, block, width), 2, query=False)
        self.ends = spec((None, 1, block), 2, query=False, heads=False)


def _call(kernel, grid, inputs, outputs, shapes, scratch, interpret):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        interpret=interpret,
    )
