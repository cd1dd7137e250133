"""Supervised cold start: cross-entropy on the model's tokens of multi-turn demonstrations.

Packed rows are drawn by a permutation per epoch that is a function of (seed, epoch), so the step number alone says what
was seen and a resumed run sees the same rows.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from elpo_jax.config import SftConfig
from elpo_jax.model.config import ModelConfig
from elpo_jax.policy.batch import Batch
from elpo_jax.policy.loss import LossFn, Metrics, Scalars, summed
from elpo_jax.report.log import MetricsLog
from elpo_jax.report.progress import Progress
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.state import TrainState


def make_sft_loss(model: ModelConfig) -> LossFn:
    """Cross-entropy of the model's tokens at temperature 1: - sum weight logp; no scalars are read."""

    return lambda params, batch, scalars: summed(_imitation, model, params, batch, 1.0, {})


def _imitation(logp: jax.Array, entropy: jax.Array, batch: Batch, scalars: Scalars) -> tuple[jax.Array, Metrics]:
    mask = batch.steps > 0
    loss = -jnp.sum(batch.weight * jnp.where(mask, logp, 0.0))
    return loss, {"entropy": jnp.sum(batch.weight * jnp.where(mask, entropy, 0.0))}


def rows_at(step: int, rows: int, available: int, seed: int) -> np.ndarray:
    """Indices int64 [rows] of the packed rows that optimizer step `step` (0-based) sees; every row once per epoch."""
    where = np.arange(step * rows, (step + 1) * rows)
    epochs = {e: np.random.default_rng((seed, int(e))).permutation(available) for e in np.unique(where // available)}
    return np.array([epochs[w // available][w % available] for w in where])


def train_sft(
    config: SftConfig,
    state: TrainState,
    step_fn: Callable,
    data: Batch,
    *,
    start: int,
    seed: int,
    meta: dict,
    checkpoints: Checkpoints,
    log: MetricsLog,
) -> TrainState:
    """Runs optimizer steps `start` to `config.steps` and returns the last state, which is also saved.

    Args:
      config: The cold start's numbers.
      state: State after `start` steps.
      step_fn: From `make_train_step`, with the SFT loss.
      data: Packed demonstrations, numpy [N, T].
      start: Steps already done.
      seed: Seeds the permutations.
      meta: Saved with every checkpoint, beside "cursor", the rows seen so far (see `rows_at`).
      checkpoints: Where to save.
      log: Gets one row per step.
    """
    available = data.tokens.shape[0]
    with Progress("cold start (SFT)", config.steps, start=start) as progress:
        for step in range(start, config.steps):
            began = time.perf_counter()
            chosen = rows_at(step, config.rows, available, seed)
            batch = jax.tree.map(lambda x, i=chosen: x[i].reshape(-1, config.micro_rows, *x.shape[1:]), data)
            tokens = int((batch.steps > 0).sum())
            batch = batch.replace(weight=(batch.steps > 0).astype(np.float32) / max(tokens, 1))
            state, metrics = step_fn(state, batch, {})
            row = {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - began
            row |= {"tokens": tokens, "tokens_per_s": (batch.positions >= 0).sum() / seconds, "seconds/step": seconds}
            log.write({"step": step + 1, **row})
            progress.update(step + 1, tokens=(batch.positions >= 0).sum(), loss=row["loss"])
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                log.sync()
                checkpoints.save(step + 1, state, meta | {"cursor": (step + 1) * config.rows})
    return state
