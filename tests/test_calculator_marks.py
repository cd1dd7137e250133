"""GSM8K's calculator marks as tool calls: the transcripts, and what the real tools make of every mark."""

import json
import os
import pathlib
import re

import numpy as np
import pytest

from elpo_jax.tasks import calculator_marks
from elpo_jax.tasks.base import Grade
from elpo_jax.tasks.boxed import grade_boxed
from elpo_jax.tasks.calculator_marks import Mark, audit, find_marks, mismatch, turns
from elpo_jax.tasks.dataset import DatasetFamily
from elpo_jax.tasks.rows import Row
from elpo_jax.text.chat import ChatFormat
from elpo_jax.text.tokenizer import ByteTokenizer
from elpo_jax.tools.base import Status, ToolResult
from elpo_jax.tools.calculator import Calculator
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.toolbox import ToolBox
from elpo_jax.trees.demonstrate import demonstrate
from elpo_jax.trees.trajectory import Finish

SOLUTION = "Half of 48 is 48/2 = $<<48/2=24>>24.\nBoth are 48+24 = <<48+24=72>>72 clips."
TRAIN = pathlib.Path(os.environ.get("ELPO_DATA", "no-data")) / "gsm8k" / "train.jsonl"
needs_data = pytest.mark.skipif(not TRAIN.is_file(), reason="ELPO_DATA has no gsm8k/train.jsonl")


def row(solution, answer="72", identity="0"):
    return Row(identity, f"Problem {identity}?", answer, "math", {"solution": solution})


def grade(kind, text, reference, meta) -> Grade:
    assert kind == "math"
    return grade_boxed(text, reference)


def test_a_solution_becomes_turns_that_continue_as_written():
    said = turns(SOLUTION, "72", "calculator")
    assert said == [
        'Half of 48 is 48/2 = $<tool_call>\n{"name": "calculator", "arguments": {"expression": "48/2"}}\n</tool_call>',
        '24.\nBoth are 48+24 = <tool_call>\n{"name": "calculator", "arguments": {"expression": "48+24"}}\n</tool_call>',
        "72 clips.\nThe answer is \\boxed{72}.",
    ]
    assert '{"name": "code_interpreter", "arguments": {"code": "48/2"}}' in turns(SOLUTION, "72", "code_interpreter")[0]


