"""The wordmath family: its arithmetic, its words, its splits, its reference policy and its grader."""

import collections
import re
import string
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_jax.tasks import phrases
from elpo_jax.tasks.base import SPLITS
from elpo_jax.tasks.boxed import canonical, grade_boxed, last_boxed, read_number
from elpo_jax.tasks.stories import MOVES, QUESTIONS, STARTS
from elpo_jax.tasks.wordmath import WordMath, split_of
from elpo_jax.tools.base import Status, ToolResult

# Numbers that a prompt may state by a word instead of digits.
WORDS = {2: r"half|twice|doubled", 3: r"triple", 7: r"weeks", 12: r"dozen", 100: r"cents"}


class Interpreter:
    """Stands in where no program is run."""

    name = "code_interpreter"


FAMILY = WordMath(Interpreter())


def tasks(count, difficulties=range(2, 11), split="train"):
    return [FAMILY.task(split, i, difficulties[i % len(difficulties)]) for i in range(count)]


def evaluate(chain):
    """Every result of a chain, by exact fractions and nothing of the package."""
    results = []
    for operator, left, right in chain:
        u, v = (results[int(o[1:]) - 1] if isinstance(o, str) else Fraction(o) for o in (left, right))
        results.append({"+": u + v, "-": u - v, "*": u * v, "//": u / v}[operator])
    return results


def digits(prompt):
    return [int(n) for n in re.findall(r"\d+", prompt)]


@pytest.mark.parametrize("difficulty", range(2, 11))
def test_answers_follow_from_the_chain(difficulty):
    for task in tasks(200, [difficulty]):
        chain = task.meta["chain"]
        results = evaluate(chain)
        assert len(chain) == task.difficulty == difficulty and task.max_steps == difficulty + 2
        assert all(r.denominator == 1 and 2 <= r <= 9999 for r in results), (task.prompt, results)
        assert task.answer == str(results[-1]) and [str(r) for r in results] == [str(r) for r in task.meta["results"]]
        used = {o for operation in chain for o in operation[1:] if isinstance(o, str)}
        assert used == {f"#{k}" for k in range(1, difficulty)}, "a result that nothing uses is not a needed step"


def test_prompts_state_every_needed_number_and_no_other():
    for task in tasks(2000):
        written = collections.Counter(digits(task.prompt))
        needed = {o for operation in task.meta["chain"] for o in operation[1:] if not isinstance(o, str)}
        for number in needed - set(written):
            assert re.search(WORDS[number], task.prompt, re.IGNORECASE), (number, task.prompt)
        idle = collections.Counter(task.meta["distractors"])
        assert set(written - idle) <= needed, task.prompt
        assert not idle - written, task.prompt


def test_operands_are_moderate():
    literals = [o for t in tasks(2000) for step in t.meta["chain"] for o in step[1:] if not isinstance(o, str)]
    assert min(literals) == 2 and sorted(set(literals))[-2:] == [99, 100]  # 100 cents in a dollar


# Read and solved by hand; they also hold the generator still between versions of Python.
BY_HAND = (
    (
        ("train", 0, 2),
        "Zoe had 90 toys. A year later Zoe had 11 times as many toys. She kept only half of them. How many "
        "toys does she still have?",
        "495",
    ),
    (
        ("train", 1, 3),
        "Ivy had 81 rabbits. For 3 weeks Raj planted 3 tulips a day. How many dollars does he get for them at "
        "3 dollars each?",
        "189",
    ),
    (
        ("validation", 2, 4),
        "On a train there were 3 rows of 12 people. The train picked up 94 people. At 2 stops, 8 people got "
        "on each time. How many people are on the train in the end?",
        "146",
    ),
    (
        ("test", 7, 5),
        "Ana had 94 cats. Ben saved 59 dollars. It was 8 degrees outside. He lost 8 dollars. Soon he had 5 "
        "times that amount. He paid 96 dollars for a ring. Soon he had triple that amount. A year later he "
        "had 4 times as much money. How many dollars does he have now?",
        "1908",
    ),
    (
        ("train", 12, 7),
        "Finn baked 4 dozen cakes. Ana was 14 years old. Finn bought 60 more cakes. In 4 weeks, Ana gave him "
        "9 every day. He bought 59 more cakes. Each cake weighs 12 pounds. How many pounds is that in all?",
        "5028",
    ),
    (
        ("test", 3, 10),
        "24 men and 40 women were on a train. 7 groups of 5 people got on. 98 people got on. The train let 65 "
        "people off. 42 people got on. Half of them left at the next stop. 8 groups of 9 people got on. Each "
        "pays 4 dollars. How many dollars do they pay in all?",
        "636",
    ),
)


