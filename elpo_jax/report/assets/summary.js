// The header, the tables of results and budgets, and the sections of charts.

function drawHeader(data) {
  const { facts, highlights, config } = data.header;
  document.title = `${data.title} \u00b7 run report`;
  const pairs = (items, name) =>
    h(
      "dl",
      { class: name },
      items.map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, value))),
    );
  fill(byId("header"), {}, [
    h("p", { class: "kicker" }, "elpo_jax run report"),
    h("h1", {}, data.title),
    facts.length ? pairs(facts, "facts") : null,
    data.results.protocol ? h("p", { class: "protocol" }, h("b", {}, "Protocol "), data.results.protocol) : null,
    highlights.length ? pairs(highlights, "highlights") : null,
    config.length
      ? h(
          "details",
          {},
          h("summary", {}, `Whole configuration, ${plural(config.length, "value")}`),
          pairs(config, "config"),
        )
      : null,
    data.notes.length
      ? h(
          "ul",
          { class: "notes" },
          data.notes.map((note) => h("li", {}, note)),
        )
      : null,
    h(
      "nav",
      { "aria-label": "Sections" },
      [...document.querySelectorAll("main > section")].map((section) =>
        h("a", { href: `#${section.id}` }, section.querySelector("h2").textContent),
      ),
    ),
  ]);
}

function drawResults(data) {
  const { families, validation, budget, seconds: times, protocol, reading } = data.results;
  const section = byId("results");
  if (!families.length && !budget.length) {
    section.append(h("p", { class: "empty" }, "There are no results yet: the run has not reached its evaluation."));
    return;
  }
  if (reading.length)
    section.append(
      h(
        "div",
        { class: "reading" },
        reading.map((sentence) => h("p", {}, sentence)),
      ),
    );
  if (families.length)
    section.append(...captioned("Held-out accuracy", `in %, with interval. ${protocol}`, resultTable(families)));
  if (validation.families.length)
    section.append(
      ...captioned("Validation", `in %, with interval. ${validation.protocol}`, resultTable(validation.families)),
    );
  if (budget.length)
    section.append(
      ...captioned(
        "Cost of training",
        ["Every completed rollout counts, whole or from a branch.", ...faults(budget)].join(" "),
        budgetTable(budget, times),
      ),
    );
}

// How the marked first irrecoverable steps compare with those of the oracle.
function drawLocalization(data) {
  if (!data.localization) return;
  const { about, rows } = data.localization;
  const head = ["", "how the step is known", "steps", "agree with the oracle", "early", "late"];
  const table = h(
    "table",
    { class: "localization" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        head.map((name, i) => h("th", { scope: "col", class: i > 1 ? "num" : null }, name)),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((row) => {
        const shares = [row.agree, row.early, row.late].map((count) => `${percent(count / row.steps)} %`);
        const cells = [whole(row.steps), ...shares].map((text) => h("td", { class: "num" }, text));
        return h("tr", {}, algorithmCell(row.stage), h("td", {}, EVIDENCE[row.evidence][0]), cells);
      }),
    ),
  );
  byId("results").append(...captioned("Localization in training", about, table));
}

// The caption stays in view while a wide table is scrolled.
function captioned(title, text, table) {
  table.setAttribute("aria-label", title);
  return [h("p", { class: "protocol caption" }, h("b", {}, `${title} `), text), h("div", { class: "scroll" }, table)];
}

function resultTable(families) {
  const metrics = [
    ...new Set(families.flatMap((family) => family.rows.flatMap((row) => row.metrics.map((metric) => metric.name)))),
  ];
  const head = ["", ...metrics.flatMap((name, i) => (i ? [name] : [name, "0 to 100 %"]))];
  const counts = ["tasks", "tool calls / attempt", "tokens / attempt"];
  const table = h("table", { class: "results" });
  table.append(
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        head.map((name) => h("th", { scope: "col" }, name)),
        counts.map((name) => h("th", { scope: "col", class: "num" }, name)),
      ),
    ),
  );
  for (const family of families) {
    const body = h(
      "tbody",
      {},
      h("tr", { class: "family" }, h("th", { colspan: head.length + counts.length, scope: "rowgroup" }, family.name)),
    );
    for (const row of family.rows) {
      const cells = metrics.flatMap((name, i) => {
        const metric = row.metrics.find((candidate) => candidate.name === name);
        const cell = h(
          "td",
          {},
          metric
            ? [
                h("b", {}, percent(metric.value)),
                metric.ci ? h("span", { class: "ci" }, `[${percent(metric.ci[0])}, ${percent(metric.ci[1])}]`) : null,
              ]
            : "\u2013",
        );
        return i ? [cell] : [cell, h("td", { class: "mark" }, metric ? interval(metric, row.name) : null)];
      });
      const rest = [whole(row.n), isNumber(row.tool_calls) ? fixed(row.tool_calls, 2) : "\u2013", whole(row.tokens)];
      body.append(
        h(
          "tr",
          {},
          algorithmCell(row.name),
          cells,
          rest.map((text) => h("td", { class: "num" }, text)),
        ),
      );
    }
    table.append(body);
  }
  return table;
}

