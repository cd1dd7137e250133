"""The sampler against the trainer's own forward pass, against itself in other batches, slots and processes."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampler_scenario import MODEL, SEED, SHAPES, STOPS, make_params, scenario, text, waiting_scenario

from elpo_jax.model.cache import block_lengths
from elpo_jax.model.logprob import token_logprobs
from elpo_jax.model.transformer import apply, unembed
from elpo_jax.rollout import decode
from elpo_jax.rollout.sampler import Request, Sampler, SamplerConfig, VersionError
from elpo_jax.rollout.slots import SlotTable, Source, split_prefill
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.trees.trajectory import Author, Segment

ROOT = pathlib.Path(__file__).parents[1]
PARAMS = make_params()


PARKING = dataclasses.replace(SHAPES, parking=2)


@pytest.fixture(scope="module")
def compiled():
    samplers = {stops: Sampler(MODEL, SHAPES, stops, SEED) for stops in ((), STOPS)}
    changes = {"parking": {}, "pieces": {"prefill_per_visit": 4}}
    return samplers | {k: Sampler(MODEL, dataclasses.replace(PARKING, **v), STOPS, SEED) for k, v in changes.items()}


def ready(sampler):
    """The sampler with nothing held, and `PARAMS` loaded."""
    for ticket in list(sampler._held):
        sampler.release(ticket)
    sampler.load(PARAMS, version=0)
    return sampler


@pytest.fixture
def sampler(compiled):
    """Without stop ids: every turn has max_tokens tokens."""
    return ready(compiled[()])


@pytest.fixture
def stopping(compiled):
    return ready(compiled[STOPS])


@pytest.fixture
def parking(compiled):
    """With stop ids, and two parked rows."""
    return ready(compiled["parking"])


@pytest.fixture
def parks(monkeypatch):
    """What is parked from here on."""
    seen, original = [], SlotTable._park

    def spy(self, slot):
        seen.append(original(self, slot))
        return seen[-1]

    monkeypatch.setattr(SlotTable, "_park", spy)
    return seen


@jax.jit
def _reference(ids, temperature):
    hidden, _ = apply(MODEL, PARAMS, ids[None], jnp.arange(ids.shape[0])[None])
    return (*token_logprobs(MODEL, PARAMS, hidden, ids[None], temperature), unembed(MODEL, PARAMS, hidden[0]))


def reference(prefix, turn, temperature):
    """The trainer's log-probabilities and entropies of a turn, and the logits it was drawn from, without a cache."""
    ids = np.concatenate([s.ids for s in (*prefix, turn)])
    padded = np.zeros(SHAPES.context, np.int32)
    padded[: len(ids)] = ids
    logp, entropy, logits = _reference(padded, temperature)
    own = slice(len(ids) - len(turn), len(ids))
    return np.asarray(logp)[0, own], np.asarray(entropy)[0, own], np.asarray(logits)[own.start - 1 : own.stop - 1]


def agrees(prefix, turn, temperature=1.0):
    logp, entropy, _ = reference(prefix, turn, temperature)
    np.testing.assert_allclose(turn.logprobs, logp, atol=1e-4)
    np.testing.assert_allclose(turn.entropies, entropy, atol=1e-4)


def same(a, b):
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-5)


def copies(prefix):
    """Equal segments that are other objects, so nothing that is cached can be found."""
    return tuple(Segment(s.author, s.ids) for s in prefix)


def finish(sampler, *requests, temperature=1.0):
    """Submits the requests together and visits until all have ended: completions in order."""
    order = [sampler.submit(request) for request in requests]
    done = {}
    while len(done) < len(order):
        done |= {c.ticket: c for c in sampler.visit(temperature) if c.ticket in order}
    return [done[ticket] for ticket in order]


@pytest.fixture
def prefilled(monkeypatch):
    """Number of tokens of every row that is prefilled from here on."""
    counts = []
    original = Sampler._run_prefill

    def spy(self, group, *shape, **kind):
        counts.extend(len(piece.ids) for piece in group)
        return original(self, group, *shape, **kind)

    monkeypatch.setattr(Sampler, "_run_prefill", spy)
    return counts


# What is recorded is what the trainer will compute.


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_are_the_trainers(sampler, temperature):
    requests = [Request((text(i, 3 + 7 * i), text(50 + i, 2)), (0, 1, i, 1), 20) for i in range(6)]
    turns = sampler.generate(PARAMS, requests, temperature)
    assert [len(turn) for turn in turns] == [20] * 6
    for request, turn in zip(requests, turns, strict=True):
        assert turn.author is Author.MODEL
        agrees(request.prefix, turn, temperature)


def test_greedy_takes_the_largest_logit_of_what_precedes_it(sampler):
    request = Request((text(0, 11),), (0, 0, 0, 0), 30)
    (turn,) = sampler.generate(PARAMS, [request], 0.0)
    _, _, logits = reference(request.prefix, turn, 1.0)
    np.testing.assert_array_equal(turn.ids, logits.argmax(axis=1))
    agrees(request.prefix, turn, temperature=1.0)


def test_turns_with_answers_between_equal_one_pass_over_the_whole_sequence(stopping):
    lengths = []
    prefixes = [(text(i, 10),) for i in range(4)]
    for turn in range(1, 4):
        requests = [Request(prefix, (0, 0, i, turn), 9) for i, prefix in enumerate(prefixes)]
        for i, done in enumerate(finish(stopping, *requests, temperature=0.8)):
            agrees(prefixes[i], done.segment, 0.8)
            lengths.append(len(done.segment))
            prefixes[i] = (*prefixes[i], done.segment, text(turn, 6))
    assert min(lengths) < 9 == max(lengths), "some turns, and not all, should have been stopped"


# A sample is a function of its stream, its prefix and the parameters.


