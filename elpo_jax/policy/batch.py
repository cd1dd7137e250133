"""From trees to the `Batch` that the jitted loss reads.

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
from elpo_jax.trees.trajectory import Author, Segment, Trajectory
from elpo_jax.trees.tree import RolloutTree

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Batch:
    """Rows of packed trees, aligned to the token itself.

    A tree is laid out once, in depth-first order, and each of its tokens stands there once, however many attempts share
    it. So the tokens that descend from a token follow it without a gap, and the one number `ends` says which queries
    see it: query q sees key k iff k <= q < ends[k]. A lone trajectory is a tree of one branch.

    `logp[b, t]` is the log-probability of `tokens[b, t]` given what precedes it in its branch; the first token of a
    tree has no prediction and is never in the loss. Credit is a property of the tree's nodes, the irrecoverable steps
    too: attempts that share a token agree on whether it lies before, on or behind one. So a token's loss is one term,
    times the summed weight of its attempts.
    """

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T], number of tokens that precede it in its branch; -1 = padding
    ends: Array  # int32 [B, T], one past the column of its last descendant, or of itself; 0 = padding
    previous: Array  # int32 [B, T], column of the token that precedes it in its branch; -1 where there is none
    steps: Array  # int32 [B, T], 1-based step of a model token, 0 elsewhere: the loss mask
    first_failure: Array  # int32 [B, T], first irrecoverable step, on that step and behind it; 0 = none so far
    behaviour_logp: Array  # float32 [B, T], under the sampling policy at the sampling temperature
    branch: Array  # float32 [B, T], branch advantage of the token's step (paper eq. 7)
    trajectory: Array  # float32 [B, T], trajectory advantage of the token's step (paper eq. 8-9)
    leaves: Array  # int32 [B, T], attempts whose model token it is; 0 off the mask
    weight: Array  # float32 [B, T], their summed normalisation over the global batch; 0 off the mask
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
      segments: What the tokens are made of. Trajectories that begin with the very same `Segment` objects share their
        tokens in a packed row; an example without segments shares none.
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
    segments: tuple[Segment, ...] = ()
    weight: np.ndarray | None = None

    def __post_init__(self):
        for name in ("tokens", "steps", "behaviour_logp", "branch", "trajectory", "leaves"):
            values = getattr(self, name)
            assert values.shape == (len(self.tokens),), (name, values.shape, len(self.tokens))
        assert not self.segments or sum(map(len, self.segments)) == len(self.tokens)
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
                segments=trajectory.segments(),
            )
        )
    return examples


def demonstration_example(trajectory: Trajectory, task: str = "demonstration") -> Example:
    """The example of a transcript to imitate: no advantages, no behaviour policy, and weight 1 on model tokens.

    Supervised batches are drawn from rows that were packed once, so their loop divides by the tokens of each batch.
    Each transcript stays a chain of its own.

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
    such a token weighs in those d leaves, and every trajectory keeps its 1/N. All copies of a token have the same loss.

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