@pytest.mark.parametrize(("where", "prompt", "answer"), BY_HAND)
def test_tasks_solved_by_hand(where, prompt, answer):
    task = FAMILY.task(*where)
    assert (task.prompt, task.answer) == (prompt, answer)


def test_a_task_is_a_function_of_seed_split_index_and_difficulty():
    again = WordMath(Interpreter())
    wheres = [(split, i, d) for split in SPLITS for i in (0, 1, 500) for d in (2, 6, 10)]
    assert [FAMILY.task(*w) for w in wheres] == [again.task(*w) for w in reversed(wheres)][::-1]
    made = [family.task(*w) for family in (FAMILY, WordMath(Interpreter(), seed=1)) for w in wheres]
    assert len({t.prompt for t in made}) == 2 * len(wheres)
    assert len({t.id for t in made}) == len({t.uid for t in made}) == len(wheres)
    assert all(0 <= t.uid < 2**31 for t in made)


def test_difficulty_split_index_and_slack_outside_their_range_raise():
    for where, words in (
        (("train", 0, 1), "difficulties 2 to 10, not 1"),
        (("train", 0, 11), "difficulties 2 to 10, not 11"),
        (("train", -1, 2), "index -1"),
        (("dev", 0, 2), "train, validation, test"),
    ):
        with pytest.raises(ValueError, match=words):
            FAMILY.task(*where)
    with pytest.raises(ValueError, match="slack=-1"):
        WordMath(Interpreter(), slack=-1)
    with pytest.raises(ValueError, match="code_interpreter"):
        WordMath(type("Other", (), {"name": "calculator"})())
    assert WordMath(Interpreter(), slack=0).task("test", 3, 4).max_steps == 4


@pytest.mark.slow
def test_no_prompt_is_in_two_splits():
    # The shortest stories are the likeliest to be told twice.
    seen = {split: {t.prompt for t in tasks(20_000, (2,), split)} for split in SPLITS}
    assert all(len(prompts) > 19_900 for prompts in seen.values())
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    # By construction: the numbers alone tell the split, so neither can a prompt that only changes the words.
    for split, prompts in seen.items():
        longer = {t.prompt for t in tasks(500, range(3, 11), split)}
        assert all(split_of(digits(prompt)) == split for prompt in prompts | longer)


def skeleton(sentence):
    """A sentence without its numbers, people and things."""
    things = {w for t in phrases.THEMES for pair in (*t.nouns, *t.containers) for w in pair}
    things |= {w for pair in (*phrases.ITEMS, *phrases.VANS, *phrases.BOXES) for w in pair}
    things |= {*phrases.VEHICLES, *phrases.PETS}
    people = {*phrases.WOMEN, *phrases.MEN, "She", "He", "she", "he", "her", "his", "him"}
    kinds = {**dict.fromkeys(things, "THING"), **dict.fromkeys(people, "PERSON")}
    return " ".join("NUMBER" if w.isdigit() else kinds.get(w, w) for w in re.findall(r"\w+", sentence))


def test_prompts_are_diverse_and_short():
    made = tasks(3000)
    stories = [[skeleton(s) for s in re.split(r"(?<=[.?]) ", t.prompt)] for t in made]
    sentences = collections.Counter(s for story in stories for s in story)
    assert len(sentences) > 350
    assert max(sentences.values()) < 0.07 * sum(sentences.values())
    assert len(set(map(tuple, stories))) > 0.98 * len(stories)
    assert sum(len(t.prompt.split()) for t in made) / sum(t.difficulty for t in made) < 15
    operators = collections.Counter(step[0] for t in made for step in t.meta["chain"])
    assert min(operators.values()) > 0.12 * sum(operators.values()) and len(operators) == 4
    assert 0.3 < sum(bool(t.meta["distractors"]) for t in made) / len(made) < 0.9
    words = {w for t in made for w in re.findall(r"[A-Za-z]+", t.prompt)}
    assert 250 < len(words) < 450, "few enough words for a model of half a million parameters"
    refers_back = [t for t in made if "at first" in t.prompt.lower().split(".", 1)[-1] or "before that" in t.prompt]
    assert len(refers_back) > 100


