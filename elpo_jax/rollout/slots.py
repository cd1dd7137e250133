"""The host half of the sampler's cache: which slot holds whose prefix, and where a new request should go.

A slot's row of the cache holds the keys and values of the first `cached` tokens of a chain of segments. Prefixes are
found again by the identity of their segments, never by comparing tokens. A slot is free, busy (its request is waiting
or being decoded) or held (its turn has ended and the attempt's tool is running); a free slot stays warm, as a source of
prefixes, until it is the least recently used.
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
class Slot:
    """One row of the cache, as the host sees it.

    Attributes:
      index: The row.
      use: Whether it is taken.
      chain: Segments whose tokens the row holds.
      cached: How many tokens of the chain are in the cache, from its start; at most all but the last.
      attempt: Whose turn it is or was.
      load: Which loading of parameters computed it, as counted by the table.
      wave: Number of the fork-and-prefill wave that fills it in the visit being planned; -1 if it is filled already.
      touched: When it was last used.
    """

    index: int
    use: Use = Use.FREE
    chain: tuple[Segment, ...] = ()
    cached: int = 0
    attempt: tuple[int, int, int] | None = None
    load: int = 0
    wave: int = -1
    touched: int = -1


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a request goes and what its row lacks.

    Attributes:
      slot: The row that will decode it.
      source: The row that holds the longest known part of its prefix: the same row (it is rewound to `reuse`, which
        costs nothing), another (it is forked), or None.
      reuse: Tokens of the prefix that need no prefill.
      wave: Placements of one wave are independent; those of wave w+1 fork rows that wave w fills.
    """

    slot: int
    source: int | None
    reuse: int
    wave: int


class SlotTable:
    """All slots, and the parameters' version that their contents belong to."""

    def __init__(self, slots: int, shards: int):
        """`slots` rows in `shards` contiguous groups of equal size; new requests are spread over the groups."""
        self.slots = [Slot(i) for i in range(slots)]
        self.version: int | None = None
        self._per_shard = slots // shards
        self._load = 0
        self._versions: dict[int, int] = {}  # of the loads that a slot may still belong to
        self._clock = 0
        self._by_prompt: dict[Segment, list[Slot]] = {}

    @property
    def free(self) -> int:
        return sum(slot.use is Use.FREE for slot in self.slots)

    def load(self, version: int) -> None:
        """Forgets every prefix. A held slot stays its attempt's, but only to be released."""
        self.version, self._load = version, self._load + 1
        held = {slot.load for slot in self.slots if slot.use is Use.HELD}
        self._versions = {k: v for k, v in self._versions.items() if k in held} | {self._load: version}
        self._by_prompt.clear()
        for slot in self.slots:
            slot.touched = -1
            if slot.use is Use.FREE:
                slot.chain, slot.cached = (), 0

    def claim(self, request: Request) -> Slot | None:
        """Takes the held slot of the request's attempt, if there is one.

        Raises:
          VersionError: If the attempt's earlier turns were sampled by other parameters.
        """
        mine = [s for s in self.slots if s.use is Use.HELD and s.attempt == request.attempt and _common(s, request)]
        if not mine:
            return None
        slot = max(mine, key=lambda s: _common(s, request))
        self._check_version(slot)
        slot.use = Use.BUSY
        return slot

    def place(self, request: Request, length: int, own: Slot | None) -> Placement | None:
        """Decides the slot of a request and where its prefix comes from.

        Args:
          request: The request.
          length: Tokens of its prefix.
          own: The slot it claimed.

        Returns:
          None where it has to wait, because every slot is taken.
        """
        target = own if own is not None else self._least_recently_used()
        if target is None:
            return None
        source, reuse = self._longest_match(request, length, target)
        if source is not None:
            assert source.load == self._load  # `load` made all others unfindable
            source.touched = self._tick()
        wave = 0 if source is None else source.wave + 1
        self._record(target, request.prefix, length - 1)
        target.use, target.attempt, target.wave = Use.BUSY, request.attempt, wave
        return Placement(target.index, None if source is None else source.index, reuse, wave)

    def settle(self) -> None:
        """Ends the planning of a visit: what was placed is filled once the visit's waves have run."""
        for slot in self.slots:
            slot.wave = -1

    def hold(self, index: int, turn: Segment) -> None:
        """Appends the turn that ended to its slot's chain; its last token is not in the cache."""
        slot = self.slots[index]
        slot.chain += (turn,)
        slot.cached += len(turn)
        slot.use, slot.touched = Use.HELD, self._tick()

    def release(self, index: int) -> None:
        slot = self.slots[index]
        slot.use, slot.touched = Use.FREE, self._tick()
        if slot.load != self._load:
            slot.chain, slot.cached, slot.touched = (), 0, -1

    def _check_version(self, slot: Slot) -> None:
        if slot.load != self._load:
            raise VersionError(
                f"attempt {slot.attempt} was sampled by parameters of version {self._versions[slot.load]} and version "
                f"{self.version} is loaded: its cache cannot be continued; release its ticket and start it again"
            )

    def _record(self, slot: Slot, chain: tuple[Segment, ...], cached: int) -> None:
        if slot.chain and slot in (old := self._by_prompt.get(slot.chain[0], [])):
            old.remove(slot)
            if not old:
                del self._by_prompt[slot.chain[0]]
        slot.chain, slot.cached, slot.load, slot.touched = chain, cached, self._load, self._tick()
        self._by_prompt.setdefault(chain[0], []).append(slot)

    def _least_recently_used(self) -> Slot | None:
        free = (slot for slot in self.slots if slot.use is Use.FREE)
        # Among slots never used, alternate between the shards, so that they prefill equally much.
        return min(free, key=lambda s: (s.touched, s.index % self._per_shard, s.index), default=None)

    def _longest_match(self, request: Request, length: int, target: Slot) -> tuple[Slot | None, int]:
        """The slot with most of the prefix; on a tie one that needs no copy, then one that is filled soonest."""
        best, best_key = None, (0, False, 0)
        for slot in self._by_prompt.get(request.prefix[0], ()):
            reuse = min(_common(slot, request), slot.cached, length - 1)
            key = (reuse, slot is target, -slot.wave)
            if reuse and key > best_key:
                best, best_key = slot, key
        return best, best_key[0]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _common(slot: Slot, request: Request) -> int:
    """Tokens of the leading segments that the slot's chain and the request's prefix have in common."""
    total = 0
    for mine, theirs in zip(slot.chain, request.prefix, strict=False):
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
