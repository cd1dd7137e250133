"""The host half of the sampler's cache: which slot holds whose prefix, and where a new request should go.

A slot's row of the cache holds the keys and values of the first `cached` tokens of a chain of segments. Prefixes are
found again by the identity of their segments, never by comparing tokens. A slot is free, busy (its request is waiting
or being decoded) or held (its turn has ended and the attempt's tool is running); a free slot stays warm, as a source of
prefixes, until it is the least recently used. Where a request finds no free slot, an attempt that is held makes room:
it is parked, that is, copied to a row that is not decoded, and goes back to a slot with its next turn.
"""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np

from elpo_jax.trees.trajectory import Segment


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One turn to sample.

    Attributes:
      prefix: Everything before the turn. Segments that are the same objects as another request's share its cache.
      stream: (step, task uid, attempt, turn), each in 0..2^32-1; with the sampler's seed, all its randomness. The first
        three name the attempt, whose held slot is continued.
      max_tokens: Most tokens to sample; prefix and turn must fit the context together.
    """

    prefix: tuple[Segment, ...]
    stream: tuple[int, int, int, int]
    max_tokens: int

    @property
    def attempt(self) -> tuple[int, int, int]:
        return self.stream[:3]


class VersionError(RuntimeError):
    """A cached prefix was computed by other parameters than those that are loaded."""


class Use(enum.Enum):
    FREE = "free"
    BUSY = "busy"
    HELD = "held"


@dataclasses.dataclass(eq=False)
class Trunk:
    """What the slots of a group may share: a prefix that lies in the cache once, for all of them.

    Attributes:
      index: Of the group.
      slots: Those that can read it.
      chain: Segments whose tokens it holds.
      cached: How many of them.
      wave: As of a slot.
      touched: When a request was last placed on it.
    """

    index: int
    slots: list["Slot"]
    chain: tuple[Segment, ...] = ()
    cached: int = 0
    wave: int = -1
    touched: int = -1

    @property
    def idle(self) -> bool:
        """Whether no attempt reads it."""
        return all(slot.use is Use.FREE or not slot.base for slot in self.slots)


@dataclasses.dataclass(eq=False)
class Slot:
    """One row of the cache, or a parked row, as the host sees it.

    Attributes:
      index: The row, numbered as in `model.cache.fork`.
      trunk: Of its group; None where slots share nothing, and of a parked row.
      use: Whether it is taken.
      chain: Segments whose tokens the row and what it shares hold.
      cached: How many tokens of the chain are in the cache, from its start; at most all but the last.
      base: How many of these the trunk holds; the row begins behind them.
      attempt: Whose turn it is or was.
      load: Which loading of parameters computed it, as counted by the table.
      wave: Number of the fork-and-prefill wave that fills it in the visit being planned; -1 if it is filled already.
      touched: When it was last used.
    """

    index: int
    trunk: Trunk | None = None
    use: Use = Use.FREE
    chain: tuple[Segment, ...] = ()
    cached: int = 0
    base: int = 0
    attempt: tuple[int, int, int] | None = None
    load: int = 0
    wave: int = -1
    touched: int = -1

    def forget(self) -> None:
        self.chain, self.cached, self.base, self.touched = (), 0, 0, -1


@dataclasses.dataclass(frozen=True)
class Source:
    """Cached tokens to copy: those of a row that begins behind `base` tokens of its trunk.

    A trunk is read through the first slot of its group, with all its tokens as the base. `wave` is the first in which
    the tokens are there; they are copied in it, before anything can replace them.
    """

    slot: int
    base: int
    wave: int


@dataclasses.dataclass(frozen=True)
class Lift:
    """A prefix that becomes a trunk: `reuse` of its tokens are copied from the source, the rest are prefilled."""

    trunk: int
    source: Source | None
    reuse: int
    wave: int


@dataclasses.dataclass(frozen=True)
class Park:
    """An attempt that makes room: the row of its slot, behind `base` tokens of the trunk, is copied to a parked row."""

    slot: int
    base: int
    row: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a request goes and what its row lacks.

    Attributes:
      slot: The row that will decode it.
      source: What its row has to be copied from; None where nothing is missing (a slot that goes on or is rewound, a
        prefix in the trunk) or nothing is known.
      reuse: Tokens of the prefix that need no prefill.
      base: Tokens of the prefix that the trunk holds.
      wave: When its row is prefilled. Within a wave all copies come first, then the trunks are prefilled, then the
        slots; wave w+1 copies what wave w prefills.
      lift: What has to become the trunk in its own wave, which is not after the placement's.
      park: What has to be copied from the slot before, in wave 0.
    """

    slot: int
    source: Source | None
    reuse: int
    base: int
    wave: int
    lift: Lift | None = None
    park: Park | None = None


