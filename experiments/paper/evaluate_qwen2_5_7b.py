"""Table 1 for given weights:  python -m experiments.run experiments/paper/evaluate_qwen2_5_7b.py --workdir W

Of a trained run:  python -m elpo_jax.model.weights export RUN DIR, then the same with --set model.source=DIR
"""

from elpo_jax.config import Config
from experiments.paper.backbones import qwen2_5_7b
from experiments.paper.common import evaluation_config


def get_config() -> Config:
    return evaluation_config("evaluate_qwen2_5_7b", qwen2_5_7b(), "models/Qwen2.5-7B-Instruct")