def test_the_same_stream_gives_the_same_tokens_in_any_batch_slot_and_order(sampler):
    prompt = text(2, 13)
    wanted = Request((prompt,), (4, 5, 6, 7), 15)
    (alone,) = sampler.generate(PARAMS, [wanted], 1.0)
    others = [Request((text(60 + i, 4 + i),), (4, 5, i, 7), 5 + i) for i in range(5)]
    for place in (0, 3, 5):  # first slot, last slot, and only after waiting for one
        turns = sampler.generate(PARAMS, [*others[:place], wanted, *others[place:]], 1.0)
        same(turns[place], alone)
    shared = [Request((prompt,), (4, 5, 100 + i, 7), 15) for i in range(3)]  # the prompt is forked from the first
    same(sampler.generate(PARAMS, [*shared, wanted], 1.0)[3], alone)


def test_steps_per_visit_and_buckets_change_nothing(sampler):
    shapes = SamplerConfig(slots=2, context=64, steps_per_visit=7, prefill_buckets=(8,), prefill_rows=(1,))
    requests = [Request((text(i, 20 + i),), (0, 0, i, 1), 12) for i in range(3)]
    other = Sampler(MODEL, shapes, (), SEED).generate(PARAMS, requests, 1.0)
    for a, b in zip(sampler.generate(PARAMS, requests, 1.0), other, strict=True):
        same(a, b)


