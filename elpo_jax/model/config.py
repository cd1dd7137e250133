"""The shape of the policy network, as one frozen dataclass that Qwen2, Qwen2.5, Qwen3 and Llama 3 all fit into."""

import dataclasses

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
      vocab_size: V, rows of the embedding.
      d_model: D, width of the residual stream.
      layers: L.
      heads: H, query heads.
      kv_heads: K, key/value heads; each serves H/K query heads.
      head_dim: N, width of a head; independent of D/H, and even because rotary positions turn pairs.
      d_ff: F, width of the SwiGLU.
      rope_theta: Base of the rotary frequencies.
      norm_eps: Added to the mean square in every RMSNorm.
      qk_norm: RMSNorm of each query and key head before the rotation (Qwen3).
      qkv_bias: Biases on the query, key and value projections (Qwen2, Qwen2.5).
      tied: The embedding is also the output head.
      dtype: Compute dtype of the blocks; norms, softmax and logits are always float32.
      param_dtype: Dtype in which parameters are created and kept; bfloat16 is for inference, training refuses it.
      remat: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
      ValueError: If the numbers do not describe a network; the message names the field.
    """

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{name} must be a positive integer, not {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}: "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs of features")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be positive, not {getattr(self, name)!r}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"model.{name} must be one of {', '.join(DTYPES)}, not {getattr(self, name)!r}")


def count_params(config: ModelConfig) -> int:
    """Number of parameters, counting a tied embedding once."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * config.d_model * (queries + keys)
    if config.qkv_bias:
        attention += queries + 2 * keys
    if config.qk_norm:
        attention += 2 * config.head_dim
    block = attention + 3 * config.d_model * config.d_ff + 2 * config.d_model
    embeddings = config.vocab_size * config.d_model * (1 if config.tied else 2)
    return embeddings + config.layers * block + config.d_model
