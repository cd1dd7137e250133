"""Benches of the update: trees laid out once against their attempts one by one, and the share of the matmul peak.

FLOPs are counted as 6 per parameter and token, without the lookup in the embedding and, of the output head, for the
model's tokens only; and 12 per visible pair of query and key, layer and unit of the width H * N. So causal attention is
counted halved, and of a tree a token's ancestors only. What is computed beyond that is not counted: masked parts of
blocks, logits that nobody reads, and what a backward pass computes again.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elpo_jax.model.config import ROWS, ModelConfig, count_params
from elpo_jax.policy.batch import Batch, Example, normalise, pack, policy_examples, stack
from elpo_jax.policy.credit import assign
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import elpo
from elpo_jax.tasks.base import Task
from elpo_jax.tools.base import Status, ToolCall, ToolResult
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory
from elpo_jax.trees.tree import Leaf, RolloutTree
from experiments.measure import TINY, M, S, Settings, Side, compare, training_mesh
from experiments.peers import qwen3_config

SCALARS = {name: np.float32(x) for name, x in (elpo().scalars() | {"temperature": 1.0}).items()}
PEAK_SIZE = 2048  # of the square float32 matrices whose product is the peak


def bench_train(settings: Settings) -> Iterator[dict]:
    """Trained tokens per second of the policy step: trajectories packed into rows, against one padded row for each."""
    length, count, micro = (64, 8, 4) if settings.quick else (320, 64, 16)
    rng = np.random.default_rng(settings.seed)
    examples = [_chain(rng, 512, int(rng.integers(length // 5, length + 1))) for _ in range(count)]
    tokens = sum(len(example.tokens) for example in examples)
    packed = stack(pack(examples, length), micro)
    rows = [pack([example], length) for example in examples]
    padded = stack(jax.tree.map(lambda *x: np.concatenate(x), *rows), micro)
    for name, config in settings.models().items():
        run, _ = _updates(config, settings)
        sides = (
            Side(side, lambda run=run, batch=batch: run(batch, tokens))
            for side, batch in (("packed rows", packed), ("padded rows", padded))
        )
        case = f"{name}, {count} trajectories of {length // 5} to {length} tokens"
        yield compare(settings, "train", case, *sides)


def bench_tree(settings: Settings) -> Iterator[dict]:
    """Attempts per second of the update on ELPO trees of three levels: every token once, or once per attempt.

    `token_ratio` is how many tokens the attempts have per token of the trees, `flop_ratio` the same of operations (the
    tokens that are left lie deeper, and see more); `efficiency` is the speed-up divided by the ratio of tokens.
    `temp_mb` is the working memory of the gradient where all attempts are one micro-batch.
    """
    shapes = {"S": (S, 128, 8, 24), "S, long": (S, 256, 8, 48), "M": (M, 64, 4, 24)}
    if settings.quick:
        shapes = {"tiny": (TINY, 16, 4, 8)}
    for name, (config, prompt, steps, size) in shapes.items():
        trees = [_tree(np.random.default_rng((settings.seed, i)), prompt, steps, size) for i in range(2)]
        examples = normalise([e for t in trees for e in policy_examples(t, assign(t, elpo()))], elpo(), 1.0)
        longest = max(len(e.tokens) for e in examples)
        alone = stack(pack(examples, longest, share=False), len(examples))
        once = stack(pack(examples, -(-max(_unique_tokens(t) for t in trees) // 128) * 128), len(trees))
        # With copies of the parameters each device skips the blocks that its own trees let it; of M they are too large.
        run, memory = _updates(config, settings, training_mesh() if config is M else make_mesh(MeshConfig()))
        count = len(examples)
        sides = [
            Side(side, lambda run=run, batch=batch, count=count: run(batch, count))
            for side, batch in (("each token once", once), ("each attempt alone", alone))
        ]
        case = f"{name}, 2 trees of {len(examples) // 2} attempts of {longest} tokens in {steps} steps"
        line = compare(settings, "tree", case, *sides, unit="attempts/s")
        ratio = (alone.positions >= 0).sum() / (once.positions >= 0).sum()
        yield line | {
            "token_ratio": round(float(ratio), 3),
            "flop_ratio": round(flops(config, alone) / flops(config, once), 3),
            "efficiency": round(line["ratio"] / float(ratio), 3),
            "temp_mb": [round(memory(batch) / 1e6, 1) for batch in (once, alone)],
        }


def bench_update(settings: Settings) -> Iterator[dict]:
    """GFLOP/s of the update on full rows, against the machine's float32 matmul and, where it is installed, torch."""
    shapes = {"S": (S, 16, 256), "M": (M, 8, 256)}
    if settings.quick:
        shapes = {"tiny": (TINY, 4, 64)}
    for name, (config, rows, length) in shapes.items():
        rng = np.random.default_rng(settings.seed)
        batch = stack(pack([_chain(rng, config.vocab_size, length) for _ in range(rows)], length), rows)
        work, case = flops(config, batch) / 1e9, f"{name}, {rows} rows of {length} tokens"
        peak = Side(f"float32 matmul {PEAK_SIZE}^3", _matmul())
        sides = []
        for dtype in ("float32", "bfloat16"):
            run, _ = _updates(dataclasses.replace(config, dtype=dtype), settings)
            sides.append(Side(f"update in {dtype}", lambda run=run, batch=batch, work=work: run(batch, work)))
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            torch = Side("transformers in float32", _torch(config, batch, work))
            yield compare(settings, "update", case, torch, peak, unit="GFLOP/s")
            yield compare(settings, "update", case, sides[0], torch, unit="GFLOP/s")
        for side in sides:
            yield compare(settings, "update", case, side, peak, unit="GFLOP/s")


