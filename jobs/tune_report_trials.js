
"use strict";
// The trials of a search: what is kept of them by brushing, which one is pointed at, and numbers as text. Every text is set
// as text and never as HTML.

const drawing = JSON.parse(document.getElementById("drawing").textContent);
const { trials, axes } = drawing;
const control = (id) => document.getElementById(id);
const tip = control("tip");
const rows = trials.map((_, i) => control(`t-${i}`));
const many = trials.length > 150;
if (many) document.documentElement.classList.add("many");

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.append(...children);
  return made;
}

// Four figures, as tune_report_data.number writes them.
function figures(value) {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e12) return Math.round(value).toLocaleString("en-US");
  if (size !== 0 && (size < 1e-3 || size >= 1e12)) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// A scale from values to places between `from` and `to`, with its ticks. Of an axis of listed values each has a step.
function scaleOf(axis, from, to, n = 5) {
  const within = (share) => from + share * (to - from);
  if (axis.kind === "choice") {
    const size = Math.max(1, axis.values.length);
    const share = (value) => (value + 0.5) / size;
    return { share, at: (value) => within(share(value)), ticks: axis.values.map((text, i) => [i, text]) };
  }
  let { low, high } = axis;
  const log = axis.kind === "log";
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.05 || 1), high + (Math.abs(high) * 0.05 || 1)];
  const unit = log ? Math.log : (value) => value;
  const share = (value) => Math.min(1, Math.max(0, (unit(value) - unit(low)) / (unit(high) - unit(low))));
  const back = (part) => (log ? Math.exp(unit(low) + part * (unit(high) - unit(low))) : low + part * (high - low));
  const found = (log ? decades(low, high) : steps(low, high, n)).filter((value) => !axis.whole || Number.isInteger(value));
  const places = found.map((value) => [value, figures(value)]);
  return { share, back, at: (value) => within(share(value)), ticks: places };
}
function steps(low, high, n) {
  const rough = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough * 0.999) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}
function decades(low, high) {
  const found = [];
  const factors = high / low > 300 ? [1] : high / low > 12 ? [1, 3] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of factors) {
      const value = Number((factor * 10 ** power).toPrecision(3));
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 1 ? found : [low, high];
}

// How far up each axis a trial lies, from 0 to 1, or null; the last is the objective, whose best is on top.
const objective = { name: drawing.objective, kind: "linear", low: drawing.range?.[0] ?? 0, high: drawing.range?.[1] ?? 1 };
const shares = trials.map((trial) => {
  const found = axes.map((axis, k) => (trial.places[k] === null ? null : scaleOf(axis, 0, 1).share(trial.places[k])));
  return [...found, trial.value === null ? null : heightOf(trial.value)];
});
function heightOf(value) {
  const share = scaleOf(objective, 0, 1).share(value);
  return drawing.mode === "min" ? 1 - share : share;
}

// What is kept: trials that lie within every brush, a part [low, high] of an axis by its number.
const brushes = new Map();
const kept = trials.map(() => true);
const plots = []; // each: {marks: trial -> elements, light(trial or null)}
function brush(k, part) {
  if (part) brushes.set(k, part);
  else brushes.delete(k);
  const eps = 1e-9;
  trials.forEach((_, i) => {
    kept[i] = [...brushes].every(([axis, [low, high]]) => shares[i][axis] !== null && shares[i][axis] >= low - eps && shares[i][axis] <= high + eps);
  });
  mark();
  filter();
}
function mark() {
  for (const { marks } of plots) marks.forEach((one, i) => one?.classList.toggle("out", !kept[i]));
  const n = kept.filter(Boolean).length;
  control("selected").textContent = brushes.size ? `${n} of ${trials.length} trials are kept` : "";
  control("clear").hidden = !brushes.size;
}

// Which trial is pointed at, in any of the pictures or in the table.
let pointed = null;
function point(i) {
  if (i === pointed) return;
  rows[pointed]?.classList.remove("lit");
  pointed = i;
  rows[i]?.classList.add("lit");
  for (const plot of plots) plot.light(i);
}
function tell(event, i) {
  point(i);
  tip.hidden = i === null;
  if (i === null) return;
  const trial = trials[i];
  const state = trial.state === "stopped" ? "stopped early" : trial.state;
  const lines = [`${state}, ${trial.epochs} ${trial.epochs === 1 ? "epoch" : "epochs"}${trial.default ? ", the defaults" : ""}`];
  if (trial.value !== null) lines.push(`${drawing.objective} ${figures(trial.value)} after epoch ${trial.at}`);
  axes.forEach((axis, k) => {
    const place = trial.places[k];
    if (place !== null) lines.push(`${axis.name} ${axis.kind === "choice" ? axis.values[place] : figures(place)}`);
  });
  tip.replaceChildren(element("b", "", trial.name), ...lines.flatMap((line) => [document.createTextNode(line), element("br")]));
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, window.innerHeight - height - 8))}px`;
}

const kindOf = (trial, i) =>
  `trial ${trial.state} ${trial.shade === null ? "none" : `s${trial.shade}`}${trial.default ? " default" : ""}${i === drawing.best ? " best" : ""}`;
// The worst are drawn first, the defaults and the best last, on top.
const drawnLast = (i) => (i === drawing.best ? 100 : trials[i].default ? 99 : (trials[i].shade ?? -1));
const order = trials.map((_, i) => i).sort((a, b) => drawnLast(a) - drawnLast(b));
