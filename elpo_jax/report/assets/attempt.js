// The panel beside the tree: one whole attempt, from the prompt to its outcome, with the numbers of every step.

const TOKEN_COLOURS = {
  advantage: {
    title: "advantage",
    end: ADVANTAGE_END,
    low: `\u2264 \u2212${ADVANTAGE_END}`,
    high: `\u2265 +${ADVANTAGE_END}`,
  },
  logprob: { title: "log-probability", end: 3, low: "0", high: "\u2264 \u22123 nats" },
  entropy: { title: "entropy", end: 2, low: "0", high: "\u2265 2 nats" },
};

const panel = { box: null, tree: null, node: -1, leaf: 0, by: "advantage", vocabulary: [], choose: null };

function drawAttempt() {
  const { box, tree, leaf: number } = panel;
  const leaf = tree.leaves[number];
  const word = leaf.success ? "solved" : "failed";
  box.replaceChildren(
    h(
      "div",
      { class: "panelhead" },
      h(
        "h3",
        {},
        `Leaf ${number} `,
        h("span", { class: `outcome ${word}` }, `${word}, reward ${fixed(leaf.reward, 2)}`),
      ),
      leafChoice(),
      colourChoice(),
    ),
    attemptFacts(leaf),
    h("details", { class: "block", open: panel.node < 0 }, h("summary", {}, "Prompt"), h("pre", {}, tree.prompt)),
    ...leaf.path.map((node) => stepBlock(tree.nodes[node], node, number)),
    h(
      "p",
      { class: `end ${word}` },
      h("b", {}, leaf.success ? "Solved" : "Failed"),
      ` with reward ${fixed(leaf.reward, 3)}: ${leaf.reason || "no reason given"}. Ended by ${leaf.finish}. Answered `,
      h("code", {}, leaf.answer || "nothing"),
      ", reference answer ",
      h("code", {}, tree.task.answer || "none"),
      ".",
    ),
  );
  recolour();
  const target = box.querySelector(`[data-step="${panel.node}"]`);
  const top = target ? target.offsetTop - box.querySelector(".panelhead").offsetHeight - 8 : 0;
  box.scrollTop = top;
}

function leafChoice() {
  const { tree, node, leaf: number } = panel;
  const leaves = node < 0 ? tree.leaves.map((_, i) => i) : tree.nodes[node].leaves;
  if (leaves.length < 2) return null;
  const name = node < 0 ? "All leaves" : "Leaves through this step";
  return h(
    "div",
    { class: "choice", role: "group", "aria-label": name },
    h("span", {}, name),
    leaves.map((i) => {
      const button = h(
        "button",
        {
          type: "button",
          class: tree.leaves[i].success ? "solved" : "failed",
          "aria-pressed": String(i === number),
          "aria-label": `Leaf ${i}, ${tree.leaves[i].success ? "solved" : "failed"}`,
        },
        i,
      );
      button.addEventListener("click", () => panel.choose(node, i));
      return button;
    }),
  );
}

function colourChoice() {
  const buttons = Object.entries(TOKEN_COLOURS).map(([by, { title }]) => {
    const button = h("button", { type: "button", "data-by": by }, title);
    button.addEventListener("click", () => {
      panel.by = by;
      recolour();
    });
    return button;
  });
  return h(
    "div",
    { class: "choice", role: "group", "aria-label": "Colour tokens by" },
    h("span", {}, "Colour tokens by"),
    buttons,
    h("span", { class: "scale" }),
  );
}

function recolour() {
  const { box, by, tree, leaf } = panel;
  const { end, low, high } = TOKEN_COLOURS[by];
  for (const button of box.querySelectorAll("[data-by]"))
    button.setAttribute("aria-pressed", String(button.dataset.by === by));
  box.querySelector(".scale").replaceChildren(low, h("i", { class: by === "advantage" ? "ramp" : "ramp seq" }), high);
  for (const block of box.querySelectorAll("[data-step]")) {
    const node = tree.nodes[Number(block.dataset.step)];
    const values = { advantage: null, logprob: node.logprobs, entropy: node.entropies }[by];
    block.querySelectorAll(".tokens > span").forEach((span, i) => {
      const value = values ? values[i] : node.advantage;
      if (by === "advantage") tint(span, value, end);
      else
        styled(span, {
          "--hue": "var(--seq)",
          "--share": `${Math.round(100 * clamp(Math.abs(value ?? 0) / end, 0, 1))}%`,
        });
    });
  }
  box.setAttribute("data-colour", by);
  box.setAttribute("aria-label", `Attempt of leaf ${leaf}`);
}

