"""The train state: everything that an optimizer step changes, as one pytree on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.stored import abstract_params
from elpo_jax.model.transformer import Params, init
from elpo_jax.model.weights import load
from elpo_jax.train.mesh import shardings
from elpo_jax.train.step import Optimizer


@flax.struct.dataclass
class TrainState:
    """What a step takes and returns, and what a checkpoint holds."""

    params: Params
    opt_state: Any  # of the optax chain; its moments are float32 and lie like the parameters
    step: jax.Array  # int32 [], updates applied so far, which is also where the schedule stands
    key: jax.Array  # typed PRNG key []
    skipped: jax.Array  # int32 [], updates refused for a non-finite loss or gradient


def init_state(
    config: ModelConfig, optimizer: Optimizer, key: jax.Array, mesh: Mesh, params: Params | None = None
) -> TrainState:
    """A fresh state; each device creates only its own part of it. The values do not depend on the mesh.

    Args:
      config: The network.
      optimizer: What will train it.
      key: Seeds the parameters and the state's own key.
      mesh: Where the state lies.
      params: To begin with, given up to the state (donated); None for random ones.
    """

    def build(key, params):
        params_key, state_key = jax.random.split(key)
        params = init(config, params_key) if params is None else params
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, state_key, zero)

    places = shardings(mesh, jax.eval_shape(build, key, params))
    return jax.jit(build, out_shardings=places, donate_argnums=1)(key, params)


def load_params(config: ModelConfig, mesh: Mesh) -> Params | None:
    """The weights in `config.source`, on the mesh; None if it names none.

    Raises:
      ValueError: If the folder cannot be used (`elpo_jax.model.weights.load`).
    """
    return load(config.source, config, shardings(mesh, abstract_params(config))) if config.source else None