const algorithmCell = (name) =>
  h("th", { scope: "row" }, styled(h("i", { class: "dot" }), { background: colour(name) }), label(name));

function interval(metric, name) {
  const [width, middle] = [150, 9];
  const x = (v) => 4 + clamp(v, 0, 1) * (width - 8);
  const svg = s(
    "svg",
    { width, height: 18, "aria-hidden": "true" },
    s("line", { class: "grid", x1: 4, x2: width - 4, y1: middle, y2: middle }),
  );
  if (metric.ci)
    svg.append(
      styled(s("line", { class: "span", x1: x(metric.ci[0]), x2: x(metric.ci[1]), y1: middle, y2: middle }), {
        stroke: colour(name),
      }),
    );
  if (isNumber(metric.value))
    svg.append(styled(s("circle", { cx: x(metric.value), cy: middle, r: 4 }), { fill: colour(name) }));
  return svg;
}

const isCounted = (row) => isNumber(row.lost_attempts); // results of older versions do not know

// What lies behind the column of attempts lost, in sentences.
function faults(rows) {
  if (!rows.some(isCounted)) return [];
  const behind = rows.map((row) => {
    const parts = [
      row.sandbox_retries ? `${plural(row.sandbox_retries, "program")} run again` : null,
      row.sandbox_errors ? `${plural(row.sandbox_errors, "program")} given up` : null,
      row.paused_s ? `paused for ${seconds(row.paused_s)}` : null,
    ].filter(Boolean);
    return parts.length ? `${label(row.name)}: ${parts.join(", ")}.` : null;
  });
  return ["Attempts lost to faults of ours were made again and never trained on.", ...behind.filter(Boolean)];
}

function budgetTable(rows, times) {
  const counted = rows.some(isCounted);
  const head = ["", "rollouts", "model tokens", "tool calls", ...(counted ? ["lost to faults of ours"] : []), "time"];
  const table = h("table", { class: "budget" });
  table.append(
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        head.map((name) => h("th", { scope: "col" }, name)),
      ),
    ),
  );
  const body = h("tbody", {});
  for (const row of rows) {
    const spent = [row.rollouts, row.model_tokens, row.tool_calls, ...(counted ? [row.lost_attempts] : [])];
    const cells = [...spent.map(whole), seconds(row.seconds)];
    body.append(
      h(
        "tr",
        {},
        algorithmCell(row.name),
        cells.map((text) => h("td", {}, text)),
      ),
    );
  }
  for (const [name, value] of Object.entries(times)) {
    body.append(
      h(
        "tr",
        {},
        h("th", { scope: "row" }, name === "eval" ? "evaluation" : name),
        h("td", { colspan: head.length - 2 }),
        h("td", {}, seconds(value)),
      ),
    );
  }
  table.append(body);
  return table;
}

function drawCurves(data) {
  const section = byId("curves");
  if (!data.curves.length)
    section.append(h("p", { class: "empty" }, "No stage has written metrics, so there are no curves."));
  for (const group of data.curves) {
    const names = [
      ...new Set([...group.panels, ...group.rest].flatMap((panel) => panel.lines.map((line) => line.name))),
    ];
    section.append(h("div", { class: "grouphead" }, h("h3", {}, group.title), legend(names)));
    if (group.about) section.append(h("p", { class: "protocol" }, group.about));
    section.append(
      h(
        "div",
        { class: "charts" },
        group.panels.map((panel) => lineChart(panel, group.axis)),
      ),
    );
    if (group.rest.length) {
      const details = h("details", {}, h("summary", {}, `All other metrics, ${group.rest.length}`));
      const draw = () =>
        details.append(
          h(
            "div",
            { class: "charts" },
            group.rest.map((panel) => lineChart(panel, group.axis)),
          ),
        );
      details.addEventListener("toggle", draw, { once: true });
      section.append(details);
    }
  }
}

function drawDifficulty(data) {
  const section = byId("difficulty");
  if (!data.difficulty.length) {
    section.append(h("p", { class: "empty" }, "There is no evaluation by difficulty yet."));
    return;
  }
  const names = [
    ...new Set(data.difficulty.flatMap((chart) => chart.groups.flatMap((group) => group.bars.map((bar) => bar.name)))),
  ];
  section.append(legend(names), h("div", { class: "charts wide" }, data.difficulty.map(barChart)));
}
