"""The page of a run in a real browser: it asks for nothing, shows what was written, and reacts to mouse and keys."""

import json
import os
import re
import shutil

import pytest
import report_fixture
from report_fixture import HOSTILE, build_hostile_run

from elpo_jax.report.page import build_report
from elpo_jax.report.text import printable


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
    source = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', source)[1])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(names)}, or set CHROMIUM to its path")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """Opens the page of a run with the network shut; in the end nothing was asked for and nothing went wrong."""
    contexts, complaints = [], []

    def opened(run, width=1280, height=800, scheme="light"):
        path = run / "report.html"
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url != path.as_uri() and complaints.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def first_tree(run, page):
    """The tree that is open, from the data of the page."""
    title = page.locator(".treetitle h3").inner_text()
    data = page_data(run / "report.html")
    return next(t for t in data["trees"] if t["task"]["id"] == title), data


def test_a_node_opens_the_attempt_at_its_step(run, visit):
    page = visit(run)
    tree, data = first_tree(run, page)
    assert page.locator(".node:not(.prompt)").count() == len(tree["nodes"])
    assert page.locator("button.leaf").count() == len(tree["leaves"])
    assert page.locator(".steps .probe").count() == len({p["at"] for s in tree["searches"] for p in s["probes"]})
    for index in (len(tree["nodes"]) - 1, 0):
        node = tree["nodes"][index]
        page.locator(f'[data-node="{index}"]').click()
        block = page.locator(".step.here")
        assert block.locator(".tokens").inner_text().replace("\u21b5", "") == "".join(
            data["vocabulary"][t][1] for t in node["tokens"]
        )
        text = block.inner_text()
        for number in (node["advantage"], node["branch"], node["trajectory"]):
            assert f"{number:+.3f}".replace("-", "\u2212") in text
        assert (node["result"] or {"text": ""})["text"] in text
    leaf = tree["leaves"][-1]
    page.locator("button.leaf").last.click()
    panel = page.locator(".attempt")
    assert panel.locator(".step").count() == len(leaf["path"])
    assert leaf["reason"] in panel.inner_text() and ("Solved" if leaf["success"] else "Failed") in panel.inner_text()
    panel.locator("summary").click()
    assert panel.locator("details pre").inner_text().strip() == tree["prompt"].strip()


def test_a_marked_step_says_how_it_is_known_and_what_the_oracle_says(run, visit):
    page = visit(run)
    words = {
        "verified": "located, verified",
        "unverified": "located, unverified",
        "assumed": "assumed from the tree",
    }
    classes = {"verified": "critical verified", "unverified": "critical unverified", "assumed": "assumed"}
    data = page_data(run / "report.html")
    known, compared = set(), set()
    for tree in data["trees"]:
        assert page.locator(".treetitle h3").inner_text() == tree["task"]["id"]
        for evidence, name in classes.items():
            nodes = page.locator(f".node.{name.replace(' ', '.')}")
            drawn = {int(i) for i in nodes.evaluate_all("nodes => nodes.map(node => node.dataset.node)")}
            assert drawn == {i for i, node in enumerate(tree["nodes"]) if node["evidence"] == evidence}
        drawn = page.locator(".node:has(.oracle)").evaluate_all("nodes => nodes.map(node => node.dataset.node)")
        assert {int(i) for i in drawn} == {i for i, node in enumerate(tree["nodes"]) if node["oracle"]}
        located = sum(node["evidence"] in ("verified", "unverified") for node in tree["nodes"])
        row = page.locator('.treelist li[aria-selected="true"] .marks').inner_text()
        assert row == (f"{located} located" if located else ""), "what was only assumed does not count"
        for number, leaf in enumerate(tree["leaves"]):
            if leaf["success"] or (leaf["evidence"], leaf["oracle"]) in compared:
                continue
            known.add(leaf["evidence"])
            compared.add((leaf["evidence"], leaf["oracle"]))
            page.locator(f'[data-leaf="{number}"]').click()
            said = f"step {leaf['first_failure']}, {words[leaf['evidence']]}"
            if leaf["oracle"]:
                same = leaf["oracle"] == leaf["first_failure"]
                said += f"; oracle: step {leaf['oracle']}, {'the same' if same else 'another one'}"
                exact = page.locator(".attempt .step", has=page.locator(".oracle"))
                assert exact.locator("h4").inner_text().startswith(f"Step {leaf['oracle']}")
            assert page.locator(".attempt .facts dd").nth(2).inner_text() == said
            tag = page.locator(f".attempt .step.{classes[leaf['evidence']].replace(' ', '.')} .tag").first
            assert tag.inner_text() == f"first irrecoverable step, {words[leaf['evidence']]}"
        page.locator(".treelist").press("n")
    assert known == set(words)
    rows = page.locator(".localization tbody tr")
    assert rows.count() == len(data["localization"]["rows"]) > 2
    for text, row in zip(rows.all_inner_texts(), data["localization"]["rows"], strict=True):
        assert words[row["evidence"]] in text and f"{100 * row['agree'] / row['steps']:.1f} %" in text


