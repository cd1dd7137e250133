"""What the sandbox runs for a call of the tool `sql`: this file, and a call of `main`, which `sql.py` appends.

Standard input is a line of JSON, the request, and then the bytes of the database (none for an empty one); standard
output is an object of JSON: "status", "detail", "text", "truncated", and "database", as base64, if it changed. The
model's statements have all of this process in their reach at worst, so the host believes none of it. Needs Python 3.11,
whose sqlite3 module first had the limits and the bytes of a database.
"""

import base64
import contextlib
import hashlib
import json
import random
import re
import sqlite3
import sys

# What only tells about the schema. Others change how the database or this process works.
PRAGMAS = (
    "table_info table_xinfo table_list index_list index_info index_xinfo foreign_key_list foreign_key_check "
    "collation_list"
)
# With a value these would set something.
BARE_PRAGMAS = "user_version schema_version page_count page_size encoding foreign_keys database_list"
FUNCTIONS = frozenset(("load_extension", "fts3_tokenizer"))
REFUSED = {
    sqlite3.SQLITE_ATTACH: "ATTACH or VACUUM",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_CREATE_VTABLE: "CREATE VIRTUAL TABLE",
}
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # of a string, a blob or a row
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 20,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
# Statements that do nothing. No two alternatives begin alike and none can end early, so matching is linear.
NOTHING = re.compile(r"(?:[;\s]|--[^\n]*(?:\n|\Z)|/\*(?:(?!\*/).)*(?:\*/|\Z))*", re.DOTALL)
STRIDE = 1000  # instructions of SQLite's machine between two looks at their number

# Functions of the clock, and which of their arguments may be the word 'now'.
CLOCK = {
    "date": (0, 1),
    "time": (0, 1),
    "datetime": (0, 1),
    "julianday": (0, 1),
    "unixepoch": (0, 1),
    "strftime": (1, 2),
    "timediff": (0, 2),
}


class Refusal(Exception):
    """The call has no effect; the arguments are its status, detail and text."""


def main():
    """Answers the request on standard input."""
    request = json.loads(sys.stdin.buffer.readline())
    database = sys.stdin.buffer.read()
    try:
        reply = answer(request, database)
    except Refusal as refusal:
        status, detail, text = refusal.args
        reply = {"status": status, "detail": detail, "text": text, "truncated": False}
    sys.stdout.write(json.dumps(reply))


def answer(request, database):
    """Runs the statements of a request on a copy of the database.

    Raises:
      Refusal: If they fail, so that nothing is to change.
      sqlite3.Error: If the database is unusable, which is not the statements' fault.
    """
    sql = request["sql"]
    if "\0" in sql or any("\ud800" <= character <= "\udfff" for character in sql):
        raise Refusal("error", "unicode", "the SQL has a null character or is not valid Unicode")
    connection = sqlite3.connect(":memory:", isolation_level=None)
    guard = Guard(connection, request)
    table = Table(request)
    place = ""
    if database:
        connection.deserialize(database)
    before = prepare(connection, request, database)
    try:
        if not request["setup"]:
            connection.set_authorizer(guard.authorize)
            connection.set_progress_handler(guard.count, STRIDE)
        statements = split(sql)
        for number, statement in enumerate(statements, 1):
            place = f"statement {number}: " if len(statements) > 1 else ""
            changes = connection.total_changes
            cursor = connection.execute(statement)
            # The count of rows is missing where a DML statement begins with WITH.
            table.add(cursor, cursor.rowcount if cursor.rowcount >= 0 else connection.total_changes - changes or -1)
        place = ""
        if connection.in_transaction:
            raise Refusal("error", "transaction", "the transaction is still open: it has to end in the same call")
        after = before if request["read_only"] else image(connection)
    except MemoryError:
        raise Refusal("memory", "memory", "the statements need too much memory") from None
    except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError) as error:
        if guard.stopped:
            raise Refusal("timeout", "steps", f"{place}it takes too long") from None
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise
        refused = guard.refused if name == "SQLITE_AUTH" else ""
        raise Refusal("error", name, place + (f"not allowed: {refused}" if refused else str(error))) from None
    reply = table.reply()
    if after != before:
        reply["database"] = base64.b64encode(after).decode()
    return reply


def prepare(connection, request, database):
    """Sets what no statement can set; returns the database as SQLite writes it before the first one."""
    seed = hashlib.sha256(database + b"\0" + request["sql"].encode()).digest()
    source = random.Random(seed)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    connection.create_function("random", 0, lambda: source.getrandbits(64) - 2**63)
    connection.create_function("randomblob", 1, lambda size: random_bytes(source, size))
    fix_clock(connection, request["now"])
    pragmas = ["journal_mode=MEMORY", "temp_store=MEMORY", f"hard_heap_limit={request['heap_bytes']}"]
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    pragmas.append(f"max_page_count={max(1, request['database_bytes'] // size)}")
    before = image(connection)
    pragmas.append(f"foreign_keys={int(request['foreign_keys'])}")
    pragmas.append(f"query_only={int(request['read_only'])}")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}").fetchall()
    for category, limit in LIMITS.items():
        connection.setlimit(category, limit)
    return before


