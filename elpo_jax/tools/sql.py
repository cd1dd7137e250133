"""The tool `sql`: statements on a SQLite database that belongs to one attempt.

SQLite runs in the sandbox, never in this process. The world of an attempt is an immutable value, the bytes of its
database: a call sends them and the statements to a fresh process there, which answers with rows and, where something
changed, the new bytes. So branches of an attempt share nothing, and a call that fails has no effect at all.

What a call gives depends on the database and the statements alone: the clock stands still, `random()` is seeded by
both, and the time limit counts instructions of SQLite's machine. (A statement that spends long in a single one, such as
a search made to, is ended by the sandbox's limit on CPU time.)
"""

import base64
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from elpo_jax.tools.base import InfrastructureError, State, Status, ToolResult
from elpo_jax.tools.sandbox import Limits, Sandbox
from elpo_jax.tools.toolbox import UNAVAILABLE

_RUNNER = pathlib.Path(__file__).with_name("_sql_runner.py").read_text(encoding="utf-8") + "\n\nmain()\n"
_STATUSES = {s.value: s for s in (Status.OK, Status.EMPTY, Status.ERROR, Status.TIMEOUT, Status.MEMORY)}
_ERROR_CHARS = 300
_MAGIC = b"SQLite format 3\0"
# Least and largest value of each limit. With the largest, what is asked of the sandbox stays within its own bounds.
_BOUNDS = {
    "rows": (1, 1_000_000),
    "cell_chars": (1, 1_000_000),
    "text_chars": (1, 500_000),
    "sql_chars": (1, 1_000_000),
    "steps": (1, 10**12),
    "database_kb": (1, 32768),
    "memory_mb": (1, 65536),
    "cpu_s": (0.01, 360),
}
_ENDED = {
    Status.TIMEOUT: "it takes too long",
    Status.MEMORY: "the statements need too much memory",
    Status.OUTPUT_LIMIT: "the result is too large",
    Status.CRASH: "SQLite crashed",
}


@dataclasses.dataclass(frozen=True, slots=True)
class SqlState:
    """The world of one attempt.

    Attributes:
      database: A SQLite database file; empty for one without tables.
    """

    database: bytes = b""

    def fork(self, key: int) -> "SqlState":
        """The same database. The key is not needed: nothing is drawn but what the statements ask for."""
        return self


@dataclasses.dataclass(frozen=True)
class SqlLimits:
    """Limits of one call.

    Attributes:
      rows: Rows that are shown, of all statements together.
      cell_chars: Characters of a value that are shown.
      text_chars: Characters of the answer.
      sql_chars: Length of the statements.
      steps: Instructions of SQLite's machine; some twenty million take a second.
      database_kb: Size of the database in KiB.
      memory_mb: What SQLite may allocate beside the database.
      cpu_s: CPU seconds, should the steps not be what takes the time.
    """

    rows: int = 50
    cell_chars: int = 200
    text_chars: int = 4000
    sql_chars: int = 10_000
    steps: int = 20_000_000
    database_kb: int = 4096
    memory_mb: int = 64
    cpu_s: float = 5.0

    def __post_init__(self):
        """Raises ValueError where a limit makes no sense."""
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            whole = name != "cpu_s"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(f"SqlLimits({name}={value!r}): it must be {'an integer' if whole else 'a number'}")
            if not least <= value <= most:
                raise ValueError(f"SqlLimits({name}={value}): it must be between {least} and {most}")


