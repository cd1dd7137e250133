"""A data set's rows: one problem with its reference answer, or one conversation to imitate; and their form as JSON.

Errors and `repr` name a row by where it is, never by its text, because some data sets ask not to be quoted.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from elpo_jax.tasks.base import Split
from elpo_jax.tasks.exact import readable
from elpo_jax.tools.judge import parse_tests

Grader = Literal["math", "letter", "program"]
ROLES = ("system", "user", "assistant", "tool")

_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class DatasetError(ValueError):
    """A file is not what it should be; the message names the file, the row and the remedy."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem.

    As JSON: {"problem": text, "answer": text or number, "id": text, "grader": name, "meta": object}, of which `problem`
    and, except for programs, `answer` are required; an id is by default the row's number from 0, a grader "math".

    Attributes:
      id: Unique within its split.
      problem: The bare problem, without instructions.
      answer: Reference answer; "" for programs.
      grader: What can tell whether an answer is right.
      meta: What else is known, JSON-serialisable. Keys with a meaning here: `tests` {"inputs", "outputs", "fn_name"},
        `starter_code` and `contest_date` (ISO) of programs, `solution` (a worked one), `domain` (named in the prompt of
        letter questions), and `private`, true where the text must not be shown.
    """

    id: str
    problem: str
    answer: str
    grader: Grader
    meta: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Row(id={self.id!r}, grader={self.grader!r}, problem of {len(self.problem)} characters)"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One conversation to imitate.

    As JSON: {"messages": [...], "tools": [...], "id": text, "meta": object}, of which `messages` is required.

    Attributes:
      id: Unique within its split.
      messages: With `role` (system, user, assistant or tool), `content`, and `tool_calls` where there are any.
      tools: Function schemas that the assistant is offered.
      meta: What else is known, JSON-serialisable.
    """

    id: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    meta: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Conversation(id={self.id!r}, {len(self.messages)} messages)"


def split_word(name: str) -> Split | None:
    """The split that a file or folder name speaks of ("train-00000-of-00001.parquet"), if any."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def answer_text(value: Any) -> str:
    """A published answer as text: text, a number, or one of those in a list of one. "" where there is none.

    Raises:
      DatasetError: If it is anything else.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    kind = f"the number {value}" if isinstance(value, float) else type(value).__name__
    raise DatasetError(f"the answer must be text or a finite number, not {kind}")


def problem_of(row: Row) -> str | None:
    """Why the row cannot be graded; None if it can."""
    if row.grader == "program":
        try:
            parse_tests(row.meta.get("tests"))
        except ValueError as error:
            return f"its tests are unusable ({error})"
    elif not row.answer:
        return "it has no answer"
    elif row.grader == "letter" and row.answer not in ("A", "B", "C", "D"):
        return "its answer is not one of the letters A to D"
    elif row.grader == "math" and not readable(row.answer):
        return "its answer is one that no parser reads (a brace without its end, or too long)"
    return None


def to_json(row: Row | Conversation) -> str:
    """One line of JSON, without a line break.

    Raises:
      DatasetError: If it has no JSON form (NaN, infinity, half of a surrogate pair).
    """
    try:
        text = json.dumps(vars(row), ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        raise DatasetError(f"it has no JSON form: {error}") from None
    return text


def from_json(value: Any, number: int) -> Row | Conversation:
    """A row from its JSON, checked.

    Args:
      value: As `json.loads` gave it.
      number: The row's, from 0.

    Raises:
      DatasetError: If a key is missing, or has a value of the wrong type; the row itself is for the caller to name.
    """
    if not isinstance(value, dict):
        raise DatasetError("it is not a JSON object")
    identity, meta = value.get("id", str(number)), value.get("meta", {})
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not isinstance(identity, str) or not identity:
        raise DatasetError('"id" must be text that is not empty')
    if not isinstance(meta, dict):
        raise DatasetError('"meta" must be an object')
    allowed = ("messages", "tools") if "messages" in value else ("problem", "answer", "grader")
    unknown = [key for key in value if key not in ("id", "meta", *allowed)]
    if unknown:
        raise DatasetError(f'unknown key "{unknown[0]}": put what is not {", ".join(allowed)} or id under "meta"')
    if "messages" in value:
        return _conversation(identity, value["messages"], value.get("tools", []), meta)
    problem, grader = value.get("problem"), value.get("grader", "math")
    if not isinstance(problem, str) or not problem.strip():
        raise DatasetError('"problem" must be text that is not empty')
    if grader not in get_args(Grader):
        raise DatasetError(f'"grader" must be one of {", ".join(get_args(Grader))}')
    return Row(identity, problem, answer_text(value.get("answer")), grader, meta)


def _conversation(identity: str, messages: Any, tools: Any, meta: dict[str, Any]) -> Conversation:
    if not isinstance(messages, list) or not isinstance(tools, list):
        raise DatasetError('"messages" and "tools" must be lists')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DatasetError(f'message {i} needs a "role" out of {", ".join(ROLES)}')
        if not isinstance(message.get("content"), str | None):
            raise DatasetError(f'message {i}: "content" must be text or null')
    if not any(message["role"] == "assistant" for message in messages):
        raise DatasetError("no message is the assistant's: there is nothing to imitate")
    return Conversation(identity, messages, tools, meta)
