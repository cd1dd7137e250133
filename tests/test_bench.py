"""The benches print what scripts read, and compare fairly. No test looks at a speed."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from elpo_jax.model.config import count_params
from elpo_jax.model.transformer import init
from elpo_jax.rollout.sampler import Sampler, SamplerConfig
from elpo_jax.tools.sandbox import probes
from experiments import bench, bench_loss, bench_rollout, bench_sandbox, bench_train, measure, peers
from experiments.measure import TINY

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, "-m", "experiments.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_bench_prints_one_json_line_per_measurement():
    done = run("rollout", "branch", "decode", "train", "--quick", "--seed", "5")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if "no comparison with transformers" not in done.stderr:
        theirs = lines.pop(1)
        assert theirs["sides"][0] == "sampler" and theirs["sides"][1].startswith("transformers, ")
    units = {
        "rollout": ["tokens/s", "% of slot steps", "% of slot steps"],
        "branch": ["tokens/s"],
        "train": ["tokens/s"],
    }
    units["decode"] = ["us/token", "draws/s", "draws/s"]
    for name, expected in units.items():
        assert [line["unit"] for line in lines if line["bench"] == name] == expected
    for line in lines:
        assert line["runs"] == 3 and line["seed"] == 5
        assert {"commit", "processor", "devices", "jax"} <= set(line), "a figure says where it was made"
        assert line["value"] > 0 and line["against"] > 0
        assert line["ratio"] == pytest.approx(line["value"] / line["against"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(all(probes.available().values()), reason="no sandbox works here")
def test_the_bench_of_the_sandbox_says_what_was_compared_under_which_limits():
    done = run("sandbox", "--quick", "--seed", "5")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    skipped = [line for line in lines if "skipped" in line]
    assert len(skipped) <= 1 and all(line["case"] == "bwrap" and line["skipped"] for line in skipped)
    lines = [line for line in lines if "skipped" not in line]
    others = ["subprocess"] if skipped else ["subprocess", "bwrap"]
    rates = [line for line in lines if line["unit"] == "calls/s"]
    expected = [(f"print, {n} worker{'s' * (n > 1)}", ["sandbox", other]) for n in (1, 2) for other in others]
    assert [(line["case"], line["sides"]) for line in rates] == expected
    for line in rates:
        assert set(line["p50_ms"]) == set(line["p99_ms"]) == {"sandbox", *others}
        assert all(0 < line["p50_ms"][side] <= line["p99_ms"][side] for side in line["p50_ms"])
        assert line["ratio"] == pytest.approx(line["value"] / line["against"], rel=2e-2)
        assert line["runs"] == 3 and line["calls"]["sandbox"] == 40 and line["program"] == "print(1 + 1)"
    start, memory, growth = (line for line in lines if line not in rates)
    assert (start["unit"], memory["unit"], growth["unit"]) == ("ms", "MB", "MB")
    assert start["value"] == rates[0]["p50_ms"]["sandbox"] and start["against"] == rates[0]["p50_ms"]["subprocess"]
    assert 20 < memory["value"] < 120, "Python with numpy and sympy takes no less, and a worker is not counted twice"
    assert len(growth["workers_mb"]) == len(growth["host_mb"]) == 6 and growth["restarts"] == 0
    for line in lines:
        assert line["bench"] == "sandbox" and line["seed"] == 5 and "params" not in line
        assert line["limits"]["cpu_s"] == 5.0 and line["packages"] == ["numpy", "sympy"] and line["workers"] in (1, 2)
        assert line["isolation"] in ("namespaces", "landlock")
        assert {"commit", "processor", "cores", "python"} <= set(line), "a figure says where it was made"
        assert all(isinstance(met, bool) for met in line["targets"].values())
    assert len({target for line in lines for target in line["targets"]}) == 5


def test_the_bench_of_the_sandbox_times_no_program_that_failed():
    """A worker that answers nonsense quickly would look fast."""
    with pytest.raises(RuntimeError, match="printed '3"):
        bench_sandbox._timed(lambda program: "3\n", "print", 4, 2)
    assert len(bench_sandbox._timed(lambda program: "2\n", "print", 4, 2)) == 4


def test_percentiles_are_of_calls_that_were_made():
    values = [float(n) for n in range(100, 0, -1)]
    assert [bench_sandbox._percentile(values, q) for q in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert bench_sandbox._percentile([7.0], 50) == bench_sandbox._percentile([7.0], 99) == 7.0


def test_memory_that_processes_share_is_counted_once():
    """The parts of a page that two processes have in common add up to the page."""
    code = "x = bytearray(b'x') * (64 << 20)\nimport os\npid = os.fork()\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline(), process.stdout.readline()
            tree = {pid for pid in bench_sandbox._children() if pid >= process.pid}
            assert process.pid in tree and len(tree) == 2
            assert 64 < bench_sandbox._pss(tree) < 100
            assert 32 < bench_sandbox._pss({process.pid}) < 60
        finally:
            process.stdin.close()


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
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        durations = iter(seconds)

        def work():
            calls.append(name)
            clock[0] += next(durations)
            return 100

        def prepare():
            calls.append(f"prepare {name}")
            clock[0] += 1000.0  # untimed

        return measure.Side(name, work, prepare)

    fast, slow = side("a", [50.0, 1.0, 7.0, 2.0, 7.0, 40.0]), side("b", [60.0, 9.0, 7.0, 8.0, 7.0, 10.0])
    line = measure.compare(measure.Settings(quick=False, seed=0, runs=3), "x", "case", fast, slow)
    assert calls == [*["prepare a", "a"] * 2, *["prepare b", "b"] * 2] * 3  # once to warm up, once timed
    assert (line["value"], line["against"], line["ratio"]) == (50.0, round(100 / 9, 1), 4.5)
    assert line["sides"] == ["a", "b"] and line["runs"] == 3


def test_the_fork_side_of_the_branch_bench_prefills_nothing(monkeypatch):
    """Only so is its rate that of forking; the other side computes every prefix again, in every run."""
    prefilled, forked = [], []
    prefill, fork = Sampler._run_prefill, Sampler._copy

    def counting_prefill(self, group, *shape, **kind):
        prefilled.append(sum(len(piece.ids) for piece in group))
        return prefill(self, group, *shape, **kind)

    def counting_fork(self, forks):
        forked.append(len(forks))
        return fork(self, forks)

    def count(settings, name, case, *sides):
        counts = []
        for side in sides * 2:
            side.prepare()
            prefilled.clear()
            forked.clear()
            assert side.work() == 4 * 16
            counts.append((side.name, sum(prefilled), sum(forked)))
        return counts

    monkeypatch.setattr(Sampler, "_run_prefill", counting_prefill)
    monkeypatch.setattr(Sampler, "_copy", counting_fork)
    monkeypatch.setattr(bench_rollout, "compare", count)
    (counts,) = bench_rollout.bench_branch(measure.Settings(quick=True, seed=0, runs=3))
    # Four branches after 64 tokens: the prefix becomes their trunk, once, and its last token is decoded.
    assert counts == [("fork", 0, 1), ("prefill each", 4 * 63, 0)] * 2


def test_attempts_of_the_rollout_bench_are_played_to_the_end():
    """Every turn of every attempt is sampled, whatever the number of slots, and the amount of work is the same."""
    settings = measure.Settings(quick=True, seed=0, runs=3)
    tokens = set()
    for slots, parking, visits in ((2, 0, 1), (5, 0, 3), (2, 2, 3)):
        sampler = Sampler(measure.TINY, SamplerConfig(slots=slots, parking=parking), (), seed=0)
        sampler.load(init(measure.TINY, jax.random.key(0)), version=0)
        tokens.add(bench_rollout._play(sampler, 7, turns=2, seconds=(0.0, 0.01), settings=settings, visits=visits))
        assert sampler.free_slots == slots
    assert len(tokens) == 1 and 14 * 8 <= tokens.pop() <= 14 * 40


def test_the_bench_of_the_cross_entropy_compares_equal_losses_and_their_memory(monkeypatch):
    settings, compared = measure.Settings(quick=True, seed=0, runs=3), []

    def once(settings, name, case, *sides):
        compared.append([side.work() for side in sides])
        return {"case": case}

    monkeypatch.setattr(bench_loss, "compare", once)
    lines = list(bench_loss.bench_cross_entropy(settings))
    assert compared == [[128, 128]] * 2 and len({line["case"] for line in lines}) == 2
    for line in lines:
        assert line["temp_mb"].keys() == {"chunks", "all logits"}
        assert 0 < line["temp_ratio"] < 0.6, "a quarter of the logits at a time"


def test_the_bench_of_compiling_fills_and_reads_a_cache_of_its_own(monkeypatch):
    before = bench_loss.jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(bench_loss, "_compile", lambda config: 60 if config.scan_layers else 30)
    folders = []

    def once(settings, name, case, side, against, unit):
        folders.append(bench_loss.jax.config.jax_compilation_cache_dir)
        kept = pathlib.Path(folders[-1]) / "program"
        kept.touch()
        side.prepare()
        return {"case": case, "kept": kept.exists(), "work": (side.work(), against.work())}

    monkeypatch.setattr(bench_loss, "compare", once)
    cold, warm = bench_loss.bench_compile(measure.Settings(quick=True, seed=0, runs=3))
    assert (cold["kept"], warm["kept"]) == (False, True) and cold["work"] == warm["work"] == (60, 30)
    assert len({*folders, before}) == 3 and bench_loss.jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_the_benches_of_the_update_say_what_a_tree_saves_and_what_the_machine_can_do(monkeypatch):
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: None)  # without torch
    monkeypatch.setattr(bench_train, "PEAK_SIZE", 256)  # no test looks at a speed
    settings = measure.Settings(quick=True, seed=0, runs=3)
    (tree,) = bench_train.bench_tree(settings)
    assert tree["token_ratio"] > tree["flop_ratio"] > 1.5
    assert tree["efficiency"] == pytest.approx(tree["ratio"] / tree["token_ratio"], rel=0.01)
    assert 0 < tree["temp_mb"][0] < tree["temp_mb"][1]
    lines = list(bench_train.bench_update(settings))
    assert [line["sides"] for line in lines] == [
        [f"update in {dtype}", "float32 matmul 256^3"] for dtype in ("float32", "bfloat16")
    ]


def test_operations_are_counted_by_visible_pairs():
    """Three tokens and two branches of two: 3 + 2 + 2 tokens, which see 1 + 2 + 3 and twice 4 + 5 keys.

    Five of them are the model's.
    """
    for tied in (False, True):
        config = dataclasses.replace(TINY, tied=tied)
        positions = np.array([[[0, 1, 2, 3, 4, 3, 4, -1]]], np.int32)
        steps = np.array([[[0, 0, 1, 2, 2, 2, 2, 0]]], np.int32)
        batch = types.SimpleNamespace(positions=positions, steps=steps)
        head = config.vocab_size * config.d_model
        body = count_params(config) - (1 if tied else 2) * head
        attention = 12 * config.layers * 2 * 16 * (6 + 2 * 9)
        assert bench_train.flops(config, batch) == 6 * (7 * body + 5 * head) + attention


def test_a_loop_of_others_goes_one_step_at_a_time_and_its_errors_are_ours():
    steps = []

    def loop(stepper):
        for number in range(3):
            stepper.wait()
            steps.append(number)
        raise ValueError("out of steps")

    stepper = peers.Stepper(loop)
    assert steps == []
    for count in (1, 2):
        stepper.step()
        assert steps == list(range(count))
    with pytest.raises(ValueError, match="out of steps"):
        stepper.step()


def test_a_folder_of_lines_becomes_a_table(tmp_path):
    sides = {"unit": "tokens/s", "sides": ["ours", "theirs"], "value": 20.0, "against": 10.0, "ratio": 2.0}
    skipped = {"bench": "rl", "case": "S", "skipped": "trl is not installed"}
    (tmp_path / "rollout.jsonl").write_text(json.dumps({"bench": "rollout", "case": "S"} | sides) + "\n")
    (tmp_path / "rl.jsonl").write_text(json.dumps(skipped) + "\n")
    assert bench.table(tmp_path).splitlines()[2:] == [
        "| rl | S |  | trl is not installed |  |",
        "| rollout | S | 2.0 | ours: 20.0 tokens/s | theirs: 10.0 tokens/s |",
    ]
