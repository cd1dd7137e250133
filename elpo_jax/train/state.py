"""The train state: everything that an optimizer step changes, as one pytree on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.transformer import Params, init
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


def init_state(config: ModelConfig, optimizer: Optimizer, key: jax.Array, mesh: Mesh) -> TrainState:
    """A fresh state; each device creates only its own part of it. The values do not depend on the mesh."""

    def build(key):
        params_key, state_key = jax.random.split(key)
        params = init(config, params_key)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, state_key, zero)

    return jax.jit(build, out_shardings=shardings(mesh, jax.eval_shape(build, key)))(key)
