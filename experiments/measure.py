"""How a bench measures: the sides of a comparison take turns (A, A, B, B, A, A, ...), and figures are medians.

A turn is two runs, of which the second is timed: the first finds the memory that it had in its last turn in use by the
other side, and writes into fresh pages, which no loop that runs alone does.

The first of all compiles. Rates of a shared machine move by tens of percent, so read the ratios.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from elpo_jax.config import Config
from elpo_jax.model.config import ModelConfig
from elpo_jax.train.mesh import MeshConfig, make_mesh

TINY = ModelConfig(vocab_size=512, d_model=32, layers=1, heads=2, kv_heads=1, head_dim=16, d_ff=64)
S = ModelConfig(vocab_size=512, d_model=256, layers=4, heads=8, kv_heads=4, head_dim=32, d_ff=768, qk_norm=True)
M = ModelConfig(vocab_size=32768, d_model=512, layers=8, heads=8, kv_heads=4, head_dim=64, d_ff=1536, qk_norm=True)
MODELS = {"0.4M": Config().model, "S": S, "M": M}  # the quickstart's, 3.3 M and 41.6 M parameters


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all benches share."""

    quick: bool
    seed: int
    runs: int
    out: pathlib.Path | None = None  # folder for pictures

    def models(self, *names: str) -> dict[str, ModelConfig]:
        """The named models, or the two smaller ones; with --quick a tiny one alone."""
        return {"tiny": TINY} if self.quick else {name: MODELS[name] for name in names or ("0.4M", "S")}


def sampling_mesh(config: ModelConfig) -> Mesh:
    """How the devices sample fastest: with all weights each, or with their part of those that no cache holds."""
    return make_mesh(MeshConfig(data=1, tensor=jax.device_count()) if config is M else MeshConfig())


def training_mesh() -> Mesh:
    """How the devices train fastest: with their part of the parameters and moments, and of the rows."""
    return make_mesh(MeshConfig(data=1, fsdp=jax.device_count()))


def mesh_name(mesh: Mesh) -> str:
    """Its axes of more than one device, for example "data=2"."""
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "1 device"


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison: `work` does it once, from an untimed `prepare`, and returns how many units it did."""

    name: str
    work: Callable[[], int]
    prepare: Callable[[], None] = lambda: None


def rates(settings: Settings, *sides: Side) -> list[float]:
    """The median rate of each side, in units per second; they take turns."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(settings.runs):
        for side, mine in zip(sides, found, strict=True):
            for _ in range(1 if settings.quick else 2):  # --quick asks whether it works
                side.prepare()
                began = time.perf_counter()
                amount = side.work()
                seconds = time.perf_counter() - began
            mine.append(amount / seconds)
    return [statistics.median(mine) for mine in found]


def compare(settings: Settings, bench: str, case: str, side: Side, against: Side, unit: str = "tokens/s") -> dict:
    """Median rates of two sides that take turns, as one line of output."""
    value, reference = rates(settings, side, against)
    return line(settings, bench, case, value, reference, unit, [side.name, against.name])


def line(settings: Settings, bench: str, case: str, value: float, against: float, unit: str, sides: list[str]) -> dict:
    """One measurement as it is printed."""
    return {
        "bench": bench,
        "case": case,
        "value": round(value, 1 if value >= 10 else 4),
        "unit": unit,
        "against": round(against, 1 if against >= 10 else 4),
        "ratio": round(value / against, 3),
        "runs": settings.runs,
        "sides": sides,
    }
