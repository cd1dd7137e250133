"""The run folder changes hands only when a run has begun, and what is wrong with a run shows before it begins."""

import dataclasses
import importlib.util
import json
import subprocess
import types

import pytest

from elpo_jax.config import Config, ConfigError, DatasetConfig, EvalConfig, TasksConfig, TokenizerConfig, to_json
from elpo_jax.overrides import override
from elpo_jax.rollout.sampler import SamplerConfig
from elpo_jax.text.tokenizer import ByteTokenizer
from elpo_jax.tools import reference
from elpo_jax.tools.base import Status, ToolCall
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.observation import MARKER
from elpo_jax.tools.toolbox import Request
from elpo_jax.train import provenance
from elpo_jax.train.setup import (
    build_environment,
    build_tokenizer,
    check_prompts,
    demonstration_rows,
    open_tools,
    open_workdir,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_fails_before_its_first_stage_gives_the_folder_back(tmp_path):
    with pytest.raises(ConfigError, match="the prompt is too long"), open_workdir(tmp_path / "run", Config(), False):
        (tmp_path / "run" / "tokenizer.model").write_text("of the bad config")
        (tmp_path / "run" / "compile_cache").mkdir()
        raise ConfigError("the prompt is too long")
    assert names(tmp_path / "run") == [".lock", "compile_cache"]
    with open_workdir(tmp_path / "run", Config(seed=1), False):
        pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


def test_what_fails_or_is_stopped_later_keeps_the_folder(tmp_path):
    for error, resume in ((KeyboardInterrupt, False), (ValueError, True), (ValueError, True)):
        with pytest.raises(error), open_workdir(tmp_path, Config(), resume):
            (tmp_path / "tokenizer.model").touch()
            raise error
        assert {"config.json", "tokenizer.model"} < set(names(tmp_path))
    other = tmp_path / "other"
    with pytest.raises(RuntimeError), open_workdir(other, Config(), False):
        (other / "elpo").mkdir()
        raise RuntimeError("in the middle of a stage")
    assert names(other) == [".lock", "config.json", "elpo"]


def test_leftovers_of_a_kill_do_not_take_a_folder(tmp_path):
    for name in (".lock", ".config-json-partial"):
        (tmp_path / name).write_text("")
    (tmp_path / "compile_cache").mkdir()
    with open_workdir(tmp_path, Config(), False):
        pass
    (tmp_path / "config.json").unlink()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and holds no run"), open_workdir(tmp_path, Config(), False):
        pass


def test_there_has_to_be_a_run_to_resume(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="holds no run to resume"), open_workdir(folder, Config(), True):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"seed": 0'])
def test_a_damaged_config_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"config\.json is damaged"), open_workdir(tmp_path, Config(), resume):
            pass
    assert path.read_bytes() == content


def test_one_process_at_a_time(tmp_path):
    with open_workdir(tmp_path, Config(), False):
        with pytest.raises(ConfigError, match="another process"), open_workdir(tmp_path, Config(), True):
            pass
        assert json.loads((tmp_path / "config.json").read_text()) == to_json(Config())


@pytest.mark.parametrize(("eval_every", "at_the_end", "validation"), [(0, 0, 0), (2, 0, 2), (0, 1, 1), (2, 5, 5)])
def test_every_prompt_that_a_run_will_meet_is_checked(eval_every, at_the_end, validation):
    changes = ["rl.steps=3", "rl.prompts=4", "rl.eval_tasks=2", "eval.tasks=3", f"rl.eval_every={eval_every}"]
    changes += [f"eval.validation_tasks={at_the_end}", "tasks.wordmath.demonstrations=10"]
    config = override(Config(), [*changes, "tasks.ledger.demonstrations=7"])
    stream = types.SimpleNamespace(
        names=lambda split: ["wordmath", "ledger"],
        task=lambda split, n: (split, n),
        first=lambda family, split, count: [(family, split, i) for i in range(count)],
    )
    checked = []
    environment = types.SimpleNamespace(check=lambda task, context: checked.append((task, context)))
    check_prompts(config, environment, stream)
    wanted = [("train", n) for n in range(20, 20 + 3 * 4)]
    for split, count in (("validation", validation), ("test", 3)):
        wanted += [(family, split, i) for family in ("wordmath", "ledger") for i in range(count)]
    assert checked == [(task, 256) for task in wanted]


def interpreter_of(config, *code):
    """What the interpreter of a run with this config answers, once there is a tokenizer, and the tool."""
    with open_tools(config) as (stream, toolboxes, sandbox):
        build_environment(config, ByteTokenizer(), stream, toolboxes, sandbox)
        (tool,) = stream.families["wordmath"].tools
        requests = [Request(ToolCall("code_interpreter", {"code": text})) for text in code]
        return [result for result, _ in toolboxes["wordmath"].run_many(requests)], tool


