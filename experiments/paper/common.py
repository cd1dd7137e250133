"""The paper's training set-up: SFT on Open-AgentRL-SFT-3K, then RL on Open-AgentRL-30K, for one backbone.

What the paper prints is marked "paper" (section 5.3 and Table 2); all else is our choice, with its source. Where the
paper says nothing we follow Open-AgentRL (Gen-Verse/Open-AgentRL, recipe/demystify), whose data, tool and backbones it
uses, and where that says nothing the defaults of verl, which both train with.
"""

import dataclasses

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
from elpo_jax.policy.recipes import Recipe, dapo, elpo, grpo
from elpo_jax.rollout.sampler import SamplerConfig
from elpo_jax.tasks.rewards import Reward
from elpo_jax.train.mesh import MeshConfig
from elpo_jax.train.step import OptimizerConfig
from experiments.paper.evaluation import COLUMNS, CONTEXT, MOST_TURNS, TEMPERATURE, TOP_P

SFT_TRANSCRIPTS, RL_PROMPTS = 3000, 30000  # by their names; the files have a few more or less


def paper_elpo() -> Recipe:
    """Paper, Table 2 and eq. 1-12: the defaults of `elpo`. Our choice: the dual clip of Open-AgentRL's scripts."""
    return elpo(dual_clip=10.0)


def paper_grpo() -> Recipe:
    """Our choice: verl's GRPO with Open-AgentRL's dual clip; the paper's own rows are copied from other papers."""
    return grpo(dual_clip=10.0)


def paper_dapo() -> Recipe:
    """Our choice: likewise, with DAPO's upper clip of 0.28, which is also that of Open-AgentRL's scripts."""
    return dapo(dual_clip=10.0)


def paper_config(name: str, model: ModelConfig, weights: str, recipe: Recipe) -> Config:
    """One backbone trained by one recipe.

    Args:
      name: Of the experiment.
      model: The backbone's shape.
      weights: Folder of its published weights and tokenizer.
      recipe: The algorithm of the RL stage.
    """
    batch, minibatch = 128, 16  # paper: prompts of a batch and of an optimizer step
    config = Config(
        name=name,
        mesh=MeshConfig(data=1, fsdp=8),  # paper: 8 A100; our choice: how they are used
        model=model,
        algo=recipe,
        against=(),
        tasks=TasksConfig(
            families=("open_agentrl_30k", *(column.dataset for column in COLUMNS.values())),
            datasets=(
                # Our choice: the checkers of Open-AgentRL's code.
                _dataset("open_agentrl_30k", "train", checker="strict_box", partial_credit=True),
                *(_dataset(c.dataset, "test", rows=c.rows, k=c.k) for c in COLUMNS.values()),
            ),
        ),
        sampler=SamplerConfig(
            context=CONTEXT,  # paper: at most 20K tokens
            slots=64,  # our choice, by memory
            group=8,  # our choice: half of the attempts of a task, whose prompt is long
            parking=0,  # our choice: a parked row takes as much memory as a slot
            block=128,  # our choice: what an accelerator reads at once
            steps_per_visit=16,  # our choice: long turns seldom end within 16 tokens
            prefill_buckets=(64, 256, 1024),  # our choice: tool answers are short, prompts longer
            prefill_rows=(8, 16),  # our choice
        ),
        rollout=RolloutConfig(
            temperature=1.0,  # our choice: verl's default, with top-p 1
            max_turn_tokens=16384,  # our choice: what the longest prompt of Open-AgentRL, 4096, leaves of the context
            interpreter_seconds=30.0,  # our choice: Open-AgentRL
            interpreter_memory_mb=2048,  # our choice: Open-AgentRL
            interpreter_workers=128,  # our choice: Open-AgentRL
            interpreter_reference=True,  # our choice: the errors in the paper's Figure 4 are of Open-AgentRL's tool
        ),
        # Our choice: the reward of Open-AgentRL's code, with the penalty of 1.1 that the paper's Figure 4 shows.
        reward=Reward(kind="open_agentrl", constant_penalty=True, overlong_buffer=4096),
        sft=SftConfig(
            steps=5 * (SFT_TRANSCRIPTS // 32),  # paper: 5 epochs; our choice: 32 transcripts a step, Open-AgentRL
            # Our choice: rows are packed, and 8 of 20,480 tokens hold 32 transcripts of 5,000. The cold start prints
            # how many rows there are; five epochs are 5 / 8 of that number in steps.
            rows=8,
            micro_rows=8,
            save_every=93,  # our choice: an epoch
            mistake_rate=0.0,  # the transcripts are given
            optimizer=OptimizerConfig(  # our choice, all of it: the defaults of verl's SFT trainer
                lr=1e-5,
                b1=0.9,
                b2=0.95,
                weight_decay=0.01,
                schedule="cosine",
                warmup_steps=46,
                clip_norm=1.0,
            ),
        ),
        rl=RlConfig(
            steps=RL_PROMPTS // batch,  # paper: 1 epoch
            prompts=batch,
            updates=batch // minibatch,
            epochs=1,  # our choice: verl's ppo_epochs
            micro_rows=8,  # our choice, by memory: one row on each of 8 devices
            row_tokens=CONTEXT,  # our choice, by memory: a row is as long as the longest attempt may be
            eval_every=0,  # our choice
            dump_every=30,  # our choice
            save_every=30,  # our choice: Open-AgentRL
            optimizer=OptimizerConfig(  # our choice, all of it: Open-AgentRL's scripts and the defaults of verl's actor
                lr=1e-6,
                b1=0.9,
                b2=0.999,
                weight_decay=0.01,
                schedule="constant",
                warmup_steps=0,
                clip_norm=1.0,
            ),
        ),
        eval=EvalConfig(  # see evaluation.py
            temperature=TEMPERATURE,
            top_p=TOP_P,
            tasks=max(column.rows for column in COLUMNS.values()),
            validation_tasks=0,
        ),
    )
    return published_files(config, weights)


def evaluation_config(name: str, model: ModelConfig, weights: str) -> Config:
    """Every column of Table 1 for weights as they are: published ones, or what a run exported."""
    config = paper_config(name, model, weights, paper_elpo())
    columns = tuple(column.dataset for column in COLUMNS.values())
    return dataclasses.replace(
        config,
        tasks=dataclasses.replace(
            config.tasks, families=columns, datasets=tuple(d for d in config.tasks.datasets if d.name in columns)
        ),
        sft=dataclasses.replace(config.sft, steps=0),
        rl=dataclasses.replace(config.rl, steps=0),
    )


def published_files(config: Config, weights: str) -> Config:
    """What is read from folders: published weights with their tokenizer, and the prepared transcripts."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=weights),
        tokenizer=TokenizerConfig(kind="checkpoint"),
        sft=dataclasses.replace(config.sft, data="data/open_agentrl_sft_3k"),  # paper
    )


def _dataset(name: str, use: str, **changes) -> DatasetConfig:
    """A prepared data set under data/, with Open-AgentRL's limit of turns; the last has no call that is answered."""
    return DatasetConfig(
        name=name,
        path=f"data/{name}",
        use=use,
        tool="code_interpreter",
        max_calls=MOST_TURNS - 1,
        validation=0.0,  # paper: one epoch of all prompts
        **changes,
    )
