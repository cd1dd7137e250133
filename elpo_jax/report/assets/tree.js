// The picture of one rollout tree: steps are columns, leaves are rows, nodes are buttons over an SVG of their links.

const CARD = { height: 38, pitch: 51, gap: 40, least: 100, most: 150 };
const PROMPT_WIDTH = 50;
const LEAF_WIDTH = 94;
const HEAD_HEIGHT = 26;
const ADVANTAGE_END = 2; // colours saturate here

const STATUS_NAMES = {
  ok: "ok",
  empty: "empty answer",
  error: "error",
  timeout: "time-out",
  memory: "out of memory",
  output_limit: "output cut",
  crash: "crash",
  malformed: "malformed call",
  unknown_tool: "unknown tool",
  sandbox_error: "sandbox error",
  answer: "answer, no tool",
  no_calls: "called with no calls left",
  cut: "cut at the length limit",
};
// 12 x 12 outlines; statuses differ in shape, not only in colour.
const STATUS_PATHS = {
  ok: "M2 6.5 5 9.5 10.5 3",
  empty: "M6 1.8a4.2 4.2 0 1 0 .01 0M3.2 8.8 8.8 3.2",
  error: "M2.5 2.5 9.5 9.5M9.5 2.5 2.5 9.5",
  timeout: "M6 1.6a4.4 4.4 0 1 0 .01 0M6 3.4V6.2L8 7.4",
  memory: "M2 3.5h8v5H2zM4 3.5V2M8 3.5V2M4 10V8.5M8 10V8.5",
  output_limit: "M2 3h8M2 6h5M2 9h2.5M8 10.5 10.5 8",
  crash: "M6.8 1.2 3 6.6h2.6L4.6 10.8 9 5.2H6.2z",
  malformed: "M4 2C2 2 4 5.5 2 6 4 6.5 2 10 4 10M8 2l2.5 8",
  unknown_tool: "M4 4.2C4 1.2 8.4 1.4 8 4.2 7.8 5.6 6 5.6 6 7.4M6 9.6v.8",
  sandbox_error: "M6 1.5 11 10.3H1zM6 5v2.6M6 8.8v.4",
  answer: "M2 2.5h8v5.5H6L3.5 10V8H2z",
  no_calls: "M6 1.6a4.4 4.4 0 1 0 .01 0M3.6 6h4.8",
  cut: "M2 3h8M2 6h8M2 9h3M7 7.5l3 3M10 7.5l-3 3",
};

const statusName = (status) => STATUS_NAMES[status] ?? status;

function statusIcon(status) {
  const known = STATUS_PATHS[status] ? status : "unknown_tool";
  return s(
    "svg",
    { class: `status ${known}`, width: 12, height: 12, viewBox: "0 0 12 12", "aria-hidden": "true" },
    s("path", { d: STATUS_PATHS[known] }),
  );
}

const FINAL_NAMES = { answer: "answer", no_calls: "no calls left", cut: "cut" };
const nodeName = (node) => node.call?.name ?? FINAL_NAMES[node.status] ?? statusName(node.status);
const leafList = (leaves) => `${leaves.length === 1 ? "leaf" : "leaves"} ${leaves.join(", ")}`;

// How it is known that a step is the first irrecoverable one, and what its node is tagged with.
const EVIDENCE = {
  verified: ["located, verified", "critical"],
  unverified: ["located, unverified", "unverified"],
  assumed: ["assumed from the tree", "assumed"],
};
const isLocated = (node) => node.evidence === "verified" || node.evidence === "unverified";
const criticalClass = (node) => (isLocated(node) ? `critical ${node.evidence}` : (node.evidence ?? ""));

// Where an attempt was lost: by its tree, and by the oracle (null for a solved one, and where there is no oracle).
function locatedWords(leaf) {
  if (leaf.first_failure) return `step ${leaf.first_failure}, ${EVIDENCE[leaf.evidence][0]}`;
  return leaf.success ? "none, it was solved" : "not known";
}

function oracleWords(leaf) {
  if (!leaf.oracle) return null;
  const same = leaf.first_failure === leaf.oracle ? ", the same" : ", another one";
  return `oracle: step ${leaf.oracle}${leaf.first_failure ? same : ""}`;
}

