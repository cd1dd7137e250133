// Line and bar charts as SVG. A chart is drawn at the width it has, and again when that changes.

const CHART_HEIGHT = 190;
const MARGIN = { left: 46, right: 12, top: 10, bottom: 34 };

// Round values that cover [low, high] in about `count` steps.
function ticks(low, high, count = 4) {
  const raw = (high - low) / count;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((m) => m >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

function responsive(figure, draw) {
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(figure.clientWidth);
    if (width > 80 && width !== drawn) {
      drawn = width;
      figure.querySelector("svg")?.remove();
      figure.append(draw(width));
    }
  }).observe(figure);
}

const yText = (panel) => (y) => (panel.fraction ? percent(y, 0) : compact(y));

function yAxis(svg, panel, low, high, width, y) {
  for (const value of ticks(low, high)) {
    svg.append(
      s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: MARGIN.left - 7, y: y(value) + 3.5, "text-anchor": "end" }, yText(panel)(value)),
    );
  }
}

function yRange(panel) {
  if (panel.fraction) return [0, 1];
  const values = panel.lines.flatMap((line) => line.points.map((point) => point[1]));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low >= 0 && low < 0.4 * high) low = 0;
  if (high - low < 1e-12) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  const room = 0.05 * (high - low);
  return [low === 0 ? 0 : low - room, high + room];
}

function lineChart(panel, axis) {
  const figure = h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("b", {}, panel.title), panel.about && h("span", {}, panel.about)),
  );
  responsive(figure, (width) => drawLines(panel, axis, width));
  return figure;
}

function drawLines(panel, axis, width) {
  const steps = [...new Set(panel.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const [first, last] = [Math.min(steps[0], 0), steps.at(-1)];
  const [low, high] = yRange(panel);
  const x = (v) => MARGIN.left + ((v - first) / Math.max(1e-9, last - first)) * (width - MARGIN.left - MARGIN.right);
  const y = (v) =>
    CHART_HEIGHT -
    MARGIN.bottom -
    ((clamp(v, low, high) - low) / (high - low)) * (CHART_HEIGHT - MARGIN.top - MARGIN.bottom);
  const svg = s("svg", { width, height: CHART_HEIGHT, role: "img", tabindex: 0, "aria-label": describe(panel) });
  yAxis(svg, panel, low, high, width, y);
  for (const value of ticks(first, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger)) {
    svg.append(
      s(
        "text",
        { class: "tick", x: x(value), y: CHART_HEIGHT - MARGIN.bottom + 15, "text-anchor": "middle" },
        compact(value),
      ),
    );
  }
  svg.append(s("text", { class: "axis", x: width - MARGIN.right, y: CHART_HEIGHT - 4, "text-anchor": "end" }, axis));
  for (const line of panel.lines) {
    const path = (points, k) => points.map((point) => `${x(point[0]).toFixed(1)},${y(point[k]).toFixed(1)}`);
    if (line.band.length > 1) {
      const outline = [...path(line.band, 1), ...path(line.band, 2).reverse()];
      svg.append(styled(s("polygon", { class: "band", points: outline.join(" ") }), { fill: colour(line.name) }));
    }
    svg.append(
      styled(s("polyline", { class: "line", points: path(line.points, 1).join(" ") }), { stroke: colour(line.name) }),
    );
    if (line.points.length <= 24) {
      for (const point of line.points)
        svg.append(styled(s("circle", { cx: x(point[0]), cy: y(point[1]), r: 2.4 }), { fill: colour(line.name) }));
    }
  }
  crosshair(svg, panel, axis, steps, x, y);
  return svg;
}

const nearest = (points, step) =>
  points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));

