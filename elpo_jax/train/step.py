"""AdamW with a schedule, and the one jitted train step that every loss shares.

A loss is a sum over tokens whose weights already hold the normalisation over the global batch, so micro-batches,
rows and devices only ever add, and the step knows nothing of means.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from elpo_jax.model.transformer import Params
from elpo_jax.train.mesh import batch_sharding, replicated, row_parts, shardings

Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Any, Mapping[str, jax.Array]], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
      lr: Highest learning rate.
      warmup_steps: Steps in which the rate rises linearly; the first step already has lr / warmup_steps.
      schedule: What follows: "constant", or "cosine" or "linear" down to 0 at the end of the run.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled decay, times the learning rate; of matrices only, not of norms and biases.
      clip_norm: Largest global norm of the gradient; 0 clips nothing.
    """

    lr: float = 1e-3
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"optimizer.schedule={self.schedule!r} must be one of constant, cosine, linear")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in ("lr", "warmup_steps", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps={self.eps} must be positive")


class Optimizer(NamedTuple):
    """An optax transformation with the learning rate that it will apply at a step."""

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params], tuple[Params, Any]]
    learning_rate: Callable[[jax.Array | int], jax.Array]


def make_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """AdamW with global-norm clipping before it, and weight decay on matrices.

    Args:
      config: The numbers.
      total_steps: Optimizer steps of the whole run, where a falling schedule reaches 0; with none nothing is kept.

    Raises:
      ValueError: If a falling schedule has no step left after the warm-up.
    """
    if not total_steps:  # weights that are only evaluated: their moments would take twice their memory
        nothing = optax.identity()
        return Optimizer(init=nothing.init, update=nothing.update, learning_rate=jnp.zeros_like)
    if config.schedule != "constant" and total_steps <= config.warmup_steps:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps} leaves no step of {total_steps} for the "
            f"{config.schedule} schedule: lower the warm-up or use schedule=constant"
        )

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        rate = config.lr * jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        done = jnp.clip((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        falls = {"constant": 1.0, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "linear": 1 - done}
        return rate * falls[config.schedule]

    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
    return Optimizer(init=chain.init, update=chain.update, learning_rate=learning_rate)


def make_train_step(loss_fn: LossFn, optimizer: Optimizer, mesh: Mesh) -> Callable:
    """The jitted function (state, batch, scalars) -> (state, metrics).

    Gradients of the micro-batches are added up by a scan, then applied once. All of it is float32, as the parameters
    are, whatever the network computes in: they are the only copy, and bfloat16 ones would round small updates away.
    Where the loss or the gradient's norm is not finite nothing is applied: parameters, moments and the schedule stay as
    they were, bit for bit, and `skipped` grows by one.

    Args:
      loss_fn: (params, micro-batch with leaves [B, ...], scalars) -> (loss, metrics). The loss is a sum with global
        weights; so are the metrics, but those whose name ends in "_max", which are combined by maximum.
      optimizer: From `make_optimizer`.
      mesh: Where the state lies.

    Returns:
      A function of a `TrainState` (donated: the caller's arrays are gone after the call), a batch pytree with leaves
      [n_micro, B, ...] and a dict of scalars (traced, so changing them compiles nothing). The metrics are those of
      the loss, and loss, grad_norm (before clipping), lr (of this step) and skipped (so far). It raises ValueError
      where B cannot be split over the mesh's rows, or a parameter is not float32.
    """
    accumulated = _accumulated(loss_fn, mesh)

    def step(state, batch, scalars):
        grads, metrics = accumulated(state.params, batch, scalars)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)
        kept = state.replace(skipped=state.skipped + 1)
        lr = optimizer.learning_rate(state.step)
        # The PRNG key passes through untouched, and `where` does not take typed keys.
        new, kept = (s.replace(key=None) for s in (new, kept))
        chosen = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept).replace(key=state.key)
        return chosen, {**metrics, "grad_norm": norm, "lr": lr, "skipped": chosen.skipped}

    compiled = None

    def run(state, batch, scalars):
        nonlocal compiled
        rows, parts = jax.tree.leaves(batch)[0].shape[1], row_parts(mesh)
        if rows % parts:
            raise ValueError(
                f"a micro-batch of {rows} rows cannot be split over mesh.data * mesh.fsdp = {parts}: "
                f"make the rows of a micro-batch a multiple of {parts}, or the mesh smaller"
            )
        if compiled is None:
            _need_float32(state.params)
            place, whole = shardings(mesh, state), replicated(mesh)
            compiled = jax.jit(
                step,
                in_shardings=(place, batch_sharding(mesh), whole),
                out_shardings=(place, whole),
                donate_argnums=0,
            )
        return compiled(state, batch, scalars)

    return run


def _accumulated(loss_fn: LossFn, mesh: Mesh) -> Callable:
    """(params, batch [n_micro, B, ...], scalars) -> (gradients, metrics with the loss), combined over all rows."""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(params, batch, scalars):
        def micro(total, rows):
            (loss, metrics), grads = gradient(params, rows, scalars)
            return jax.tree.map(jnp.add, total, grads), {**metrics, "loss": loss}

        grads, rows = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, params), batch)
        return grads, {name: x.max(axis=0) if _largest(name) else x.sum(axis=0) for name, x in rows.items()}

    if mesh.shape["data"] == 1:
        return accumulate

    # Each copy of the parameters adds up its own rows, and the copies meet once, at the end of all micro-batches: left
    # to itself XLA would have them meet for every matrix of every micro-batch, and for every chunk of the head.
    def together(params, batch, scalars):
        grads, metrics = accumulate(params, batch, scalars)
        metrics = {name: (jax.lax.pmax if _largest(name) else jax.lax.psum)(x, "data") for name, x in metrics.items()}
        return jax.lax.psum(grads, "data"), metrics

    whole, rows = PartitionSpec(), PartitionSpec(None, "data")
    return jax.shard_map(
        together,
        mesh=mesh,
        in_specs=(whole, rows, whole),
        out_specs=(whole, whole),
        axis_names=frozenset({"data"}),
        check_vma=False,
    )


def _largest(metric: str) -> bool:
    """Whether a metric's parts are combined by maximum."""
    return metric.endswith("_max")


def _need_float32(params: Params) -> None:
    """Raises ValueError for parameters that an update smaller than their rounding could not change."""
    others = {x.dtype.name for x in jax.tree.leaves(params)} - {"float32"}
    if others:
        raise ValueError(
            f"model.param_dtype={', '.join(others)} cannot be trained: the parameters have no float32 copy, so small "
            "updates would be rounded away; use model.param_dtype=float32, and model.dtype=bfloat16 to compute in "
            "bfloat16"
        )
