"""Rotary positions, attention masks and the grouped-query attention product, as pure functions.

Letters: B rows, T tokens, H query heads, K key/value heads, G = H/K, N head width, S keys.
"""

import jax
import jax.numpy as jnp

# Not -inf: a query that may attend to nothing (padding) then gets a uniform average, which is finite, and so is its
# gradient.
MASKED = -1e30


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position * theta^(-2i/N), float32 [B, T, N/2] each; `positions` is int32 [B, T]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates feature i with feature i + N/2 (the half-split pairing of the Hugging Face Qwen and Llama weights).

    Args:
      x: [B, T, heads, N].
      angles: From `rotary_angles`.

    Returns:
      [B, T, heads, N] in the dtype of `x`; the arithmetic is float32.
    """
    cos, sin = (angle[:, :, None, :] for angle in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def training_mask(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Which token may attend to which: itself and earlier ones of its own segment, never padding.

    Args:
      positions: int32 [B, T], -1 at padding.
      segments: int32 [B, T], equal within one packed sequence; None where each row is one sequence.

    Returns:
      bool [B, T, T], true where query i (axis 1) sees key j (axis 2).
    """
    length = positions.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool)) & (positions >= 0)[:, None, :]
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    return mask


def cache_mask(positions: jax.Array, length: int) -> jax.Array:
    """bool [B, T, S]: a query at position p sees the cached positions 0..p, and one at -1 sees none."""
    return jnp.arange(length) <= positions[:, :, None]


def attend_causal(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` where no query may look past its own index (T = S): almost half of the products need not be made.

    A block of queries only meets the keys up to its own end. At most eight blocks: each is compiled by itself.
    """
    tokens = q.shape[1]
    block = max(64, -(-tokens // 8))
    ends = [min(start + block, tokens) for start in range(0, tokens, block)]
    parts = [
        attend(q[:, start:end], k[..., :end], v[:, :, :end], mask[:, start:end, :end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return jnp.concatenate(parts, axis=1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query softmax attention, softmax(q k / sqrt(N)) v with a float32 softmax.

    Args:
      q: [B, T, H, N].
      k: [B, K, N, S].
      v: [B, K, S, N].
      mask: bool [B, T, S], true where the query may look.

    Returns:
      [B, T, H, N] in the dtype of `v`.
    """
    rows, tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # One matrix [T * G, N] per row and key/value head: with further axes XLA's CPU backend is ten times slower.
    q = (q * width**-0.5).reshape(rows, tokens, kv_heads, group, width).swapaxes(1, 2)
    scores = jnp.einsum("BKMN,BKNS->BKMS", q.reshape(rows, kv_heads, tokens * group, width), k)
    scores = scores.astype(jnp.float32).reshape(rows, kv_heads, tokens, group, -1)
    scores = jnp.where(mask[:, None, :, None], scores, MASKED)
    # Divided by their sum after the product with v, not before: the gradient then needs no sum over S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(rows, kv_heads, tokens * group, 1)
    weights = weights.astype(v.dtype).reshape(rows, kv_heads, tokens * group, -1)
    out = (jnp.einsum("BKMS,BKSN->BKMN", weights, v) / total).astype(v.dtype)
    return out.reshape(rows, kv_heads, tokens, group, width).swapaxes(1, 2).reshape(rows, tokens, heads, width)