def flops(config: ModelConfig, batch: Batch) -> float:
    """Operations of a forward and backward pass over a batch [M, B, T], counted as the module says."""
    tokens, read = float((batch.positions >= 0).sum()), float((batch.steps > 0).sum())
    pairs = float((batch.positions[batch.positions >= 0] + 1).sum())  # a token sees itself and its ancestors
    head = config.vocab_size * config.d_model
    body = count_params(config) - head * (1 if config.tied else 2)
    return 6 * (body * tokens + head * read) + 12 * config.layers * config.heads * config.head_dim * pairs


def _updates(
    config: ModelConfig, settings: Settings, mesh: Mesh | None = None
) -> tuple[Callable, Callable[[Batch], int]]:
    """(batch, amount) -> amount, after an update; and batch -> bytes that a micro-batch's gradient needs to work in."""
    mesh, loss = mesh or training_mesh(), make_loss(config)
    optimizer = make_optimizer(OptimizerConfig(), total_steps=1000)
    state = init_state(config, optimizer, jax.random.key(settings.seed), mesh)
    step = make_train_step(loss, optimizer, mesh)

    def run(batch: Batch, amount: float) -> float:
        nonlocal state
        state, metrics = step(state, batch, SCALARS)
        jax.block_until_ready(metrics)
        return amount

    def memory(batch: Batch) -> int:
        micro = jax.tree.map(lambda x: x[0], batch)
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        return gradient.lower(state.params, micro, SCALARS).compile().memory_analysis().temp_size_in_bytes

    return run, memory


def _matmul() -> Callable[[], float]:
    """The product of two square matrices on all devices; returns GFLOP."""
    mesh = make_mesh(MeshConfig())
    x = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE), jnp.float32)
    rows, whole = (jax.device_put(x, NamedSharding(mesh, spec)) for spec in (PartitionSpec(ROWS), PartitionSpec()))
    product = jax.jit(jnp.matmul)

    def work() -> float:
        for _ in range(4):
            product(rows, whole).block_until_ready()
        return 4 * 2 * PEAK_SIZE**3 / 1e9

    return work