def test_a_call_that_was_refused_is_no_answer(run, visit):
    page = visit(run)
    data = page_data(run / "report.html")
    at, tree = next(
        (i, t) for i, t in enumerate(data["trees"]) if any(leaf["finish"] == "max_steps" for leaf in t["leaves"])
    )
    page.locator(".treelist li").nth(at).click()
    number = next(i for i, leaf in enumerate(tree["leaves"]) if leaf["finish"] == "max_steps")
    last = tree["leaves"][number]["path"][-1]
    assert page.locator(f'[data-node="{last}"] .name').inner_text() == "no calls left"
    assert page.locator(f'[data-node="{last}"] svg.no_calls').count() == 1
    page.locator(f'[data-leaf="{number}"]').click()
    block = page.locator(".attempt .step").last
    assert "called with no calls left" in block.locator("h4").inner_text()
    assert "<tool_call>" in block.locator(".tokens").inner_text() and block.locator(".part").count() == 0


def test_tokens_show_their_exact_values_and_take_the_chosen_colour(run, visit):
    page = visit(run)
    tree, data = first_tree(run, page)
    page.locator('[data-node="0"]').click()
    node = tree["nodes"][0]
    tokens = page.locator(".step.here .tokens span")
    for quantity, values, end in (
        ("advantage", [node["advantage"]] * len(node["tokens"]), 2),
        ("logprob", node["logprobs"], 3),
        ("entropy", node["entropies"], 2),
    ):
        page.locator(f'[data-by="{quantity}"]').click()
        shares = tokens.evaluate_all("spans => spans.map(span => parseInt(span.style.getPropertyValue('--share')))")
        assert shares == pytest.approx([100 * min(1, abs(value) / end) for value in values], abs=0.51)
    shades = tokens.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")
    assert len(set(shades)) > 5
    i = max(range(len(shares)), key=shares.__getitem__)
    tokens.nth(i).hover()
    tip = page.locator("#tip").inner_text().replace("\u2212", "-")
    token, string = data["vocabulary"][node["tokens"][i]]
    assert f"{json.dumps(string, ensure_ascii=False)} (id {token})" in tip
    assert f"log-probability {node['logprobs'][i]:.5f}" in tip and f"entropy {node['entropies'][i]:.5f} nats" in tip
    assert f"advantage {node['advantage']:+.3f}" in tip


