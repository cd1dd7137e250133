"""What a model is shown of output: tracebacks as Python prints them, cuts of any text by any tokenizer, linear time."""

import itertools
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_jax.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from elpo_jax.tools.base import Status, ToolResult
from elpo_jax.tools.observation import (
    EXCEPTIONS_MARKER,
    FRAMES_MARKER,
    LEAST_LIMIT,
    LINE_CHARS,
    MARKER,
    cut,
    masked,
    observation,
    repeatable,
)
from elpo_jax.tools.reference import MOST_CHARS, NO_OUTPUT, answer, wrapped


def printed(program: str) -> str:
    """What Python prints to stderr of a program that is called `<code>`."""
    code = f"import linecache, traceback\nlines = {program!r}.splitlines(True)\n"
    code += "linecache.cache['<code>'] = (1, None, lines, '<code>')\ntry:\n    "
    code += "exec(compile(''.join(lines), '<code>', 'exec'))\nexcept BaseException:\n    traceback.print_exc()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def shown(stderr, traceback="frames", limit=2000, stdout=""):
    return observation(stdout, stderr, limit=limit, traceback=traceback)[0]


# --- tracebacks


def test_a_traceback_keeps_the_programs_own_frames():
    stderr = printed("import json\ndef f(text):\n    return json.loads(text)\nf('{')")
    assert "decoder.py" in stderr and "<string>" in stderr
    expected = """Traceback (most recent call last):
  File "<code>", line 4, in <module>
    f('{')
  File "<code>", line 3, in f
    return json.loads(text)
json.decoder.JSONDecodeError: """
    assert shown(stderr).startswith(expected) and shown(stderr).count("\n") == 5
    assert shown(stderr, "last_line") == stderr.rstrip().split("\n")[-1]


def test_of_many_frames_the_first_two_and_the_last_four_are_kept():
    stderr = printed("def a(n): return b(n)\ndef b(n): return a(n - 1) if n else 1 / 0\na(30)")
    lines = shown(stderr).split("\n")
    assert lines.count(FRAMES_MARKER) == 1 and len(lines) == 1 + 2 * 6 + 1 + 1
    assert lines[1] == '  File "<code>", line 3, in <module>' and lines[5] == FRAMES_MARKER
    assert lines[-2:] == ["    def b(n): return a(n - 1) if n else 1 / 0", "ZeroDivisionError: division by zero"]
    assert shown(stderr, "last_line") == "ZeroDivisionError: division by zero"


def test_a_repeated_frame_is_told_once():
    lines = shown(printed("def f(): return f()\nf()")).split("\n")
    assert lines[-2].startswith("  [Previous line repeated ") and lines[-1].startswith("RecursionError: maximum rec")
    assert len(lines) == 1 + 2 * 4 + 2


def test_a_chain_of_exceptions_is_bounded():
    program = "try:\n    try:\n        1 / 0\n    except Exception as e:\n        raise KeyError('a') from e\n"
    stderr = printed(program + "except Exception:\n    int('b\\nc')")
    frame = 'Traceback (most recent call last):\n  File "<code>", line {}, in <module>\n    {}\n'
    assert shown(stderr) == (
        f"{EXCEPTIONS_MARKER}\n"
        + frame.format(5, "raise KeyError('a') from e")
        + "KeyError: 'a'\n\n"
        + "During handling of the above exception, another exception occurred:\n\n"
        + frame.format(7, "int('b\\nc')")
        + "ValueError: invalid literal for int() with base 10: 'b\\nc'"
    )
    assert shown(stderr, "last_line") == "ValueError: invalid literal for int() with base 10: 'b\\nc'"


