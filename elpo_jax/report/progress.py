"""One line that tells how far a stage is: bar, rates, time left, and the last few numbers.

On a terminal the line is redrawn in place; anywhere else (a log file, a CI job) a plain line is printed about every ten
seconds. Text that came from a model or a tool goes through `printable` before it is shown.
"""

import time
from collections import deque
from collections.abc import Callable, Collection

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from elpo_jax.report.text import printable

PLAIN_SECONDS = 10.0  # between two plain lines
RATE_SECONDS = 30.0  # rates and the time left are measured over at least this much of the past, and one whole step


def duration(seconds: float) -> str:
    """ "42 s", "3:07", "1:02:33"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: object) -> str:
    """A number in a few characters ("0.4312", "1.25e-05", "52.3k"); anything else as printable text."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    for limit, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / size:.3g}{unit}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


class Progress:
    """Shows the progress of one stage while the `with` block runs.

    Example:
      with Progress("elpo", 60) as progress:
          progress.within(64)
          progress.update(1, tokens=5120, success=0.41)
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        *,
        rates: Collection[str] = ("tokens", "rollouts"),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares the display; nothing is shown before the `with` block.

        Args:
          title: Name of the stage.
          total: Number of steps of the whole stage.
          start: Steps done before this process began (a resumed run); they count for the bar, not for the rates.
          rates: Names in `update` that are amounts done since the previous step, shown per second.
          console: Where to write; stdout by default.
          clock: Seconds, monotonic.
        """
        self._title, self._total, self._rates = printable(title), total, tuple(rates)
        self._console = console or Console()
        self._clock = clock
        self._step = start
        self._past: deque[tuple[float, int, dict[str, float]]] = deque()  # one entry per update that ended a step
        self._totals = dict.fromkeys(self._rates, 0.0)
        self._shown: dict[str, str] = {}
        self._within = 0
        self._within_at = 0.0
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._started = self._printed = self._clock()
        self._past.append((self._started, self._step, dict(self._totals)))
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(24), _Tail(self))
            self._bar = RichProgress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._step)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._print(f"{self._title}: {self.tail()}, took {duration(self._clock() - self._started)}")

    def update(self, step: int, **values: object) -> None:
        """Tells that `step` steps are done.

        Args:
          step: Steps done so far, out of the total.
          **values: Numbers (or short strings) to show. Those named in `rates` are amounts since the last update; of
            "rollouts" the default is what `within` told.
        """
        now = self._clock()
        amounts = {"rollouts": self._within} | values
        for name in self._totals.keys() & amounts.keys():
            self._totals[name] += float(amounts[name])  # type: ignore[arg-type]
        shown = {printable(name): short(value) for name, value in values.items() if name not in self._totals}
        self._shown = self._shown | shown  # a new dict: the thread that redraws may be reading the old one
        self._within = 0
        if step > self._step:
            self._step = step
            self._past.append((now, step, dict(self._totals)))
            while now - self._past[1][0] >= RATE_SECONDS:
                self._past.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        self._print_sometimes(now)

    def within(self, rollouts: int) -> None:
        """Tells that `rollouts` rollouts of the step that is under way are done; the next `update` ends that step."""
        self._within, self._within_at = rollouts, self._clock()
        self._print_sometimes(self._within_at)

    def say(self, line: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        self._print(printable(line))

    def tail(self) -> str:
        """All that follows the bar: steps, rates, time left, values."""
        (then, first, before), (now, last, after) = self._past[0], self._past[-1]
        parts = [f"{self._step}/{self._total}"]
        if self._within:
            rate = self._within / max(self._within_at - now, 1e-9)
            parts.append(f"{self._within} rollouts of the next at {short(rate)}/s")
        if now > then:
            parts += [f"{short((after[n] - before[n]) / (now - then))} {n}/s" for n in self._rates if after[n]]
            if last < self._total:
                # Counted down between updates, for a step may take minutes, but never into the steps after this one.
                pace, rest = (now - then) / (last - first), self._total - last
                left = max(pace * rest - (self._clock() - now), pace * (rest - 1))
                parts.append(f"{duration(left)} left")
        for name, text in self._shown.items():
            parts.append(f"{text} {name.removesuffix('_per_s')}/s" if name.endswith("_per_s") else f"{name} {text}")
        return ", ".join(parts)

    def _print_sometimes(self, now: float) -> None:
        if self._bar is None and now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self._print(f"{self._title}: {self.tail()}")

    def _print(self, line: str) -> None:
        console = self._bar.console if self._bar is not None else self._console
        console.print(Text(line), soft_wrap=True, highlight=False)


class _Tail(ProgressColumn):
    """Asks for the text at every refresh, so that the time left runs on between updates."""

    def __init__(self, progress: Progress):
        self._progress = progress
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self._progress.tail(), overflow="ellipsis", no_wrap=True)
