"""Log-probabilities and entropies of tokens, without ever holding the logits of a whole batch.

The same arithmetic serves the sampler (one token's logits at hand) and the trainer (hidden states in chunks), so the
probability ratio at the first update is one up to rounding. Letters: B rows, T tokens, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.transformer import Params, unembed


def logprob_and_entropy(logits: jax.Array, tokens: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given tokens at a temperature, and entropy of the whole distribution at temperature 1.

    Args:
      logits: float32 [..., V], at temperature 1.
      tokens: int32 [...].
      temperature: Scalar > 0 that divides the logits for the log-probability.

    Returns:
      logp float32 [...] and entropy float32 [...] (paper eq. 3), both in nats. No gradient flows through the entropy,
      which is a measurement.
    """
    scaled = logits / temperature
    # A masked sum, not a gather: its gradient is elementwise, and it needs no exchange where V is sharded.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], scaled, 0.0), axis=-1)
    logp = chosen - jax.nn.logsumexp(scaled, axis=-1)
    fixed = jax.lax.stop_gradient(logits)
    total = jax.nn.logsumexp(fixed, axis=-1)
    entropy = total - jnp.sum(jnp.exp(fixed - total[..., None]) * fixed, axis=-1)
    return logp, entropy


def token_logprobs(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array | float,
    previous: jax.Array | None = None,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token given what precedes it in its branch, aligned to the token itself.

    The hidden state of the token before it predicts a token. The logits exist for [B, chunk, V] at a time and are
    computed again in the backward pass, so memory does not grow with T * V.

    Args:
      config: The network.
      params: Its parameters (the head is read).
      hidden: [B, T, D], from `apply`.
      tokens: int32 [B, T].
      temperature: Scalar > 0, traced; divides the logits exactly as it divided the sampler's.
      previous: int32 [B, T], column of the token before each in its branch; None where each row is one sequence, so
        that hidden state t-1 predicts token t.
      chunk: Columns whose logits exist at once.

    Returns:
      logp and entropy, float32 [B, T], as in `logprob_and_entropy`; column 0 is 0. In a packed row the first token of
      a tree gets a number that means nothing: leave it out of the loss.
    """
    rows, length, width = hidden.shape
    if tokens.shape != (rows, length):
        raise ValueError(f"tokens must be [B, T] = {(rows, length)}, not {tokens.shape}")
    if previous is None:
        hidden = jnp.roll(hidden, 1, axis=1)
    else:  # several branches may begin behind one token: its state is read by each of them
        hidden = jnp.take_along_axis(hidden, previous[..., None], axis=1)
    chunk = min(chunk, length)
    count = -(-length // chunk)
    padding = ((0, 0), (0, count * chunk - length))
    targets = jnp.pad(tokens, padding).reshape(rows, count, chunk).swapaxes(0, 1)
    inputs = jnp.pad(hidden, (*padding, (0, 0))).reshape(rows, count, chunk, width).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(head, inputs, targets):
        return logprob_and_entropy(unembed(config, head, inputs), targets, temperature)

    name = "embed" if config.tied else "head"
    head = {name: params[name]}
    _, outputs = jax.lax.scan(lambda carry, xs: (carry, one(head, *xs)), None, (inputs, targets))
    logp, entropy = (x.swapaxes(0, 1).reshape(rows, count * chunk)[:, :length].at[:, 0].set(0.0) for x in outputs)
    return logp, entropy
