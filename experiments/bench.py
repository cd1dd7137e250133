"""Measurements, one JSON line each:  python -m experiments.bench all --out DIR, or the names of some

How they are made is said in `measure.py`; `. experiments/env.sh` before sets what the scripts set.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from elpo_jax.model.config import count_params
from elpo_jax.policy.batch import Batch, Example, pack, stack
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import elpo
from elpo_jax.report.log import write_text
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.provenance import provenance
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step
from experiments.bench_loss import bench_compile, bench_cross_entropy
from experiments.bench_rl import bench_elpo, bench_rl
from experiments.bench_rollout import bench_branch, bench_decode, bench_rollout
from experiments.bench_sandbox import bench_sandbox
from experiments.bench_timeline import bench_timeline
from experiments.bench_train import bench_tree, bench_update
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


BENCHES: dict[str, Callable[[Settings], Iterator[dict]]] = {
    "rollout": bench_rollout,
    "branch": bench_branch,
    "decode": bench_decode,
    "train": bench_train,
    "tree": bench_tree,
    "update": bench_update,
    "cross_entropy": bench_cross_entropy,
    "compile": bench_compile,
    "rl": bench_rl,
    "elpo": bench_elpo,
    "timeline": bench_timeline,
    "sandbox": lambda settings: bench_sandbox(settings.quick, settings.runs),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names", nargs="+", choices=[*BENCHES, "all"], metavar="NAME", help=f"{', '.join(BENCHES)}, or all"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: does it work?")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side, at least 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="where to measure; the default is JAX's own")
    parser.add_argument("--devices", type=int, default=2, help="XLA devices on a machine without accelerators")
    parser.add_argument("--out", type=pathlib.Path, help="folder for NAME.jsonl, table.md and timeline.png")
    options = parser.parse_args(arguments)
    if options.runs < 3:
        parser.error(f"--runs {options.runs}: a median needs at least 3")
    if options.device:
        jax.config.update("jax_platforms", options.device.replace("gpu", "cuda"))
    jax.config.update("jax_num_cpu_devices", options.devices)
    settings = Settings(options.quick, options.seed, options.runs, options.out)
    params = {"params": {name: count_params(config) for name, config in settings.models(*MODELS).items()}}
    where = provenance() | {"seed": options.seed, "malloc_keeps_pages": os.environ.get("MALLOC_MMAP_MAX_") == "0"}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    for name in BENCHES if "all" in options.names else dict.fromkeys(options.names):
        lines = []
        for measured in BENCHES[name](settings):
            lines.append(
                json.dumps(measured | where | {"load": os.getloadavg()[0]} | ({} if name == "sandbox" else params))
            )
            print(lines[-1], flush=True)
            if options.out is not None:  # after every line, for a bench that is stopped has still measured something
                write_text(options.out / f"{name}.jsonl", "\n".join(lines) + "\n")
                write_text(options.out / "table.md", table(options.out))
    return 0


def table(folder: pathlib.Path) -> str:
    """Everything that a folder's lines compare, as a table in Markdown."""
    rows = ["| bench | case | ratio | what | against |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if "ratio" in line:
                what, against = (
                    f"{side}: {line[key]:,} {line['unit']}"
                    for side, key in zip(line["sides"], ("value", "against"), strict=True)
                )
            else:
                what, against = f"{line.get('skipped') or line.get('value')} {line.get('unit', '')}".strip(), ""
            rows.append(f"| {line['bench']} | {line['case']} | {line.get('ratio', '')} | {what} | {against} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
