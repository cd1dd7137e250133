"""The page of a run: what it says is what was written, and hostile text stays text (see also test_report_browser)."""

import base64
import hashlib
import html.parser
import importlib.resources
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_fixture
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import HOSTILE, build_hostile_run

from elpo_jax.report.curves import MOST_POINTS, curves, thin
from elpo_jax.report.page import build_report
from elpo_jax.report.summary import result_tables
from elpo_jax.report.text import printable
from elpo_jax.report.trees import Vocabulary, embedded_trees, prepare
from elpo_jax.trees.serial import tree_from_json

ROOT = Path(__file__).parents[1]


class Parts(html.parser.HTMLParser):
    """The page's style, scripts, data and policy, as a browser's parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.policy, self._open, self.attributes = {}, "", None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.attributes += attributes
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]
        if tag in ("script", "style"):
            self._open = "data" if named.get("id") == "data" else tag
            assert self._open not in self.found, f"a second {self._open}"
            self.found[self._open] = ""

    def handle_data(self, data):
        if self._open:
            self.found[self._open] += data

    def handle_endtag(self, tag):
        self._open = None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = report_fixture.build_run(tmp_path_factory.mktemp("report") / "run", tasks=4)
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    folder = build_hostile_run(tmp_path_factory.mktemp("hostile") / "run")
    build_report(folder)
    return folder


def page_data(path):
    return json.loads(Parts(path.read_text(encoding="utf-8")).found["data"])


# --- text ------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec=None)))  # surrogates too
def test_printable_text_is_visible_and_keeps_all_else(text):
    shown = printable(text, lines=True)
    shown.encode()
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", shown
    )
    assert "\n" not in printable(text)
    plain = [c for c in text if c.isprintable() or c in "\n\t "]
    rest = iter(shown)
    assert all(c in rest for c in plain), "the visible characters are there, in order"


def test_printable_names_what_it_replaces():
    assert printable("a\x1b[0m\u202eb\x7f\r\n") == "a‹ESC›[0m‹U+202E›b‹U+007F›‹CR›‹LF›"


# --- the file --------------------------------------------------------------------------------------------------------


def test_hostile_text_cannot_leave_the_data_block(hostile_run):
    source = (hostile_run / "report.html").read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*)', source)[1]
    block = block[: block.index("</script>")]
    assert not set("<>&\u2028\u2029\x1b\x00") & set(block)
    data = json.loads(block)
    tree = data["trees"][0]
    everything = printable(" ".join(HOSTILE))
    called = next(node for node in tree["nodes"] if node["call"])
    assert called["text"] == called["result"]["text"] == tree["prompt"] == tree["task"]["id"] == everything
    assert called["call"]["name"] == HOSTILE[1]
    assert {string for _, string in data["vocabulary"]} == set(map(printable, HOSTILE))


def test_the_policy_names_the_only_style_and_script_and_nothing_else(run):
    parts = Parts((run / "report.html").read_text(encoding="utf-8"))

    def hashed(name):
        return "'sha256-" + base64.b64encode(hashlib.sha256(parts.found[name].encode()).digest()).decode() + "'"

    rules = dict(rule.strip().split(" ", 1) for rule in parts.policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": hashed("script"),
        "style-src": hashed("style"),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [value for name, value in parts.attributes if name in ("src", "href", "action", "style")] == ["data:,"]
    assert not [name for name, _ in parts.attributes if name.startswith("on")]


def test_the_script_makes_no_markup_from_text_and_names_no_address():
    assets = importlib.resources.files("elpo_jax.report") / "assets"
    for asset in assets.iterdir():
        text = asset.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|fetch\(|url\(|@import", text
        )
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}


# --- trees -----------------------------------------------------------------------------------------------------------


def test_a_prepared_tree_tells_the_same_as_the_tree(run):
    """Against `tree_from_json`, which reads the same line by another way."""
    lines = (run / "elpo" / "rollouts" / "step_000020.jsonl").read_text().splitlines()
    marked = probes = 0
    for line in map(json.loads, lines):
        vocabulary = Vocabulary()
        ready, tree = prepare(line, "elpo", vocabulary), tree_from_json(line)
        for number, (leaf, true) in enumerate(zip(ready["leaves"], tree.leaves, strict=True)):
            steps = true.trajectory.steps
            nodes = [ready["nodes"][i] for i in leaf["path"]]
            assert [node["text"] for node in nodes] == [step.text for step in steps]
            assert [[vocabulary.entries[t][0] for t in node["tokens"]] for node in nodes] == [
                s.turn.ids.tolist() for s in steps
            ]
            assert [node["status"] for node in nodes] == [s.result.status if s.result else "answer" for s in steps]
            assert all(number in node["leaves"] for node in nodes)
            critical = [node["step"] for node in nodes if number in node["critical"]]
            failed = [all(not tree.leaves[i].trajectory.success for i in node["leaves"]) for node in nodes]
            assert critical == ([failed.index(True) + 1] if not true.trajectory.success else [])
            marked += len(critical)
        for search, record in zip(ready["searches"], tree.searches, strict=True):
            for probe, true in zip(search["probes"], record.probes, strict=True):
                node = ready["nodes"][probe["at"]]
                assert node["step"] == true.step and record.leaf in node["leaves"]
                assert probe["solved"] == sum(tree.leaves[i].trajectory.success for i in true.leaves)
                assert set(true.leaves) <= set(node["leaves"])
                probes += 1
    assert marked > 5 and probes > 2


def test_the_first_middle_and_last_dump_are_shown_mixed_trees_first(tmp_path):
    run = report_fixture.build_run(tmp_path / "run", dumps=(1, 10, 20, 30, 40), tasks=6)
    stages = {name: run / name for name in ("grpo", "elpo")}
    every, _ = embedded_trees(stages, most=1000)
    assert {tree["step"] for tree in every["trees"]} == {1, 20, 40}
    assert len(every["trees"]) == every["seen"] == 2 * 3 * 6 and every["dumps"] == 10
    some, _ = embedded_trees(stages, most=18)
    assert len(some["trees"]) == 18
    for stage in stages:
        for step in (1, 20, 40):
            for family in report_fixture.FAMILIES:
                there = [
                    t for t in every["trees"] if (t["stage"], t["step"], t["task"]["family"]) == (stage, step, family)
                ]
                shown = [
                    t for t in some["trees"] if (t["stage"], t["step"], t["task"]["family"]) == (stage, step, family)
                ]
                assert 1 <= len(shown) <= 2, "every stage, dump and family has its turn"
                left_out = [t for t in there if t["task"]["id"] not in {s["task"]["id"] for s in shown}]
                if any(t["outcome"] == "mixed" for t in left_out):
                    assert all(t["outcome"] == "mixed" for t in shown)
    small, _ = embedded_trees(stages, most_bytes=300_000)
    assert 1 <= len(small["trees"]) < 10 and len(json.dumps(small["trees"])) <= 300_000


# --- curves and tables -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000), st.integers(1, 400))
def test_thinning_keeps_the_mean_within_each_run(values, most):
    points = [[i, value] for i, value in enumerate(values)]
    thinned = thin(points, most)
    assert len(thinned) <= most
    size = -(-len(points) // most)
    for k, (x, y) in enumerate(thinned):
        run = points[k * size : (k + 1) * size]
        assert x == pytest.approx(sum(p[0] for p in run) / len(run)) and y == pytest.approx(
            sum(p[1] for p in run) / len(run), abs=1e-6
        )


def test_curves_put_the_algorithms_on_the_same_axes():
    rows = [{"step": 1, "rollout/root_success/a": 0.1, "loss": None, "x": 2}]
    rows += [
        {
            "step": 2,
            "rollout/root_success/a": 0.3,
            "loss": 0.5,
            "eval/a/avg@4": 0.2,
            "eval/a/ci_low": 0.1,
            "eval/a/ci_high": 0.4,
        }
    ]
    imitation = [{"step": i, "loss": 1.0} for i in range(1, 1000)]
    groups = curves({"sft": imitation, "grpo": rows, "elpo": rows[:1]}, "validation split")
    panels = {panel["title"]: panel for panel in groups[0]["panels"]}
    assert set(panels) == {"Training success, a", "Validation avg@4, a", "Loss"}
    success = panels["Training success, a"]
    assert [(line["name"], line["points"]) for line in success["lines"]] == [
        ("grpo", [[1, 0.1], [2, 0.3]]),
        ("elpo", [[1, 0.1]]),
    ]
    assert panels["Validation avg@4, a"]["lines"] == [{"name": "grpo", "points": [[2, 0.2]], "band": [[2, 0.1, 0.4]]}]
    assert "validation split" in panels["Validation avg@4, a"]["about"] and "validation" not in groups[0]["about"]
    assert panels["Loss"]["lines"][0]["points"] == [[2, 0.5]], "what was not finite leaves a gap"
    assert [panel["title"] for panel in groups[0]["rest"]] == ["x"], "no metric is hidden"
    assert len(groups[1]["panels"][0]["lines"][0]["points"]) <= MOST_POINTS


def test_the_comparison_is_put_in_words_that_fit_the_numbers():
    def results(grpo, elpo, budget):
        return {
            "families": {"a": {"sft": {"avg@8": 0.4, "ci": [0.3, 0.5], "n": 9}, "grpo": grpo, "elpo": elpo}},
            "budget": {"grpo": {"rollouts": 1000}, "elpo": {"rollouts": budget}},
        }

    near = {"avg@8": 0.55, "ci": [0.5, 0.6], "n": 9}
    far = {"avg@8": 0.7, "ci": [0.65, 0.75], "n": 9}
    words = " ".join(result_tables(results(near, far, 1000), {})["reading"])
    assert "30.0 points above SFT (the intervals do not overlap)" in words
    assert "15.0 points above GRPO (the intervals do not overlap)" in words and "the same budget." in words
    words = " ".join(result_tables(results(near, far | {"ci": [0.59, 0.75]}, 1005), {})["reading"])
    assert "15.0 points above GRPO (the intervals overlap: this run does not settle it)" in words
    assert "level with GRPO" in " ".join(result_tables(results(near, near, 1000), {})["reading"])
    words = " ".join(result_tables(results(far, near | {"ci": [0.5, 0.66]}, 1200), {})["reading"])
    assert "15.0 points below GRPO (the intervals overlap: this run does not settle it)" in words
    assert "not the same budget" in words


# --- unfinished and damaged runs -------------------------------------------------------------------------------------


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    run = report_fixture.build_run(tmp_path / "run", dumps=())
    for name in ("results.json", "eval/sft.json", "eval/grpo.json", "eval/elpo.json", "elpo/metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "grpo")
    (run / "elpo").mkdir(exist_ok=True)
    (run / "elpo" / "metrics.jsonl").write_text("")
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "lo')
    data = page_data(build_report(run))
    notes = " ".join(data["notes"])
    for words in ("no results.json", "No evaluation", "no GRPO stage", "elpo has written no metrics"):
        assert words in notes
    assert "no trees to show" in data["treesNote"] and data["trees"] == []
    assert [group["title"] for group in data["curves"]] == ["Cold start"]


def test_damaged_files_are_named_and_left_out(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "config.json").write_text('{"half')
    (copy / "sft" / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    dump = copy / "elpo" / "rollouts" / "step_000001.jsonl"
    lines = dump.read_text().splitlines()
    other = json.dumps(json.loads(lines[1]) | {"nodes": []})
    dump.write_text("\n".join([lines[0], other, lines[2][:500]]))
    data = page_data(build_report(copy))
    notes = " ".join(data["notes"])
    assert "config.json is not a JSON object" in notes
    assert "curves of sft are missing" in notes and "line 2" in notes
    assert "step_000001.jsonl: 1 of its lines" in notes and "not in the format of this version" in notes
    assert len([tree for tree in data["trees"] if (tree["stage"], tree["step"]) == ("elpo", 1)]) == 1


def test_the_command_writes_the_page_or_says_what_is_wrong(run, tmp_path):
    def command(folder):
        return subprocess.run(
            [sys.executable, "-m", "elpo_jax.report", folder], cwd=ROOT, capture_output=True, text=True
        )

    done = command(run)
    assert done.returncode == 0 and Path(done.stdout.strip()) == run / "report.html"
    for folder, words in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds nothing that a run writes")):
        failed = command(folder)
        assert failed.returncode == 1 and words in failed.stderr and "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []
