"""The page of a run: what it says is what was written, and hostile text stays text (see also test_report_browser)."""

import base64
import dataclasses
import hashlib
import html.parser
import importlib.resources
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report_fixture
import tiny
from factories import make_tree
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import HOSTILE, build_hostile_run

from elpo_jax.policy.credit import assign
from elpo_jax.policy.recipes import elpo
from elpo_jax.report.curves import MOST_POINTS, RL_PANELS, SFT_PANELS, curves, thin
from elpo_jax.report.localization import localization
from elpo_jax.report.page import build_report
from elpo_jax.report.summary import paired_interval, result_tables
from elpo_jax.report.text import printable
from elpo_jax.report.trees import Dump, Vocabulary, embedded_trees, prepare, read_dumps
from elpo_jax.tools.base import Status
from elpo_jax.trees.serial import tree_from_json, tree_to_json
from elpo_jax.trees.trajectory import Finish
from elpo_jax.trees.tree import Leaf, SearchRecord
from experiments.run import show, summarise

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
    names = {"answer": "answer", "max_steps": "no_calls"}
    marked, probes, finals = 0, 0, set()
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
            final = names[true.trajectory.finish]
            assert [node["status"] for node in nodes] == [s.result.status if s.result else final for s in steps]
            finals.add(final)
            assert all(number in node["leaves"] for node in nodes)
            critical = [node["step"] for node in nodes if number in node["critical"]]
            failed = [all(not tree.leaves[i].trajectory.success for i in node["leaves"]) for node in nodes]
            assert critical == ([failed.index(True) + 1] if not true.trajectory.success else [])
            marked += len(critical)
            exact = [node["step"] for node in nodes if number in node["oracle"]]
            assert exact == ([leaf["oracle"]] if leaf["oracle"] else [])
            assert (leaf["oracle"] is None) == (tree.task.family == "wordmath")
            assert (leaf["oracle"] == 0) == (true.trajectory.success and tree.task.family == "ledger")
        for search, record in zip(ready["searches"], tree.searches, strict=True):
            for probe, true in zip(search["probes"], record.probes, strict=True):
                node = ready["nodes"][probe["at"]]
                assert node["step"] == true.step and record.leaf in node["leaves"]
                assert probe["solved"] == sum(tree.leaves[i].trajectory.success for i in true.leaves)
                assert set(true.leaves) <= set(node["leaves"])
                probes += 1
    assert marked > 5 and probes > 2 and finals == {"answer", "no_calls"}


class Oracle:
    """Names step 2, whatever it is asked."""

    def first_irrecoverable(self, task, states):
        return 2


def judged_tree(family=None):
    """Three failed roots: of two a search says where they were lost, of the others nobody knows. As a dumped line."""
    shape = [
        (None, 0, 3, False),  # 0: searched, verified, at step 2
        (None, 0, 3, False),  # 1: searched, not verified, at step 1
        (None, 0, 2, False),  # 2: never looked at
        (0, 1, 3, True),  # 3: step 1 of leaf 0 was not yet fatal
        (0, 2, 3, False),  # 4: shares the located step of leaf 0
        (0, 1, 2, False),  # 5: went its own way before it
        (1, 1, 1, False),  # 6: shares the step of leaf 1
    ]
    searches = (SearchRecord(0, "binary", 2, True), SearchRecord(1, "binary", 1, False))
    tree = make_tree(shape, searches=searches)
    line = tree_to_json(tree, decode_token=str, credit=assign(tree, elpo()), family=family)
    return line | {"rl_step": 1}


def test_a_marked_step_says_how_it_is_known():
    ready = prepare(judged_tree(Oracle()), "elpo", Vocabulary())
    known = ["verified", "unverified", "assumed", None, "verified", "assumed", "unverified"]
    assert [leaf["evidence"] for leaf in ready["leaves"]] == known
    assert [leaf["first_failure"] for leaf in ready["leaves"]] == [2, 1, 1, 0, 2, 2, 1]
    marks = {(node["step"], tuple(node["critical"])): node["evidence"] for node in ready["nodes"] if node["critical"]}
    assert marks == {(2, (0, 4)): "verified", (1, (1, 6)): "unverified", (1, (2,)): "assumed", (2, (5,)): "assumed"}
    assert all((node["evidence"] is None) == (not node["critical"]) for node in ready["nodes"])
    exact = {tuple(node["oracle"]): node["step"] for node in ready["nodes"] if node["oracle"]}
    assert exact == {(0, 4): 2, (1,): 2, (2,): 2, (3,): 2, (5,): 2, (6,): 2}


