// Starts the page: sections from top to bottom, then the tree viewer with its filters, list and keys.

const data = JSON.parse(byId("data").textContent);

const OUTCOMES = {
  "": ["all outcomes", () => true],
  solved: ["all attempts solved", (tree) => tree.outcome === "solved"],
  failed: ["all attempts failed", (tree) => tree.outcome === "failed"],
  mixed: ["mixed", (tree) => tree.outcome === "mixed"],
  critical: ["has a located critical step", (tree) => tree.nodes.some(isLocated)],
};

const viewer = { listed: [], at: 0, drawn: null, parts: {} };

function startViewer() {
  const section = byId("trees");
  section.append(h("p", { class: "protocol" }, data.treesNote));
  if (!data.trees.length) return;
  const filters = filterControls();
  Object.assign(viewer.parts, turnControls(), {
    list: h("ul", { class: "treelist", role: "listbox", tabindex: 0, "aria-label": "Trees" }),
    title: h("div", { class: "treetitle" }),
    tree: h("div", { class: "tree", role: "group", "aria-label": "Rollout tree: arrow keys move, Enter opens a step" }),
    attempt: h("aside", { class: "attempt", tabindex: 0 }),
  });
  const { count, before, after, list: rows, title, tree, attempt } = viewer.parts;
  section.append(
    h("div", { class: "filters" }, filters, h("span", { class: "turn" }, count, before, after)),
    rows,
    treeLegend(),
    h("div", { class: "viewer" }, h("div", { class: "stage" }, title, tree), attempt),
    keyHelp(),
  );
  Object.assign(panel, { box: attempt, vocabulary: data.vocabulary, choose: pick });
  rows.addEventListener("keydown", listKeys);
  document.addEventListener("keydown", turnKeys);
  responsiveTree(tree);
  list(0);
}

// One labelled control for each thing that trees can be filtered by.
function filterControls() {
  const distinct = (of) => [...new Set(data.trees.map(of))].map((value) => [value, value]);
  const choices = {
    stage: [["", "all stages"], ...distinct((tree) => tree.stage)],
    step: [["", "all steps"], ...distinct((tree) => tree.step).sort((a, b) => a[0] - b[0])],
    outcome: Object.entries(OUTCOMES).map(([value, [text]]) => [value, text]),
    family: [["", "all families"], ...distinct((tree) => tree.task.family)],
  };
  for (const [name, options] of Object.entries(choices)) {
    const items = options.map(([value, text]) => h("option", { value }, text));
    viewer.parts[name] = h("select", { id: `filter-${name}` }, items);
  }
  const search = { type: "search", id: "filter-task", placeholder: "part of a task id", spellcheck: "false" };
  viewer.parts.task = h("input", search);
  return [...Object.keys(choices), "task"].map((name) => {
    viewer.parts[name].addEventListener("input", () => list(0));
    return h("label", {}, name, viewer.parts[name]);
  });
}

function turnControls() {
  const before = h("button", { type: "button", "aria-keyshortcuts": "p" }, "Previous");
  const after = h("button", { type: "button", "aria-keyshortcuts": "n" }, "Next");
  before.addEventListener("click", () => show(viewer.at - 1));
  after.addEventListener("click", () => show(viewer.at + 1));
  return { before, after, count: h("span", { class: "count", role: "status" }) };
}

function keyHelp() {
  const key = (name) => h("kbd", {}, name);
  const turn = ["Keys: ", key("n"), " and ", key("p"), " go to the next and the previous tree; "];
  const inside = ["inside a tree the arrow keys move between steps and ", key("Enter"), " opens one."];
  return h("p", { class: "keys" }, turn, inside);
}

function responsiveTree(box) {
  let width = box.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(box.clientWidth - width) < 2 || !viewer.listed.length) return;
    width = box.clientWidth;
    viewer.drawn = drawTree(box, panel.tree, pick);
    viewer.drawn.mark(panel.node, panel.leaf);
  }).observe(box);
}

// Applies the filters and shows the tree at `at` of what is left.
function list(at) {
  const { stage, step, outcome, family, task, list: box, count } = viewer.parts;
  const wanted = task.value.trim().toLowerCase();
  viewer.listed = data.trees.filter(
    (tree) =>
      (!stage.value || tree.stage === stage.value) &&
      (!step.value || String(tree.step) === step.value) &&
      (!family.value || tree.task.family === family.value) &&
      OUTCOMES[outcome.value][1](tree) &&
      tree.task.id.toLowerCase().includes(wanted),
  );
  box.replaceChildren(...viewer.listed.map(listRow));
  count.textContent = viewer.listed.length ? "" : "no tree fits these filters";
  show(at);
}