@pytest.mark.parametrize(
    ("program", "frames", "last_line"),
    [
        (
            "x = (",
            "  File \"<code>\", line 1\n    x = (\n        ^\nSyntaxError: '(' was never closed",
            "SyntaxError: '(' was never closed (<code>, line 1)",
        ),
        (
            "if 1:\nx",
            '  File "<code>", line 2\n    x\n    ^\n'
            "IndentationError: expected an indented block after 'if' statement on line 1",
            "IndentationError: expected an indented block after 'if' statement on line 1 (<code>, line 2)",
        ),
        (
            "exec('y = )')",
            "Traceback (most recent call last):\n  File \"<code>\", line 1, in <module>\n    exec('y = )')\n"
            "  File \"<string>\", line 1\n    y = )\n        ^\nSyntaxError: unmatched ')'",
            "SyntaxError: unmatched ')' (<string>, line 1)",
        ),
    ],
)
def test_a_syntax_error_says_where(program, frames, last_line):
    stderr = printed(program)
    if not program.startswith("exec"):  # without the frames of `printed` itself, as the sandbox prints it
        stderr = stderr[stderr.index('  File "<code>"') :]
    assert shown(stderr) == frames
    assert shown(stderr, "last_line") == last_line


def test_a_group_of_exceptions_is_shown_without_library_frames():
    stderr = printed("def f():\n    raise ExceptionGroup('both', [ValueError('a'), KeyError('b')])\nf()")
    text = shown(stderr)
    assert "<string>" in stderr and "<string>" not in text and "^" not in text
    assert '  |   File "<code>", line 2, in f\n' in text and "    | KeyError: 'b'" in text
    assert shown(stderr, "last_line") == "ExceptionGroup: both (2 sub-exceptions)"


def test_what_is_printed_beside_exceptions_is_kept():
    stderr = "careful\n  File not found\n" + printed(
        "import sys, traceback\ntry:\n    1 / 0\nexcept Exception:\n    traceback.print_exc()\n"
        "print('again', file=sys.stderr)\nNone.x"
    )
    error = "AttributeError: 'NoneType' object has no attribute 'x'"
    first = "careful\n  File not found\n"
    assert shown(stderr, "last_line", stdout="out\n\n") == (
        f"out\n{first}ZeroDivisionError: division by zero\nagain\n{error}"
    )
    lines = shown(stderr, stdout="out\n\n").split("\n")
    assert lines[:4] == ["out", "careful", "  File not found", "Traceback (most recent call last):"]
    assert lines[6:9] == ["ZeroDivisionError: division by zero", "again", "Traceback (most recent call last):"]
    assert lines[-1] == error


@pytest.mark.parametrize("traceback", ["frames", "last_line"])
def test_long_lines_of_a_traceback_are_cut_and_its_end_outlasts_the_output(traceback):
    stderr = "noise\n" * 5000 + printed("def f():\n    raise ValueError('w' * 1000)\nf()")
    text, truncated = observation("o" * 5000, stderr, limit=600, traceback=traceback)
    assert truncated and len(text) <= 600 and text.startswith("ooo")
    last = text.split("\n")[-1]
    assert last[:20] == "ValueError: wwwwwwww" and len(last) == LINE_CHARS
    text, truncated = observation("", stderr[30000:], limit=2000, traceback=traceback)
    assert text.endswith("ValueError: " + "w" * (LINE_CHARS - 12)) and not truncated


@pytest.mark.parametrize("traceback", ["frames", "last_line"])
@given(st.text(alphabet=st.sampled_from(" |+F~^\n\tae:<>") | st.characters(), max_size=60), st.data())
def test_any_output_has_an_observation(traceback, noise, data):
    lines = [*TRACEBACK_LINES, *noise.split("\n")]
    stderr = "\n".join(data.draw(st.lists(st.sampled_from(lines), max_size=30)))
    limit = data.draw(st.integers(LEAST_LIMIT, 400))
    text, truncated = observation(noise, stderr, "Error: the end", limit=limit, traceback=traceback)
    assert len(text) <= limit and text.endswith("e end")
    assert truncated == (MARKER.strip() in text)
    assert observation(noise, stderr, "Error: the end", limit=limit, traceback=traceback) == (text, truncated)


TRACEBACK_LINES = (
    "Traceback (most recent call last):",
    "  + Exception Group Traceback (most recent call last):",
    '  File "<code>", line 3, in f',
    '  File "<code>", line 3',
    '  File "/lib/x.py", line 3, in g',
    '  |   File "<code>", line 3, in f',
    "    source",
    "    ~^~",
    "  [Previous line repeated 9 more times]",
    "ValueError: x",
    "",
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
    "  | ExceptionGroup: e (1 sub-exception)",
)


