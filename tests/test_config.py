"""Overrides are typed and typos are errors."""

import dataclasses
import itertools
import math

import pytest

from elpo_jax.config import (
    Config,
    ConfigError,
    EvalConfig,
    LedgerConfig,
    RlConfig,
    RolloutConfig,
    TasksConfig,
    TokenizerConfig,
    differences,
    to_json,
)
from elpo_jax.overrides import load, override
from elpo_jax.policy.recipes import elpo, grpo


def test_overrides_are_read_as_the_type_of_their_field():
    config = override(
        Config(),
        [
            "algo.eps_elc=0",
            "algo.search.budget=8",
            "tasks.families=ledger",
            "tasks.ledger.difficulties=2,5",
            "model.qk_norm=false",
            "algo.search.entropy_window=none",
            "against.0.eps_high=0.28",
            "rl.optimizer.lr=1e-4",
        ],
    )
    assert config.algo.eps_elc == 0.0 and isinstance(config.algo.eps_elc, float)
    assert config.algo.search.budget == 8
    assert config.tasks.families == ("ledger",) and config.tasks.ledger.difficulties == (2, 5)
    assert config.model.qk_norm is False
    assert config.algo.search.entropy_window is None
    assert config.against[0].eps_high == 0.28
    assert config.rl.optimizer.lr == 1e-4
    assert override(config, ["against=()"]).against == ()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("algo.eps_ecl=0.1", "did you mean 'eps_elc'"),
        ("alog.eps_elc=0.1", "did you mean 'algo'"),
        ("algo.eps_elc=small", "not a finite number"),
        ("rl.steps=2.5", "not an int"),
        ("model.qk_norm=maybe", "not a bool"),
        ("tokenizer.kind=wordpiece", "must be one of sentencepiece, bpe, byte, checkpoint"),
        ("algo", "key=value"),
        ("algo=elpo", "is a group"),
        ("seed.value=1", "goes deeper"),
        ("against.3.eps_low=0.1", "not an index"),
        ("rl.updates=5", "not a multiple"),
        ("algo.name=grpo", "different names"),
        ("tasks.families=", "empty"),
        ("seed=-1", "at least 0 and at most 4294967295"),
        ("cpu_devices=0", "at least 1"),
        ("eval.k=0", "at least 1"),
        ("eval.bootstrap=0", "at least 1"),
        ("eval.temperature=-1", "at least 0"),
        ("eval.temperature=nan", "not a finite number"),
        ("rollout.temperature=0", "at least 0.001"),
        ("rollout.temperature=inf", "not a finite number"),
        ("rollout.interpreter_memory_mb=1", "rollout.interpreter_memory_mb=1 must be at least 64"),
        ("rollout.interpreter_tokens=63", "rollout.interpreter_tokens=63 must be at least 64"),
        ("rollout.interpreter_traceback=all", "must be one of frames, last_line"),
        ("rollout.interpreter_reference=1.5", "not a bool"),
        ("sft.save_every=0", "at least 1"),
        ("sft.steps=-1", "at least 0"),
        ("sft.slack=-1", "at least 0"),
        ("sft.mistake_rate=1.5", "at most 1"),
        ("sft.mistake_rate=nan", "not a finite number"),
        ("rl.save_every=0", "at least 1"),
        ("rl.steps=-3", "at least 0"),
        ("rl.updates=0", "at least 1"),
        ("rl.eval_every=-1", "at least 0"),
        ("rl.eval_tasks=0", "at least 1"),
        ("rl.eval_k=0", "at least 1"),
        ("rl.dump_every=-1", "at least 0"),
        ("rl.optimizer.lr=inf", "not a finite number"),
        ("tasks.ledger.slack=-1", "at least 0"),
        ("tasks.ledger.noise=1.01", "at most 1"),
        ("tasks.ledger.difficulties=2,11", "tasks.ledger.difficulties=11 must be at least 2 and at most 10"),
        ("tasks.wordmath.slack=-1", "at least 0"),
        ("tasks.wordmath.difficulties=1", "at least 2"),
        ("tokenizer.vocab_size=0", "at least 1"),
        ("tokenizer.texts=0", "at least 1"),
        ("algo.name=sft", "something else of the name 'sft'"),
        ("algo.name=Eval", "something else of the name 'Eval'"),
        ("algo.name=total", "something else of the name"),
        ("algo.name=results.json", "something else of the name"),
        ("algo.name=GRPO", "different names"),
        ("seed=" + "9" * 400, "at most 4294967295"),
        ("model.param_dtype=bfloat16", "model.dtype=bfloat16 to compute in bfloat16"),
    ],
)
def test_bad_overrides_say_what_is_wrong(assignment, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        override(Config(), [assignment])


def test_the_order_of_overrides_does_not_matter():
    pairs = ["algo.search.localizer=feedback", "algo.critical=searched", "algo.search.x_min=5", "algo.search.x_max=7"]
    for assignments in itertools.permutations(pairs):
        search = override(Config(), list(assignments)).algo.search
        assert (search.localizer, search.x_min, search.x_max) == ("feedback", 5, 7)
    assert override(Config(), ["seed=1", "seed=2"]).seed == 2
    with pytest.raises(ConfigError, match="x_max is 3; it must be at least x_min, 5"):
        override(Config(), pairs[:3])


def test_rows_have_to_fit_the_mesh():
    config = override(Config(), ["sft.micro_rows=8", "rl.micro_rows=12"])
    assert config.check(row_parts=4) is config
    with pytest.raises(ConfigError, match=r"rl.micro_rows=12 cannot be split .* = 8: make it a multiple of 8"):
        config.check(row_parts=8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(seed=True), "seed=True is not an int"),
        (Config(name=None), "name=None is not a string"),
        (Config(rl=RlConfig(steps="many")), "rl.steps='many' is not an int"),
        (Config(rl=RlConfig(prompts=32.0)), "rl.prompts=32.0 is not an int"),
        (Config(rollout=RolloutConfig(temperature="1")), "rollout.temperature='1' is not a finite number"),
        (Config(eval=EvalConfig(temperature=math.nan)), "eval.temperature=nan is not a finite number"),
        (
            Config(tokenizer=TokenizerConfig(kind="unigram")),
            "tokenizer.kind='unigram' is not one of sentencepiece, bpe",
        ),
        (Config(tasks=TasksConfig(ledger=LedgerConfig(difficulties=[2, 3]))), "difficulties=[2, 3] is not a tuple"),
        (Config(tasks=TasksConfig(families=("ledger", 1))), "tasks.families.1=1 is not a string"),
        (Config(against=grpo()), "against=Recipe(name='grpo', .* is not a tuple"),
        (Config(against=(grpo(), "dapo")), "against.1='dapo' is not a Recipe"),
        (Config(algo=elpo), "algo=<function elpo .* is not a Recipe"),
    ],
)
def test_values_that_a_file_gives_are_of_the_type_of_their_field(config, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("[", r"\[")):
        config.check()