def image(connection):
    """The database as the bytes of a file; b"" if it is empty, which SQLite cannot write."""
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    return connection.serialize() if pages else b""


def random_bytes(source, size):
    size = max(1, int(size or 0))
    if size > LIMITS[sqlite3.SQLITE_LIMIT_LENGTH]:
        raise ValueError
    return source.randbytes(size)


def fix_clock(connection, now):
    """Makes `now` the time of every function that would look at a clock; what they compute is still SQLite's."""
    clock = sqlite3.connect(":memory:")
    clock.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LIMITS[sqlite3.SQLITE_LIMIT_LENGTH])

    def function(name, first, last):
        def call(*values):
            values = list(values) if len(values) > first else [*values, now]
            for index in range(first, min(last, len(values))):
                word = values[index].lower() if isinstance(values[index], str) else ""
                if word in ("subsec", "subsecond"):  # where a time should be, they stand for now
                    values.insert(index, now)
                elif word == "now":
                    values[index] = now
            return clock.execute(f"SELECT {name}({', '.join('?' * len(values))})", values).fetchone()[0]

        return call

    for name, (first, last) in CLOCK.items():
        with contextlib.suppress(sqlite3.OperationalError):  # this SQLite does not have it
            clock.execute(f"SELECT {name}({', '.join('?' * last)})", ["now"] * last)
            connection.create_function(name, -1, function(name, first, last), deterministic=True)
    for word, name in (("current_date", "date"), ("current_time", "time"), ("current_timestamp", "datetime")):
        connection.create_function(word, 0, function(name, 0, 1), deterministic=True)


def split(sql):
    """The statements of a script, as SQLite's own test for their ends divides it."""
    statements, start, position = [], 0, sql.find(";")
    while position >= 0:
        if sqlite3.complete_statement(sql[start : position + 1]):
            statements.append(sql[start : position + 1])
            start = position + 1
        position = sql.find(";", position + 1)
    statements.append(sql[start:])
    statements = [statement for statement in statements if not NOTHING.fullmatch(statement)]
    if not statements:
        raise Refusal("error", "no_statement", "there is no statement")
    return statements


class Guard:
    """Refuses what reaches beyond the attempt's database, and counts the steps.

    Attributes:
      refused: What was refused last.
      stopped: True once the steps were used up.
    """

    def __init__(self, connection, request):
        self.refused = ""
        self.stopped = False
        self._left = request["steps"]

    def authorize(self, action, first, second, database, source):
        if action in REFUSED:
            self.refused = REFUSED[action]
        elif action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS:
            self.refused = f"the function {second.lower()}"
        elif action == sqlite3.SQLITE_PRAGMA and first.lower() not in (
            PRAGMAS.split() if second is not None else PRAGMAS.split() + BARE_PRAGMAS.split()
        ):
            self.refused = f"PRAGMA {first.lower()}{'' if second is None else ' with a value'}"
        else:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    def count(self):
        self._left -= STRIDE
        self.stopped = self.stopped or self._left < 0
        return self.stopped


class Table:
    """What the model sees: the rows of each statement that has any to give, and what the others changed."""

    def __init__(self, request):
        self._rows = request["rows"]
        self._cell = request["cell_chars"]
        self._text = request["text_chars"]
        self._parts = []
        self._said = False  # whether any statement gave a row or changed something
        self._cut = False

    def add(self, cursor, changed):
        """Takes what one statement did; `changed` is -1 for those that do not change rows."""
        if cursor.description is None:
            if changed >= 0:
                self._parts.append(f"{changed} row{'s' * (changed != 1)} changed")
            self._said = self._said or changed != 0
            return
        lines = []
        for row in cursor:
            if self._rows <= 0:
                self._cut = True
                lines.append("(more rows)")
                break
            lines.append(" | ".join(map(self._show, row)))
            self._rows -= 1
        cursor.close()
        self._said = self._said or bool(lines)
        header = " | ".join(self._show(column[0]) for column in cursor.description) if lines else "(no rows)"
        self._parts.append("\n".join([header, *lines]))

    def reply(self):
        text = "\n\n".join(self._parts) or "done"
        if len(text) > self._text:
            text = text[: self._text] + "\n(cut)"
            self._cut = True
        return {"status": "ok" if self._said else "empty", "detail": "", "text": text, "truncated": self._cut}

    def _show(self, value):
        if value is None:
            return "NULL"
        if isinstance(value, bytes):
            text = f"X'{value[: self._cell].hex().upper()}'"
        elif isinstance(value, str):
            text = "".join(map(visible, value[: self._cell + 1]))
        else:
            text = repr(value)
        if len(text) > self._cell:
            self._cut = True
            text = text[: self._cell] + "..."
        return text


def visible(character):
    """A character as it is, or escaped where it would break the line or the table's reader."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()
