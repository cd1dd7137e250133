"""The policy-gradient loop: collect a tree per prompt, turn trees into per-token credit, take a few clipped steps.

trees  = collect(tasks)                       attempts, searches, first irrecoverable steps     (host + sampler)
credit = assign(tree)                         eq. 6-10                                          (host, float64)
batch  = examples -> weights -> packed trees  masks and indices                                 (host)
state  = step(state, batch)                   eq. 1, 2, 11, 12                                  (device)
"""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from elpo_jax.config import RlConfig
from elpo_jax.model.transformer import Params
from elpo_jax.policy.batch import Batch, drop_flat, normalise, pack, policy_examples, stack
from elpo_jax.policy.credit import Credit, assign
from elpo_jax.policy.recipes import Recipe
from elpo_jax.report.log import MetricsLog
from elpo_jax.report.progress import Progress
from elpo_jax.rollout.agent import Environment
from elpo_jax.rollout.collect import collect
from elpo_jax.rollout.sampler import Sampler
from elpo_jax.tasks.stream import TaskStream
from elpo_jax.tools.base import InfrastructureError, Status
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.state import TrainState
from elpo_jax.trees.serial import tree_to_json
from elpo_jax.trees.tree import RolloutTree


@dataclasses.dataclass(frozen=True)
class Learner:
    """What the loop needs beside its numbers, built once per run."""

    environment: Environment
    sampler: Sampler
    stream: TaskStream
    first_task: int  # where the prompts of RL begin in the stream, after those of the demonstrations
    seed: int
    temperature: float
    step_fn: Callable  # from make_train_step, with the policy loss
    reference_logp: Callable[[Batch], np.ndarray] | None  # of the cold-started policy, for recipes with kl > 0
    validate: Callable[[int], dict[str, float]]  # RL step -> validation row


def train_rl(
    config: RlConfig,
    recipe: Recipe,
    learner: Learner,
    state: TrainState,
    *,
    start: int,
    meta: dict,
    checkpoints: Checkpoints,
    log: MetricsLog,
    dumps: pathlib.Path,
) -> TrainState:
    """Runs batches `start` to `config.steps` and returns the last state, which is also saved.

    Args:
      config: The loop's numbers.
      recipe: The algorithm.
      learner: Environment, sampler, tasks and the jitted step.
      state: State after `start` batches.
      start: Batches already done; with the seed it determines everything that follows.
      meta: Saved with every checkpoint, beside "cursor", the number of the next prompt in the stream.
      checkpoints: Where to save.
      log: Gets one row per batch.
      dumps: Folder for rollouts/step_NNNNNN.jsonl.
    """
    with Progress(recipe.name, config.steps, start=start) as progress:
        for step in range(start, config.steps):
            began = time.perf_counter()
            before = sandbox_counters(learner.environment)
            first = learner.first_task + step * config.prompts
            tasks = [learner.stream.task("train", n) for n in range(first, first + config.prompts)]
            learner.sampler.load(state.params, version=step)
            trees = collect(
                tasks,
                recipe.search,
                learner.environment,
                learner.sampler,
                seed=learner.seed,
                step=step,
                temperature=learner.temperature,
                progress=progress.within,
            )
            stop_if_truncated(trees)
            credits = [assign(tree, recipe) for tree in trees]
            collected = time.perf_counter()
            state, metrics = update(config, recipe, learner, state, trees, credits)
            row = rollout_metrics(trees, credits) | metrics
            row |= {"seconds/collect": collected - began, "seconds/update": time.perf_counter() - collected}
            row["rollout/slot_use"] = learner.sampler.occupancy
            done = step + 1
            if config.dump_every and (done % config.dump_every == 0 or done in (1, config.steps)):
                path = dumps / f"step_{done:06d}.jsonl"
                dump(path, done, recipe, trees, credits, learner.environment, config.dump_private)
            if config.eval_every and done % config.eval_every == 0:
                learner.sampler.load(state.params, version=done)
                row |= learner.validate(done)
            # Of the validation too: what was lost there is as much a reason to look at the machine.
            row |= {name: value - before[name] for name, value in sandbox_counters(learner.environment).items()}
            row["seconds/step"] = time.perf_counter() - began
            log.write({"step": done, **row})
            progress.update(done, tokens=row["rollout/model_tokens"], root_success=row["rollout/root_success"])
            if done % config.save_every == 0 or done == config.steps:
                log.sync()
                checkpoints.save(done, state, meta | {"cursor": first + config.prompts})
    return state


def sandbox_counters(environment: Environment) -> dict[str, float]:
    """What the sandbox has counted so far, under the names of metrics; a row holds a step's share."""
    counters = {} if environment.sandbox is None else environment.sandbox.counters()
    return {f"sandbox/{name}": value for name, value in counters.items()}


def stop_if_truncated(trees: Sequence[RolloutTree]) -> None:
    """Raises InfrastructureError if tool failures of ours ended a tree before its budget was spent.

    What is left of such a tree is biased towards attempts that call no tool, and its budget is not that of the others,
    so the run stops there instead of training on it.
    """
    lost = [tree for tree in trees if tree.truncated]
    if lost:
        failures = sum(tree.infrastructure_failures for tree in lost)
        raise InfrastructureError(
            f"{failures} attempts at {len(lost)} of {len(trees)} prompts (first: {lost[0].task.id}) were lost to "
            "failures of the tools themselves, again and again: see that `python -m elpo_jax.tools.sandbox check` "
            "passes and that there is memory, then go on from the last checkpoint with --resume"
        )


