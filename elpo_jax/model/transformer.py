"""The policy network: one decoder-only transformer that trains, prefills and decodes through the same function.

`init` and `apply` work on a plain nested dict of parameters: embed [V, D]; layers_i/{attn_norm, attn/{q, k, v, o},
mlp_norm, mlp/{gate, up, down}}; final_norm; head [D, V] where untied. Every matrix is [in, out], so a Hugging Face
weight is its transpose.
Letters: B rows, T tokens, D model width, H heads, K key/value heads, N head width, V vocabulary.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from elpo_jax.model import attention, tree_attention
from elpo_jax.model.cache import Cache, LayerCache, cache_length, write
from elpo_jax.model.config import ModelConfig

Params = dict  # nested, of arrays in config.param_dtype


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters: matrices with standard deviation 1/sqrt(fan in), those that write to the residual stream
    divided by sqrt(2 L) so that its variance does not grow with depth; norms one, biases zero."""
    blank = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, blank, blank)["params"]


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None = None,
    ends: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states of the tokens, after the final norm.

    Without a cache (training) a token attends to itself and its ancestors: the query in column q sees the key in column
    k iff k <= q < ends[k]. With one (prefill and decode) each token's key and value are first written at the column of
    its position, and a query at position p then attends to columns 0..p; rewinding a row is therefore only a matter of
    the positions.

    Args:
      config: The network.
      params: From `init`.
      tokens: int32 [B, T].
      positions: int32 [B, T], how many tokens precede each in its sequence, or branch; -1 marks padding, which is
        neither written to the cache nor attended to, and whose own output is finite but meaningless.
      cache: From `new_cache`, or what a former call returned.
      ends: int32 [B, T], for rows that pack trees in depth-first order: one past the column of a token's last
        descendant, 0 at padding (see `policy.batch.Batch`). Only without a cache; None where each row is one sequence.

    Returns:
      hidden [B, T, D] in the compute dtype, and the updated cache (None without one).

    Raises:
      ValueError: If the shapes disagree, or both a cache and ends are given.
    """
    if tokens.ndim != 2 or tokens.shape != positions.shape:
        raise ValueError(f"tokens and positions must both be [B, T], not {tokens.shape} and {positions.shape}")
    if ends is not None and ends.shape != tokens.shape:
        raise ValueError(f"ends must be [B, T] like tokens, not {ends.shape} and {tokens.shape}")
    if cache is not None and ends is not None:
        raise ValueError("packed trees are for training only: a cache row holds one sequence")
    if cache is not None and (len(cache) != config.layers or cache[0].k.shape[0] != tokens.shape[0]):
        raise ValueError(
            f"the cache has {len(cache)} layers of {cache[0].k.shape[0]} rows; "
            f"this call needs {config.layers} of {tokens.shape[0]}"
        )
    return Transformer(config).apply({"params": params}, tokens, positions, cache, ends)


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D]; the product itself is float32 under every compute dtype."""
    head = params["embed"].T if config.tied else params["head"]
    return hidden.astype(jnp.float32) @ head.astype(jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32 and returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def _matrix(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, int], scale: float = 1.0) -> jax.Array:
    """Declares a matrix [in, out] and returns it in the compute dtype."""
    deviation = scale * shape[0] ** -0.5
    return module.param(name, nn.initializers.normal(deviation), shape, config.param_dtype).astype(config.dtype)


def _norm(module: nn.Module, config: ModelConfig, name: str, x: jax.Array) -> jax.Array:
    """Declares an RMSNorm scale over the last axis of `x` and applies it."""
    scale = module.param(name, nn.initializers.ones, (x.shape[-1],), config.param_dtype)
    return rms_norm(x, scale, config.norm_eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    `sees` says which keys a query sees: the mask [B, T, S] of a cache, or without one the `ends` [B, T] of subtrees.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, angles, sees, layer: LayerCache | None, positions):
        config = self.config
        rows, tokens, _ = x.shape

        def project(name, heads):
            y = x @ _matrix(self, config, name, (config.d_model, heads * config.head_dim))
            if config.qkv_bias:
                bias = self.param(f"{name}_bias", nn.initializers.zeros, (y.shape[-1],), config.param_dtype)
                y += bias.astype(y.dtype)
            return y.reshape(rows, tokens, heads, config.head_dim)

        q, k, v = project("q", config.heads), project("k", config.kv_heads), project("v", config.kv_heads)
        if config.qk_norm:
            q, k = _norm(self, config, "q_norm", q), _norm(self, config, "k_norm", k)
        q, k = attention.rotate(q, angles), attention.rotate(k, angles)
        if layer is None:
            out = tree_attention.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), sees, config.attention)
        else:
            layer = write(layer, k, v, positions)
            out = attention.attend(q, layer.k, layer.v, sees)
        width = config.heads * config.head_dim
        o = _matrix(self, config, "o", (width, config.d_model), (2 * config.layers) ** -0.5)
        return out.reshape(rows, tokens, width) @ o, layer


class Mlp(nn.Module):
    """SwiGLU: (silu(x gate) * (x up)) down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        shape, x = x.shape, x.reshape(-1, x.shape[-1])  # two axes: XLA's CPU products are half as fast with three
        gate = x @ _matrix(self, config, "gate", (config.d_model, config.d_ff))
        up = x @ _matrix(self, config, "up", (config.d_model, config.d_ff))
        down = _matrix(self, config, "down", (config.d_ff, config.d_model), (2 * config.layers) ** -0.5)
        return ((nn.silu(gate) * up) @ down).reshape(shape)


class Block(nn.Module):
    """One pre-norm layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, angles, sees, layer: LayerCache | None, positions):
        norm = functools.partial(_norm, self, self.config)
        y, layer = Attention(self.config, name="attn")(norm("attn_norm", x), angles, sees, layer, positions)
        x = x + y
        return x + Mlp(self.config, name="mlp")(norm("mlp_norm", x)), layer


class Transformer(nn.Module):
    """The whole network up to the final norm; `head` is declared here and read by `unembed`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, cache: Cache | None = None, ends=None):
        config = self.config
        embed = self.param(
            "embed",
            nn.initializers.normal(config.d_model**-0.5),
            (config.vocab_size, config.d_model),
            config.param_dtype,
        )
        if not config.tied:
            _matrix(self, config, "head", (config.d_model, config.vocab_size))
        angles = attention.rotary_angles(config, positions)
        if cache is None:
            sees = jnp.where(positions >= 0, positions.shape[1], 0) if ends is None else ends
        else:
            sees = attention.cache_mask(positions, cache_length(cache))
        block = nn.remat(Block) if config.remat else Block
        x = embed[tokens].astype(config.dtype)
        layers = []
        for i in range(config.layers):
            layer = None if cache is None else cache[i]
            x, layer = block(config, name=f"layers_{i}")(x, angles, sees, layer, positions)
            layers.append(layer)
        return _norm(self, config, "final_norm", x), None if cache is None else tuple(layers)