def test_a_step_that_a_search_named_but_credit_does_not_use_is_not_located():
    line = judged_tree()
    line["searches"] = [{**line["searches"][0], "first_failure": 3}]
    assert prepare(line, "elpo", Vocabulary())["leaves"][0]["evidence"] == "assumed"


def test_marked_steps_are_compared_with_the_oracle():
    line, torn, odd = judged_tree(Oracle()), judged_tree(Oracle()) | {"nodes": []}, judged_tree(Oracle())
    for leaf in odd["leaves"]:
        leaf["oracle"] = "two"
    found = localization([Dump("elpo", 1, [line, torn, odd]), Dump("elpo", 9, [line])])
    assert found["rows"] == [
        {"stage": "elpo", "evidence": "verified", "steps": 2, "agree": 2, "early": 0, "late": 0},
        {"stage": "elpo", "evidence": "unverified", "steps": 2, "agree": 0, "early": 2, "late": 0},
        {"stage": "elpo", "evidence": "assumed", "steps": 4, "agree": 2, "early": 2, "late": 0},
    ], "shared steps count once"
    assert "of toy in" in found["about"] and "elpo step 1, elpo step 9" in found["about"]
    assert localization([Dump("elpo", 1, [judged_tree()])]) is None, "no oracle was asked"


