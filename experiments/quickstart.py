"""The main job: a small policy learns to reason with real tools, on two CPU cores, in five to twelve minutes.

COMMAND:  bash experiments/quickstart.sh [WORKDIR]

The demonstrations are sloppy on purpose: half of them slip and repair it by further calls. The policy that imitates
them is graded without a spare call, and what it has to unlearn is left to reinforcement learning.
"""

from elpo_jax.config import Config, RolloutConfig
from elpo_jax.policy.recipes import elpo, grpo
from elpo_jax.rollout.sampler import SamplerConfig


def get_config() -> Config:
    # Both with the dual clip of 3 that is usual for GRPO, so that they do not differ in it.
    return Config(
        name="quickstart",
        # Sums need no packages, and a process that holds none is copied in half of the time.
        rollout=RolloutConfig(interpreter_packages=()),
        algo=elpo(dual_clip=3.0),
        against=(grpo(dual_clip=3.0),),
        # Its sequences are short: what skipping empty columns saves is less than what merging more blocks costs.
        sampler=SamplerConfig(block=128),
    )
