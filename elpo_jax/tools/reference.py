"""What the reference recipe's `code_interpreter` makes of a program and of its output, for the paper's tables.

Models trained with that recipe have met its quirks, and figures are comparable only with them: a line is put into
`print(...)` as text, whatever it says, so that a comment, an assignment, an assertion, a `return` or the last line of a
block becomes a syntax error; and an answer is cut to 256 characters. Only addresses of objects are masked here and
not there, and tracebacks name the file `<code>`.
"""

import re

from elpo_jax.tools.base import Status, ToolResult
from elpo_jax.tools.observation import ended_itself, masked

DESCRIPTION = "A tool for executing code."
NO_OUTPUT = "no stdout here"
MOST_CHARS = 256
_CUT = "...(truncated)..."

_BLOCK = re.compile(r"```python(.*?)```", re.DOTALL)


def wrapped(code: str) -> str:
    """The program that is run in place of `code`.

    Of an argument with a block fenced as "python", the first such block alone, stripped. The last line that is not
    empty (one of spaces is not) is put into `print(...)`, indentation and all, unless it begins with "print".
    """
    block = _BLOCK.search(code)
    lines = (block[1].strip() if block else code).split("\n")
    last = next((i for i in reversed(range(len(lines))) if lines[i]), None)
    if last is not None and not lines[last].startswith("print"):
        lines[last] = f"print({lines[last]})"
    return "\n".join(lines)


def answer(result: ToolResult) -> tuple[str, bool]:
    """The text of the program's result, and whether it was cut.

    That is both streams, one after the other; `NO_OUTPUT` of a program that a limit ended, but for a flood.
    """
    if not ended_itself(result) and result.status is not Status.OUTPUT_LIMIT:
        return NO_OUTPUT, False
    text = masked(result.stdout) + masked(result.stderr)
    if len(text) <= MOST_CHARS:
        return text, False
    half = MOST_CHARS // 2
    return text[:half] + _CUT + text[-half:], True
