"""Published data sets: every layout, the checks of `prepare`, the stored rows, and the family of tasks over them."""

import base64
import collections
import csv
import datetime
import gzip
import io
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import zipfile
import zlib

import pyarrow
import pyarrow.parquet
import pytest

from elpo_jax.tasks import prepare as prepare_module
from elpo_jax.tasks.base import Grade, Task
from elpo_jax.tasks.dataset import DatasetFamily, RowTask
from elpo_jax.tasks.livecodebench import read_tests, unpack
from elpo_jax.tasks.prepare import prepare
from elpo_jax.tasks.prompts import prompt_of
from elpo_jax.tasks.published import PUBLISHED
from elpo_jax.tasks.readers import content, content_hash, find_sources, raw_rows, read_row
from elpo_jax.tasks.rows import Conversation, DatasetError, Row, answer_text, split_word
from elpo_jax.tasks.store import graders_of, open_rows, open_splits
from elpo_jax.tasks.stream import TaskStream
from elpo_jax.tools.calculator import Calculator
from elpo_jax.tools.judge import parse_tests

DATA = pathlib.Path(os.environ.get("ELPO_DATA", "no-data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="ELPO_DATA names no folder")

PROBLEMS = [("What is 1 + 1?", "2"), ("Is π > 3?\nSay “1” if so.", "1"), ("What is 10 / 4?", "5/2")]


def read(name, path, password=None):
    """Every row of a published data set, whatever their number."""
    raws = [raw for source in find_sources(path, PUBLISHED[name], password) for _, raw in raw_rows(source)]
    return [read_row(raw, number, PUBLISHED[name]) for number, raw in enumerate(raws)]


def take(name, source, out, **options):
    """Prepares a few rows, which are not the published ones, as jsonl."""
    return prepare(name, source, out, form="jsonl", unchecked=True, **options)


def put(path, data):
    path.write_bytes(data)
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def csv_of(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# --- layouts ---


def named(problem="problem", answer="answer"):
    return [{problem: q, answer: a} for q, a in PROBLEMS]


def solved(form):
    return [{"problem": q, "solution": form.replace("A", a), "level": "Level ?"} for q, a in PROBLEMS]


RL = [
    {
        "data_source": "somewhere",
        "prompt": [{"role": "system", "content": "Reason."}, {"role": "user", "content": q}],
        "reward_model": {"ground_truth": a, "style": "rule"},
        "extra_info": {"index": 0, "level": 5},
    }
    for q, a in PROBLEMS
]
ONE_BY_ONE = {f"MATH/test/algebra/{i}.json": json.dumps(row).encode() for i, row in enumerate(solved("$\\boxed{A}$"))}
NOISE = {"__MACOSX/MATH/test/algebra/._0.json": b"\0", "MATH/.hidden.json": b"no", "MATH/README.md": b"no data"}

LAYOUTS = {
    "jsonl": ("t.jsonl", jsonl(named())),
    "windows": ("t.jsonl", b"\xef\xbb\xbf" + jsonl(named()).replace(b"}\n", b"}\r\n\r\n")),
    "json": ("t.json", json.dumps(named("Problem", "Answer")).encode()),
    "json lines named json": ("t.json", jsonl(named("input", "output"))),
    "json.gz": ("t.json.gz", gzip.compress(json.dumps(named("question")).encode())),
    "csv": ("t.csv", csv_of(named("Problem", "Answer"))),
    "parquet": ("t.parquet", parquet(named())),
    "rl parquet": ("t.parquet", parquet(RL)),
    "settings as json": ("t.jsonl", jsonl([r | {"reward_model": json.dumps(r["reward_model"])} for r in RL])),
    "dict answers": ("t.jsonl", jsonl([{"problem": q, "answer": {"ground_truth": a}} for q, a in PROBLEMS])),
    "boxes": ("t.jsonl", jsonl(solved("Not $\\boxed{0}$, but $\\boxed{A}$."))),
    "frames": ("t.jsonl", jsonl(solved("It is $\\fbox{A}$."))),
    "bare boxes": ("t.jsonl", jsonl(solved("It is $\\boxed A$."))),
    "zip": ("t.zip", zipped({"a/test.jsonl": jsonl(named())})),
    "zip of parquet": ("t.zip", zipped({"t.parquet": parquet(named())})),
    "zip of problems": ("t.zip", zipped(ONE_BY_ONE | NOISE)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_rows(tmp_path, layout):
    name, data = LAYOUTS[layout]
    rows = read("math", put(tmp_path / name, data))
    assert [(row.problem, row.answer) for row in rows] == PROBLEMS
    assert [row.id for row in rows] == ["0", "1", "2"] and {row.grader for row in rows} == {"math"}
    assert rows[0].meta.get("level") == (
        5 if data in (LAYOUTS["rl parquet"][1], LAYOUTS["settings as json"][1]) else None
    )


def test_a_folder_of_problems_is_read_like_its_zip(tmp_path):
    for name, data in (ONE_BY_ONE | NOISE | {"MATH/train/geometry/7.json": jsonl(named()[:1])}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        put(tmp_path / name, data)
    manifest = take("math", tmp_path / "MATH", tmp_path / "out")
    assert {split: facts["rows"] for split, facts in manifest["splits"].items()} == {"train": 1, "test": 3}


@pytest.mark.parametrize(
    ("value", "text"),
    [(70, "70"), (27.0, "27"), (0.5, "0.5"), (-1.0, "-1"), (" 045 ", "045"), (None, ""), ("", ""), ([3], "3")],
)
def test_answers_of_every_type_are_text(value, text):
    assert answer_text(value) == text


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), {}, [1, 2], b"2"])
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(DatasetError, match="must be text or a finite number"):
        answer_text(value)


def test_integer_answers_have_one_form(tmp_path):
    forms = ("045", 45, 45.0, "45.0", "$45$", r"45^\circ", r"$45^{\circ}$", "45°", r"45^{ \circ }")
    path = put(tmp_path / "t.jsonl", jsonl([{"problem": "p", "answer": a} for a in forms]))
    assert [row.answer for row in read("aime2024", path)] == ["45"] * len(forms)
    for bad in ("1/2", "4 5", r"45^2", "45.5", "x=45"):
        with pytest.raises(
            DatasetError, match=r"t\.jsonl, line 1: its answer is not an integer: correct it, or give --f"
        ):
            take("aime2024", put(path, jsonl([{"problem": "p", "answer": bad}])), tmp_path / "out")


def test_gsm8k_answers_lose_their_commas_and_keep_the_marked_solution(tmp_path):
    raw = {"question": " q ", "answer": "It is 5*400=<<5*400=2000>>2,000.\n#### 2,000"}
    (row,) = read("gsm8k", put(tmp_path / "train.jsonl", jsonl([raw])))
    assert (row.problem, row.answer, row.meta["solution"]) == ("q", "2000", "It is 5*400=<<5*400=2000>>2,000.")


def test_splits_are_told_by_names(tmp_path):
    cases = {
        "train-00000-of-00001.parquet": "train",
        "test.jsonl": "test",
        "my_valid.jsonl": "validation",
        "train_test.jsonl": None,
        "latest.jsonl": None,
        "constraint.jsonl": None,
    }
    assert {name: split_word(name) for name in cases} == cases
    folder = tmp_path / "main"
    folder.mkdir()
    raw = {"question": "q", "answer": "#### 1"}
    for name in ("train-0", "train-1", "test-0", "train_socratic", "example_model_solutions"):
        put(folder / f"{name}.jsonl", jsonl([raw | {"question": name}]))
    manifest = take("gsm8k", tmp_path, tmp_path / "out")
    assert {split: facts["rows"] for split, facts in manifest["splits"].items()} == {"train": 2, "test": 1}
    assert [row.problem for row in open_rows(tmp_path / "out", "train")] == ["train-0", "train-1"]
    assert list(take("gsm8k", folder, tmp_path / "o2", split="test")["splits"]) == ["test"]
    unnamed = put(tmp_path / "rows.jsonl", jsonl([raw]))
    with pytest.raises(DatasetError, match=r"rows\.jsonl does not say which split it is: add --split"):
        take("gsm8k", unnamed, tmp_path / "o3")
    assert list(take("gsm8k", unnamed, tmp_path / "o3", split="train")["splits"]) == ["train"]
    with pytest.raises(DatasetError, match="aime2024 has no split train: there is test"):
        take("aime2024", unnamed, tmp_path / "o4", split="train")
    with pytest.raises(DatasetError, match="no split validation"):
        take("gsm8k", put(tmp_path / "dev.jsonl", jsonl([raw])), tmp_path / "o4")


# --- what prepare refuses ---

LINES = jsonl([{"problem": f"p{i}", "answer": i} for i in range(50)])
ZIP = zipped({"test.jsonl": LINES})
DAMAGED = {
    "cut.jsonl": (LINES[:-8], "line 50 is not JSON"),
    "cut.json": (b'[{"problem": "p"', "damaged"),
    "latin.jsonl": ('{"problem": "Höhe"}'.encode("latin-1"), "line 1 is not UTF-8"),
    "list.jsonl": (b"[1]\n", "line 1 is not an object"),
    "number.json": (b"[1]", "row 0 is not an object"),
    "deep.json": (b"[" * 100_000, "damaged"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], "damaged"),
    "plain.jsonl.gz": (LINES, "damaged"),
    "cut.parquet": (parquet(named())[:-30], "damaged"),
    "cut.zip": (ZIP[:-30], "no readable zip"),
    "flipped.zip": (ZIP[:60] + bytes([ZIP[60] ^ 255]) + ZIP[61:], "damaged"),
    "no-data.zip": (zipped({"README.md": b"no"}), "has no data file"),
    "empty.jsonl": (b"\n\n", "no rows are left"),
    "quotes.csv": (b'problem,answer\n"a"b,1\n', "damaged"),
    "keys.jsonl": (b'{"query": "q"}\n', "no text in a column problem or question"),
    "blank.jsonl": (b'{"problem": " ", "answer": 1}\n', "line 1: the problem is empty"),
    "nan.jsonl": (b'{"problem": "p", "answer": NaN}\n', "line 1: the answer must be"),
    "half.jsonl": (b'{"problem": "\\ud800", "answer": 1}\n', "line 1: it has no JSON form"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_leaves_nothing_behind(tmp_path, name):
    data, said = DAMAGED[name]
    with pytest.raises(DatasetError, match=re.escape(said)) as error:
        take("math500", put(tmp_path / name, data), tmp_path / "made" / "out")
    assert name in str(error.value)
    assert not (tmp_path / "made").exists() or list((tmp_path / "made").iterdir()) == []


def test_a_wrong_file_is_refused_with_what_was_expected(tmp_path):
    thirty = put(tmp_path / "t.jsonl", jsonl([{"problem": f"p{i}", "answer": i} for i in range(30)]))
    known = PUBLISHED["aime2025"].sha256["test"]
    with pytest.raises(
        DatasetError, match=rf"aime2025, test \(t\.jsonl\): .* \(expected content hash {known}, found [0-9a-f]{{64}}"
    ):
        prepare("aime2025", thirty, tmp_path / "out", form="jsonl")
    with pytest.raises(
        DatasetError, match=r"amc23, test \(t\.jsonl\): expected 40 rows, found 30: give --from .* or --unchecked"
    ):
        prepare("amc23", thirty, tmp_path / "out", form="jsonl")
    with pytest.raises(DatasetError, match="expected 1055 or 175 or 131 rows, found 1"):
        prepare("livecodebench_v6", put(tmp_path / "test6.jsonl", jsonl([lcb_row()])), tmp_path / "out", form="jsonl")
    assert not (tmp_path / "out").exists()
    assert take("aime2025", thirty, tmp_path / "out")["splits"]["test"]["checked"] == "count"
    assert take("amc23", thirty, tmp_path / "o2")["splits"]["test"]["checked"] == "nothing"


def test_the_hash_is_of_the_content_and_not_of_its_form():
    rows = [Row(str(i), q, a, "math", {}) for i, (q, a) in enumerate(PROBLEMS)]
    spaced = [Row("x", q.replace(" ", "\n "), a, "math", {"level": 3}) for q, a in reversed(PROBLEMS)]
    hashes = [content_hash(content(row, "rows") for row in these) for these in (rows, spaced)]
    assert hashes[0] == hashes[1]
    for changed in (
        [*rows[:2], Row("2", PROBLEMS[2][0], "5/3", "math", {})],
        [*rows[:2], Row("2", PROBLEMS[2][0] + "!", "5/2", "math", {})],
        rows[:2],
        [*rows, rows[0]],
    ):
        assert content_hash(content(row, "rows") for row in changed) != hashes[0]


def test_rows_without_an_answer_are_named_or_left_out(tmp_path):
    answers = ["1", "", None, "  ", r"\frac{1}{", "2"]
    path = put(tmp_path / "t.jsonl", jsonl([{"problem": "p", "answer": a} for a in answers]))
    with pytest.raises(
        DatasetError,
        match=r"4 rows cannot be graded \(t\.jsonl, line 2: it has no answer; .* line 5: its answer is one .*--drop-",
    ):
        take("math500", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = take("math500", path, tmp_path / "out", drop_unanswered=True)
    assert (manifest["splits"]["test"]["rows"], manifest["splits"]["test"]["dropped"]) == (2, 4)
    assert [(row.id, row.answer) for row in open_rows(tmp_path / "out", "test")] == [("0", "1"), ("5", "2")]


def test_the_command_says_what_it_did(tmp_path, capsys):
    path = put(tmp_path / "t.jsonl", jsonl([{"problem": "p", "answer": 1}]))
    command = ["amc23", "--from", str(path), "--out", str(tmp_path / "out"), "--format", "jsonl"]
    with pytest.raises(SystemExit, match="expected 40 rows, found 1"):
        prepare_module.main(command)
    prepare_module.main([*command, "--unchecked"])
    printed = capsys.readouterr().out
    assert re.search(r"test: 1 rows, 0 left out, content hash [0-9a-f]{64}\n.*: nothing\nlicence: ", printed)
    with pytest.raises(SystemExit, match="is not empty: choose another --out"):
        prepare_module.main([*command, "--unchecked"])
    with pytest.raises(SystemExit, match="does not exist"):
        prepare_module.main(
            ["amc23", "--from", str(tmp_path / "no"), "--out", str(tmp_path / "o2"), "--format", "jsonl"]
        )


# --- GPQA ---

SECRET = "Which quark is the heaviest of all?"


def gpqa_row(i):
    return {
        "Question": SECRET if i == 0 else f"Question {i}?",
        "Correct Answer": f"right {i}\n",
        "Incorrect Answer 1": f"wrong {i}.1",
        "Incorrect Answer 2": f"wrong {i}.2",
        "Incorrect Answer 3": f"wrong {i}.3",
        "High-level domain": "Physics",
        "Subdomain": "",
        "Record ID": f"rec{i}",
        "Canary String": "canary GUID 123",
    }


def encrypted(member, data, password):
    """A zip with one stored member under the traditional encryption of zip, which the standard library only reads."""
    keys = [0x12345678, 0x23456789, 0x34567890]

    def crc(byte, value):
        return zlib.crc32(bytes([byte]), value ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    def update(byte):
        keys[0] = crc(byte, keys[0])
        keys[1] = ((keys[1] + (keys[0] & 255)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = crc(keys[1] >> 24, keys[2])

    for byte in password:
        update(byte)
    out = bytearray()
    for byte in bytes(11) + bytes([zlib.crc32(data) >> 24]) + data:
        word = keys[2] | 2
        out.append(byte ^ (word * (word ^ 1) >> 8 & 255))
        update(byte)
    name = member.encode()
    sizes = struct.pack("<IIIHH", zlib.crc32(data), len(out), len(data), len(name), 0)
    head = struct.pack("<HHHHH", 20, 1, 0, 0, 33)
    local = b"PK\3\4" + head + sizes + name + out
    central = b"PK\1\2" + struct.pack("<H", 20) + head + sizes + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def test_gpqa_is_read_from_its_encrypted_zip_and_its_text_stays_private(tmp_path):
    table = csv_of([gpqa_row(i) for i in range(198)])
    path = put(tmp_path / "dataset.zip", encrypted("dataset/gpqa_diamond.csv", table, b"open sesame"))
    for password, said in ((None, "asks for a password.*--password"), ("wrong", "the password is wrong")):
        with pytest.raises(DatasetError, match=rf"gpqa_diamond\.csv: .*{said}"):
            prepare("gpqa_diamond", path, tmp_path / "out", form="jsonl", password=password)
    manifest = prepare("gpqa_diamond", path, tmp_path / "out", form="jsonl", password="open sesame")
    assert manifest["private"] and manifest["splits"]["test"]["checked"] == "count"
    rows = open_rows(tmp_path / "out", "test")
    letters = collections.Counter(row.answer for row in rows)
    assert set(letters) == set("ABCD") and min(letters.values()) > 30
    for i, row in enumerate(rows):
        options = dict(line.split(". ", 1) for line in row.problem.split("\n\n")[1].split("\n"))
        assert options[row.answer] == f"right {i}" and len(set(options.values())) == 4
        assert row.meta == {"private": True, "domain": "Physics", "canary string": "canary GUID 123"}
    # The order hangs on the record alone: not on the others, the machine or the Python.
    (alone,) = read("gpqa_diamond", put(tmp_path / "gpqa_diamond.csv", csv_of([gpqa_row(7)])))
    assert (alone.problem, alone.answer) == (rows[7].problem, rows[7].answer)
    assert "".join(row.answer for row in rows)[:8] == "DAAACCCA"
    family = DatasetFamily("gpqa", {"test": rows}, Calculator(), grade, checker="letter")
    task = family.task("test", 0)
    assert SECRET in task.prompt and "problem of Physics" in task.prompt and task.meta["private"]
    assert "heaviest" not in repr(task) + repr(rows[0]) + repr(list(rows)) and "right" not in repr(task)
    broken = [gpqa_row(0) | {"Correct Answer": None}]
    with pytest.raises(DatasetError) as error:
        take("gpqa_diamond", put(tmp_path / "d.jsonl", jsonl(broken)), tmp_path / "o2")
    assert "d.jsonl, line 1: no text in a column correct answer" in str(error.value) and "heaviest" not in str(
        error.value
    )


def test_gpqa_diamond_is_picked_among_its_siblings_and_may_come_with_letters(tmp_path):
    for name in ("gpqa_main.csv", "gpqa_diamond.csv", "gpqa_experts.csv"):
        put(tmp_path / name, csv_of([gpqa_row(1) | {"Record ID": name}]))
    assert [row.id for row in read("gpqa_diamond", tmp_path)] == ["gpqa_diamond.csv"]
    forms = ["\\boxed{B}", "B", "(B)", "B.", "\\boxed{\\text{B}}"]
    raws = [{"problem": "Which?\nA) 1\nB) 2", "solution": form, "domain": "Physics"} for form in forms]
    rows = read("gpqa_diamond", put(tmp_path / "rows.jsonl", jsonl(raws)).rename(tmp_path / "x.jsonl"))
    assert {row.answer for row in rows} == {"B"} and all(row.meta["private"] for row in rows)


# --- LiveCodeBench and Open-AgentRL ---


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb_row(kind="stdin", private=None, **changes):
    public = [{"input": "1\n", "output": "2\n", "testtype": kind}]
    private = [{"input": "5\n", "output": "6\n", "testtype": kind}] if private is None else private
    return {
        "question_title": "Next",
        "question_content": "Print n + 1.",
        "platform": "atcoder",
        "question_id": "abc1_a",
        "contest_date": "2025-03-01T00:00:00",
        "starter_code": "class Solution:\n    def next(self, n: int) -> int:" if kind == "functional" else "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(json.dumps(private)),
        "metadata": json.dumps({"func_name": "next"} if kind == "functional" else {}),
    } | changes


@pytest.mark.parametrize("kind", ["stdin", "functional"])
def test_livecodebench_rows_become_tests_that_the_judge_takes(tmp_path, kind):
    name = "next" if kind == "functional" else None
    plain = lcb_row(kind, private_test_cases=json.dumps([{"input": "5\n", "output": "6\n", "testtype": kind}]))
    for raw in (lcb_row(kind), plain):
        (row,) = read("livecodebench_v6", put(tmp_path / "test6.jsonl", jsonl([raw])))
        assert (row.id, row.grader, row.answer) == ("abc1_a", "program", "")
        assert row.meta["tests"] == {"inputs": ["1\n", "5\n"], "outputs": ["2\n", "6\n"], "fn_name": name}
        assert parse_tests(row.meta["tests"]).fn_name == name and row.meta["difficulty"] == "easy"
        prompt = prompt_of(row, training=False)
        assert ("def next(self" in prompt) == (kind == "functional") == ("standard input" not in prompt)


def test_livecodebench_in_the_layout_for_rl(tmp_path):
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    raw = {
        "problem": "Print n + 1.",
        "ability": "code",
        "reward_model": json.dumps({"ground_truth": tests}),
        "extra_info": json.dumps({"difficulty": "easy", "index": 3}),
    }
    (row,) = read("livecodebench_v6", put(tmp_path / "lcb.parquet", parquet([raw])))
    assert row.meta == {"tests": tests | {"fn_name": None}, "difficulty": "easy"} and row.problem == "Print n + 1."


def test_livecodebench_is_cut_by_its_contests_days(tmp_path, capsys):
    days = ["2025-01-31", "2025-02-01T00:00:00", "2025-03-01", "2025-05-01T23:59:59", "2025-05-02"]
    rows = [lcb_row(question_id=str(i), contest_date=day) for i, day in enumerate(days)]
    path = put(tmp_path / "test6.jsonl", jsonl(rows))
    command = ["livecodebench_v6", "--from", str(path), "--out", str(tmp_path / "out"), "--format", "jsonl"]
    prepare_module.main([*command, "--unchecked", "--from-date", "2025-02-01", "--to-date", "2025-05-01"])
    assert "test: 3 rows, 0 left out" in (printed := capsys.readouterr().out) and "2 of other dates" in printed
    kept = open_rows(tmp_path / "out", "test")
    assert [(row.id, row.meta["contest_date"]) for row in kept] == [(str(i), days[i]) for i in (1, 2, 3)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["from_date"], manifest["to_date"]) == ("2025-02-01", "2025-05-01")
    assert manifest["splits"]["test"]["outside"] == 2 and manifest["splits"]["test"]["graders"] == ["program"]
    everything = take("livecodebench_v6", path, tmp_path / "o2")
    assert everything["splits"]["test"]["rows"] == 5 and everything["from_date"] is everything["to_date"] is None
    assert everything["splits"]["test"]["sha256"] == manifest["splits"]["test"]["sha256"], "the hash is of the file"
    # A parquet file may hold timestamps; a row without a date cannot be told.
    timed = lcb_row(contest_date=datetime.datetime(2025, 3, 1))
    (row,) = read("livecodebench_v6", put(tmp_path / "t.parquet", parquet([timed])))
    assert row.meta["contest_date"] == "2025-03-01T00:00:00"
    day = datetime.date(2025, 6, 1)
    for name, source, options, said in (
        ("livecodebench_v6", path, {"from_date": day}, r"no rows are left between the dates \(5 are outside\)"),
        ("livecodebench_v6", path, {"from_date": day, "to_date": datetime.date(2025, 5, 1)}, "correct --from-date"),
        ("livecodebench_v6", jsonl([lcb_row(contest_date=None)]), {"to_date": day}, "line 1: it has no contest_date"),
        ("math500", LINES, {"to_date": day}, "math500 has no contest dates: .* livecodebench_v6 only"),
    ):
        source = put(tmp_path / "t.jsonl", source) if isinstance(source, bytes) else source
        with pytest.raises(DatasetError, match=said):
            take(name, source, tmp_path / "o3", **options)
    with pytest.raises(SystemExit):
        prepare_module.main([*command, "--from-date", "February"])
    assert "'February' is no day such as 2025-02-01" in capsys.readouterr().err and not (tmp_path / "o3").exists()


class Class:
    """Something that a pickle names, and would have made."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Class(), "opcode STACK_GLOBAL"),
        (collections.OrderedDict(), "opcode STACK_GLOBAL"),
        (["[]"], "opcode EMPTY_LIST"),
        ({"input_output": "[]"}, "opcode EMPTY_DICT"),
        (b"[]", "opcode SHORT_BINBYTES"),
        (7, "opcode BININT1"),
    ],
)
def test_pickles_of_anything_but_a_text_are_refused(tmp_path, value, said):
    with pytest.raises(DatasetError, match=f"must be a pickle of one text, .*{said}"):
        unpack(packed(value))
    with pytest.raises(DatasetError, match=r"livecodebench_v6, test: t\.jsonl, line 1: .*pickle of one text"):
        take(
            "livecodebench_v6",
            put(tmp_path / "t.jsonl", jsonl([lcb_row(private_test_cases=packed(value))])),
            tmp_path / "o",
        )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_packed_texts_of_every_protocol_are_read(protocol):
    text = json.dumps([{"input": "é\n" * 200, "output": "x", "testtype": "stdin"}], ensure_ascii=False)
    data = base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()
    assert unpack(data) == text


def test_packed_tests_are_bounded_and_whole():
    bomb = base64.b64encode(zlib.compress(b"\0" * 50_000_000)).decode()
    with pytest.raises(DatasetError, match="inflate to 1000000 bytes or more"):
        unpack(bomb, most=1_000_000)
    whole = zlib.compress(pickle.dumps("[]"))
    for data, said in (
        (whole[:-4], "are cut off"),
        (b"plain", "neither JSON nor base64 of zlib"),
        (zlib.compress(b"no pickle"), "no pickle"),
        (zlib.compress(b""), "no pickle"),
        (zlib.compress(pickle.dumps("[]")[:-2]), "no pickle"),
        (zlib.compress(b"\x80\x04N."), "opcode NONE"),
    ):
        with pytest.raises(DatasetError, match=said):
            unpack(base64.b64encode(data).decode())
    with pytest.raises(DatasetError, match="neither JSON nor base64"):
        unpack("*not base64*")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"public_test_cases": "[{}]"}, 'test case 0 needs "input"'),
        ({"public_test_cases": "[1"}, "public_test_cases is not JSON"),
        ({"private_test_cases": packed("{}")}, "private_test_cases is not a list"),
        ({"private_test_cases": packed('[{"input": "", "output": "", "testtype": "functional"}]')}, "of both kinds"),
    ],
)
def test_unreadable_test_cases_are_named(changes, said):
    with pytest.raises(DatasetError, match=re.escape(said)):
        read_tests(lcb_row(**changes))
    with pytest.raises(DatasetError, match="metadata names none in func_name"):
        read_tests(lcb_row("functional", metadata="{}"))


def test_programs_without_usable_tests_count_as_unanswered(tmp_path):
    rows = [lcb_row(), lcb_row(public_test_cases="[]", private_test_cases="[]", question_id="b")]
    path = put(tmp_path / "t.jsonl", jsonl(rows))
    with pytest.raises(DatasetError, match=r"line 2: its tests are unusable \(0 inputs and 0 outputs\)"):
        take("livecodebench_v6", path, tmp_path / "out")
    assert take("livecodebench_v6", path, tmp_path / "out", drop_unanswered=True)["splits"]["test"]["rows"] == 1


def test_open_agentrl_prompts_get_the_grader_of_their_source(tmp_path):
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    rows = [
        RL[0] | {"data_source": "math_dapo", "ability": "math"},
        RL[1] | {"data_source": "mega-science", "ability": "science"},
        RL[2]
        | {"data_source": "skywork-code", "ability": "x", "reward_model": {"ground_truth": tests, "style": "rule"}},
        RL[2] | {"data_source": "code", "ability": "x", "reward_model": {"ground_truth": "assert", "style": "rule"}},
    ]
    path = put(tmp_path / "Open-AgentRL-30K.parquet", parquet(rows))
    with pytest.raises(
        DatasetError, match=r"1 rows cannot be graded \(Open-AgentRL-30K.parquet, row 3: its tests are unus"
    ):
        prepare("open_agentrl_30k", path, tmp_path / "out", form="jsonl")
    manifest = prepare("open_agentrl_30k", path, tmp_path / "out", form="jsonl", drop_unanswered=True)
    assert manifest["splits"]["train"]["checked"] == "nothing", "nobody has seen the published file"
    kept = list(open_rows(tmp_path / "out", "train"))
    assert [(row.grader, row.answer) for row in kept] == [("math", "2"), ("math", "1"), ("program", "")]
    assert kept[2].meta["tests"]["inputs"] == ["1\n"] and kept[0].meta["source"] == "math_dapo"


def test_open_agentrl_conversations_lose_the_nulls_of_parquet(tmp_path):
    call = {"type": "function", "function": {"name": "code_interpreter", "arguments": '{"code": "1"}'}}
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "\\boxed{1}"},
    ]
    tools = [{"type": "function", "function": {"name": "code_interpreter", "parameters": {"type": "object"}}}]
    path = put(tmp_path / "full_sft_3k_shuffled_v4.parquet", parquet([{"messages": messages, "tools": tools}]))
    manifest = prepare("open_agentrl_sft_3k", path, tmp_path / "out", form="jsonl")
    assert manifest["kind"] == "conversations"
    (row,) = open_rows(tmp_path / "out", "train")
    assert isinstance(row, Conversation) and row.tools == tools
    assert row.messages == [messages[0], {"role": "assistant", "tool_calls": [call]}, *messages[2:]]
    with pytest.raises(DatasetError, match="conversations, which can be imitated but not attempted"):
        DatasetFamily("sft", open_splits(tmp_path / "out"), Calculator(), grade, checker="")
    for bad, said in (
        (messages[:1], "no message is the assistant's"),
        ([{"role": "human", "content": "x"}], 'message 0 needs a "role"'),
        ([{"role": "assistant", "content": ["x"]}], '"content" must be text'),
    ):
        with pytest.raises(DatasetError, match=said):
            take("open_agentrl_sft_3k", put(tmp_path / "t.jsonl", jsonl([{"messages": bad}])), tmp_path / "o2")


# --- stored rows ---


def test_prepared_rows_are_read_at_random_and_damage_is_noticed(tmp_path):
    raws = [{"unique_id": f"row é {i}", "problem": f"p\u2028{i}", "answer": i, "level": i} for i in range(40)]
    take("math500", put(tmp_path / "t.jsonl", jsonl([*raws, raws[3]])), tmp_path / "out")
    rows = open_rows(tmp_path / "out", "test")
    assert len(rows) == 41 and rows[-1].id == "row é 3#40", "ids are unique"
    assert [(rows[i].id, rows[i].problem, rows[i].answer, rows[i].meta) for i in (39, 0, 17)] == [
        (f"row é {i}", f"p\u2028{i}", str(i), {"level": i}) for i in (39, 0, 17)
    ]
    assert len(list(rows)) == 41
    with pytest.raises(IndexError):
        rows[41]
    with pytest.raises(DatasetError, match="has no split train: there are test"):
        open_rows(tmp_path / "out", "train")
    stored = tmp_path / "out" / "test.jsonl"
    lines = stored.read_bytes().splitlines(keepends=True)
    put(stored, b"".join(lines[:-1]))
    with pytest.raises(DatasetError, match="40 rows instead of 41: prepare the data set again"):
        open_rows(tmp_path / "out", "test")
    put(stored, b"".join([*lines[:-1], b"{\n"]))
    with pytest.raises(DatasetError, match="line 41 is damaged"):
        open_rows(tmp_path / "out", "test")[40]
    manifest = tmp_path / "out" / "manifest.json"
    for damaged in (b'{"format": "jsonl"}', manifest.read_bytes().replace(b'"math"', b'"regex"')):
        put(manifest, damaged)
        with pytest.raises(DatasetError, match=r"manifest\.json is damaged"):
            open_splits(tmp_path / "out")


def test_all_graders_of_a_split_are_known(tmp_path):
    settings = {"ground_truth": {"inputs": ["1"], "outputs": ["2"]}}
    code = {"data_source": "some-code", "prompt": [{"role": "user", "content": "p"}], "reward_model": settings}
    path = put(tmp_path / "t.jsonl", jsonl([RL[0], json.loads(json.dumps(code)), RL[1]]))
    manifest = take("open_agentrl_30k", path, tmp_path / "out")
    assert manifest["splits"]["train"]["graders"] == ["math", "program"]
    assert graders_of(open_rows(tmp_path / "out", "train")) == {"math", "program"}
    mine = [{"problem": "p", "answer": 1}, {"problem": "q", "answer": "B", "grader": "letter"}]
    assert graders_of(open_rows(put(tmp_path / "m.jsonl", jsonl(mine)), "train")) == {"math", "letter"}
    said = [{"messages": [{"role": "assistant", "content": "x"}]}]
    assert graders_of(open_rows(put(tmp_path / "c.jsonl", jsonl(said)), "train")) == set()
    take("open_agentrl_sft_3k", tmp_path / "c.jsonl", tmp_path / "o2")
    assert graders_of(open_rows(tmp_path / "o2", "train")) == set()


def test_rows_of_ones_own(tmp_path):
    rows = [
        {"problem": "1+1?", "answer": 2},
        {"id": 7, "problem": "Which?", "answer": "B", "grader": "letter", "meta": {"domain": "art"}},
        {"problem": "p", "grader": "program", "meta": {"tests": {"inputs": ["1"], "outputs": ["2"]}}},
    ]
    path = put(tmp_path / "mine.jsonl", jsonl(rows))
    (split, read_back), *rest = open_splits(path).items()
    assert (split, rest) == ("train", []) and [row.id for row in read_back] == ["0", "7", "2"]
    assert [(row.answer, row.grader) for row in read_back] == [("2", "math"), ("B", "letter"), ("", "program")]
    assert list(open_splits(path, lone="test")) == ["test"] and len(open_rows(path, "validation")) == 3
    put(tmp_path / "test.jsonl", jsonl(rows[:1]))
    assert [*open_splits(tmp_path)] == ["test"] and [*open_splits(tmp_path / "test.jsonl")] == ["test"]
    with pytest.raises(DatasetError, match="holds no data set: give a folder"):
        open_splits(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "it is not JSON in UTF-8"),
        (b'{"problem": "\xff"}', "it is not JSON in UTF-8"),
        (b"[]", "it is not a JSON object"),
        (b'{"answer": 1}', '"problem" must be text that is not empty'),
        (b'{"problem": "p"}', "it has no answer"),
        (b'{"problem": "p", "answer": ""}', "it has no answer"),
        (b'{"problem": "p", "answer": "{1"}', "its answer is one that no parser reads"),
        (b'{"problem": "p", "answer": [1, 2]}', "the answer must be text or a finite number, not list"),
        (b'{"problem": "p", "answer": 1, "grader": "regex"}', '"grader" must be one of math, letter, program'),
        (b'{"problem": "p", "answer": "E", "grader": "letter"}', "not one of the letters A to D"),
        (b'{"problem": "p", "grader": "program"}', "its tests are unusable"),
        (b'{"problem": "p", "answer": 1, "level": 3}', 'unknown key "level": put what is not problem'),
        (b'{"problem": "p", "answer": 1, "meta": 3}', '"meta" must be an object'),
        (b'{"problem": "p", "answer": 1, "id": ""}', '"id" must be text'),
        (b'{"problem": "p", "answer": 1, "id": "0"}', "it has the id of line 1"),
        (b'{"messages": [], "problem": "p"}', 'unknown key "problem"'),
    ],
)
def test_a_bad_row_of_ones_own_is_named_by_its_line(tmp_path, line, said):
    path = put(tmp_path / "mine.jsonl", b'{"problem": "fine", "answer": 1}\n\n' + line + b"\n")
    with pytest.raises(DatasetError, match=re.escape("mine.jsonl, line 3: ") + ".*" + re.escape(said)):
        open_splits(path)


def test_array_record_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(DatasetError, match=r"needs the packages tensorflow-datasets and array_record.*--format jsonl"):
        prepare("math500", put(tmp_path / "t.jsonl", LINES), tmp_path / "out", unchecked=True)
    assert not (tmp_path / "out").exists()


def test_array_record_holds_the_same_rows(tmp_path):
    raws = [{"question": f"é {i}?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(300)]
    (tmp_path / "from").mkdir()
    put(tmp_path / "from" / "train.jsonl", jsonl(raws))
    put(tmp_path / "from" / "test.jsonl", jsonl(raws[:7]))
    take("gsm8k", tmp_path / "from", tmp_path / "plain")
    manifest = prepare("gsm8k", tmp_path / "from", tmp_path / "out", unchecked=True)
    assert manifest["format"] == "array_record" and not (tmp_path / "out" / "staged").exists()
    for split in ("train", "test"):
        assert list(open_rows(tmp_path / "out", split)) == list(open_rows(tmp_path / "plain", split))
    assert open_rows(tmp_path / "out", "train")[-1].answer == "300"


# --- the family ---


def grade(kind, text, reference, meta) -> Grade:
    return Grade(text == reference, float(text == reference), kind, text)


def rows_of(count, prefix="p"):
    return [Row(f"r{i}", f"{prefix} {i}", str(i), "math", {"level": i}) for i in range(count)]


def family_of(splits, **options):
    return DatasetFamily("own", splits, Calculator(), grade, **({"checker": "same text", "validation": 0.0} | options))


def test_training_goes_round_in_a_new_order_and_the_others_end():
    family = family_of({"train": rows_of(50), "test": rows_of(5)}, seed=3)
    assert (family.size("train"), family.size("validation"), family.size("test")) == (50, 0, 5)
    tasks = [family.task("train", index) for index in range(150)]
    passes = [[task.meta["row"] for task in tasks[at : at + 50]] for at in (0, 50, 100)]
    assert all(sorted(these) == sorted(f"r{i}" for i in range(50)) for these in passes)
    assert len({tuple(these) for these in passes}) == 3
    assert len({task.id for task in tasks}) == len({task.uid for task in tasks}) == 150
    assert tasks[77] == family.task("train", 77) and tasks[77].id == "own/train/77"
    other = family_of({"train": rows_of(50)}, seed=4)
    assert [other.task("train", i).meta["row"] for i in range(50)] != passes[0]
    assert [family.task("test", i).answer for i in range(5)] == ["0", "1", "2", "3", "4"]
    for split, index, said in (
        ("test", 5, "tasks 0 to 4, not 5"),
        ("train", -1, "not -1"),
        ("validation", 0, "no val"),
    ):
        with pytest.raises(ValueError, match=said):
            family.task(split, index)
    with pytest.raises(ValueError, match="difficulty 2 only"):
        family.task("train", 0, 3)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        family.size("dev")


def test_a_share_is_held_out_and_equal_problems_stay_together():
    rows = [*rows_of(1000), *[Row(f"copy{i}", f"p  {i}", str(i), "math", {}) for i in range(1000)]]
    family = family_of({"train": rows, "test": rows_of(3)}, validation=0.1)
    sizes = {split: family.size(split) for split in ("train", "validation", "test")}
    assert sizes["train"] + sizes["validation"] == 2000 and 140 < sizes["validation"] < 260 and sizes["test"] == 3
    sides = {s: {family.task(s, i).meta["row"] for i in range(sizes[s])} for s in ("train", "validation")}
    assert not sides["train"] & sides["validation"]
    assert {f"copy{row[1:]}" for row in sides["validation"] if row[0] == "r"} <= sides["validation"]
    moved = family_of({"train": rows[::-1]}, validation=0.1)
    assert {moved.task("validation", i).meta["row"] for i in range(moved.size("validation"))} == sides["validation"]
    own = family_of({"train": rows_of(9), "validation": rows_of(4)}, validation=0.5)
    assert (own.size("train"), own.size("validation")) == (9, 4)


def test_use_says_which_splits_there_are():
    splits = {"train": rows_of(40), "test": rows_of(5)}
    assert [family_of(splits, use="train").size(s) for s in ("train", "test")] == [40, 0]
    assert [family_of(splits, use="test").size(s) for s in ("train", "validation", "test")] == [0, 0, 5]
    with pytest.raises(DatasetError, match=r"no rows for use='test' \(splits: train\)"):
        family_of({"train": rows_of(3)}, use="test")
    with pytest.raises(ValueError, match="max_calls=-1"):
        family_of(splits, max_calls=-1)


def test_a_task_is_small_and_graded_by_its_row():
    tests = {"inputs": ["1"], "outputs": ["2"], "fn_name": None}
    rows = [Row("x", "p", "", "program", {"tests": tests, "difficulty": "easy", "source": "s", "solution": "long"})]
    seen = []
    family = DatasetFamily(
        "own",
        {"test": rows},
        Calculator(),
        lambda *given: seen.append(given) or Grade(True, 1.0, ""),
        checker="",
        max_calls=3,
    )
    task = family.task("test", 0)
    assert isinstance(task, Task) and type(task) is RowTask and task.max_steps == 3 and task.difficulty == 2
    assert task.meta == {"row": "x", "split": "test", "at": 0, "grader": "program", "source": "s"}
    json.dumps(dict(task.meta))
    assert family.grade(task, "```python\n```", None).success and seen == [
        ("program", "```python\n```", "", rows[0].meta)
    ]
    assert family.start(task, 0) is None and family.first_irrecoverable(task, []) is None


def test_the_stream_draws_from_it():
    families = {"own": family_of({"train": rows_of(6), "test": rows_of(4)}), "exam": family_of({"test": rows_of(3)})}
    stream = TaskStream(families, dict.fromkeys(families, (2,)), seed=0)
    assert [task.difficulty for task in stream.first("own", "test", 10)] == [2] * 4
    assert sorted(stream.task("train", n).answer for n in range(6)) == list("012345")
    assert stream.names("train") == ["own"] and stream.names("test") == ["own", "exam"]


def test_prompts_follow_the_recipe():
    math = Row("0", "What is {x}?", "2", "math", {})
    prompt = prompt_of(math, training=True)
    order = [
        "step by step",
        "What is {x}?",
        "call the tool to calculate",
        "**",
        "high-level strategy",
        "\\boxed{}",
        "no units",
    ]
    assert [prompt.index(part) for part in order] == sorted(prompt.index(part) for part in order)
    assert prompt_of(math, training=False) == prompt.removesuffix(" Put no units inside the box.")
    assert "uppercase letter" in prompt_of(Row("0", "Which?", "A", "letter", {}), training=True)
    plain = prompt_of(math, training=True, plain=True)
    assert plain.startswith("What is {x}?\n\n") and "strategy" not in plain and "\\boxed{}" in plain
    function = {"tests": {"fn_name": "f"}, "starter_code": "def f({training}): # {domain}"}
    for plain in (False, True):
        assert "def f({training}): # {domain}\n```" in prompt_of(Row("0", "p", "", "program", function), False, plain)


# --- the published files ---


@needs_data
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gsm8k", "gsm8k"),
        ("math500", "math500/test.jsonl"),
        ("math500", "math_lvl3to5/test.parquet"),
        ("math_level3to5", "math_lvl3to5"),
        ("aime2024", "aime24/test.qwen25math.jsonl"),
        ("aime2024", "aime24/AIME24.retool.jsonl"),
        ("aime2024", "aime24/aime24.simpletir.parquet"),
        ("aime2025", "aime25/test.arpo.jsonl"),
        ("aime2025", "aime25/AIME25.retool.jsonl"),
        ("aime2025", "aime25/aime25.simpletir.parquet"),
        ("amc23", "amc23/test.jsonl"),
    ],
)
def test_the_published_files_are_taken(tmp_path, name, path):
    if not (DATA / path).exists():
        pytest.skip(f"ELPO_DATA has no {path}")
    dropped = {"math_level3to5": {"train": 2}}.get(name, {})
    if dropped:
        with pytest.raises(DatasetError, match=r"2 rows cannot be graded \(train\.parquet, row 5054: .* row 5158"):
            prepare(name, DATA / path, tmp_path / "out", form="jsonl")
    manifest = prepare(name, DATA / path, tmp_path / "out", form="jsonl", drop_unanswered=bool(dropped))
    assert set(manifest["splits"]) == set(PUBLISHED[name].rows)
    for split, facts in manifest["splits"].items():
        assert facts["checked"] == "count and content" and facts["dropped"] == dropped.get(split, 0)
        rows = open_rows(tmp_path / "out", split)
        assert (len(rows) + facts["dropped"],) == PUBLISHED[name].rows[split]
        assert len({row.id for row in rows}) == len(rows) and all(row.answer and row.problem for row in rows)


@needs_data
def test_one_digit_or_one_row_changed_is_refused(tmp_path):
    lines = (DATA / "gsm8k" / "test.jsonl").read_bytes().splitlines(keepends=True)
    changed = lines[700].replace(b"#### ", b"#### 1")
    for rows, said in (
        ([*lines[:700], changed, *lines[701:]], "content hash"),
        ([*lines[:700], lines[0], *lines[701:]], "content hash"),
        (lines[:-1], "expected 1319 rows, found 1318"),
    ):
        with pytest.raises(DatasetError, match=said):
            prepare("gsm8k", put(tmp_path / "test.jsonl", b"".join(rows)), tmp_path / "out", form="jsonl")
    assert prepare("gsm8k", put(tmp_path / "test.jsonl", b"".join(lines[::-1])), tmp_path / "out", form="jsonl")


@needs_data
def test_tests_of_real_problems_survive_packing(tmp_path):
    path = DATA / "livecodebench_sample" / "code_eval_live_code_bench_v1.jsonl"
    if not path.exists():
        pytest.skip("ELPO_DATA has no livecodebench_sample")
    for raw in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        with pytest.raises(DatasetError, match="opcode EMPTY_DICT"):
            unpack(raw["test"])  # packed by somebody else, as a dict
        tests = json.loads(pickle.loads(zlib.decompress(base64.b64decode(raw["test"])))["input_output"])
        kind = "functional" if tests.get("fn_name") else "stdin"
        cases = [
            {"input": i, "output": o, "testtype": kind} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)
        ]
        row = {"public_test_cases": json.dumps(cases[:1]), "private_test_cases": packed(json.dumps(cases[1:]))}
        row["metadata"] = json.dumps({"func_name": tests.get("fn_name")})
        found = read_tests(row)
        assert (found["inputs"], found["outputs"]) == (tests["inputs"], tests["outputs"])
        assert found["fn_name"] == tests.get("fn_name") and parse_tests(found)
