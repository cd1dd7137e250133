"""Overrides are typed and typos are errors."""

import dataclasses

import pytest

from elpo_jax.config import Config, ConfigError, differences, load, override, to_json


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
        ("algo.eps_elc=small", "not a float"),
        ("rl.steps=2.5", "not an int"),
        ("model.qk_norm=maybe", "not a bool"),
        ("tokenizer.kind=bpe", "must be one of sentencepiece, byte"),
        ("algo", "key=value"),
        ("algo=elpo", "is a group"),
        ("seed.value=1", "goes deeper"),
        ("against.3.eps_low=0.1", "not an index"),
        ("rl.updates=5", "not a multiple"),
        ("algo.name=grpo", "different names"),
        ("tasks.families=", "empty"),
        ("eval.k=0", "at least 1"),
        ("rollout.temperature=0", "must be positive"),
    ],
)
def test_bad_overrides_say_what_is_wrong(assignment, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        override(Config(), [assignment])


def test_loading_names_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="no experiment file"):
        load(str(tmp_path / "none.py"))
    file = tmp_path / "experiment.py"
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no get_config"):
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