def test_each_part_of_the_stream_and_the_seed_changes_the_tokens(sampler):
    prompt = text(2, 13)
    streams = [(1, 2, 3, 4), (9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (1, 2, 2**32 - 1, 4)]
    turns = sampler.generate(PARAMS, [Request((prompt,), stream, 20) for stream in streams], 1.0)
    turns += Sampler(MODEL, SHAPES, (), SEED + 1).generate(PARAMS, [Request((prompt,), streams[0], 20)], 1.0)
    assert len({tuple(turn.ids.tolist()) for turn in turns}) == 7


def run_process(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "sampler_scenario.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_fresh_processes_repeat_every_bit_and_meshes_agree(stopping):
    meshes = {"two": (2, 1, 1, "decode"), "again": (2, 1, 1), "sharded": (1, 2, 2), "split": (1, 1, 2)}
    processes = {name: run_process(*mesh) for name, mesh in meshes.items()}
    here = scenario(stopping)
    parked = [turn.ids.tolist() for _, turn in sorted(waiting_scenario(ready(stopping), visits=1).items())]
    results = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results[name] = json.loads(out)
    for key in ("ids", "logprobs", "entropies", "parked"):
        assert results["two"][key] == results["again"][key]
    for result in results.values():
        assert result["ids"] == [turn.ids.tolist() for turn in here]
        assert result["parked"] == parked
        for turn, logprobs, entropies in zip(here, result["logprobs"], result["entropies"], strict=True):
            np.testing.assert_allclose(turn.logprobs, [float.fromhex(x) for x in logprobs], atol=1e-5)
            np.testing.assert_allclose(turn.entropies, [float.fromhex(x) for x in entropies], atol=1e-5)
    # Two devices decode without a word to each other, and no step of the loop copies the cache.
    code = results["two"]["decode"]
    assert " while(" in code
    assert not re.search(r"all-(reduce|gather|to-all)|collective|permute\(", code)
    rows = SHAPES.slots // 2  # of one device
    sizes = block_lengths(SHAPES.context, SHAPES.block)
    assert sizes == (16, 16, 32)
    for size in sizes:
        assert f"f32[{rows},2,8,{size}]" in code and f"f32[{rows},2,{size},8]" in code
        assert not re.findall(rf"= f32\[(?:{rows}|1),2,(?:8,{size}|{size},8)\]\S* copy\(", code)


# Forking and rewinding a cache row equal computing it again.


def forks_on_meshes():
    """For a process of four devices: copies between shards of rows, trunks and parked rows are those of one device."""
    # Rows 0 and 1, trunk 4 and parked row 6 are of the first shard of two; every copy but the last goes to the other.
    forks = np.array([(0, 4, 7, 0), (3, 5, 0, 2), (6, 0, 5, 0), (2, 0, 1, 0), (7, 0, 6, 0), (2, 3, 3, 0)], np.int32)
    for dtype, sizes in itertools.product(("float32", "bfloat16"), ((2, 1, 1), (1, 2, 2))):
        config, forked = dataclasses.replace(MODEL, dtype=dtype), []
        for shape in ((1, 1, 1), sizes):
            mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
            rng = np.random.default_rng(0)
            state = decode.make_state(config, mesh, 4, 32, 2, 8, 2)

            def fill(x, rng=rng):
                values = np.where(rng.random(x.shape) < 0.1, -0.0, rng.normal(size=x.shape))
                return jax.device_put(values.astype(x.dtype), x.sharding)

            state = jax.tree.map(fill, state)
            before = jax.tree.map(np.asarray, state)
            forked.append(jax.tree.map(np.asarray, decode.make_fork(config, mesh)(state, forks)))
            assert not np.array_equal(before.parked[0].k[0], forked[-1].parked[0].k[0])
        assert forked[0].cache[0].own.k[0].dtype == dtype
        jax.tree.map(lambda one, many: np.testing.assert_array_equal(one.view(np.int8), many.view(np.int8)), *forked)
    print("forks on meshes")


@pytest.mark.slow
def test_forks_between_devices_copy_every_bit():
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    code = "import jax; jax.config.update('jax_num_cpu_devices', 4); import test_sampler as t; t.forks_on_meshes()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "forks on meshes" in done.stdout, done.stderr[-3000:]


def branch_point(sampler):
    """An attempt of two turns, held: its prefix up to the first answer, and the whole of it."""
    prompt = text(3, 12)
    (first,) = finish(sampler, Request((prompt,), (0, 0, 0, 1), 8))
    anchor = (prompt, first.segment, text(4, 5))
    (second,) = finish(sampler, Request(anchor, (0, 0, 0, 2), 8))
    return anchor, (*anchor, second.segment, text(5, 7)), second.ticket


def test_a_fork_equals_a_recompute_and_prefills_nothing(sampler, prefilled):
    anchor, whole, _ = branch_point(sampler)
    prefilled.clear()
    requests = [Request(anchor, (0, 0, attempt, 2), 10) for attempt in (1, 2, 3)]
    branches = finish(sampler, *requests)
    assert prefilled == []
    assert len({tuple(branch.segment.ids.tolist()) for branch in branches}) == 3
    # The source was only read: the attempt that was held goes on as if nothing had happened.
    (third,) = finish(sampler, Request(whole, (0, 0, 0, 3), 10))
    agrees(whole, third.segment)
    again = ready(sampler).generate(PARAMS, [Request(copies(anchor), request.stream, 10) for request in requests], 1.0)
    for branch, recomputed in zip(branches, again, strict=True):
        agrees(anchor, branch.segment)
        same(recomputed, branch.segment)


def test_an_attempt_goes_on_in_its_own_slot_and_prefills_only_the_answer(sampler, prefilled):
    _, whole, _ = branch_point(sampler)
    prefilled.clear()
    (third,) = finish(sampler, Request(whole, (0, 0, 0, 3), 10))
    # The last sampled token and all but the last of the answer's 7: the last one is what decoding begins with.
    assert sum(prefilled) == 7 and sampler.free_slots == 3
    agrees(whole, third.segment)


def test_a_rewind_equals_a_recompute(sampler, prefilled):
    anchor, whole, _ = branch_point(sampler)
    prefilled.clear()
    (second,) = finish(sampler, Request(anchor, (0, 0, 0, 9), 10))  # the attempt takes its second turn back
    assert prefilled == [] and sampler.free_slots == 3
    onward = (*anchor, second.segment, text(6, 3))
    (third,) = finish(sampler, Request(onward, (0, 0, 0, 10), 10))
    agrees(onward, third.segment)
    assert not np.array_equal(second.segment.ids[:8], whole[3].ids)
    same(ready(sampler).generate(PARAMS, [Request(copies(anchor), (0, 0, 0, 9), 10)], 1.0)[0], second.segment)


def test_a_prompt_that_many_roots_share_is_prefilled_once(sampler, prefilled):
    prompt = text(7, 30)
    done = finish(sampler, *(Request((prompt,), (0, 0, i, 1), 4) for i in range(4)))
    assert sum(prefilled) == 29
    for completion in done:
        agrees((prompt,), completion.segment)


def test_released_slots_stay_sources_until_they_are_the_least_recently_used(sampler, prefilled):
    kept, others = text(8, 20), [text(70 + i, 20) for i in range(4)]
    for i, prompt in enumerate([kept, *others[:3]]):
        sampler.release(finish(sampler, Request((prompt,), (0, i, 0, 1), 2))[0].ticket)
    prefilled.clear()
    sampler.release(finish(sampler, Request((kept,), (0, 0, 1, 1), 2))[0].ticket)  # which also makes it recent
    assert prefilled == []
    sampler.release(finish(sampler, Request((others[3],), (0, 4, 0, 1), 2))[0].ticket)  # takes the oldest slot
    prefilled.clear()
    sampler.release(finish(sampler, Request((kept,), (0, 0, 2, 1), 2))[0].ticket)
    assert prefilled == []


def test_held_slots_survive_while_the_others_churn(sampler, prefilled):
    _, whole, _ = branch_point(sampler)
    requests = [Request((text(80 + i, 15),), (0, 1 + i, 0, 1), 3) for i in range(9)]
    waiting, live = list(requests), {}
    while waiting or live:
        assert sampler.free_slots + len(live) == 3
        while waiting and sampler.free_slots:
            request = waiting.pop(0)
            live[sampler.submit(request)] = request
        for done in sampler.visit(1.0):
            agrees(live.pop(done.ticket).prefix, done.segment)
            sampler.release(done.ticket)
    prefilled.clear()
    (third,) = finish(sampler, Request(whole, (0, 0, 0, 3), 10))
    assert sum(prefilled) == 7
    agrees(whole, third.segment)


# Attempts that wait make room for others.


@pytest.mark.parametrize("visits", [2, 4])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"prefill_per_visit": 4},
        {"slots": 6, "group": 3, "parking": 8},
    ],
)
def test_parking_changes_no_token(stopping, parks, change, visits):
    expected = waiting_scenario(stopping, visits=1)
    assert parks == [] and len(expected) > 25
    sampler = Sampler(MODEL, dataclasses.replace(PARKING, **change), STOPS, SEED)
    sampler.load(PARAMS, version=0)
    turns = waiting_scenario(sampler, visits)
    assert turns.keys() == expected.keys() and len(parks) > 3
    for stream, turn in turns.items():
        same(turn, expected[stream])
    assert sampler.free_slots == sampler.config.slots


def test_a_parked_attempt_comes_back_without_a_prefill_and_others_branch_off_it(parking, parks, prefilled):
    anchor, whole, _ = branch_point(parking)
    others = [Request((text(20 + i, 9),), (0, 1, i, 1), 30) for i in range(4)]
    assert parking.free_slots == 4, "three slots, and that of the attempt that waits"
    for request in others:
        parking.submit(request)
    parking.start_visit(1.0)
    assert [park.slot for park in parks] == [0] and parking.free_slots == 0
    prefilled.clear()
    parking.submit(Request(whole, (0, 0, 0, 3), 10))
    parking.submit(Request(anchor, (0, 0, 7, 2), 10))
    done = {}
    while len(done) < 6:
        done |= {completion.ticket: completion for completion in parking.finish_visit()}
        parking.start_visit(1.0)
    parking.finish_visit()
    # What is missing is the last sampled token and all but the last of the answer; of the branch it is nothing.
    assert sum(prefilled) == 7
    *churn, back, branch = (done[ticket].segment for ticket in sorted(done))
    agrees(whole, back)
    agrees(anchor, branch)
    for request, turn in zip(others, churn, strict=True):
        agrees(request.prefix, turn)