function tint(element, value, end) {
  const share = clamp(Math.abs(value) / end, 0, 1);
  return styled(element, {
    "--hue": value >= 0 ? "var(--pos)" : "var(--neg)",
    "--share": `${Math.round(100 * share)}%`,
  });
}

// Rows of leaves and nodes (a node sits in the middle of what follows it), and which nodes follow which.
function arrange(tree) {
  const children = new Map([[-1, []]]);
  tree.nodes.forEach((node, i) => children.set(i, []));
  tree.nodes.forEach((node, i) => children.get(node.parent).push(i));
  const ends = new Map();
  tree.leaves.forEach((leaf, i) => {
    const last = leaf.path.at(-1);
    ends.set(last, [...(ends.get(last) ?? []), i]);
  });
  const [nodeRow, leafRow] = [[], []];
  let next = 0;
  const place = (i) => {
    const rows = (ends.get(i) ?? []).map((leaf) => (leafRow[leaf] = next++));
    rows.push(...children.get(i).map(place));
    return (nodeRow[i] = (Math.min(...rows) + Math.max(...rows)) / 2);
  };
  place(-1);
  return { children, nodeRow, leafRow, rows: next };
}

// Draws the tree into `box`; `choose(node, leaf)` is called when a node or a leaf is picked (node -1 is the prompt).
function drawTree(box, tree, choose) {
  const plan = arrange(tree);
  const columns = Math.max(1, ...tree.nodes.map((node) => node.step));
  const room = (box.clientWidth - PROMPT_WIDTH - LEAF_WIDTH - CARD.gap - 2) / columns - CARD.gap;
  const width = clamp(Math.floor(room), CARD.least, CARD.most);
  const place = {
    left: (step) => (step === 0 ? 0 : PROMPT_WIDTH + (step - 1) * (width + CARD.gap) + CARD.gap),
    right: (step) => (step === 0 ? PROMPT_WIDTH : place.left(step) + width),
    middle: (row) => HEAD_HEIGHT + (row + 0.5) * CARD.pitch,
  };
  const leafLeft = place.right(columns) + CARD.gap;
  const height = HEAD_HEIGHT + plan.rows * CARD.pitch;
  const links = s("svg", { class: "links", width: leafLeft, height, "aria-hidden": "true" });
  const steps = styled(h("div", { class: "steps" }, links), { width: `${leafLeft}px`, height: `${height}px` });
  // A column of its own, so that it stays in view where the steps are scrolled.
  const outcomes = styled(h("div", { class: "outcomes" }), { width: `${LEAF_WIDTH}px`, height: `${height}px` });
  const sheet = h("div", { class: "sheet" }, steps, outcomes);
  const put = (element, left, row, span) =>
    styled(element, { left: `${left}px`, top: `${place.middle(row) - CARD.height / 2}px`, width: `${span}px` });

  steps.append(columnHead("prompt", 0, PROMPT_WIDTH));
  for (let step = 1; step <= columns; step++) steps.append(columnHead(`step ${step}`, place.left(step), width));
  outcomes.append(columnHead("outcome", 0, LEAF_WIDTH));
  const buttons = new Map([[-1, promptButton(tree, choose)]]);
  steps.append(put(buttons.get(-1), 0, plan.nodeRow[-1], PROMPT_WIDTH));
  tree.nodes.forEach((node, i) => {
    const from = [place.right(node.step - 1), place.middle(plan.nodeRow[node.parent])];
    links.append(link(from, [place.left(node.step), place.middle(plan.nodeRow[i])], node.leaves, ""));
    buttons.set(i, nodeButton(tree, i, choose));
    steps.append(put(buttons.get(i), place.left(node.step), plan.nodeRow[i], width));
  });
  tree.leaves.forEach((leaf, i) => {
    const last = leaf.path.at(-1);
    const from = [place.right(leaf.path.length), place.middle(plan.nodeRow[last])];
    links.append(link(from, [leafLeft, place.middle(plan.leafRow[i])], [i], "dotted"));
    outcomes.append(put(leafButton(leaf, i, last, choose), 0, plan.leafRow[i], LEAF_WIDTH));
  });
  for (const [at, probes] of probesByNode(tree)) {
    const { step } = tree.nodes[at];
    steps.append(put(probeMark(probes, step), place.right(step) + 5, plan.nodeRow[at], 30));
  }
  sheet.addEventListener("keydown", (event) => moveFocus(event, tree, plan, buttons));
  box.replaceChildren(sheet);
  return { mark: (node, leaf) => markChosen(sheet, buttons, node, leaf) };
}

