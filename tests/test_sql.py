"""The tool `sql`: plain SQLite decides what is right; attacks, limits and failures have no effect but their answer."""

import contextlib
import dataclasses
import json
import os
import signal
import sqlite3
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.tools.base import InfrastructureError, Status, ToolCall
from elpo_jax.tools.sandbox import Sandbox
from elpo_jax.tools.sql import _BOUNDS, Sql, SqlLimits, SqlState, read_database
from elpo_jax.tools.toolbox import UNAVAILABLE, Request, ToolBox

SCRIPT = """
CREATE TABLE people(id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, age INTEGER CHECK(age >= 0), note);
INSERT INTO people VALUES (1, 'Ann', 30, NULL), (2, 'Bob', 25, 1.5), (3, 'Cid', 25, x'00FF'), (4, 'Dan', NULL, 'a;b');
CREATE TABLE pets(owner INTEGER REFERENCES people(id), name TEXT);
INSERT INTO pets VALUES (1, 'Rex'), (1, 'Tom'), (3, 'Kit');
CREATE TRIGGER log AFTER INSERT ON pets BEGIN UPDATE people SET note = 'has ' || new.name WHERE id = new.owner; END;
"""
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def sql(sandbox):
    return Sql(sandbox)


@pytest.fixture(scope="module")
def state(sql):
    return sql.new_state(SCRIPT)


def ask(sql, state, query):
    return sql.run({"query": query}, state)


def open_image(state):
    database = sqlite3.connect(":memory:", isolation_level=None)
    if state.database:
        database.deserialize(state.database)
    return contextlib.closing(database)


def dump(state):
    with open_image(state) as database:
        return list(database.iterdump())


# --- answers


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("SELECT * FROM people",
         "id | name | age | note\n"
         "1 | Ann | 30 | NULL\n2 | Bob | 25 | 1.5\n3 | Cid | 25 | X'00FF'\n4 | Dan | NULL | a;b"),
        ("SELECT count(*) AS n, avg(age) FROM people;", "n | avg(age)\n4 | 26.666666666666668"),
        ("SELECT p.name, count(t.name) c FROM people p LEFT JOIN pets t ON owner = id GROUP BY 1 ORDER BY c DESC, 1",
         "name | c\nAnn | 2\nCid | 1\nBob | 0\nDan | 0"),
        ("SELECT 1e999, 0.1 + 0.2, 1e16, -0.0, 3.0, 1 / 2, 9223372036854775807",
         "1e999 | 0.1 + 0.2 | 1e16 | -0.0 | 3.0 | 1 / 2 | 9223372036854775807\n"
         "inf | 0.30000000000000004 | 1e+16 | -0.0 | 3.0 | 0 | 9223372036854775807"),
        ("SELECT 'a' || char(10) || 'b' AS x, 'é🎈' AS y, char(27) AS z, char(0) AS n, CAST(x'ff41' AS TEXT) AS t",
         "x | y | z | n | t\na\\nb | é🎈 | \\x1b | \\x00 | \ufffdA"),
        ("SELECT 1 AS a; SELECT 2 AS b WHERE 0; SELECT 3 AS c", "a\n1\n\n(no rows)\n\nc\n3"),
        ("SELECT 'x;y' AS a -- ; no\n; /* ; */ SELECT ';' AS \"b;\";;", "a\nx;y\n\nb;\n;"),
        ("UPDATE people SET age = age + 1 WHERE age = 25", "2 rows changed"),
        ("INSERT INTO pets VALUES (2, 'Ida'); SELECT note FROM people WHERE id = 2", "1 row changed\n\nnote\nhas Ida"),
        ("WITH x AS (SELECT 3 AS i) DELETE FROM pets WHERE owner IN (SELECT i FROM x)", "1 row changed"),
        ("INSERT INTO people(name) VALUES ('Eva'), ('Fay') RETURNING id, name", "id | name\n5 | Eva\n6 | Fay"),
        ("CREATE TABLE t(a)", "done"),
        ("CREATE TEMP TABLE t(a); INSERT INTO t VALUES (1); SELECT * FROM t", "1 row changed\n\na\n1"),
        ("BEGIN; DELETE FROM pets; ROLLBACK; SELECT count(*) AS n FROM pets", "3 rows changed\n\nn\n3"),
        ("SAVEPOINT s; DELETE FROM pets; ROLLBACK TO s; RELEASE s; SELECT count(*) AS n FROM pets",
         "3 rows changed\n\nn\n3"),
        ("PRAGMA table_info(pets)",
         "cid | name | type | notnull | dflt_value | pk\n"
         "0 | owner | INTEGER | 0 | NULL | 0\n1 | name | TEXT | 0 | NULL | 0"),
        ("PRAGMA user_version", "user_version\n0"),
        ("SELECT name FROM pragma_table_info('pets')", "name\nowner\nname"),
        ("SELECT name FROM sqlite_master WHERE type = 'trigger'", "name\nlog"),
        ("SELECT json_extract('[1, [2]]', '$[1][0]') AS j, sqrt(16) AS s", "j | s\n2 | 4.0"),
        ("SELECT datetime('now') AS a, date() AS b, CURRENT_TIMESTAMP AS c, current_date AS d, strftime('%H:%M') AS e, "
         "julianday('NOW') AS f, date('now', '+1 month') AS g, date('1999-12-31', '+1 day') AS h, time(NULL) AS i",
         "a | b | c | d | e | f | g | h | i\n2025-01-01 12:00:00 | 2025-01-01 | 2025-01-01 12:00:00 | 2025-01-01 | "
         "12:00 | 2460677.0 | 2025-02-01 | 2000-01-01 | NULL"),
        ("CREATE TABLE t(a, b DEFAULT CURRENT_TIMESTAMP, c DEFAULT (date('now')), d AS (date(b, '+1 day'))); "
         "CREATE INDEX i ON t(date(b)); INSERT INTO t(a) VALUES (1); SELECT * FROM t",
         "1 row changed\n\na | b | c | d\n1 | 2025-01-01 12:00:00 | 2025-01-01 | 2025-01-02"),
    ],
)  # fmt: skip
def test_answers(sql, state, query, text):
    result, _ = ask(sql, state, query)
    assert (result.status, result.text) == (Status.OK, text)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("SELECT * FROM people WHERE 0", "(no rows)"),
        ("SELECT 1 WHERE 0; SELECT 2 WHERE 0 -- no more", "(no rows)\n\n(no rows)"),
        ("DELETE FROM pets WHERE owner = 99", "0 rows changed"),
    ],
)
def test_nothing_to_say_is_empty(sql, state, query, text):
    result, after = ask(sql, state, query)
    assert (result.status, result.text) == (Status.EMPTY, text) and after is state


