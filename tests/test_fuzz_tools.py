"""100,000 fuzzed turns through parser and tool box, with every tool there is: no exception, no hang, a typed answer."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.tasks.ledger_world import Bill, ledger_tools, new_state
from elpo_jax.text.chat import ChatFormat
from elpo_jax.text.parser import ERRORS, MAX_CALL_CHARS, call_text
from elpo_jax.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from elpo_jax.tools.base import Status, ToolResult
from elpo_jax.tools.calculator import Calculator
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.sandbox import Limits, Sandbox
from elpo_jax.tools.search import Corpus, Document, Search
from elpo_jax.tools.sql import Sql, SqlLimits
from elpo_jax.tools.toolbox import Request, ToolBox

TURNS = 100_000
MOST_PROGRAMS = 4_000  # that really run, so that the test ends in good time
LONGEST_TEXT = 5_000
SECONDS = 60  # for one answer, on a machine as busy as can be
STRUCTURE = 5  # control ids around an answer

# fmt: off
PROGRAMS = (
    "1 + 1", "print('a')", "x = 3\nx * 2", "None", "# nothing", "pass", "'é☃' * 3", "print(1, sep='\\n')", "lambda: 0",
    "1 / 0", "x = (", "undefined", "[][1]", "{}['k']", "int('x')", "assert False, 'why'", "raise KeyError", "None.x",
    "def f(n): return f(n + 1)\nf(0)", "for i in range(5):\n    print(i * i)", "while True: pass", "exit(3)", "str",
    "import math\nmath.sqrt(2)", "import numpy as np\nnp.arange(6).reshape(2, 3)", "import sympy\nsympy.Symbol('x')",
    "import sys\nsys.exit('bye')", "from fractions import Fraction\nFraction(1, 3) + 1", "import os\nos.getcwd()",
    "import os\nos.abort()", "import os\nos._exit(3)", "[0] * 10**9", "while True: print('flood')", "print('x' * 5000)",
    "open('f', 'w').write('x')", "open('/etc/passwd').read()", "import socket\nsocket.socket()", "import os\nos.fork()",
    "input()", "import time\ntime.sleep(9)", "try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError from e",
    "class A:\n    def __repr__(self): raise OSError\nA()", "print('\\ud800')", "'\\x00'", "exec('1 +')", "f'{1:9.3f}'",
    "import threading\nthreading.Thread(target=lambda: 1 / 0).start()", "print('</tool_response><|im_end|>')", "(" * 99,
    "import json\njson.loads('{')", "sum(i for i in range(1000))", "raise ExceptionGroup('g', [ValueError()])", " \n ",
    "```python\n1 + 1\n```", "print(\n    'open'", "\tindented = 1", "a = b = c = [1, 2]\na", "'''unclosed", "x: int",
)
QUERIES = (
    "SELECT * FROM t", "INSERT INTO t VALUES (3, 'c')", "SELECT 1; DELETE FROM t", "SELEC", "ATTACH 'f' AS g", "",
    "SELECT x'00ff', 1e999, NULL, 'a\nb'", "PRAGMA writable_schema = 1", "SELECT * FROM t WHERE a = '" + "'" * 9,
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
)
# Each tool: how often it is called, arguments that fit, and whose world it acts on.
CALLS = {
    "calculator": (30, [{"expression": e} for e in ("1 + 2", "2 ** 99", "1 / 0", "((3))", "-1.5e3", "1" * 90)], ""),
    "query": (10, [{"account": "Ann"}, {"account": "Bob"}, {"account": "Zed"}, {"account": ""}], "ledger"),
    "move": (10, [{"from": "Ann", "to": "Bob", "amount": 1}, {"from": "Bob", "to": "Bob", "amount": 9999}], "ledger"),
    "pay": (10, [{"from": "Ann", "to": "Rent", "amount": 5}, {"from": "Bob", "to": "Tax", "amount": 1.0}], "ledger"),
    "close": (10, [{"account": "Ann"}, {"account": "Cid"}], "ledger"),
    "search": (15, [{"query": "red apple"}, {"query": 'pear NOT "*', "top_k": 2}, {"query": "\0 ١", "top_k": 20}], ""),
    "code_interpreter": (14, [{"code": program} for program in PROGRAMS], ""),
    "sql": (1, [{"query": query} for query in QUERIES], "sql"),
}
# What sampled text gets wrong, and what parsers, tools and terminals trip over.
SCRAPS = (
    '"', "'", "\\", "{", "}", "[", "]", ",", ":", "\n", " ", "\t", "\0", "\x7f", "\x85", "\u2028", "\ufeff", "\u200b",
    "null", "true", "NaN", "-Infinity", "1e999", "1e-999", "-0", "00", "9" * 400, "0x10", "1_000", "٣", "½", "Ⅷ", "%s",
    "\\u0000", "\\ud800", "\\udc00", "\\ud83d\\ude00", "\\x", "\\u12", '"name"', '"arguments"', '"code"', '"a": 1, ',
    "<tool_call>", "</tool_call>", "<|im_end|>", "<tool_response>", "<0x0A>", "<unk>", "[" * 40, '{"a":' * 40, "]" * 40,
    "é", "☃", "\U0001f409", "e\u0301", "\u200d", "\U0010ffff", "\x1b[31m", "{0}", "__import__('os')", "'; DROP t;",
)
WRONG = (None, True, 0, -1, 2.5, 1e308, 10**400, [], ["a"], {}, {"a": {}}, "", "\ud800")
# fmt: on


@dataclasses.dataclass
class Bench:
    """The tools, their worlds, and how the calls of a test ended."""

    box: ToolBox
    sandbox: Sandbox
    worlds: dict[str, object]
    seen: collections.Counter

    def check(self, chat: ChatFormat, turns: list[list[int]]) -> None:
        """Parses turns, runs their calls together, and looks at every answer."""
        control = sorted(chat.tokenizer.control.values())
        worlds, calls, answers = dict(self.worlds), [], []
        for ids in turns:
            turn = chat.parse(ids)
            turn.text.encode()
            assert turn.call is None or turn.error is None
            if turn.call is not None:
                world = worlds[CALLS[turn.call.name][2]] if turn.call.name in CALLS else None
                calls.append((turn.call, world, self.box.submit(Request(turn.call, world))))
            elif turn.error is not None:
                assert turn.error.detail in ERRORS
                answers.append(turn.error)
            else:
                self.seen["no call"] += 1
        for call, before, future in calls:
            result, after = future.result(timeout=SECONDS)
            assert type(after) is type(before)
            worlds[CALLS[call.name][2] if call.name in CALLS else ""] = after
            answers.append(result)
        for result in answers:
            assert type(result) is ToolResult and type(result.status) is Status
            assert result.status is not Status.SANDBOX_ERROR, result
            assert isinstance(result.text, str) and isinstance(result.detail, str) and len(result.text) <= LONGEST_TEXT
            result.text.encode()
            assert np.isin(chat.response(result), control).sum() == STRUCTURE
            self.seen[result.status] += 1
            self.seen[result.detail] += 1


@pytest.fixture(scope="module")
def bench():
    limits = Limits(cpu_s=0.15, wall_s=0.2, memory_mb=128, output_kb=16)
    corpus = Corpus([Document("1", "Apple", "A red apple."), Document("2", "Pear", "A green pear, no apple.")])
    with Sandbox(2, limits) as sandbox:
        sql = Sql(sandbox, SqlLimits(steps=100_000))
        tools = [
            Calculator(),
            *ledger_tools(noise=0.05),
            Search(corpus),
            CodeInterpreter(sandbox, remembered=2**20),
            sql,
        ]
        assert {tool.name for tool in tools} == set(CALLS)
        with ToolBox(tools) as box:
            ledger = new_state({"Ann": 50, "Bob": 9}, [Bill("Ann", "Rent", 5)], key=0)
            database = sql.new_state("CREATE TABLE t(a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
            worlds = {"": None, "ledger": ledger, "sql": database}
            yield Bench(box, sandbox, worlds, collections.Counter())
    corpus.close()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "calls.model"
    texts = [call_text(name, arguments) for name, (_, fitting, _) in CALLS.items() for arguments in fitting]
    train_sentencepiece(texts * 4, path, 400)
    return [ChatFormat(ByteTokenizer()), ChatFormat(SentencePieceTokenizer(path))]


class Mutator:
    """Random changes of random calls."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.names = list(CALLS)
        weights = np.array([weight for weight, _, _ in CALLS.values()], float)
        self.weights = weights / weights.sum()
        self.pool = [self.text(program) for program in PROGRAMS for _ in range(20)]

    def below(self, n: int) -> int:
        return int(self.rng.random() * n)

    def one(self, items):
        return items[self.below(len(items))]

    def turn(self, chat: ChatFormat) -> list[int]:
        """Ids of a turn: a call with arguments that fit, or nearly, in text that is JSON, or nearly."""
        name = self.names[int(self.rng.choice(len(self.names), p=self.weights))]
        arguments = dict(self.one(CALLS[name][1]))
        if name == "code_interpreter" and self.below(2):
            arguments["code"] = self.one(self.pool)
        elif self.below(3) == 0:
            arguments = self.arguments(arguments)
        if self.below(1000) == 0:
            arguments = {"expression": "1" * MAX_CALL_CHARS}
        tokenizer = chat.tokenizer
        control = tokenizer.control
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=bool(self.below(2)))
        if self.below(8) == 0:
            deep = self.below(99)
            twice = body.replace(", ", f", {body[1:-1]}, ", 1)
            body = self.one((self.text(body), self.text(body), "[" * deep + body + "]" * deep, twice))
        elif self.below(50) == 0:
            body = json.dumps(self.one((arguments, [name], {"name": name}, {"name": name, "arguments": name}, name)))
        before = tokenizer.encode(self.one(("", "", "I call it.\n", "\\boxed{3}")))
        ids = [*before, control["<tool_call>"], *tokenizer.encode(body), control["</tool_call>"], control["<|im_end|>"]]
        while self.below(3) == 0:
            ids = self.ids(ids, tokenizer)
        return ids

    def arguments(self, arguments: dict) -> dict:
        """The arguments with one that is changed, missing, or not of the schema."""
        key = self.one(list(arguments))
        match self.below(4):
            case 0:
                del arguments[key]
            case 1:
                arguments[self.one(("code", "query", "x", "", key + " ", self.one(SCRAPS)))] = self.one(SCRAPS)
            case 2:
                arguments[key] = self.one(WRONG)
            case 3:
                arguments[key] = self.text(str(arguments[key]))
        return arguments

    def text(self, text: str) -> str:
        start = self.below(len(text) + 1)
        stop = min(len(text), start + self.below(5))
        match self.below(4):
            case 0:
                return text[:start] + text[stop:]
            case 1:
                return text[:start] + self.one(SCRAPS) + text[start:]
            case 2:
                return text[:start] + self.one(SCRAPS) + text[stop:]
        return text[:stop] + text[start:]

    def ids(self, ids: list[int], tokenizer) -> list[int]:
        """The ids with a few left out, put in, repeated or replaced: bytes, pieces, control tokens, anything."""
        start = self.below(len(ids) + 1)
        stop = min(len(ids), start + self.below(6))
        match self.below(7):
            case 0:
                return ids[:start] + ids[stop:]
            case 1:
                return ids[:start] + [self.below(tokenizer.vocab_size) for _ in range(3)] + ids[start:]
            case 2:
                return ids[:start] + [self.one(list(tokenizer.control.values()))] + ids[stop:]
            case 3:
                return ids[:start] + tokenizer.encode(self.one(SCRAPS)) + ids[stop:]
            case 4:
                return ids[:stop] + ids[start:]
            case 5:
                return ids[:start]
        return ids[:start] + [self.one((-1, tokenizer.vocab_size, 2**31 - 1))] + ids[stop:]


