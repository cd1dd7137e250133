"""The key/value cache: one row per slot, one column per position, written in place.

Keys lie as [B, K, N, S] and values as [B, K, S, N], the orders in which one decoded token's two products read
memory contiguously. Only this module and the attention product know that. Letters: B rows, K key/value heads,
N head width, S cache length, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from elpo_jax.model.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer, in the compute dtype."""

    k: jax.Array  # [B, K, N, S]
    v: jax.Array  # [B, K, S, N]


Cache = tuple[LayerCache, ...]


def new_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    """An empty cache of `rows` slots for positions 0..length-1, one entry per layer."""
    if rows < 1 or length < 1:
        raise ValueError(f"a cache needs at least one row and one position, not rows={rows}, length={length}")
    k_shape = (rows, config.kv_heads, config.head_dim, length)
    v_shape = (rows, config.kv_heads, length, config.head_dim)
    return tuple(
        LayerCache(jnp.zeros(k_shape, config.dtype), jnp.zeros(v_shape, config.dtype)) for _ in range(config.layers)
    )


def cache_length(cache: Cache) -> int:
    """S, the number of positions that a row can hold."""
    return cache[0].v.shape[2]


def write(layer: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Stores each token's key and value in the column of its position.

    Args:
      layer: Cache of one layer.
      k: [B, T, K, N], rotated.
      v: [B, T, K, N].
      positions: int32 [B, T]; tokens at -1 (or beyond S) are not written.

    Returns:
      The cache, updated in place wherever the caller lets XLA reuse the buffer (donation, a loop carry).
    """
    length = layer.v.shape[2]
    # A negative index would count from the end; one past the end is dropped.
    slots = jnp.where(positions >= 0, positions, length)

    # vmap keeps the row a batch dimension of the scatter, so rows sharded over a mesh stay on their device.
    def row(k_row, v_row, k_new, v_new, slot):
        k_row = k_row.at[:, :, slot].set(jnp.moveaxis(k_new, 0, -1), mode="drop")
        v_row = v_row.at[:, slot, :].set(jnp.moveaxis(v_new, 0, 1), mode="drop")
        return k_row, v_row

    return LayerCache(*jax.vmap(row)(layer.k, layer.v, k.astype(layer.k.dtype), v.astype(layer.v.dtype), slots))


def fork(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """Copies whole rows of the cache, so that a branch starts without a prefill.

    Args:
      cache: The cache.
      source: int32 [n], rows to read; all are read before any is written.
      target: int32 [n], rows to overwrite, each at most once; one outside 0..B-1 makes its pair a no-op.

    Returns:
      The cache with row target[i] equal to the former row source[i].
    """
    rows = cache[0].k.shape[0]
    target = jnp.where(target >= 0, target, rows)
    return jax.tree.map(lambda x: x.at[target].set(x[source], mode="drop"), cache)
