"""Benches of the sampler: against transformers.generate, a bare decode loop, prefilling each branch, and the roofline.

Sides that decode the same requests sample as many tokens; none of them stops early. The comparisons with transformers
need torch (`pip install -r tests/requirements.txt`) and are left out with a message where it is missing.
"""

import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from elpo_jax.model.config import ModelConfig, count_params
from elpo_jax.model.transformer import init
from elpo_jax.rollout import decode
from elpo_jax.rollout.sampler import Request, Sampler, SamplerConfig
from elpo_jax.train.mesh import MeshConfig, make_mesh, shardings
from elpo_jax.trees.trajectory import Author, Segment
from experiments.measure import Settings, Side, compare, line, mesh_name, rates, sampling_mesh
from experiments.peers import qwen3_config

CACHES = ("dynamic", "static")  # of transformers.generate
STEPS = 32  # per visit, where all turns have the same length


def bench_rollout(settings: Settings) -> Iterator[dict]:
    """One turn for every request of a batch, and attempts of several turns whose tools take their time."""
    prompt, turn = (8, 8) if settings.quick else (32, 128)
    for name, config in settings.models("S", "M").items():
        for batch in (4,) if settings.quick else (16, 64):
            case = f"{name}, {mesh_name(sampling_mesh(config))}, {batch} x {turn} tokens after {prompt}"
            engine = Side("sampler", *_engine(config, batch, prompt, turn, settings))
            bare = Side("bare loop", _bare_loop(config, batch, prompt, turn, settings))
            yield compare(settings, "rollout", case, engine, bare)
            theirs = [
                Side(f"transformers, {cache} cache", work)
                for cache in CACHES
                if (work := _transformers(config, batch, prompt, turn, cache, settings))
            ]
            if theirs:
                ours, *others = rates(settings, engine, *theirs)
                best = max(zip(others, theirs, strict=True), key=lambda pair: pair[0])
                names = [engine.name, best[1].name]
                yield line(settings, "rollout", case, ours, best[0], "tokens/s", names)
    for name, config in settings.models("0.4M").items():
        yield from _slot_use(name, config, settings)


def _engine(
    config: ModelConfig, batch: int, prompt: int, turn: int, settings: Settings
) -> tuple[Callable[[], int], Callable[[], None]]:
    """What samples a turn for each slot, and what loads the parameters before, as once per update."""
    mesh = sampling_mesh(config)
    shapes = SamplerConfig(slots=batch, context=prompt + turn, steps_per_visit=min(turn, STEPS))
    sampler = Sampler(config, shapes, (), settings.seed, mesh)
    params = _placed(config, mesh, settings)
    rng = np.random.default_rng(settings.seed)
    requests = [Request((_text(rng, prompt),), (0, 0, i, 1), turn) for i in range(batch)]

    def work() -> int:
        for request in requests:
            sampler.submit(request)
        tokens = done = 0
        while done < batch:
            for completion in sampler.visit(1.0):
                sampler.release(completion.ticket)
                tokens, done = tokens + len(completion.segment), done + 1
        return tokens

    return work, lambda: sampler.load(params, version=0)


def _placed(config: ModelConfig, mesh: Mesh, settings: Settings):
    params = init(config, jax.random.key(settings.seed))
    return decode.place_params(jax.device_put(params, shardings(mesh, params)), mesh, config.dtype)


