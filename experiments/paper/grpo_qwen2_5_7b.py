"""GRPO with Qwen2.5-7B-Instruct:  python -m experiments.run experiments/paper/grpo_qwen2_5_7b.py --workdir W"""

from elpo_jax.config import Config
from experiments.paper.backbones import qwen2_5_7b
from experiments.paper.common import paper_config, paper_grpo


def get_config() -> Config:
    return paper_config("grpo_qwen2_5_7b", qwen2_5_7b(), "models/Qwen2.5-7B-Instruct", paper_grpo())
