"""What a model is shown of a program's output: tracebacks trimmed, addresses masked, and cut in the middle to a limit.

Nothing here trusts the output: a program may print what looks like a traceback, which is then trimmed like one. Time is
linear in the length of the output.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from elpo_jax.tools.base import Status, ToolResult

MARKER = "\n[... output cut ...]\n"
FRAMES_MARKER = "  [... frames cut ...]"
EXCEPTIONS_MARKER = "[... earlier exceptions cut ...]"
LINE_CHARS = 300  # of one line of a traceback
MOST_FRAMES = 6  # of one exception: the first two, which lead to the fault, and the last four, which are at it
MOST_EXCEPTIONS = 2  # of a chain, or of several threads
LEAST_LIMIT = 64  # room for two markers, an exception's type and the end of its message

Traceback = Literal["frames", "last_line"]

_CHARS_PER_TOKEN = 32  # as many are looked at for each token of the limit; a flood is not encoded only to be cut
_OWN = "<code>"  # the file name of a program
_ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{8,16}(?=>)")  # in "<function f at 0x7f0c12345678>"
_HEADER = re.compile(r"(  \+ Exception Group )?Traceback \(most recent call last\):")
_FRAME = re.compile(r'([ |+]*)File "([^"]*)", line ([0-9]+)(, in .*)?')
_MARKS = " |~^"  # all there is on the line under the source line of a frame
_LINKS = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


class Encoder(Protocol):
    """A tokenizer, as far as it is needed here. It must keep text as it is."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; U+FFFD for a part of a character."""


def masked(text: str) -> str:
    """The text without the addresses of objects, which differ from one process to the next."""
    return _ADDRESS.sub("0x0", text)


def ended_itself(result: ToolResult) -> bool:
    """Whether no limit of ours ended the program, so that all it printed is known and would be again."""
    return result.status is Status.CRASH or (
        result.status in (Status.OK, Status.EMPTY, Status.ERROR) and result.exit_code is not None
    )


def repeatable(result: ToolResult) -> ToolResult:
    """The result with only what the program printed that it prints on any machine, however busy."""
    if ended_itself(result):
        return result
    # A flood is stopped at the same byte each time, but how far the other stream got by then differs.
    flooded = result.status is Status.OUTPUT_LIMIT
    stdout = result.stdout if flooded and len(result.stdout) >= len(result.stderr) else ""
    return dataclasses.replace(result, stdout=stdout, stderr=result.stderr if flooded and not stdout else "")


def observation(
    stdout: str,
    stderr: str,
    ending: str = "",
    *,
    limit: int,
    tokenizer: Encoder | None = None,
    traceback: Traceback = "frames",
) -> tuple[str, bool]:
    """The text of a program's output: stdout, what it wrote to stderr, its exceptions, and how it ended.

    Of a traceback are kept the frames of the program itself, at most `MOST_FRAMES`; of several exceptions the last
    `MOST_EXCEPTIONS`; of a line `LINE_CHARS`. What is longer than the limit then loses its middle, but nothing of the
    last exception's type and message unless they alone are too long.

    Args:
      stdout: What the program printed.
      stderr: Likewise.
      ending: A line of ours on how it ended.
      limit: Most tokens of the text, or characters where there is no tokenizer; at least `LEAST_LIMIT`.
      tokenizer: Counts.
      traceback: "frames", or "last_line" for types and messages alone.

    Returns:
      The text, and whether it was cut; `MARKER` stands where it was.
    """
    printed, traces = _split(masked(stderr))
    output = _joined(masked(stdout).rstrip(), printed)
    frames, message = _frames_and_message(traces, traceback)
    message = _joined(message, ending)
    whole = _joined(output, frames, message)
    if _fits(whole, limit, tokenizer):
        return whole, False
    budget = limit
    while True:
        room = budget - _size(MARKER, tokenizer)
        if _fits(message, room, tokenizer):
            text = cut(whole, budget, tokenizer, tail=_size(message, tokenizer) + 2)
        else:
            text = MARKER.lstrip("\n") + cut(message, room, tokenizer)
        # The whole can have a few more tokens than its parts.
        excess = _size(text, tokenizer) - limit
        if excess <= 0:
            return text, True
        budget -= excess


