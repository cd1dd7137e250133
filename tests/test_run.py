"""A whole run as a user starts it: it can be killed at any moment, it says what is wrong, and it reads its config."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TINY = "tests/tiny.py"


def command(workdir, *more):
    return [sys.executable, "-m", "experiments.run", TINY, "--workdir", str(workdir), *more]


def run(workdir, *more):
    return subprocess.run(command(workdir, *more), cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """All runs here compile the same programs; once is enough."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compile_cache"))
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


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


def test_results_have_the_promised_form(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
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
    assert (undisturbed / "report.html").stat().st_size > 10_000


def test_the_first_update_sees_the_samplers_own_policy(undisturbed):
    for name in ("grpo", "elpo"):
        rows = [json.loads(line) for line in (undisturbed / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["loss/first_ratio_deviation_max"] < 1e-4 for row in rows)


@pytest.mark.slow
def test_ten_kills_change_nothing(undisturbed, tmp_path):
    expected = numbers(undisturbed)
    rng = random.Random(0)
    kills, runs = 0, 0
    while kills < 10:
        workdir = tmp_path / f"run{runs}"
        runs += 1
        finished = False
        while not finished:
            resume = ["--resume"] if (workdir / "config.json").exists() else []
            process = subprocess.Popen(
                command(workdir, *resume), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            try:
                limit = rng.uniform(4.0, 16.0) if kills < 10 else 600
                output, _ = process.communicate(timeout=limit)
                finished = True
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, output
        assert numbers(workdir) == expected


def test_a_finished_run_resumes_to_the_same_results(undisturbed):
    before = (undisturbed / "results.json").read_text()
    done = run(undisturbed, "--resume")
    assert done.returncode == 0, done.stderr
    old, new = json.loads(before), json.loads((undisturbed / "results.json").read_text())
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
def test_bad_input_is_one_sentence_and_an_exit_code(tmp_path, more, message):
    done = run(tmp_path / "run", *more)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_another_run_is_left_alone(undisturbed, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}
    done = run(undisturbed, "--resume", "--set", "algo.eps_elc=0.05")
    assert done.returncode == 2 and "algo.eps_elc: 0.115 -> 0.05" in done.stderr
    done = run(undisturbed)
    assert done.returncode == 2 and "--resume" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    done = run(other)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert (other / "thesis.txt").read_text() == "precious"
