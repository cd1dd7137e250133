"""Samples turns for many attempts at once: fixed slots, a static cache, and a few tokens per visit of the host.

A request names its prefix by segments. What is already in the cache (the attempt's own slot while its tool ran, or
another attempt's prefix) is continued, rewound or forked; only what is missing is prefilled, and the jitted loop of
`decode.py` samples the rest. The last token of a sequence is never in the cache: it is what the next step feeds.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from elpo_jax.model.cache import Cache
from elpo_jax.model.config import ModelConfig
from elpo_jax.model.transformer import Params
from elpo_jax.rollout import decode
from elpo_jax.rollout.slots import Placement, Request, Slot, SlotTable, VersionError, concatenate, split_prefill
from elpo_jax.trees.trajectory import Author, Segment

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig", "VersionError"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Shapes of the sampler; every one of them is compiled once.

    Attributes:
      slots: B, sequences decoded at once; split over the mesh axes `data` and `fsdp`.
      context: S, most tokens of a prefix and its turn together.
      steps_per_visit: Tokens that every slot decodes before the host looks: more is less overhead, and a longer wait
        for slots whose turn has ended.
      prefill_buckets: Token counts that a prefill is padded to; longer ones are done in pieces.
      prefill_rows: Row counts that a prefill or fork is padded to, beside all slots.
    """

    slots: int = 64
    context: int = 256
    steps_per_visit: int = 8
    prefill_buckets: tuple[int, ...] = (16, 64, 256)
    prefill_rows: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self):
        for name in ("slots", "context", "steps_per_visit"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be at least 1")
        for name in ("prefill_buckets", "prefill_rows"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be one or more positive sizes")


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """A turn that ended.

    Attributes:
      ticket: The request's; its slot is held until the attempt's next turn is submitted or the ticket is released.
      segment: The sampled tokens with log-probabilities and entropies, the stop token included.
      stopped: True where a stop token ended it, False where `max_tokens` did.
    """

    ticket: int
    segment: Segment
    stopped: bool


@dataclasses.dataclass(eq=False)
class _Job:
    """A submitted request on its way to a completion."""

    ticket: int
    request: Request
    ids: np.ndarray  # int32, the whole prefix
    own: Slot | None  # the held slot that it continues


class Sampler:
    """Owns the cache and the compiled functions; one thread may use it."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: SamplerConfig,
        stop_ids: Sequence[int],
        seed: int,
        mesh: Mesh | None = None,
    ):
        """Allocates the cache; nothing is compiled before it is needed (see `compile`).

        Args:
          model_config: The network.
          config: Shapes.
          stop_ids: Tokens that end a turn.
          seed: Root of all randomness, 0..2^32-1.
          mesh: Its axes `data` and `fsdp` split the slots; None for the first device alone.

        Raises:
          ValueError: If the mesh cannot split the slots.
        """
        if mesh is None:
            mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
        axes = decode.row_axes(mesh)
        if not axes:
            raise ValueError(f"slots are split over the mesh axes {decode.ROW_AXES}; the mesh has {mesh.axis_names}")
        self._shards = math.prod(mesh.shape[axis] for axis in axes)
        if config.slots % self._shards:
            raise ValueError(
                f"sampler.slots={config.slots} cannot be split over {self._shards} devices of the mesh axes {axes}: "
                f"choose a multiple of {self._shards}"
            )
        self.config, self.context = config, config.context
        self._vocab, self._stop_ids, self._mesh = model_config.vocab_size, np.array(stop_ids, np.int32), mesh
        self._per_shard = config.slots // self._shards
        sizes = {-(-rows // self._shards) for rows in config.prefill_rows}  # rows of one shard
        self._row_buckets = sorted({size for size in sizes if size < self._per_shard} | {self._per_shard})
        self._token_buckets = sorted(config.prefill_buckets)

        self._new_cache = functools.partial(decode.make_cache, model_config, mesh, config.slots, config.context)
        self._cache: Cache | None = self._new_cache()
        self._fork = decode.make_fork(model_config, mesh)
        self._prefill = decode.make_prefill(model_config, mesh)
        self._decode = decode.make_decode(
            model_config, mesh, tuple(int(i) for i in stop_ids), seed, config.steps_per_visit
        )
        self._params: Params | None = None
        self._table = SlotTable(config.slots, self._shards)

        self._next_ticket = 0
        self._waiting: list[_Job] = []
        self._running: dict[int, _Job] = {}  # by slot
        self._held: dict[int, int] = {}  # ticket -> slot
        self._pending: jax.Array | np.ndarray | None = None  # what start_visit dispatched
        self._control = np.zeros((config.slots, decode.CONTROL_WIDTH), np.int32)
        self._count = np.zeros(config.slots, np.int32)  # tokens of the turn so far
        self._turn = np.zeros((3, config.slots, config.context), np.int32)  # the turn so far, as `out` of decode.py
        self._sampled = self._slot_steps = 0  # since `load`: tokens, and slots times decoding steps

    @property
    def version(self) -> int | None:
        """Of the parameters that are loaded."""
        return self._table.version

    @property
    def free_slots(self) -> int:
        """Requests of new attempts that would be admitted at the next visit."""
        return max(0, self._table.free - sum(job.own is None for job in self._waiting))

    @property
    def occupancy(self) -> float:
        """Sampled tokens per slot and decoding step since `load`, 0..1: what is missing to 1 was computed for nothing.

        Slots idle while a tool runs, after a turn ended within a visit, and where too few attempts are left to start.
        """
        return self._sampled / self._slot_steps if self._slot_steps else 0.0

    def load(self, params: Params, version: int) -> None:
        """Takes new parameters; every cached prefix is forgotten.

        Args:
          params: Of the network, on the mesh or elsewhere (see `decode.place_params`).
          version: Names them in errors. Prefixes are forgotten even if it is the same as before.

        Raises:
          RuntimeError: If a turn is being sampled or waits to be: its tokens would come from two policies.
        """
        in_flight = len(self._waiting) + len(self._running)
        if in_flight:
            raise RuntimeError(f"{in_flight} requests are in flight: finish them before loading other parameters")
        self._params = decode.place_params(params, self._mesh)
        self._table.load(version)
        self._sampled = self._slot_steps = 0
        # Columns that no query may see weigh exactly 0, but 0 times what a diverged policy left there can be nan.
        self._cache = None  # frees the old one before the new one exists
        self._cache = self._new_cache()

    def compile(self) -> None:
        """Compiles every shape, by running each on padding alone. Parameters must be loaded."""
        self._need_params()
        for rows in self._row_buckets:
            nowhere = np.full(rows * self._shards, self.config.slots, np.int32)
            self._cache = self._fork(self._cache, np.zeros_like(nowhere), nowhere)
            for tokens in self._token_buckets:
                self._run_prefill([], rows, tokens)
        idle = np.zeros_like(self._control)
        self._cache, _ = self._decode(self._params, self._cache, idle, np.ones(2, np.float32))

    def submit(self, request: Request) -> int:
        """Queues a turn, and returns its ticket. The next visit begins it, if a slot is free (see `free_slots`).

        The next turn of an attempt (the same first three of `stream`) continues the slot that is held for it.

        Raises:
          ValueError: If the request does not fit the context, or is malformed.
          VersionError: If the attempt's held slot was computed by other parameters.
        """
        ids = self._check(request)
        own = self._table.claim(request)
        if own is not None:
            self._held = {ticket: slot for ticket, slot in self._held.items() if slot != own.index}
        job = _Job(self._next_ticket, request, ids, own)
        self._next_ticket += 1
        self._waiting.append(job)
        return job.ticket

    def release(self, ticket: int) -> None:
        """Gives up the slot that is held for an ended turn. It stays a source of prefixes until it is needed.

        Raises:
          ValueError: If nothing is held for the ticket.
        """
        if ticket not in self._held:
            raise ValueError(
                f"ticket {ticket} holds no slot: it is in flight, released already, or its attempt has gone on"
            )
        self._table.release(self._held.pop(ticket))

    def start_visit(self, temperature: float, top_p: float = 1.0) -> None:
        """Admits what was submitted and dispatches one burst of decoding; the device works while the host goes on.

        Args:
          temperature: Divides the logits; 0 takes the most likely token (and records temperature 1's logprobs).
          top_p: Share of the probability that the drawn tokens come from. Recorded log-probabilities are those of the
            whole distribution: train with 1.

        Raises:
          ValueError: If the temperature is negative or not a number, or top_p not in (0, 1].
          RuntimeError: If a visit is open, no parameters are loaded, or every slot is held, so that nothing can run.
        """
        if self._pending is not None:
            raise RuntimeError("the visit that was started is not finished: call finish_visit first")
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be more than 0 and at most 1")
        self._need_params()
        self._admit()
        if self._waiting and not self._running:
            raise RuntimeError(
                f"{len(self._waiting)} requests wait but all {self.config.slots} slots are held by attempts between "
                "turns: submit those attempts' next turns or release their tickets"
            )
        if not self._running:
            self._pending = np.zeros((0, 3, self.config.slots), np.int32)
            return
        # A copy, since the device may read it while the host prepares the next visit.
        control = self._control.copy()
        sampling = np.array([temperature, top_p], np.float32)
        self._cache, self._pending = self._decode(self._params, self._cache, control, sampling)

    def finish_visit(self) -> list[Completion]:
        """Waits for the burst, and returns the turns that ended in it, in the order of their tickets.

        That order, unlike the order of the slots, is the same on every mesh.
        """
        if self._pending is None:
            raise RuntimeError("no visit was started: call start_visit first")
        out, self._pending = np.asarray(self._pending), None  # int32 [n, 3, B]
        sampled = (out[:, 0] >= 0).sum(axis=0, dtype=np.int32)
        rows, steps = np.nonzero(np.arange(len(out)) < sampled[:, None])
        self._turn[:, rows, self._count[rows] + steps] = out[steps, :, rows].T
        self._count += sampled
        self._sampled += int(sampled.sum())
        self._slot_steps += len(out) * self.config.slots
        active = np.flatnonzero(sampled)
        last = out[sampled[active] - 1, 0, active]
        control = self._control
        control[active, decode.TOKEN] = last
        control[:, decode.POSITION] += sampled
        stopped = np.isin(last, self._stop_ids)
        control[active, decode.REMAINING] = np.where(stopped, 0, control[active, decode.REMAINING] - sampled[active])
        ended = control[active, decode.REMAINING] == 0
        done = [self._complete(int(i), bool(s)) for i, s in zip(active[ended], stopped[ended], strict=True)]
        return sorted(done, key=lambda completion: completion.ticket)

    def visit(self, temperature: float, top_p: float = 1.0) -> list[Completion]:
        """`start_visit` and `finish_visit`."""
        self.start_visit(temperature, top_p)
        return self.finish_visit()

    def generate(self, params: Params, requests: Sequence[Request], temperature: float) -> list[Segment]:
        """Loads the parameters and samples one turn per request, any number of them, in order."""
        self.load(params, version=0)
        order = {self.submit(request): i for i, request in enumerate(requests)}
        turns: list[Segment | None] = [None] * len(requests)
        while self._waiting or self._running:
            for completion in self.visit(temperature):
                turns[order[completion.ticket]] = completion.segment
                self.release(completion.ticket)
        return turns

    def _need_params(self) -> None:
        if self._params is None:
            raise RuntimeError("no parameters are loaded: call load first")

    def _check(self, request: Request) -> np.ndarray:
        """The prefix's ids, int32 [T], of a request that can be sampled."""
        ids = concatenate(request.prefix) if request.prefix else np.zeros(0, np.int32)
        length = len(ids)
        if not length:
            raise ValueError("a request needs a prefix of at least one token: begin every sequence with a prompt")
        turn = max(request.max_tokens, 1)  # who asks for what a long prefix leaves may ask for less than nothing
        if length + turn > self.context:
            raise ValueError(
                f"a prefix of {length} tokens and a turn of up to {turn} need {length} + {turn} = {length + turn} "
                f"tokens, more than sampler.context={self.context}: raise sampler.context, or ask for a shorter prompt "
                "or turn"
            )
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens={request.max_tokens} must be at least 1")
        if ids.min() < 0 or ids.max() >= self._vocab:
            raise ValueError(f"a prefix has ids outside 0..{self._vocab - 1}: the tokenizer does not fit the model")
        if len(request.stream) != 4 or not all(0 <= part < 2**32 for part in request.stream):
            raise ValueError(f"stream={request.stream} must be four integers in 0..2^32-1")
        return ids

    def _admit(self) -> None:
        """Gives slots to waiting requests, first come first served, and fills their rows wave by wave."""
        waves: list[list[tuple[Placement, _Job]]] = []
        waiting = []
        for job in self._waiting:
            placement = self._table.place(job.request, len(job.ids), job.own)
            if placement is None:
                waiting.append(job)
                continue
            while len(waves) <= placement.wave:
                waves.append([])
            waves[placement.wave].append((placement, job))
            self._begin(placement.slot, job)
        self._table.settle()
        self._waiting = waiting
        for wave in waves:
            self._fork_rows([(p.source, p.slot) for p, _ in wave if p.source not in (None, p.slot)])
            self._fill([(p.slot, p.reuse, job.ids[p.reuse : -1]) for p, job in wave])

    def _begin(self, slot: int, job: _Job) -> None:
        """Writes the row of the control array that makes the slot decode the request."""
        self._running[slot] = job
        self._count[slot] = 0
        row = self._control[slot]
        row[decode.TOKEN], row[decode.POSITION] = job.ids[-1], len(job.ids) - 1
        row[decode.REMAINING] = job.request.max_tokens
        row[decode.STREAM] = np.array(job.request.stream, np.uint32).view(np.int32)

    def _fork_rows(self, pairs: list[tuple[int, int]]) -> None:
        """Copies rows (source, target) of the cache, all at once: a row may be read here and overwritten here."""
        if not pairs:
            return
        size = min(b * self._shards for b in self._row_buckets if b * self._shards >= len(pairs))
        source, target = np.zeros(size, np.int32), np.full(size, self.config.slots, np.int32)
        source[: len(pairs)], target[: len(pairs)] = np.array(pairs, np.int32).T
        self._cache = self._fork(self._cache, source, target)

    def _fill(self, rows: list[tuple[int, int, np.ndarray]]) -> None:
        """Prefills rows (slot, first position, ids), in pieces of bucketed size; a row's pieces are done in order."""
        pieces = {slot: split_prefill(len(ids), self._token_buckets) for slot, _, ids in rows}
        for number in range(max(map(len, pieces.values()), default=0)):
            groups: dict[int, list[tuple[int, int, np.ndarray]]] = {}
            for slot, first, ids in rows:
                if number < len(pieces[slot]):
                    done = sum(pieces[slot][:number])
                    bucket = pieces[slot][number]
                    groups.setdefault(bucket, []).append((slot, first + done, ids[done : done + bucket]))
            for bucket, group in sorted(groups.items()):
                shards = np.bincount([slot // self._per_shard for slot, _, _ in group])
                self._run_prefill(group, min(b for b in self._row_buckets if b >= shards.max()), bucket)

    def _run_prefill(self, group: list[tuple[int, int, np.ndarray]], rows: int, tokens: int) -> None:
        """One call on `rows` rows per shard of `tokens` tokens each."""
        local = np.full((self._shards, rows), self._per_shard, np.int32)
        ids = np.zeros((self._shards, rows, tokens), np.int32)
        positions = np.full((self._shards, rows, tokens), -1, np.int32)
        used = [0] * self._shards
        for slot, first, piece in group:
            shard = slot // self._per_shard
            row = used[shard]
            used[shard] += 1
            local[shard, row] = slot % self._per_shard
            ids[shard, row, : len(piece)] = piece
            positions[shard, row, : len(piece)] = np.arange(first, first + len(piece))
        self._cache = self._prefill(
            self._params, self._cache, local.reshape(-1), ids.reshape(-1, tokens), positions.reshape(-1, tokens)
        )

    def _complete(self, slot: int, stopped: bool) -> Completion:
        job = self._running.pop(slot)
        ids, logprobs, entropies = self._turn[:, slot, : self._count[slot]].copy()
        segment = Segment(Author.MODEL, ids, logprobs.view(np.float32), entropies.view(np.float32))
        self._table.hold(slot, segment)
        self._held[job.ticket] = slot
        return Completion(job.ticket, segment, stopped)