def test_filters_and_keys_choose_the_tree(run, visit):
    page = visit(run)
    data = page_data(run / "report.html")
    rows = page.locator(".treelist li")
    titles = page.locator(".treelist .task")

    def expect(kept):
        assert rows.count() == len(kept) > 0
        assert titles.all_inner_texts() == [tree["task"]["id"] for tree in kept]
        assert page.locator(".treetitle h3").inner_text() == kept[0]["task"]["id"]

    expect(data["trees"])
    page.select_option("#filter-stage", "elpo")
    chosen = [t for t in data["trees"] if t["stage"] == "elpo"]
    ends = [{leaf["success"] for leaf in t["leaves"]} for t in chosen]
    for outcome, kinds in (("solved", {True}), ("failed", {False}), ("mixed", {True, False})):
        page.select_option("#filter-outcome", outcome)
        expect([t for t, found in zip(chosen, ends, strict=True) if found == kinds])
    page.select_option("#filter-outcome", "critical")
    located = ("verified", "unverified")
    expect([t for t in chosen if any(node["evidence"] in located for node in t["nodes"])])
    page.select_option("#filter-outcome", "mixed")
    page.select_option("#filter-family", "wordmath")
    chosen = [t for t in chosen if t["outcome"] == "mixed" and t["task"]["family"] == "wordmath"]
    expect(chosen)
    page.select_option("#filter-step", "20")
    expect([t for t in chosen if t["step"] == 20])
    page.select_option("#filter-step", "")
    page.fill("#filter-task", chosen[-1]["task"]["id"][-4:])
    expect([t for t in chosen if chosen[-1]["task"]["id"][-4:] in t["task"]["id"]])
    page.fill("#filter-task", "no such task")
    assert rows.count() == 0 and "no tree fits" in page.locator(".count").inner_text()
    assert page.locator(".tree").inner_text() == ""
    page.fill("#filter-task", "")
    page.select_option("#filter-family", "")
    page.select_option("#filter-outcome", "")
    chosen = [t for t in data["trees"] if t["stage"] == "elpo"]
    expect(chosen)
    page.locator(".treelist").press("n")
    page.locator(".treelist").press("ArrowDown")
    assert page.locator(".treetitle h3").inner_text() == chosen[2]["task"]["id"]
    page.locator(".treelist").press("p")
    assert page.locator(".treetitle h3").inner_text() == chosen[1]["task"]["id"]
    page.locator(".node.prompt").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.node") == "0"
    assert page.locator(".step.here h4").inner_text().startswith("Step 1")


def test_each_split_has_a_table_of_its_own_under_its_own_protocol(run, visit):
    captions = visit(run).locator("#results .caption")
    for title, line, tasks in (
        ("Held-out accuracy", report_fixture.LINE, "200"),
        ("Validation", report_fixture.VALIDATION, "50"),
    ):
        caption = captions.filter(has_text=title)
        assert line in caption.inner_text()
        table = caption.locator("xpath=following-sibling::*[1]").locator("table")
        assert table.get_attribute("aria-label") == title
        assert table.locator("tbody tr:not(.family)").count() == 6
        assert all(tasks in row.split() for row in table.locator("tbody tr:not(.family)").all_inner_texts())