@pytest.mark.parametrize(
    ("query", "detail", "words"),
    [
        ("SELEC 1", "SQLITE_ERROR", 'near "SELEC": syntax error'),
        ("SELECT nope FROM people", "SQLITE_ERROR", "no such column: nope"),
        ("SELECT * FROM nope", "SQLITE_ERROR", "no such table: nope"),
        ("INSERT INTO people VALUES (9, 'Ann', 1, 1)", "SQLITE_CONSTRAINT_UNIQUE", "UNIQUE constraint failed"),
        ("INSERT INTO people VALUES (9, 'Zoe', -1, 1)", "SQLITE_CONSTRAINT_CHECK", "CHECK constraint failed"),
        ("INSERT INTO pets VALUES (1, 'x'); SELECT 1; SELECT * FROM nope", "SQLITE_ERROR", "statement 3: no such"),
        ("DELETE FROM pets; DROP TABLE people; SELECT 'open", "SQLITE_ERROR", "statement 3: unrecognized token"),
        ("BEGIN; DELETE FROM pets", "transaction", "still open"),
        ("SAVEPOINT s; DELETE FROM pets", "transaction", "still open"),
        ("BEGIN; DELETE FROM pets; COMMIT; DELETE FROM nope", "SQLITE_ERROR", "statement 4"),
        ("DELETE FROM pets; COMMIT", "SQLITE_ERROR", "no transaction is active"),
        ("BEGIN; BEGIN", "SQLITE_ERROR", "within a transaction"),
        ("", "no_statement", "no statement"),
        (" ;; -- nothing\n /* at ; all */ ;", "no_statement", "no statement"),
        ("/* open", "no_statement", "no statement"),
        ("SELECT 1\0; DROP TABLE pets", "unicode", "null character"),
        ("SELECT '\ud800'", "unicode", "Unicode"),
        ("SELECT " + "1," * 5000 + "1", "too_long", "longer than 10000 characters"),
        ("SELECT " + "x" * 9000, "SQLITE_ERROR", "no such column"),
        ("SELECT ?", "SQLITE_ERROR", "too many SQL variables"),
        ("SELECT abs(-9223372036854775808)", "SQLITE_ERROR", "integer overflow"),
        ("UPDATE sqlite_master SET sql = ''", "SQLITE_ERROR", "may not be modified"),
        ("DELETE FROM sqlite_schema", "SQLITE_ERROR", "may not be modified"),
    ],
)  # fmt: skip
def test_errors_are_sqlites_and_undo_the_whole_call(sql, state, query, detail, words):
    result, after = ask(sql, state, query)
    assert (result.status, result.detail) == (Status.ERROR, detail)
    assert words in result.text and result.text.startswith("Error: ") and len(result.text) < 400
    assert after is state


