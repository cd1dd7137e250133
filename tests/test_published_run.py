"""A run that starts from published weights, tokenizer and template, and ends as a folder that transformers reads."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_hub_text import CHATML

from elpo_jax.config import Config, ConfigError, DatasetConfig
from elpo_jax.model.weights import main as weights
from elpo_jax.overrides import override
from elpo_jax.text.hub_tokenizer import train_bpe
from elpo_jax.train.setup import build_environment, build_tokenizer, open_tools, with_weights_shape

pytest.importorskip("torch")
hf_models = pytest.importorskip("hf_models")

VOCABULARY = 300


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as a hub has it."""
    folder = hf_models.save(
        hf_models.build("qwen3", vocab_size=VOCABULARY, max_position_embeddings=2048),
        tmp_path_factory.mktemp("hub") / "x",
    )
    train_bpe(["pay the bill from the account, then read the balance and answer"] * 9, folder / "tokenizer.json", 290)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    return folder


def start(workdir, *changes, experiment="tests/tiny.py"):
    assignments = [part for change in changes for part in ("--set", change)]
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", str(experiment), "--workdir", str(workdir), *assignments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_weights_come_in_and_go_out_and_the_template_is_the_one_that_speaks(published, tmp_path):
    workdir = tmp_path / "run"
    done = start(
        workdir,
        f"model.source={published}",
        "tokenizer.kind=checkpoint",
        "tasks.families=ledger",
        "tasks.ledger.demonstrations=8",
        "sampler.context=2048",
        "sampler.slots=4",
        "against=()",
        "algo.search.budget=2",
        "algo.search.localizer=none",
        "algo.kl=0",
        "rollout.max_turn_tokens=8",
        "sft.steps=1",
        "sft.rows=2",
        "sft.micro_rows=2",
        "sft.optimizer.lr=0",
        "sft.optimizer.warmup_steps=0",
        "rl.steps=1",
        "rl.prompts=2",
        "rl.updates=1",
        "rl.eval_every=0",
        "eval.tasks=1",
        "eval.validation_tasks=0",
        "eval.k=1",
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((workdir / "config.json").read_text())["model"]
    assert (config["vocab_size"], config["head_dim"], config["qk_norm"]) == (VOCABULARY, 32, True)
    tree = json.loads((workdir / "elpo/rollouts/step_000001.jsonl").read_text().splitlines()[0])
    assert tree["prompt"]["text"].startswith("<|im_start|>system\nTools:\n{")

    assert weights(["export", str(workdir / "sft"), str(tmp_path / "out")]) == 0
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    logits = [hf_models.reference_logits(hf_models.read(folder), ids) for folder in (published, tmp_path / "out")]
    np.testing.assert_array_equal(*logits)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 2048


def test_weights_are_evaluated_as_they_are_each_data_set_with_its_own_k(published, tmp_path):
    for name, count in (("pens", 3), ("cups", 2)):
        rows = [{"problem": f"{i} {name}?", "answer": str(i), "grader": "math"} for i in range(count)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets = tuple(
        DatasetConfig(name, str(tmp_path / name), use="test", tool="calculator", checker="exact", k=k, rows=rows)
        for name, k, rows in (("pens", 2, 3), ("cups", 0, 0))
    )
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "import dataclasses\n"
        "from elpo_jax.config import DatasetConfig\n"
        "from tests.tiny import get_config as tiny\n"
        "def get_config():\n"
        f"    tasks = dataclasses.replace(tiny().tasks, families=('pens', 'cups'), datasets={datasets!r})\n"
        "    return dataclasses.replace(tiny(), tasks=tasks)\n"
    )
    changes = [
        f"model.source={published}",
        "tokenizer.kind=checkpoint",
        "sampler.context=2048",
        "sampler.slots=4",
        "rollout.max_turn_tokens=8",
        "sft.steps=0",
        "rl.steps=0",
        "eval.k=1",
        "eval.validation_tasks=0",
    ]
    done = start(tmp_path / "run", *changes, experiment=experiment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = {family: of["sft"] for family, of in results["families"].items()}
    assert figures["pens"].keys() == {"avg@2", "ci", "n"} and figures["cups"].keys() == {"avg@1", "ci", "n"}
    assert (figures["pens"]["n"], figures["cups"]["n"], results["budget"]) == (3, 2, {})
    assert "k=1 (pens: 2)" in done.stdout and not (tmp_path / "run" / "elpo").exists()


def test_what_does_not_fit_is_told_before_anything_is_read(published, tmp_path):
    done = start(tmp_path / "run", f"model.source={tmp_path}", "tokenizer.kind=checkpoint")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "config.json" in done.stderr
    small = tmp_path / "small"
    hf_models.save(hf_models.build("qwen3", vocab_size=280), small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((published / name).read_bytes())
    done = start(tmp_path / "run", f"model.source={small}", "tokenizer.kind=checkpoint", "tasks.families=ledger")
    assert done.returncode == 2 and "the tokenizer has 290 ids but model.vocab_size=280" in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_source_decides_the_network_and_the_config_how_it_computes(published):
    start = [f"model.source={published}", "tokenizer.kind=checkpoint", "model.dtype=bfloat16", "model.remat=full"]
    start += ["model.scan_layers=true", "model.attention=cudnn"]
    config = override(Config(), start)
    model = with_weights_shape(config).model
    assert (model.d_model, model.layers, model.dtype, model.param_dtype, model.remat) == (
        48,
        2,
        "bfloat16",
        "float32",
        "full",
    )
    assert model.scan_layers and model.attention == "cudnn"
    yarn = override(
        config,
        ["model.rope_scaling.kind=yarn", "model.rope_scaling.factor=4", "model.rope_scaling.original_context=2048"],
    )
    assert with_weights_shape(yarn).model.rope_scaling == yarn.model.rope_scaling
    assert with_weights_shape(Config()) == Config()
    with pytest.raises(ConfigError, match=r"tokenizer\.source or model\.source"):
        override(Config(), ["tokenizer.kind=checkpoint"])


@pytest.mark.parametrize(("call_format", "read"), [("auto", False), ("llama", True)])
def test_the_config_can_say_how_calls_are_written(published, tmp_path, call_format, read):
    config = override(
        with_weights_shape(override(Config(), [f"model.source={published}", "tokenizer.kind=checkpoint"])),
        [f"tokenizer.call_format={call_format}", "tasks.families=ledger"],
    )
    with open_tools(config) as (stream, toolboxes, sandbox):
        tokenizer = build_tokenizer(config, tmp_path, stream, toolboxes)
        chat = build_environment(config, tokenizer, stream, toolboxes, sandbox).chat
    turn = chat.parse(tokenizer.encode('{"name": "total", "parameters": {}}'))
    assert (turn.call is not None) == read