def test_attempts_that_go_on_come_before_new_ones_and_exchange_places_with_those_that_wait(compiled, parks):
    """Two slots and one parked row."""
    shapes = dataclasses.replace(SHAPES, slots=2, parking=1)
    sampler = Sampler(MODEL, shapes, (), SEED)
    sampler.load(PARAMS, version=0)
    prompts = [text(i, 9) for i in range(5)]
    first, second = finish(sampler, *(Request((prompts[i],), (0, 0, i, 1), 3) for i in (0, 1)))
    (third,) = finish(sampler, Request((prompts[2],), (0, 0, 2, 1), 3))  # parks the attempt that was held last
    assert len(parks) == 1 and sampler.free_slots == 0
    late = sampler.submit(Request((prompts[3],), (0, 0, 3, 1), 3))
    with pytest.raises(RuntimeError, match=r"all 2 slots are held .* and all 1 parked rows taken"):
        sampler.visit(1.0)
    # Both slots are held and no parked row is free, but the one that goes on leaves its own.
    onward = (prompts[1], second.segment, text(9, 4))
    ticket = sampler.submit(Request(onward, (0, 0, 1, 2), 3))
    assert sampler.free_slots == 0
    (done,) = sampler.visit(1.0)
    assert done.ticket == ticket and len(parks) == 2 and {park.row for park in parks} == {parks[0].row}
    agrees(onward, done.segment)
    sampler.release(done.ticket)
    (done,) = sampler.visit(1.0)
    assert done.ticket == late
    for prompt, held, attempt in ((0, first, 0), (2, third, 2)):
        onward = (prompts[prompt], held.segment, text(8, 4))
        (done,) = finish(sampler, Request(onward, (0, 0, attempt, 2), 5))
        agrees(onward, done.segment)
    for ticket in list(sampler._held):
        sampler.release(ticket)
    assert sampler.free_slots == 2


def test_parked_attempts_of_other_parameters_can_only_be_released(parking, parks):
    _, whole, ticket = branch_point(parking)
    for completion in finish(parking, *(Request((text(i, 5),), (0, 1, i, 1), 3) for i in range(4))):
        parking.release(completion.ticket)
    assert len(parks) == 1
    parking.load(PARAMS, version=8)
    with pytest.raises(VersionError, match="version 0 and version 8 is loaded"):
        parking.submit(Request(whole, (0, 0, 0, 3), 5))
    assert parking.free_slots == 4
    parking.release(ticket)
    (turn,) = finish(parking, Request(whole, (0, 0, 0, 3), 5))
    agrees(whole, turn.segment)


