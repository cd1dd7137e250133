"""The policy network: one decoder-only transformer that trains, prefills and decodes through the same function.

`init` and `apply` work on a plain nested dict of parameters: embed [V, D]; layers_i/{attn_norm, attn/{q, k, v, o},
mlp_norm, mlp/{gate, up, down}}; final_norm; head [D, V] where untied. Every matrix is [in, out], so a Hugging Face
weight is its transpose.
Letters: B rows, T tokens, D model width, H heads, K key/value heads, N head width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from elpo_jax.model import cache as kv
from elpo_jax.model import rotary, tree_attention
from elpo_jax.model.cache import Cache, LayerCache
from elpo_jax.model.config import ModelConfig

Params = dict  # nested, of arrays in config.param_dtype

DENSE = "dense"  # names the results of all products with a parameter in a block


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
    where: kv.Where | None = None,
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
      where: Where the tokens lie in the cache, if not in its row of the same index at the column of their position.

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
    if cache is not None:
        where = kv.locate(positions) if where is None else where
        rows = kv.cache_rows(cache)
        if len(cache) != config.layers or (where.rows is None and rows != tokens.shape[0]):
            raise ValueError(
                f"the cache has {len(cache)} layers of {rows} rows; "
                f"this call needs {config.layers} of {tokens.shape[0]}"
            )
    return Transformer(config).apply({"params": params}, tokens, positions, cache, ends, where)


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D]: a product in the compute dtype, summed in float32.

    The sampler and the trainer both call it, so what the compute dtype rounds is rounded alike in both.
    """
    head, axis = (params["embed"], 1) if config.tied else (params["head"], 0)
    return dense(hidden.astype(config.dtype), head, "float32", axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: jax.Array, matrix: jax.Array, dtype: str, axis: int = 0) -> jax.Array:
    """x [..., in] times a parameter: operands in the dtype of `x`, sums in float32.

    The parameter is cast here, and the gradient has products of its own: autodiff would make the operands of both
    backward products float32, and would round the parameter's gradient to the compute dtype.

    Args:
      x: [..., in] in the compute dtype.
      matrix: [in, out] in the dtype in which parameters are kept, which is also that of its gradient.
      dtype: Of the result.
      axis: Which axis of the matrix is `in`; with 1 it is [out, in].

    Returns:
      [..., out].
    """
    return _product(x, matrix.astype(x.dtype), axis).astype(dtype)


def _dense_forward(x, matrix, dtype, axis):
    return dense(x, matrix, dtype, axis), (x, matrix)


def _dense_backward(dtype, axis, kept, slope):
    x, matrix = kept
    slope = slope.astype(x.dtype)
    # Written without a transpose, and the second over all leading axes: XLA's CPU backend converts bfloat16 operands of
    # any other form to float32, which is several times slower, and refuses some. Float32 needs no copy over one axis.
    of_x = _product(slope, matrix.astype(x.dtype), 1 - axis).astype(x.dtype)
    if x.dtype == jnp.float32:
        x, slope = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
    pair, leading = ((x, slope), (slope, x))[axis], tuple(range(x.ndim - 1))
    of_matrix = jax.lax.dot_general(*pair, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)
    return of_x, of_matrix.astype(matrix.dtype)


dense.defvjp(_dense_forward, _dense_backward)


def _product(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """x [..., n] times an axis of a matrix, in float32; XLA's CPU products are half as fast with more axes than two."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(rows, matrix, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32 and returned in the dtype of `x`.

    Its gradient keeps `x` and one number per vector; autodiff would keep both factors at the size of `x`.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(eps, kept, slope):
    x, scale, inverse = _again(kept)
    unit, slope = x.astype(jnp.float32) * inverse, slope.astype(jnp.float32)
    of_scale = jnp.sum(slope * unit, axis=tuple(range(x.ndim - 1)))
    slope = slope * scale.astype(jnp.float32)
    of_x = inverse * (slope - unit * jnp.mean(slope * unit, axis=-1, keepdims=True))
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32 and returned in their dtype.

    Its gradient keeps only the arguments, which the products before it keep anyway; autodiff would keep three more.
    """
    return _swiglu_forward(gate, up)[0]


def _swiglu_forward(gate, up):
    wide = gate.astype(jnp.float32)
    return (nn.silu(wide) * up.astype(jnp.float32)).astype(gate.dtype), (gate, up)


def _swiglu_backward(kept, slope):
    gate, up, slope = (x.astype(jnp.float32) for x in (*_again(kept), slope))
    share = nn.sigmoid(gate)
    of_gate, of_up = slope * up * share * (1 + gate * (1 - share)), slope * gate * share
    return of_gate.astype(kept[0].dtype), of_up.astype(kept[1].dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _again(kept: Any) -> Any:
    """What a backward pass computes from these it computes anew: XLA would find it in the forward pass, and keep it."""
    return jax.lax.optimization_barrier(kept)


def _matrix(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, int], scale: float = 1.0) -> jax.Array:
    """Declares a matrix [in, out]."""
    deviation = scale * shape[0] ** -0.5
    return module.param(name, nn.initializers.normal(deviation), shape, config.param_dtype)


def _dense(module: nn.Module, config: ModelConfig, name: str, x: jax.Array, out: int, scale: float = 1.0) -> jax.Array:
    """Declares a matrix and multiplies x [..., in] by it; "dots" remat keeps the result."""
    return checkpoint_name(dense(x, _matrix(module, config, name, (x.shape[-1], out), scale), config.dtype), DENSE)


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
    def __call__(self, x, angles, layer: LayerCache | None, sees: jax.Array | kv.Where):
        config = self.config
        rows, tokens, _ = x.shape

        def project(name, heads):
            y = _dense(self, config, name, x, heads * config.head_dim)
            if config.qkv_bias:
                bias = self.param(f"{name}_bias", nn.initializers.zeros, (y.shape[-1],), config.param_dtype)
                y += bias.astype(y.dtype)
            return y.reshape(rows, tokens, heads, config.head_dim)

        q, k, v = project("q", config.heads), project("k", config.kv_heads), project("v", config.kv_heads)
        if config.qk_norm:
            q, k = _norm(self, config, "q_norm", q), _norm(self, config, "k_norm", k)
        q, k = rotary.rotate(q, angles), rotary.rotate(k, angles)
        if layer is None:
            out = tree_attention.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), sees, config.attention)
        else:
            layer = layer._replace(own=kv.write(layer.own, k, v, sees))
            out = kv.attend(layer, q, sees)
        width = config.heads * config.head_dim
        out = out.reshape(rows, tokens, width)
        return _dense(self, config, "o", out, config.d_model, (2 * config.layers) ** -0.5), layer