def test_a_hundred_thousand_fuzzed_turns_are_answered(bench, chats):
    mutator = Mutator(0)
    for batch in range(TURNS // 500):
        chat = chats[batch % 2]
        bench.check(chat, [mutator.turn(chat) for _ in range(500)])
        assert bench.sandbox.counters()["calls"] < MOST_PROGRAMS
    answered = sum(bench.seen[status] for status in Status)
    assert answered + bench.seen["no call"] == TURNS
    assert min(bench.seen[status] for status in Status if status is not Status.SANDBOX_ERROR) > 20, bench.seen
    assert min(bench.seen[kind] for kind in (*ERRORS, "empty_code", "arguments", "name")) > 20, bench.seen
    assert bench.seen[Status.OK] > TURNS / 5
    counters = bench.sandbox.counters()
    assert counters["sandbox_errors"] == counters["restarts"] == 0


# --- any ids, any call: what a mutator of good calls does not come near

SOME_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SCRAPS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*CALLS, "Calculator", "calculator ", ""]) | st.text(max_size=9)
KEYS = st.sampled_from(["expression", "account", "amount", "query", "top_k", "source", "code"]) | st.text(max_size=5)
BODIES = st.one_of(
    st.builds(
        lambda name, arguments: json.dumps({"name": name, "arguments": arguments}),
        NAMES,
        st.dictionaries(KEYS, SOME_JSON, max_size=3) | SOME_JSON,
    ),
    SOME_JSON.map(json.dumps),
    st.lists(st.sampled_from([*SCRAPS, *CALLS]) | st.characters(), max_size=20).map("".join),
)


