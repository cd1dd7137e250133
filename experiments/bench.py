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

from elpo_jax.model.config import count_params
from elpo_jax.report.log import write_text
from elpo_jax.train.provenance import provenance
from experiments.bench_loss import bench_compile, bench_cross_entropy
from experiments.bench_rl import bench_elpo, bench_rl
from experiments.bench_rollout import bench_branch, bench_decode, bench_rollout
from experiments.bench_sandbox import bench_sandbox
from experiments.bench_timeline import bench_timeline
from experiments.bench_train import bench_train, bench_tree, bench_update
from experiments.measure import MODELS, Settings

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
    memory = {
        "malloc_keeps_pages": os.environ.get("MALLOC_MMAP_MAX_") == "0",
        "huge_pages": "malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
    }
    where = provenance() | {"seed": options.seed} | memory
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
