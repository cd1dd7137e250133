"""Rotary positions.

Letters: B rows, T tokens, N head width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from elpo_jax.model.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of features, and the factor that scales cosine and sine.

    Args:
      config: The network; its head_dim N, rope_theta and rope_scaling are read.

    Returns:
      float32 numpy [N/2], theta^(-2i/N) stretched as `RopeScaling` says, and the factor, 1 but for yarn.
    """
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    # At position 32k a relative error of 1e-7 turns a pair by some thousandths of a radian too far. So everything is
    # float32 and in this order, as in the implementations that published weights were trained with; only the power,
    # which libraries round differently, is computed in float64 first.
    exponents = (np.arange(0, dim, 2) / dim).astype(np.float32)
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)
    fast = 1 / periods
    if scaling.kind == "none":
        return fast, 1.0
    if scaling.kind == "linear":
        return fast / scaling.factor, 1.0
    context = scaling.original_context
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((context / (2 * math.pi / fast) - low) / (high - low), 0, 1)
        return (1 - kept) * fast / scaling.factor + kept * fast, 1.0

    def pair(turns):
        """Which pair, as a fraction, turns so often within the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0.0
    kept = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return 1 / (scaling.factor * periods) * (1 - kept) + fast * kept, factor


def rotary_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position * frequency, float32 [B, T, N/2] each; `positions` is int32 [B, T]."""
    frequencies, factor = rotary_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


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
