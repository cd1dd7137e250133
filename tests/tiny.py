"""An experiment that touches every part of a run in under a minute; the tests fork it.

Its policy solves a part of the ledger tasks, so that trees have both outcomes and every update changes something.
"""

from elpo_jax.config import (
    Config,
    EvalConfig,
    LedgerConfig,
    RlConfig,
    RolloutConfig,
    SamplerConfig,
    SftConfig,
    TasksConfig,
    TokenizerConfig,
    WordMathConfig,
)
from elpo_jax.model.config import ModelConfig
from elpo_jax.policy.recipes import elpo, grpo
from elpo_jax.tasks.rewards import Reward
from elpo_jax.train.step import OptimizerConfig
from elpo_jax.trees.grow import SearchConfig


def get_config() -> Config:
    return Config(
        name="tiny",
        cpu_devices=2,
        tasks=TasksConfig(
            wordmath=WordMathConfig(difficulties=(2,), demonstrations=60),
            ledger=LedgerConfig(difficulties=(2,), noise=0.02, demonstrations=1000),
        ),
        tokenizer=TokenizerConfig(vocab_size=640, texts=200),
        model=ModelConfig(vocab_size=640, d_model=48, layers=2, heads=4, kv_heads=4, head_dim=16, d_ff=64),
        sampler=SamplerConfig(slots=16, context=256, prefill_buckets=(32,), prefill_rows=(16,)),  # one shape to compile
        rollout=RolloutConfig(max_turn_tokens=64, interpreter_workers=1, interpreter_packages=()),
        reward=Reward(kind="open_agentrl"),
        sft=SftConfig(
            mistake_rate=0.05,
            steps=150,
            rows=8,
            micro_rows=4,
            save_every=30,
            optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5, schedule="cosine"),
        ),
        algo=elpo(search=SearchConfig(budget=6, buffer=2), kl=0.01),
        against=(grpo(search=SearchConfig(budget=6, localizer="none")),),
        rl=RlConfig(
            steps=3, prompts=4, updates=2, micro_rows=2, eval_every=2, eval_tasks=2, dump_every=2, save_every=1
        ),
        eval=EvalConfig(tasks=3, validation_tasks=2, k=2, bootstrap=50),
    )
