"""GSM8K from nothing, on two CPU cores: a small policy imitates the solutions, then ELPO trains it on the problems.

COMMAND:  bash experiments/gsm8k.sh PATH [WORKDIR], where PATH has the published train.jsonl and test.jsonl

The calculator marks of the solutions are the tool calls of the demonstrations, the tokenizer is a byte-level BPE that
is trained on them, and the policy has the parts of Qwen3. All it knows are these solutions, so its accuracy is low.
"""

from elpo_jax.config import (
    Config,
    DatasetConfig,
    EvalConfig,
    RlConfig,
    RolloutConfig,
    SftConfig,
    TasksConfig,
    TokenizerConfig,
)
from elpo_jax.model.config import ModelConfig
from elpo_jax.policy.recipes import elpo
from elpo_jax.rollout.sampler import SamplerConfig
from elpo_jax.train.step import OptimizerConfig


def get_config() -> Config:
    return Config(
        name="gsm8k",
        tasks=TasksConfig(
            families=("gsm8k",),
            datasets=(
                DatasetConfig(
                    "gsm8k",
                    "data/gsm8k",
                    tool="calculator",
                    max_calls=10,
                    checker="exact",  # its answers are plain numbers
                    plain=True,
                    demonstrations=6000,
                ),
            ),
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=2048, texts=6000),
        model=ModelConfig(
            vocab_size=2048,
            d_model=192,
            layers=4,
            heads=6,
            kv_heads=2,
            head_dim=48,
            d_ff=512,
            rope_theta=1e6,
            qk_norm=True,
        ),
        sampler=SamplerConfig(slots=64, context=640, group=8),  # trunks as in the results that are committed
        rollout=RolloutConfig(max_turn_tokens=128),
        sft=SftConfig(
            mistake_rate=0.0,
            steps=600,
            rows=16,
            micro_rows=4,
            save_every=100,
            optimizer=OptimizerConfig(lr=2e-3, warmup_steps=30, schedule="cosine"),
        ),
        algo=elpo(dual_clip=3.0),
        against=(),
        rl=RlConfig(
            steps=6,
            prompts=32,
            updates=4,
            micro_rows=2,
            save_every=2,
            dump_every=3,
            optimizer=OptimizerConfig(lr=2e-4, warmup_steps=4, b2=0.99, weight_decay=0.0),
        ),
        eval=EvalConfig(tasks=1319, validation_tasks=0, k=1, temperature=0.0),
    )