const columnHead = (text, left, span) =>
  styled(h("span", { class: "colhead", "aria-hidden": "true" }, text), { left: `${left}px`, width: `${span}px` });

// A curve over the first gap, then a straight line: attempts that end early reach over empty columns.
function link([x1, y1], [x2, y2], leaves, kind) {
  const bend = Math.min(x1 + CARD.gap, x2);
  const middle = (x1 + bend) / 2;
  const curve = `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${bend} ${y2}H${x2}`;
  const d = y1 === y2 ? `M${x1} ${y1}H${x2}` : curve;
  return s("path", { class: kind, d, "data-leaves": ` ${leaves.join(" ")} ` });
}

function promptButton(tree, choose) {
  const button = h(
    "button",
    { class: "node prompt", type: "button", tabindex: 0, "aria-label": `Prompt of ${tree.task.id}` },
    "prompt",
  );
  button.addEventListener("click", () => choose(-1, null));
  return button;
}

function nodeButton(tree, i, choose) {
  const node = tree.nodes[i];
  const marks = [
    node.critical.length && `first irrecoverable step of ${leafList(node.critical)}: ${EVIDENCE[node.evidence][0]}`,
    node.oracle.length && `oracle: step ${node.step} is the first irrecoverable one of ${leafList(node.oracle)}`,
    node.recovered.length && `fault that ${leafList(node.recovered)} recovered from`,
  ].filter(Boolean);
  const words = [
    `Step ${node.step}`,
    nodeName(node),
    statusName(node.status),
    `advantage ${signed(node.advantage)}`,
    leafList(node.leaves),
    ...marks,
  ];
  const button = h(
    "button",
    {
      class: `node ${criticalClass(node)}${node.recovered.length ? " recovered" : ""}`,
      type: "button",
      tabindex: -1,
      "data-node": i,
      "aria-label": words.join(", "),
    },
    h("span", { class: "top" }, statusIcon(node.status), h("span", { class: "name" }, nodeName(node))),
    h(
      "span",
      { class: "number" },
      signed(node.advantage, 3),
      node.oracle.length ? h("span", { class: "oracle" }, "oracle") : null,
    ),
  );
  if (node.evidence) button.append(h("span", { class: "tag" }, EVIDENCE[node.evidence][1]));
  else if (node.recovered.length) button.append(h("span", { class: "tag" }, "recovered"));
  tint(button, node.advantage, ADVANTAGE_END);
  tipFor(button, () => [
    h("div", { class: "head" }, `Step ${node.step}: ${nodeName(node)}, ${statusName(node.status)}`),
    `advantage ${signed(node.advantage)} (branch ${signed(node.branch)}, trajectory ${signed(node.trajectory)})`,
    `value ${fixed(node.value)}; shared by ${leafList(node.leaves)}`,
    ...marks,
  ]);
  button.addEventListener("click", () => choose(i, null));
  return button;
}

function leafButton(leaf, i, last, choose) {
  const word = leaf.success ? "solved" : "failed";
  const origin =
    leaf.parent === null ? "a root attempt" : `branched from leaf ${leaf.parent} after step ${leaf.anchor}`;
  const button = h(
    "button",
    {
      class: `leaf ${word}`,
      type: "button",
      "data-leaf": i,
      "aria-label": `Leaf ${i}, ${word}, reward ${fixed(leaf.reward, 2)}, ${origin}`,
    },
    h("span", { class: "top" }, h("i", {}), `${word} #${i}`),
    h("span", { class: "number" }, `reward ${minus(String(+leaf.reward.toFixed(2)))}`),
  );
  tipFor(button, () => [
    h("div", { class: "head" }, `Leaf ${i}: ${word}, reward ${fixed(leaf.reward, 3)}`),
    origin,
    `${leaf.reason || "no reason given"}; ended by ${leaf.finish}`,
    `first irrecoverable step: ${[locatedWords(leaf), oracleWords(leaf)].filter(Boolean).join("; ")}`,
  ]);
  button.addEventListener("click", () => choose(last, i));
  return button;
}

