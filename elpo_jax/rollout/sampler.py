"""Samples turns for many attempts at once: fixed slots, a static cache, and a few tokens per visit of the host.

A request names its prefix by segments. What is already in the cache (the attempt's own slot while its tool ran, or
another attempt's prefix) is continued, rewound or forked, and a prefix that several requests have in common lies in the
cache once, as the trunk of a group of slots; only what is missing is prefilled, and the jitted loop of `decode.py`
samples the rest. The last token of a sequence is never in the cache: it is what the next step feeds.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from elpo_jax.model.config import ROWS, ModelConfig
from elpo_jax.model.transformer import Params
from elpo_jax.rollout import decode
from elpo_jax.rollout.slots import Request, Slot, SlotTable, VersionError, concatenate, split_prefill
from elpo_jax.trees.trajectory import Author, Segment

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig", "VersionError"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Shapes of the sampler; every one of them is compiled once.

    Attributes:
      slots: B, sequences decoded at once; split over the mesh axes `data` and `fsdp`.
      context: Most tokens of a prefix and its turn together.
      group: Slots that share a trunk, in which a prefix that they have in common is kept and read once for all (also
        known as shared-prefix or cascade attention). On CPUs it does not pay for prefixes of up to 256 tokens; 1, the
        default, for none, which compiles in two thirds of the time. Where it does not divide the slots of a device, the
        largest common divisor is taken.
      parking: P, further rows, split like the slots, to which attempts whose tools are running are copied while others
        use their slots (preemption by swapping, where the swap space is on the device). It pays where tools take
        several visits to answer; 0, the default, for none, so that these attempts keep their slots.
      block: Columns of a cache row that are read whatever there is; beyond, a row is read as far as the longest one
        goes, rounded up to `block` times a power of 2.
      steps_per_visit: Tokens that every slot decodes before the host looks: more is less overhead, and a longer wait
        for slots whose turn has ended.
      prefill_per_visit: Tokens per device, padding included, that are prefilled before a visit decodes, if any slot
        decodes (chunked prefill); what is left is carried to the next visits, in order. 0 for all at once: a long
        prompt then keeps all slots waiting, and none of them has to start late.
      prefill_buckets: Token counts that a prefill is padded to; longer ones are done in pieces.
      prefill_rows: Row counts that a prefill is padded to, beside all slots.
    """

    slots: int = 64
    context: int = 256
    group: int = 1
    parking: int = 0
    block: int = 64
    steps_per_visit: int = 8
    prefill_per_visit: int = 0
    prefill_buckets: tuple[int, ...] = (16, 64, 256)
    prefill_rows: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self):
        for name in ("slots", "context", "group", "block", "steps_per_visit"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be at least 1")
        for name in ("parking", "prefill_per_visit"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be at least 0")
        for name in ("prefill_buckets", "prefill_rows"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be one or more positive sizes")


def most_copies(config: SamplerConfig, trunks: int) -> int:
    """Copies of the largest fork: every slot and trunk is filled, and every slot was parked before."""
    return config.slots + trunks + min(config.slots, config.parking)


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """A turn that ended.

    Attributes:
      ticket: The request's; what it cached is held until the attempt's next turn is submitted or the ticket is
        released, in its slot or in a parked row.
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
    own: Slot | None  # the held slot, or the parked row, that it continues


class _Piece(NamedTuple):
    """Tokens to prefill: of a slot or a trunk, behind `base` tokens in its trunk, from position `first` on."""

    row: int
    base: int
    first: int
    ids: np.ndarray  # int32


class _Task(NamedTuple):
    """One call on the device: copies, or a prefill of `tokens` tokens per device; then the rows of `slots` are filled.

    Tasks are done in the order in which they were planned. So each finds the rows that it reads as the plan had them,
    however many visits of decoding lie between.
    """

    tokens: int
    run: Callable[[], None]
    slots: list[int]


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
          ValueError: If the mesh cannot split the slots or the parked rows.
        """
        if mesh is None:
            mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
        axes = decode.row_axes(mesh)
        if not axes:
            raise ValueError(f"slots are split over the mesh axes {ROWS}; the mesh has {mesh.axis_names}")
        self._shards = math.prod(mesh.shape[axis] for axis in axes)
        for name in ("slots", "parking"):
            if getattr(config, name) % self._shards:
                raise ValueError(
                    f"sampler.{name}={getattr(config, name)} cannot be split over {self._shards} devices of the mesh "
                    f"axes {axes}: choose a multiple of {self._shards}"
                )
        self.config, self.context = config, config.context
        self._vocab, self._stop_ids, self._mesh = model_config.vocab_size, np.array(stop_ids, np.int32), mesh
        self._dtype = model_config.dtype
        self._per_shard = config.slots // self._shards
        sizes = {-(-rows // self._shards) for rows in config.prefill_rows}  # rows of one shard
        self._row_buckets = sorted({size for size in sizes if size < self._per_shard} | {self._per_shard})
        self._token_buckets = sorted(config.prefill_buckets)

        group = math.gcd(config.group, self._per_shard)
        self._trunks_per_shard = self._per_shard // group if group > 1 else 0
        self._trunk_buckets = sorted({1, self._trunks_per_shard}) if self._trunks_per_shard else []
        trunks = self._trunks_per_shard * self._shards
        # A few branches, what mostly changes hands beside parked rows, or all. Each takes seconds to compile, and more
        # would save little: a fork costs the copies that there are.
        sizes = {self._row_buckets[0] * self._shards} | ({-(-3 * config.slots // 4)} if config.parking else set())
        self._fork_sizes = sorted({*sizes, most_copies(config, trunks)})
        self._new_state = functools.partial(
            decode.make_state, model_config, mesh, config.slots, config.context, group, config.block, config.parking
        )
        self._state: decode.State | None = self._new_state()
        self._fork = decode.make_fork(model_config, mesh)
        self._rewind = decode.make_rewind(model_config, mesh)
        self._prefill = decode.make_prefill(model_config, mesh)
        self._prefill_trunks = decode.make_prefill(model_config, mesh, trunks=True)
        self._decode = decode.make_decode(
            model_config, mesh, tuple(int(i) for i in stop_ids), seed, config.steps_per_visit
        )
        self._params: Params | None = None
        self._table = SlotTable(config.slots, self._shards, group, config.parking)

        self._next_ticket = 0
        self._waiting: list[_Job] = []
        self._tasks: collections.deque[_Task] = collections.deque()
        self._filling: dict[int, tuple[_Job, int]] = {}  # by slot, with the tokens that its trunk holds
        self._running: dict[int, _Job] = {}  # by slot
        self._held: dict[int, int] = {}  # ticket -> slot or parked row
        self._pending: jax.Array | np.ndarray | None = None  # what start_visit dispatched
        self._remaining = np.zeros(config.slots, np.int32)  # tokens that the turn may still have
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
        return self._table.room([job.own for job in self._waiting])

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
        in_flight = len(self._waiting) + len(self._filling) + len(self._running)
        if in_flight:
            raise RuntimeError(f"{in_flight} requests are in flight: finish them before loading other parameters")
        self._params = decode.place_params(params, self._mesh, self._dtype)
        self._table.load(version)
        self._sampled = self._slot_steps = 0
        # Columns that no query may see weigh exactly 0, but 0 times what a diverged policy left there can be nan.
        self._state = None  # frees the old one before the new one exists
        self._state = self._new_state()

    def compile(self) -> None:
        """Compiles every shape, by running each on padding alone. Parameters must be loaded."""
        self._need_params()
        for size in self._fork_sizes:
            self._state = self._fork(self._state, np.full((size, 4), -1, np.int32))
        for tokens in self._token_buckets:
            for rows in self._row_buckets:
                self._run_prefill([], rows, tokens, trunks=False)
            for rows in self._trunk_buckets:
                self._run_prefill([], rows, tokens, trunks=True)
        self._run_rewind([])
        self._state, _ = self._decode(self._params, self._state, np.ones(2, np.float32))

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
        """Gives up what is held for an ended turn. It stays a source of prefixes until its row is needed.

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
        self._fill()
        if self._waiting and not self._running:
            parked = f", and all {self.config.parking} parked rows taken" if self.config.parking else ""
            raise RuntimeError(
                f"{len(self._waiting)} requests wait but all {self.config.slots} slots are held by attempts between "
                f"turns{parked}: submit those attempts' next turns or release their tickets"
            )
        if not self._running:
            self._pending = np.zeros((0, 3, self.config.slots), np.int32)
            return
        sampling = np.array([temperature, top_p], np.float32)
        self._state, self._pending = self._decode(self._params, self._state, sampling)

    def finish_visit(self) -> list[Completion]:
        """Waits for the burst, and returns the turns that ended in it, in the order of their tickets.

        That order, unlike the order of the slots, is the same on every mesh, unless `prefill_per_visit` has turns start
        later on some.
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
        self._remaining -= sampled
        stopped = np.isin(last, self._stop_ids)
        ended = stopped | (self._remaining[active] == 0)
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
        while self._waiting or self._filling or self._running:
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
        """Gives slots to waiting requests, and plans how their rows are filled, wave by wave.

        Attempts that go on come before new ones, else first come first served.
        """
        if not self._waiting:
            return
        # By the identity of the segments, all of which the requests keep alive.
        same = collections.Counter(tuple(map(id, job.request.prefix)) for job in self._waiting if job.own is None)
        copies: dict[int, list[tuple[int, int, int, int]]] = {}
        trunks: dict[int, list[_Piece]] = {}
        rows: dict[int, list[_Piece]] = {}
        waiting = []
        for job in sorted(self._waiting, key=lambda job: job.own is None):
            siblings = same[tuple(map(id, job.request.prefix))]
            placement = self._table.place(job.request, len(job.ids), job.own, siblings)
            if placement is None:
                waiting.append(job)
                continue
            if (lift := placement.lift) is not None:
                if lift.source is not None:
                    copy = (lift.source.slot, lift.source.base, self.config.slots + lift.trunk, 0)
                    copies.setdefault(lift.source.wave, []).append(copy)
                trunks.setdefault(lift.wave, []).append(_Piece(lift.trunk, 0, lift.reuse, job.ids[lift.reuse : -1]))
            if (park := placement.park) is not None:
                copies.setdefault(0, []).append((park.slot, park.base, park.row, 0))
                self._held = {ticket: park.row if i == park.slot else i for ticket, i in self._held.items()}
            slot, source, base, reuse = placement.slot, placement.source, placement.base, placement.reuse
            if source is not None:
                copies.setdefault(source.wave, []).append((source.slot, source.base, slot, base))
            rows.setdefault(placement.wave, []).append(_Piece(slot, base, reuse, job.ids[reuse:-1]))
            self._filling[slot] = job, base
        self._table.settle()
        self._waiting = waiting
        for wave in sorted({*copies, *trunks, *rows}):
            if wave in copies:
                self._tasks.append(_Task(0, functools.partial(self._copy, copies[wave]), []))
            self._tasks.extend(self._prefills(trunks.get(wave, []), trunks=True))
            self._tasks.extend(self._prefills(rows.get(wave, []), trunks=False))

    def _fill(self) -> None:
        """Does what was planned, as far as it fits into the visit, and sets the slots that are filled to decode."""
        most = self.config.prefill_per_visit or math.inf
        spent, begun = 0, []
        # The first prefill is done whatever its size, and all until there is a slot that would be kept waiting.
        while self._tasks and (not spent or not self._running or spent + self._tasks[0].tokens <= most):
            task = self._tasks.popleft()
            task.run()
            spent += task.tokens
            begun += [(slot, self._begin(slot, *self._filling.pop(slot))) for slot in task.slots]
        if begun:
            self._run_rewind(begun)

    def _begin(self, slot: int, job: _Job, base: int) -> np.ndarray:
        """Notes who decodes in the slot, and returns the row of the control array that makes it do so."""
        self._running[slot] = job
        self._count[slot], self._remaining[slot] = 0, job.request.max_tokens
        row = np.zeros(decode.CONTROL_WIDTH, np.int32)
        row[decode.TOKEN], row[decode.POSITION] = job.ids[-1], len(job.ids) - 1
        row[decode.REMAINING], row[decode.BASE] = job.request.max_tokens, base
        row[decode.STREAM] = np.array(job.request.stream, np.uint32).view(np.int32)
        return row

    def _run_rewind(self, begun: list[tuple[int, np.ndarray]]) -> None:
        """Sets slots to where their requests begin."""
        rows = np.full(self.config.slots, self.config.slots, np.int32)
        control = np.zeros((self.config.slots, decode.CONTROL_WIDTH), np.int32)
        for i, (slot, row) in enumerate(begun):
            rows[i], control[i] = slot, row
        self._state = self._rewind(self._state, rows, control)

    def _copy(self, forks: list[tuple[int, int, int, int]]) -> None:
        """Copies rows, all of them at once: one may be read here and overwritten here (see `decode.make_fork`)."""
        padded = np.full((min(size for size in self._fork_sizes if size >= len(forks)), 4), -1, np.int32)
        padded[: len(forks)] = forks
        self._state = self._fork(self._state, padded)

    def _prefills(self, rows: list[_Piece], trunks: bool) -> Iterator[_Task]:
        """What prefills slots or trunks, in pieces of bucketed size, those of a row in order."""
        sizes = {piece.row: split_prefill(len(piece.ids), self._token_buckets) for piece in rows}
        if not trunks and (ready := [row for row, pieces in sizes.items() if not pieces]):
            yield _Task(0, lambda: None, ready)
        buckets = self._trunk_buckets if trunks else self._row_buckets
        for number in range(max(map(len, sizes.values()), default=0)):
            groups: dict[int, list[_Piece]] = {}
            for row, base, first, ids in rows:
                if number < len(sizes[row]):
                    done, tokens = sum(sizes[row][:number]), sizes[row][number]
                    groups.setdefault(tokens, []).append(_Piece(row, base, first + done, ids[done : done + tokens]))
            for tokens, group in sorted(groups.items()):
                for part, most in self._split(group, tokens, trunks):
                    count = min(rows for rows in buckets if rows >= most)
                    run = functools.partial(self._run_prefill, part, count, tokens, trunks)
                    filled = [piece.row for piece in part if number + 1 == len(sizes[piece.row])]
                    yield _Task(count * tokens, run, [] if trunks else filled)

    def _split(self, group: list[_Piece], tokens: int, trunks: bool) -> Iterator[tuple[list[_Piece], int]]:
        """Parts of a prefill that fit into a visit, if rows of `tokens` tokens do, and the most rows of a shard."""
        per_shard = self._trunks_per_shard if trunks else self._per_shard
        buckets = self._trunk_buckets if trunks else self._row_buckets
        budget = self.config.prefill_per_visit or math.inf
        most = max((rows for rows in buckets if rows * tokens <= budget), default=buckets[0])
        parts: dict[int, list[_Piece]] = {}
        used = [0] * self._shards
        for piece in group:
            shard = piece.row // per_shard
            parts.setdefault(used[shard] // most, []).append(piece)
            used[shard] += 1
        for number, part in parts.items():
            yield part, min(most, max(used) - number * most)

    def _run_prefill(self, group: list[_Piece], rows: int, tokens: int, trunks: bool) -> None:
        """One call on `rows` slots or trunks per shard of `tokens` tokens each."""
        per_shard = self._trunks_per_shard if trunks else self._per_shard
        local = np.full((self._shards, rows), per_shard, np.int32)
        bases = np.zeros((self._shards, rows), np.int32)
        ids = np.zeros((self._shards, rows, tokens), np.int32)
        positions = np.full((self._shards, rows, tokens), -1, np.int32)
        used = [0] * self._shards
        for index, base, first, piece in group:
            shard = index // per_shard
            row = used[shard]
            used[shard] += 1
            local[shard, row], bases[shard, row] = index % per_shard, base
            ids[shard, row, : len(piece)] = piece
            positions[shard, row, : len(piece)] = np.arange(first, first + len(piece))
        self._state = (self._prefill_trunks if trunks else self._prefill)(
            self._params,
            self._state,
            local.reshape(-1),
            bases.reshape(-1),
            ids.reshape(-1, tokens),
            positions.reshape(-1, tokens),
        )

    def _complete(self, slot: int, stopped: bool) -> Completion:
        job = self._running.pop(slot)
        ids, logprobs, entropies = self._turn[:, slot, : self._count[slot]].copy()
        segment = Segment(Author.MODEL, ids, logprobs.view(np.float32), entropies.view(np.float32))
        self._table.hold(slot, segment)
        self._held[job.ticket] = slot
        return Completion(job.ticket, segment, stopped)
