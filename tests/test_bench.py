"""The benches print what scripts read, and compare fairly. No test looks at a speed."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import bench

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, "-m", "experiments.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_bench_prints_one_json_line_per_measurement():
    done = run("rollout", "branch", "train", "--quick", "--seed", "5")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["bench"] for line in lines] == ["rollout", "rollout", "branch", "train"]
    assert len({(line["bench"], line["case"]) for line in lines}) == 4
    for line in lines:
        assert line["unit"] == "tokens/s" and line["runs"] == 3 and line["seed"] == 5
        assert {"commit", "processor", "devices", "jax"} <= set(line), "a figure says where it was made"
        assert line["value"] > 0 and line["against"] > 0
        assert line["ratio"] == pytest.approx(line["value"] / line["against"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["rollouts"], "invalid choice"), (["train", "--runs", "2"], "at least 3")]
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_sides_take_turns_and_report_medians(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        durations = iter(seconds)

        def work():
            calls.append(name)
            clock[0] += next(durations)
            return 100

        def prepare():
            calls.append(f"prepare {name}")
            clock[0] += 1000.0  # untimed

        return bench.Side(name, work, prepare)

    fast, slow = side("a", [50.0, 1.0, 2.0, 40.0]), side("b", [60.0, 9.0, 8.0, 10.0])
    line = bench.compare(bench.Settings(quick=True, seed=0, runs=3), "x", "case", fast, slow)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 4  # once to warm up, then three times
    assert (line["value"], line["against"], line["ratio"]) == (50.0, round(100 / 9, 1), 4.5)
    assert line["sides"] == ["a", "b"] and line["runs"] == 3


def test_the_fork_side_of_the_branch_bench_prefills_nothing(monkeypatch):
    """Only so is its rate that of forking; the other side computes every prefix again, in every run."""
    prefilled, forked = [], []
    prefill, fork = bench.Sampler._run_prefill, bench.Sampler._fork_rows

    def counting_prefill(self, group, rows, tokens):
        prefilled.append(sum(len(ids) for _, _, ids in group))
        return prefill(self, group, rows, tokens)

    def counting_fork(self, pairs):
        forked.append(len(pairs))
        return fork(self, pairs)

    def count(settings, name, case, *sides):
        counts = []
        for side in sides * 2:
            side.prepare()
            prefilled.clear()
            forked.clear()
            assert side.work() == 4 * 16
            counts.append((side.name, sum(prefilled), sum(forked)))
        return counts

    monkeypatch.setattr(bench.Sampler, "_run_prefill", counting_prefill)
    monkeypatch.setattr(bench.Sampler, "_fork_rows", counting_fork)
    monkeypatch.setattr(bench, "compare", count)
    (counts,) = bench.bench_branch(bench.Settings(quick=True, seed=0, runs=3))
    # Four branches after 64 tokens; the slot that holds the prefix is one of the four, and the last token is decoded.
    assert counts == [("fork", 0, 3), ("prefill each", 4 * 63, 0)] * 2


def test_attempts_of_the_rollout_bench_are_played_to_the_end():
    """Every turn of every attempt is sampled, whatever the number of slots, and the amount of work is the same."""
    settings = bench.Settings(quick=True, seed=0, runs=3)
    tokens = set()
    for slots in (2, 5):
        sampler = bench.Sampler(bench.TINY, bench.SamplerConfig(slots=slots, context=384), (), seed=0)
        sampler.load(bench.init(bench.TINY, bench.jax.random.key(0)), version=0)
        tokens.add(bench._play(sampler, attempts=7, turns=2, settings=settings))
        assert sampler.free_slots == slots
    assert len(tokens) == 1 and 14 * 8 <= tokens.pop() <= 14 * 48