class Mlp(nn.Module):
    """SwiGLU: (silu(x gate) * (x up)) down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        gate, up = (_dense(self, config, name, x, config.d_ff) for name in ("gate", "up"))
        return _dense(self, config, "down", swiglu(gate, up), config.d_model, (2 * config.layers) ** -0.5)


class Block(nn.Module):
    """One pre-norm layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, angles, layer: LayerCache | None, sees: jax.Array | kv.Where):
        norm = functools.partial(_norm, self, self.config)
        y, layer = Attention(self.config, name="attn")(norm("attn_norm", x), angles, layer, sees)
        x = x + y
        return _rounded(x + Mlp(self.config, name="mlp")(norm("mlp_norm", x))), layer


def _rounded(x: jax.Array) -> jax.Array:
    """What a layer hands on, in bfloat16 where that is its dtype.

    XLA keeps the float32 behind a bfloat16 result where it sees both; around jitted layers it sees other pairs in the
    sampler than in the trainer, whose log-probabilities then differ five to seven times as much.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if x.dtype == jnp.bfloat16 else x


class Transformer(nn.Module):
    """The whole network up to the final norm; `head` is declared here and read by `unembed`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, cache: Cache | None = None, ends=None, where: kv.Where | None = None):
        config = self.config
        embed = self.param(
            "embed",
            nn.initializers.normal(config.d_model**-0.5),
            (config.vocab_size, config.d_model),
            config.param_dtype,
        )
        if not config.tied:
            _matrix(self, config, "head", (config.d_model, config.vocab_size))
        angles = rotary.rotary_angles(config, positions)
        if ends is None:
            ends = jnp.where(positions >= 0, positions.shape[1], 0)
        sees = ends if cache is None else where
        x = embed[tokens].astype(config.dtype)
        if self.is_initializing():  # Flax names what is declared; below, a layer is a function of its parameters
            for i in range(config.layers):
                x, _ = Block(config, name=f"layers_{i}")(x, angles, None, ends)
            return _norm(self, config, "final_norm", x), None
        block, params = _block(config), [self.variables["params"][f"layers_{i}"] for i in range(config.layers)]
        if config.scan_layers and cache is None:
            # So that one layer is compiled, too. The parameters lie one layer beside the other, here as in checkpoints,
            # and are stacked for the loop: a copy.
            stacked = jax.tree.map(lambda *matrices: jnp.stack(matrices), *params)
            x, _ = jax.lax.scan(lambda x, layer: block(layer, x, angles, None, sees), x, stacked)
            return _norm(self, config, "final_norm", x), None
        layers = []
        for i, layer in enumerate(cache or [None] * config.layers):
            x, layer = block(params[i], x, angles, layer, sees)
            layers.append(layer)
        return _norm(self, config, "final_norm", x), None if cache is None else tuple(layers)


@functools.cache
def _block(config: ModelConfig) -> Callable:
    """A layer as a function of its parameters and of what `Block` takes; its backward pass recomputes what
    `config.remat` says.

    It is jitted by itself, so that JAX traces, differentiates and lowers one layer, whatever their number.
    """
    match config.remat:
        case "none":
            kind = Block
        case "full":
            kind = nn.remat(Block)
        case "dots":
            kind = nn.remat(Block, policy=jax.checkpoint_policies.save_only_these_names(DENSE))
    block = kind(config, parent=None)
    return jax.jit(lambda params, *inputs: block.apply({"params": params}, *inputs))
