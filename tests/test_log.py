"""What a run writes survives a kill, a resume and bad numbers; progress is told in plain lines and safe text."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from elpo_jax.report.log import MetricsLog, finite, read_json, read_metrics, write_json, write_text
from elpo_jax.report.progress import PLAIN_SECONDS, RATE_SECONDS, Progress, duration, short

ROOT = Path(__file__).parents[1]


def rows(*steps):
    return [{"step": step, "loss": step / 7, "note": "café\n\u2028"} for step in steps]


# --- the log ---------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for row in rows(1, 2, 3):
            log.write(row)
        assert read_metrics(path) == rows(1, 2, 3), "a row can be read as soon as it is written"
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == rows(1, 2, 3)
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(
            {
                "step": np.int64(1),
                "a": float("nan"),
                "b": float("-inf"),
                "c": np.float32(0.5),
                "d": np.array(2.0),
                "e": True,
            }
        )
    assert read_metrics(path) == [{"step": 1, "a": None, "b": None, "c": 0.5, "d": 2.0, "e": True}]
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1.5}, {"step": None}, {"step": True}])
def test_a_row_without_a_step_is_refused(tmp_path, row):
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match='integer "step"'):
        log.write(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_an_array_is_refused():
    with pytest.raises(TypeError, match="ndarray"):
        finite({"x": np.zeros(3)})


@given(st.data())
def test_a_log_cut_at_any_byte_goes_on(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for row in rows(1, 2, 3):
            log.write(row)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = rows(1, 2, 3)[: whole[:cut].count(b"\n")]
    assert read_metrics(path) == kept
    with MetricsLog(path) as log:
        log.write({"step": 9})
    assert read_metrics(path) == [*kept, {"step": 9}]


@pytest.mark.parametrize("step", [0, 2, 3, 10])
def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for row in [*rows(1, 2), {"step": 2, "eval/a/avg@4": 0.5}, *rows(3, 4)]:
            log.write(row)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    with MetricsLog(path) as log:
        log.truncate_after(step)
        log.write({"step": step + 1})
    expected = [row for row in [*rows(1, 2), {"step": 2, "eval/a/avg@4": 0.5}, *rows(3, 4)] if row["step"] <= step]
    assert read_metrics(path) == [*expected, {"step": step + 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    code = (
        "import sys\nfrom elpo_jax.report.log import MetricsLog\nlog = MetricsLog(sys.argv[1])\n"
        "for step in range(10**9):\n  log.write({'step': step, 'x': 'y' * 300})\n"
        "  if step == 500: print('far', flush=True)\n"
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    found = read_metrics(path)
    assert len(found) > 500 and [row["step"] for row in found] == list(range(len(found)))


# --- files that are replaced -----------------------------------------------------------------------------------------


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"a": 1, "b": [float("inf"), np.float64(2)], "c": (1, 2)})
    assert read_json(path) == {"a": 1, "b": [None, 2.0], "c": [1, 2]}
    before = path.read_bytes()
    with pytest.raises(TypeError, match="object"):
        write_json(path, {"a": object()})

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "half")
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_damaged_json_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"half')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


# --- progress --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def follow(terminal=False, **options):
    text, clock = io.StringIO(), Clock()
    console = Console(file=text, force_terminal=terminal, width=200, color_system=None)
    return Progress(console=console, clock=clock, **options), clock, text


def test_a_log_file_gets_a_plain_line_now_and_then():
    progress, clock, text = follow(title="elpo", total=100)
    with progress:
        for step in range(1, 41):
            clock.now += 1.0
            progress.update(step, tokens=500, rollouts=16, root_success=0.25 + step / 1000)
        lines = text.getvalue().splitlines()
    assert len(lines) == 40 // PLAIN_SECONDS
    assert lines[1] == "elpo: 20/100, 500 tokens/s, 16 rollouts/s, 1:20 left, root_success 0.27"
    assert text.getvalue().splitlines()[-1].endswith("root_success 0.29, took 40 s")
    assert "\x1b" not in text.getvalue()


def test_time_left_follows_the_recent_pace_and_counts_down():
    progress, clock, _ = follow(title="sft", total=1000, start=400)
    with progress:
        for step in range(401, 411):  # slow at first: compilation
            clock.now += 10.0
            progress.update(step)
        for step in range(411, 501):
            clock.now += 1.0
            progress.update(step, tokens_per_s=2e4)
        assert RATE_SECONDS < 90 and "8:20 left" in progress.tail()  # 500 steps of one second
        clock.now += 20.0
        assert "8:19 left" in progress.tail(), "a step that takes long leaves those after it to do"
        assert progress.tail().startswith("500/1000") and "20k tokens/s" in progress.tail()


@pytest.mark.parametrize("told_by", ["within", "update"])
def test_the_time_left_and_the_rates_are_right_where_a_step_takes_minutes(told_by):
    """Steps of 120 s on average, 16 of them: 90 rollouts, one a second, and then the update."""
    progress, clock, _ = follow(title="elpo", total=16)
    lengths = [114.0, 126.0, 117.0, 123.0] * 4
    end = clock.now + sum(lengths)
    tails = []
    with progress:
        for step, length in enumerate(lengths, 1):
            for rollouts in range(1, 91):
                clock.now += 1.0
                if told_by == "within":
                    progress.within(rollouts)
                else:
                    progress.update(step - 1, rollouts=1)
                tails.append((step, end - clock.now, progress.tail()))
            clock.now += length - 90.0
            tails.append((step, end - clock.now, progress.tail()))
            progress.update(step, tokens=100 * length)
    for step, truth, tail in tails:
        if step == 1:
            assert "left" not in tail, "nothing is known before the first step has ended"
            continue
        minutes, seconds = re.search(r"(?:(\d+):)?(\d+)(?: s)? left", tail).groups(default="0")
        assert abs(60 * int(minutes) + int(seconds) - truth) < 0.06 * truth + 10, (step, truth, tail)
        assert ", 100 tokens/s, " in tail and 0.7 < float(re.search(r"([\d.]+) rollouts/s", tail)[1]) < 0.8


def test_rollouts_of_the_step_under_way_are_told():
    progress, clock, text = follow(title="elpo", total=4)
    with progress:
        clock.now += 20.0
        progress.within(50)
        assert "50 rollouts of the next at 2.5/s" in text.getvalue()
        clock.now += 30.0
        assert "50 rollouts of the next at 2.5/s" in progress.tail(), "the rate is that of sampling"
        progress.update(1)
        assert progress.tail() == "1/4, 1 rollouts/s, 2:30 left"


def test_text_of_a_model_cannot_drive_the_terminal():
    progress, clock, text = follow(title="a\x1b[2J", total=2)
    with progress:
        clock.now += 11
        progress.update(1, task="[bold]x[/bold]\x1b]0;owned\x07", **{"k\r": 1})
        progress.say("line\nbreak \u202e[red]")
    assert not set("\x1b\x07\r\u202e") & set(text.getvalue())
    assert "task [bold]x[/bold]‹ESC›]0;owned‹BEL›, k‹CR› 1" in text.getvalue()
    assert "line‹LF›break ‹U+202E›[red]\n" in text.getvalue()


def test_a_terminal_gets_a_bar_and_one_last_line():
    progress, clock, text = follow(terminal=True, title="[elpo]", total=3)
    with progress:
        for step in range(1, 4):
            clock.now += 2
            progress.update(step, loss=1 / 3)
        progress.say("in between")
    shown = text.getvalue()
    assert "\x1b" in shown and "━" in shown and "in between" in shown
    assert shown.splitlines()[-1].endswith("[elpo]: 3/3, loss 0.3333, took 6 s")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.43124, "0.4312"),
        (1.25e-5, "1.25e-05"),
        (52345, "52.3k"),
        (-2.5e6, "-2.5M"),
        (7e9, "7G"),
        (np.float32(0.5), "0.5"),
        (float("nan"), "nan"),
        ("x\n", "x‹LF›"),
    ],
)
def test_short_values(value, text):
    assert short(value) == text


def test_durations():
    assert [duration(s) for s in (-3, 0.4, 59.4, 59.6, 187, 3753)] == ["0 s", "0 s", "59 s", "1:00", "3:07", "1:02:33"]


def test_the_log_needs_neither_jax_nor_the_page():
    code = (
        "import sys, elpo_jax.report.log, elpo_jax.report.progress, elpo_jax.report.page\nprint('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