def test_charts_have_axes_and_read_out_their_values(run, visit):
    page = visit(run)
    chart = page.locator("#curves .chart", has_text="Validation avg@4, ledger").first
    chart.locator("svg").wait_for()
    assert chart.locator("polygon.band").count() == 2 and chart.locator("polyline.line").count() == 2
    assert chart.locator(".tick").count() > 5 and "RL step" in chart.inner_text()
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 60)
    rows = [json.loads(line) for line in (run / "elpo" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/ledger/avg@4" in row][-1]
    tip = page.locator("#tip").inner_text()
    assert f"RL step {last['step']}" in tip and f"ELPO {100 * last['eval/ledger/avg@4']:.1f} %" in tip
    assert f"[{100 * last['eval/ledger/ci_low']:.1f}, {100 * last['eval/ledger/ci_high']:.1f}]" in tip
    bars = page.locator("#difficulty .bar")
    bars.last.wait_for()
    evaluations = [json.loads(path.read_text()) for path in (run / "eval").iterdir()]
    assert bars.count() == sum(len(f["by_difficulty"]) for e in evaluations for f in e["families"].values())
    assert page.locator("#difficulty .whisker").count() == bars.count()
    page.locator("#curves summary").first.click()
    hidden = page.locator("#curves .chart", has_text="status/error").locator("polyline")
    hidden.first.wait_for(state="attached")
    assert hidden.count() == 2


def test_the_results_stand_beside_their_protocol(run, visit):
    page = visit(run)
    text = page.locator("#results").inner_text()
    assert "79.0" in text and "[75.5, 82.4]" in text and "912,034" in text
    assert report_fixture.LINE in text
    assert page.locator("#difficulty figcaption", has_text=report_fixture.LINE).count() == 2
    head = page.locator("#header").inner_text()
    assert all(words in head for words in ("quickstart", "17", "3f9c2d1", "a laptop", report_fixture.LINE))


def test_the_cost_names_what_faults_of_ours_took(run, tmp_path, visit):
    table = 'table[aria-label="Cost of training"]'
    page = visit(run)
    head = page.locator(f"{table} thead th").all_inner_texts()
    lost = head.index("lost to faults of ours")
    cells = page.locator(f"{table} tbody tr", has_text="ELPO").locator("th, td").all_inner_texts()
    assert len(cells) == len(head) and cells[lost] == "3" and cells[-1] == "2 min 46 s"
    caption = page.locator("#results .caption", has_text="Cost of training").inner_text()
    assert "ELPO: 12 programs run again, 3 programs given up, paused for 40.5 s." in caption and "GRPO" not in caption
    # Results of before this was counted.
    old = tmp_path / "old"
    shutil.copytree(run, old)
    results = json.loads((old / "results.json").read_text())
    for name, row in results["budget"].items():
        results["budget"][name] = {key: row[key] for key in ("rollouts", "model_tokens", "tool_calls")}
    report_fixture.write(old / "results.json", results)
    build_report(old)
    page = visit(old)
    assert "faults of ours" not in page.locator("#results").inner_text()
    assert page.locator(f"{table} thead th").all_inner_texts() == [*head[:lost], *head[lost + 1 :]]
    for row in page.locator(f"{table} tbody tr").all():
        assert row.evaluate("row => [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0)") == len(head) - 1


def test_hostile_text_is_shown_and_does_not_run(hostile_run, visit):
    page = visit(hostile_run)
    page.locator(".node").evaluate_all("nodes => nodes.forEach((node) => node.click())")
    page.locator(".node", has_text="onerror").first.click()
    panel = page.locator(".attempt")
    panel.locator("summary").click()
    panel.locator(".tokens span").first.hover()
    everything = printable(" ".join(HOSTILE))
    assert panel.locator("details pre").text_content() == everything
    assert everything in panel.locator(".step.here").text_content()
    assert page.locator(".treetitle h3").text_content() == everything
    shown = panel.locator(".step.here .tokens span").all_text_contents()
    assert shown[: len(HOSTILE)] == [printable(text) for text in HOSTILE]
    assert page.evaluate("window.hit") is None
    assert page.locator("img, iframe, object, form, main script").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (380, "light")])
def test_the_page_fits_the_window(run, visit, width, scheme):
    page = visit(run, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((c) => c < 100)")
    assert dark == (scheme == "dark")
    cut = "els => els.filter(el => el.scrollHeight > el.clientHeight + 1 || el.scrollWidth > el.clientWidth + 1).length"
    assert page.locator(".leaf, .node .number, .choice button").evaluate_all(cut) == 0, "nothing is cut off"


def test_a_run_without_anything_to_draw_is_a_page_of_sentences(tmp_path, visit):
    run = tmp_path / "run"
    report_fixture.write(run / "config.json", report_fixture.CONFIG)
    build_report(run)
    page = visit(run)
    text = page.locator("body").inner_text()
    for words in ("no results yet", "there are no curves", "no evaluation by difficulty", "no trees to show"):
        assert words in text


def test_the_policy_stops_what_the_page_never_does(run, browser):
    """The second line of defence holds by itself: a request that something did try would not leave."""
    context = browser.new_context()
    page = context.new_page()
    asked, refused = [], []
    context.route("http://**", lambda route: (asked.append(route.request.url), route.abort()))
    page.on("console", lambda message: refused.append(message.text))
    page.goto((run / "report.html").as_uri())
    page.evaluate(
        """() => {
          for (const [tag, name] of [["img", "src"], ["script", "src"], ["iframe", "src"], ["link", "href"]]) {
            const element = document.createElement(tag);
            element.rel = "stylesheet";
            element[name] = "http://127.0.0.1:9/x";
            document.body.append(element);
          }
          document.body.insertAdjacentHTML("beforeend", "<b onclick='window.hit = 1'>x</b>");
          document.body.lastChild.click();
        }"""
    )
    page.wait_for_timeout(200)
    assert asked == [] and len(refused) >= 4
    assert page.evaluate("window.hit") is None
    context.close()
