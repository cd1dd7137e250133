"""The page on the sandbox says what the code does, where a machine can tell."""

import dataclasses
import pathlib
import re

from elpo_jax.tools.base import Status
from elpo_jax.tools.sandbox.backends import LAYERS, LOCAL
from elpo_jax.tools.sandbox.limits import Limits

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "sandbox.md").read_text()


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