REFUSED = [
    "ATTACH '/etc/passwd' AS p",
    "ATTACH ':memory:' AS p",
    "ATTACH 'file:/etc/passwd?mode=ro' AS p",
    "DETACH main",
    "VACUUM",
    "VACUUM INTO 'copy.db'",
    "VACUUM main INTO '/tmp/copy.db'",
    "CREATE VIRTUAL TABLE v USING fts5(a)",
    "CREATE VIRTUAL TABLE v USING csv(filename='/etc/passwd')",
    "CREATE VIRTUAL TABLE temp.v USING rtree(a, b, c)",
    "SELECT load_extension('x.so')",
    "SELECT LOAD_EXTENSION('x.so', 'entry')",
    "SELECT * FROM people WHERE load_extension('x')",
    "CREATE TRIGGER t AFTER INSERT ON pets BEGIN SELECT load_extension('x'); END; INSERT INTO pets VALUES (1, 'x')",
    "CREATE VIEW v AS SELECT load_extension('x'); SELECT * FROM v",
    "SELECT fts3_tokenizer('simple')",
    "SELECT fts3_tokenizer('simple', x'4141414141414141')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('x', 'y')",
    "SELECT edit('x')",
    "SELECT * FROM sqlite_dbpage",
    "SELECT * FROM fsdir('/')",
    "PRAGMA writable_schema = ON",
    "PRAGMA main.writable_schema(1)",
    "PRAGMA WRITABLE_SCHEMA = RESET",
    "PRAGMA journal_mode = WAL",
    "PRAGMA temp_store = FILE",
    "PRAGMA temp_store_directory = '/tmp'",
    "PRAGMA hard_heap_limit = 0",
    "PRAGMA soft_heap_limit = 1",
    "PRAGMA max_page_count = 1000000",
    "PRAGMA mmap_size = 1000000000",
    "PRAGMA cache_size = 1000000",
    "PRAGMA query_only = OFF",
    "PRAGMA foreign_keys = ON",
    "PRAGMA recursive_triggers = ON",
    "PRAGMA trusted_schema = ON",
    "PRAGMA user_version = 7",
    "PRAGMA schema_version = 7",
    "PRAGMA encoding = 'UTF-16'",
    "PRAGMA page_size = 65536",
    "PRAGMA threads = 8",
    "PRAGMA incremental_vacuum",
    "PRAGMA optimize",
    "PRAGMA wal_checkpoint",
    "PRAGMA integrity_check",
    "SELECT * FROM pragma_hard_heap_limit",
    "SELECT * FROM pragma_writable_schema",
    "EXPLAIN ATTACH 'x' AS y; ATTACH 'x' AS y",
]


@pytest.mark.parametrize("query", REFUSED)
def test_what_reaches_beyond_the_database_is_refused(sql, state, query):
    result, after = ask(sql, state, query)
    assert result.status is Status.ERROR and after is state
    refused = ("not allowed", "not authorized", "no such function", "no such table", "unsafe use")
    assert any(word in result.text for word in refused), result.text


def test_refusals_say_what_was_refused(sql, state):
    assert "not allowed: ATTACH" in ask(sql, state, REFUSED[0])[0].text
    assert "not allowed: PRAGMA writable_schema with a value" in ask(sql, state, "PRAGMA Writable_Schema=1")[0].text


# --- limits

