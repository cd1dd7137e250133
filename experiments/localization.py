"""Localizers against the exact oracle, without a policy network.

    python -m experiments.localization --task ledger --trials 2000 [--out experiments/results/localization] [--json]

A scripted player fails ledger attempts of K = 3 to 10 tool calls; each localizer then searches the first irrecoverable
step with continuations that are real plays from the state after the probed step: from a recoverable prefix they succeed
with probability p, from an irrecoverable one never. Continuation k of step m is the same play for every localizer that
asks for it, and a success at p is one at every higher p, so the lines of the figure are paired comparisons.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from elpo_jax.report.log import write_json, write_text
from elpo_jax.report.progress import Progress
from elpo_jax.tasks.base import Task
from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tasks.ledger_oracle import first_irrecoverable
from elpo_jax.tasks.ledger_policy import Attempt, complete, stumble
from elpo_jax.trees.localize import LOCALIZERS, make_search

LENGTHS = range(3, 11)  # K, the tool calls of the failed attempts, evenly
SUCCESS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # p, of a continuation from a recoverable prefix
BLUNDER_RATE = 0.3  # of the player whose failures are searched
_CHUNK = 10  # trials that a worker takes at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the figures depend on.

    Attributes:
      trials: Failed attempts to search.
      continuations: X, per probed step.
      noise: Probability that a ledger tool fails at random.
      seed: Of everything.
    """

    trials: int = 2000
    continuations: int = 2
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.trials < 1 or self.continuations < 1 or self.seed < 0:
            raise ValueError("--trials and --continuations must be at least 1, and --seed at least 0")
        if not 0 <= self.noise < 1:
            raise ValueError(f"--noise is a probability below 1, not {self.noise}")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One failed attempt and what was said about it.

    Attributes:
      length: K.
      truth: Exact first irrecoverable step, 1..K+1.
      named: Step named by each localizer at each p (0: none), in the order of `cases()`.
      probes: Continuations that it took.
      waves: Rounds of continuations that had to wait for each other.
    """

    length: int
    truth: int
    named: tuple[int, ...]
    probes: tuple[int, ...]
    waves: tuple[int, ...]


def cases() -> list[tuple[str, float]]:
    """Every (localizer, p)."""
    return list(itertools.product(LOCALIZERS, SUCCESS))


def failed_attempt(family: Ledger, length: int, seed: int, trial: int) -> tuple[Task, Attempt]:
    """Draws attempts until one fails after exactly `length` calls."""
    for draw in itertools.count():
        rng = np.random.default_rng((seed, trial, 0, draw))
        difficulty = int(rng.integers(max(2, length - family.slack), min(10, length + 2) + 1))
        task = family.task("train", int(rng.integers(2**31)), difficulty)
        attempt = stumble(family, task, rng, BLUNDER_RATE, key=int(rng.integers(2**62)))
        if len(attempt.states) == length and not attempt.success:
            return task, attempt


def run_trial(settings: Settings, trial: int) -> Trial:
    """Makes failed attempt number `trial` and lets every localizer search it, at every p."""
    family = Ledger(settings.seed, noise=settings.noise)
    length = LENGTHS[trial % len(LENGTHS)]
    task, attempt = failed_attempt(family, length, settings.seed, trial)

    @functools.cache
    def draw(step: int, k: int) -> float:
        return np.random.default_rng((settings.seed, trial, 1, step, k)).random()

    @functools.cache
    def play(step: int, k: int, succeed: bool) -> bool:
        rng = np.random.default_rng((settings.seed, trial, 2, step, k))
        start = attempt.states[step - 1].fork(int(rng.integers(2**62)))
        return complete(family, task, start, task.max_steps - step, succeed, rng).success

    found = []
    for localizer, p in cases():
        search = make_search(localizer, [result.status for result in attempt.results], key=(settings.seed, trial))
        probes = waves = 0
        while steps := search.propose():
            tries = range(settings.continuations)
            search = search.observe({step: [play(step, k, draw(step, k) < p) for k in tries] for step in steps})
            probes += len(steps) * settings.continuations
            waves += 1
        found.append((search.result.step, probes, waves))
    truth = first_irrecoverable(task, attempt.states)
    return Trial(length, truth, *zip(*found, strict=True))


def run_trials(settings: Settings, jobs: int, progress: Callable[[int], None] = lambda done: None) -> list[Trial]:
    """All trials, in order; the same whatever the number of worker processes."""
    trials = []
    with contextlib.ExitStack() as stack:
        mapped = map
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn))
            mapped = functools.partial(pool.map, chunksize=_CHUNK)
        for trial in mapped(functools.partial(run_trial, settings), range(settings.trials)):
            trials.append(trial)
            progress(len(trials))
    return trials


def wilson_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a binomial proportion (95 % by default): (low, high)."""
    rate, spread = hits / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(trials: Sequence[Trial]) -> list[dict]:
    """One row per (localizer, p).

    Keys: `exact`, the share of attempts whose step was named exactly, with its 95 % Wilson interval `exact_ci`; `mae`,
    the mean absolute error in steps over the attempts for which a step was named, None if there was none; `named`,
    their share (`none` names no step, `feedback` none where no call failed; both are misses in `exact`); `probes` and
    `waves`, the mean number of continuations per attempt and of sequential rounds of them; `by_k`, `exact` by length.
    """
    truth = np.array([trial.truth for trial in trials])
    length = np.array([trial.length for trial in trials])
    rows = []
    for case, (localizer, p) in enumerate(cases()):
        named = np.array([trial.named[case] for trial in trials])
        exact, given = named == truth, named > 0
        rows.append(
            {
                "localizer": localizer,
                "p_success": p,
                "exact": float(exact.mean()),
                "mae": float(np.abs(named - truth)[given].mean()) if given.any() else None,
                "probes": float(np.mean([trial.probes[case] for trial in trials])),
                "n": len(trials),
                "exact_ci": wilson_interval(int(exact.sum()), len(trials)),
                "named": float(given.mean()),
                "waves": float(np.mean([trial.waves[case] for trial in trials])),
                "by_k": {str(k): float(exact[length == k].mean()) for k in sorted(set(length.tolist()))},
            }
        )
    return rows