@pytest.mark.parametrize("kind", [STOPS, "parking", "pieces"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_any_tree_of_attempts_equals_one_pass_over_each(compiled, kind, seed):
    """Random attempts that branch, are taken back and wait for their tools, in more than there are slots."""
    rng, sampler = np.random.default_rng(seed), ready(compiled[kind])
    known = [(text(seed + i, int(rng.integers(1, 20))),) for i in range(3)]
    live, idle, turns, attempts = {}, {}, 0, 0
    while turns < 25 or live or idle:
        for ticket in list(idle):  # an attempt between turns goes on, takes a turn back, or ends
            prefix, stream = idle[ticket]
            action = rng.choice(["wait", "on", "back", "end"])
            longer = (*prefix, text(seed + turns, int(rng.integers(1, 6))))
            if action == "end" or sum(map(len, longer)) > 50 or turns >= 25:
                sampler.release(ticket)
            elif action == "on":
                known.append(longer)
                request = Request(longer, (*stream[:3], stream[3] + 1), int(rng.integers(1, 9)))
                live[sampler.submit(request)] = request
            elif action == "back":
                request = Request(prefix[:-1], (*stream[:3], stream[3] + 1), int(rng.integers(1, 9)))
                live[sampler.submit(request)] = request
            if action != "wait" or ticket not in idle or sum(map(len, longer)) > 50 or turns >= 25:
                del idle[ticket]
        for _ in range(int(rng.integers(0, sampler.free_slots + 1)) if turns < 25 else 0):
            attempts += 1
            prefix = known[rng.integers(len(known))]
            request = Request(prefix, (0, 0, attempts, 1), int(rng.integers(1, 9)))
            live[sampler.submit(request)] = request
        completions = sampler.visit(1.0)
        assert all(job.own is not None for job in sampler._waiting), "new attempts begin as was promised"
        for done in completions:
            request = live.pop(done.ticket)
            agrees(request.prefix, done.segment)
            idle[done.ticket] = ((*request.prefix, done.segment), request.stream)
            turns += 1
    assert sampler.free_slots == SHAPES.slots


# A long prompt is prefilled in pieces, beside decoding.


def test_slots_decode_in_every_visit_while_a_long_prompt_is_prefilled(sampler, prefilled):
    """Three steps per visit; the prompt's 39 tokens are prefilled in calls of 16, 16, 4 and 4."""
    requests = [Request((text(i, 5),), (0, 0, i, 1), 24) for i in range(3)]
    late = Request((text(9, 40),), (0, 0, 9, 1), 6)
    branch = Request((text(10, 3), text(11, 2)), (0, 0, 10, 1), 6)

    def play(sampler):
        """Tokens that each visit samples, and the turns."""
        order = [sampler.submit(request) for request in requests]
        sampled, done = [], {}
        while len(done) < 5:
            before = sampler._sampled
            for completion in sampler.visit(1.0):
                done[completion.ticket] = completion.segment
                sampler.release(completion.ticket)
            sampled.append(sampler._sampled - before)
            if len(sampled) == 1:
                order.append(sampler.submit(late))
                with pytest.raises(RuntimeError, match="4 requests are in flight"):
                    sampler.load(PARAMS, version=1)
            if len(sampled) == 2:  # waits for a slot, and is prefilled behind the long one
                order.append(sampler.submit(branch))
        return sampled, [done[ticket] for ticket in order]

    at_once, expected = play(sampler)
    assert at_once[:2] == [9, 12]
    shapes = dataclasses.replace(SHAPES, prefill_per_visit=16)
    pieces = Sampler(MODEL, shapes, (), SEED)
    pieces.load(PARAMS, version=0)
    prefilled.clear()
    sampled, turns = play(pieces)
    assert prefilled[:7] == [4, 4, 4, 16, 16, 4, 3], "two rows of 16 tokens are more than a visit's share, and one call"
    assert sampled[:4] == [9, 9, 9, 12], "when the row is filled its slot decodes, and not before"
    for request, turn, whole in zip((*requests, late, branch), turns, expected, strict=True):
        np.testing.assert_array_equal(turn.ids, whole.ids)
        np.testing.assert_array_equal(turn.logprobs, whole.logprobs)
        agrees(request.prefix, turn)


def test_rows_that_are_being_filled_are_read_by_those_that_come_after_them(parks):
    """Also a trunk, and rows that take the place of a parked attempt; each visit does one call, beside a long turn."""
    sampler = Sampler(MODEL, dataclasses.replace(PARKING, slots=6, group=3, parking=8, prefill_per_visit=1), (), SEED)
    sampler.load(PARAMS, version=0)
    start, prompt, more = text(8, 4), text(0, 30), text(1, 5)
    (held,) = finish(sampler, Request((start,), (0, 0, 8, 1), 3))
    schedule = {
        0: [Request((text(9, 4),), (0, 0, 9, 1), 50)],
        1: [Request((prompt,), (0, 0, 0, 1), 9)],
        2: [Request((prompt, more), (0, 0, i, 1), 9) for i in (1, 2)],
        3: [Request((prompt, text(i, 5)), (0, 0, i, 1), 9) for i in (3, 4)],
        4: [Request((start, held.segment, text(2, 9)), (0, 0, 8, 2), 9), Request((prompt, more), (0, 0, 5, 1), 9)],
    }
    live, done, most = {}, {}, 0
    for i in range(40):
        live |= {sampler.submit(request): request for request in schedule.get(i, ())}
        for completion in sampler.visit(1.0):
            done[completion.ticket] = completion
            sampler.release(completion.ticket)
        most = max(most, len(sampler._filling))
    assert most > 3 and len(parks) == 1 and len(done) == len(live) == 8
    for ticket, request in live.items():
        agrees(request.prefix, done[ticket].segment)


# Ends of turns.


def test_a_stop_id_ends_the_turn_and_is_its_last_token(sampler, stopping):
    requests = [Request((text(i, 8),), (0, 0, i, 1), 12) for i in range(12)]
    endless = sampler.generate(PARAMS, requests, 1.0)
    done = []
    for i in range(0, 12, 4):
        done += finish(stopping, *requests[i : i + 4])
        for completion in done[-4:]:
            stopping.release(completion.ticket)
    assert {c.stopped for c in done} == {True, False}
    for completion, whole in zip(done, endless, strict=True):
        ids = completion.segment.ids.tolist()
        stops = [n for n, i in enumerate(whole.ids.tolist()) if i in STOPS]
        assert len(ids) == (stops[0] + 1 if stops else 12)
        assert completion.stopped == bool(stops)
        np.testing.assert_array_equal(ids, whole.ids[: len(ids)])
        np.testing.assert_allclose(completion.segment.logprobs, whole.logprobs[: len(ids)], atol=1e-5)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7])
def test_a_turn_without_a_stop_has_max_tokens(sampler, most):
    (done,) = finish(sampler, Request((text(0, 1),), (0, 0, 0, 1), most))
    assert len(done.segment) == most and not done.stopped


def test_the_context_can_be_filled_to_the_last_token(sampler):
    requests = [Request((text(0, n),), (0, 0, n, 1), SHAPES.context - n) for n in (1, 30, 63)]
    for request, turn in zip(requests, sampler.generate(PARAMS, requests, 1.0), strict=True):
        assert len(turn) == request.max_tokens
        agrees(request.prefix, turn)


# The distribution.


def chi_square(observed, expected):
    """p-value of Pearson's test; ids expected fewer than 5 times count as one, which is left out if still too rare."""
    rare = expected < 5
    bins = [*zip(observed[~rare], expected[~rare], strict=True), (observed[rare].sum(), expected[rare].sum())]
    observed, expected = np.array([b for b in bins if b[1] >= 5]).T
    assert len(observed) > 10
    return scipy.stats.chi2.sf(np.sum((observed - expected) ** 2 / expected), len(observed) - 1)