A_MILLION = "replace(hex(zeroblob(499999)), '0', 'a')"
CROSS = ", ".join(f"people p{n}" for n in range(12))
BOMBS = [
    (ENDLESS + "SELECT max(n) FROM c", Status.TIMEOUT, "steps"),
    (ENDLESS + "SELECT n FROM c WHERE n < 0", Status.TIMEOUT, "steps"),
    (ENDLESS + "SELECT n FROM c ORDER BY n", Status.TIMEOUT, "steps"),
    (ENDLESS + "SELECT group_concat(n) FROM c", Status.TIMEOUT, "steps"),
    (ENDLESS + "UPDATE people SET age = (SELECT max(n) FROM c)", Status.TIMEOUT, "steps"),
    (ENDLESS + "INSERT INTO pets SELECT n, n FROM c", Status.TIMEOUT, "steps"),
    (ENDLESS + "INSERT INTO people(name) SELECT n FROM c", Status.ERROR, "SQLITE_FULL"),
    ("CREATE TABLE x AS " + ENDLESS + "SELECT n FROM c", Status.ERROR, "SQLITE_FULL"),
    ("CREATE TEMP TABLE x AS " + ENDLESS + "SELECT n, zeroblob(9999) FROM c", Status.MEMORY, "memory"),
    (f"SELECT 1 FROM {CROSS} WHERE p0.id + p11.id < 0", Status.TIMEOUT, "steps"),
    (f"SELECT hex(zeroblob(5000)) FROM {CROSS} ORDER BY random()", Status.MEMORY, "memory"),
    ("SELECT 1;" * 500 + ENDLESS + "SELECT max(n) FROM c", Status.TIMEOUT, "steps"),
    (ENDLESS.replace("1 U", "'x' U").replace("n + 1", "n || n") + "SELECT n FROM c", Status.ERROR, "SQLITE_TOOBIG"),
    ("SELECT zeroblob(1000000000)", Status.ERROR, "SQLITE_TOOBIG"),
    ("SELECT hex(zeroblob(600000))", Status.ERROR, "SQLITE_TOOBIG"),
    ("SELECT randomblob(1000000000)", Status.ERROR, "SQLITE_ERROR"),
    ("SELECT randomblob('nonsense')", Status.ERROR, "SQLITE_ERROR"),
    ("SELECT replace(hex(zeroblob(400000)), '0', hex(zeroblob(400000)))", Status.ERROR, "SQLITE_TOOBIG"),
    (f"SELECT {A_MILLION} LIKE '{'%a' * 200}b'", Status.ERROR, "SQLITE_ERROR"),
    ("SELECT " + "(" * 1000 + "1" + ")" * 1000, Status.ERROR, "SQLITE_ERROR"),
    ("SELECT " + "~" * 1000 + "1", Status.ERROR, "SQLITE_ERROR"),
    ("SELECT " + "(SELECT " * 300 + "1" + ")" * 300, Status.ERROR, "SQLITE_ERROR"),
    ("SELECT " + "+".join("1" * 1000), Status.ERROR, "SQLITE_ERROR"),
    ("SELECT " + ",".join("1" * 501), Status.ERROR, "SQLITE_ERROR"),
    ("SELECT 1" + " UNION SELECT 1" * 101, Status.ERROR, "SQLITE_ERROR"),
    ("SELECT max(" + ",".join("1" * 101) + ")", Status.ERROR, "SQLITE_ERROR"),
    ("CREATE TABLE w(" + ",".join(f"c{n}" for n in range(501)) + ")", Status.ERROR, "SQLITE_ERROR"),
    ("SELECT * FROM people " + "NATURAL JOIN pets " * 65, Status.ERROR, "SQLITE_ERROR"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "status", "detail"), BOMBS)
def test_bombs_end_soon_and_change_nothing(sql, state, query, status, detail):
    result, after = ask(sql, state, query)
    assert (result.status, result.detail, after) == (status, detail, state)
    assert result.cpu_s < 2 and len(result.text) < 400 and "nothing was changed" in result.text


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 IN (" + ",".join("1" * 4000) + ") AS x",
        f"SELECT {A_MILLION} GLOB '{'*a' * 90}b' = 0 AS x",
        "SELECT length(printf('%.999999c', 'x')) > 0 AS x",
        "SELECT printf('%1000000000d', 1) IS NULL AS x",
        "SELECT count(*) AS x FROM json_each('" + "[" * 900 + "]" * 900 + "') LIMIT 1",
        "CREATE TABLE r(n); CREATE TRIGGER t AFTER INSERT ON r BEGIN INSERT INTO r VALUES (new.n + 1); END; "
        "INSERT INTO r VALUES (1); SELECT 1 AS x",
        ENDLESS + "SELECT 1 AS x FROM c LIMIT 1",
    ],
)
def test_what_only_looks_like_a_bomb_is_answered(sql, state, query):
    result, _ = ask(sql, state, query)
    assert result.status is Status.OK and result.text.endswith("x\n1") and result.cpu_s < 2


