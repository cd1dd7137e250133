"""Prints the devices that JAX sees, and multiplies two matrices on all of them as a sign of life."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def main() -> int:
    print(f"jax {jax.__version__}, backend {jax.default_backend()}, {jax.device_count()} devices")
    for device in jax.devices():
        print(f"  {device}  {device.device_kind}")
    if jax.process_count() > 1:
        print("more than one host: elpo_jax runs its tool loop on one host; use a slice that is one machine")
        return 1
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows = 128 * jax.device_count()
    left = np.random.default_rng(0).normal(size=(rows, 128)).astype(np.float32)
    sharded = jax.device_put(left, NamedSharding(mesh, PartitionSpec("data")))
    error = float(jnp.abs(jnp.matmul(sharded, sharded.T, precision="highest") - left @ left.T).max())
    print(f"a {rows} x {rows} product over all of them differs from NumPy by at most {error:.1e}")
    if error > 1e-2:
        print("that is too much: the devices do not compute correctly")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