// A guide at the step nearest to the pointer, or moved by the arrow keys, with every line's exact value there.
function crosshair(svg, panel, axis, steps, x, y) {
  const guide = s("g", { class: "guide" });
  svg.append(guide);
  let at = steps.length - 1;
  const show = (left, top) => {
    guide.replaceChildren(
      s("line", { x1: x(steps[at]), x2: x(steps[at]), y1: MARGIN.top, y2: CHART_HEIGHT - MARGIN.bottom }),
    );
    const lines = [h("div", { class: "head" }, `${axis} ${compact(steps[at])}`)];
    for (const line of panel.lines) {
      const point = nearest(line.points, steps[at]);
      if (Math.abs(x(point[0]) - x(steps[at])) > 6) continue;
      const band = line.band.find((candidate) => candidate[0] === point[0]);
      const text = panel.fraction ? percent(point[1]) + " %" : compact(point[1]);
      const range = band ? ` [${percent(band[1])}, ${percent(band[2])}]` : "";
      lines.push(
        h("div", {}, styled(h("i", {}), { background: colour(line.name) }), `${label(line.name)} ${text}${range}`),
      );
      guide.append(styled(s("circle", { cx: x(point[0]), cy: y(point[1]), r: 3.6 }), { fill: colour(line.name) }));
    }
    showTip(left, top, lines);
  };
  const clear = () => (guide.replaceChildren(), hideTip());
  svg.addEventListener("pointermove", (event) => {
    const offset = event.clientX - svg.getBoundingClientRect().left;
    at = steps.reduce(
      (best, step, i) => (Math.abs(x(step) - offset) < Math.abs(x(steps[best]) - offset) ? i : best),
      0,
    );
    show(event.clientX, event.clientY);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = clamp(at + move, 0, steps.length - 1);
    const box = svg.getBoundingClientRect();
    show(box.left + x(steps[at]), box.top + 30);
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
}

function describe(panel) {
  const ends = panel.lines.map(
    (line) => `${label(line.name)} from ${yText(panel)(line.points[0][1])} to ${yText(panel)(line.points.at(-1)[1])}`,
  );
  return `${panel.title}: ${ends.join("; ")}. Arrow keys read the values.`;
}

function barChart(chart) {
  const names = [...new Set(chart.groups.flatMap((group) => group.bars.map((bar) => bar.name)))];
  const figure = h(
    "figure",
    { class: "chart" },
    h(
      "figcaption",
      {},
      h("b", {}, `${chart.metric}, ${chart.family}`),
      chart.protocol && h("span", {}, chart.protocol),
    ),
  );
  responsive(figure, (width) => drawBars(chart, names, width));
  return figure;
}

function drawBars(chart, names, width) {
  const y = (v) => CHART_HEIGHT - MARGIN.bottom - clamp(v, 0, 1) * (CHART_HEIGHT - MARGIN.top - MARGIN.bottom);
  const svg = s("svg", {
    width,
    height: CHART_HEIGHT,
    role: "group",
    "aria-label": `${chart.metric} of ${chart.family} by difficulty`,
  });
  yAxis(svg, { fraction: true }, 0, 1, width, y);
  const space = (width - MARGIN.left - MARGIN.right) / chart.groups.length;
  const bar = clamp((space * 0.7) / names.length, 4, 30);
  chart.groups.forEach((group, i) => {
    const middle = MARGIN.left + (i + 0.5) * space;
    svg.append(
      s(
        "text",
        { class: "tick", x: middle, y: CHART_HEIGHT - MARGIN.bottom + 15, "text-anchor": "middle" },
        group.label,
      ),
    );
    for (const item of group.bars.filter((candidate) => isNumber(candidate.value))) {
      const left = middle + (names.indexOf(item.name) - names.length / 2) * bar;
      svg.append(drawBar(item, group.label, left, bar, y));
    }
  });
  svg.append(
    s(
      "text",
      { class: "axis", x: width - MARGIN.right, y: CHART_HEIGHT - 4, "text-anchor": "end" },
      "difficulty (tool calls of a flawless attempt)",
    ),
  );
  return svg;
}

function drawBar(item, level, left, width, y) {
  const range = item.ci ? ` [${percent(item.ci[0])}, ${percent(item.ci[1])}]` : "";
  const text = `${label(item.name)}, difficulty ${level}: ${percent(item.value)} %${range}, n = ${whole(item.n)}`;
  const mark = s("g", { class: "bar", tabindex: 0, role: "img", "aria-label": text });
  mark.append(
    styled(s("rect", { x: left + 1, width: width - 2, y: y(item.value), height: y(0) - y(item.value) }), {
      fill: colour(item.name),
    }),
  );
  if (item.ci) {
    const middle = left + width / 2;
    const [low, high] = item.ci.map(y);
    mark.append(
      s("path", {
        class: "whisker",
        d: `M${middle} ${low}V${high}M${middle - 3} ${low}h6M${middle - 3} ${high}h6`,
      }),
    );
  }
  tipFor(mark, () => [text]);
  return mark;
}