function listRow(tree, i) {
  const solved = tree.leaves.filter((leaf) => leaf.success).length;
  const critical = tree.nodes.filter(isLocated).length;
  const row = h(
    "li",
    { id: `row-${i}`, role: "option", "aria-selected": "false" },
    h(
      "span",
      { class: "where" },
      styled(h("i", { class: "dot" }), { background: colour(tree.stage) }),
      `${label(tree.stage)} step ${tree.step}`,
    ),
    h("span", { class: "task" }, tree.task.id),
    h(
      "span",
      { class: "strip", "aria-hidden": "true" },
      tree.leaves.map((leaf) => h("i", { class: leaf.success ? "solved" : "failed" })),
    ),
    h("span", { class: "share" }, `${solved}/${tree.leaves.length} solved`),
    h("span", { class: "marks" }, critical ? `${critical} located` : ""),
  );
  row.addEventListener("click", () => show(i));
  return row;
}

function show(at) {
  const { listed, parts } = viewer;
  const rows = [...parts.list.children];
  viewer.at = clamp(at, 0, Math.max(0, listed.length - 1));
  rows.forEach((row, i) => row.setAttribute("aria-selected", String(i === viewer.at)));
  parts.list.setAttribute("aria-activedescendant", rows.length ? `row-${viewer.at}` : "");
  parts.before.disabled = viewer.at === 0;
  parts.after.disabled = viewer.at >= listed.length - 1;
  if (!listed.length) {
    for (const part of [parts.title, parts.tree, parts.attempt]) part.replaceChildren();
    return;
  }
  parts.count.textContent = `tree ${viewer.at + 1} of ${listed.length}`;
  keepInView(parts.list, rows[viewer.at]);
  const tree = listed[viewer.at];
  panel.tree = tree;
  parts.title.replaceChildren(
    h("h3", {}, tree.task.id),
    h("p", {}, tree.task.prompt),
    h("p", { class: "muted" }, treeFacts(tree).join(", ")),
  );
  viewer.drawn = drawTree(parts.tree, tree, pick);
  const [located, marked] = [isLocated, (node) => node.evidence].map((kind) => tree.nodes.findIndex(kind));
  choose([located, marked].find((i) => i >= 0) ?? tree.leaves[0].path[0] ?? -1, null);
}

function treeFacts(tree) {
  const { difficulty, max_steps: calls } = tree.task;
  const facts = [`${label(tree.stage)} step ${tree.step}`, `difficulty ${difficulty}`];
  facts.push(`at most ${plural(calls, "tool call")}`, plural(tree.leaves.length, "attempt"));
  return tree.lost ? [...facts, `${tree.lost} more lost to failures of the machinery`] : facts;
}

function keepInView(box, row) {
  if (row.offsetTop < box.scrollTop) box.scrollTop = row.offsetTop;
  const below = row.offsetTop + row.offsetHeight - box.clientHeight;
  if (below > box.scrollTop) box.scrollTop = below;
}

// Opens a node in the panel, by way of `leaf`, or of the leaf that it is critical for, or of the first one through it.
function choose(node, leaf) {
  const through = node < 0 ? 0 : (panel.tree.nodes[node].critical[0] ?? panel.tree.nodes[node].leaves[0]);
  panel.node = node;
  panel.leaf = leaf ?? through;
  viewer.drawn.mark(panel.node, panel.leaf);
  hideTip();
  drawAttempt();
}

// The same on a person's request: where the panel lies below the tree, it is brought into view.
function pick(node, leaf) {
  choose(node, leaf);
  viewer.parts.attempt.scrollIntoView({ block: "nearest" });
}

function listKeys(event) {
  const target = { ArrowDown: viewer.at + 1, ArrowUp: viewer.at - 1, Home: 0, End: viewer.listed.length - 1 }[
    event.key
  ];
  if (target === undefined) return;
  event.preventDefault();
  show(target);
}

function turnKeys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "n") show(viewer.at + 1);
  if (event.key === "p") show(viewer.at - 1);
}

drawHeader(data);
drawResults(data);
drawLocalization(data);
drawCurves(data);
drawDifficulty(data);
startViewer();
