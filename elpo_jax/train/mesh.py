"""The device mesh, and one table that says how every array of the train state lies on it.

Three axes: `data` replicates the parameters and splits the rows; `fsdp` splits both the rows and the parameters;
`tensor` splits the heads, the MLP and the vocabulary. The model knows nothing of this: XLA inserts the communication
that the placement of parameters and rows implies.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elpo_jax.model.config import ROWS

AXES = ("data", "fsdp", "tensor")

# Pattern of the end of a parameter's path -> axis, or axes, of each dimension. The first that matches holds. Optimizer
# moments carry the parameter's path behind a prefix of their own, so the same table places them.
# The vocabulary takes both axes: were D split over `fsdp` here, XLA would carry that into the residual stream, and move
# activations between devices in every layer instead of parameters.
RULES: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = (
    (r"embed", (("tensor", "fsdp"), None)),
    (r"head", (None, ("tensor", "fsdp"))),
    (r"attn/[qkv]", ("fsdp", "tensor")),
    (r"attn/[qkv]_bias", ("tensor",)),
    (r"attn/o", ("tensor", "fsdp")),
    (r"mlp/(gate|up)", ("fsdp", "tensor")),
    (r"mlp/down", ("tensor", "fsdp")),
    (r"(attn|mlp|final|q|k)_norm", (None,)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
      data: Copies of the parameters, each with its share of the rows; -1 means whatever devices are left.
      fsdp: Parts of the parameters, each with its share of the rows.
      tensor: Parts of every layer's width.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in AXES:
            value = getattr(self, name)
            if value < 1 and (name, value) != ("data", -1):
                remedy = "use at least 1, or -1 for the devices left" if name == "data" else "use at least 1"
                raise ValueError(f"mesh.{name}={value} is impossible: {remedy}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices, or over those given.

    Raises:
      ValueError: If the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    if data * inner != len(devices):
        asked = ", ".join(f"mesh.{name}={getattr(config, name)}" for name in AXES)
        remedy = (
            "set mesh.data=-1 to use the devices that are left"
            if len(devices) % inner == 0
            else f"choose mesh.fsdp * mesh.tensor so that it divides {len(devices)}"
        )
        raise ValueError(f"{asked} does not fit {len(devices)} {devices[0].platform} device(s): {remedy}")
    sizes = (data, config.fsdp, config.tensor)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Where each array of a tree of parameters, optimizer state or a whole `TrainState` lies.

    Scalars and PRNG keys are replicated. A dimension that its axis does not divide is replicated over that axis: a
    model with 2 key/value heads still runs on 8 tensor devices.

    Args:
      mesh: From `make_mesh`.
      tree: Arrays or `jax.ShapeDtypeStruct`s, so the placement is known before anything is allocated.

    Returns:
      The same tree of `NamedSharding`s.

    Raises:
      ValueError: If a path matches no rule, or a rule of another rank.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, _name(path), leaf.shape)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of a batch [n_micro, B, ...]: every micro-batch's rows are split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    for pattern, axes in RULES:
        if re.search(rf"(^|/)({pattern})$", name):
            if len(axes) != len(shape):
                raise ValueError(f"the sharding rule {pattern!r} names {len(axes)} axes but {name} has shape {shape}")
            return PartitionSpec(*(_fitting(mesh, a, size) for a, size in zip(axes, shape, strict=True)))
    raise ValueError(f"no sharding rule matches {name} of shape {shape}: add one to RULES in elpo_jax/train/mesh.py")


def _fitting(mesh: Mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """The axes of one dimension, or None where they do not divide it."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None