def test_sampled_tokens_follow_the_softmax():
    count, vocab = 20_000, 67
    logits = jax.random.normal(jax.random.key(0), (vocab,)) * 1.5
    streams = np.zeros((count, 4), np.int32)
    streams[:, 2] = np.arange(count)
    uniform = jax.jit(decode.stream_uniforms, static_argnums=(0, 3))(0, streams, np.full(count, 17, np.int32), 2)
    assert scipy.stats.kstest(np.asarray(uniform).ravel(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(uniform)[0, 1]) < 0.03
    for temperature in (1.0, 0.6):
        rows = jnp.broadcast_to(logits, (count, vocab))
        ids = jax.jit(decode.sample)(rows, uniform[0], np.float32(temperature))
        expected = count * np.asarray(jax.nn.softmax(logits / temperature), np.float64)
        observed = np.bincount(ids, minlength=vocab)
        assert chi_square(observed, expected) > 0.01


def test_first_tokens_of_many_requests_follow_the_networks_softmax(sampler):
    prompt, count = text(9, 10), 1200
    turns = sampler.generate(PARAMS, [Request((prompt,), (0, 0, i, 1), 1) for i in range(count)], 1.0)
    _, _, logits = reference((prompt,), turns[0], 1.0)
    expected = count * np.asarray(jax.nn.softmax(logits[0]), np.float64)
    observed = np.bincount([turn.ids[0] for turn in turns], minlength=67)
    assert chi_square(observed, expected) > 0.01


@pytest.mark.parametrize("vocab", [1, 2, 31, 67, 512, 5000])
def test_inverse_cdf_is_exact_and_never_returns_an_impossible_id(vocab):
    rng = np.random.default_rng(vocab)
    rows = 400
    logits = rng.normal(size=(rows, vocab)).astype(np.float32) * rng.choice([0.1, 3, 30], (rows, 1))
    possible = rng.random((rows, vocab)) < rng.choice([0.02, 0.5, 1.0], (rows, 1))
    possible[np.arange(rows), rng.integers(vocab, size=rows)] = True
    logits[~possible] = -np.inf
    u = rng.random(rows).astype(np.float32)
    u[:100], u[100:200] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    ids = np.asarray(jax.jit(decode.sample)(logits, u, np.float32(1)))
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    cdf = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    row = np.arange(rows)
    # exp underflows in float32 where float64 does not; both mean impossible.
    assert np.all(np.exp(logits - logits.max(axis=1, keepdims=True))[row, ids] > 0)
    below = np.where(ids > 0, cdf[row, ids - 1], 0.0)
    assert np.all(u >= below - 2e-6) and np.all(u <= cdf[row, ids] + 2e-6)


# What must be refused, and counted.


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((text(0, 60),), (0, 0, 0, 0), 5), r"60 tokens and a turn of up to 5 .*sampler.context=64: raise"),
        (Request((text(0, 64),), (0, 0, 0, 0), 1), r"64 \+ 1 = 65 tokens"),
        (Request((text(0, 4),), (0, 0, 0, 0), 0), "max_tokens=0"),
        # Without room for a token the prefix is what is too long, whatever the caller made of the room.
        (Request((text(0, 70),), (0, 0, 0, 0), -6), r"70 \+ 1 = 71 tokens, more than sampler.context=64: raise"),
        (Request((text(0, 64),), (0, 0, 0, 0), 0), r"64 \+ 1 = 65 tokens, more than sampler.context=64: raise"),
        (Request((), (0, 0, 0, 0), 1), "at least one token"),
        (Request((Segment(Author.ENVIRONMENT, np.array([67], np.int32)),), (0, 0, 0, 0), 1), r"outside 0\.\.66"),
        (Request((text(0, 4),), (0, 0, -1, 0), 1), "four integers"),
        (Request((text(0, 4),), (0, 0, 0), 1), "four integers"),
    ],
)
def test_a_request_that_cannot_be_sampled_is_refused(sampler, request_, message):
    with pytest.raises(ValueError, match=message):
        sampler.submit(request_)
    assert sampler.free_slots == SHAPES.slots and sampler.visit(1.0) == []


def test_prefixes_of_other_parameters_are_forgotten_and_never_continued(sampler, prefilled):
    anchor, whole, ticket = branch_point(sampler)
    other = make_params(1)
    sampler.load(other, version=8)
    with pytest.raises(VersionError, match="version 0 and version 8 is loaded"):
        sampler.submit(Request(whole, (0, 0, 0, 3), 5))
    prefilled.clear()
    (branch,) = finish(sampler, Request(anchor, (0, 0, 1, 2), 5))  # of a prefix that the stale slot holds
    assert sum(prefilled) == sum(map(len, anchor)) - 1
    sampler.release(ticket)
    sampler.release(branch.ticket)
    ids = np.concatenate([s.ids for s in (*anchor, branch.segment)])
    hidden, _ = apply(MODEL, other, ids[None], np.arange(len(ids))[None])
    logp, _ = token_logprobs(MODEL, other, hidden, ids[None], 1.0)
    np.testing.assert_allclose(branch.segment.logprobs, np.asarray(logp)[0, -5:], atol=1e-4)
    (turn,) = finish(sampler, Request(whole, (0, 0, 0, 3), 5))  # released: begun again from nothing
    assert len(turn.segment) == 5 and sampler.version == 8


def test_nothing_is_left_of_a_policy_that_diverged(sampler):
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), PARAMS)
    sampler.generate(broken, [Request((text(i, 40),), (0, 0, i, 1), 20) for i in range(4)], 1.0)
    requests = [Request((text(i, 5),), (0, 0, i, 1), 9) for i in range(4)]
    for request, turn in zip(requests, sampler.generate(PARAMS, requests, 1.0), strict=True):
        agrees(request.prefix, turn)


def test_parameters_cannot_change_under_a_request(sampler):
    sampler.submit(Request((text(0, 4),), (0, 0, 0, 1), 9))
    with pytest.raises(RuntimeError, match="1 requests are in flight"):
        sampler.load(PARAMS, version=1)
    sampler.visit(1.0)
    with pytest.raises(RuntimeError, match="1 requests are in flight"):
        sampler.load(PARAMS, version=1)
    while not (done := sampler.visit(1.0)):
        pass
    sampler.release(done[0].ticket)
    with pytest.raises(ValueError, match="holds no slot"):
        sampler.release(done[0].ticket)
    sampler.load(PARAMS, version=1)


