"""From trajectories to the `Batch` that the jitted loss reads.

Packing and weighting happen on the host in numpy; only arrays cross to the device, and every sum that the loss needs is
already inside `Batch.weight`, so micro-batches and shards only ever add.

Letters in shapes, here and in every other module: B rows, T tokens of a row, L layers, H heads, K kv-heads, D model
width, N head width, F mlp width, V vocabulary, S cache length.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from elpo_jax.policy.credit import Credit
from elpo_jax.policy.recipes import Recipe
from elpo_jax.trees.trajectory import Author, Trajectory
from elpo_jax.trees.tree import RolloutTree

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Batch:
    """Rows of packed trajectories, aligned to the token itself.

    `logp[b, t]` is the log-probability of `tokens[b, t]` given what precedes it in its segment; the first token of a
    segment has no prediction and is never in the loss.
    """

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T], restart at 0 for each packed trajectory; -1 = padding
    segments: Array  # int32 [B, T], number of the packed trajectory within its row, from 1; 0 = padding
    steps: Array  # int32 [B, T], 1-based step of a model token, 0 elsewhere: the loss mask
    first_failure: Array  # int32 [B, T], first irrecoverable step of the token's trajectory; 0 = none
    behaviour_logp: Array  # float32 [B, T], under the sampling policy at the sampling temperature
    branch: Array  # float32 [B, T], branch advantage of the token's step (paper eq. 7)
    trajectory: Array  # float32 [B, T], trajectory advantage of the token's step (paper eq. 8-9)
    weight: Array  # float32 [B, T], the normalisation over the global batch; 0 off the mask
    reference_logp: Array  # float32 [B, T], under the KL reference at the sampling temperature; zeros where kl = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One trajectory as arrays over its T tokens.

    Attributes:
      task: Id of the task, for error messages.
      tokens: int32 [T].
      steps: int32 [T], 1-based step of each model token, 0 elsewhere.
      first_failure: First irrecoverable step; 0 = none.
      behaviour_logp: float32 [T].
      branch: float32 [T], branch advantage of each model token's step.
      trajectory: float32 [T], trajectory advantage likewise.
      leaves: int32 [T], number of leaves of the tree that share the token (1 for demonstrations).
      weight: float32 [T] once `normalise` has seen the whole batch, None before.
    """

    task: str
    tokens: np.ndarray
    steps: np.ndarray
    first_failure: int
    behaviour_logp: np.ndarray
    branch: np.ndarray
    trajectory: np.ndarray
    leaves: np.ndarray
    weight: np.ndarray | None = None

    def __post_init__(self):
        for name in ("tokens", "steps", "behaviour_logp", "branch", "trajectory", "leaves"):
            values = getattr(self, name)
            assert values.shape == (len(self.tokens),), (name, values.shape, len(self.tokens))
        if len(self.tokens) and self.steps[0]:
            raise ValueError(
                f"{self.task}: the first token is the model's, but nothing predicts it; begin every trajectory with a "
                "prompt of at least one token"
            )


def policy_examples(tree: RolloutTree, credit: Credit) -> list[Example]:
    """One example per leaf of a tree, with the advantages of the node that each token belongs to.

    Args:
      tree: A finished tree, whose every model token carries the sampler's log-probability.
      credit: What `policy.credit.assign` made of it.

    Returns:
      The leaves in rollout order, without weights (see `normalise`).

    Raises:
      ValueError: If a model segment has no log-probabilities.
    """
    shared_by = np.array([len(node.leaves) for node in tree.nodes()])
    examples = []
    for number, leaf in enumerate(tree.leaves):
        trajectory = leaf.trajectory
        if any(s.author is Author.MODEL and s.logprobs is None for s in trajectory.segments()):
            raise ValueError(
                f"{tree.task.id}: leaf {number} has model tokens without log-probabilities; only sampled trajectories "
                "can train a policy by ratio, use demonstration_example for the others"
            )
        path = np.array(tree.path(number), np.int64)
        steps = trajectory.step_ids()

        def per_token(values: np.ndarray, elsewhere: float, dtype, path=path, steps=steps) -> np.ndarray:
            """Gathers a value per node to a value per token, through the token's step."""
            return np.concatenate([[elsewhere], values[path]])[steps].astype(dtype)

        examples.append(
            Example(
                task=tree.task.id,
                tokens=trajectory.ids(),
                steps=steps,
                first_failure=int(credit.first_failure[number]),
                behaviour_logp=trajectory.logprobs(),
                branch=per_token(credit.branch, 0.0, np.float32),
                trajectory=per_token(credit.trajectory, 0.0, np.float32),
                leaves=per_token(shared_by, 1, np.int32),
            )
        )
    return examples


def demonstration_example(trajectory: Trajectory, task: str = "demonstration") -> Example:
    """The example of a transcript to imitate: no advantages, no behaviour policy, and weight 1 on model tokens.

    Supervised batches are drawn from rows that were packed once, so their loop divides by the tokens of each batch.

    Args:
      trajectory: The transcript.
      task: Id of its task, for error messages.
    """
    steps = trajectory.step_ids()
    zeros = np.zeros(len(steps), np.float32)
    return Example(
        task=task,
        tokens=trajectory.ids(),
        steps=steps,
        first_failure=0,
        behaviour_logp=zeros,
        branch=zeros,
        trajectory=zeros,
        leaves=np.ones(len(steps), np.int32),
        weight=(steps > 0).astype(np.float32),
    )


