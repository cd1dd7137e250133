"""The key/value cache: rows of blocks of columns, written in place, and the attention that reads them.

A row holds one sequence, or what follows a prefix that several rows share: the rows of a group have one trunk, which
holds the prefix, and each begins at its own `base`, the number of trunk tokens that are its own first tokens. The
queries of a group meet the trunk's keys in one product, and a softmax over trunk and row is merged from its parts (as
in Hydragen, arXiv 2402.05099). Blocks that no query looks into are skipped while running, so a short sequence in a long
cache costs what a short cache would. Keys lie as [B, K, N, C] and values as [B, K, C, N], the orders in which one
decoded token's two products read memory contiguously; only this module knows that.
Parked rows hold whole sequences that no query looks into: those of attempts that wait while others use their rows.
Letters: B rows, G trunks, P parked rows, R rows of a call, T tokens, H query heads, K key/value heads, N head width, C
block columns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.tree_attention import MASKED, softmax_reference

STAGED_BYTES = 2**28  # of copies that a fork has read and not yet written
_FLOOR = -1e29  # above MASKED: a query that sees nothing of a part gives every column there the weight exp(-9e29) = 0


Blocks = tuple[jax.Array, ...]


class Rows(NamedTuple):
    """Keys and values of one layer, in the compute dtype, block after block."""

    k: Blocks  # of [B, K, N, C]
    v: Blocks  # of [B, K, C, N]


_NONE = Rows((), ())


class LayerCache(NamedTuple):
    """The rows of one layer, and the trunks of their groups, rows i * B/G to (i + 1) * B/G sharing trunk i."""

    own: Rows
    trunk: Rows | None


Cache = tuple[LayerCache, ...]
Parked = tuple[Rows, ...]  # a layer each


class Where(NamedTuple):
    """Where the tokens of a call lie.

    Attributes:
      columns: int32 [R, T], each token's column in its row; -1 for padding.
      base: int32 [R], leading tokens of each row's sequence that its trunk holds; None without trunks.
      rows: int32 [R], each row's index, B or more for padding; None where the call has all rows, in order.
    """

    columns: jax.Array
    base: jax.Array | None
    rows: jax.Array | None


def locate(positions: jax.Array, base: jax.Array | None = None, rows: jax.Array | None = None) -> Where:
    """Where tokens at `positions` (int32 [R, T], -1 for padding) lie in rows whose trunks hold `base` tokens each."""
    columns = positions if base is None else jnp.where(positions >= 0, positions - base[:, None], -1)
    return Where(columns, base, rows)


def block_lengths(length: int, first: int) -> tuple[int, ...]:
    """Columns of each block: `first`, then as many as all before together; the last takes what would be too short."""
    edges = [0]
    edge = first
    while 3 * edge <= 2 * length:
        edges.append(edge)
        edge *= 2
    return tuple(end - start for start, end in zip(edges, [*edges[1:], length], strict=True))


def new_cache(config: ModelConfig, rows: int, length: int, groups: int = 0, block: int = 128) -> Cache:
    """An empty cache, one entry per layer.

    Args:
      config: The network.
      rows: B, sequences.
      length: Columns of a row, and of a trunk.
      groups: G, trunks; must divide the rows. 0 for a cache without.
      block: Columns of the first block (see `block_lengths`).
    """
    if rows < 1 or length < 1:
        raise ValueError(f"a cache needs at least one row and one position, not rows={rows}, length={length}")
    if groups and rows % groups:
        raise ValueError(f"{rows} rows cannot be divided into {groups} groups of the same size")

    own = _empty(config, rows, length, block)
    trunks = _empty(config, groups, length, block) if groups else (None,) * config.layers
    return tuple(map(LayerCache, own, trunks))


def new_parked(config: ModelConfig, rows: int, length: int, block: int = 128) -> Parked:
    """Empty parked rows of a cache whose rows have `length` columns, the first `block` of them in the first block."""
    return _empty(config, rows, length, block)


def _empty(config: ModelConfig, rows: int, length: int, block: int) -> tuple[Rows, ...]:
    """Zeros, a layer each."""
    shape, sizes = (rows, config.kv_heads), block_lengths(length, block)

    def layer() -> Rows:
        return Rows(
            tuple(jnp.zeros((*shape, config.head_dim, size), config.dtype) for size in sizes),
            tuple(jnp.zeros((*shape, size, config.head_dim), config.dtype) for size in sizes),
        )

    return tuple(layer() for _ in range(config.layers))


def cache_rows(cache: Cache) -> int:
    """B."""
    return cache[0].own.k[0].shape[0]


def write(own: Rows, k: jax.Array, v: jax.Array, where: Where) -> Rows:
    """Stores each token's key and value in its column.

    Args:
      own: The rows of one layer.
      k: [R, T, K, N], rotated.
      v: [R, T, K, N].
      where: Tokens at column -1 (or beyond the last) are not written.

    Returns:
      The rows, updated in place wherever the caller lets XLA reuse the buffer (donation, a loop carry).
    """
    k, v = k.astype(own.k[0].dtype), v.astype(own.v[0].dtype)
    keys, values, start = [], [], 0
    for k_block, v_block in zip(own.k, own.v, strict=True):
        size = k_block.shape[3]
        inside = where.columns - start
        # A negative index would count from the end; one past the end is dropped.
        columns = jnp.where(inside >= 0, inside, size)
        if where.rows is None:
            # vmap keeps the row a batch dimension of the scatter, so rows sharded over a mesh stay on their device.
            def row(k_row, v_row, k_new, v_new, column):
                k_row = k_row.at[:, :, column].set(jnp.moveaxis(k_new, 0, -1), mode="drop")
                v_row = v_row.at[:, column, :].set(jnp.moveaxis(v_new, 0, 1), mode="drop")
                return k_row, v_row

            k_block, v_block = jax.vmap(row)(k_block, v_block, k, v, columns)
        else:
            k_block = k_block.at[where.rows[:, None], :, :, columns].set(k, mode="drop")
            v_block = v_block.at[where.rows[:, None], :, columns].set(v, mode="drop")
        keys.append(k_block)
        values.append(v_block)
        start += size
    return Rows(tuple(keys), tuple(values))


def attend(layer: LayerCache, q: jax.Array, where: Where) -> jax.Array:
    """Grouped-query softmax attention over what precedes each token in its trunk and its row, itself included.

    Args:
      layer: With the tokens' own keys and values written.
      q: [R, T, H, N], rotated.
      where: Of the tokens. One at column -1 sees nothing of its row; its output is finite.

    Returns:
      [R, T, H, N] in the dtype of the cache; the softmax is float32.
    """
    rows, tokens, heads, width = q.shape
    kv_heads = layer.own.k[0].shape[1]
    # One matrix [T * H/K, N] per row and key/value head: with further axes XLA's CPU backend is ten times slower.
    q = (q * width**-0.5).reshape(rows, tokens, kv_heads, -1, width).swapaxes(1, 2).reshape(rows, kv_heads, -1, width)
    last = jnp.repeat(where.columns, heads // kv_heads, axis=1)  # int32 [R, T * H/K], of the columns that q sees
    part = _look(q, layer.own, where.rows, last)
    if layer.trunk is not None:
        base = jnp.repeat(where.base[:, None] - 1, last.shape[1], axis=1)
        groups = layer.trunk.k[0].shape[0]
        size = layer.own.k[0].shape[0] // groups

        def trunk(part):
            if where.rows is None:
                together = _look(_group(q, size), layer.trunk, None, base.reshape(groups, -1))
                return _merge(part, _ungroup(together, size))
            return _merge(part, _look(q, layer.trunk, where.rows // size, base))

        part = jax.lax.cond(jnp.max(where.base) > 0, trunk, lambda part: part, part)
    # The floor is for padding, which sees nothing.
    out = (part.out / jnp.maximum(part.total, jnp.finfo(jnp.float32).tiny)).astype(layer.own.v[0].dtype)
    return out.reshape(rows, kv_heads, tokens, -1, width).swapaxes(1, 2).reshape(rows, tokens, heads, width)


class _Part(NamedTuple):
    """Softmax attention over some columns, not yet divided by its sum; all float32."""

    out: jax.Array  # [R, K, M, N]
    largest: jax.Array  # [R, K, M, 1], the `softmax_reference` of the scores
    total: jax.Array  # [R, K, M, 1], of the weights relative to it


def _look(q: jax.Array, held: Rows, rows: jax.Array | None, last: jax.Array) -> _Part:
    """Queries [R, K, M, N] meet the columns 0..last, int32 [R, M], of their rows, block by block."""
    part, start = None, 0
    for k_block, v_block in zip(held.k, held.v, strict=True):
        size = k_block.shape[3]

        def block(part, k_block=k_block, v_block=v_block, start=start, size=size):
            if rows is not None:
                k_block, v_block = (jnp.take(x, rows, axis=0, mode="clip") for x in (k_block, v_block))
            scores = jnp.einsum("RKMN,RKNC->RKMC", q, k_block).astype(jnp.float32)
            seen = start + jnp.arange(size) <= last[:, None, :, None]
            scores = jnp.where(seen, scores, MASKED)
            largest = jnp.maximum(softmax_reference(scores), _FLOOR)
            weights = jnp.exp(scores - largest)
            out = jnp.einsum("RKMC,RKCN->RKMN", weights.astype(v_block.dtype), v_block)
            found = _Part(out.astype(jnp.float32), largest, weights.sum(axis=-1, keepdims=True))
            return found if part is None else _merge(part, found)

        # What a skipped block would have added is exactly 0, so no row depends on how long the others are.
        part = jax.lax.cond(jnp.max(last) >= start, block, lambda part: part, part) if start else block(None)
        start += size
    return part


def _merge(one: _Part, other: _Part) -> _Part:
    """The attention over the columns of both."""
    largest = jnp.maximum(one.largest, other.largest)
    mine, theirs = jnp.exp(one.largest - largest), jnp.exp(other.largest - largest)
    return _Part(one.out * mine + other.out * theirs, largest, one.total * mine + other.total * theirs)


def _group(x: jax.Array, size: int) -> jax.Array:
    """[G * size, K, M, n] -> [G, K, size * M, n], the queries of a group side by side."""
    _, heads, queries, width = x.shape
    return x.reshape(-1, size, heads, queries, width).swapaxes(1, 2).reshape(-1, heads, size * queries, width)


def _ungroup(part: _Part, size: int) -> _Part:
    def back(x):
        groups, heads, _, width = x.shape
        return x.reshape(groups, heads, size, -1, width).swapaxes(1, 2).reshape(groups * size, heads, -1, width)

    return _Part(*map(back, part))


def fork(
    cache: Cache,
    parked: Parked | None,
    source: jax.Array,
    source_base: jax.Array,
    target: jax.Array,
    target_base: jax.Array,
    shard: jax.Array | int = 0,
    shards: int = 1,
    exchange: Callable[[jax.Array], jax.Array] = lambda row: row,
) -> tuple[Cache, Parked | None]:
    """Copies sequences between rows, trunks and parked rows: a branch starts without a prefill, an attempt makes room.

    Rows are numbered 0..B-1, trunks from B on and parked rows from B + G on, over all shards. Trunks and parked rows
    hold their sequences whole, rows only what follows the tokens of their trunk.

    Args:
      cache: The cache, or what a shard has of it.
      parked: Its parked rows, or what a shard has of them; None where there are none.
      source: int32 [n], rows or parked rows to read; all are read before any is written.
      source_base: int32 [n], tokens of its trunk that precede what a source row holds; 0 for a parked row.
      target: int32 [n], what to overwrite, each at most once; any other number makes it a no-op.
      target_base: int32 [n], tokens of the sequence that a target row need not hold, since its trunk does.
      shard: Number of this shard.
      shards: Number of all.
      exchange: Adds up over the shards what each has read of a sequence that goes from one to another, 0 but for one.

    Returns:
      The cache and the parked rows, in which each target holds what its source and the trunk before it held.
    """
    parked = parked or (_NONE,) * len(cache)
    layers = [_Layer(layer.own, layer.trunk or _NONE, held) for layer, held in zip(cache, parked, strict=True)]
    numbers = _Numbers(tuple(len(rows.k[0]) if rows.k else 0 for rows in layers[0]), shard, shards)
    # All is read before any is written, of as many layers at once as keep what lies between small.
    row = sum(x.nbytes // len(x) for x in (*cache[0].own.k, *cache[0].own.v))
    together = layers_at_once(len(target), row)
    copied, count = [], jnp.max(jnp.where(target >= 0, jnp.arange(len(target)) + 1, 0))
    for first in range(0, len(layers), together):
        some = layers[first : first + together]
        done, count = _copy(some, numbers, count, source, source_base, target, target_base, exchange)
        copied += done
    own, trunks, parked = zip(*copied, strict=True)
    _, groups, spares = numbers.counts
    cache = tuple(LayerCache(x, y if groups else None) for x, y in zip(own, trunks, strict=True))
    return cache, parked if spares else None


def layers_at_once(copies: int, row: int) -> int:
    """Layers that a fork of that many copies reads before it writes, if a row of one layer has `row` bytes."""
    return max(1, STAGED_BYTES // (copies * row))


class _Layer(NamedTuple):
    """All that a shard holds of one layer, in the order in which it is numbered; `_NONE` for what there is not."""

    own: Rows
    trunk: Rows
    parked: Rows


class _Numbers(NamedTuple):
    """The numbers of rows, trunks and parked rows over all shards: of one kind after the other, shard after shard."""

    counts: tuple[int, ...]  # rows, trunks and parked rows of a shard
    shard: jax.Array | int
    shards: int

    def local(self, number: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Whether it is one of the shard's rows, trunks or parked rows, and which one it is."""
        starts = [self.shards * sum(self.counts[:i]) + self.shard * n for i, n in enumerate(self.counts)]
        inside = [number - start for start in starts]
        return [((x >= 0) & (x < n), jnp.clip(x, 0, max(n - 1, 0))) for x, n in zip(inside, self.counts, strict=True)]

    def home(self, number: jax.Array) -> jax.Array:
        """The shard that has it."""
        ends = [self.shards * sum(self.counts[: i + 1]) for i in range(len(self.counts))]
        found = [(number - end) // max(n, 1) + self.shards for end, n in zip(ends, self.counts, strict=True)]
        return jnp.select([number < end for end in ends], found, -1)


def _copy(
    layers: list[_Layer],
    numbers: _Numbers,
    count: jax.Array,
    source: jax.Array,
    source_base: jax.Array,
    target: jax.Array,
    target_base: jax.Array,
    exchange: Callable[[jax.Array], jax.Array],
) -> tuple[list[_Layer], jax.Array]:
    """`fork` of some layers: the first `count` copies. Also says how many were written, which is as many.

    Who goes on with that number waits for the writes; with another one XLA would stage all layers at once.
    """

    def read(i: jax.Array) -> jax.Array:
        found = _read(layers, numbers, source[i], source_base[i])
        if numbers.shards == 1:
            return found
        crosses = numbers.home(source[i]) != numbers.home(target[i])
        return jax.lax.cond(crosses, lambda: exchange(found), lambda: found)

    # One sequence after the other, in place: the cost is that of the copies there are, not of those there may be.
    shape = jax.eval_shape(functools.partial(_read, layers, numbers), count, count)
    # Filled with anything that depends on the count: zeros would be made, and kept, for all layers at the start.
    staged = jnp.full((len(target), *shape.shape), count.astype(shape.dtype))
    staged = jax.lax.fori_loop(0, count, lambda i, staged: staged.at[i].set(read(i)), staged)

    def write(i: jax.Array, state: tuple[list[_Layer], jax.Array]) -> tuple[list[_Layer], jax.Array]:
        layers, written = state
        return _write(layers, numbers, target[i], target_base[i], staged[i]), written + 1

    return jax.lax.fori_loop(0, count, write, (layers, jnp.zeros_like(count)))


def _read(layers: list[_Layer], numbers: _Numbers, source: jax.Array, base: jax.Array) -> jax.Array:
    """A sequence as a row, behind `base` tokens of its trunk, or a parked row holds it; 0 if the shard has it not.

    It is whole, [2 L, K, N * C], the keys and the values of every layer.
    """
    (in_row, row), _, (waits, aside) = numbers.local(source)
    rows, groups, spares = numbers.counts

    def stack(found: list[jax.Array]) -> jax.Array:
        return jnp.stack([x.reshape(x.shape[0], -1) for x in found])

    def of_row():
        def whole(axis, own, trunk):
            behind = _whole(own, row, axis)

            def after_trunk():
                before = _whole(trunk, row // (rows // groups), axis)
                place = jnp.expand_dims(jnp.arange(behind.shape[axis]), tuple(range(1, 3 - axis)))
                return jnp.where(place < base, before, jnp.roll(behind, base, axis))

            return jax.lax.cond(base > 0, after_trunk, lambda: behind) if trunk else behind

        return stack([x for own, trunk, _ in layers for x in (whole(2, own.k, trunk.k), whole(1, own.v, trunk.v))])

    def of_parked():
        return stack([x for _, _, held in layers for x in (_whole(held.k, aside, 2), _whole(held.v, aside, 1))])

    shape = jax.eval_shape(of_row)
    ways = [lambda: jnp.zeros(shape.shape, shape.dtype), of_row, *([of_parked] if spares else [])]
    return jax.lax.switch(in_row + 2 * waits, ways)


def _write(
    layers: list[_Layer], numbers: _Numbers, target: jax.Array, base: jax.Array, sequence: jax.Array
) -> list[_Layer]:
    """Puts a sequence, as `_read` gives it, where it belongs: whole, or in a row without its first `base` tokens."""
    _, kv_heads, width, _ = layers[0].own.k[0].shape
    sequence = sequence.reshape(len(layers), 2, kv_heads, -1)

    def put(blocks: Blocks, index: jax.Array, new: jax.Array, axis: int, begin: jax.Array | int) -> Blocks:
        new = new.reshape(kv_heads, *((width, -1) if axis == 2 else (-1, width)))
        if groups:
            new = jax.lax.cond(begin > 0, lambda: jnp.roll(new, -begin, axis), lambda: new)
        ends = [sum(x.shape[axis + 1] for x in blocks[: n + 1]) for n in range(len(blocks) - 1)]
        return tuple(x.at[index].set(part) for x, part in zip(blocks, jnp.split(new, ends, axis), strict=True))

    _, groups, _ = numbers.counts
    kinds = []
    for kind, (hit, index), begin in zip(zip(*layers, strict=True), numbers.local(target), (base, 0, 0), strict=True):

        def once(_, kind, index=index, begin=begin):
            return [
                Rows(put(rows.k, index, k, 2, begin), put(rows.v, index, v, 1, begin))
                for rows, (k, v) in zip(kind, sequence, strict=True)
            ]

        # A loop of no or one pass, not a condition, which would copy all there is.
        kinds.append(jax.lax.fori_loop(0, hit.astype(jnp.int32), once, list(kind)) if kind[0].k else kind)
    return [_Layer(*rows) for rows in zip(*kinds, strict=True)]


def _whole(blocks: Blocks, row: jax.Array, axis: int) -> jax.Array:
    """All columns of a row, [K, N, C] or [K, C, N]."""
    return jnp.concatenate([x[row] for x in blocks], axis)