function attemptFacts(leaf) {
  const facts = [
    ["origin", leaf.parent === null ? "root attempt" : `branch of leaf ${leaf.parent} after step ${leaf.anchor}`],
    ["steps", leaf.path.length],
    ["first irrecoverable step", [locatedWords(leaf), oracleWords(leaf)].filter(Boolean).join("; ")],
    ["recovered faults", leaf.recovered.length ? `at step ${leaf.recovered.join(", ")}` : "none"],
  ];
  const searches = panel.tree.searches.filter((search) => search.leaf === panel.leaf);
  for (const search of searches) {
    const probes = search.probes
      .map((probe) => `after step ${probe.step}: ${probe.solved}/${probe.leaves.length}`)
      .join(", ");
    const found = search.first_failure ? `found step ${search.first_failure}` : "found no step";
    const trust = search.verified ? "" : " (not verified)";
    facts.push(["search", `${search.localizer} ${found}${trust}; probes ${probes || "none"}`]);
  }
  return h(
    "dl",
    { class: "facts" },
    facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

function stepBlock(node, index, leaf) {
  const critical = node.critical.includes(leaf);
  const oracle = node.oracle.includes(leaf);
  const recovered = node.recovered.includes(leaf);
  const { status } = node;
  const kinds = [critical && criticalClass(node), recovered && "recovered", index === panel.node && "here"];
  const block = h(
    "section",
    {
      class: ["block step", ...kinds.filter(Boolean)].join(" "),
      "data-step": index,
      "aria-label": `Step ${node.step}`,
    },
    h(
      "h4",
      {},
      h("span", {}, `Step ${node.step}`),
      h(
        "span",
        { class: "statusline" },
        statusIcon(status),
        `${node.call ? `${node.call.name}: ` : ""}${statusName(status)}`,
      ),
      critical ? h("span", { class: "tag" }, `first irrecoverable step, ${EVIDENCE[node.evidence][0]}`) : null,
      oracle ? h("span", { class: "oracle" }, `oracle: step ${node.step}`) : null,
      recovered ? h("span", { class: "tag" }, "recovered fault") : null,
    ),
    h(
      "p",
      { class: "numbers" },
      [
        ["advantage", signed(node.advantage)],
        ["branch", signed(node.branch)],
        ["trajectory", signed(node.trajectory)],
        ["value", fixed(node.value)],
      ].map(([name, value]) => h("span", {}, `${name} `, h("b", {}, value))),
    ),
    tokenView(node),
  );
  const pieces = node.tokens.map((token) => panel.vocabulary[token][1]).join("");
  // Pieces of one character (bytes) do not show it, but the text does.
  if (!pieces.includes(node.text))
    block.append(h("div", { class: "part" }, h("h5", {}, "As text"), h("pre", {}, node.text)));
  if (node.call) block.append(callView(node.call));
  if (node.result) {
    const detail = node.result.detail ? ` (${node.result.detail})` : "";
    block.append(
      h(
        "div",
        { class: "part" },
        h("h5", {}, "Tool answer, ", statusIcon(status), ` ${statusName(status)}${detail}`),
        h("pre", { class: status === "ok" ? "" : "fault" }, node.result.text || "(nothing)"),
      ),
    );
  }
  return block;
}

function callView(call) {
  const rows = call.arguments.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("pre", {}, value))));
  return h(
    "div",
    { class: "part" },
    h("h5", {}, "Tool call, ", h("code", {}, call.name)),
    rows.length ? h("dl", { class: "arguments" }, rows) : null,
  );
}

// The model's tokens; a line feed gets a sign so that it, too, has a place to point at.
function tokenView(node) {
  if (!node.tokens.length) return h("pre", { class: "tokens" }, node.text);
  const spans = node.tokens.map((token) => h("span", {}, panel.vocabulary[token][1].replaceAll("\n", "\u21b5\n")));
  const view = h(
    "pre",
    {
      class: "tokens",
      tabindex: 0,
      "aria-label": `Model text of step ${node.step}: left and right read the values of its tokens`,
    },
    spans,
  );
  let at = -1;
  view.addEventListener("pointermove", (event) => {
    const i = spans.indexOf(event.target);
    if (i < 0) return hideTip();
    at = i;
    showTip(event.clientX, event.clientY, tokenLines(node, at));
  });
  view.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = clamp(at + move, 0, spans.length - 1);
    const box = spans[at].getBoundingClientRect();
    showTip(box.left, box.bottom - 12, tokenLines(node, at));
  });
  view.addEventListener("pointerleave", hideTip);
  view.addEventListener("blur", hideTip);
  return view;
}

function tokenLines(node, i) {
  const [id, text] = panel.vocabulary[node.tokens[i]];
  const [logprob, entropy] = [node.logprobs[i], node.entropies[i]];
  return [
    h("div", { class: "head" }, `${JSON.stringify(text)} (id ${id})`),
    `advantage ${signed(node.advantage)}`,
    isNumber(logprob)
      ? `log-probability ${fixed(logprob, 5)} (p ${fixed(Math.exp(logprob), 4)})`
      : "log-probability not recorded",
    isNumber(entropy) ? `entropy ${fixed(entropy, 5)} nats` : "entropy not recorded",
  ];
}
