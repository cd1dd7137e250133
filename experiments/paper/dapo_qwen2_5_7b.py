"""DAPO with Qwen2.5-7B-Instruct:  python -m experiments.run experiments/paper/dapo_qwen2_5_7b.py --workdir W"""

from elpo_jax.config import Config
from experiments.paper.backbones import qwen2_5_7b
from experiments.paper.common import paper_config, paper_dapo


def get_config() -> Config:
    return paper_config("dapo_qwen2_5_7b", qwen2_5_7b(), "models/Qwen2.5-7B-Instruct", paper_dapo())