def _bare_loop(config: ModelConfig, batch: int, prompt: int, turn: int, settings: Settings) -> Callable[[], int]:
    """One prefill of all prompts and one scan over all steps: no slots, no visits, no host between."""
    mesh = sampling_mesh(config)
    params = _placed(config, mesh, settings)
    shards = mesh.size // mesh.shape["tensor"]
    state = decode.make_state(config, mesh, slots=batch, length=prompt + turn, group=1, block=SamplerConfig.block)
    prefill, loop = decode.make_prefill(config, mesh), decode.make_decode(config, mesh, (), settings.seed, turn)
    ids = np.random.default_rng(settings.seed).integers(0, 512, (batch, prompt)).astype(np.int32)
    rows = np.tile(np.arange(batch // shards, dtype=np.int32), shards)
    positions = np.tile(np.arange(prompt - 1, dtype=np.int32), (batch, 1))
    control = np.zeros(state.control.shape, np.int32)
    control[:, decode.TOKEN], control[:, decode.POSITION] = ids[:, -1], prompt - 1
    control[:, decode.REMAINING], control[:, decode.STREAM] = turn, np.arange(batch)[:, None]

    def work() -> int:
        nonlocal state
        state = prefill(params, state, rows, np.zeros_like(rows), ids[:, :-1], positions)
        begun = state._replace(control=jax.device_put(control, state.control.sharding))
        state, out = loop(params, begun, np.ones(2, np.float32))
        return int((np.asarray(out)[:, 0] >= 0).sum())

    return work


def _transformers(
    config, batch: int, prompt: int, turn: int, cache: str, settings: Settings
) -> Callable[[], int] | None:
    """`generate` of the same network with random weights; None, with a message, where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"no comparison with transformers: {error}; pip install -r tests/requirements.txt", file=sys.stderr)
        return None
    torch.manual_seed(settings.seed)
    network = transformers.Qwen3ForCausalLM(qwen3_config(config, eos_token_id=None)).eval()
    ids = torch.randint(0, config.vocab_size, (batch, prompt))

    def work() -> int:
        with torch.inference_mode():
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=turn,
                min_new_tokens=turn,
                cache_implementation=None if cache == "dynamic" else cache,
            )
        return out.numel() - ids.numel()

    return work


def _slot_use(name: str, config: ModelConfig, settings: Settings) -> Iterator[dict]:
    """Share of the slots' steps that sampled a token, where every turn but the last waits for a tool.

    With attempts that keep their slots while they wait, and with parked rows; tools take 15 to 150 ms, which decides
    how long all takes, and none of the shares.
    """
    slots, attempts, turns = (8, 16, 2) if settings.quick else (64, 256, 4)
    params = init(config, jax.random.key(settings.seed))
    samplers = {}
    for parking in (slots, 0):
        shapes = SamplerConfig(slots=slots, parking=parking)
        samplers[parking] = Sampler(config, shapes, (), settings.seed, _mesh())
        samplers[parking].load(params, version=0)
        samplers[parking].compile()
    for visits in (1, 4):
        use, seconds = [], []
        for sampler in samplers.values():
            for pause in ((0.0, 0.0), (0.015, 0.15)):  # the first starts everything
                sampler.load(params, version=0)
                begun = time.perf_counter()
                _play(sampler, attempts, turns, pause, settings, visits)
            use.append(100 * sampler.occupancy)
            seconds.append(time.perf_counter() - begun)
        case = f"{name}, {slots} slots, {attempts} attempts of {turns} turns, {visits} visits per tool"
        sides = ["parked rows", "none"]
        taken = {"seconds": [round(x, 2) for x in seconds]}
        yield line(settings, "rollout", case, *use, "% of slot steps", sides) | taken


def _play(
    sampler: Sampler, attempts: int, turns: int, seconds: tuple[float, float], settings: Settings, visits: int = 1
) -> int:
    """Attempts, eight to a prompt, with tools between their turns; returns the number of sampled tokens.

    Scheduled as in `rollout.agent.play`: an answer is waited for `visits` visits after its turn.
    """
    prompts = [_text(np.random.default_rng((settings.seed, i)), 64) for i in range(-(-attempts // 8))]
    waiting = deque((i, (prompts[i // 8],)) for i in range(attempts))
    live: dict[int, tuple[int, tuple[Segment, ...], int]] = {}
    tokens, ended = 0, []
    at_work: deque[list] = deque([] for _ in range(visits - 1))

    def submit(attempt: int, prefix: tuple[Segment, ...], turn: int) -> None:
        rng = np.random.default_rng((settings.seed, attempt, turn))  # the work does not depend on the schedule
        answer = (_text(rng, int(rng.integers(4, 12))),) if turn > 1 else ()
        request = Request((*prefix, *answer), (0, attempt // 8, attempt, turn), int(rng.integers(8, 41)))
        live[sampler.submit(request)] = (attempt, request.prefix, turn)

    while waiting or live or any(at_work):
        for _ in range(min(sampler.free_slots, len(waiting))):
            submit(*waiting.popleft(), 1)
        sampler.start_visit(1.0)
        calls = []
        for completion in ended:
            attempt, prefix, turn = live.pop(completion.ticket)
            tokens += len(completion.segment)
            if turn == turns:
                sampler.release(completion.ticket)
                continue
            pause = np.random.default_rng((settings.seed, 1, attempt, turn)).uniform(*seconds)
            calls.append((time.perf_counter() + pause, attempt, (*prefix, completion.segment), turn + 1))
        at_work.append(calls)
        for ready, *call in at_work.popleft():
            time.sleep(max(0.0, ready - time.perf_counter()))
            submit(*call)
        ended = sampler.finish_visit()
    return tokens


def bench_branch(settings: Settings) -> Iterator[dict]:
    """Sixteen continuations of one cached prefix: it is forked, or each branch prefills it again."""
    branches = 4 if settings.quick else 16
    shapes = (("tiny", 64, 16),) if settings.quick else (("S", 512, 128), ("S", 2048, 128), ("M", 512, 128))
    for name, length, suffix in shapes:
        config = settings.models(name)[name]
        steps = min(suffix, STEPS)
        shapes = SamplerConfig(slots=branches, context=length + suffix, group=branches, steps_per_visit=steps)
        mesh = sampling_mesh(config)
        sampler = Sampler(config, shapes, (), settings.seed, mesh)
        params = _placed(config, mesh, settings)
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

        case = f"{name}, {mesh_name(mesh)}, {branches} x {suffix} tokens after {length}"
        forked = Side("fork", functools.partial(branch, copy=False), warm)
        yield compare(
            settings, "branch", case, forked, Side("prefill each", functools.partial(branch, copy=True), warm)
        )
        if name == "S" and (work := _transformers(config, branches, length, suffix, "dynamic", settings)):
            yield compare(settings, "branch", case, forked, Side("transformers, prefill each", work))


def bench_decode(settings: Settings) -> Iterator[dict]:
    """One decoding step against what the machine's matmuls and memory allow, and the ways to draw a token."""
    batch, prompt, turn = (4, 8, 8) if settings.quick else (64, 32, 128)
    for name, config in settings.models("S").items():
        work = _bare_loop(config, batch, prompt, turn, settings)
        peak = Side("matmul", _matmul(64 if settings.quick else 2048))
        copied = Side("copy", _copy(2**20 if settings.quick else 2**28))
        tokens, flops, bandwidth = rates(settings, Side("decode", work), peak, copied)
        kept = 2 * config.layers * config.kv_heads * config.head_dim * 4 * (prompt + turn / 2)  # bytes of keys, values
        best = 2 * count_params(config) / flops + kept / bandwidth
        case = f"{name}, {batch} slots, {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
        yield line(settings, "decode", case, 1e6 / tokens, 1e6 * best, "us/token", ["decode", "roofline"])
    for vocab in (512,) if settings.quick else (512, 32768):
        logits = jax.random.normal(jax.random.key(settings.seed), (batch, vocab))
        keys = jax.random.split(jax.random.key(settings.seed), batch)
        sides = [
            Side(draw.__name__, functools.partial(_draw, jax.jit(draw), keys, logits, batch))
            for draw in (two_levels, one_level, gumbel)
        ]
        ours, *others = rates(settings, *sides)
        for other, side in zip(others, sides[1:], strict=True):
            case = f"{batch} rows, vocabulary {vocab}"
            yield line(settings, "decode", case, ours, other, "draws/s", [sides[0].name, side.name])


def two_levels(keys, logits):
    """The sampler's: blocks of the vocabulary, then the ids of one block."""
    return decode.sample(logits, jax.vmap(jax.random.uniform)(keys), jnp.float32(1))


def one_level(keys, logits):
    """The first id whose cumulative weight exceeds a uniform number."""
    weights = jnp.cumsum(jnp.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    return jnp.sum(weights <= jax.vmap(jax.random.uniform)(keys)[:, None] * weights[:, -1:], axis=1)


def gumbel(keys, logits):
    """The largest logit after noise on each."""
    return jnp.argmax(logits + jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys), axis=1)


def _draw(draw: Callable, keys, logits, batch: int) -> int:
    for _ in range(20):
        ids = draw(keys, logits)
    ids.block_until_ready()
    return 20 * batch


def _matmul(size: int) -> Callable[[], int]:
    """Floating-point operations of a float32 product on all devices, each with its share of the rows."""
    mesh = _mesh()
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(decode.row_axes(mesh)))
    x = jax.device_put(jnp.ones((size, size)), rows)
    y = jax.device_put(jnp.ones((size, size)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    product = jax.jit(jnp.matmul, out_shardings=rows)

    def work() -> int:
        product(x, y).block_until_ready()
        return 2 * size**3

    return work


def _copy(size: int) -> Callable[[], int]:
    """Bytes read and written by copying one buffer into another, both already mapped."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def work() -> int:
        np.copyto(target, source)
        return 2 * size

    return work


def _mesh():
    return make_mesh(MeshConfig())


def _text(rng: np.random.Generator, length: int) -> Segment:
    return Segment(Author.ENVIRONMENT, rng.integers(0, 512, length).astype(np.int32))
