"""What a compiled program does, read from its text: operations of matrix products and communication, per device.

XLA's own `cost_analysis` counts the body of a loop once; here everything is multiplied by the trip counts that the
compiler knows. Only matrix products are counted as operations: in a transformer the rest is a matter of memory traffic.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}  # the others end in their number of bits

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)|"
    r"\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind, per device.

    Attributes:
      count: How often one is executed.
      payload: Bytes of the whole arrays, gathered or not yet scattered.
      sent: Bytes that a device sends to its neighbours if they do it as a ring.
    """

    count: float = 0
    payload: float = 0
    sent: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.payload + other.payload, self.sent + other.sent)

    def __mul__(self, factor: float) -> "Traffic":
        return Traffic(self.count * factor, self.payload * factor, self.sent * factor)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does on each device.

    Attributes:
      flops: Operations of its matrix products, two per multiplication with addition.
      traffic: By kind of collective, those of more than one device.
      unknown_loops: Loops whose trip count the compiler does not know; their bodies count once.
    """

    flops: float
    traffic: dict[str, Traffic]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str  # an array, or a tuple of them in parentheses
    opcode: str
    rest: str  # operands and attributes


def work_of(text: str, most_trips: int | None = None) -> Work:
    """Reads the text of an optimised HLO module, such as `compiled.as_text()`.

    Args:
      text: The module.
      most_trips: Trips that loops make at most whose number depends on the data; None where there should be none.
    """
    computations, entry = _computations(text)
    flops, traffic, unknown = 0.0, {}, 0
    for instruction, shapes, times in _executed(computations, entry, 1, most_trips or 1):
        if instruction.opcode == "dot":
            flops += times * _dot(instruction, shapes)
        elif instruction.opcode == "while":
            unknown += most_trips is None and not _TRIPS.search(instruction.rest)
        elif (kind := instruction.opcode.removesuffix("-start")) in KINDS:
            size, parties = _payload(instruction, kind)
            if parties > 1:
                one = Traffic(1, size, size * _share_sent(kind, parties))
                traffic[kind] = traffic.get(kind, Traffic()) + one * times
    return Work(flops, traffic, unknown)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    """From "SHAPE OPCODE(OPERANDS), ATTRIBUTES", where a tuple's shape has parentheses of its own."""
    if text.startswith("("):
        depths = itertools.accumulate((letter == "(") - (letter == ")") for letter in text)
        end = next(i for i, depth in enumerate(depths, 1) if not depth)
    else:
        end = text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    return _Instruction(name, text[:end], opcode, rest)


def _executed(
    computations: dict[str, list[_Instruction]], name: str, times: float, most_trips: int
) -> Iterator[tuple[_Instruction, dict[str, str], float]]:
    """Every instruction that runs, with the shapes of its computation and how often it runs."""
    instructions = computations[name]
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    for instruction in instructions:
        yield instruction, shapes, times
        if instruction.opcode in KINDS or "reduce" in instruction.opcode or instruction.opcode in ("sort", "scatter"):
            continue  # what they call is for single elements
        trips = 1
        if instruction.opcode == "while":
            known = _TRIPS.search(instruction.rest)
            trips = int(known[1]) if known else most_trips
        for one, several in _CALLED.findall(instruction.rest):
            for called in [one] if one else re.findall(r"%([\w.-]+)", several):
                yield from _executed(computations, called, times * trips, most_trips)


def _arrays(shape: str) -> list[tuple[float, list[int]]]:
    """(bytes of an element, sizes) of each array of a shape."""
    out = []
    for dtype, sizes in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
        out.append((width, [int(size) for size in sizes.split(",") if size]))
    return out


def _dot(instruction: _Instruction, shapes: dict[str, str]) -> float:
    [(_, output)] = _arrays(instruction.shape)
    # The operands are names, with or without their shapes before them.
    left = re.search(r"%([\w.-]+)", instruction.rest)[1]
    [(_, sizes)] = _arrays(shapes[left])
    dimensions = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    contracted = [sizes[int(d)] for d in (dimensions[1] if dimensions else "").split(",") if d]
    return 2.0 * math.prod(output) * math.prod(contracted)


def _payload(instruction: _Instruction, kind: str) -> tuple[float, int]:
    """Bytes of the whole array of a collective, and how many devices take part in one."""
    sizes = [width * math.prod(dimensions) for width, dimensions in _arrays(instruction.shape)]
    # What an asynchronous collective returns holds its operands too.
    size = max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)
    parties = _parties(instruction.rest)
    return size * (parties if kind == "reduce-scatter" else 1), parties


def _parties(attributes: str) -> int:
    if "source_target_pairs=" in attributes:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)[1]
        return 2 if any(a != b for a, b in re.findall(r"(\d+),(\d+)", pairs)) else 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"('[^']+')=(\d+)", named[1]))
        # An axis, or a part of one: 'name':(before)size
        parts = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    raise ValueError(f"the groups of a collective are written in a way that is not known here: {attributes[:200]}")


def _share_sent(kind: str, parties: int) -> float:
    """Bytes that a device of a ring sends, as a share of the whole array."""
    match kind:
        case "all-reduce":  # a reduce-scatter and an all-gather
            return 2 * (parties - 1) / parties
        case "collective-permute" | "collective-broadcast":
            return 1.0
    return (parties - 1) / parties
