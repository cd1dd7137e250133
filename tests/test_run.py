"""A whole run as a user starts it: it can be killed at any moment, it says what is wrong, and it reads its config."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
import tiny
from conftest import OPTIMISED, ROOT, TINY

from elpo_jax.config import RolloutConfig
from elpo_jax.report.log import read_metrics
from elpo_jax.report.page import UNSAFE, payload
from elpo_jax.rollout.agent import Environment
from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tasks.stream import TaskStream
from elpo_jax.tasks.wordmath import WordMath
from elpo_jax.tools.base import InfrastructureError
from elpo_jax.tools.sandbox import Sandbox
from elpo_jax.train.checkpoint import CheckpointError
from elpo_jax.train.provenance import versions
from experiments import run


def finish(process):
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def numbers(workdir):
    """Everything a run measured, without the clock, and without how often the sandbox was asked: what programs answered
    is remembered by a process, not by a run."""

    def timeless(value):
        if isinstance(value, dict):
            out = ("seconds", "per_s", "sandbox/")
            return {k: timeless(v) for k, v in value.items() if not any(part in k for part in out) and k != "time"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    out = {}
    for path in sorted(workdir.glob("*/*.json*")) + sorted(workdir.glob("*/rollouts/*.jsonl")):
        out[str(path.relative_to(workdir))] = (
            [timeless(json.loads(line)) for line in path.read_text().splitlines()]
            if (path.suffix == ".jsonl")
            else timeless(json.loads(path.read_text()))
        )
    return out


def test_results_have_the_promised_form(tiny_run):
    results = json.loads((tiny_run / "results.json").read_text())
    assert set(results["families"]) == {"wordmath", "ledger"}
    for by_name in results["families"].values():
        assert set(by_name) == {"sft", "grpo", "elpo"}
        for figures in by_name.values():
            low, high = figures["ci"]
            assert low <= figures["avg@2"] <= high and figures["n"] == 3
    for name in ("grpo", "elpo"):
        budget = results["budget"][name]
        assert budget["rollouts"] == 3 * 4 * 6, "every prompt spends exactly its budget"
        assert budget["model_tokens"] > budget["rollouts"] and budget["tool_calls"] >= 0
        assert set(results["validation"]["families"]["ledger"][name]) == {"avg@2", "ci", "n"}
    assert set(results["seconds"]) == {"sft", "grpo", "elpo", "eval", "total"}
    assert results["validation"]["line"].startswith("validation split (wordmath: 2 tasks, 2 steps")
    assert results["protocol"]["isolation"] in ("namespaces", "landlock"), "programs are isolated by default"
    assert tiny.get_config().rollout.sandbox == RolloutConfig().sandbox == "auto"
    assert results["protocol"]["k"] == 2 and results["protocol"]["temperature"] == 1.0
    assert (tiny_run / "report.html").stat().st_size > 10_000


def test_the_first_update_sees_the_samplers_own_policy(tiny_run):
    for name in ("grpo", "elpo"):
        rows = [json.loads(line) for line in (tiny_run / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["loss/first_ratio_deviation_max"] < 1e-4 for row in rows)
        assert all(0 < row["rollout/slot_use"] < 1 for row in rows)
        assert all(row["grad_norm"] > 0 and row["loss/tokens"] > 0 for row in rows), "else a resumed run proves little"


def test_every_row_says_what_the_sandbox_did_in_it(tiny_run):
    names = ("calls", "sandbox_errors", "retries", "restarts", "paused_s")
    results = json.loads((tiny_run / "results.json").read_text())
    for recipe in ("grpo", "elpo"):
        rows = read_metrics(tiny_run / recipe / "metrics.jsonl")
        totals = {name: sum(row[f"sandbox/{name}"] for row in rows) for name in names}
        # Two tasks are validated, twice each, in the second step; a program that ran before is not run again.
        most = sum(row["rollout/tool_calls"] for row in rows) + 2 * 2 * 2
        assert 0 < totals.pop("calls") <= most and all(row["sandbox/calls"] >= 0 for row in rows)
        assert totals == dict.fromkeys(totals, 0), "nothing disturbed this run"
        assert all(row["rollout/infrastructure_failures"] == row["status/sandbox_error"] == 0 for row in rows)
        assert not any("unsafe_tools" in row for row in rows)
        assert results["budget"][recipe]["lost_attempts"] == 0


def test_a_run_without_isolation_is_marked_in_every_row_and_at_the_head_of_its_report(tmp_path):
    for backend, mark in (("auto", {}), ("unsafe", {"unsafe_tools": True})):
        workdir = tmp_path / backend
        with Sandbox(backend=backend) as sandbox:
            environment = Environment({}, {}, None, 64, sandbox)
            for stage in ("sft", "elpo"):
                folder = workdir / stage
                with run.open_log(folder, 0, environment) as log:
                    log.write({"step": 1})
                with run.open_log(folder, 1, environment) as log:  # as after --resume
                    log.write({"step": 2})
                assert read_metrics(folder / "metrics.jsonl") == [{"step": 1} | mark, {"step": 2} | mark]
            protocol = run.protocol_of(tiny.get_config(), environment, "test", {}, 2, 1.0, 1.0)
        assert ("NONE (unsafe)" in protocol.line()) == bool(mark)
        notes = payload(workdir)["notes"]
        assert (notes[0] == UNSAFE) == bool(mark) and (UNSAFE in notes) == bool(mark)


@pytest.mark.slow
def test_ten_kills_change_nothing(tiny_run, start, compile_cache, tmp_path):
    """A run that is killed at random moments of its starts and of each of its stages."""
    cache = tmp_path / "cache"  # of its own: a kill can tear an entry, and other tests look at what is said on stderr
    shutil.copytree(compile_cache, cache)
    rng = random.Random(0)
    workdir, landed = tmp_path / "run", []
    for stage in ("", "sft", "sft", "sft", "", "elpo", "elpo", "elpo", "grpo", "grpo"):
        process = start(workdir, *(["--resume"] if (workdir / "config.json").exists() else []), cache=cache)
        log = workdir / stage / "metrics.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        # A stage begins by opening its log, which an earlier one may have left.
        while stage and process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 4.0 if stage else 5.0))
        landed.append(stage if process.poll() is None else "too late")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, output, errors = finish(start(workdir, "--resume", cache=cache))
    assert code == 0, output + errors
    assert numbers(workdir) == numbers(tiny_run)
    assert {"", "sft", "elpo"} <= set(landed), landed  # a fast machine may end the last stage before it is killed


def test_a_checkpoint_says_what_it_is_and_is_not_taken_for_another_stages(tiny_run, start, tmp_path):
    saved = json.loads((tiny_run / "elpo/checkpoints/3/meta/metadata").read_text())
    assert saved["stage"] == "elpo" and saved["step"] == 3 and saved["config"]["name"] == "tiny"
    assert saved["cursor"] == 1000 * 2 + 3 * 4, "after the demonstrations, four prompts for each of three batches"
    assert {"jax", "flax", "optax", "orbax"} <= set(saved["versions"])
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    for path in (workdir / "results.json", workdir / "eval/grpo.json", workdir / "grpo/metrics.jsonl"):
        path.unlink()
    shutil.rmtree(workdir / "grpo/checkpoints")
    shutil.copytree(workdir / "elpo/checkpoints", workdir / "grpo/checkpoints")
    code, _, errors = finish(start(workdir, "--resume"))
    assert code == 2 and "stage: 'elpo' -> 'grpo'" in errors and "move it out" in errors, errors


def test_a_stage_goes_on_from_its_own_checkpoint_alone(capsys):
    meta = {"stage": "elpo", "config": {"seed": 0}, "tokenizer": "abc", "chat": "def"}
    saved = meta | {"step": 3, "versions": versions()}

    def go_on(**changes):
        kept = types.SimpleNamespace(directory="D", latest=lambda: 3, restore=lambda *_: ("state", saved | changes))
        return run.last_state(kept, "blank", None, meta)

    assert go_on() == ("state", 3) and capsys.readouterr().out == ""
    for changes, words in (
        ({"stage": "grpo"}, "stage: 'grpo' -> 'elpo'"),
        ({"config": {"seed": 1}}, "config.seed: 1 -> 0"),
        ({"tokenizer": "abd"}, "another tokenizer"),
        ({"chat": "deg"}, "another chat template"),
    ):
        with pytest.raises(CheckpointError, match=words):
            go_on(**changes)
    assert go_on(versions=versions() | {"jax": "0.1"}) == ("state", 3)
    assert "jax: '0.1' -> " in capsys.readouterr().out, "other versions are said, not refused"
    assert run.last_state(types.SimpleNamespace(latest=lambda: None), "blank", None, meta) == ("blank", 0)


def test_every_split_is_measured_on_its_own_tasks(monkeypatch, tmp_path):
    met = {}

    def evaluate(name, tasks, protocol, *rest):
        met[protocol.split] = {
            family: [task.id.split("/")[:2] for task in members] for family, members in tasks.items()
        }
        figure = {"value": 0.5, "ci": [0.4, 0.6]}
        figures = {"avg@2": 0.5, "ci": [0.4, 0.6], "pass@2": figure, "maj@2": figure, "tool_calls": 1.0, "tokens": 9.0}
        return {"families": dict.fromkeys(tasks, figures), "protocol": {"split": protocol.split}}

    monkeypatch.setattr(run, "evaluate", evaluate)
    interpreter = types.SimpleNamespace(name="code_interpreter")
    families = {"wordmath": WordMath(interpreter), "ledger": Ledger()}
    stream = TaskStream(families, dict.fromkeys(families, (2,)), seed=0)
    sampler, state = types.SimpleNamespace(load=lambda *_, **__: None), types.SimpleNamespace(params=None, step=0)
    environment = types.SimpleNamespace(isolation="namespaces", families=families)
    run.measure(tiny.get_config(), tmp_path, "sft", state, environment, sampler, stream)
    for split, count in (("test", 3), ("validation", 2)):
        assert met[split] == {family: [[family, split]] * count for family in ("wordmath", "ledger")}
    written = json.loads((tmp_path / "eval/sft.json").read_text())
    assert written["protocol"]["split"] == "test" and written["validation"]["protocol"]["split"] == "validation"
    assert written["protocol_line"].startswith("test split (wordmath: 3 tasks")


def test_a_finished_run_resumes_to_the_same_results(tiny_run, start):
    """To the same file: who made the figures, and when, is not who looks at them."""
    before = (tiny_run / "results.json").stat().st_mtime_ns
    code, output, errors = finish(start(tiny_run, "--resume"))
    assert code == 0, errors
    assert "held-out accuracy" in output and "report.html" in output
    assert (tiny_run / "results.json").stat().st_mtime_ns == before


def test_the_remedy_for_a_damaged_tokenizer_works(tiny_run, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    (workdir / "results.json").unlink()
    (workdir / "tokenizer.model").write_bytes(b"damaged")
    code, _, errors = finish(start(workdir, "--resume"))
    assert code == 2 and "tokenizer.model is damaged" in errors and "delete it" in errors and "--resume" in errors
    (workdir / "tokenizer.model").unlink()
    code, _, errors = finish(start(workdir, "--resume"))
    assert code == 0, errors
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (tiny_run, workdir))
    assert old["families"] == new["families"] and old["budget"] == new["budget"]


def newer(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def another_value(path):
    path.write_text("[]\n")


def garbage(path):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\xff{", *lines[2:]]))


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("elpo/checkpoints/*/manifest.json", cut, "restore the file from a copy"),
        ("elpo/checkpoints/*/manifest.json", newer, "update elpo_jax"),
        ("sft/metrics.jsonl", garbage, "metrics.jsonl, line 2 is not a metrics row: remove that line"),
        ("eval/sft.json", cut, "sft.json is damaged"),
        ("eval/sft.json", another_value, "sft.json is damaged: restore it, or delete it"),
    ],
)
def test_damage_to_a_run_is_one_sentence_and_costs_nothing(
    tiny_run, monkeypatch, capsys, tmp_path, pattern, damage, message
):
    def content():
        return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}

    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    (workdir / "results.json").unlink()
    for path in workdir.glob(pattern):
        damage(path)
    before = content()
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    assert run.main([str(ROOT / TINY), "--workdir", str(workdir), "--resume"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and len(errors.splitlines()) == 1 and message in errors, errors
    assert before == content()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InfrastructureError("the interpreter's workers died"), 2, "error: the interpreter's workers died"),
        (KeyboardInterrupt(), 130, "the same command begins again"),
    ],
)
def test_what_stops_a_run_is_one_sentence(monkeypatch, capsys, tmp_path, error, code, message):
    def stop(*arguments):
        raise error

    monkeypatch.setattr(run, "run", stop)
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    assert run.main([str(ROOT / TINY), "--workdir", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err.strip().endswith(message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "algo.eps_ecl=0"], "did you mean 'eps_elc'"),
        (["--set", "rl.steps=many"], "is not an int"),
        (["--set", "sampler.context=40"], "raise sampler.context"),
        (["--set", "mesh.data=64"], "device"),
        (["--resume"], "holds no run to resume"),
        (["--set", "tasks.families=chess"], "unknown family 'chess'"),
        (["--set", "tasks.ledger.difficulties="], "the dataset is empty"),
        (["--set", "tasks.wordmath.difficulties=11"], "10"),
        (["--set", "model.vocab_size=300"], "model.vocab_size"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(monkeypatch, capsys, tmp_path, more, message):
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    assert run.main([str(ROOT / TINY), "--workdir", str(tmp_path / "run"), *more]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors, errors


def test_rows_that_devices_cannot_share_are_one_sentence_and_the_exit_code_of_the_process(start, tmp_path):
    code, output, errors = finish(start(tmp_path / "run", "--set", "cpu_devices=4"))
    assert code == 2, output + errors
    assert errors.startswith("error: ") and "micro_rows=2 cannot be split" in errors, errors
    assert "Traceback" not in errors


def test_a_command_that_was_corrected_runs_in_the_same_folder(start, monkeypatch, capsys, tmp_path):
    few = ("against=()", "tasks.ledger.demonstrations=40", "sft.steps=6", "rl.steps=1", "eval.tasks=1", "eval.k=1")
    small = [f"--set={part}" for part in few]
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", lambda *setting: None)
        for bad in ("sampler.context=40", "tasks.ledger.noise=1"):
            assert run.main([str(ROOT / TINY), "--workdir", str(tmp_path / "run"), *small, "--set", bad]) == 2
            assert capsys.readouterr().err.startswith("error: ")
    code, output, errors = finish(start(tmp_path / "run", *small))
    assert code == 0, output + errors
    assert "demonstrations in" in output and "that failed" in output


def test_a_folder_of_another_run_is_left_alone(tiny_run, start, tmp_path):
    def files():
        return {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"}

    before = files()
    code, _, errors = finish(start(tiny_run, "--resume", "--set", "algo.eps_elc=0.05"))
    assert code == 2 and "algo.eps_elc: 0.115 -> 0.05" in errors
    code, _, errors = finish(start(tiny_run))
    assert code == 2 and "--resume" in errors
    assert before == files()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    code, _, errors = finish(start(other))
    assert code == 2 and "not empty" in errors
    assert (other / "thesis.txt").read_text() == "precious"


def test_every_config_field_is_read(tmp_path, compile_cache):
    """A field that nothing reads is a knob that does nothing: an ablation over it would compare a run with itself."""
    done = subprocess.run(
        [sys.executable, "tests/record_knobs.py", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | OPTIMISED | {"JAX_COMPILATION_CACHE_DIR": compile_cache, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    unread = json.loads(done.stdout.splitlines()[-1])
    # Of published models only: test_weights.py compares each kind of scaling with another implementation, and
    # test_published_run.py has calls written both ways.
    published = ("RopeScaling.", "TokenizerConfig.call_format")
    assert [name for name in unread if not name.startswith(published)] == []
