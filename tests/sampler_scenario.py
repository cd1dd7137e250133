"""A small network, and one fixed scenario that uses everything the sampler can do; also a script for a fresh process:

python tests/sampler_scenario.py DATA FSDP TENSOR [decode]    -> one JSON line, with the program that decodes if asked
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from elpo_jax.model.config import ModelConfig
from elpo_jax.model.transformer import init
from elpo_jax.rollout import decode
from elpo_jax.rollout.sampler import Request, Sampler, SamplerConfig
from elpo_jax.train.mesh import MeshConfig, make_mesh, shardings
from elpo_jax.trees.trajectory import Author, Segment

MODEL = ModelConfig(
    vocab_size=67, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=48, qk_norm=True, tied=False
)
SHAPES = SamplerConfig(
    slots=4, context=64, group=4, block=16, steps_per_visit=3, prefill_buckets=(4, 16), prefill_rows=(2,)
)
STOPS = (5, 6, 7)
SEED = 3


def make_params(seed: int = 0):
    """Random parameters; the head is enlarged, so that the distributions are far from uniform."""
    params = init(MODEL, jax.random.key(seed))
    return {**params, "head": params["head"] * 1.5}


def text(seed: int, length: int) -> Segment:
    return Segment(Author.ENVIRONMENT, np.random.default_rng(seed).integers(0, 67, length).astype(np.int32))


def scenario(sampler: Sampler) -> list[Segment]:
    """Ten attempts of up to three turns at three prompts, the later ones branching off the earlier ones' first turn."""
    prompts = [text(100 + i, 9 + 5 * i) for i in range(3)]
    waiting = [((prompts[i % 3],), i) for i in range(6)]
    live, turns = {}, []
    while waiting or live:
        while waiting and sampler.free_slots:
            prefix, attempt = waiting.pop(0)
            live[sampler.submit(Request(prefix, (1, attempt % 3, attempt, 1), 6))] = (prefix, attempt)
        for done in sampler.visit(0.9):
            prefix, attempt = live.pop(done.ticket)
            turns.append(done.segment)
            longer = (*prefix, done.segment, text(attempt, 4))
            if len(prefix) == 1 and attempt < 4:
                waiting.append((longer, 6 + attempt))
            if len(prefix) < 5:
                live[sampler.submit(Request(longer, (1, attempt % 3, attempt, len(longer)), 6))] = (longer, attempt)
            else:
                sampler.release(done.ticket)
    return turns


def waiting_scenario(sampler: Sampler, visits: int) -> dict[tuple[int, int, int, int], Segment]:
    """Attempts whose answers take `visits` visits, in more than there are slots: the turns, by stream.

    Every third attempt takes its first turn back, and from every second one another branches while it waits.
    """
    prompts = [text(200 + i, 8 + 6 * i) for i in range(3)]
    new = [((prompts[i % 3],), (2, i % 3, i, 1)) for i in range(9)]
    live, turns = {}, {}
    answers = [[] for _ in range(visits)]
    while new or live or any(answers):
        for longer, stream in answers.pop(0):
            live[sampler.submit(Request(longer, stream, 4 + sum(stream) % 5))] = (longer, stream)
        while new and sampler.free_slots:
            prefix, stream = new.pop(0)
            live[sampler.submit(Request(prefix, stream, 4 + sum(stream) % 5))] = (prefix, stream)
        answers.append([])
        for done in sampler.visit(0.9):
            prefix, stream = live.pop(done.ticket)
            turns[stream] = done.segment
            longer, attempt, turn = (*prefix, done.segment, text(sum(stream), 3)), *stream[2:]
            if turn == 1 and attempt < 9 and attempt % 2:
                new.append((longer, (*stream[:2], 10 + attempt, 1)))
            if turn == 1 and attempt % 3 == 0:
                answers[-1].append((prefix, (*stream[:3], 9)))
            elif turn < 3:
                answers[-1].append((longer, (*stream[:3], turn + 1)))
            else:
                sampler.release(done.ticket)
    return turns


def main(data: int, fsdp: int, tensor: int, *, with_program: bool) -> None:
    jax.config.update("jax_num_cpu_devices", data * fsdp * tensor)
    mesh = make_mesh(MeshConfig(data, fsdp, tensor))
    params = make_params()
    params = jax.device_put(params, shardings(mesh, params))
    # One row count, for fewer compilations.
    shapes = dataclasses.replace(SHAPES, prefill_rows=(SHAPES.slots,), parking=4)
    sampler = Sampler(MODEL, shapes, STOPS, SEED, mesh)
    sampler.load(params, version=0)
    turns = scenario(sampler)
    parked = waiting_scenario(sampler, visits=2)
    line = {
        "ids": [turn.ids.tolist() for turn in turns],
        "logprobs": [[float(x).hex() for x in turn.logprobs] for turn in turns],
        "entropies": [[float(x).hex() for x in turn.entropies] for turn in turns],
        "parked": [turn.ids.tolist() for _, turn in sorted(parked.items())],
    }
    if with_program:
        fn = decode.make_decode(MODEL, mesh, STOPS, SEED, steps=3)
        group = SHAPES.slots // (data * fsdp)
        state = decode.make_state(MODEL, mesh, shapes.slots, shapes.context, group, shapes.block, shapes.parking)
        compiled = fn.lower(decode.place_params(params, mesh, MODEL.dtype), state, np.ones(2, np.float32)).compile()
        line["decode"] = compiled.as_text()
    print(json.dumps(line))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), with_program=sys.argv[4:] == ["decode"])
