
// A picture of cells with what is around it: what a pointer is told, the choice of colours, the legend. Every text is set
// as text and never as HTML.

// What stands under the pointer: the nearest cell of the query, else of the reference.
function under(cells, scale, px, py) {
  const nearest = (set, reach) => {
    let [best, least] = [-1, reach * reach];
    for (let i = 0; i < set.n; i += 1) {
      const [dx, dy] = [scale.x(set.points[2 * i]) - px, scale.y(set.points[2 * i + 1]) - py];
      if (dx * dx + dy * dy < least) [best, least] = [i, dx * dx + dy * dy];
    }
    return best;
  };
  const name = (codes, column, i) => (codes ? (column.values[codes[i]] ?? "no label") : null);
  const i = nearest(cells, 9);
  if (i >= 0) {
    const lines = shared.columns.map((column, k) => name(cells.labels[k], column, i)).filter((text) => text !== null);
    const facts = [];
    if (cells.uncertainty[0]) facts.push(`uncertainty ${(cells.uncertainty[0][i] / 255).toFixed(2)}`);
    if (cells.distance) {
      const value = (cells.distance[i] / 255) * shared.farthest;
      facts.push(`distance ${cells.distance[i] === 255 ? `${shared.farthest} or more` : value.toFixed(2)}${value > 1 ? ", beyond the reference" : ""}`);
    }
    return { title: lines.join(" · ") || "a cell of the query", text: facts.join(" · ") };
  }
  const j = nearest(reference, 6);
  if (j < 0) return null;
  const lines = shared.columns.map((column, k) => name(reference.labels[k], column, j)).filter((text) => text !== null);
  return { title: lines.join(" · ") || "a cell", text: "of the reference" };
}

function tell(event, found) {
  tip.hidden = !found;
  if (!found) return;
  tip.replaceChildren(element("b", "", found.title), document.createTextNode(found.text));
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, window.innerHeight - height - 8))}px`;
}

// Buttons to choose what colours show, among the ways that `cells` have (or any query, without); a choice holds for all.
const choices = new Set();
function switches(cells) {
  const ways = shared.columns.map((column, i) => [i, column.name]).filter(([i]) => !cells || cells.labels[i]);
  if (cells ? cells.uncertainty[0] : ways.length) ways.push(["uncertainty", "Uncertainty"]);
  if (!cells || cells.distance) ways.push(["distance", "Distance"]);
  const bar = element("div", "bar");
  const group = element("span", "switch");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "Colour by");
  for (const [by, name] of ways) {
    const button = element("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      view.by = by;
      choices.forEach((mark) => mark());
      redraw();
    });
    group.append(button);
  }
  bar.append(element("span", "", "Colour by"), group);
  const mark = () => [...group.children].forEach((one, i) => one.setAttribute("aria-pressed", String(ways[i][0] === view.by)));
  choices.add(mark);
  mark();
  return bar;
}

function symbol([hue, shape]) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", `mark c${hue}`);
  svg.setAttribute("viewBox", "-1.4 -1.4 2.8 2.8");
  svg.append(outlines[shape].cloneNode());
  return svg;
}

// Labels that the query's cells have, the commonest first; pointing at one shows its cells alone.
function legendOf(cells, show) {
  const legend = element("div", "legend");
  if (typeof view.by !== "number") {
    const ramp = element("div", "ramp");
    const strip = element("i");
    const far = view.by === "distance";
    const stops = Array.from({ length: 31 }, (_, i) => `${(far ? ofDistance : ofUncertainty)((i / 30) * 255)} ${(i / 30) * 100}%`);
    strip.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const text = element("span");
    const told = far ? ["0", "1: edge of the reference", `${shared.farthest} and more`] : ["0: all neighbours agree", "1"];
    text.append(...told.map((one, i) => element("span", far && i === 1 ? "edge-at" : "", one)));
    ramp.append(strip, text);
    legend.append(ramp);
    return legend;
  }
  const codes = cells.labels[view.by];
  if (!codes) return legend;
  const { values, marks } = shared.columns[view.by];
  const counts = new Map();
  codes.forEach((code) => counts.set(code, (counts.get(code) ?? 0) + 1));
  let held = null;
  for (const [code] of [...counts].filter(([code]) => code < values.length).sort((a, b) => b[1] - a[1])) {
    const button = element("button");
    button.type = "button";
    button.title = values[code];
    button.append(symbol(marks[code]), document.createTextNode(values[code]));
    button.addEventListener("pointerenter", () => show(code));
    button.addEventListener("pointerleave", () => show(held));
    button.addEventListener("click", () => {
      held = held === code ? null : code;
      [...legend.children].forEach((one) => one.setAttribute("aria-pressed", String(one === button && held !== null)));
      show(held);
    });
    legend.append(button);
  }
  return legend;
}

// Draw in `holder`, the place for the picture of one query; what is around the canvas is made once.
function picture(holder, cells) {
  const canvas = element("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Cells of ${holder.dataset.name} on the reference's, which are grey`);
  let scale = null;
  let legend = element("div", "legend");
  const show = (only) => {
    scale = draw(canvas, cells, { only });
  };
  holder.replaceChildren(switches(cells), canvas, legend);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    if (scale) tell(event, under(cells, scale, event.clientX - box.left - 1, event.clientY - box.top - 1));
  });
  canvas.addEventListener("pointerleave", () => tell(null, null));
  return () => {
    const next = legendOf(cells, show);
    legend.replaceWith(next);
    legend = next;
    show(null);
  };
}