def normalise(examples: Sequence[Example], recipe: Recipe, constant: float) -> list[Example]:
    """Weights over the global batch of one optimizer step.

    With m = 1 at model tokens and 0 elsewhere, N examples, and sums over the tokens t of example i,
    `recipe.normalisation` is one of

    - "sequence": (1/N) m_it / sum_t m_it, the mean over trajectories of token means (paper eq. 1);
    - "token": m_it / sum_it m_it, the mean over all tokens (DAPO);
    - "constant": m_it / (N * constant), which favours no length (Dr.GRPO).

    A prefix shared by d leaves of a tree stands in d examples. `recipe.prefix_weight` "per_leaf" counts it d times, as
    eq. 1 does. "once" puts m = 1/d wherever tokens are counted, in the sums above too: under "token" and "constant" the
    copies of a token weigh together exactly what a token of a single leaf weighs; under "sequence", the mean of what
    such a token weighs in those d leaves, and every trajectory keeps its 1/N. The copies have the same loss where the
    first failure is a property of the node (`critical="first_wrong"`); where only searched attempts have one, some
    copies can lie behind it and others not, and the token's loss is the mean of both.

    Args:
      examples: All examples of the optimizer step, whole trees; also those that `drop_flat` removes afterwards.
      recipe: Its `normalisation` and `prefix_weight`.
      constant: Tokens that "constant" divides by, such as the longest possible trajectory; the others ignore it.

    Returns:
      The same examples in the same order, with weights.

    Raises:
      ValueError: If there is no model token at all.
    """
    counts = [_counts(example, recipe.prefix_weight) for example in examples]
    total = sum(float(count.sum()) for count in counts)
    if not total:
        raise ValueError(f"no model token in a batch of {len(examples)} trajectories: there is nothing to train on")
    weighted = []
    for example, count in zip(examples, counts, strict=True):
        match recipe.normalisation:
            case "sequence":
                divisor = len(examples) * (count.sum() or 1.0)  # without model tokens all counts are 0
            case "token":
                divisor = total
            case "constant":
                divisor = len(examples) * constant
        weighted.append(dataclasses.replace(example, weight=(count / divisor).astype(np.float32)))
    return weighted


def _counts(example: Example, prefix_weight: str) -> np.ndarray:
    """How much each token counts, float64 [T]: 0 for the environment's, else 1 or 1/d."""
    counts = (example.steps > 0).astype(np.float64)
    return counts / example.leaves if prefix_weight == "once" else counts


def drop_flat(examples: Sequence[Example], kl: float) -> list[Example]:
    """Leaves out the examples whose advantages are all zero, such as those of a tree with one outcome.

    Call it after `normalise`: they stay counted in the normaliser, so the gradient is exactly that of the whole batch,
    and only their forward and backward passes are saved. With kl > 0 they do have a gradient, and all are kept.
    """
    return [e for e in examples if kl or np.any(e.branch[e.steps > 0]) or np.any(e.trajectory[e.steps > 0])]


def pack(examples: Sequence[Example], length: int) -> Batch:
    """Packs examples into as few rows as first-fit-decreasing needs; ties keep their order, so it is deterministic.

    Args:
      examples: Weighted examples.
      length: T, tokens of a row.

    Returns:
      A batch of numpy arrays [rows, T].

    Raises:
      ValueError: If an example is longer than a row, or has no weights.
    """
    for example in examples:
        if len(example.tokens) > length:
            raise ValueError(
                f"{example.task}: a trajectory of {len(example.tokens)} tokens does not fit into rows of {length}; "
                "raise the row length, or lower the tokens per turn or the steps that an attempt may take"
            )
        if example.weight is None:
            raise ValueError(f"{example.task}: the example has no weights; call normalise on the whole batch first")
    packed = first_fit_decreasing([len(example.tokens) for example in examples], length)
    batch = empty(len(packed), length)
    for row, members in enumerate(packed):
        start = 0
        for segment, member in enumerate(members, 1):
            example = examples[member]
            here = (row, slice(start, start + len(example.tokens)))
            for name in ("tokens", "steps", "first_failure", "behaviour_logp", "branch", "trajectory", "weight"):
                getattr(batch, name)[here] = getattr(example, name)
            batch.positions[here] = np.arange(len(example.tokens))
            batch.segments[here] = segment
            start += len(example.tokens)
    return batch


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the items in each bin: longest first, each into the first bin with room; none exceeds the capacity."""
    bins: list[list[int]] = [[] for _ in sizes]
    room = np.full(len(sizes), capacity)  # a bin that is not yet open has room for anything
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = int(np.argmax(room >= sizes[item]))
        bins[place].append(item)
        room[place] -= sizes[item]
    return [members for members in bins if members]


def empty(rows: int, length: int) -> Batch:
    """A batch of padding only, numpy [rows, length]."""
    integers = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segments", "steps", "first_failure")}
    floats = {
        name: np.zeros((rows, length), np.float32)
        for name in ("behaviour_logp", "branch", "trajectory", "weight", "reference_logp")
    }
    return Batch(positions=np.full((rows, length), -1, np.int32), **integers, **floats)


def stack(batch: Batch, micro_rows: int) -> Batch:
    """Splits the rows into micro-batches and pads with empty rows, which add nothing to any sum.

    The number of micro-batches M is the fewest among 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that hold the rows: a run
    compiles its train step for few shapes, and less than a third of the micro-batches are padding.

    Args:
      batch: numpy arrays [rows, T].
      micro_rows: B, rows of a micro-batch.

    Returns:
      A batch of numpy arrays [M, B, T].
    """
    rows, length = batch.tokens.shape
    needed = max(1, -(-rows // micro_rows))
    count = next(n for k in itertools.count() for n in (2**k, 3 * 2**k // 2) if n >= needed)
    padding = empty(count * micro_rows - rows, length)
    return jax.tree.map(
        lambda values, pad: np.concatenate([values, pad]).reshape(count, micro_rows, length), batch, padding
    )