def test_what_the_config_says_of_the_interpreter_reaches_it():
    code = ("1 / 0", "import numpy\nprint(numpy.arange(3).sum())", "print('x' * 70)", "print('y' * 999)", "a = 7")
    base = ["tasks.families=wordmath"]
    (error, package, short, long, silent), tool = interpreter_of(override(Config(), base), *code)
    assert error.text == "ZeroDivisionError: division by zero" and tool.description == CodeInterpreter.description
    assert (package.status, package.text) == (Status.OK, "3") and silent.status is Status.EMPTY
    assert short.text == "x" * 70 and len(long.text) == 128 and long.truncated and MARKER in long.text
    changes = ["interpreter_tokens=64", "interpreter_traceback=frames", "interpreter_packages=()"]
    config = override(Config(), base + [f"rollout.{change}" for change in changes])
    (error, package, short, long, silent), tool = interpreter_of(config, *code)
    assert error.text.endswith("ZeroDivisionError: division by zero") and MARKER in error.text
    roomy = override(config, ["rollout.interpreter_tokens=500"])
    assert 'File "<code>", line 1' in interpreter_of(roomy, "1 / 0")[0][0].text
    assert (package.status, package.detail) == (Status.ERROR, "ModuleNotFoundError")
    assert short.truncated and len(short.text) == len(long.text) == 64
    config = override(config, ["rollout.interpreter_reference=true"])
    (error, package, short, long, silent), tool = interpreter_of(config, *code)
    assert tool.description == reference.DESCRIPTION
    assert silent.status is Status.ERROR, "a line is put into print(...), whatever it says"
    assert short.text == "x" * 70 + "\n" and len(long.text) == reference.MOST_CHARS + len("...(truncated)...")


def test_answers_from_before_there_was_a_tokenizer_are_forgotten():
    config = override(Config(), ["tasks.families=wordmath", "rollout.interpreter_packages=()"])
    with open_tools(config) as (stream, toolboxes, sandbox):
        request = Request(ToolCall("code_interpreter", {"code": "print('x' * 500)"}))
        before, _ = toolboxes["wordmath"].submit(request).result()
        build_environment(config, ByteTokenizer(), stream, toolboxes, sandbox)
        after, _ = toolboxes["wordmath"].submit(request).result()
    assert before.text == "x" * 500 and len(after.text) == 128 == config.rollout.interpreter_tokens


def test_a_result_says_whether_the_working_tree_was_that_of_its_commit(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "provenance.py"
    file.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    monkeypatch.setattr(provenance, "__file__", str(file))
    short = git("rev-parse", "--short", "HEAD")
    (tmp_path / "untracked").touch()
    assert provenance.provenance()["commit"] == short
    file.write_text("2")
    assert provenance.commit() == f"{short}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None, "without git"


def gsm8k_like(tmp_path, count=40):
    """Rows of our own in the manner of GSM8K, with a calculator mark each."""
    rows = [
        {
            "problem": f"Ann has {n} boxes of {n + 2} pens. How many pens has she?",
            "answer": str(n * (n + 2)),
            "grader": "math",
            "meta": {"solution": f"She has {n}*{n + 2}=<<{n}*{n + 2}={n * (n + 2)}>>{n * (n + 2)} pens."},
        }
        for n in range(3, 3 + count)
    ]
    for name, part in (("train", rows[8:]), ("test", rows[:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    numbers = DatasetConfig(
        "pens", str(tmp_path), tool="calculator", checker="exact", plain=True, max_calls=3, demonstrations=99
    )
    return Config(
        tasks=TasksConfig(families=("pens",), datasets=(numbers,)),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300, texts=30),
        sampler=SamplerConfig(slots=4, context=512),
        eval=EvalConfig(tasks=99),
    )


def test_a_data_set_is_a_family_like_the_others(tmp_path):
    config = gsm8k_like(tmp_path).check()
    with open_tools(config) as (stream, toolboxes, sandbox):
        assert sandbox is None, "a calculator runs no programs"
        tokenizer = build_tokenizer(config, tmp_path, stream, toolboxes)
        environment = build_environment(config, tokenizer, stream, toolboxes, sandbox)
        check_prompts(config, environment, stream)
        tests = stream.first("pens", "test", config.eval.tasks)
        assert [task.answer for task in tests] == [str(n * (n + 2)) for n in range(3, 11)]
        family = environment.families["pens"]
        right = family.grade(tests[0], "So it is \\boxed{15}.", None)
        assert right.success and not family.grade(tests[0], "\\boxed{16}", None).success
        batch, failed, long = demonstration_rows(config, environment, stream)
        assert (int((batch.positions == 0).sum()), failed, long) == (family.size("train"), 0, 0)
        assert "exact" in family.checker and "3 calls of calculator" in config.tasks.of("pens").line()
    assert (tmp_path / "tokenizer.json").exists()
    test_only = dataclasses.replace(config.tasks.datasets[0], use="test")
    with pytest.raises(ConfigError, match="none to train on"):
        dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, datasets=(test_only,))).check()


def test_a_missing_grader_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = override(gsm8k_like(tmp_path), ["tasks.datasets.0.checker=default"])
    with pytest.raises(ConfigError, match=r"data set pens: .*math-verify.*checker=exact"), open_tools(config):
        pass


def test_a_protocol_about_so_many_rows_is_not_measured_on_others(tmp_path):
    config = gsm8k_like(tmp_path)
    with open_tools(override(config, ["tasks.datasets.0.rows=8"])):
        pass
    with (
        pytest.raises(ConfigError, match="has 8 test rows and the protocol of pens is about 131"),
        open_tools(override(config, ["tasks.datasets.0.rows=131"])),
    ):
        pass


def test_data_sets_are_checked_like_everything_else(tmp_path):
    config = gsm8k_like(tmp_path)
    for change, message in (
        ("tasks.datasets.0.validation=1", "validation=1.0 at least 0 and less than 1"),
        ("tasks.datasets.0.max_calls=-1", "max_calls=-1"),
        ("tasks.datasets.0.k=-1", "k=-1 must be at least 0"),
        ("tasks.datasets.0.name=ledger", "a different name for each"),
        ("tasks.datasets.0.tool=sql", "must be one of calculator, code_interpreter"),
        ("tasks.families=pencils", "unknown family 'pencils'.* pens"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(config, [change])
    missing = override(config, [f"tasks.datasets.0.path={tmp_path / 'none'}"])
    with pytest.raises(ValueError, match="holds no data set"), open_tools(missing):
        pass