def cut(text: str, limit: int, tokenizer: Encoder | None = None, tail: int = 0) -> str:
    """A text of at most `limit` tokens, or characters: a longer one loses its middle, where `MARKER` then stands.

    Characters stay whole: of one that the limit would split nothing is kept. The end gets half of the room, or `tail`
    if that is more.
    """
    if _fits(text, limit, tokenizer):
        return text
    room = limit - _size(MARKER, tokenizer)
    if room <= 0:
        return ""
    tail = min(max(room // 2, tail), room)
    head = room - tail
    if tokenizer is None:
        return text[:head] + MARKER + text[len(text) - tail :]
    most = _CHARS_PER_TOKEN * limit
    whole = len(text) <= 2 * most
    first = tokenizer.encode(text if whole else text[:most])
    last = first if whole else tokenizer.encode(text[-most:])
    kept = _common(text, tokenizer.decode(first[:head]))
    end = _common(text[kept:][::-1], tokenizer.decode(last[len(last) - tail :])[::-1])
    return text[:kept] + MARKER + text[len(text) - end :]


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _fits(text: str, limit: int, tokenizer: Encoder | None) -> bool:
    if tokenizer is not None and len(text) > _CHARS_PER_TOKEN * limit:
        return False
    return _size(text, tokenizer) <= limit


def _size(text: str, tokenizer: Encoder | None) -> int:
    return len(text) if tokenizer is None else len(tokenizer.encode(text))


def _joined(*parts: str) -> str:
    return "\n".join(filter(None, parts))


@dataclasses.dataclass
class _Trace:
    """One exception as it was printed.

    Attributes:
      header: Its first line; "" of a syntax error in the program itself.
      frames: The lines of each frame that is kept; of an exception group other lines too, one by one.
      message: Type and message, and whatever was written after it.
      place: " (<code>, line 3)" of a syntax error.
      link: The sentence that leads from this exception to the next in a chain.
    """

    header: str
    frames: list[list[str]] = dataclasses.field(default_factory=list)
    message: list[str] = dataclasses.field(default_factory=list)
    place: str = ""
    link: str = ""
    _kept: bool = False
    _margin: str = ""

    def add(self, line: str) -> None:
        """Takes an indented line: the next frame, or something that belongs to the last one."""
        frame = _FRAME.fullmatch(line)
        if frame:
            self._margin = frame[1]
            self.place = "" if frame[4] else f" ({frame[2]}, line {frame[3]})"
            self._kept = bool(self.place) or frame[2] == _OWN
            if self._kept:
                self.frames.append([line])
        elif line.startswith(self._margin + "  ") or line.startswith(self._margin + "[Previous line repeated"):
            if self._kept and (self.place or line.strip(_MARKS)):
                self.frames[-1].append(line)
        else:
            self.frames.append([line])

    @property
    def is_group(self) -> bool:
        return self.header.startswith(" ")

    def frame_lines(self) -> Iterator[str]:
        frames = self.frames
        if len(frames) > MOST_FRAMES and not self.is_group:
            frames = [*frames[:2], [FRAMES_MARKER], *frames[2 - MOST_FRAMES :]]
        if frames and self.header:
            yield self.header
        for frame in frames:
            yield from frame

    def last_lines(self, with_place: bool) -> str:
        """Type and message."""
        message = "\n".join(line[:LINE_CHARS] for line in self.message).strip("\n")
        if self.is_group and not message:  # it stands among the frames, behind a margin
            message = next((line[4:] for (line, *_) in self.frames if re.match(r"  \| \S", line)), "")[:LINE_CHARS]
        first, _, more = message.partition("\n")
        return _joined(first + (self.place if with_place else ""), more)


def _split(stderr: str) -> tuple[str, list[_Trace]]:
    """What the program wrote before its first traceback, and the tracebacks with what follows each."""
    printed: list[str] = []
    traces: list[_Trace] = []
    inside = False
    for line in stderr.rstrip().split("\n"):
        header = _HEADER.fullmatch(line)
        place = not inside and (frame := _FRAME.fullmatch(line)) and frame[1] == "  " and not frame[4]
        if header or place:
            traces.append(_Trace(line if header else ""))
            inside = True
            if place:
                traces[-1].add(line)
        elif inside and line.startswith("  "):
            traces[-1].add(line)
        elif not traces:
            printed.append(line)
        else:
            inside = False
            if line in _LINKS:
                traces[-1].link = line
            else:
                traces[-1].message.append(line)
    return "\n".join(printed).rstrip(), traces


def _frames_and_message(traces: list[_Trace], traceback: Traceback) -> tuple[str, str]:
    """All of the exceptions but the last one's type and message; and these."""
    if not traces:
        return "", ""
    *earlier, last = traces
    if traceback == "last_line":
        ends = [trace.last_lines(True) for trace in earlier if not trace.link]
        return _joined(*ends), last.last_lines(True)
    lines = [EXCEPTIONS_MARKER] if len(traces) > MOST_EXCEPTIONS else []
    for trace in traces[-MOST_EXCEPTIONS:]:
        lines += [line[:LINE_CHARS] for line in trace.frame_lines()]
        if trace is not last:
            lines += [trace.last_lines(False), *(["", trace.link, ""] if trace.link else [])]
    return "\n".join(lines), "" if last.is_group and not last.message else last.last_lines(False)