def test_misuse_is_named(sampler):
    with pytest.raises(RuntimeError, match="no visit was started"):
        sampler.finish_visit()
    with pytest.raises(ValueError, match="temperature"):
        sampler.start_visit(-1.0)
    with pytest.raises(ValueError, match="temperature"):
        sampler.start_visit(float("nan"))
    sampler.start_visit(1.0)
    with pytest.raises(RuntimeError, match="finish_visit"):
        sampler.start_visit(1.0)
    assert sampler.finish_visit() == []
    with pytest.raises(RuntimeError, match="call load first"):
        Sampler(MODEL, SHAPES, (), SEED).visit(1.0)
    held = finish(sampler, *(Request((text(i, 4),), (0, 0, i, 1), 2) for i in range(4)))
    assert sampler.free_slots == 0
    ticket = sampler.submit(Request((text(9, 4),), (0, 0, 9, 1), 2))
    with pytest.raises(RuntimeError, match="all 4 slots are held"):
        sampler.visit(1.0)
    sampler.release(held[2].ticket)
    assert [done.ticket for done in sampler.visit(1.0)] == [ticket]
    for completion in (*held[:2], held[3]):
        sampler.release(completion.ticket)
    sampler.release(ticket)


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 0},
        {"context": 0},
        {"group": 0},
        {"parking": -1},
        {"prefill_per_visit": -1},
        {"block": 0},
        {"steps_per_visit": 0},
        {"prefill_buckets": ()},
        {"prefill_rows": (0, 4)},
    ],
)
def test_impossible_shapes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SamplerConfig(**change)


def test_tools_may_run_while_the_device_works(sampler):
    """Submitting and releasing between start and finish touches nothing that is under way."""
    prompt = text(0, 6)
    (first,) = finish(sampler, Request((prompt,), (0, 0, 0, 1), 4))
    busy = [Request((text(20 + i, 9),), (0, 1, i, 1), 10) for i in range(3)]
    tickets = [sampler.submit(request) for request in busy]
    sampler.start_visit(1.0)
    longer = (prompt, first.segment, text(1, 5))
    tickets.append(sampler.submit(Request(longer, (0, 0, 0, 2), 10)))
    done = {c.ticket: c for c in sampler.finish_visit()}
    while len(done) < 4:
        done |= {c.ticket: c for c in sampler.visit(1.0)}
    for ticket, prefix in zip(tickets, [*(r.prefix for r in busy), longer], strict=True):
        agrees(prefix, done[ticket].segment)
        sampler.release(ticket)


def test_nothing_is_compiled_after_the_warm_up(caplog, parks):
    sampler = Sampler(MODEL, dataclasses.replace(PARKING, prefill_per_visit=8), (8,), SEED)
    sampler.load(PARAMS, version=0)

    def compilations(work):
        caplog.clear()
        with jax.log_compiles():
            work()
        return [record.message for record in caplog.records if record.message.startswith("Compiling")]

    assert compilations(sampler.compile), "the warm-up compiles, and this test can see it"
    assert compilations(lambda: scenario(sampler)) == []
    assert compilations(lambda: waiting_scenario(sampler, visits=2)) == [] and parks
    requests = [Request((text(i, 1 + 5 * i),), (0, 0, i, 1), 9) for i in range(9)]
    other = make_params(4)
    for temperature in (1.0, 0.7, 0.0):
        assert compilations(lambda t=temperature: sampler.generate(other, requests, t)) == []


# Bookkeeping.


def test_occupancy_is_the_share_of_slot_steps_that_sampled_a_token(sampler):
    """Four slots, three steps per visit."""
    assert sampler.occupancy == 0.0
    sampler.visit(1.0)  # nothing to do, nothing decoded
    assert sampler.occupancy == 0.0
    finish(sampler, *(Request((text(i, 5),), (0, 0, i, 1), 6) for i in range(4)))
    assert sampler.occupancy == 1.0
    for ticket in list(sampler._held):
        sampler.release(ticket)
    finish(sampler, Request((text(5, 5),), (0, 0, 5, 1), 4))  # two visits of 12 slot-steps for 4 tokens
    assert sampler.occupancy == (24 + 4) / (24 + 24)
    sampler.load(PARAMS, version=1)
    assert sampler.occupancy == 0.0
    sampler.generate(PARAMS, [Request((text(0, 5),), (0, 0, 0, 1), 3), Request((text(1, 5),), (0, 0, 1, 1), 1)], 1.0)
    assert sampler.occupancy == 4 / 12