def test_every_move_has_phrases_that_show_its_numbers_in_order():
    sources = {"things": phrases.THINGS, "packs": phrases.THINGS, "goods": phrases.THINGS}
    sources |= {"money": phrases.MONEY, "people": phrases.PEOPLE}
    for name, move in {**STARTS, **MOVES, **QUESTIONS}.items():
        drawn = sorted({o for step in move.operations() for o in step[1:]} & {"a", "b"}) or (["a"] * (name in STARTS))
        for unit in move.units:
            extra = [p for t in phrases.THEMES for p in t.phrases.get(name, ())] if unit == "things" else []
            for phrase in [*sources[unit][name], *extra]:
                fields = [field for _, field, _, _ in string.Formatter().parse(phrase) if field]
                assert [f for f in fields if f in "ab"] == drawn, (name, phrase)


def run(task, mistake_rate=0.0, answer=None, seed=0):
    """The turns of the reference policy, its programs answered by `answer(code)`."""
    demonstrator = FAMILY.demonstrate(task, np.random.default_rng(seed), mistake_rate)
    turns = [next(demonstrator)]
    while "<tool_call>" in turns[-1]:
        turns.append(demonstrator.send(answer(turns[-1])))
    return turns


def test_reference_policy_computes_with_what_the_tool_said():
    task = next(t for t in tasks(50, [4]) if t.meta["chain"][1][1] == "#1")
    turns = run(task, answer=lambda turn: ToolResult(Status.OK, "31415"))
    assert len(turns) == 5 and "31415" in turns[1] and turns[-1] == "The answer is \\boxed{31415}."


def test_reference_policy_repeats_a_call_that_the_tool_failed():
    task = FAMILY.task("train", 0, 2)
    results = iter([ToolResult(Status.TIMEOUT, "Timed out."), ToolResult(Status.OK, "8"), ToolResult(Status.OK, "9")])
    turns = run(task, answer=lambda turn: next(results))
    assert len(turns) == 4 and turns[0] == turns[1] != turns[2]


def test_reference_policy_never_slips_more_often_than_it_can_repair():
    for task in tasks(200):
        results = iter(map(str, task.meta["results"]))
        said = run(task, 0.0, lambda turn, r=results: ToolResult(Status.OK, next(r)))
        assert len(said) == task.difficulty + 1 and all(turn.startswith("<tool_call>") for turn in said[:-1])
        clumsy = run(task, 1.0, lambda turn: ToolResult(Status.OK, "5"))
        assert len(clumsy) == task.max_steps + 1
        assert sum(turn[0] != "<" for turn in clumsy[:-1]) == task.max_steps - task.difficulty


BOXES = (
    (r"The answer is \boxed{57}.", "57"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\text{57 apples}} and \boxed{3", r"\text{57 apples}"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {7}", "7"),
    (r"\boxed{ 7 }", "7"),
    (r"\boxed{\{7\}}", r"\{7\}"),
    (r"\boxed{a\}", None),
    (r"\boxed{\boxed{9}}", "9"),
    (r"\boxed{1} \boxed{\boxed{2} 3", "2"),
    (r"} {{ \boxed{7} }", "7"),
    (r"\boxed{x_{1}}", "x_{1}"),
    (r"$\\boxed{7}$", "7"),
    (r"\boxed{}", ""),
    (r"\boxed 7", None),
    (r"boxed{7}", None),
    ("57", None),
    ("", None),
)


@pytest.mark.parametrize(("text", "box"), BOXES)
def test_last_boxed(text, box):
    assert last_boxed(text) == box