@settings(derandomize=True, max_examples=1500, deadline=None)
@given(bodies=st.lists(BODIES, min_size=1, max_size=3), tags=st.integers(0, 5), which=st.integers(0, 1))
def test_any_call_is_answered(bench, chats, bodies, tags, which):
    tokenizer = chats[which].tokenizer
    opens, closes = ([tokenizer.control[tag]] for tag in ("<tool_call>", "</tool_call>"))
    ids = [i for body in bodies for i in (*opens, *tokenizer.encode(body), *closes)]
    bench.check(chats[which], [ids if tags < 4 or len(ids) < tags else ids[tags - 3 :]])


@settings(derandomize=True, max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 700), max_size=40), which=st.integers(0, 1))
def test_any_ids_are_answered(bench, chats, ids, which):
    tokenizer = chats[which].tokenizer
    opens, closes = (tokenizer.control[tag] for tag in ("<tool_call>", "</tool_call>"))
    bench.check(chats[which], [ids, [opens, *ids, closes], [*ids, opens, *ids, closes, *ids]])


def test_the_checks_of_this_file_can_fail(bench, chats):
    class Wrong(Calculator):
        def __init__(self, answer):
            self.answer = answer

        def run(self, arguments, state):
            return self.answer, state

    for answer in (None, ToolResult("ok", "1"), ToolResult(Status.OK, "\ud800"), ToolResult(Status.OK, "x" * 9999)):
        with ToolBox([Wrong(answer)], retries=0) as box, pytest.raises((AssertionError, UnicodeEncodeError)):
            wrong = dataclasses.replace(bench, box=box, seen=collections.Counter())
            wrong.check(chats[0], [chats[0].turn(call_text("calculator", {"expression": "1"})).tolist()])
