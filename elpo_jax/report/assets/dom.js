// Elements, numbers and the tooltip. Text from the run only ever becomes a text node or the value of a plain attribute.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

// --- numbers ---

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
const minus = (text) => text.replace("-", "\u2212");
const fixed = (x, digits = 3) => (isNumber(x) ? minus(x.toFixed(digits)) : "none");
const signed = (x, digits = 3) => (isNumber(x) && x >= 0 ? "+" : "") + fixed(x, digits);
const percent = (x, digits = 1) => (isNumber(x) ? minus((100 * x).toFixed(digits)) : "none");
const whole = (x) => (isNumber(x) ? Math.round(x).toLocaleString("en-US") : "\u2013");
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

function compact(x) {
  if (!isNumber(x)) return "none";
  const size = Math.abs(x);
  if (size >= 1e6) return minus(`${+(x / 1e6).toPrecision(3)}M`);
  if (size >= 1e4) return minus(`${+(x / 1e3).toPrecision(3)}k`);
  return minus(size !== 0 && size < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(4)));
}

function seconds(x) {
  if (!isNumber(x)) return "\u2013";
  return x < 90 ? `${x.toFixed(1)} s` : `${Math.floor(x / 60)} min ${Math.round(x % 60)} s`;
}

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// --- algorithms keep one colour everywhere ---

const FIXED_COLOURS = { sft: "--sft", grpo: "--grpo", elpo: "--elpo" };
const SPARE_COLOURS = ["--other1", "--other2", "--other3", "--other4"];
const colours = new Map();

function colour(name) {
  if (!colours.has(name)) {
    const spare = SPARE_COLOURS[[...colours.keys()].filter((key) => !FIXED_COLOURS[key]).length % SPARE_COLOURS.length];
    colours.set(name, `var(${FIXED_COLOURS[name] ?? spare})`);
  }
  return colours.get(name);
}

const label = (name) => (FIXED_COLOURS[name] ? name.toUpperCase() : name);

// Colours go in through the style object: the page's policy refuses style attributes.
function styled(element, properties) {
  for (const [name, value] of Object.entries(properties)) element.style.setProperty(name, value);
  return element;
}

function legend(names) {
  return h(
    "ul",
    { class: "legend" },
    names.map((name) => h("li", {}, styled(h("i", {}), { background: colour(name) }), label(name))),
  );
}

// --- tooltip ---

function showTip(x, y, lines) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => (line instanceof Node ? line : h("div", {}, line))));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth - 6 ? x - 14 - width : x + 14;
  const top = y + 16 + height > innerHeight - 6 ? y - 12 - height : y + 16;
  styled(tip, { left: `${clamp(left, 6, innerWidth - width - 6)}px`, top: `${Math.max(6, top)}px` });
}

function hideTip() {
  byId("tip").hidden = true;
}

addEventListener("scroll", hideTip, { capture: true, passive: true });

// Shows lines() while the pointer is on the element or the keyboard has it in focus.
function tipFor(element, lines) {
  element.addEventListener("pointermove", (event) => showTip(event.clientX, event.clientY, lines()));
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("focus", () => {
    const box = element.getBoundingClientRect();
    if (element.matches(":focus-visible")) showTip(box.left, box.bottom, lines());
  });
  element.addEventListener("blur", hideTip);
}
