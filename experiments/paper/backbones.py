"""The paper's two backbones, by the numbers of their published config.json files."""

from elpo_jax.model.config import ModelConfig


def qwen2_5_7b() -> ModelConfig:
    """Qwen2.5-7B-Instruct: 7.62 B parameters."""
    return ModelConfig(
        vocab_size=152064,
        d_model=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        d_ff=18944,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied=False,
        dtype="bfloat16",
        remat="full",
    )


def qwen3_4b() -> ModelConfig:
    """Qwen3-4B-Instruct-2507: 4.02 B parameters."""
    return ModelConfig(
        vocab_size=151936,
        d_model=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        d_ff=9728,
        rope_theta=5e6,
        norm_eps=1e-6,
        qk_norm=True,
        tied=True,
        dtype="bfloat16",
        remat="full",
    )
