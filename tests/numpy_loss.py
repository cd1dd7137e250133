"""The policy loss and its gradient in float64 NumPy, token by token, written from the paper's equations.

It shares no arithmetic with the package: no packing, no weights from `normalise`, no masks; every token is one case
distinction. Random trajectories to compare on are here too.
"""

import math

import numpy as np

from elpo_jax.policy.batch import Example
from elpo_jax.policy.recipes import Recipe


def loss_and_gradient(
    examples: list[Example],
    logp: list[np.ndarray],
    recipe: Recipe,
    constant: float,
    reference: list[np.ndarray] | None = None,
) -> tuple[float, list[np.ndarray]]:
    """Loss of a batch of trajectories and its gradient by every token's log-probability."""
    shares = [_shares(example, recipe) for example in examples]
    everything = sum(sum(share) for share in shares)
    loss, gradients = 0.0, []
    for i, example in enumerate(examples):
        gradient = np.zeros(len(example.tokens))
        for t, step in enumerate(example.steps):
            if step == 0:
                continue
            weight = (
                shares[i][t]
                / {
                    "sequence": len(examples) * sum(shares[i]),
                    "token": everything,
                    "constant": len(examples) * constant,
                }[recipe.normalisation]
            )
            value, slope = _surrogate(example, t, float(logp[i][t]), recipe)
            if recipe.critical_weight != 1.0 and example.first_failure == step:
                value, slope = recipe.critical_weight * value, recipe.critical_weight * slope
            loss -= weight * value
            gradient[t] -= weight * slope
            if recipe.kl > 0:
                difference = float(reference[i][t]) - float(logp[i][t])
                loss += weight * recipe.kl * (math.exp(difference) - difference - 1)
                gradient[t] += weight * recipe.kl * (1 - math.exp(difference))
        gradients.append(gradient)
    return loss, gradients


def weighted_loss(example: Example, logp: np.ndarray, reference: np.ndarray, recipe: Recipe) -> float:
    """The loss of one trajectory whose tokens already have their weights."""
    loss = 0.0
    for t in np.flatnonzero(example.steps):
        value, _ = _surrogate(example, t, float(logp[t]), recipe)
        factor = recipe.critical_weight if example.first_failure == example.steps[t] else 1.0
        difference = float(reference[t]) - float(logp[t])
        penalty = recipe.kl * (math.exp(difference) - difference - 1) if recipe.kl else 0.0
        loss += float(example.weight[t]) * (penalty - factor * value)
    return loss


def _shares(example: Example, recipe: Recipe) -> list[float]:
    """How much each token counts: nothing, one, or its share among the leaves that have it."""
    once = recipe.prefix_weight == "once"
    return [0.0 if s == 0 else 1 / int(d) if once else 1.0 for s, d in zip(example.steps, example.leaves, strict=True)]


def _surrogate(example: Example, t: int, logp: float, recipe: Recipe) -> tuple[float, float]:
    """min(r A, clip(r) A) of one token, with the dual clip, and its derivative by logp (eq. 2, 10, 11, 12)."""
    ratio = math.exp(logp - float(example.behaviour_logp[t]))
    advantage = recipe.lambda_tree * float(example.branch[t]) + (1 - recipe.lambda_tree) * float(example.trajectory[t])
    lowest = 1 - recipe.eps_low
    if example.first_failure != 0 and example.steps[t] >= example.first_failure:
        lowest = 1 - (recipe.eps_low + recipe.eps_elc)
    highest = 1 + recipe.eps_high
    if advantage > 0 and ratio > highest:
        return highest * advantage, 0.0
    if advantage < 0 and ratio < lowest:
        return lowest * advantage, 0.0
    if advantage < 0 and 0 < recipe.dual_clip < ratio:
        return recipe.dual_clip * advantage, 0.0
    return ratio * advantage, ratio * advantage


def random_example(rng: np.random.Generator, first_token: int) -> Example:
    """A trajectory of 1 to 4 steps with random everything; its token ids count up from `first_token`."""
    count = int(rng.integers(1, 5))
    steps = [0] * int(rng.integers(1, 4))
    for step in range(1, count + 1):
        steps += [step] * int(rng.integers(1, 5))
        steps += [0] * int(rng.integers(0, 3)) if step < count else []
    steps = np.array(steps, np.int32)
    length = len(steps)
    per_step = np.concatenate([np.zeros((2, 1)), rng.normal(size=(2, count))], axis=1).astype(np.float32)
    leaves = np.concatenate([[1], -np.sort(-rng.integers(1, 5, count))]).astype(np.int32)
    return Example(
        task=f"random/{first_token}",
        tokens=np.arange(first_token, first_token + length, dtype=np.int32),
        steps=steps,
        first_failure=int(rng.integers(0, count + 1)),
        behaviour_logp=np.where(steps > 0, -rng.uniform(0.05, 3.0, length), 0).astype(np.float32),
        branch=per_step[0][steps],
        trajectory=per_step[1][steps],
        leaves=leaves[steps],
    )


def random_examples(rng: np.random.Generator, count: int) -> list[Example]:
    """Trajectories whose token ids are all different, so that a token id finds its place after packing."""
    examples, first = [], 0
    for _ in range(count):
        examples.append(random_example(rng, first))
        first += len(examples[-1].tokens)
    return examples
