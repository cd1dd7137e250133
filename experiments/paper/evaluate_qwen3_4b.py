"""Table 1 for given weights:  python -m experiments.run experiments/paper/evaluate_qwen3_4b.py --workdir W

Of a trained run:  python -m elpo_jax.model.weights export RUN DIR, then the same with --set model.source=DIR
"""

from elpo_jax.config import Config
from experiments.paper.backbones import qwen3_4b
from experiments.paper.common import evaluation_config


def get_config() -> Config:
    return evaluation_config("evaluate_qwen3_4b", qwen3_4b(), "models/Qwen3-4B-Instruct-2507")
