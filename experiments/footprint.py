"""Bytes and operations of an experiment, counted by hand from its config: nothing is compiled, nothing allocated.

What lies on a device permanently (parameters, moments, the sampler's parameters and its cache) is exact, by the
placement tables that the run uses. Working memory and memory traffic are estimates of what XLA makes of the model as it
is written. Tokens that attempts share are counted in each of them, attention meets every block of its triangle and the
head every token, so of batches of trees these are upper bounds. Letters as in policy/batch.py.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from elpo_jax.config import Config
from elpo_jax.model import tree_attention
from elpo_jax.model.cache import block_lengths, layers_at_once
from elpo_jax.model.config import ModelConfig
from elpo_jax.model.logprob import chunk_columns
from elpo_jax.model.transformer import init
from elpo_jax.rollout.decode import State, empty_state, row_axes, state_sharding
from elpo_jax.rollout.sampler import most_copies
from elpo_jax.train.mesh import AXES, row_parts, shardings
from elpo_jax.train.state import TrainState
from elpo_jax.train.step import Optimizer, make_optimizer

# Passes over the attention scores of a layer in one update: 4 forward, 4 again with either remat, 6 backward, if the
# blocks do not stay in a cache.
_FORWARD_PASSES, _BACKWARD_PASSES = 4, 6


@dataclasses.dataclass(frozen=True)
class Volume:
    """What one batch of RL amounts to; how long attempts become is the reader's guess.

    Attributes:
      attempts: Attempts of a batch.
      tokens: Mean tokens of one, prompt and tool answers included.
      sampled: Share of them that the model samples.
    """

    attempts: int
    tokens: int
    sampled: float

    @property
    def decoded(self) -> float:
        """Tokens that are sampled for a batch."""
        return self.attempts * self.tokens * self.sampled

    @property
    def prefilled(self) -> float:
        """Tokens of prompts and tools."""
        return self.attempts * self.tokens * (1 - self.sampled)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One call of a compiled function, on one device.

    Attributes:
      flops: Of matrix products.
      traffic: Bytes to and from HBM.
      working: Bytes of its temporary arrays.
    """

    flops: float
    traffic: float
    working: float


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """A mesh (data, fsdp, tensor) without devices."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rl_optimizer(config: Config) -> Optimizer:
    """The optimizer that a run would train with."""
    return make_optimizer(config.rl.optimizer, config.rl.steps * config.rl.updates * config.rl.epochs)


def abstract_state(config: Config, mesh: Mesh | AbstractMesh) -> TrainState:
    """The train state as shapes, each with its place on the mesh."""
    optimizer = rl_optimizer(config)

    def build(key):
        params, zero = init(config.model, key), jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, key, zero)

    state = jax.eval_shape(build, jax.random.key(0))
    return jax.tree.map(_placed, state, shardings(mesh, state))


def sampler_params(config: Config, mesh: Mesh | AbstractMesh):
    """The parameters as `rollout.decode.place_params` leaves them: whole in every shard of the rows, matrices cast."""
    rows = row_axes(mesh)

    def keep(axes):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name not in rows) or None

    def place(x):
        spec = jax.sharding.PartitionSpec(*map(keep, x.sharding.spec))
        dtype = config.model.dtype if len(x.shape) > 1 else x.dtype
        return _placed(jax.ShapeDtypeStruct(x.shape, dtype), NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract_state(config, mesh).params)


def sampler_state(config: Config, mesh: Mesh | AbstractMesh) -> State:
    """What the sampler keeps on the devices, as shapes."""
    sampler = config.sampler
    sizes = sampler.slots, sampler.context, slot_group(config, mesh), sampler.block, sampler.parking
    state = jax.eval_shape(lambda: empty_state(config.model, *sizes))
    parts = zip(state, state_sharding(config.model, mesh), strict=True)
    return State(*(jax.tree.map(lambda x, place=place: _placed(x, place), part) for part, place in parts))


def slot_group(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Slots that share a trunk."""
    return math.gcd(config.sampler.group, config.sampler.slots // row_parts(mesh))


def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def bytes_per_device(tree) -> int:
    """Bytes of a tree of placed shapes on one device."""
    plain = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in plain)