class Sql:
    """See `elpo_jax.tools.base.Tool`; the only argument is `query`. Thread-safe; the state must be a `SqlState`.

    A call may have several statements. They take effect together or, if one fails, not at all; a transaction has to
    end in the call that began it. The answer shows the rows of every statement, values divided by " | " under a line of
    column names, and of the others how many rows they changed. NULL is NULL, a blob is X'00FF', floats are shown so
    that they can be read back, and characters that are not printable are escaped, as are line ends. Temporary tables,
    `last_insert_rowid()` and the like last for one call.

    Refused: ATTACH, DETACH, VACUUM, virtual tables, extensions, and every PRAGMA that does more than tell about the
    schema.

    Statuses: `ok`; `empty` (no rows and nothing changed); `error` (`detail` is SQLite's name for it, such as
    SQLITE_CONSTRAINT_UNIQUE, or "too_long", "unicode", "no_statement" or "transaction"); `timeout`; `memory`;
    `output_limit`; `crash`; `sandbox_error`.

    Args:
      sandbox: Runs SQLite. Closing it is the caller's.
      limits: Of one call; None for the defaults.
      read_only: Refuses every change.
      foreign_keys: Enforces foreign keys, which SQLite by default only notes.
      now: What the clock says, as "YYYY-MM-DD HH:MM:SS".
    """

    name = "sql"
    description = "Runs SQLite statements on the database and returns their rows. If one fails, none has any effect."
    parameters: Mapping[str, Any] = MappingProxyType(
        {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
            "additionalProperties": False,
        }
    )
    in_process = False

    def __init__(
        self,
        sandbox: Sandbox,
        limits: SqlLimits | None = None,
        *,
        read_only: bool = False,
        foreign_keys: bool = False,
        now: str = "2025-01-01 12:00:00",
    ):
        self._sandbox = sandbox
        self._limits = limits or SqlLimits()
        self._read_only = read_only
        self._foreign_keys = foreign_keys
        self._now = now

    def run(self, arguments: Mapping[str, Any], state: State | None) -> tuple[ToolResult, State | None]:
        """Runs the statements of `query`.

        Raises:
          InfrastructureError: If the sandbox is closed, or SQLite in it or the state is broken.
        """
        if not isinstance(state, SqlState):
            raise InfrastructureError(f"the tool sql needs a SqlState, not {type(state).__name__}")
        sql = arguments["query"]
        if len(sql) > self._limits.sql_chars:
            text = f"Error: the SQL is longer than {self._limits.sql_chars} characters"
            return ToolResult(Status.ERROR, text, "too_long"), state
        return self._call(sql, state, setup=False)

    def new_state(self, script: str) -> SqlState:
        """The world that a script makes.

        Args:
          script: SQL of ours: not refused any PRAGMA, longer and slower than a model's may be, but run as safely.

        Raises:
          ValueError: If it fails.
          InfrastructureError: If the sandbox or SQLite in it is broken.
        """
        result, state = self._call(script, SqlState(), setup=True)
        if result.status is Status.SANDBOX_ERROR:
            raise InfrastructureError(f"SQLite in the sandbox: {result.status} {result.detail}".rstrip())
        if result.status not in (Status.OK, Status.EMPTY):
            raise ValueError(f"the script for the database failed: {result.text.removeprefix('Error: ')}")
        return state

    def _call(self, sql: str, state: SqlState, setup: bool) -> tuple[ToolResult, SqlState]:
        limits = self._limits
        most = limits.database_kb << 10
        if len(state.database) > most:
            raise InfrastructureError(f"the database is larger than {limits.database_kb} KiB")
        request = {
            "sql": sql,
            "setup": setup,
            "read_only": self._read_only and not setup,
            "foreign_keys": self._foreign_keys and not setup,
            "now": self._now,
            "rows": limits.rows,
            "cell_chars": limits.cell_chars,
            "text_chars": limits.text_chars,
            "steps": limits.steps,
            "database_bytes": most,
            "heap_bytes": (limits.memory_mb << 20) + 3 * most,
        }
        result = self._sandbox.run(
            _RUNNER,
            json.dumps(request).encode() + b"\n" + state.database,
            limits=Limits(
                cpu_s=limits.cpu_s * (10 if setup else 1),
                memory_mb=limits.memory_mb + 8 * (most >> 20) + 256,
                output_kb=limits.database_kb * 4 // 3 + limits.text_chars // 32 + 64,
                stdin_mb=1024,
            ),
        )
        if result.status in _ENDED:
            text = f"Error: {_ENDED[result.status]}; nothing was changed"
            return dataclasses.replace(result, text=text, stdout="", stderr="", null_output=False), state
        if result.status is Status.SANDBOX_ERROR:  # the sandbox has tried again already
            return dataclasses.replace(result, text=UNAVAILABLE), state
        if result.status is not Status.OK:
            last = result.stderr.rstrip().rpartition("\n")[2]
            raise InfrastructureError(f"SQLite in the sandbox: {result.status} {result.detail} {last}".rstrip())
        try:
            reply = _reply(result.stdout, most)
        except (ValueError, RecursionError) as error:
            raise InfrastructureError(f"SQLite in the sandbox answered nonsense ({error})") from None
        if reply["status"] in (Status.OK, Status.EMPTY):
            text = reply["text"][: limits.text_chars + 10]
        else:
            text = f"Error: {reply['text'][:_ERROR_CHARS]}; nothing was changed"
        fields = {"status": reply["status"], "text": text, "detail": reply["detail"], "truncated": reply["truncated"]}
        result = dataclasses.replace(result, **fields, stdout="", out_bytes=0)
        if reply["database"] is None or request["read_only"]:
            return result, state
        return result, SqlState(reply["database"])


def read_database(path: str | pathlib.Path) -> SqlState:
    """The world that a database file holds. SQLite does not see it here, only in the sandbox.

    Raises:
      ValueError: If it is no SQLite database, or parts of it are in a journal beside it.
      OSError: If it cannot be read.
    """
    path = pathlib.Path(path)
    image = bytearray(path.read_bytes())
    if not image.startswith(_MAGIC) or len(image) < 512:
        raise ValueError(f"{path} is not a SQLite database")
    for suffix in ("-wal", "-journal"):
        beside = path.with_name(path.name + suffix)
        if beside.exists() and beside.stat().st_size:
            raise ValueError(f"{path} is in use or was left in the middle of a change: {beside.name} is not empty")
    # A database in memory has no write-ahead log; these bytes of the header say so.
    image[18:20] = b"\1\1"
    return SqlState(bytes(image))


def _reply(output: str, most: int) -> dict[str, Any]:
    """What the runner answered.

    Raises:
      ValueError, RecursionError: If it is not what the runner would answer.
    """
    reply = json.loads(output)
    if not isinstance(reply, dict):
        raise ValueError("not an object")
    kinds = {"status": str, "detail": str, "text": str, "truncated": bool}
    if any(not isinstance(reply.get(key), kind) for key, kind in kinds.items()) or reply["status"] not in _STATUSES:
        raise ValueError("not a reply")
    image = reply.get("database")
    if image is not None:
        image = base64.b64decode(image, validate=True)
        if len(image) > most or not image.startswith(_MAGIC):
            raise ValueError("not a database")
    return {**reply, "status": _STATUSES[reply["status"]], "detail": reply["detail"][:64], "database": image}