def test_dumps_without_the_oracles_step_are_shown(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in copy.glob("*/rollouts/*.jsonl"):
        trees = [json.loads(line) for line in path.read_text().splitlines()]
        for leaf in (leaf for tree in trees for leaf in tree["leaves"]):
            del leaf["oracle"]
        report_fixture.write_rows(path, trees)
    data, before = page_data(build_report(copy)), page_data(run / "report.html")
    assert data["localization"] is None and before["localization"]["rows"]
    assert data["notes"] == [] and len(data["trees"]) == len(before["trees"]) > 0
    assert all(leaf["oracle"] is None for tree in data["trees"] for leaf in tree["leaves"])


def test_a_final_turn_is_named_by_how_the_attempt_ended():
    tree = make_tree([(None, 0, 1, False)] * 4)
    finishes = [Finish.ANSWER, Finish.MAX_STEPS, Finish.LENGTH, Finish.LENGTH]
    attempts = [
        dataclasses.replace(leaf.trajectory, finish=finish) for leaf, finish in zip(tree.leaves, finishes, strict=True)
    ]
    attempts[3] = dataclasses.replace(attempts[3], steps=attempts[3].steps[:1])  # no room for the answer to its call
    tree = dataclasses.replace(tree, leaves=tuple(map(Leaf, attempts)))
    ready = prepare(tree_to_json(tree, decode_token=str) | {"rl_step": 1}, "elpo", Vocabulary())
    statuses = [[ready["nodes"][i]["status"] for i in leaf["path"]] for leaf in ready["leaves"]]
    assert statuses == [["ok", "answer"], ["ok", "no_calls"], ["ok", "cut"], ["ok"]]


def test_every_status_of_a_call_has_a_name_and_an_outline_of_its_own():
    script = (importlib.resources.files("elpo_jax.report") / "assets" / "tree.js").read_text()
    for table in ("STATUS_NAMES", "STATUS_PATHS"):
        (body,) = re.findall(rf"const {table} = {{(.*?)\n}};", script, re.DOTALL)
        entries = dict(re.findall(r'^  (\w+): "([^"]+)"', body, re.MULTILINE))
        assert {status.value for status in Status} <= set(entries)
        assert len(set(entries.values())) == len(entries)


def test_the_first_middle_and_last_dump_are_shown_mixed_trees_first(tmp_path):
    run = report_fixture.build_run(tmp_path / "run", dumps=(1, 10, 20, 30, 40), tasks=6)
    stages = {name: run / name for name in ("grpo", "elpo")}
    dumps, others, problems = read_dumps(stages)
    assert [(d.stage, d.step, len(d.trees)) for d in dumps] == [(s, n, 6) for s in stages for n in (1, 20, 40)]
    assert others == 4 and problems == []
    every, _ = embedded_trees(dumps, most=1000)
    assert {tree["step"] for tree in every["trees"]} == {1, 20, 40}
    assert len(every["trees"]) == 2 * 3 * 6
    some, _ = embedded_trees(dumps, most=18)
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
    small, _ = embedded_trees(dumps, most_bytes=300_000)
    assert 1 <= len(small["trees"]) < 10 and len(json.dumps(small["trees"])) <= 300_000


def test_the_page_says_which_trees_it_holds(run, tmp_path):
    note = page_data(run / "report.html")["treesNote"]
    assert note.startswith(
        "Embedded are 24 of the 24 trees in 6 dumps: 4 of 4 from grpo step 1, 4 of 4 from grpo step 20,"
    )
    assert "were read" not in note
    other = report_fixture.build_run(tmp_path / "run", dumps=(1, 2, 3, 4, 5), tasks=14)
    data = page_data(build_report(other))
    assert (
        data["treesNote"].startswith("Embedded are 60 of the 84 trees in 6 dumps: ") and "4 others" in data["treesNote"]
    )
    said = re.findall(r"(\d+) of 14 from (\w+) step (\d)", data["treesNote"])
    shown = [(tree["stage"], tree["step"]) for tree in data["trees"]]
    assert {(s, int(step)): int(n) for n, s, step in said} == {key: shown.count(key) for key in shown}


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


def test_curves_tell_the_sampler_from_drift_and_clipping_from_its_denominator():
    rows = report_fixture.rl_rows("elpo", 0.3, np.random.default_rng(0))
    group = curves({"elpo": rows})[0]
    panels = {panel["title"]: panel for panel in group["panels"]}

    def column(key):
        return [[row["step"], row[key]] for row in rows if key in row]

    for title, key in (
        ("Sampler against trainer, mean", "loss/first_mismatch_mean"),
        ("Sampler against trainer, largest", "loss/first_mismatch_max"),
        ("Drift within a batch, mean", "loss/mismatch_mean"),
        ("Drift within a batch, largest", "loss/mismatch_max"),
        ("Entropy of the policy", "rollout/entropy"),
    ):
        assert panels[title]["lines"] == [{"name": "elpo", "points": column(key), "band": []}]
    assert "at the first update" in panels["Sampler against trainer, mean"]["about"]
    for title in ("Clipped low", "Clipped high", "Kept by the relaxed bound"):
        assert "share of the model tokens of trees with different outcomes" in panels[title]["about"]
    assert "loss/entropy" in {panel["title"] for panel in group["rest"]}
    new = ("loss/first_mismatch_mean", "loss/first_mismatch_max", "rollout/entropy")
    old = curves({"elpo": [{key: row[key] for key in row if key not in new} for row in rows]})[0]
    assert {panel["title"] for panel in group["panels"]} - {panel["title"] for panel in old["panels"]} == {
        "Sampler against trainer, mean",
        "Sampler against trainer, largest",
        "Entropy of the policy",
    }


def comparison(grpo, elpo, budget=1000):
    results = {
        "families": {"a": {"sft": {"avg@8": 0.4, "ci": [0.3, 0.5], "n": 9}, "grpo": grpo, "elpo": elpo}},
        "budget": {"grpo": {"rollouts": 1000}, "elpo": {"rollouts": budget}},
    }
    return " ".join(result_tables(results, {})["reading"])


def test_the_comparison_is_put_in_words_that_fit_the_numbers():
    near = {"avg@8": 0.55, "ci": [0.5, 0.6], "n": 9}
    far = {"avg@8": 0.7, "ci": [0.65, 0.75], "n": 9}
    words = comparison(near, far)
    assert "a: avg@8 with ELPO is 30.0 points above SFT and 15.0 points above GRPO." in words
    assert "the same budget." in words and "over tasks, with one training seed" in words
    assert "overlap" not in words and "settle" not in words, (
        "intervals of two policies on the same tasks say no verdict"
    )
    assert "level with GRPO" in comparison(near, near)
    assert "15.0 points below GRPO" in comparison(far, near)
    assert "not the same budget" in comparison(far, near, 1200)


def test_policies_on_the_same_tasks_are_compared_task_by_task():
    rng = np.random.default_rng(1)
    easy = rng.random(200)  # how easy each task is; what both policies have in common is not noise of the difference
    grpo, elpo = easy * 0.8, easy * 0.8 + 0.1 + rng.normal(0, 0.02, 200)
    figures = [
        {"avg@8": float(np.mean(values)), "ci": [0.2, 0.7], "n": 200, "per_task": values.tolist()}
        for values in (grpo, elpo)
    ]
    low, high = paired_interval(elpo, grpo)
    assert 0.095 < low < np.mean(elpo - grpo) < high < 0.105
    error = np.std(elpo - grpo) / np.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    words = comparison(*figures)
    assert f"over 200 tasks: {100 * low:+.1f} to {100 * high:+.1f})" in words and words.count("paired bootstrap") == 1
    assert "per_task" not in json.dumps(result_tables({"families": {"a": {"elpo": figures[0]}}}, {}))
    shorter = figures[1] | {"per_task": elpo[:100].tolist()}
    assert "paired" not in comparison(figures[0], shorter), "other tasks"


def test_faults_of_ours_are_counted_and_shown(tiny_run, tmp_path, capsys):
    counts = ("lost_attempts", "sandbox_errors", "sandbox_retries", "paused_s")
    results = json.loads((tiny_run / "results.json").read_text())
    assert all(results["budget"][name][key] == 0 for name in ("grpo", "elpo") for key in counts)
    show(results)
    assert "faults of ours" not in capsys.readouterr().out
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("checkpoints", "compile_cache"))
    path = copy / "elpo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"sandbox/sandbox_errors", "sandbox/retries", "sandbox/paused_s"} <= rows[0].keys(), "what is counted"
    rows[0] |= {"rollout/infrastructure_failures": 2, "sandbox/sandbox_errors": 1.0, "sandbox/retries": 3.0}
    rows[1] |= {"rollout/infrastructure_failures": 1, "sandbox/retries": 4.0, "sandbox/paused_s": 12.34}
    rows[2] = {key: value for key, value in rows[2].items() if not key.startswith("sandbox/")}
    report_fixture.write_rows(path, rows)
    counted = summarise(tiny.get_config(), copy, 0.0)
    assert [counted["budget"]["elpo"][key] for key in counts] == [3, 1, 7, 12.3]
    assert counted["budget"]["grpo"] == results["budget"]["grpo"]
    show(counted)
    said = capsys.readouterr().out
    assert "; faults of ours: attempts lost 3, programs given up 1, programs run again 7, seconds paused 12.3\n" in said
    row = next(row for row in result_tables(counted, {})["budget"] if row["name"] == "elpo")
    assert [row[key] for key in counts] == [3, 1, 7, 12.3]


