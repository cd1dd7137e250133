"""The main job: a small policy learns to reason with real tools, on two CPU cores, in about ten minutes.

COMMAND:  bash experiments/quickstart.sh [WORKDIR]
"""

from elpo_jax.config import Config


def get_config() -> Config:
    return Config(name="quickstart")
