"""The graders: exact comparison, the worker that cannot hang, letters, programs, the strict box, and the command."""

import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elpo_jax.tasks import exact, verify
from elpo_jax.tasks.exact import LONGEST, LONGEST_READABLE, canonical_key, compare, readable
from elpo_jax.tasks.graders import Graders, last_fenced, strict_box, throughput
from elpo_jax.tasks.math_worker import WorkerPool
from elpo_jax.tools.base import InfrastructureError
from elpo_jax.tools.sandbox import Limits, Sandbox

DATA = os.environ.get("ELPO_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="ELPO_DATA names no folder")

# --- exact comparison

SAME = (
    # numbers
    ("72", "72"),
    ("72.", "72"),
    ("72.0", "72"),
    ("+72", "72"),
    ("072", "72"),
    ("-0", "0"),
    ("−3", "-3"),
    ("- 3", "-3"),
    ("1,234", "1234"),
    ("1 234 567", "1234567"),
    ("1{,}234", "1234"),
    (r"1{,}\!234", "1234"),
    (r"1\,234", "1234"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (".5", "0.5"),
    ("1/2", "0.5"),
    (r"\frac12", "0.5"),
    (r"\frac 1 2", "1/2"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac{-1}{2}", r"-\frac{1}{2}"),
    (r"\frac{270}7", r"\frac{270}{7}"),
    (r"\frac9{19}", "9/19"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"\frac{0.5}{2}", "0.25"),
    (r"1\frac{4}{5}", "9/5"),
    (r"137 \frac{1}{2}", "137.5"),
    ("137 1/2", "137.5"),
    (r"-15\frac{3}{5}", "-15.6"),
    ("(5)", "5"),
    ("{5}", "5"),
    ("$5$", "5"),
    (r"\(5\)", "5"),
    (r"\text{57}", "57"),
    # units
    ("72 clips", "72"),
    ("72", "72 clips"),
    (r"72\text{ clips}", "72"),
    (r"\text{57 apples}", "57"),
    ("10\\%", "10"),
    ("10%", r"10\%"),
    ("10 percent", r"10\%"),
    (r"\$32,348", "32348"),
    ("$5", "5"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90^\circ"),
    ("90°", r"90\text{ degrees}"),
    (r"864 \text{ inches}^2", r"864 \mbox{ inches}^2"),
    (r"15\text{ cm}^{2}", r"15\mbox{ cm}^2"),
    (r"15 \text{cm}^2", r"15"),
    (r"15\text{ cm^2}", r"15\mbox{ cm}^2"),
    ("15 cm", r"15\text{ cm}"),
    (r"5.4\text{ cent}", r"5.4 \text{ cents}"),
    (r"864 \text{ square inches}", r"864 \mbox{ inches}^2"),
    (r"864 \text{ sq. in.}", r"864 \mbox{ inches}^2"),
    ("428 cm^2", r"428\text{ square centimeters}"),
    (r"5225 \text{ in}^3", r"5225 \text{ cubic inches}"),
    (r"12 \text{ units}^2", r"12\text{ square units}"),
    (r"3 \text{ ft}", "3 feet"),
    (r"20^\circ C", r"20^{\circ}\text{C}"),
    (r"4:30 \text{ PM}", r"\text{4:30 p.m.}"),
    (r"5\text{ km/h}", "5"),
    (r"5\,\mathrm{m/s}", "5"),
    (r"5\text{ m}", r"5\text{ meters}"),
    (r"5\text{.}", "5"),
    # bases
    ("204_5", "204_{5}"),
    ("204", "204_5"),
    ("1010_{12}", "1010_{12}"),
    (r"52_{\text{eight}}", "52_8"),
    (r"52_\text{eight}", "52_8"),
    ("52_{eight}", "52_8"),
    (r"52 \text{ base } 8", "52_8"),
    (r"52\text{ (base 8)}", "52_8"),
    (r"52_{\text{base }8}", "52_{8}"),
    ("52 in base eight", r"52_{\text{eight}}"),
    (r"1A\ (\text{base } 16)", "1A_{16}"),
    # names before answers
    ("x = 57", "57"),
    ("57", "x=57"),
    ("y=2x+3", "2x+3"),
    (r"\theta = 5", "5"),
    ("f(x)=2x", "2x"),
    (r"[-2,7]", r"x \in [-2,7]"),
    ("(x, y) = (1, 2)", "(1,2)"),
    ("x = 1, -2", "1,-2"),
    (r"x=1 \text{ or } x=-2", "1,-2"),
    ("x=20 or x=340", "20, 340"),
    ("x=20, x=340", "x = 20, 340"),
    ("x = 3", "x=3"),
    # groups
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac\pi2)"),
    ("(1, 2)", "(1,2.0)"),
    ("-2, 1", "1,-2"),
    (r"\{1,-2\}", "1,-2"),
    ("{1, 2}", r"\{2, 1\}"),
    (r"5 \text{ and } 7", "7,5"),
    (r"40 \text{ or } 320", "40, 320"),
    (r"70 \text{ and } 110", "70, 110"),
    (r"6, 8\text{, and }10", "6,8,10"),
    ("1,000 and 2,000", "1000, 2000"),
    ("(1,000, 2,000)", "(1000, 2000)"),
    ("0,100", "0, 100"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\{-2, 1-\sqrt{5}, 1+\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"),
    (r"(3,\infty) \cup (-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    ("(−∞, 2) ∪ (3, ∞)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"(2,15); (-4,27)", "(-4, 27);(2, 15)"),
    (r"\begin{bmatrix}-\frac13\\\frac23\end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    ("9 : 19", "9:19"),
    # text and expressions
    (r"\text{evelyn}", "Evelyn"),
    ("East", r"\text{east}"),
    ("C", r"\text{(C)}"),
    ("(C)", r"\textbf{C}"),
    (r"11\sqrt{2}", r"11\sqrt2"),
    (r"70\sqrt 2", r"70 \sqrt{2}"),
    ("x^{2}+1", "x^2 + 1"),
    (r"\cot x", r"\cot  x"),
    ("6-5i", "6 - 5i"),
    (r"2\mathrm{i}", "2i"),
    ("5 million", "5,000,000"),
    (r"\$1.5\text{ million dollars}", "1500000"),
)

DIFFERENT = (
    ("8", "800"),
    ("2", "200"),
    ("262509", "262500"),
    (".0000673", ".0000672"),
    ("0.333", "1/3"),
    ("0.3333333333333333", "1/3"),
    ("3.14", "3.15"),
    ("-5", "5"),
    ("10%", "0.1"),  # a percent sign is a unit
    ("800%", "8"),
    ("75\\%", r"\frac34"),
    ("0.32", "33%"),
    ("0.32\\%", "32%"),
    (r"864 \text{ inches}^1", r"864 \mbox{ inches}^2"),
    (r"15\text{ cm}", r"15\mbox{ cm}^2"),
    ("5 million", "5"),
    ("5 dozen", "5"),
    (r"5\text{ cents}", r"5\text{ dollars}"),
    (r"5\text{ cm}", r"5\text{ mm}"),
    (r"5\text{ in}^2", r"5\text{ cubic inches}"),
    (r"6:00 \text{ a.m.}", r"6:00 \text{ p.m.}"),
    ("9 am", r"9\text{ p.m.}"),
    (r"20^\circ C", r"20^\circ F"),
    ("204_9", "204_5"),
    ("204_0", "204_9"),
    ("204_5", "204"),
    (r"204_{\text{nine}}", "204_5"),
    (r"204\text{ base }9", "204_5"),
    ("1A base 15", "1A_{16}"),
    ("1A_{16}", "1A_{15}"),
    ("204_{5x}", "204_5"),
    ("x_1", "x_2"),
    (r"\{1,2\}", "(1,2)"),
    ("1,2", "(1,2)"),
    ("(1,2)", r"\{1,2\}"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("(3,4)", "(3,4]"),
    ("(1,2,3)", "(1,2)"),
    (r"(3,\sqrt{5})", r"(4,\sqrt{5})"),
    (r"70 \text{ and } 110", "70110"),
    ("3 or 400", "3400"),
    ("0,123", "123"),
    ("x = 3", "y = 3"),
    ("y = 3x+1", "x = 3x+1"),
    ("x_1 = 2", "x_2 = 2"),
    ("3,5", "5"),
    ("5 or 7", "5"),
    ("5, 7, 9", "5,7"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("9:19", r"\frac{9}{19}"),
    (r"\frac{9}{19}", "9:19"),
    ("19:9", "9:19"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    (r"\text{neve}", r"\text{even}"),  # the same letters multiply to the same product
    ("(B)", r"\text{(C)}"),
    (r"\text{five}", "5"),
)
# Nothing is certain without algebra; the last column is what algebra finds.
UNDECIDED = (
    ("-q+p", "p-q", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}", True),
    (r"(\sqrt{4},\sqrt{9})", "(2,3)", True),
    ("2^3", "8", True),
    ("3+5", "8", True),
    (r"1.5 \times 10^3", "1500", True),
    ("(a+5)(b+5)", "(a+5)(b+2)", False),
    (r"11\sqrt{8}", r"11\sqrt{2}", False),
    ("3r^2", "3R^2", True),
    ("R-r", "0", False),
    ("(R-r)(R+r)", "R^2-r^2", True),
    ("(R-r)(R+r)", "R^2+r^2", False),
    (r"r^2+R^2", r"2R^2", False),
    ("x=3, y=5", "x=5, y=3", False),
    ("5i", "5", False),
    ("5 i", "5", False),
    (r"5\mathrm{i}", "5", False),
    ("5x", "5", False),
    ("1 2", "12", False),
    ("5 theta", "5", False),
    (r"5\text{ tenths}", "5", False),
    (r"5\text{}^2", "5", False),
    ("1/0", "1", False),
    ("neve", "5", False),
    ("", "5", False),
)


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same_however_it_is_written(answer, reference):
    assert compare(answer, reference) == "equal"
    if "_" not in reference:
        assert canonical_key(answer) == canonical_key(reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_another_answer(answer, reference):
    assert compare(answer, reference) == "different"


@pytest.mark.parametrize(("answer", "reference", "same"), UNDECIDED)
def test_what_needs_algebra_is_left_open(answer, reference, same):
    assert compare(answer, reference) == "undecided"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("(1,2)", "1,2"),
        ("x>0", r"(0,\infty)"),
        # units that may be the same, and what is none
        (r"5\text{ apples}", r"5\text{ fruits}"),
        (r"5^\circ", r"5^\circ C"),
        (r"5\mathrm{!}", "5"),
        (r"5\mathrm{k}", "5"),
        (r"5\text{ M}", "5"),
        (r"3\text{+k}", "3"),
        (r"3\text{-k}", "3"),
        (r"7\text{ or more}", "7"),
        (r"7\text{ mod}", "7"),
        # names
        ("(y,x)=(1,2)", "(x,y)=(1,2)"),
        ("(y,x)=(2,1)", "(x,y)=(1,2)"),
        ("f(x)=2x", "y=2x"),
        ("A = 5", "a = 5"),
        ("area = 5", "A = 5"),
        ("y = x", "x = y"),
    ],
)
def test_what_may_or_may_not_be_the_same_is_left_open(answer, reference):
    assert compare(answer, reference) == "undecided"


@pytest.mark.parametrize(
    ("answer", "reference", "outcome"),
    [
        ("70, 110", "70,110", "equal"),
        ("110,70", "70,110", "equal"),
        (r"70 \text{ and } 110", "70,110", "equal"),
        (r"\{70, 110\}", "70,110", "equal"),
        ("70,110", "110, 70", "equal"),
        ("100,200,300", "100, 200, 300", "equal"),
        ("x = 70, 110", "x=70,110", "equal"),
        ("70, 111", "70,110", "different"),
        ("70, 110", r"70{,}110", "different"),
        ("70, 110", r"70,\!110", "different"),
        ("70110", "70,110", "equal"),  # nobody knows
        ("70,110", "(70,110)", "different"),
        ("3,400 or 5", "3, 400, 5", "undecided"),
    ],
)
def test_bare_commas_make_a_number_or_a_list(answer, reference, outcome):
    assert compare(answer, reference) == outcome


def test_a_share_is_its_percentage_where_the_reference_has_the_sign():
    for answer in ("0.32", r"\frac{8}{25}", "32", "32%"):
        assert compare(answer, r"32\%") == "equal"
    for answer in ("0.032", "3200", "0.33"):
        assert compare(answer, r"32\%") == "different"
    assert compare("32%", "0.32") == "different"


@pytest.mark.parametrize(
    ("text", "can"),
    [
        ("5", True),
        (r"\frac{1}{2}", True),
        (r"\left[0, 1\right)", True),
        (r"\left\{x, y \right.", True),
        (r"]-\infty, 0]", True),
        (r"\{1", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"x \leftarrow y", True),
        ("9" * LONGEST_READABLE, True),
        ("9" * (LONGEST_READABLE + 1), False),
        ("", False),
        (" $ $ ", False),
        (r"\frac{1}{", False),
        ("5}", False),
        (r"\left(1, 2)", False),
        (r"\frac{\left(1}{2\right)}", False),
        (r"\begin{pmatrix} 1", False),
    ],
)
def test_what_no_parser_reads(text, can):
    assert readable(text) == can


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_numbers_are_equal_if_their_fractions_are(one, other):
    latex = rf"{'-' if one < 0 else ''}\frac{{{abs(one.numerator)}}}{{{one.denominator}}}"
    assert compare(latex, str(one)) == compare(f"x = {one}", latex) == compare(f"({latex})", f" {one} ") == "equal"
    assert compare(str(other), latex) == ("equal" if one == other else "different")
    assert compare(f"({one}, {other})", f"({other}, {one})") == ("equal" if one == other else "different")
    assert compare(f"{one}, {other}", f"{other}, {one}") == "equal"


LATEX = st.sampled_from(
    r"\frac \sqrt \text \left( \right) \pm \cup \in \begin{pmatrix} \end{pmatrix} \\ \{ \} { } ( ) [ ] & , ; : = ^ _ 1 "
    r"2 0 . / - + % x i or and \circ \pi \! \, $ 007 million".replace(" ", "\n ").split("\n")
)


@given(st.lists(LATEX | st.characters(), max_size=30).map("".join), st.lists(LATEX, max_size=30).map("".join))
@example("\\", "")  # a space of LaTeX, but for what follows
@example("5\\", "5")
def test_any_text_equals_itself_and_raises_nothing(one, other):
    assert compare(one, one) == "equal"
    assert compare(one, other) in ("equal", "different", "undecided")
    assert canonical_key(one) == canonical_key(one + " ")


@pytest.mark.parametrize(
    "text",
    [
        "(" * LONGEST,
        "(" * 400 + "1" + ")" * 400,
        "\\frac{" * 150,
        "\\frac{{}" * 120,
        ",".join(f"\\sqrt{{{i}}}" for i in range(90)),
        "1," * 499,
        " " * 999 + "x",
        "\\pm" * 300,
        "9" * LONGEST,
        "9" * 100_000,
        "9^{9^{9^9}}",
        "1 " * 499,
    ],
)
def test_hostile_texts_cost_little(text):
    began = time.perf_counter()
    outcomes = [compare(text, other) for other in ("5", text, text[:-1] + "7")]
    assert [outcome == "equal" for outcome in outcomes] == [False, True, False]
    assert time.perf_counter() - began < 1.0


# --- exact comparison on published files


def jsonl(path):
    return [json.loads(line) for line in (pathlib.Path(DATA) / path).read_text(encoding="utf-8").splitlines()]


def one_digit_changed(rng, text):
    """The text with one of its digits changed; None if it has none."""
    places = [i for i, c in enumerate(text) if c.isdigit()]
    if not places:
        return None
    i = rng.choice(places)
    return text[:i] + rng.choice([c for c in "0123456789" if c != text[i]]) + text[i + 1 :]


def references(name):
    if name == "gsm8k":
        rows = jsonl("gsm8k/train.jsonl") + jsonl("gsm8k/test.jsonl")
        return [row["answer"].rpartition("####")[2].strip() for row in rows]
    if name == "math500":
        return [row["answer"] for row in jsonl("math500/test.jsonl")]
    if name == "aime":
        return [str(row["answer"]) for row in jsonl("aime24/test.qwen25math.jsonl") + jsonl("aime25/test.arpo.jsonl")]
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(pathlib.Path(DATA) / "math_lvl3to5/train.parquet").to_pylist()
    return [answer for row in rows if (answer := row["reward_model"]["ground_truth"]).strip()]


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "undecided"), [("gsm8k", 8792, 0), ("aime", 60, 0), ("math500", 500, 0.13), ("math", 8521, 0.14)]
)
def test_references_equal_themselves_and_no_other(name, count, undecided):
    answers = references(name)
    assert len(answers) == count
    with Graders(symbolic=False) as graders:
        assert all(graders.grade("math", f"So \\boxed{{{a}}}.", a).success for a in answers)
        for seed in range(3):
            rng = random.Random(seed)
            changed = [(b, a) for a in answers if (b := one_digit_changed(rng, a))]
            graded = [graders.grade("math", f"So \\boxed{{{b}}}.", a) for b, a in changed]
            # A changed digit leaves the number as it is in "0.50" for "0.5" only, which no published answer has.
            assert [pair for pair, grade in zip(changed, graded, strict=True) if grade.success] == []
            assert sum(grade.status == "undecided" for grade in graded) <= undecided * len(graded)


# --- the worker


@pytest.fixture(scope="module")
def rough():
    with WorkerPool("worker_targets:misbehave", workers=2, memory_mb=256) as pool:
        yield pool


def test_a_worker_serves_many_calls_and_keeps_its_pipe_clean():
    with WorkerPool("worker_targets:talk", workers=1) as pool:
        for text in ("a\n" * 1000, "x\ud800\u2028"[:1], '{"status": "ok"}'):
            reply = pool.call(text, deadline_s=10)
            assert (reply.status, reply.value) == ("ok", text)
    with WorkerPool("worker_targets:echo", workers=1) as pool:
        value = ["\ud800", None, 1.5, {"a": [True]}, "y" * 200_000]
        assert pool.call(*value, deadline_s=10).value == value
    with WorkerPool("worker_targets:process_id", workers=1) as pool:
        assert len({pool.call(deadline_s=10).value for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("how", "status", "detail"),
    [
        ("memory", "memory", "256 MiB"),
        ("recursion", "error", "Error"),
        ("raise", "error", "ValueError: no such thing"),
        ("leave", "error", "SystemExit"),
        ("not json", "error", "TypeError"),
        ("die", "crash", "ended"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told_and_the_next_call_works(rough, how, status, detail):
    reply = rough.call(how, deadline_s=30)
    assert reply.status == status and detail in reply.detail and reply.value is None
    assert rough.call("fine", deadline_s=10).value == "fine"


@pytest.mark.parametrize("how", ["sleep", "power"])
def test_a_deadline_holds_and_other_callers_are_not_stalled(rough, how):
    for _ in range(2):
        rough.call("fine", deadline_s=10)  # both workers are up
    others, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            began = time.perf_counter()
            assert rough.call("fine", deadline_s=10).value == "fine"
            others.append(time.perf_counter() - began)

    thread = threading.Thread(target=serve)
    thread.start()
    began = time.perf_counter()
    reply = rough.call(how, deadline_s=0.5)
    spent = time.perf_counter() - began
    stop.set()
    thread.join()
    assert reply.status == "timeout" and "0.5 s" in reply.detail
    assert 0.5 <= spent < 3.0  # it was killed, not waited for
    assert len(others) > 20 and sorted(others)[len(others) // 2] < 0.1


def test_a_worker_that_was_killed_while_idle_is_replaced():
    with WorkerPool("worker_targets:process_id", workers=1) as pool:
        first = pool.call(deadline_s=10).value
        os.kill(first, 9)
        while (
            pathlib.Path(f"/proc/{first}/stat").exists()
            and " Z " not in pathlib.Path(f"/proc/{first}/stat").read_text()
        ):
            time.sleep(0.01)
        assert pool.call(deadline_s=10).value not in (None, first)


@pytest.mark.parametrize("function", ["no_such_module:f", "worker_targets:no_such_function"])
def test_a_worker_that_cannot_start_is_a_fault_of_ours(function):
    with WorkerPool(function, workers=1) as pool:
        for _ in range(2):  # and the pool is not used up by it
            with pytest.raises(InfrastructureError, match="no_such"):
                pool.call(deadline_s=10)


def test_closing_ends_calls_under_way_and_later_ones():
    pool = WorkerPool("worker_targets:misbehave", workers=1)
    assert pool.call("fine", deadline_s=10).value == "fine"
    threading.Timer(0.3, pool.close).start()
    for how in ("sleep", "fine"):
        with pytest.raises(InfrastructureError, match="closed"):
            pool.call(how, deadline_s=30)


def test_limits_of_a_worker_bound_it_without_its_host():
    with WorkerPool("worker_targets:limits", workers=1, memory_mb=300) as pool:
        cpu_s, memory = pool.call(deadline_s=2.5).value
    assert 7 < cpu_s < 30 and memory == 300 << 20


def test_workers_end_with_their_host():
    code = (
        "import os\nfrom elpo_jax.tasks.math_worker import WorkerPool\n"
        "pool = WorkerPool('worker_targets:process_id', workers=1)\n"
        "print(pool.call(deadline_s=30).value, flush=True)\nos._exit(0)"
    )
    path = os.pathsep.join(str(pathlib.Path(__file__).parents[i]) for i in (0, 1))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    stat = pathlib.Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not stat.exists() or " Z " in stat.read_text()


# --- math: the layers together


@pytest.fixture(scope="module")
def algebraic():
    with Graders(workers=2, deadline_s=1.0, memory_mb=512, _function="worker_targets:algebra") as graders:
        graders.grade("math", "\\boxed{x+y}", "y+x")  # sympy is loaded
        yield graders


@pytest.mark.parametrize(
    ("box", "reference", "success", "status", "answer"),
    [
        ("x+y", "y+x", True, "ok", "y+x"),  # votes are for the reference
        ("x-y", "y-x", False, "ok", "x-y"),
        ("x+y", "y +x", True, "ok", "y+x"),
        ("(x+", "y+x", False, "undecided", "(x+"),
        ("9**9**9**9", "x", False, "timeout", "9**9**9**9"),
        ("5", "6", False, "ok", "5"),
        ("6.0", "6", True, "ok", "6"),
        ("6", "\\boxed{6}", True, "ok", "6"),
        ("z" * 5000, "x", False, "undecided", "z" * 5000),
    ],
)
def test_math_goes_from_exact_to_symbolic(algebraic, box, reference, success, status, answer):
    grade = algebraic.grade("math", f"First \\boxed{{1}}. Then \\boxed{{{box}}}.", reference)
    assert (grade.success, grade.reward, grade.status, grade.answer) == (success, float(success), status, answer)
    assert (grade.reason == "correct") == success and grade.score is None


def test_many_rows_come_back_in_order_and_hostile_ones_stall_nobody(algebraic):
    hostile = [("math", f"\\boxed{{9**9**9**{9 + i}}}", "x", None) for i in range(4)]
    easy = [("math", f"\\boxed{{{i}}}", str(i - i % 2), None) for i in range(200)]
    rows = [*easy[:50], *hostile, *easy[50:]]
    began = time.perf_counter()
    graded = algebraic.grade_many(rows)
    spent = time.perf_counter() - began
    assert [g.status for g in graded[50:54]] == ["timeout"] * 4
    assert [g.success for g in graded[:50] + graded[54:]] == [i % 2 == 0 for i in range(200)]
    assert spent < 4 * 1.0 + 6  # two at a time, and the time to start anew


def test_throughput_counts_distinct_rows_that_nobody_read_before(algebraic, monkeypatch):
    rows = [("math", f"\\boxed{{{i}}}", str(i), None) for i in range(300)]
    graded = []
    counted = algebraic.grade_many
    monkeypatch.setattr(algebraic, "grade_many", lambda rows: graded.append(rows) or counted(rows))
    algebraic.grade_many(rows)
    assert throughput(algebraic, rows * 3) > 0
    assert graded[1] == rows[1:] and exact._read.cache_info().misses == 299
    with pytest.raises(ValueError, match="two rows or more that are distinct"):
        throughput(algebraic, rows[:1] * 5)


def test_no_box_is_no_answer_and_an_empty_reference_is_refused(algebraic):
    for text in ("", "The answer is 5.", "\\boxed{}", "\\boxed{5"):
        for kind, reference in (("math", "5"), ("letter", "A")):
            grade = algebraic.grade(kind, text, reference)
            assert (grade.success, grade.status, grade.reason, grade.answer) == (False, "no_answer", "no answer", "")
    with pytest.raises(ValueError, match="empty"):
        algebraic.grade("math", "\\boxed{5}", " ")
    with pytest.raises(ValueError, match="no grader is called 'maths'"):
        algebraic.grade("maths", "\\boxed{5}", "5")


def test_without_math_verify_only_the_exact_comparison_is_offered(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"install math-verify.*symbolic=False"):
        Graders()
    with Graders(symbolic=False) as graders:
        grade = graders.grade("math", "\\boxed{x+y}", "y+x")
        assert (grade.success, grade.status) == (False, "undecided")
        assert "no math-verify" in graders.checker("math")


def test_a_checker_that_cannot_start_raises_and_never_grades():
    with Graders(workers=1, _function="no_such_module:f") as graders:
        assert graders.grade("math", "\\boxed{5}", "5").success
        with pytest.raises(InfrastructureError, match="no_such_module"):
            graders.grade("math", "\\boxed{x+y}", "y+x")
        with pytest.raises(InfrastructureError, match="no_such_module"):
            graders.grade_many([("math", "\\boxed{5}", "5", None), ("math", "\\boxed{x+y}", "y+x", None)])


# --- math-verify itself


@pytest.fixture(scope="module")
def verifying():
    with Graders(deadline_s=5.0) as graders:
        yield graders


def test_math_verify_decides_what_needs_algebra(verifying):
    for answer, reference, same in UNDECIDED[:-1]:
        assert verifying.grade("math", f"\\boxed{{{answer}}}", reference).success == same, (answer, reference)


def test_math_verify_reads_nothing_out_of_the_middle(verifying):
    for box in ("I think 4 5", r"4 $5$", r"4 \(5\)", r"\foo{ \frac{5}{1}", "4. final answer is $5$. I hope it is"):
        assert not verifying.grade("math", f"\\boxed{{{box}}}", "5").success, box


def test_hostile_answers_cost_math_verify_its_deadline():
    with Graders(deadline_s=1.0) as graders:
        graders.grade("math", "\\boxed{x+y}", "y+x")
        for box in ("9^{9^{9^9}}", "(10^9)!", "2^{2^{36}}", "(" * 2000 + "1" + ")" * 2000, "(x+1)^{2000}"):
            began = time.perf_counter()
            assert not graders.grade("math", f"\\boxed{{{box}}}", "x+1").success
            assert time.perf_counter() - began < 4.0
        assert graders.grade("math", "\\boxed{x+y}", "y+x").success


@needs_data
def test_math_verify_refuses_every_changed_digit_of_math500(verifying):
    rng = random.Random(0)
    changed = [(b, a) for a in references("math500") if (b := one_digit_changed(rng, a))]
    graded = verifying.grade_many([("math", f"\\boxed{{{b}}}", a, None) for b, a in changed])
    assert [pair for pair, grade in zip(changed, graded, strict=True) if grade.success] == []


# --- letters, the strict box


@pytest.mark.parametrize(
    ("text", "success", "answer"),
    [
        (r"\boxed{C}", True, "C"),
        (r"\boxed{\text{C}}", True, "C"),
        (r"\boxed{(C)}", True, "C"),
        (r"\boxed{\text{(C)}}", True, "C"),
        (r"\boxed{\mathbf{C}}", True, "C"),
        (r"\boxed{C.}", True, "C"),
        (r"$\boxed{ C }$", True, "C"),
        (r"\boxed{A} \boxed{C}", True, "C"),
        (r"\boxed{C} \boxed{A}", False, "A"),
        (r"\boxed{B}", False, "B"),
        (r"\boxed{c}", False, "c"),
        (r"\boxed{CC}", False, "CC"),
        (r"\boxed{C, D}", False, "{C,D}"),
        (r"\boxed{E}", False, "E"),
        (r"\boxed{5}", False, "5"),
    ],
)
def test_letters(algebraic, text, success, answer):
    grade = algebraic.grade("letter", text, "C")
    assert (grade.success, grade.status, grade.answer) == (success, "ok", answer)


def test_a_letter_question_needs_a_letter_as_reference(algebraic):
    with pytest.raises(ValueError, match="A to D"):
        algebraic.grade("letter", r"\boxed{C}", "E")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{72}", "72"),
        (r"so \boxed{ 72 }", " 72 "),  # nothing is stripped
        (r"\boxed{72}" + "." * 90, "72"),
        (r"\boxed{72}" + "." * 91, None),  # it begins before the last 100 characters
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", None),  # the last one that begins is the only one tried
        (r"\boxed {72}", None),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{a\}", "a\\"),  # an escaped brace is a brace
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{9}}", "9"),
        ("72", None),
        ("", None),
    ],
)
def test_strict_box(algebraic, text, answer):
    assert strict_box(text) == answer
    grade = algebraic.grade("strict_box", text, "72")
    assert (grade.success, grade.status) == (answer == "72", "no_answer" if answer is None else "ok")


def test_strict_box_is_equal_as_text_only(algebraic):
    for answer in ("1,234", "1234.0", "1234 "):
        assert not algebraic.grade("strict_box", f"\\boxed{{{answer}}}", "1234").success
        assert algebraic.grade("strict_box", f"\\boxed{{{answer}}}", answer).success


# --- programs


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("Try\n```py\nprint(1)\n```\nno:\n```\nprint(2)\nprint(3)\n```\nDone.", "print(2)\nprint(3)"),
        ("```python\nprint(1)", None),
        ("```python\nprint(1)\n```\n```python\nprint(2)", "print(1)"),
        ("```python\nprint(1)\n```python\nprint(2)\n```", "print(2)"),
        ("  ```python\n  if 1:\n    x\n  ```", "if 1:\n  x"),
        ("```python\r\nprint(1)\r\nprint(2)\r\n```\r\n", "print(1)\nprint(2)"),
        ("```print(1)```", None),
        ("```\ns = '\u2028\x0c'\n```", "s = '\u2028\x0c'"),
        ("```\n```", ""),
        ("print(1)", None),
    ],
)
def test_the_last_fenced_block(text, code):
    assert last_fenced(text) == code


TESTS = {"inputs": ["1 2\n", "30 4\n", "0 0\n", "-5 5"], "outputs": ["3", "34", "", "0"], "fn_name": None}
ADD = "```python\na, b = map(int, input().split())\nif a or b:\n    print(a + b)\n```"
WRONG = ADD.replace("a + b)", "abs(a) + b)")
CALLED = {"inputs": ['[1, 2]\n"x"', "[]\nnull"], "outputs": ['[1, 2, "x"]', "[0]"], "fn_name": "join"}
JOIN = "```python\nclass Solution:\n    def join(self, items, more):\n        return items + [more]\n```"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("text", "tests", "reason", "passed"),
    [
        (ADD, TESTS, "correct", 1.0),
        (WRONG, TESTS, "wrong_answer", 0.75),
        (ADD.replace("if a or b:", "if 1:"), TESTS, "wrong_answer", 0.75),  # prints where nothing is expected
        ("```\nwhile input():\n    pass\n```", TESTS, "runtime_error", 0.0),
        ("```\n```", TESTS, "wrong_answer", 0.25),
        ("It is a + b.", TESTS, "no answer", None),
        (JOIN, CALLED, "wrong_answer", 0.5),
        (JOIN, CALLED | {"outputs": ['[1, 2, "x"]', "[null]"]}, "correct", 1.0),
    ],
)
def test_programs_until_one_fails_and_by_fraction(sandbox, text, tests, reason, passed):
    limits = Limits(cpu_s=2.0, memory_mb=512, output_kb=64)
    with (
        Graders(symbolic=False, sandbox=sandbox, program_limits=limits) as until,
        Graders(symbolic=False, sandbox=sandbox, program_limits=limits, all_tests=True) as every,
    ):
        for graders, score in ((until, None), (every, passed)):
            grade = graders.grade("program", text, "", {"tests": tests})
            assert grade.success == (reason == "correct") and grade.reason.startswith(reason) and grade.score == score
            assert grade.reward == (float(grade.success) if score is None else score)
            assert grade.status == ("no_answer" if passed is None else "ok")
        assert "fraction" in every.checker("program") and "until one fails" in until.checker("program")


def test_programs_need_tests_and_a_sandbox(sandbox, algebraic):
    with pytest.raises(ValueError, match="sandbox"):
        algebraic.grade("program", ADD, "", {"tests": TESTS})
    with Graders(symbolic=False, sandbox=sandbox) as graders:
        with pytest.raises(ValueError, match="tests"):
            graders.grade("program", ADD, "")
        grade = graders.grade("program", ADD, "", {"tests": {"inputs": ["1"], "outputs": []}})
        assert (grade.success, grade.status) == (False, "error") and "unusable" in grade.reason


def test_a_broken_sandbox_is_not_a_wrong_program():
    with Sandbox(workers=1) as closed:
        pass
    with Graders(symbolic=False, sandbox=closed) as graders, pytest.raises(InfrastructureError):
        graders.grade("program", ADD, "", {"tests": TESTS})


# --- the command


def run(tmp_path, rows, *options, source="in.jsonl"):
    path = tmp_path / source
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    status = verify.main([*options, "--workers", "2", str(path), str(tmp_path / "out.jsonl")])
    out = tmp_path / "out.jsonl"
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None


def row(i, reference, response, **more):
    return {"id": i, "reference": reference, "response": response, **more}


def test_verify_adds_what_it_found_and_keeps_the_rest(tmp_path, capsys):
    rows = [
        row("a", "1,234", "So \\boxed{1234}.", source="é\u2028"),
        row(7, 5, "\\boxed{6}"),
        row("c", 0.5, "none"),
        row("c", "y+x", "\\boxed{x+y}"),
    ]
    status, out = run(tmp_path, [*rows, ""], "--checker", "math", "--exact")
    found = [(True, "ok"), (False, "ok"), (False, "no_answer"), (False, "undecided")]
    assert status == 0
    assert out == [r | {"correct": c, "status": s} for r, (c, s) in zip(rows, found, strict=True)]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 of 4 correct, 25.0 % (95 % Wilson interval 4.6 to 69.9 %)" in said
    assert "exact, no math-verify" in said and "1 no_answer, 2 ok, 1 undecided" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_verify_other_checkers(tmp_path):
    rows = [row(0, "B", "\\boxed{\\text{B}}"), row(1, "B", "\\boxed{A}")]
    assert [r["correct"] for r in run(tmp_path, rows, "--checker", "letter")[1]] == [True, False]
    rows = [
        row(0, "1/2", "\\boxed{1/2}"),
        row(1, "1/2", "\\boxed{0.5}"),
        row(2, 7, "\\boxed{7}"),
        row(3, " 7", "\\boxed{7}"),
    ]
    assert [r["correct"] for r in run(tmp_path, rows, "--checker", "strict_box")[1]] == [True, False, True, False]
    rows = [row(0, TESTS, ADD), row(1, json.dumps(TESTS), WRONG)]
    out = run(tmp_path, rows, "--checker", "program", "--all-tests")[1]
    assert [(r["correct"], r["status"], r["score"]) for r in out] == [(True, "ok", 1.0), (False, "ok", 0.75)]


@pytest.mark.parametrize(
    ("checker", "bad", "said"),
    [
        ("math", "{", "in.jsonl:2: "),
        ("math", "[1]", "in.jsonl:2: the row is not a JSON object"),
        ("math", {"id": 1, "response": "x"}, 'in.jsonl:2: the row has no "reference"'),
        ("math", row(1, "", "x"), 'in.jsonl:2: "reference" is empty'),
        ("math", row(1, {"a": 1}, "x"), "in.jsonl:2: the answer must be text"),
        ("math", row(1, "5", None), 'in.jsonl:2: "response" must be text'),
        ("math", "[" * 100_000, "in.jsonl:2: "),
        ("math", row(1, r"\frac{1}{", "x"), 'in.jsonl:2: "reference" is one that no parser reads'),
        ("letter", row(1, "E", "x"), "in.jsonl:2: "),
        ("program", row(1, "5", "x"), 'in.jsonl:2: "reference" must be the tests'),
    ],
)
def test_a_bad_row_is_named_before_anything_is_graded(tmp_path, capsys, checker, bad, said):
    good = {"math": "5", "letter": "A", "program": TESTS}[checker]
    (tmp_path / "out.jsonl").write_text('"as it was"')
    status, out = run(tmp_path, [row(0, good, "x"), bad], "--checker", checker, "--exact")
    assert status == 1 and out == ["as it was"] and said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_verify_names_other_trouble(tmp_path, capsys):
    assert run(tmp_path, [""], "--checker", "math", "--exact")[0] == 1 and "has no rows" in capsys.readouterr().err
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    for source, target, said in (
        ("latin.jsonl", "out.jsonl", "latin.jsonl:1: "),
        ("missing.jsonl", "out.jsonl", "missing.jsonl"),
        ("in.jsonl", "no/out.jsonl", "make it first"),
        ("in.jsonl", "in.jsonl", "in.jsonl is what is graded: name another file"),
    ):
        assert verify.main(["--checker", "math", "--exact", str(tmp_path / source), str(tmp_path / target)]) == 1
        assert said in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_bytes() == b"\n"
    for flag, value in (("--workers", "0"), ("--deadline", "nan")):
        paths = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
        assert verify.main(["--checker", "math", "--exact", flag, value, *paths]) == 1
        assert f"{flag}={value}: it must be" in capsys.readouterr().err


def test_wilson():
    # R: prop.test(c(0, 1, 15, 30), ..., correct = FALSE), one at a time
    for successes, count, low, high in ((0, 30, 0.0, 0.11351), (15, 30, 0.33154, 0.66846), (30, 30, 0.88649, 1.0)):
        assert verify.wilson(successes, count) == pytest.approx((low, high), abs=1e-5)
