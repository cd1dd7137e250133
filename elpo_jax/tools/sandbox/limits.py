"""What one program may use."""

import dataclasses
import math

# Least and largest value of each field. The largest keep one program from being a threat by configuration.
_BOUNDS = {
    "cpu_s": (0.01, 3600),
    "wall_s": (0.01, 36000),
    "memory_mb": (16, 1 << 20),
    "output_kb": (1, 65536),
    "scratch_mb": (1, 16384),
    "file_mb": (1, 16384),
    "files": (16, 1 << 20),
    "open_files": (16, 4096),
    "threads": (1, 4096),
    "code_kb": (1, 16384),
    "stdin_mb": (1, 1024),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one program; a model can never set them.

    Verdicts depend on what the program does, not on how busy the machine is: time is CPU time, and the wall-clock guard
    counts only the time in which the program sleeps. There is a hard end (`hard_wall`) for programs that do both by
    turns; one that only computes meets it where more than sixteen programs wait for each core.

    Attributes:
      cpu_s: CPU seconds, of all threads together.
      wall_s: Seconds asleep; 0 stands for four times `cpu_s`.
      memory_mb: Address space beyond what Python and the loaded packages take.
      output_kb: Bytes on stdout, and as many on stderr, in KiB. A program that prints more is stopped.
      scratch_mb: All files of the scratch folder together.
      file_mb: One file.
      files: Files and folders in the scratch folder.
      open_files: Descriptors.
      threads: Of the program, its main thread included.
      code_kb: Length of the program.
      stdin_mb: Length of its standard input.
    """

    cpu_s: float = 5.0
    wall_s: float = 0.0
    memory_mb: int = 1024
    output_kb: int = 64
    scratch_mb: int = 32
    file_mb: int = 16
    files: int = 4096
    open_files: int = 64
    threads: int = 64
    code_kb: int = 256
    stdin_mb: int = 64

    def __post_init__(self):
        """Raises ValueError where a limit makes no sense."""
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if name == "wall_s" and value == 0:
                continue
            whole = name not in ("cpu_s", "wall_s")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(f"Limits({name}={value!r}): it must be {'an integer' if whole else 'a number'}")
            if not (math.isfinite(value) and least <= value <= most):
                raise ValueError(f"Limits({name}={value}): it must be between {least} and {most}")

    @property
    def wall(self) -> float:
        """Seconds that a program may sleep."""
        return self.wall_s or 4 * self.cpu_s

    @property
    def hard_wall(self) -> float:
        """Seconds after which a program is ended in any case."""
        return 4 * max(self.wall, 4 * self.cpu_s)