def test_an_int_is_a_number():
    for config in (Config(eval=EvalConfig(temperature=1)), Config(algo=elpo(eps_elc=0))):
        assert config.check() is config


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("Config(sed=1)", "unexpected keyword argument 'sed'"),
        ("Config(algo=elpo(eps_ecl=0.1))", "unexpected keyword argument 'eps_ecl'"),
        ("Config(algo=elpo(lambda_tree=2))", "lambda_tree is 2; it must be between 0 and 1"),
        ("Config(algo=elpo(lambda_tree=None))", "NoneType"),
        ("Config(algo=elpo(search='binary'))", "'str' object has no attribute 'localizer'"),
    ],
)
def test_an_error_of_an_experiment_file_names_its_line_and_keeps_its_words(tmp_path, monkeypatch, expression, message):
    file = tmp_path / "experiment.py"
    monkeypatch.chdir(tmp_path)
    imports = "from elpo_jax.config import Config\nfrom elpo_jax.policy.recipes import elpo\n"
    for text, line in ((f"{imports}def get_config():\n    return {expression}\n", 4), (f"{imports}{expression}\n", 3)):
        file.write_text(text)
        for path in (str(file), "experiment.py"):
            with pytest.raises(ConfigError, match=rf"experiment\.py, line {line}: .*{message}") as error:
                load(path)
            assert error.value.__cause__ is not None, "who calls load from Python can see where it came from"
    file.write_text("def get_config(seed):\n    pass\n")
    with pytest.raises(ConfigError, match=r"experiment\.py: .*missing 1 required"):
        load(str(file))


def test_loading_names_what_is_missing(tmp_path):
    for name in ("none.py", ""):
        with pytest.raises(ConfigError, match="no experiment file"):
            load(str(tmp_path / name))
    file = tmp_path / "experiment.py"
    file.with_suffix(".txt").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"NAME\.py"):
        load(str(file.with_suffix(".txt")))
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no get_config"):
        load(str(file))
    file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="returned dict"):
        load(str(file))
    file.write_text("from elpo_jax.config import Config\ndef get_config():\n    return Config(seed=7)\n")
    assert load(str(file)).seed == 7


def test_differences_name_the_key_and_both_values():
    old = to_json(Config())
    new = to_json(dataclasses.replace(Config(), seed=3))
    assert differences(old, old) == []
    assert differences(old, new) == ["seed: 0 -> 3"]
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b: 1 -> '(missing)'"]


def test_rows_hold_at_least_the_longest_attempt():
    assert override(Config(), ["rl.row_tokens=4096"]).check().rl.row_length(256) == 4096
    assert Config().rl.row_length(256) == 512, "room for more of a tree than one attempt"
    with pytest.raises(ConfigError, match=r"rl.row_tokens=100 is less than sampler.context=\d+"):
        override(Config(), ["rl.row_tokens=100"]).check()