def grids(rows: Sequence[dict]) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables for people: (title, rows of cells with a header), a line per localizer and a column per p or K."""

    def percent(row: dict) -> str:
        low, high = row["exact_ci"]
        return f"{100 * row['exact']:.1f}±{50 * (high - low):.1f}"

    figures = (
        ("Exact step, % of attempts (± half the width of the 95 % Wilson interval)", percent),
        ("Mean absolute error, steps", lambda row: "–" if row["mae"] is None else f"{row['mae']:.2f}"),
        ("Continuations per attempt", lambda row: f"{row['probes']:.1f}"),
    )
    header = ["localizer", *(f"p = {p:g}" for p in SUCCESS)]
    by_name = {name: [row for row in rows if row["localizer"] == name] for name in LOCALIZERS}
    for title, show in figures:
        yield title, [header, *([name, *map(show, of_p)] for name, of_p in by_name.items())]
    at = SUCCESS.index(0.5)
    lengths = list(rows[0]["by_k"])
    by_k = [[name, *(f"{100 * of_p[at]['by_k'][k]:.1f}" for k in lengths)] for name, of_p in by_name.items()]
    yield "Exact step by number of tool calls, % at p = 0.5", [["localizer", *(f"K = {k}" for k in lengths)], *by_k]


def print_tables(rows: Sequence[dict], console: Console) -> None:
    for title, (header, *lines) in grids(rows):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(rows: Sequence[dict], settings: Settings, provenance: dict) -> str:
    """The page beside the figure: what was done, where, and the tables."""
    lines = [
        "# Localizers against the exact oracle (ledger)",
        "",
        f"{settings.trials} failed attempts of a scripted stochastic player, K = {LENGTHS[0]}..{LENGTHS[-1]} tool "
        f"calls in equal numbers; {settings.continuations} continuations per probed step; noise {settings.noise:g}; "
        f"seed {settings.seed}. A continuation from a recoverable prefix succeeds with probability p, from any other "
        "never. `none` names no step, and `feedback` none where no call failed: misses in the first table, left out of "
        "the second. `binary_printed` never probes step K and cannot name K + 1.",
        "",
        ", ".join(f"{key} {value}" for key, value in provenance.items()),
    ]
    for title, (header, *body) in grids(rows):
        lines += ["", f"## {title}", "", "| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
        lines += ["| " + " | ".join(line) + " |" for line in body]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict], settings: Settings, path: pathlib.Path) -> None:
    """Accuracy, error and cost against p, one line per localizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Okabe and Ito's colours, with a marker and a dash each: told apart without colour as well.
    styles = {
        "binary": ("#0072B2", "o", "-"),
        "binary_printed": ("#D55E00", "s", "--"),
        "dense": ("#009E73", "^", "-"),
        "feedback": ("#CC79A7", "D", "-."),
        "random": ("#E69F00", "v", ":"),
        "none": ("#000000", "x", ":"),
    }
    panels = {
        "exact": "Exact step, share of attempts",
        "mae": "Mean absolute error, steps",
        "probes": "Continuations per attempt",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, (colour, marker, dash) in styles.items():
            points = [row for row in rows if row["localizer"] == name and row[key] is not None]
            x, y = [row["p_success"] for row in points], [row[key] for row in points]
            axis.plot(x, y, color=colour, marker=marker, linestyle=dash, markersize=5, linewidth=1.6, label=name)
            if key == "exact":
                low, high = zip(*(row["exact_ci"] for row in points), strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        top = 1.02 if key == "exact" else None
        axis.set(title=title, xlabel="success probability p of a continuation", ylim=(0, top))
        axis.set_xticks(SUCCESS, [f"{p:g}" for p in SUCCESS])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"Finding the first irrecoverable step: {settings.trials} failed ledger attempts, "
        f"K = {LENGTHS[0]}..{LENGTHS[-1]}, {settings.continuations} continuations per probed step",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def save(
    folder: pathlib.Path, settings: Settings, trials: Sequence[Trial], rows: Sequence[dict], provenance: dict
) -> None:
    """Writes localization.json, .md and .png."""
    truth = {str(k): collections.Counter(sorted(t.truth for t in trials if t.length == k)) for k in LENGTHS}
    config = {"task": "ledger", **dataclasses.asdict(settings), "lengths": list(LENGTHS), "blunder_rate": BLUNDER_RATE}
    record = {"config": config, "provenance": provenance, "first_irrecoverable_by_k": truth, "rows": rows}
    write_json(folder / "localization.json", record)
    write_text(folder / "localization.md", markdown(rows, settings, provenance))
    plot(rows, settings, folder / "localization.png")


def machine() -> dict:
    """Where the figures were made; jax is kept off any accelerator, for nothing here computes on one."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from elpo_jax.train.provenance import provenance

    return provenance()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.localization", description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=["ledger"], default="ledger", help="the family with an exact oracle")
    parser.add_argument("--trials", type=int, default=2000, help="failed attempts to search")
    parser.add_argument("--continuations", type=int, default=2, help="continuations per probed step (X)")
    parser.add_argument("--noise", type=float, default=0.0, help="probability that a tool call fails at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes; no number depends on it")
    parser.add_argument("--out", type=pathlib.Path, help="folder for localization.json, .md and .png; made if missing")
    parser.add_argument("--json", action="store_true", help="print one JSON line per (localizer, p) and nothing else")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(options.trials, options.continuations, options.noise, options.seed)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.out):
                pass  # that it can be written shows now, and not after the work
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write to {options.out} ({error.strerror}): choose another --out")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    provenance = machine() if options.out is not None else {}
    if options.json:
        trials = run_trials(settings, options.jobs)
    else:
        with Progress("localization", settings.trials, rates=("trials",)) as progress:
            trials = run_trials(settings, options.jobs, lambda done: progress.update(done, trials=1))
    rows = summarise(trials)
    if options.json:
        print("\n".join(map(json.dumps, rows)), flush=True)
    else:
        print_tables(rows, Console())
    if options.out is not None:  # last, for whatever keeps it from being written, the figures are out
        try:
            save(options.out, settings, trials, rows, provenance)
        except OSError as error:
            parser.error(f"cannot write to {options.out} ({error.strerror}): free some space, or choose another --out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
