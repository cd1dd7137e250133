"""The page on the sandbox says what the code does, where a machine can tell."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from elpo_jax.tools.base import Status
from elpo_jax.tools.sandbox.backends import LAYERS, LOCAL
from elpo_jax.tools.sandbox.limits import Limits

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sandbox.md").read_text()
README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def test_the_limits_and_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", section("Limits"), re.MULTILINE)
    assert rows == [(field.name, str(field.default)) for field in dataclasses.fields(Limits)]


def test_every_status_is_explained():
    text = section("Statuses")
    assert all(f"`{status.value}`" in text for status in Status)
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    faults = {status.value for status in Status if status.is_fault}
    assert {status for status, blame in rows.items() if blame == "its fault"} == faults & set(rows)


def test_every_layer_and_backend_is_explained():
    rows = re.findall(r"^\| (`.*?) \|", section("How it works"), re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted({layer for layers in LAYERS.values() for layer in layers})
    backends = re.findall(r"^- \*\*(\w+)\*\*", section("What is promised"), re.MULTILINE)
    assert backends == [*LOCAL, "remote", "unsafe"]


def test_the_page_is_finished_and_linked():
    assert "TODO" not in PAGE and "<!--" not in PAGE
    table = re.findall(r"^\| (.*) \|$", section("Figures"), re.MULTILINE)[2:]
    assert len(table) == 7 and all(re.search(r"\d", row.split(" | ")[1]) for row in table)
    assert README.count("](docs/sandbox.md)") == 2, "in the table of folders and among the limits"


@pytest.mark.parametrize(
    ("text", "opening", "said"),
    [
        (README, "from elpo_jax.tools.base", ["ok '1024'", r"ok 'x\n7'", "passed"]),
        (PAGE, "from elpo_jax.tools.sandbox import Limits, Program", []),
    ],
    ids=["README", "page"],
)
def test_the_examples_run(text, opening, said, tmp_path):
    code = textwrap.dedent(
        re.search(rf"(?:^    .*\n|^\n)*^    {re.escape(opening)}.*\n(?:^    .*\n|^\n)*", text, re.MULTILINE)[0]
    )
    lines = re.findall(r'\{"id".*\}', code) or ["{}"]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == said