NUMBERS = (
    ("57", "57"),
    ("057", "57"),
    ("+57", "57"),
    ("-57", "-57"),
    ("−57", "-57"),
    ("57.", "57"),
    ("57.0", "57"),
    ("0.5", "1/2"),
    (".5", "1/2"),
    ("1/2", "1/2"),
    ("2/4", "1/2"),
    (r"\frac{2}{4}", "1/2"),
    (r"\dfrac{114}{2}", "57"),
    (r"-\frac{1}{2}", "-1/2"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"1\,234", "1234"),
    ("1,234,567.50", "2469135/2"),
    ("$57", "57"),
    (r"\$57", "57"),
    ("$57$", "57"),
    ("57 shells", "57"),
    (r"57\text{ dollars}", "57"),
    (r"57~\mathrm{US dollars}", "57"),
    ("57 Dollars.", "57"),
    (r"\text{57}", "57"),
    ("x = 57", "57"),
    ("", None),
    ("apples", None),
    ("12,34", None),
    ("1,2345", None),
    ("57 58", None),
    ("57 or 58", None),
    ("57 and a half", None),
    ("5 thousand", None),
    ("5 million dollars", None),
    ("50%", None),
    ("57 - 2", None),
    ("57+2", None),
    ("2*3", None),
    ("5^2", None),
    ("1e3", None),
    ("1e999999999", None),
    ("1/0", None),
    ("5..0", None),
    ("--5", None),
    ("5 red big old shells", None),
    ("٥٧", None),
    ("__import__('os')", None),
    ("inf", None),
    ("nan", None),
)


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_read_number(text, value):
    assert read_number(text) == (None if value is None else Fraction(value))


def test_hostile_lengths_take_linear_time():
    assert last_boxed("\\boxed{" * 50_000) is None
    assert last_boxed("\\boxed{" * 50_000 + "5" + "}" * 50_000) == "5"
    assert read_number("9" * 100_000) is None


GRADES = (
    (r"The answer is \boxed{1234}.", True, "correct", "1234"),
    (r"\boxed{1,234 shells}", True, "correct", "1234"),
    (r"\boxed{1234.00}", True, "correct", "1234"),
    (r"First \boxed{5}, no: \boxed{1234}", True, "correct", "1234"),
    (r"First \boxed{1234}, no: \boxed{5}", False, "wrong answer: got 5", "5"),
    (r"\boxed{1233}", False, "wrong answer: got 1233", "1233"),
    (r"\boxed{-1234}", False, "wrong answer: got -1234", "-1234"),
    (r"\boxed{1234 or 5}", False, "wrong answer: got 1234 or 5", "1234or5"),
    (r"\boxed{1233+1}", False, "wrong answer: got 1233+1", "1233+1"),
    (r"\boxed{" + "7" * 60 + "}", False, "wrong answer: got " + "7" * 40 + "...", "7" * 60),
    (r"\boxed{}", False, "no answer", ""),
    ("The answer is 1234.", False, "no answer", ""),
    ("", False, "no answer", ""),
)


@pytest.mark.parametrize(("text", "success", "reason", "answer"), GRADES)
def test_grades(text, success, reason, answer):
    grade = grade_boxed(text, "1234")
    assert (grade.success, grade.reward, grade.reason, grade.answer) == (success, float(success), reason, answer)


def test_the_family_grades_its_final_turn():
    task = FAMILY.task("test", 0, 3)
    assert FAMILY.grade(task, f"\\boxed{{{task.answer}}}", None).success
    assert not FAMILY.grade(task, f"\\boxed{{{task.answer}1}}", None).success
    assert FAMILY.start(task, 7) is None


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=1000))
def test_equal_numbers_have_one_canonical_form(number):
    forms = [str(number), f"  {number} dollars", f"{number.numerator * 3}/{number.denominator * 3}"]
    if number.denominator == 1:
        forms += [f"{number.numerator:,}", f"{number}.000", f"\\text{{{number}}}"]
    assert {canonical(form) for form in forms} == {str(number)}
    assert canonical(str(number + 1)) != str(number)


@given(st.text(st.sampled_from("\\boxed{}0123.,/ -$abfrctext\n") | st.characters(), max_size=60))
def test_any_text_is_graded_without_raising(text):
    grade = grade_boxed("\\boxed{" + text, "5")
    assert grade.success == (grade.answer == "5")
