"""What the benches share: the networks, the settings, and a comparison of two sides that take turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable

from elpo_jax.config import Config
from elpo_jax.model.config import ModelConfig

TINY = ModelConfig(vocab_size=512, d_model=32, layers=1, heads=2, kv_heads=1, head_dim=16, d_ff=64)
MODELS = {
    "0.4M": Config().model,  # the quickstart's
    "3M": ModelConfig(vocab_size=512, d_model=256, layers=4, heads=8, kv_heads=4, head_dim=32, d_ff=768, qk_norm=True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all benches share."""

    quick: bool
    seed: int
    runs: int

    def models(self) -> dict[str, ModelConfig]:
        return {"tiny": TINY} if self.quick else MODELS


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison: `work` does it once, from an untimed `prepare`, and returns how many units it did."""

    name: str
    work: Callable[[], int]
    prepare: Callable[[], None] = lambda: None


def compare(settings: Settings, bench: str, case: str, side: Side, against: Side, unit: str = "tokens/s") -> dict:
    """Median rates of two sides that take turns, as one line of output."""
    rates = {side.name: [], against.name: []}
    for run in range(-1, settings.runs):  # the first compiles
        for one in (side, against):
            one.prepare()
            began = time.perf_counter()
            amount = one.work()
            if run >= 0:
                rates[one.name].append(amount / (time.perf_counter() - began))
    value, reference = (statistics.median(rates[one.name]) for one in (side, against))
    return {
        "bench": bench,
        "case": case,
        "value": round(value, 1),
        "unit": unit,
        "against": round(reference, 1),
        "ratio": round(value / reference, 3),
        "runs": settings.runs,
        "sides": [side.name, against.name],
    }
