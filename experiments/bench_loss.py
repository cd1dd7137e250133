"""Measures the log-probability loss against all logits at once, and a loop over layers against one after the other.

Memory is what XLA plans for temporary arrays; times are those of two sides that take turns, as in experiments/bench.py.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.logprob import logprob_and_entropy, summed_loss
from elpo_jax.model.transformer import init, unembed
from elpo_jax.policy.batch import empty
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import elpo
from experiments.measure import Settings, Side, compare

# What decides whether, where and when programs are kept.
CACHE_OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def bench_cross_entropy(settings: Settings) -> Iterator[dict]:
    """Loss, entropies and gradients of tokens per second, and temporary memory, of chunks against all logits."""
    rows, length, vocab, width = (4, 32, 512, 32) if settings.quick else (8, 1024, 32768, 512)
    chunk = 8 if settings.quick else None
    rng = np.random.default_rng(settings.seed)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    weight = (rng.normal(size=(rows, length)) * (np.arange(length) > 0)).astype(np.float32)
    params = {"embed": (rng.normal(size=(vocab, width)) * width**-0.5).astype(np.float32)}
    for dtype in ("float32", "bfloat16"):
        config = ModelConfig(vocab, width, layers=1, heads=1, kv_heads=1, head_dim=2, d_ff=1, dtype=dtype)

        def fused(params, hidden, config=config):
            return summed_loss(_weighted, config, params, hidden, tokens, 1.0, weight, None, chunk=chunk)

        def whole(params, hidden, config=config):
            logits = unembed(config, params, jnp.roll(hidden, 1, axis=1))
            return _weighted(*logprob_and_entropy(logits, tokens, 1.0), weight, None)

        sides, memory = [], {}
        for name, fn in {"chunks": fused, "all logits": whole}.items():
            gradient = jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))
            program = gradient.lower(params, jnp.asarray(hidden, dtype)).compile()
            memory[name] = program.memory_analysis().temp_size_in_bytes
            inputs = jax.device_put((params, jnp.asarray(hidden, dtype)))

            def work(program=program, inputs=inputs) -> int:
                jax.block_until_ready(program(*inputs))
                return tokens.size

            sides.append(Side(name, work))
        line = compare(settings, "cross_entropy", f"{tokens.size} tokens x {vocab} x {width}, {dtype}", *sides)
        yield line | {
            "temp_mb": {name: round(size / 1e6, 2) for name, size in memory.items()},
            "temp_ratio": round(memory["chunks"] / memory["all logits"], 3),
        }


def _weighted(logp, entropy, weight, _):
    return jnp.sum(weight * logp), {"entropy": jnp.sum(entropy)}


def bench_compile(settings: Settings) -> Iterator[dict]:
    """Gradients of the policy loss traced and compiled per minute: a loop over layers against one after the other."""
    layers = 4 if settings.quick else 28
    unrolled = ModelConfig(512, 256, layers, heads=8, kv_heads=4, head_dim=32, d_ff=768, qk_norm=True)
    looped = dataclasses.replace(unrolled, scan_layers=True)
    for kept in (False, True):
        with tempfile.TemporaryDirectory() as folder, _cache_in(folder):

            def side(name, config, kept=kept, folder=folder):
                def prepare():
                    if not kept:
                        for file in pathlib.Path(folder).iterdir():
                            file.unlink()

                return Side(name, lambda: _compile(config), prepare)

            cache = "warm" if kept else "cold"
            sides = side("loop over layers", looped), side("unrolled", unrolled)
            yield compare(settings, "compile", f"{layers} layers, {cache} cache", *sides, "programs/min")


def _compile(config: ModelConfig) -> int:
    """Traces and compiles one program; returns 60, which makes a rate per minute of one per second."""
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((16, 256), x.dtype), empty(1, 1))
    scalars = dict.fromkeys([*elpo().scalars(), "temperature"], jax.ShapeDtypeStruct((), jnp.float32))
    jax.jit(jax.grad(make_loss(config), has_aux=True)).lower(params, batch, scalars).compile()
    return 60


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Keeps all programs in a folder for as long as the context lasts."""
    options = CACHE_OPTIONS | {"jax_compilation_cache_dir": folder}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