# --- cuts


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    rng = random.Random(0)
    train_sentencepiece((f"total = {rng.randrange(999)}\n  print('été ☃', {i})\n" for i in range(500)), path, 335)
    return {"characters": None, "byte": ByteTokenizer(), "sentencepiece": SentencePieceTokenizer(path)}


TEXTS = st.text(alphabet=st.sampled_from("a \n1é☃\U0001f409\ufffd▁") | st.characters(exclude_categories=["Cs"])).map(
    lambda text: (text + "été ☃ total = \U0001f409\U0001f409") * 20
)


@pytest.mark.parametrize("kind", ["characters", "byte", "sentencepiece"])
@given(text=TEXTS, limit=st.integers(LEAST_LIMIT, 300))
def test_a_cut_text_has_both_ends_and_no_broken_character(tokenizers, kind, text, limit):
    tokenizer = tokenizers[kind]
    size = len if tokenizer is None else lambda text: len(tokenizer.encode(text))
    short = cut(text, limit, tokenizer)
    if size(text) <= limit:
        assert short == text
        return
    head, _, tail = short.partition(MARKER)
    assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) < len(text)
    assert MARKER in short
    # Nothing is given away but the parts of a character at either side, of four bytes at most.
    assert limit - 8 <= size(head) + size(MARKER) + size(tail) <= limit + 2
    whole, truncated = observation(text, "", limit=limit, tokenizer=tokenizer)
    head, _, tail = whole.partition(MARKER)
    assert truncated and size(whole) <= limit and text.startswith(head) and text.endswith(tail)


def test_the_limit_holds_for_the_whole_where_that_has_more_tokens_than_its_parts():
    class Contextual:
        """A token per character, and three more for one that follows the marker."""

        def encode(self, text):
            return [ord(c) for c in text.replace(MARKER + "o", MARKER + "\0\0\0o")]

        def decode(self, ids):
            return "".join(map(chr, ids)).replace("\0", "")

    tokenizer = Contextual()
    text, truncated = observation("o" * 200, "", limit=100, tokenizer=tokenizer)
    assert truncated and len(tokenizer.encode(text)) == 100


def test_cuts_are_the_same_however_long_the_text(tokenizers):
    """A flood is not encoded whole; its ends are those of a shorter text."""
    for tokenizer in tokenizers.values():
        short, long = ("total = 1\n" * n + "☃" * n + "  print(2)\n" * n for n in (150, 6000))
        assert cut(short, 64, tokenizer) == cut(long, 64, tokenizer)
    assert cut("0123456789" * 9, 30) == "0123" + MARKER + "6789"


def test_even_the_least_limit_shows_the_type_of_an_exception(tokenizers):
    trace = 'Traceback (most recent call last):\n  File "<code>", line 1, in f\nValueError: '
    for tokenizer, length in itertools.product(tokenizers.values(), range(200)):
        text, truncated = observation("out " * 99, trace + "w" * length, limit=LEAST_LIMIT, tokenizer=tokenizer)
        assert truncated and MARKER.strip() in text and "\nValueErr" in text and text.endswith("w" if length else ":")


def test_addresses_are_masked_and_data_is_not():
    assert masked("<f at 0x7f0c12345678> <object object at 0x55d0a1b2c3>") == "<f at 0x0> <object object at 0x0>"
    for kept in ("at 0x7f0011223344 is data", "0xdeadbeef", "<f at 0x12>", "<f at 0x7F0C12345678>"):
        assert masked(kept) == kept
    assert (
        shown("ValueError: <f at 0x7f0c12345678>", stdout="<g at 0x7f0c12345678>")
        == "<g at 0x0>\nValueError: <f at 0x0>"
    )


def test_only_output_that_does_not_depend_on_the_machine_is_kept():
    known = ToolResult(Status.ERROR, exit_code=1, stdout="a", stderr="b")
    assert repeatable(known) == known
    crash = ToolResult(Status.CRASH, signal=11, stdout="a")
    assert repeatable(crash) == crash
    for status in (Status.TIMEOUT, Status.MEMORY, Status.ERROR, Status.SANDBOX_ERROR):
        lost = repeatable(ToolResult(status, stdout="a", stderr="b"))
        assert (lost.stdout, lost.stderr) == ("", "")
    for streams, kept in ((("aaa", "b"), ("aaa", "")), (("a", "bbb"), ("", "bbb"))):
        flood = repeatable(ToolResult(Status.OUTPUT_LIMIT, stdout=streams[0], stderr=streams[1]))
        assert (flood.stdout, flood.stderr) == kept