def _torch(config: ModelConfig, batch: Batch, work: float) -> Callable[[], float]:
    """The same update of a Qwen3 of the same shape by transformers and torch, in float32 on the CPU.

    Its logits, too, are those of the model's tokens alone, which end all rows.
    """
    import torch
    import transformers

    model = transformers.Qwen3ForCausalLM(qwen3_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor(batch.tokens.reshape(-1, batch.tokens.shape[-1]), dtype=torch.long)
    kept = int((batch.steps > 0).sum(axis=-1).max()) + 1  # the logits after a token predict the next one

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids[:, -kept:], logits_to_keep=kept).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return work

    return run


def _chain(rng: np.random.Generator, vocabulary: int, length: int) -> Example:
    """A trajectory of random tokens: a prompt, then one step."""
    steps = (np.arange(length) >= length // 4).astype(np.int32)
    advantage = np.full(length, rng.choice([-1.0, 1.0]), np.float32)
    return Example(
        task="bench",
        tokens=rng.integers(0, vocabulary, length).astype(np.int32),
        steps=steps,
        first_failure=0,
        behaviour_logp=np.full(length, -np.log(vocabulary), np.float32),
        branch=advantage,
        trajectory=advantage,
        leaves=np.ones(length, np.int32),
        weight=(steps / length).astype(np.float32),
    )


def _tree(rng: np.random.Generator, prompt: int, steps: int, size: int) -> RolloutTree:
    """A tree as two binary searches grow it, one of a root and one of a continuation: 4 roots, 16 attempts.

    A search of `steps` steps probes the middle, then the middle of a half, and so on, two continuations each; every
    attempt has all steps, each of `size` tokens, two thirds the model's.
    """
    leaves: list[Leaf] = []
    task = Task(id="bench/0", uid=0, family="bench", prompt="", answer="", max_steps=steps, difficulty=0, meta={})

    def tokens(author: Author, length: int) -> Segment:
        ids = rng.integers(0, 512, length).astype(np.int32)
        if author is Author.ENVIRONMENT:
            return Segment(author, ids)
        return Segment(author, ids, rng.normal(-6, 0.1, length).astype(np.float32), np.ones(length, np.float32))

    first = tokens(Author.ENVIRONMENT, prompt)

    def attempt(parent: int | None = None, anchor: int = 0) -> int:
        done = [] if parent is None else list(leaves[parent].trajectory.steps[:anchor])
        call, result = ToolCall("bench", {}), ToolResult(Status.OK, "")
        while len(done) < steps - 1:
            done.append(Step(tokens(Author.MODEL, 2 * size // 3), call, result, tokens(Author.ENVIRONMENT, size // 3)))
        done.append(Step(tokens(Author.MODEL, size)))
        success = bool(len(leaves) % 3 == 2)
        trajectory = Trajectory(first, tuple(done), Finish.ANSWER, success, float(success))
        leaves.append(Leaf(trajectory, parent, anchor))
        return len(leaves) - 1

    def search(leaf: int, low: int) -> int:
        """Halves (low, steps) until a single step is left; returns the last continuation."""
        last, high = leaf, steps
        while high - low > 1:
            middle = (low + high) // 2
            last = [attempt(leaf, middle) for _ in range(2)][-1]
            low, high = (middle, high) if middle % 2 else (low, middle)
        return last

    for _ in range(4):
        attempt()
    deeper = search(0, 0)
    search(deeper, leaves[deeper].anchor)
    while len(leaves) < 16:
        search(len(leaves) % 4, 0)
    return RolloutTree(task, tuple(leaves[:16]))


def _unique_tokens(tree: RolloutTree) -> int:
    steps = [tree.leaves[node.leaves[0]].trajectory.steps[node.step - 1] for node in tree.nodes()]
    return len(tree.leaves[0].trajectory.prompt) + sum(len(s.turn) + len(s.response or ()) for s in steps)
