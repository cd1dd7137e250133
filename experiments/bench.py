"""Measurements, one JSON line each:  python -m experiments.bench rollout branch train sandbox [--quick] [--devices 2]

The sides of a comparison run in turns (A, B, A, B, ...), after a warm-up that compiles and starts everything; figures
are medians. Rates of a shared machine move by tens of percent, so read the ratios.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from elpo_jax.model.config import count_params
from elpo_jax.model.transformer import init
from elpo_jax.policy.batch import Batch, Example, pack, stack
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import elpo
from elpo_jax.rollout import decode
from elpo_jax.rollout.sampler import Request, Sampler, SamplerConfig
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.provenance import provenance
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step
from elpo_jax.trees.trajectory import Author, Segment
from experiments.bench_sandbox import bench_sandbox
from experiments.measure import Settings, Side, compare


def bench_rollout(settings: Settings) -> Iterator[dict]:
    """Sampled tokens per second of the sampler, with slots and tool turns, against a bare loop at full slots."""
    slots, turns = (8, 2) if settings.quick else (64, 4)
    for name, config in settings.models().items():
        mesh = make_mesh(MeshConfig())
        sampler = Sampler(config, SamplerConfig(slots=slots, context=384), (), settings.seed, mesh)
        params = decode.place_params(init(config, jax.random.key(settings.seed)), mesh)
        sampler.load(params, version=0)
        bare = _bare_loop(config, slots, sampler.context, params, mesh, settings)
        for label, played in (("one turn each", 1), (f"{turns} turns with tools between", turns)):

            def work(sampler=sampler, played=played):
                return _play(sampler, attempts=2 * slots, turns=played, settings=settings)

            case = f"{name}, {slots} slots, {label}"
            sides = Side("sampler", work), Side("bare scan at full slots", bare)
            yield compare(settings, "rollout", case, *sides)


def _bare_loop(config, slots: int, context: int, params, mesh, settings: Settings) -> Callable[[], int]:
    """The decode loop alone: every slot always samples, and the host looks once."""
    steps = 16 if settings.quick else 128
    state = decode.make_state(config, mesh, slots, context, group=1, block=128)
    fn = decode.make_decode(config, mesh, (), settings.seed, steps)
    control = np.zeros(state.control.shape, np.int32)
    control[:, decode.POSITION], control[:, decode.REMAINING] = context // 3, steps
    control[:, decode.STREAM] = np.arange(slots)[:, None]

    def work():
        nonlocal state
        state, out = fn(params, state._replace(control=control), np.ones(2, np.float32))
        return int((np.asarray(out)[:, 0] >= 0).sum())

    return work


def _play(sampler: Sampler, attempts: int, turns: int, settings: Settings) -> int:
    """Attempts of several turns, eight to a prompt, whose tools take no time; returns the number of sampled tokens."""
    prompts = [_text(np.random.default_rng((settings.seed, i)), 96) for i in range(-(-attempts // 8))]
    waiting = [(i, (prompts[i // 8],)) for i in reversed(range(attempts))]
    live: dict[int, tuple[int, tuple[Segment, ...], int]] = {}
    tokens, ended = 0, []

    def submit(attempt: int, prefix: tuple[Segment, ...], turn: int) -> None:
        rng = np.random.default_rng((settings.seed, attempt, turn))  # the work does not depend on the schedule
        answer = (_text(rng, int(rng.integers(8, 24))),) if turn > 1 else ()
        request = Request((*prefix, *answer), (0, attempt // 8, attempt, turn), int(rng.integers(8, 49)))
        live[sampler.submit(request)] = (attempt, request.prefix, turn)

    while waiting or live:
        for _ in range(min(sampler.free_slots, len(waiting))):
            submit(*waiting.pop(), 1)
        sampler.start_visit(1.0)
        for completion in ended:
            attempt, prefix, turn = live.pop(completion.ticket)
            tokens += len(completion.segment)
            if turn == turns:
                sampler.release(completion.ticket)
            else:
                submit(attempt, (*prefix, completion.segment), turn + 1)
        ended = sampler.finish_visit()
    return tokens


def _text(rng: np.random.Generator, length: int) -> Segment:
    return Segment(Author.ENVIRONMENT, rng.integers(0, 512, length).astype(np.int32))


def bench_branch(settings: Settings) -> Iterator[dict]:
    """Sixteen continuations of one cached prefix: rows of the cache are forked, or each prefix is prefilled again."""
    branches = 4 if settings.quick else 16
    shapes = ((64, 16),) if settings.quick else ((128, 32), (512, 32), (512, 128), (2048, 32))
    for name, config in settings.models().items():
        for length, suffix in shapes:
            mesh = make_mesh(MeshConfig())
            shape = SamplerConfig(slots=branches, context=length + suffix)
            sampler = Sampler(config, shape, (), settings.seed, mesh)
            params = init(config, jax.random.key(settings.seed))
            prefix = _text(np.random.default_rng(settings.seed), length)

            def warm(sampler=sampler, params=params, prefix=prefix):
                sampler.load(params, version=0)
                sampler.submit(Request((prefix,), (0, 0, branches, 1), 1))
                for completion in sampler.visit(1.0):
                    sampler.release(completion.ticket)

            def branch(copy: bool, sampler=sampler, prefix=prefix, suffix=suffix) -> int:
                for i in range(branches):
                    mine = Segment(prefix.author, prefix.ids) if copy else prefix
                    sampler.submit(Request((mine,), (0, 0, i, 1), suffix))
                done = 0
                while done < branches:
                    for completion in sampler.visit(1.0):
                        sampler.release(completion.ticket)
                        done += 1
                return branches * suffix

            case = f"{name}, {branches} x {suffix} tokens after {length}"
            forked = Side("fork", lambda run=branch: run(copy=False), warm)
            yield compare(
                settings, "branch", case, forked, Side("prefill each", lambda run=branch: run(copy=True), warm)
            )


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
    params = {"params": {name: count_params(config) for name, config in settings.models().items()}}
    where = provenance() | {"seed": options.seed}
    for name in options.names:
        for line in BENCHES[name](settings):
            print(json.dumps(line | where | ({} if name == "sandbox" else params)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