def test_what_takes_long_within_one_instruction_meets_the_cpu_limit(sandbox, state):
    sql = Sql(sandbox, SqlLimits(cpu_s=0.3))
    query = f"DELETE FROM pets; SELECT instr({A_MILLION}, replace(hex(zeroblob(249999)), '0', 'a') || 'b')"
    result, after = ask(sql, state, query)
    assert (result.status, result.detail, after) == (Status.TIMEOUT, "cpu", state)
    assert result.text == "Error: it takes too long; nothing was changed"


def test_rows_cells_and_text_are_cut(sandbox, state):
    sql = Sql(sandbox, SqlLimits(rows=3, cell_chars=10, text_chars=60))
    result, after = ask(sql, state, ENDLESS + "SELECT n FROM c")
    assert result.text == "n\n1\n2\n3\n(more rows)" and result.truncated and after is state
    result, _ = ask(sql, state, "SELECT 'abcdefghij' AS a, 'abcdefghijk' AS b, zeroblob(5) AS c")
    assert result.text == "a | b | c\nabcdefghij | abcdefghij... | X'00000000..." and result.truncated
    result, _ = ask(sql, state, "SELECT id FROM people LIMIT 3")
    assert result.text == "id\n1\n2\n3" and not result.truncated
    result, _ = ask(sql, state, "SELECT 'abcdefghij', 'abcdefghij', 'abcdefghij', 'abcdefghij', 'abcdefghij'")
    assert len(result.text) == 60 + len("\n(cut)") and result.text.endswith("\n(cut)") and result.truncated
    result, _ = ask(sql, state, "SELECT id FROM people LIMIT 2; SELECT id FROM people")
    assert result.text == "id\n1\n2\n\nid\n1\n(more rows)"


def test_rows_that_are_not_shown_are_still_written(sandbox, state):
    sql = Sql(sandbox, SqlLimits(rows=2))
    result, after = ask(sql, state, "INSERT INTO pets SELECT id, 'new' FROM people RETURNING name")
    assert result.text == "name\nnew\nnew\n(more rows)"
    with open_image(after) as database:
        assert database.execute("SELECT count(*) FROM pets WHERE name = 'new'").fetchone() == (4,)


def test_a_database_cannot_grow_beyond_its_size(sandbox):
    sql = Sql(sandbox, SqlLimits(database_kb=64))
    state = sql.new_state("CREATE TABLE t(a)")
    for _ in range(20):
        result, after = ask(sql, state, "INSERT INTO t VALUES (zeroblob(5000))")
        if result.status is not Status.OK:
            break
        state = after
    assert (result.status, result.detail) == (Status.ERROR, "SQLITE_FULL") and after is state
    assert 32 << 10 < len(state.database) <= 64 << 10
    assert ask(sql, state, "DELETE FROM t; INSERT INTO t VALUES (1)")[0].status is Status.OK
    with pytest.raises(InfrastructureError, match="larger than 64 KiB"):
        ask(sql, SqlState(bytes(65 << 10)), "SELECT 1")


def test_limits_make_sense():
    least = {name: low for name, (low, _) in _BOUNDS.items()}
    most = {name: high for name, (_, high) in _BOUNDS.items()}
    assert least.keys() == {field.name for field in dataclasses.fields(SqlLimits)}
    assert SqlLimits(**least) != SqlLimits(**most)
    for name in least:
        integer = [1.0, 1.5] if name != "cpu_s" else []
        for value in (0, -1, True, "a", "5", None, float("nan"), float("inf"), 1e12, most[name] + 1, *integer):
            with pytest.raises(ValueError, match=rf"SqlLimits\({name}="):
                SqlLimits(**{name: value})


def test_the_largest_limits_are_within_those_of_the_sandbox(sandbox):
    sql = Sql(sandbox, SqlLimits(**{name: high for name, (_, high) in _BOUNDS.items()}))
    asked = []

    class Recording:
        """The same sandbox, with what was asked of it, and memory that this machine has."""

        def run(self, code, stdin, limits):
            asked.append(limits)
            return sandbox.run(code, stdin, limits=dataclasses.replace(limits, memory_mb=1024))

    sql._sandbox = Recording()
    result, _ = ask(sql, sql.new_state("CREATE TABLE t(a)"), "INSERT INTO t VALUES (1)")
    assert result.text == "1 row changed" and [limits.cpu_s for limits in asked] == [3600, 360]