def resident(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes that lie on a device for the whole of RL.

    The sampler's parameters are the train state's where the mesh splits them over no rows and they are computed with as
    they are; else they are a copy.
    """
    state = abstract_state(config, mesh)
    copied = mesh.shape["fsdp"] > 1 or config.model.dtype != config.model.param_dtype
    return {
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "cold start's parameters": bytes_per_device(state.params),
        "sampler's parameters": bytes_per_device(sampler_params(config, mesh)) if copied else 0,
        "KV cache": bytes_per_device(sampler_state(config, mesh)._replace(control=())),
    }


def micro_batches(config: Config, volume: Volume) -> int:
    """Micro-batches of an optimizer step; rows are taken to be full, and the run rounds up (policy/batch.py, stack)."""
    rows = volume.attempts / config.rl.updates * volume.tokens / config.rl.row_length(config.sampler.context)
    return max(1, math.ceil(rows / config.rl.micro_rows))


def layer_weights(model: ModelConfig) -> int:
    """Entries of the matrices of one layer."""
    return 2 * model.d_model * (model.heads + model.kv_heads) * model.head_dim + 3 * model.d_model * model.d_ff


def attention_steps(tokens: int) -> int:
    """Pairs of blocks that attention in training meets at most: those on and below the diagonal."""
    count = -(-tokens // tree_attention.block_length(tokens))
    return count * (count + 1) // 2


def update(config: Config, mesh: Mesh | AbstractMesh, micro: int) -> Phase:
    """One optimizer step of `micro` micro-batches."""
    model, tokens = config.model, config.rl.row_length(config.sampler.context)
    split = _split(model, mesh)
    rows = -(-config.rl.micro_rows // row_parts(mesh))
    weights, element, block = layer_weights(model), jnp.dtype(model.dtype).itemsize, tree_attention.block_length(tokens)
    area = attention_steps(tokens) * block**2  # pairs of query and key
    again, all_again = model.remat != "none", model.remat == "full"
    passes = 3 + all_again
    # With full remat all is computed again but the last product, whose result nobody needs.
    per_token = model.layers * 2 * (passes * weights - all_again * model.d_model * model.d_ff)
    # Of attention, two products forward and four backward, and the scores again, unless they are one block, which XLA
    # then moves out of the loops and keeps.
    made = 6 + 2 * again + (block < tokens)
    scores = 2 * made * model.heads * model.head_dim * area * model.layers
    chunk = chunk_columns(rows, tokens, parts=1)
    columns = -(-tokens // chunk) * chunk
    head = 3 * 2 * model.d_model * model.vocab_size * columns
    flops = micro * rows * (tokens * per_token + head + scores) / split.tensor

    local = bytes_per_device(abstract_state(config, mesh).params)
    heads = rows * model.heads / split.heads
    wide = rows * tokens * (6 * model.d_model + (4 * model.d_ff + 3 * _attention_width(model)) / split.tensor)
    score_passes = _FORWARD_PASSES * (1 + again) + _BACKWARD_PASSES
    layer_traffic = heads * area * score_passes * 4 + (wide * element + weights / split.tensor * element) * passes
    traffic = micro * model.layers * layer_traffic + 9 * local  # gradients, parameters and both moments

    # What a layer keeps for its backward pass: activations, and of attention its output and a number per query.
    layer = wide * element + heads * tokens * (model.head_dim * element + 4)
    scored = heads * (3 * block**2 + 3 * tokens * model.head_dim) * 4  # one block, and sums over all of them
    inputs = rows * tokens * model.d_model * element
    results = model.d_model + (model.heads + 2 * model.kv_heads) * model.head_dim + model.d_model + 2 * model.d_ff
    products = rows * tokens * results * element / split.tensor  # which "dots" does not make again
    saved = {
        "none": model.layers * layer,
        "dots": model.layers * (inputs + products) + layer - products,
        "full": model.layers * inputs + layer,
    }[model.remat]
    logits = rows * chunk * model.vocab_size / split.tensor * 4
    matrices = weights / split.tensor * (element + 4)  # one layer gathered, and its gradient before it is scattered
    working = saved + scored + 3 * logits + matrices + 2 * local
    return Phase(flops, traffic, working)


def decode(config: Config, mesh: Mesh | AbstractMesh) -> Phase:
    """One token for every slot, of a burst, if a query reads the whole row of its slot and all of its trunk.

    A burst begins with a copy of the layers' matrices in the compute dtype, if they are kept in another one.
    """
    model, sampler = config.model, config.sampler
    split = _split(model, mesh)
    slots = sampler.slots / row_parts(mesh)
    layers, head = model.layers * layer_weights(model), model.d_model * model.vocab_size
    columns = sampler.context * _holders(config, mesh)
    attention = model.layers * 4 * model.heads * model.head_dim * columns
    element, kept = jnp.dtype(model.dtype).itemsize, jnp.dtype(model.param_dtype).itemsize
    copied = layers / split.tensor if element != kept else 0
    weights = (layers * element + head * kept) / split.tensor + copied * (kept + element) / sampler.steps_per_visit
    return Phase(
        flops=slots * (2 * (layers + head) + attention) / split.tensor,
        traffic=weights + bytes_per_device(sampler_state(config, mesh).cache),
        working=copied * element
        + 4 * slots * (model.vocab_size / split.tensor + model.d_model)
        # One block's scores and their weights, and the logits thrice.
        + 4 * slots * (2 * model.heads / split.heads * _longest_block(config) + 2 * model.vocab_size / split.tensor),
    )


def prefill(config: Config, mesh: Mesh | AbstractMesh, rows: int, tokens: int) -> Phase:
    """One call on `rows` rows per shard of `tokens` tokens each, if queries meet whole rows and trunks."""
    model, columns = config.model, config.sampler.context * _holders(config, mesh)
    split = _split(model, mesh)
    column = 2 * model.kv_heads / split.heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    scores = rows * model.heads / split.heads * tokens
    products = (model.layers - 1) * rows * tokens * 4 * model.heads * model.head_dim * columns
    # The last layer's output is dropped: of it, only keys and values are made.
    last = 2 * model.d_model * model.kv_heads * model.head_dim
    weights = (model.layers - 1) * layer_weights(model) + last
    return Phase(
        flops=(rows * tokens * 2 * weights + products) / split.tensor,
        traffic=bytes_per_device(sampler_params(config, mesh))
        + model.layers * columns * (2 * rows * column + 4 * scores * 4),
        # One block of the rows, and its scores and their weights.
        working=_longest_block(config) * (rows * column + 2 * scores * 4),
    )


def staged(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Bytes that the largest fork has read and not yet written: whole sequences, of as many layers as it takes at once.

    Every device stages what all of them copy.
    """
    model, sampler = config.model, config.sampler
    group = slot_group(config, mesh)
    copies = most_copies(sampler, sampler.slots // group if group > 1 else 0)
    heads = model.kv_heads // _split(model, mesh).heads
    row = 2 * sampler.context * heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return copies * row * min(model.layers, layers_at_once(copies, row))


def _holders(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Where a query looks: into its row, and into its trunk if there are any."""
    return 1 + (slot_group(config, mesh) > 1)


def _longest_block(config: Config) -> int:
    return max(block_lengths(config.sampler.context, config.sampler.block))


def prefill_shape(config: Config, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Rows per shard and tokens of the largest prefill that is not of all slots at once."""
    per_shard = config.sampler.slots // row_parts(mesh)
    rows = {-(-rows // row_parts(mesh)) for rows in config.sampler.prefill_rows}
    return max({size for size in rows if size < per_shard} or {per_shard}), max(config.sampler.prefill_buckets)


def _attention_width(model: ModelConfig) -> int:
    return (model.heads + model.kv_heads) * model.head_dim


class _Split(NamedTuple):
    tensor: int  # of every matrix product
    heads: int  # of what is kept for each head: the scores, whose key/value heads have to be whole


def _split(model: ModelConfig, mesh: Mesh | AbstractMesh) -> _Split:
    """Into how many parts the axis `tensor` splits work and memory."""
    return _Split(mesh.shape["tensor"], math.gcd(mesh.shape["tensor"], model.kv_heads))