def update(
    config: RlConfig,
    recipe: Recipe,
    learner: Learner,
    state: TrainState,
    trees: Sequence[RolloutTree],
    credits: Sequence[Credit],
) -> tuple[TrainState, dict[str, float]]:
    """`config.epochs` passes of `config.updates` optimizer steps, each over its own share of the prompts, in order."""
    scalars = recipe.scalars() | {"temperature": learner.temperature}
    scalars = {name: np.float32(value) for name, value in scalars.items()}
    share = len(trees) // config.updates
    batches = []
    for i in range(config.updates):
        mine = slice(i * share, (i + 1) * share)
        groups = [policy_examples(t, c) for t, c in zip(trees[mine], credits[mine], strict=True)]
        examples = normalise([e for group in groups for e in group], recipe, constant=learner.sampler.context)
        examples = drop_flat(examples, recipe.kl)
        rows = pack(examples, config.row_length(learner.sampler.context), config.share_prefixes)
        batch = stack(rows, config.micro_rows)
        if learner.reference_logp is not None and recipe.kl > 0:
            batch = batch.replace(reference_logp=learner.reference_logp(batch))
        batches.append(batch)
    rows: list[Mapping[str, float]] = []
    for batch in batches * config.epochs:
        state, metrics = learner.step_fn(state, batch, scalars)
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, update_metrics(rows)


def update_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages of the updates' metrics: sums over tokens become means per model token, maxima stay maxima.

    The tokens are those of trees with different outcomes, for the others have no gradient and are left out of the batch
    (`drop_flat`). "first_*" are of the first update alone, whose policy is the sampler's own: a ratio away from 1, or a
    log-probability away from the sampler's, is a bug there, while in later updates it is what was learned in between.
    """
    tokens = max(sum(row["tokens"] for row in rows), 1.0)
    out = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.endswith("_max"):
            out[f"loss/{name}"] = max(values)
        elif name in ("loss", "grad_norm", "lr"):
            out[name] = float(np.mean(values))
        elif name == "skipped":
            out[name] = values[-1]
        else:
            out[f"loss/{name}"] = sum(values) if name == "tokens" else sum(values) / tokens
    out["loss/first_ratio_deviation_max"] = rows[0]["ratio_deviation_max"]
    out["loss/first_mismatch_max"] = rows[0]["mismatch_max"]
    out["loss/first_mismatch_mean"] = rows[0]["mismatch_mean"] / max(rows[0]["tokens"], 1.0)
    return out


def rollout_metrics(trees: Sequence[RolloutTree], credits: Sequence[Credit]) -> dict[str, float]:
    """What the collected trees look like.

    "root_success" is the mean over prompts of their independent attempts' success: neither the continuations, which
    start from failures, nor the prompts that were easy enough to leave budget for more roots weigh more. "entropy" is
    the mean over all sampled tokens, in nats at temperature 1.
    """
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    roots = collections.defaultdict(list)
    for tree in trees:
        own = [leaf.trajectory.success for leaf in tree.leaves if leaf.parent is None]
        if own:
            roots[tree.task.family].append(np.mean(own))
    own = [step for leaf in leaves for step in leaf.trajectory.steps[leaf.anchor :]]
    results = [step.result.status for step in own if step.result is not None]
    searches = [search for tree in trees for search in tree.searches]
    failed = [i for c in credits for i in c.first_failure if i > 0]
    mixed = [0 < sum(leaf.trajectory.success for leaf in tree.leaves) < len(tree.leaves) for tree in trees]
    everything = [success for family in roots.values() for success in family]
    row = {
        "rollout/rollouts": len(leaves),
        "rollout/success": float(np.mean([leaf.trajectory.success for leaf in leaves])) if leaves else 0.0,
        "rollout/root_success": float(np.mean(everything)) if everything else 0.0,
        "rollout/model_tokens": sum(len(step.turn) for step in own),
        "rollout/entropy": float(np.concatenate([step.turn.entropies for step in own]).mean()) if own else 0.0,
        "rollout/tool_calls": len(results),
        "rollout/infrastructure_failures": sum(tree.infrastructure_failures for tree in trees),
        "tree/searches": len(searches),
        "tree/verified": float(np.mean([s.verified for s in searches])) if searches else 0.0,
        "tree/first_failure_mean": float(np.mean(failed)) if failed else 0.0,
        "tree/recovered": sum(len(steps) for c in credits for steps in c.recovered),
        "tree/mixed": float(np.mean(mixed)),
    }
    row |= {f"rollout/root_success/{family}": float(np.mean(values)) for family, values in roots.items()}
    row |= {f"status/{s.value}": results.count(s) / max(len(results), 1) for s in Status}
    return row


def dump(path, step: int, recipe: Recipe, trees, credits, environment: Environment, private: bool = False) -> None:
    """Writes the batch's trees, one JSON line each, atomically; with `private` also those of tasks not to be spread."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    decode = environment.chat.tokenizer.decode
    with partial.open("w", encoding="utf-8") as file:
        for tree, credit in zip(trees, credits, strict=True):
            if tree.task.meta.get("private") and not private:
                continue
            family = environment.families[tree.task.family]
            line = tree_to_json(tree, decode_token=lambda i: decode([i]), credit=credit, family=family)
            file.write(json.dumps({**line, "rl_step": step, "recipe": recipe.name}) + "\n")
    partial.replace(path)


def reference_logprobs(logprobs: Callable[[Params, Batch], jax.Array], params: Params) -> Callable[[Batch], np.ndarray]:
    """Log-probabilities [n_micro, B, T] of a batch under fixed parameters, by the trainer's own graph."""
    fn = jax.jit(lambda p, batch: jax.lax.map(lambda micro: logprobs(p, micro), batch))
    return lambda batch: np.asarray(fn(params, batch))