def test_a_large_database_goes_there_and_back(sandbox):
    sql = Sql(sandbox, SqlLimits(database_kb=32768))
    query = ENDLESS + "INSERT INTO t SELECT randomblob(10000) FROM c LIMIT 2500"
    result, state = ask(sql, sql.new_state("CREATE TABLE t(a)"), query)
    assert (result.status, result.text) == (Status.OK, "2500 rows changed") and len(state.database) > 25_000_000
    assert ask(sql, state, "SELECT sum(length(a)) AS s FROM t")[0].text == "s\n25000000"


# --- worlds


def test_states_are_values_and_branches_share_nothing(sql, state):
    before = dump(state)
    _, left = ask(sql, state.fork(1), "DELETE FROM pets WHERE name = 'Rex'")
    _, right = ask(sql, state.fork(2), "UPDATE pets SET name = 'Max' WHERE name = 'Rex'")
    assert dump(state) == before
    query = "SELECT name FROM pets ORDER BY name"
    texts = [ask(sql, world, query)[0].text for world in (state, left, right)]
    assert texts == ["name\nKit\nRex\nTom", "name\nKit\nTom", "name\nKit\nMax\nTom"]
    assert state.fork(3) is state
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.database = b""


def test_a_call_without_change_returns_the_same_world(sql, state):
    for query in ("SELECT * FROM people", "SELECT random()", "UPDATE people SET age = 1 WHERE 0", "PRAGMA table_list"):
        assert ask(sql, state, query)[1] is state
    assert ask(sql, SqlState(), "SELECT 1")[1] == SqlState()
    assert ask(sql, SqlState(), "CREATE TABLE t(a)")[1].database.startswith(b"SQLite format 3\0")


def test_the_same_call_on_the_same_world_gives_the_same_answer_and_world(sandbox, sql, state):
    query = (
        "INSERT INTO pets SELECT abs(random()) % 1000, hex(randomblob(4)) FROM people; "
        "SELECT * FROM pets ORDER BY random(); SELECT datetime('now'), julianday('now'), current_time"
    )
    first = ask(sql, state, query)
    time.sleep(1.1)
    assert ask(Sql(sandbox), state, query) == first and first[0].status is Status.OK
    assert ask(sql, state, query + " ")[0].text != first[0].text  # but random is not constant
    numbers = ask(sql, state, "SELECT random(), random()")[0].text.splitlines()[1].split(" | ")
    assert len(set(numbers)) == 2 and all(-(2**63) <= int(number) < 2**63 for number in numbers)


def test_the_clock_is_the_one_that_was_set(sandbox, state):
    sql = Sql(sandbox, now="1999-12-31 23:59:30")
    query = "SELECT date('now', '+1 minute') AS a, strftime('%s') AS b, current_timestamp AS c, unixepoch() AS d"
    assert ask(sql, state, query)[0].text == "a | b | c | d\n2000-01-01 | 946684770 | 1999-12-31 23:59:30 | 946684770"


def test_read_only_and_foreign_keys(sandbox, state):
    reader = Sql(sandbox, read_only=True)
    for query in (
        "DELETE FROM pets",
        "CREATE TABLE t(a)",
        "BEGIN; UPDATE pets SET name = 1; COMMIT",
        "DROP TABLE pets",
    ):
        result, after = ask(reader, state, query)
        assert (result.status, result.detail) == (Status.ERROR, "SQLITE_READONLY") and after is state
    assert ask(reader, state, "SELECT count(*) AS n FROM pets")[0].text == "n\n3"
    assert ask(reader, reader.new_state(SCRIPT), "SELECT count(*) AS n FROM pets")[0].text == "n\n3"
    orphan = "INSERT INTO pets VALUES (99, 'x')"
    assert ask(Sql(sandbox), state, orphan)[0].status is Status.OK
    assert ask(Sql(sandbox, foreign_keys=True), state, orphan)[0].detail == "SQLITE_CONSTRAINT_FOREIGNKEY"


