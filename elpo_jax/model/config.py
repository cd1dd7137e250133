"""The shape of the policy network, as one frozen dataclass that Qwen2, Qwen2.5, Qwen3 and Llama 3 all fit into."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

DTYPES = ("float32", "bfloat16")
ATTENTION = ("blocks", "pallas", "cudnn")
ROPE_KINDS = ("none", "linear", "llama3", "yarn")
REMAT = ("none", "dots", "full")
ROWS = ("data", "fsdp")  # the mesh axes that split the rows of a batch or of a cache


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the pretraining.

    Attributes:
      kind: "none"; "linear" divides every frequency by `factor`; "llama3" (Llama 3.1) only those of long wavelengths;
        "yarn" (arXiv 2309.00071) those that turn less than `beta_slow` times in the original context.
      factor: By how much, at least 1.
      original_context: Tokens of the context in pretraining (llama3, yarn).
      low_freq_factor: Wavelengths above original_context / low_freq_factor are stretched in full (llama3).
      high_freq_factor: Those below original_context / high_freq_factor are left alone (llama3).
      beta_fast: Features that turn more often than this within the original context are left alone (yarn).
      beta_slow: Those that turn less often are stretched in full (yarn).
      attention_factor: Multiplies rotated queries and keys (yarn); 0 means 0.1 ln(factor) + 1.
      truncate: Round the range between fast and slow to whole features (yarn).

    Raises:
      ValueError: If the numbers of the kind are missing or impossible; the message names the field.
    """

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"model.rope_scaling.kind must be one of {', '.join(ROPE_KINDS)}, not {self.kind!r}")
        if self.kind == "none":
            return
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"model.rope_scaling.factor must be a number of at least 1, not {self.factor!r}")
        if self.kind == "linear":
            return
        if self.original_context < 1:
            raise ValueError(
                f"model.rope_scaling.original_context must be the context of the pretraining in tokens, such as 32768, "
                f"not {self.original_context!r}"
            )
        low, high = ("low_freq_factor", "high_freq_factor") if self.kind == "llama3" else ("beta_slow", "beta_fast")
        if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
            raise ValueError(
                f"model.rope_scaling.{low}={getattr(self, low)!r} must be positive and less than "
                f"model.rope_scaling.{high}={getattr(self, high)!r}"
            )
        if self.kind == "yarn" and not 0 <= self.attention_factor < math.inf:
            raise ValueError(f"model.rope_scaling.attention_factor must be at least 0, not {self.attention_factor!r}")


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
      rope_scaling: Their stretching for long contexts.
      norm_eps: Added to the mean square in every RMSNorm.
      qk_norm: RMSNorm of each query and key head before the rotation (Qwen3).
      qkv_bias: Biases on the query, key and value projections (Qwen2, Qwen2.5).
      tied: The embedding is also the output head.
      dtype: Of the operands of matrix products and of the activations between them; sums of products, norms, softmax
        and logits are always float32.
      param_dtype: Dtype in which parameters are created and kept; bfloat16 is for inference, training refuses it.
      remat: What each block computes again in the backward pass instead of keeping it: "none"; "dots", all but the
        products with parameters; "full", everything but its input.
      scan_layers: Training runs the layers as a loop over one compiled block: compiles faster, but copies the
        parameters. Prefill and decode, whose caches are updated in place, do not.
      attention: What computes attention in training: "blocks", for every backend; "pallas" on a TPU; "cudnn" on a GPU
        (see `model.tree_attention.attend`).
      source: Folder of the weights to start from; "" for random ones.

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
    remat: str = "none"
    scan_layers: bool = False
    attention: str = "blocks"
    source: str = ""
    rope_scaling: RopeScaling = RopeScaling()

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
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} must be positive, not {getattr(self, name)!r}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"model.{name} must be one of {', '.join(DTYPES)}, not {getattr(self, name)!r}")
        if self.remat not in REMAT:
            raise ValueError(f"model.remat must be one of {', '.join(REMAT)}, not {self.remat!r}")
        if self.attention not in ATTENTION:
            raise ValueError(f"model.attention must be one of {', '.join(ATTENTION)}, not {self.attention!r}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"model.attention=cudnn needs model.dtype=bfloat16, not {self.dtype}")


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The config whose `dataclasses.asdict` became JSON; fields that it lacks keep their defaults.

    Raises:
      ValueError: If there is a field that does not exist, or a value that does not fit.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown numbers of a network: {', '.join(unknown)}; a newer version of elpo_jax wrote them")
    try:
        return ModelConfig(**{**values, "rope_scaling": RopeScaling(**values.get("rope_scaling", {}))})
    except TypeError as error:
        raise ValueError(f"the network's numbers are damaged ({error}): write them again") from None


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
