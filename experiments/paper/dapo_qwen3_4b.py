"""DAPO with Qwen3-4B-Instruct-2507:  python -m experiments.run experiments/paper/dapo_qwen3_4b.py --workdir W"""

from elpo_jax.config import Config
from experiments.paper.backbones import qwen3_4b
from experiments.paper.common import paper_config, paper_dapo


def get_config() -> Config:
    return paper_config("dapo_qwen3_4b", qwen3_4b(), "models/Qwen3-4B-Instruct-2507", paper_dapo())