@pytest.mark.parametrize(
    ("solution", "why"),
    [
        ("It is 72.", "no calculator marks"),
        ("<<48/2=25>>25", "does not reproduce <<48/2=25>> (the answer is 24)"),
        ("<<x/2=24>>24", "unexpected 'x'"),
        ("<<24>>24", "incomplete"),
        ("<<48/2=24=24>>24", "incomplete"),
        ("<<48/0=24>>24", "division by zero"),
        ("<<48/2=two dozen>>24", "the mark is no number"),
    ],
)
def test_what_the_calculator_does_not_reproduce_makes_no_transcript(solution, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        turns(solution, "72", "calculator")


@pytest.mark.parametrize(
    ("value", "answer", "same"),
    [
        ("24", "24", True),
        ("24", "24.0", True),
        ("1,000", "1000", True),
        ("$5", "5", True),
        (".5", "0.5", True),
        ("0.33", "1/3, about 0.333333", True),
        ("0.34", "1/3, about 0.333333", False),
        ("0", "1/3, about 0.333333", False),
        ("0.3", "0.30000000000000004", True),
        ("3", "3.0000001", False),
        ("10000000", "10000001", False),
        ("24", "", False),
        ("24", "None", False),
        ("24", "nan", False),
        ("-", "24", False),
        ("1e999999999", "1", False),
    ],
)
def test_numbers_are_compared_as_they_are_shown(value, answer, same):
    assert (mismatch(Mark("x", value, 0, 0), ToolResult(Status.OK, answer + "\n")) is None) is same


def test_a_demonstration_is_played_with_the_real_tool_and_graded():
    rows = [row(SOLUTION), row("No marks.", identity="1"), row("<<1+1=3>>3", identity="2"), row(SOLUTION, "71", "3")]
    family = DatasetFamily("own", {"train": rows}, Calculator(), grade, checker="box", max_calls=2, validation=0)
    shown = [family.task("train", index) for index in family.demonstrable("train")]
    assert {task.meta["row"] for task in shown} == {"0", "3"}
    chat = ChatFormat(ByteTokenizer())
    with ToolBox(family.tools) as toolbox:
        by_row = {t.meta["row"]: demonstrate(family, t, toolbox, chat, np.random.default_rng(0), 0.5) for t in shown}
    played = by_row["0"]
    assert played.success and played.finish is Finish.ANSWER and played.answer == "72"
    assert [step.result.text for step in played.steps[:-1]] == ["24", "72"]
    unmarked = next(family.task("train", i) for i in range(4) if family.task("train", i).meta["row"] == "1")
    with pytest.raises(ValueError, match=r"own/train/\d \(row 1\) cannot be demonstrated .* no calculator marks"):
        family.demonstrate(unmarked, np.random.default_rng(0))


def test_a_solution_with_more_calls_than_allowed_is_not_demonstrated():
    family = DatasetFamily(
        "own", {"train": [row(SOLUTION)]}, Calculator(), grade, checker="", max_calls=1, validation=0
    )
    assert list(family.demonstrable("train")) == []
    with pytest.raises(ValueError, match="2 calls, and max_calls is 1"):
        family.demonstrate(family.task("train", 0), np.random.default_rng(0))


def test_programs_reproduce_marks_too():
    rows = [row("<<0.1*3=0.3>>", identity="0"), row("<<560//10=56>> <<+7=7>> <<1/3=0.33>> <<2+2=5>>", identity="1")]
    with CodeInterpreter() as interpreter:
        done = audit(rows, interpreter)
    assert (done.rows, done.unmarked, done.broken, done.marks) == (2, 0, 1, 5)
    assert done.misses == (("1", "<<2+2=5>>", "the answer is 4"),)


def test_the_report_lists_what_is_not_reproduced(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    answers = [SOLUTION + "\n#### 72", "<<1+1=3>>3\n#### 3", "no mark\n#### 1"]
    path.write_text("".join(json.dumps({"question": "q", "answer": answer}) + "\n" for answer in answers))
    calculator_marks.main([str(path)])
    printed = capsys.readouterr().out
    assert "3 solutions, 1 without a mark, 1 with one that is not reproduced" in printed
    assert "2 of 3 marks are reproduced (66.667 %)" in printed and "row 1: <<1+1=3>>: the answer is 2" in printed
    with pytest.raises(SystemExit, match="does not exist"):
        calculator_marks.main([str(tmp_path / "nowhere.jsonl")])


@needs_data
def test_all_marks_of_the_training_solutions():
    """Counted against the file itself, read here without the package's readers."""
    raws = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    solutions = [raw["answer"].split("\n#### ")[0] for raw in raws]
    done = audit([row(s, identity=str(i)) for i, s in enumerate(solutions)], Calculator())
    assert (done.rows, done.marks) == (7473, sum(s.count("<<") for s in solutions))
    assert (done.unmarked, done.broken, len(done.misses)) == (95, 12, 14)
    # What the calculator has no grammar for: a leading plus and //.
    assert all(re.search(r"<<\+|//|\*\+", mark) and "unexpected" in why for _, mark, why in done.misses)
    # The text without its marks is what the solution reads like to a person, so nothing may be lost on the way.
    for solution in solutions[:500]:
        if find_marks(solution):
            said = turns(solution, "7", "calculator") if "//" not in solution and "<<+" not in solution else []
            text = "".join(re.sub(r"<tool_call>.*?</tool_call>", "", turn, flags=re.DOTALL) for turn in said)
            assert not said or text == re.sub("<<.*?>>", "", solution).rstrip() + "\nThe answer is \\boxed{7}."