def test_waves_order_forks_behind_the_prefills_they_read():
    table, prompt = SlotTable(4, shards=2), text(0, 8)
    table.load(1)
    turn = text(1, 4)
    roots = [table.place(Request((prompt,), (0, 0, i, 1), 1), 8, None) for i in range(3)]
    first = Source(roots[0].slot, base=0, wave=1)
    assert [p.wave for p in roots] == [0, 1, 1] and [p.source for p in roots] == [None, first, first]
    assert [p.reuse for p in roots] == [0, 7, 7]
    assert {p.slot // 2 for p in roots[:2]} == {0, 1}, "the first two roots are on different shards"
    table.settle()
    table.hold(roots[0].slot, turn)
    table.release(roots[0].slot)
    longer = Request((prompt, turn, text(2, 3)), (0, 0, 9, 2), 1)
    # The free slot that was never used is the target; what the source lacks is its last sampled token onwards.
    placed = table.place(longer, 15, None)
    assert placed.slot not in {p.slot for p in roots}
    assert placed.source == Source(roots[0].slot, base=0, wave=0)
    assert (placed.reuse, placed.wave) == (11, 0)


def test_prefixes_in_common_become_trunks_and_make_room_for_each_other():
    table, prompt = SlotTable(8, shards=2, group=2), text(0, 8)
    table.load(1)

    def place(prompt, first, count):
        requests = [Request((prompt,), (0, 0, first + i, 1), 1) for i in range(count)]
        placed = [table.place(request, 8, None, siblings=count) for request in requests]
        table.settle()
        return placed

    first = place(prompt, 0, 3)
    # The first two fill a group; the third, for which the trunk is copied after it was filled, begins the next.
    assert [p.base for p in first] == [7, 7, 7] and [p.wave for p in first] == [0, 0, 1]
    assert first[0].slot // 2 == first[1].slot // 2 != first[2].slot // 2
    assert first[1].lift is None and (first[0].lift.source, first[0].lift.reuse) == (None, 0)
    assert first[2].lift.source == Source(first[0].slot - first[0].slot % 2, base=7, wave=1)
    # A single request joins what is there, and holds a row of its own otherwise.
    (single,) = place(prompt, 3, 1)
    assert single.slot // 2 == first[2].slot // 2 and (single.base, single.lift) == (7, None)
    (alone,) = place(text(1, 8), 4, 1)
    assert (alone.base, alone.reuse, alone.lift) == (0, 0, None)
    # When its readers are gone a trunk is replaced, and who ended on it is no source any more.
    for placed in first[:2]:
        table.hold(placed.slot, text(9, 2))
        table.release(placed.slot)
    others = [place(text(2 + i, 8), 10 + 2 * i, 2) for i in range(2)]
    assert {p.lift.trunk for p, _ in others} >= {first[0].slot // 2}
    assert all(slot.chain[0] is not prompt for slot in table.slots if slot.index // 2 == first[0].slot // 2)


def test_after_a_load_slots_are_given_out_as_in_a_fresh_process():
    """A resumed run repeats every bit only if its rows lie where those of the undisturbed run lie."""
    used, fresh = SlotTable(4, shards=2), SlotTable(4, shards=2)
    used.load(1)
    for i in (0, 1, 2):
        placed = used.place(Request((text(i, 5),), (0, i, 0, 1), 1), 5, None)
        used.settle()
        used.hold(placed.slot, text(9, 2))
        used.release(placed.slot)
    used.load(2)
    fresh.load(2)
    requests = [Request((text(i, 5),), (1, i, 0, 1), 1) for i in range(4)]
    placed = [[table.place(request, 5, None) for request in requests] for table in (used, fresh)]
    assert placed[0] == placed[1]


@given(missing=st.integers(0, 2000), buckets=st.lists(st.integers(1, 300), min_size=1, max_size=4, unique=True))
def test_prefill_pieces_cover_what_is_missing_without_much_padding(missing, buckets):
    pieces = split_prefill(missing, sorted(buckets))
    assert all(piece in buckets for piece in pieces)
    assert pieces == sorted(pieces, reverse=True)
    covered = 0
    for piece in pieces:
        assert covered < missing
        assert piece == min(buckets) or 4 * (missing - covered) >= 3 * piece
        covered += piece
    assert covered >= missing


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.95, 0.999])
def test_the_nucleus_is_that_of_sorting(top_p):
    rng = np.random.default_rng(0)
    weights = np.exp(3 * rng.standard_normal((40, 517))).astype(np.float32)
    weights /= weights.max(axis=1, keepdims=True)
    weights[0] = 1.0  # ties stay together
    weights[1, 1:] = 0.0
    kept = np.asarray(jax.jit(decode.nucleus)(weights, np.float32(top_p)))
    for row, got in zip(weights.astype(np.float64), kept, strict=True):
        order = np.sort(row)[::-1]
        last = order[np.searchsorted(np.cumsum(order), top_p * row.sum() * (1 - 1e-6))]
        np.testing.assert_array_equal(got, np.where(row >= last, row, 0).astype(np.float32))


def test_sampling_keeps_to_the_nucleus_and_its_proportions(sampler):
    logits = np.log(np.array([[0.4, 0.05, 0.3, 0.2, 0.05]], np.float32))
    uniforms = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    draw = jax.jit(jax.vmap(lambda u, p: decode.sample(logits, u[None], np.float32(1), p)[0], (0, None)))
    for top_p, kept in ((0.6, {0: 4 / 7, 2: 3 / 7}), (0.8, {0: 4 / 9, 2: 3 / 9, 3: 2 / 9}), (0.39, {0: 1.0})):
        ids, counts = np.unique(draw(uniforms, np.float32(top_p)), return_counts=True)
        assert ids.tolist() == sorted(kept)
        np.testing.assert_allclose(counts / 1000, [kept[i] for i in ids], atol=2e-3)
    prompt = Request((text(5, 1),), (0, 0, 0, 1), 12)
    ready(sampler)
    greedy = sampler.generate(PARAMS, [prompt], 0.0)[0]
    sampler.load(PARAMS, version=0)
    ticket = sampler.submit(prompt)
    done = []
    while not done:
        done = sampler.visit(1.0, top_p=1e-6)
    sampler.release(ticket)
    np.testing.assert_array_equal(done[0].segment.ids, greedy.ids)
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="top_p="):
            sampler.visit(1.0, top_p=top_p)


def test_branches_of_a_cached_prefix_all_read_it_from_the_trunk():
    """Also the one whose slot holds it itself: a shard reads as many columns of every slot as of its longest."""
    sampler = Sampler(MODEL, dataclasses.replace(SHAPES, slots=8, group=8), STOPS, SEED)
    sampler.load(PARAMS, version=0)
    prefix = text(0, 9)
    sampler.submit(Request((prefix,), (0, 0, 99, 1), 1))
    for completion in sampler.visit(1.0):
        sampler.release(completion.ticket)
    for i in range(8):
        sampler.submit(Request((prefix,), (0, 0, i, 1), 2))
    sampler.start_visit(1.0)
    assert np.asarray(sampler._state.control)[:, decode.BASE].tolist() == [8] * 8


def test_matrices_are_cast_once_when_they_are_loaded():
    sampler = Sampler(dataclasses.replace(MODEL, dtype="bfloat16"), SHAPES, STOPS, SEED)
    sampler.load(PARAMS, version=0)
    for x in jax.tree.leaves(sampler._params):
        assert x.dtype == (jnp.bfloat16 if x.ndim > 1 else jnp.float32)


def test_one_slot_with_parked_rows_has_no_fork_of_nothing():
    sampler = Sampler(MODEL, dataclasses.replace(SHAPES, slots=1, parking=2, prefill_rows=(1,)), (), SEED)
    sampler.load(PARAMS, version=0)
    sampler.compile()
    assert min(sampler._fork_sizes) > 0