def pack(examples: Sequence[Example], length: int, share: bool = True) -> Batch:
    """Packs examples into as few rows as first-fit-decreasing needs; ties keep their order, so it is deterministic.

    Examples that begin with the same segments are laid out as one tree, with the shared tokens once. Loss and gradient
    are those of the examples one by one. A tree that is longer than a row is cut into several, each of as many
    neighbouring branches as fit. Sharing never takes more rows: where large trees leave more gaps than they save, the
    examples are laid out one by one.

    Args:
      examples: Weighted examples.
      length: T, tokens of a row.
      share: False lays out every example by itself, to compare with.

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
    trees = [lay_out(group) for group in (trees_of(examples, length) if share else [[e] for e in examples])]
    packed = first_fit_decreasing([tree.tokens.shape[1] for tree in trees], length)
    if share and len(packed) > len(first_fit_decreasing([len(example.tokens) for example in examples], length)):
        return pack(examples, length, share=False)
    batch = empty(len(packed), length)
    for row, members in enumerate(packed):
        start = 0
        for member in members:
            tree = trees[member]
            previous = np.where(tree.previous >= 0, tree.previous + start, -1)
            tree = tree.replace(ends=tree.ends + start, previous=previous)
            end = start + tree.tokens.shape[1]
            for field in dataclasses.fields(batch):
                getattr(batch, field.name)[row, start:end] = getattr(tree, field.name)[0]
            start = end
    return batch


def trees_of(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Groups examples that share their first segments, each group in depth-first order and of at most T tokens.

    Args:
      examples: None longer than a row.
      length: T.
    """
    # Every prefix of segments is numbered when it is first seen; sorted by these numbers, branches follow their trunk.
    numbers: dict[tuple[int, ...], int] = {}

    def path(example: Example) -> list[int]:
        keys = _keys(example)
        return [numbers.setdefault(keys[: depth + 1], len(numbers)) for depth in range(len(keys))]

    groups: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=path):
        common = _common(groups[-1][-1], example) if groups else 0
        new = len(example.tokens) - sum(map(len, example.segments[:common]))
        if not common or new > room:
            groups.append([])
            new, room = len(example.tokens), length
        groups[-1].append(example)
        room -= new
    return groups


def lay_out(examples: Sequence[Example]) -> Batch:
    """One tree as a row without padding, numpy [1, tokens].

    Args:
      examples: Weighted, in depth-first order. Each shares at least its first segment with the one before it.

    Raises:
      ValueError: If two of them disagree on a token that they share.
    """
    shared = [0, *(_common(a, b) for a, b in itertools.pairwise(examples))]
    cuts = [sum(map(len, e.segments[:common])) for e, common in zip(examples, shared, strict=True)]
    batch = empty(1, sum(len(e.tokens) - cut for e, cut in zip(examples, cuts, strict=True)))
    row = jax.tree.map(lambda values: values[0], batch)  # views
    weight = np.zeros(row.weight.shape, np.float64)
    columns = np.zeros(0, np.int32)  # of the current branch
    cursor = 0
    for example, cut in zip(examples, cuts, strict=True):
        row.ends[columns[cut:]] = cursor  # what the former branch does not share with this one ends here
        new = np.arange(cursor, cursor + len(example.tokens) - cut)
        columns = np.concatenate([columns[:cut], new])
        cursor += len(new)
        failed = (example.first_failure > 0) & (example.steps >= example.first_failure)
        credit = {
            name: getattr(example, name) for name in ("tokens", "steps", "behaviour_logp", "branch", "trajectory")
        }
        for name, values in (credit | {"first_failure": failed * example.first_failure}).items():
            getattr(row, name)[new] = values[cut:]
            if not np.array_equal(getattr(row, name)[columns[:cut]], values[:cut]):
                raise ValueError(
                    f"{example.task}: two attempts that share a step disagree on its {name}, so it cannot be computed "
                    "once for both: give credit to nodes of the tree, or set rl.share_prefixes=False"
                )
        row.positions[new] = np.arange(cut, len(columns))
        row.previous[columns[1:]] = columns[:-1]
        row.leaves[columns] += example.steps > 0
        weight[columns] += example.weight
    row.ends[columns] = cursor
    row.weight[:] = weight
    return batch


def _keys(example: Example) -> tuple[int, ...]:
    """What tells the segments of an example from others: they are compared by identity, never by their tokens."""
    return tuple(map(id, example.segments)) or (id(example),)


def _common(a: Example, b: Example) -> int:
    """Number of leading segments that two examples share."""
    pairs = zip(a.segments, b.segments, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))


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
    zeros = dict.fromkeys(("tokens", "ends", "steps", "first_failure", "leaves"), 0)
    integers = {
        name: np.full((rows, length), value, np.int32)
        for name, value in (zeros | {"positions": -1, "previous": -1}).items()
    }
    floats = {
        name: np.zeros((rows, length), np.float32)
        for name in ("behaviour_logp", "branch", "trajectory", "weight", "reference_logp")
    }
    return Batch(**integers, **floats)


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