function probesByNode(tree) {
  const out = new Map();
  for (const search of tree.searches) {
    for (const probe of search.probes)
      out.set(probe.at, [...(out.get(probe.at) ?? []), { ...probe, leaf: search.leaf }]);
  }
  return out;
}

function probeMark(probes, step) {
  const solved = probes.reduce((sum, probe) => sum + probe.solved, 0);
  const total = probes.reduce((sum, probe) => sum + probe.leaves.length, 0);
  const mark = h(
    "span",
    {
      class: `probe ${solved ? "reachable" : "lost"}`,
      tabindex: 0,
      role: "img",
      "aria-label": `Probed after step ${step}: ${probeWords(solved, total)}`,
    },
    `${solved}/${total}`,
  );
  tipFor(mark, () =>
    probes.flatMap((probe) =>
      [
        h("div", { class: "head" }, `Search in leaf ${probe.leaf}: probed after step ${probe.step}`),
        `${probeWords(probe.solved, probe.leaves.length)} (${leafList(probe.leaves)})`,
        probe.planned > probe.leaves.length ? `${probe.planned} were planned, the budget ended first` : null,
      ].filter(Boolean),
    ),
  );
  return mark;
}

const probeWords = (solved, total) =>
  `${solved} of ${plural(total, "continuation")} solved the task: ${solved ? "still reachable" : "not reached again"}`;

// Right to the first child, left to the parent, up and down within a column.
function moveFocus(event, tree, plan, buttons) {
  const held = [...buttons].find(([, button]) => button === document.activeElement);
  if (!held) return;
  const at = held[0];
  const column = tree.nodes
    .map((node, i) => i)
    .filter((i) => at >= 0 && tree.nodes[i].step === tree.nodes[at].step)
    .sort((a, b) => plan.nodeRow[a] - plan.nodeRow[b]);
  const beside = (offset) => column[column.indexOf(at) + offset];
  const target = {
    ArrowRight: plan.children.get(at)[0],
    ArrowLeft: tree.nodes[at]?.parent,
    ArrowDown: beside(1),
    ArrowUp: beside(-1),
  }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  for (const button of buttons.values()) button.tabIndex = -1;
  buttons.get(target).tabIndex = 0;
  buttons.get(target).focus();
}

function markChosen(sheet, buttons, node, leaf) {
  for (const [i, button] of buttons) {
    if (i === node) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  for (const button of sheet.querySelectorAll(".leaf"))
    button.classList.toggle("chosen", Number(button.dataset.leaf) === leaf);
  for (const path of sheet.querySelectorAll(".links path"))
    path.classList.toggle("chosen", leaf !== null && path.dataset.leaves.includes(` ${leaf} `));
}

function treeLegend() {
  const statuses = Object.keys(STATUS_PATHS).map((status) => h("li", {}, statusIcon(status), statusName(status)));
  return h(
    "div",
    { class: "treelegend" },
    h(
      "ul",
      {},
      h(
        "li",
        {},
        h("span", {}, `advantage \u2264 \u2212${ADVANTAGE_END}`),
        h("i", { class: "ramp" }),
        h("span", {}, `\u2265 +${ADVANTAGE_END}`),
      ),
      h("li", {}, h("i", { class: "swatch critical verified" }), "critical: first irrecoverable, located, verified"),
      h(
        "li",
        {},
        h("i", { class: "swatch critical unverified" }),
        "located, unverified: a search named it without probing both sides",
      ),
      h("li", {}, h("i", { class: "swatch assumed" }), "assumed from the tree: no search named it, credit takes it"),
      h("li", {}, h("span", { class: "oracle" }, "oracle"), "the exact first irrecoverable step, where it is known"),
      h("li", {}, h("i", { class: "swatch recovered" }), "recovered: a fault that a later step repaired"),
      h(
        "li",
        {},
        h("span", { class: "probe reachable still" }, "2/3"),
        "search probe after this step: 2 of 3 continuations solved it",
      ),
      h("li", {}, h("span", { class: "probe lost still" }, "0/2"), "none did"),
    ),
    h("ul", { class: "statuses" }, statuses),
  );
}