# --- a real run ------------------------------------------------------------------------------------------------------


def test_the_page_of_a_real_run_shows_all_of_it(tiny_run):
    data = page_data(tiny_run / "report.html")
    assert data["notes"] == []
    for stage, listed in (("sft", SFT_PANELS), ("grpo", RL_PANELS), ("elpo", RL_PANELS)):
        rows = [json.loads(line) for line in (tiny_run / stage / "metrics.jsonl").read_text().splitlines()]
        assert {key for key, _, _ in listed} <= {key for row in rows for key in row}, "every panel has its metric"
        group = next(g for g in data["curves"] if any(line["name"] == stage for line in g["panels"][-1]["lines"]))
        assert {title for _, title, _ in listed} <= {panel["title"] for panel in group["panels"]}
    written = [
        json.loads(line) for path in tiny_run.glob("*/rollouts/*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(data["trees"]) == len(written) > 0
    assert {(tree["stage"], tree["step"]) for tree in data["trees"]} == {
        (s, n) for s in ("grpo", "elpo") for n in (1, 2, 3)
    }
    for tree in data["trees"]:
        for leaf in tree["leaves"]:
            last = tree["nodes"][leaf["path"][-1]]
            assert last["status"] == {"max_steps": "no_calls", "length": "cut", "answer": "answer"}[leaf["finish"]] or (
                leaf["finish"] == "length" and last["result"]
            )
            exact = tree["task"]["family"] == "ledger"
            assert (leaf["oracle"] is not None) == exact
            assert not exact or (leaf["oracle"] == 0) == leaf["success"]
            assert (leaf["evidence"] is None) == leaf["success"]
    assert data["localization"]["rows"] and "ledger" in data["localization"]["about"]
    assert sum(row["late"] for row in data["localization"]["rows"]) == 0, "what was solved afterwards was not lost"


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
