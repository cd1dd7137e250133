"""One step of reinforcement learning, sampling and update together, against other people's trainers.

`rl` is a flat step (8 prompts x 8 attempts x 128 tokens) beside TRL and google-tunix; `elpo` is what a search adds,
many branches of one long prefix, beside the same work done with transformers and torch. Networks, tokens and updates
are the same on both sides; weights are random and every turn has its full length.
"""

import dataclasses
import gc
import importlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from elpo_jax.config import RlConfig
from elpo_jax.model.config import ModelConfig
from elpo_jax.policy.credit import assign
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import grpo
from elpo_jax.rollout.sampler import Request, Sampler, SamplerConfig
from elpo_jax.tasks.base import Task
from elpo_jax.train.mesh import row_parts
from elpo_jax.train.rl import Learner, update
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory
from elpo_jax.trees.tree import Leaf, RolloutTree
from experiments.measure import Settings, Side, compare, sampling_mesh
from experiments.peers import Work, qwen3_config, trl_stepper, tunix_stepper

PEERS = {"trl": ("TRL GRPOTrainer", trl_stepper), "tunix": ("google-tunix GRPOLearner", tunix_stepper)}
BRANCHES = Work(prompts=1, group=16, prompt=512, new=128)


def bench_rl(settings: Settings) -> Iterator[dict]:
    """Steps per second of a flat step, float32 and with bfloat16 updates, against TRL and google-tunix."""
    work = Work(prompts=2, group=4, prompt=8, new=8) if settings.quick else Work()
    for name, config in settings.models("S", "M").items():
        for peer, (title, stepper) in PEERS.items():
            case = f"{name}, {work.prompts} prompts x {work.group} attempts x {work.new} tokens"
            if missing(peer):
                yield {
                    "bench": "rl",
                    "case": f"{case}, {title}",
                    "skipped": f"{peer} is not installed",
                    "remedy": REMEDY,
                }
                continue
            other = stepper(config, work, settings.seed)
            theirs = Side(title, lambda other=other: other.step() or 1)
            for dtype in ("float32", "bfloat16"):
                ours = Side(f"elpo_jax, {dtype} update", our_step(config, work, dtype, settings.seed, together=2))
                yield compare(settings, "rl", f"{case}, {dtype}", ours, theirs, unit="steps/s")
            other.close()
            # Before the next trainer is made: with two of them M takes more than 24 GB.
            del other, theirs, ours
            gc.collect()


def bench_elpo(settings: Settings) -> Iterator[dict]:
    """Branches of one prefix and an update on their tree, against transformers: every branch prefilled and trained."""
    work = Work(prompts=1, group=4, prompt=32, new=8) if settings.quick else BRANCHES
    for name, config in settings.models("S", "M").items():
        case = f"{name}, {work.group} branches x {work.new} tokens after {work.prompt}"
        if missing("torch") or missing("transformers"):
            yield {"bench": "elpo", "case": case, "skipped": "torch or transformers is not installed", "remedy": REMEDY}
            continue
        theirs = Side("transformers generate + torch update", torch_step(config, work, settings.seed))
        together = work.group // row_parts(sampling_mesh(config))  # a row for every device that computes rows
        for dtype in ("float32", "bfloat16"):
            ours = Side(f"elpo_jax, {dtype} update", our_step(config, work, dtype, settings.seed, together))
            yield compare(settings, "elpo", f"{case}, {dtype}", ours, theirs, unit="steps/s")


REMEDY = "pip install -r experiments/requirements-peers.txt"


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def our_step(config: ModelConfig, work: Work, dtype: str, seed: int, together: int) -> Callable[[], int]:
    """A step of this project: sample every attempt in float32, assign credit, pack the trees, update once.

    `together` attempts share a row, and in it their prompt.
    """
    mesh = sampling_mesh(config)
    attempts = work.prompts * work.group
    group = attempts if work.prompts == 1 else 1  # the branches' prefix is long enough to be read once for all
    shape = SamplerConfig(slots=attempts, context=work.prompt + work.new, group=group, steps_per_visit=32)
    sampler = Sampler(config, shape, (), seed, mesh)
    trained = dataclasses.replace(config, dtype=dtype)
    optimizer = make_optimizer(OptimizerConfig(lr=1e-6, warmup_steps=0), total_steps=10_000)
    state = init_state(trained, optimizer, jax.random.key(seed), mesh)
    rows = max(16 // together, row_parts(mesh))
    length = work.prompt + together * work.new
    loop = RlConfig(prompts=work.prompts, updates=1, row_tokens=length, micro_rows=rows)
    learner = Learner(
        environment=None,
        sampler=sampler,
        stream=None,
        first_task=0,
        seed=seed,
        temperature=1.0,
        step_fn=make_train_step(make_loss(trained), optimizer, mesh),
        reference_logp=None,
        validate=lambda step: {},
    )
    rng = np.random.default_rng(seed)
    prompts = [
        Segment(Author.ENVIRONMENT, rng.integers(0, config.vocab_size - 2, work.prompt).astype(np.int32))
        for _ in range(work.prompts)
    ]
    recipe = grpo()

    def step() -> int:
        nonlocal state
        requests = [
            Request((prompt,), (0, i, attempt, 1), work.new)
            for i, prompt in enumerate(prompts)
            for attempt in range(work.group)
        ]
        turns = iter(sampler.generate(state.params, requests, 1.0))
        trees = [_tree(i, prompt, [next(turns) for _ in range(work.group)]) for i, prompt in enumerate(prompts)]
        credits = [assign(tree, recipe) for tree in trees]
        state, metrics = update(loop, recipe, learner, state, trees, credits)
        assert np.isfinite(metrics["loss"])
        return 1

    return step


def _tree(index: int, prompt: Segment, turns: list[Segment]) -> RolloutTree:
    """Attempts of one turn each; every other one succeeds."""
    task = Task(f"bench/{index}", index, "bench", "", "", max_steps=0, difficulty=0, meta={})
    return RolloutTree(
        task,
        tuple(
            Leaf(Trajectory(prompt, (Step(turn),), Finish.ANSWER, i % 2 == 0, float(i % 2 == 0)))
            for i, turn in enumerate(turns)
        ),
    )


def torch_step(config: ModelConfig, work: Work, seed: int) -> Callable[[], int]:
    """The same work with transformers: each attempt is prefilled by itself, then one clipped float32 update."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(qwen3_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size - 2, (work.prompts, work.prompt))
    prompts = torch.tensor(ids).repeat_interleave(work.group, dim=0)
    advantage = torch.tensor([1.0, -1.0] * (len(prompts) // 2))[:, None]

    def step() -> int:
        model.eval()
        with torch.no_grad():
            full = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=work.new,
                min_new_tokens=work.new,
            )
        model.train()
        logits = model(full, logits_to_keep=work.new + 1).logits[:, :-1]
        logp = torch.log_softmax(logits, -1).gather(-1, full[:, work.prompt :, None])[..., 0]
        ratio = torch.exp(logp - logp.detach())
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return 1

    return step
