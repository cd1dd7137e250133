"""Measurements, one JSON line each:  python -m experiments.bench rollout branch decode train sandbox [--quick]

How they are made is said in `measure.py`.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import jax
import numpy as np

from elpo_jax.model.config import count_params
from elpo_jax.policy.batch import Batch, Example, pack, stack
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import elpo
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.provenance import provenance
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step
from experiments.bench_rollout import bench_branch, bench_decode, bench_rollout
from experiments.bench_sandbox import bench_sandbox
from experiments.measure import MODELS, Settings, Side, compare


def bench_train(settings: Settings) -> Iterator[dict]:
    """Trained tokens per second of the policy step: trajectories packed into rows, against one padded row for each."""
    length, count, micro = (64, 8, 4) if settings.quick else (320, 64, 16)
    rng = np.random.default_rng(settings.seed)
    examples = [_example(rng, int(rng.integers(length // 5, length + 1))) for _ in range(count)]
    tokens = sum(len(example.tokens) for example in examples)
    packed = stack(pack(examples, length), micro)
    rows = [pack([example], length) for example in examples]
    padded = stack(jax.tree.map(lambda *x: np.concatenate(x), *rows), micro)
    scalars = {name: np.float32(x) for name, x in (elpo().scalars() | {"temperature": 1.0}).items()}
    for name, config in settings.models().items():
        mesh = make_mesh(MeshConfig())
        optimizer = make_optimizer(OptimizerConfig(), total_steps=1000)
        state = init_state(config, optimizer, jax.random.key(settings.seed), mesh)
        step = make_train_step(make_loss(config), optimizer, mesh)

        def work(batch: Batch, step=step) -> int:
            nonlocal state
            state, metrics = step(state, batch, scalars)
            jax.block_until_ready(metrics)
            return tokens

        case = f"{name}, {count} trajectories of {length // 5} to {length} tokens"
        sides = Side("packed rows", lambda run=work: run(packed)), Side("padded rows", lambda run=work: run(padded))
        yield compare(settings, "train", case, *sides)


def _example(rng: np.random.Generator, length: int) -> Example:
    """A trajectory of random tokens: a prompt, then one step."""
    steps = (np.arange(length) >= length // 4).astype(np.int32)
    advantage = np.full(length, rng.choice([-1.0, 1.0]), np.float32)
    return Example(
        task="bench",
        tokens=rng.integers(0, 512, length).astype(np.int32),
        steps=steps,
        first_failure=0,
        behaviour_logp=np.full(length, -6.0, np.float32),
        branch=advantage,
        trajectory=advantage,
        leaves=np.ones(length, np.int32),
        weight=(steps / length).astype(np.float32),
    )


BENCHES = {
    "rollout": bench_rollout,
    "branch": bench_branch,
    "decode": bench_decode,
    "train": bench_train,
    "sandbox": lambda settings: bench_sandbox(settings.quick, settings.runs),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=list(BENCHES), metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--quick", action="store_true", help="small shapes: does it work?")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side, at least 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=2, help="XLA devices on a machine without accelerators")
    options = parser.parse_args(arguments)
    if options.runs < 3:
        parser.error(f"--runs {options.runs}: a median needs at least 3")
    jax.config.update("jax_num_cpu_devices", options.devices)
    settings = Settings(options.quick, options.seed, options.runs)
    params = {"params": {name: count_params(config) for name, config in settings.models(*MODELS).items()}}
    where = provenance() | {"seed": options.seed}
    for name in options.names:
        for line in BENCHES[name](settings):
            print(json.dumps(line | where | ({} if name == "sandbox" else params)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