def test_scripts_may_be_long_and_what_they_get_wrong_is_told(sql):
    rows = ",".join(f"({n}, 'name {n}')" for n in range(20_000))
    script = f"PRAGMA user_version = 3; BEGIN TRANSACTION; CREATE TABLE t(a, b); INSERT INTO t VALUES {rows}; COMMIT;"
    state = sql.new_state(script)
    assert ask(sql, state, "SELECT count(*) AS n, max(b) AS m FROM t")[0].text == "n | m\n20000 | name 9999"
    assert ask(sql, state, "PRAGMA user_version")[0].text == "user_version\n3"
    assert sql.new_state("\n".join(dump(state))) is not None
    for script, words in (
        ("CREATE TABLE t(a); INSERT INTO t VALUES (1, 2)", "statement 2: table t has 1 columns"),
        ("ATTACH '/etc/passwd' AS p", "too many attached databases"),
        ("BEGIN; CREATE TABLE t(a)", "still open"),
        ("", "no statement"),
    ):
        with pytest.raises(ValueError, match=words):
            sql.new_state(script)


def test_database_files_are_read_as_bytes(sql, tmp_path):
    path = tmp_path / "world.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("PRAGMA journal_mode = WAL;" + SCRIPT)
        with pytest.raises(ValueError, match=r"world\.db-wal is not empty"):
            read_database(path)
    state = read_database(path)
    assert ask(sql, state, "SELECT count(*) AS n FROM pets")[0].text == "n\n3"
    _, after = ask(sql, state, "DELETE FROM pets")
    assert ask(sql, after, "SELECT count(*) AS n FROM pets")[0].text == "n\n0"
    assert read_database(path) == state  # the file is as it was
    (tmp_path / "text.db").write_text("not a database" * 99)
    (tmp_path / "short.db").write_bytes(path.read_bytes()[:100])
    for name in ("text.db", "short.db"):
        with pytest.raises(ValueError, match="not a SQLite database"):
            read_database(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_database(tmp_path / "none.db")


def test_a_broken_database_or_state_is_our_fault(sql, state):
    image = bytearray(state.database)
    image[100:4096] = os.urandom(3996)
    for broken in (SqlState(bytes(image)), SqlState(b"SQLite format 3\0" + bytes(600)), None, 7):
        with pytest.raises(InfrastructureError):
            ask(sql, broken, "SELECT * FROM people")


def test_files_of_the_sandbox_cannot_be_read_and_nothing_is_left_there(sandbox, sql, state):
    for query in ("VACUUM INTO 'left.db'", "ATTACH 'left.db' AS l; CREATE TABLE l.t(a)"):
        assert ask(sql, state, query)[0].status is Status.ERROR
    assert sandbox.run("import os\nprint(os.listdir('.'))").stdout == "[]\n"


# --- plain SQLite as the reference

VALUES = st.sampled_from(
    ["NULL", "0", "1", "-7", "2.5", "'a'", "'B'", "''", "x'01'", "1e300", "(SELECT max(a) FROM t)"]
)
COLUMNS = st.sampled_from(["a", "b", "c"])
CONDITIONS = st.builds("{} {} {}".format, COLUMNS, st.sampled_from(["=", "<", "IS NOT", "LIKE", "!="]), VALUES)
STATEMENTS = st.one_of(
    st.builds("INSERT INTO t(a, b) VALUES ({}, {})".format, VALUES, VALUES),
    st.builds("INSERT INTO t SELECT {}, b, c FROM t WHERE {}".format, VALUES, CONDITIONS),
    st.builds("UPDATE t SET {} = {} WHERE {}".format, COLUMNS, VALUES, CONDITIONS),
    st.builds("DELETE FROM t WHERE {}".format, CONDITIONS),
    st.builds("SELECT {}, count(*) FROM t GROUP BY 1 ORDER BY 1".format, COLUMNS),
    st.sampled_from(["BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT s", "RELEASE s", "ROLLBACK TO s", "SELECT * FROM t"]),
    st.sampled_from(["CREATE TABLE u(x UNIQUE)", "INSERT INTO u SELECT a FROM t", "DROP TABLE u", "SELECT 1 + ';'"]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(STATEMENTS, min_size=1, max_size=6), min_size=1, max_size=3))
def test_worlds_are_those_of_plain_sqlite(sql, calls):
    start = "CREATE TABLE t(a, b UNIQUE, c DEFAULT 5); INSERT INTO t(a, b) VALUES (1, 1), (2, 'a'), (NULL, 2.5);"
    state = sql.new_state(start)
    for statements in calls:
        with open_image(state) as plain:
            rows, failed = [], False
            try:
                for statement in statements:
                    rows += [row for row in plain.execute(statement) if row]
                failed = plain.in_transaction
            except sqlite3.Error:
                failed = True
            result, after = ask(sql, state, ";\n".join(statements))
            assert (result.status is Status.ERROR) is failed
            if failed:
                assert after is state
                continue
            assert result.status in (Status.OK, Status.EMPTY)
            assert dump(after) == list(plain.iterdump())
            shown = sum(
                len(part.splitlines()) - 1 for part in result.text.split("\n\n") if " | " in part or "\n" in part
            )
            assert shown == len(rows)
        state = after


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="sSeElLcCtT ;'\"*/-()\n\0[]`,1", max_size=60))
def test_any_text_is_answered(sql, state, query):
    result, after = ask(sql, state, query)
    assert result.status in (Status.OK, Status.EMPTY, Status.ERROR) and result.text
    json.dumps(result.text).encode()
    assert isinstance(after, SqlState)