class SlotTable:
    """All slots, and the parameters' version that their contents belong to."""

    def __init__(self, slots: int, shards: int, group: int = 1, parking: int = 0):
        """`slots` rows in `shards` contiguous parts of equal size; new requests are spread over the parts.

        Every `group` consecutive slots share a trunk; `group` divides the size of a part, and 1 means none. `parking`
        rows are there for attempts that make room.
        """
        self.slots = [Slot(i) for i in range(slots)]
        self.version: int | None = None
        self._per_shard = slots // shards
        self._load = 0
        self._versions: dict[int, int] = {}  # of the loads that a slot may still belong to
        self._clock = 0
        self._by_prompt: dict[Segment, list[Slot]] = {}
        self._trunks: list[Trunk] = []
        for first in range(0, slots, group) if group > 1 else ():
            trunk = Trunk(len(self._trunks), self.slots[first : first + group])
            self._trunks.append(trunk)
            for slot in trunk.slots:
                slot.trunk = trunk
        self.parked = [Slot(slots + len(self._trunks) + i) for i in range(parking)]

    def room(self, waiting: Sequence[Slot | None]) -> int:
        """How many requests of new attempts can be placed after those that wait, each with the row that it claimed."""
        parked = sum(own is not None and self._is_parked(own) for own in waiting)
        free = sum(slot.use is Use.FREE for slot in self.slots)
        # A parked attempt that goes on leaves its row to the one that it takes a slot from.
        free += min(sum(map(self._can_park, self.slots)), len(self._idle_parked()) + parked)
        return max(0, free - parked - sum(own is None for own in waiting))

    def load(self, version: int) -> None:
        """Forgets every prefix. A held slot stays its attempt's, but only to be released."""
        self.version, self._load = version, self._load + 1
        rows = self.slots + self.parked
        held = {slot.load for slot in rows if slot.use is Use.HELD}
        self._versions = {k: v for k, v in self._versions.items() if k in held} | {self._load: version}
        self._by_prompt.clear()
        for trunk in self._trunks:
            trunk.chain, trunk.cached, trunk.touched = (), 0, -1
        for slot in rows:
            slot.touched = -1
            if slot.use is Use.FREE:
                slot.forget()

    def claim(self, request: Request) -> Slot | None:
        """Takes the held slot, or the parked row, of the request's attempt, if there is one.

        Raises:
          VersionError: If the attempt's earlier turns were sampled by other parameters.
        """
        rows = self.slots + self.parked
        mine = [s for s in rows if s.use is Use.HELD and s.attempt == request.attempt and _common(s, request)]
        if not mine:
            return None
        slot = max(mine, key=lambda s: _common(s, request))
        self._check_version(slot)
        slot.use = Use.BUSY
        return slot

    def place(self, request: Request, length: int, own: Slot | None, siblings: int = 1) -> Placement | None:
        """Decides the slot of a request and where its prefix comes from.

        Args:
          request: The request.
          length: Tokens of its prefix.
          own: The slot or the parked row that it claimed.
          siblings: Requests with this very prefix that are to be placed, itself included. Two or more are worth a
            trunk, if a group can be found that reads none.

        Returns:
          None where it has to wait, because every slot is taken and no attempt can make room.
        """
        lift = park = None
        back = own is not None and self._is_parked(own)
        if own is not None and not back:
            target = own
        else:
            target, known = self._find_room(request, length, back)
            if target is None:
                return None
            if own is None and siblings > 1 and known < length - 1 and (trunk := self._idle_trunk()) is not None:
                lift = self._lift(trunk, request, length)
                target, _ = self._find_room(request, length)
        source, best, reuse = self._longest_match(request, length, target)
        base = _matching(target.trunk, request, length)
        # An attempt that comes to a slot reads a trunk that holds as much, even from the slot that has it all itself:
        # every slot of a shard reads as many columns of its own as the longest one has.
        if best is target and lift is None and (own is target or base < reuse):
            source, base = None, min(target.base, reuse)
        if base >= reuse:
            source, reuse = None, base
        wave = 0 if source is None else source.wave
        if base:
            wave = max(wave, target.trunk.wave)
            target.trunk.touched = self._tick()
        if best is not None:
            best.touched = self._tick()
        if back:  # what its row held is read before anything overwrites it
            own.use = Use.FREE
            self._forget(own)
        if target.use is Use.HELD:
            park = self._park(target)
        self._record(target, request.prefix, length - 1)
        target.use, target.attempt, target.wave, target.base = Use.BUSY, request.attempt, wave, base
        return Placement(target.index, source, reuse, base, wave, lift, park)

    def settle(self) -> None:
        """Ends the planning of a visit: what was placed is filled once the visit's waves have run."""
        for filled in (*self.slots, *self._trunks, *self.parked):
            filled.wave = -1

    def hold(self, index: int, turn: Segment) -> None:
        """Appends the turn that ended to its slot's chain; its last token is not in the cache."""
        slot = self.slots[index]
        slot.chain += (turn,)
        slot.cached += len(turn)
        slot.use, slot.touched = Use.HELD, self._tick()

    def release(self, index: int) -> None:
        slot = self._row(index)
        slot.use, slot.touched = Use.FREE, self._tick()
        if slot.load != self._load:
            slot.forget()

    def _check_version(self, slot: Slot) -> None:
        if slot.load != self._load:
            raise VersionError(
                f"attempt {slot.attempt} was sampled by parameters of version {self._versions[slot.load]} and version "
                f"{self.version} is loaded: its cache cannot be continued; release its ticket and start it again"
            )

    def _record(self, slot: Slot, chain: tuple[Segment, ...], cached: int) -> None:
        self._unfind(slot)
        slot.chain, slot.cached, slot.load, slot.touched = chain, cached, self._load, self._tick()
        self._by_prompt.setdefault(chain[0], []).append(slot)

    def _forget(self, slot: Slot) -> None:
        self._unfind(slot)
        slot.forget()

    def _unfind(self, slot: Slot) -> None:
        if slot.chain and slot in (old := self._by_prompt.get(slot.chain[0], [])):
            old.remove(slot)
            if not old:
                del self._by_prompt[slot.chain[0]]

    def _find_room(self, request: Request, length: int, back: bool = False) -> tuple[Slot | None, int]:
        """A slot for the request whose trunk has as much of the prefix as any, and how much that is.

        It is the least recently used free one, or else one whose attempt can be parked, that which was used last: where
        all tools have as long to answer it is away for longest. `back` says that the request leaves a parked row.
        """
        known = {trunk.index: _matching(trunk, request, length) for trunk in self._trunks}

        def shared(slot):
            return known[slot.trunk.index] if slot.trunk else 0

        free = [slot for slot in self.slots if slot.use is Use.FREE]
        held = list(filter(self._can_park, self.slots)) if back or self._idle_parked() else []
        if free:
            # Among slots never used, alternate between the shards, so that they prefill equally much.
            best = min(free, key=lambda s: (-shared(s), s.touched, s.index % self._per_shard, s.index))
        elif held:
            best = min(held, key=lambda s: (-shared(s), -s.touched))
        else:
            return None, 0
        return best, shared(best)

    def _is_parked(self, row: Slot) -> bool:
        return row.index >= len(self.slots)

    def _can_park(self, slot: Slot) -> bool:
        """Whether its attempt waits, and will go on with the parameters that are loaded."""
        return slot.use is Use.HELD and slot.load == self._load

    def _idle_parked(self) -> list[Slot]:
        return [row for row in self.parked if row.use is Use.FREE]

    def _park(self, slot: Slot) -> Park:
        """Moves the attempt of a held slot to the parked row that was left first."""
        row = min(self._idle_parked(), key=lambda r: (r.touched, r.index))
        self._record(row, slot.chain, slot.cached)
        row.use, row.attempt, row.wave = Use.HELD, slot.attempt, 0
        return Park(slot.index, slot.base, row.index)

    def _row(self, index: int) -> Slot:
        return self.slots[index] if index < len(self.slots) else self.parked[index - self.parked[0].index]

    def _idle_trunk(self) -> Trunk | None:
        """A trunk that nobody reads, in a group with as many free slots as any; the least recently used of these."""
        free = {
            trunk.index: sum(slot.use is Use.FREE for slot in trunk.slots)
            for trunk in self._trunks
            if trunk.idle and trunk.wave < 0
        }
        per_shard = len(self._trunks) * self._per_shard // len(self.slots)
        return min(
            (trunk for trunk in self._trunks if free.get(trunk.index, 0) > 1),
            key=lambda t: (-free[t.index], t.touched, t.index % per_shard, t.index),
            default=None,
        )

    def _lift(self, trunk: Trunk, request: Request, length: int) -> Lift:
        """Makes a prefix the trunk; free slots that ended on what was there are forgotten."""
        source, _, reuse = self._longest_match(request, length, None)
        wave = 0 if source is None else source.wave
        for slot in trunk.slots:
            if slot.use is Use.FREE and slot.base:
                self._forget(slot)
        trunk.chain, trunk.cached, trunk.wave, trunk.touched = request.prefix, length - 1, wave, self._tick()
        return Lift(trunk.index, source, reuse, wave)

    def _longest_match(
        self, request: Request, length: int, target: Slot | None
    ) -> tuple[Source | None, Slot | Trunk | None, int]:
        """What holds most of the prefix, how to read it, and how much that is.

        On a tie it is one that needs no copy, then one that is filled soonest.
        """
        found, best, best_key = None, None, (0, False, 0)
        for slot in self._by_prompt.get(request.prefix[0], ()):
            reuse = min(_common(slot, request), slot.cached, length - 1)
            key = (reuse, slot is target, -slot.wave)
            if reuse and key > best_key:
                found, best, best_key = Source(slot.index, slot.base, slot.wave + 1), slot, key
        for trunk in self._trunks:
            key = (_matching(trunk, request, length), False, -trunk.wave)
            if key[0] and key > best_key:
                found, best, best_key = Source(trunk.slots[0].index, trunk.cached, trunk.wave + 1), trunk, key
        return found, best, best_key[0]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _matching(trunk: Trunk | None, request: Request, length: int) -> int:
    """Tokens of the prefix that a trunk holds; the last one is never cached."""
    return 0 if trunk is None else min(_common(trunk, request), trunk.cached, length - 1)


def _common(held: Slot | Trunk, request: Request) -> int:
    """Tokens of the leading segments that a chain and the request's prefix have in common."""
    total = 0
    for mine, theirs in zip(held.chain, request.prefix, strict=False):
        if mine is not theirs:
            break
        total += len(mine)
    return total


def split_prefill(missing: int, buckets: Sequence[int]) -> list[int]:
    """Bucket sizes that cover `missing` tokens, each at least three quarters full or the smallest there is."""
    out = []
    while missing > 0:
        bucket = max((b for b in buckets if 4 * missing >= 3 * b), default=min(buckets))
        out.append(bucket)
        missing -= bucket
    return out


def concatenate(prefix: tuple[Segment, ...]) -> np.ndarray:
    """The ids of a prefix, int32 [T]."""
    return np.concatenate([segment.ids for segment in prefix])
