"""A whole run as a user starts it: it can be killed at any moment, it says what is wrong, and it reads its config."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT


def finish(process):
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def numbers(workdir):
    """Everything a run measured, without the clock."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "seconds" not in k and "per_s" not in k and k != "time"}
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
    assert set(results["seconds"]) == {"sft", "grpo", "elpo", "eval", "total"}
    assert results["protocol"]["k"] == 2 and results["protocol"]["temperature"] == 1.0
    assert (tiny_run / "report.html").stat().st_size > 10_000


def test_the_first_update_sees_the_samplers_own_policy(tiny_run):
    for name in ("grpo", "elpo"):
        rows = [json.loads(line) for line in (tiny_run / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["loss/first_ratio_deviation_max"] < 1e-4 for row in rows)


@pytest.mark.slow
def test_ten_kills_change_nothing(tiny_run, start, tmp_path):
    expected = numbers(tiny_run)
    rng = random.Random(0)
    kills, runs = 0, 0
    while kills < 10:
        workdir = tmp_path / f"run{runs}"
        runs += 1
        while True:
            process = start(workdir, *(["--resume"] if (workdir / "config.json").exists() else []))
            try:
                output, errors = process.communicate(timeout=rng.uniform(3.0, 14.0) if kills < 10 else 900)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, output + errors
            break
        assert numbers(workdir) == expected


def test_a_finished_run_resumes_to_the_same_results(tiny_run, start):
    before = (tiny_run / "results.json").read_text()
    code, _, errors = finish(start(tiny_run, "--resume"))
    assert code == 0, errors
    old, new = json.loads(before), json.loads((tiny_run / "results.json").read_text())
    assert old["families"] == new["families"] and old["budget"] == new["budget"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "algo.eps_ecl=0"], "did you mean 'eps_elc'"),
        (["--set", "rl.steps=many"], "is not an int"),
        (["--set", "sampler.context=40"], "raise sampler.context"),
        (["--set", "mesh.data=64"], "device"),
        (["--set", "tasks.families=chess"], "unknown family 'chess'"),
        (["--set", "tasks.ledger.difficulties="], "the dataset is empty"),
        (["--set", "tasks.wordmath.difficulties=11"], "10"),
        (["--set", "model.vocab_size=300"], "model.vocab_size"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(start, tmp_path, more, message):
    code, output, errors = finish(start(tmp_path / "run", *more))
    assert code == 2, output + errors
    assert errors.startswith("error: ") and message in errors, errors
    assert "Traceback" not in errors


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
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": compile_cache, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