def least_seconds(stderr) -> float:
    """Least CPU time of several runs."""
    times = []
    for _ in range(7):
        start = time.process_time()
        observation(stderr, stderr, limit=500)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(
    "shape",
    [
        lambda n: '  File "<code>", line 1\n    ' + " " * n + "x",
        lambda n: '  File "<code>", line 1\n' + "    ^\n" * (n // 6),
        lambda n: 'Traceback (most recent call last):\n  File "<code>", line 1, in f\n' * (n // 60),
        lambda n: "  |" * (n // 3) + 'File "<code>", line 1',
        lambda n: '  File "' * (n // 8),
        lambda n: "Traceback (most recent call last):\n" * (n // 35),
        lambda n: "\nDuring handling of the above exception, another exception occurred:\n\n" * (n // 70),
        lambda n: " at 0x" + "0" * n,
        lambda n: " at 0x00000000" * (n // 14),
        lambda n: "\n" * n + "x",
    ],
)
def test_observing_takes_linear_time(shape):
    """64 times the length; with something quadratic in it, it would take 4,096 times as long."""
    small, large = shape(1000), shape(64_000)
    assert len(large) > 50 * len(small)
    assert least_seconds(large) < 64 * 8 * least_seconds(small)


# --- the reference recipe


@pytest.mark.parametrize(
    ("code", "run"),
    [
        ("x = 2\nx + 1", "x = 2\nprint(x + 1)"),
        ("print(1)", "print(1)"),
        ("printer", "printer"),  # begins with "print", so its value is lost
        ("x = 1", "print(x = 1)"),
        ("for i in range(3):\n    t += i", "for i in range(3):\nprint(    t += i)"),
        ("for i in range(3):\n    print(i)", "for i in range(3):\nprint(    print(i))"),
        ("x\n# This is it", "x\nprint(# This is it)"),
        ("assert x == 1", "print(assert x == 1)"),
        ("def f():\n    return 5  # yes", "def f():\nprint(    return 5  # yes)"),
        ("x\n\n", "print(x)\n\n"),
        ("x\n  ", "x\nprint(  )"),
        ("", ""),
        ("\n\n", "\n\n"),
        ("As follows:\n```python\n\n x = 1\nx\n```\nthat is all", "x = 1\nprint(x)"),
        ("```python\nx\n```\n```python\ny\n```", "print(x)"),
        ("```py\nx\n```", "```py\nx\nprint(```)"),
        ("```python```", ""),
        ("```python\nx", "```python\nprint(x)"),
    ],
)
def test_the_reference_recipe_puts_the_last_line_into_print_whatever_it_is(code, run):
    assert wrapped(code) == run


def test_the_reference_recipe_answers_with_256_characters_of_both_streams():
    def ended(status=Status.OK, exit_code=0, **fields):
        return ToolResult(status, exit_code=exit_code, **fields)

    assert answer(ended(stdout="a\n", stderr="b\n")) == ("a\nb\n", False)
    assert answer(ended()) == ("", False)
    assert answer(ended(Status.ERROR, 1, stdout="a", stderr="Traceback")) == ("aTraceback", False)
    assert answer(ended(Status.CRASH, None, signal=11, stdout="a")) == ("a", False)
    assert answer(ended(stdout="x" * MOST_CHARS)) == ("x" * MOST_CHARS, False)
    text = "h" * 128 + "...(truncated)..." + "t" * 128
    assert answer(ended(stdout="h" * 129, stderr="t" * 128)) == (text, True)
    assert answer(ended(Status.OUTPUT_LIMIT, None, stdout="h" * 999 + "t" * 999)) == (text, True)
    for status in (Status.TIMEOUT, Status.MEMORY, Status.SANDBOX_ERROR):
        assert answer(ended(status, None, stdout="a")) == (NO_OUTPUT, False)
