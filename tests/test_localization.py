"""The localization experiment, end to end on a few attempts."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tasks.ledger_oracle import first_irrecoverable
from elpo_jax.trees.localize import LOCALIZERS
from experiments import localization
from experiments.localization import (
    LENGTHS,
    SUCCESS,
    Settings,
    cases,
    failed_attempt,
    main,
    run_trials,
    summarise,
    wilson_interval,
)

ROOT = pathlib.Path(__file__).parents[1]
TINY = Settings(trials=60)


@pytest.fixture(scope="module")
def trials():
    return run_trials(TINY, jobs=1)


@pytest.fixture(scope="module")
def rows(trials):
    return {(row["localizer"], row["p_success"]): row for row in summarise(trials)}


def column(trials, localizer, p, field):
    case = cases().index((localizer, p))
    return [getattr(trial, field)[case] for trial in trials]


def test_command_prints_a_line_per_localizer_and_probability(tmp_path, trials):
    command = [sys.executable, "-m", "experiments.localization", "--task", "ledger", "--trials", "60", "--jobs", "2"]
    done = subprocess.run([*command, "--json", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    # Also: two worker processes give the numbers that this process gives alone.
    assert lines == json.loads(json.dumps(summarise(trials)))
    assert [(line["localizer"], line["p_success"]) for line in lines] == [(x, p) for x in LOCALIZERS for p in SUCCESS]
    assert all({"exact", "mae", "probes", "n"} < set(line) and line["n"] == 60 for line in lines)

    record = json.loads((tmp_path / "localization.json").read_text())
    assert record["rows"] == lines
    assert record["config"] == {
        "task": "ledger",
        "trials": 60,
        "continuations": 2,
        "noise": 0.0,
        "seed": 0,
        "lengths": [3, 4, 5, 6, 7, 8, 9, 10],
        "blunder_rate": 0.3,
    }
    assert {"commit", "python", "jax", "processor", "cores"} <= set(record["provenance"])
    assert sum(sum(steps.values()) for steps in record["first_irrecoverable_by_k"].values()) == 60
    page = (tmp_path / "localization.md").read_text()
    assert all(f"| {name} |" in page for name in LOCALIZERS)
    assert (tmp_path / "localization.png").read_bytes()[:4] == b"\x89PNG"


def test_attempts_fail_with_every_length_and_in_every_way(trials):
    assert [trial.length for trial in trials] == [LENGTHS[i % 8] for i in range(60)]
    assert all(1 <= trial.truth <= trial.length + 1 for trial in trials)
    assert any(trial.truth == trial.length + 1 for trial in trials)
    assert any(trial.truth < trial.length for trial in trials)
    task, attempt = failed_attempt(Ledger(0), 5, 0, 2)
    assert len(attempt.states) == 5 and not attempt.success
    assert first_irrecoverable(task, attempt.states) == trials[2].truth


def test_sure_continuations_find_the_exact_step(trials, rows):
    for localizer in ("binary", "dense"):
        assert column(trials, localizer, 1.0, "named") == [trial.truth for trial in trials]
        assert rows[localizer, 1.0]["exact"] == 1.0 and rows[localizer, 1.0]["mae"] == 0.0


def test_the_printed_search_cannot_name_the_final_answer(trials, rows):
    assert column(trials, "binary_printed", 1.0, "named") == [min(t.truth, t.length) for t in trials]
    late = sum(trial.truth == trial.length + 1 for trial in trials)
    assert late > 0 and rows["binary_printed", 1.0]["exact"] == 1 - late / 60


def test_a_search_errs_early_and_less_the_surer_its_continuations_are(trials, rows):
    for localizer in ("binary", "dense"):
        accuracy = [rows[localizer, p]["exact"] for p in SUCCESS]
        assert accuracy == sorted(accuracy) and accuracy[0] < 0.6
        for p in SUCCESS:  # a success proves reachability, so no step after the true one is ever named
            assert all(0 < n <= t.truth for n, t in zip(column(trials, localizer, p, "named"), trials, strict=True))
    assert all(rows["dense", p]["exact"] >= rows["binary", p]["exact"] for p in SUCCESS)


def test_probes_are_what_each_search_asks_for(trials, rows):
    for p in SUCCESS:
        assert column(trials, "dense", p, "probes") == [2 * trial.length for trial in trials]
        assert column(trials, "random", p, "probes") == [2] * 60
        assert rows["feedback", p]["probes"] == rows["none", p]["probes"] == 0
        for trial, waves, probes in zip(
            trials, column(trials, "binary", p, "waves"), column(trials, "binary", p, "probes"), strict=True
        ):
            assert 0 < waves <= math.ceil(math.log2(trial.length + 1)) and probes == 2 * waves


def test_a_localizer_that_names_no_step_is_never_exact(trials, rows):
    for p in SUCCESS:
        assert rows["none", p]["exact"] == rows["none", p]["named"] == 0 and rows["none", p]["mae"] is None
        assert rows["feedback", p]["named"] < 1  # some attempts fail without a single failed call


def test_figures_are_means_over_the_trials(trials, rows):
    named, truth = column(trials, "binary", 0.35, "named"), [trial.truth for trial in trials]
    row = rows["binary", 0.35]
    assert row["exact"] == sum(n == t for n, t in zip(named, truth, strict=True)) / 60
    assert row["mae"] == pytest.approx(sum(abs(n - t) for n, t in zip(named, truth, strict=True)) / 60)
    of_three = [n == t.truth for n, t in zip(named, trials, strict=True) if t.length == 3]
    assert row["by_k"]["3"] == sum(of_three) / len(of_three)
    assert wilson_interval(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-3)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0


def test_noise_leaves_failures_to_chance_but_never_saves_a_lost_prefix():
    noisy = run_trials(dataclasses.replace(TINY, trials=16, noise=0.2), jobs=1)
    assert all(n <= t.truth for n, t in zip(column(noisy, "dense", 1.0, "named"), noisy, strict=True))
    assert noisy != run_trials(dataclasses.replace(TINY, trials=16), jobs=1)


@pytest.mark.parametrize("bad", [["--trials", "0"], ["--noise", "1.5"], ["--jobs", "0"], ["--task", "wordmath"]])
def test_bad_input_is_one_sentence(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(bad)
    assert stopped.value.code == 2 and bad[0] in capsys.readouterr().err


def test_a_file_in_the_way_of_the_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["--trials", "1", "--out", str(tmp_path / "taken")])
    assert stopped.value.code == 2 and "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(localization, "run_trials", lambda *arguments: pytest.fail("the work began"))
    with pytest.raises(SystemExit) as stopped:
        main(["--trials", "1", "--out", "/proc"])
    assert stopped.value.code == 2 and "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_figures_are_shown_even_if_they_cannot_be_written(more, tmp_path, monkeypatch, capsys):
    def save(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(localization, "save", save)
    monkeypatch.setattr(localization, "machine", dict)
    with pytest.raises(SystemExit) as stopped:
        main(["--trials", "8", "--jobs", "1", "--out", str(tmp_path), *more])
    output, errors = capsys.readouterr()
    assert stopped.value.code == 2 and "No space left on device" in errors
    assert output.count("binary_printed") >= len(SUCCESS) if more else "Continuations per attempt" in output