# --- the machinery


def test_in_a_tool_box(sandbox, state):
    with ToolBox([Sql(sandbox)], workers=2) as box:
        names = [f"SELECT {n} AS n, count(*) AS c FROM pets" for n in range(20)]
        answers = box.run_many([Request(ToolCall("sql", {"query": name}), state) for name in names])
        assert [result.text for result, _ in answers] == [f"n | c\n{n} | 3" for n in range(20)]
        refused, _ = box.submit(Request(ToolCall("sql", {"query": 1}), state)).result()
        assert refused.status is Status.MALFORMED


def test_a_lost_worker_is_our_fault(state):
    with Sandbox(workers=1, retries=0) as sandbox:
        sql = Sql(sandbox, SqlLimits(steps=10**12, cpu_s=20.0))
        assert ask(sql, state, "SELECT 1")[0].status is Status.OK
        (worker,) = sandbox._live
        timer = threading.Timer(1.0, os.kill, (worker.pid, signal.SIGKILL))
        timer.start()
        result, after = ask(sql, state, "DELETE FROM pets; " + ENDLESS + "SELECT max(n) FROM c")
        timer.join()
        assert result.status is Status.SANDBOX_ERROR and result.text == UNAVAILABLE and after is state
        assert ask(sql, state, "SELECT 1")[0].status is Status.OK
    with pytest.raises(InfrastructureError):
        ask(sql, state, "SELECT 1")


def test_what_the_sandbox_gave_up_is_not_tried_again_by_the_tool_box(state):
    with Sandbox(workers=1, retries=2) as sandbox, ToolBox([Sql(sandbox)], retries=2) as box:
        attempts = []

        def broken(program, stdin, limits):
            attempts.append(program)
            raise InfrastructureError("worker died")

        sandbox._attempt = broken
        result, after = box.submit(Request(ToolCall("sql", {"query": "DELETE FROM pets"}), state)).result()
        assert (result.status, result.text, result.detail) == (Status.SANDBOX_ERROR, UNAVAILABLE, "worker died")
        assert after is state and len(attempts) == 3 and sandbox.counters()["sandbox_errors"] == 1
        with pytest.raises(InfrastructureError, match="worker died"):
            Sql(sandbox).new_state(SCRIPT)


def test_without_sqlite_in_the_sandbox_it_says_so(sandbox, state):
    class Without:
        """The same sandbox, whose programs cannot import sqlite3."""

        def run(self, code, stdin, limits):
            return sandbox.run(f"import sys\nsys.modules['sqlite3'] = None\n{code}", stdin, limits=limits)

    with pytest.raises(InfrastructureError, match="sqlite3"):
        ask(Sql(Without()), state, "SELECT 1")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "7",
        "[]",
        "{}",
        '{"status": "sandbox_error", "detail": "", "text": "", "truncated": false}',
        '{"status": "ok", "detail": "", "text": 7, "truncated": false}',
        '{"status": "ok", "detail": "", "text": "x", "truncated": false, "database": "x"}',
        '{"status": "ok", "detail": "", "text": "x", "truncated": false, "database": "AAAA"}',
        "[" * 100_000,
    ],
)
def test_an_answer_that_the_runner_would_not_give_is_not_believed(sandbox, state, answer):
    class Taken:
        """The same sandbox, where statements have taken over the process."""

        def run(self, code, stdin, limits):
            return sandbox.run(f"print({answer!r}, end='')", stdin, limits=limits)

    with pytest.raises(InfrastructureError, match="nonsense"):
        ask(Sql(Taken()), state, "SELECT 1")
