"""The one loss of every policy-gradient algorithm here.

The host sends masks and indices; `error_localized` turns them into per-token advantages, clip bounds and weights inside
the jitted function, so an ablation over their scalars compiles nothing new. Everything is a sum over tokens whose
weights already hold the normalisation: micro-batches and shards only add.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.logprob import SummedLoss, summed_loss, token_logprobs
from elpo_jax.model.transformer import Params, apply
from elpo_jax.policy.batch import Batch

# Traced float32 numbers: those of `Recipe.scalars` and `temperature`.
Scalars = Mapping[str, jax.Array | float]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Batch, Scalars], tuple[jax.Array, Metrics]]

LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside every clip range and far inside float32


def error_localized(batch: Batch, scalars: Scalars) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the first irrecoverable step t_crit of each attempt does to its tokens.

        A       = lambda A_branch + (1 - lambda) A_trajectory                         (eq. 10)
        eps_low = eps_low + eps_elc  from t_crit to the end of the attempt             (eq. 11-12)
        w       = weight * critical_weight  on t_crit itself                           (1 in the paper)

    Args:
      batch: `steps`, `first_failure`, `branch`, `trajectory` and `weight` are read.
      scalars: `lambda_tree`, `eps_low`, `eps_high`, `eps_elc` and `critical_weight` are read.

    Returns:
      advantage, low, high, weight, each float32 [B, T]: the ratio is clipped to [1 - low, 1 + high].
    """
    failed = batch.first_failure > 0
    after = failed & (batch.steps >= batch.first_failure)
    critical = failed & (batch.steps == batch.first_failure)
    advantage = scalars["lambda_tree"] * batch.branch + (1 - scalars["lambda_tree"]) * batch.trajectory
    low = scalars["eps_low"] + jnp.where(after, scalars["eps_elc"], 0.0)
    high = jnp.full_like(low, scalars["eps_high"])
    weight = batch.weight * jnp.where(critical, scalars["critical_weight"], 1.0)
    return advantage, low, high, weight


def policy_loss(logp: jax.Array, entropy: jax.Array, batch: Batch, scalars: Scalars) -> tuple[jax.Array, Metrics]:
    """Clipped policy-gradient loss with per-token bounds, as a sum over the model's tokens of all attempts.

        r = exp(logp - behaviour_logp)
        J = min(r A, clip(r, 1 - low, 1 + high) A)            (eq. 2, with the bounds of eq. 11-12)
        J = max(J, dual_clip A)  where A < 0, if dual_clip > 0
        L = - sum w J + kl sum weight (r_ref - log r_ref - 1),  r_ref = exp(reference_logp - logp)

    Environment and padding tokens contribute exactly nothing, whatever the arrays hold there (also inf and nan).

    Args:
      logp: float32 [B, T], log-probability of each token under the policy at the sampling temperature.
      entropy: float32 [B, T], nats; a metric only.
      batch: See `Batch`.
      scalars: All but `temperature` are read.

    Returns:
      The loss, and float32 sums over the model's tokens, to be added up over micro-batches and divided by `tokens`. A
      token that several attempts share counts once for each of them, as it would if each stood in a row of its own.
      Those whose name ends in `_max` are maxima instead:
        tokens, critical (tokens of first irrecoverable steps), positive and negative (tokens by the sign of A);
        clip_low, clip_high: tokens whose gradient the clip removes; dual_clip: likewise by the dual clip;
        relaxed_only: tokens whose gradient eps_elc alone keeps, A < 0 and 1 - eps_low - eps_elc <= r < 1 - eps_low;
        ratio_mean, ratio_deviation_max: r, and |r - 1|;
        mismatch_mean, mismatch_max: |logp - behaviour_logp|, the sampler against the trainer at the first update;
        entropy; kl: the k3 estimate to the reference, 0 where the kl coefficient is 0.
    """
    assert logp.shape == entropy.shape == batch.steps.shape, (logp.shape, entropy.shape, batch.steps.shape)
    mask = batch.steps > 0
    # Everything is made safe before the arithmetic: a `where` after it would still multiply 0 by nan in the gradient.
    batch = jax.tree.map(lambda values: jnp.where(mask, values, 0), batch)
    logp, entropy = jnp.where(mask, logp, 0.0), jnp.where(mask, entropy, 0.0)
    advantage, low, high, weight = error_localized(batch, scalars)

    ratio = jnp.exp(_clamp(logp - batch.behaviour_logp))
    objective = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    capped = (advantage < 0) & (scalars["dual_clip"] > 0) & (ratio > scalars["dual_clip"])
    objective = jnp.where(capped, scalars["dual_clip"] * advantage, objective)
    log_reference = _clamp(batch.reference_logp - logp)
    kl = jnp.where(mask & (scalars["kl"] > 0), jnp.exp(log_reference) - log_reference - 1, 0.0)
    loss = -jnp.sum(weight * objective) + scalars["kl"] * jnp.sum(batch.weight * kl)

    mismatch = jnp.abs(logp - batch.behaviour_logp)
    pushed_down = advantage < 0
    sums = {
        "tokens": mask,
        "critical": mask & (batch.first_failure > 0) & (batch.steps == batch.first_failure),
        "positive": advantage > 0,
        "negative": pushed_down,
        "clip_low": pushed_down & (ratio < 1 - low),
        "clip_high": (advantage > 0) & (ratio > 1 + high),
        "dual_clip": capped,
        "relaxed_only": pushed_down & (ratio >= 1 - low) & (ratio < 1 - scalars["eps_low"]),
        "ratio_mean": ratio,
        "mismatch_mean": mismatch,
        "entropy": entropy,
        "kl": kl,
    }
    metrics = {name: jnp.sum(batch.leaves * values, dtype=jnp.float32) for name, values in sums.items()}
    metrics["ratio_deviation_max"] = jnp.max(jnp.where(mask, jnp.abs(ratio - 1), 0.0))
    metrics["mismatch_max"] = jnp.max(mismatch)
    return loss, jax.lax.stop_gradient(metrics)


def _clamp(log_ratio: jax.Array) -> jax.Array:
    """Keeps a ratio from overflowing; beyond the limits it has no gradient."""
    return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def logprobs(
    config: ModelConfig, params: Params, batch: Batch, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Log-probability at `temperature` and entropy at temperature 1 of every token of a batch, float32 [B, T] each."""
    hidden, _ = apply(config, params, batch.tokens, batch.positions, ends=batch.ends)
    return token_logprobs(config, params, hidden, batch.tokens, temperature, batch.previous)


def make_logprobs(config: ModelConfig, temperature: float) -> Callable[[Params, Batch], jax.Array]:
    """(params, batch) -> log-probabilities float32 [B, T] by the trainer's graph, as for `Batch.reference_logp`."""
    return lambda params, batch: logprobs(config, params, batch, temperature)[0]


def make_loss(config: ModelConfig) -> LossFn:
    """`policy_loss` as a function (params, batch [B, T], scalars) -> (loss, metrics), for the train step."""
    return lambda params, batch, scalars: summed(policy_loss, config, params, batch, scalars["temperature"], scalars)


def summed(
    fn: SummedLoss, config: ModelConfig, params: Params, batch: Batch, temperature: jax.Array | float, scalars: Scalars
) -> tuple[jax.Array, Metrics]:
    """`fn(logp, entropy, batch, scalars)`, a sum over the model's tokens, of the log-probabilities of a batch."""
    hidden, _ = apply(config, params, batch.tokens, batch.positions, ends=batch.ends)
    model = batch.steps > 0
    return summed_loss(fn, config, params, hidden, batch.tokens, temperature, batch, scalars, batch.previous, model)
