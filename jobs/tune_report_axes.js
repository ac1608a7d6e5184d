
// Parallel coordinates: an axis for each parameter and one for the objective, a line for each trial, and brushes on axes.

let brushing = false;

function drawAxes() {
  const figure = control("axes");
  const dimensions = [...axes, objective];
  const gap = Math.max(120, (figure.clientWidth - 132) / Math.max(1, axes.length));
  const [width, height] = [Math.round(132 + gap * axes.length), 400];
  const [top, bottom, left] = [58, height - 14, 42];
  const at = (k) => left + k * gap;
  const y = (share) => bottom - share * (bottom - top);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-label": `Parameters and ${drawing.objective} of ${trials.length} trials`, role: "group" });
  const lines = trials.map((_, i) =>
    dimensions.map((axis, k) => {
      const share = shares[i][k];
      const room = axis.kind === "choice" ? Math.min(0.3 / axis.values.length, 0.03) : 0;
      return share === null ? null : [at(k), y(share + apart(i) * room)];
    }),
  );
  const whole = lines.map((line) => line.filter((place) => place));
  const marks = [];
  const group = svg("g", {});
  for (const i of order) {
    if (whole[i].length < 2) continue;
    marks[i] = svg("path", { class: kindOf(trials[i], i), d: pathOf(whole[i]) });
    group.append(marks[i]);
  }
  const lit = svg("path", { class: "lit" });
  picture.append(group, lit);
  dimensions.forEach((axis, k) => picture.append(axisOf(axis, k, { x: at(k), y, top, bottom, gap })));
  figure.replaceChildren(picture);
  listen(picture, (px, py) => (brushing ? null : nearestLine(whole, px, py, 10)));
  plots.push({ marks, light: (i) => lit.setAttribute("d", i !== null && whole[i].length > 1 ? pathOf(whole[i]) : "") });
}

function axisOf(axis, k, { x, y, top, bottom, gap }) {
  const last = axis === objective;
  const scale = scaleOf(axis, 0, 1, 6);
  if (last && !drawing.range) scale.ticks = [];
  const up = (value) => (last ? heightOf(value) : scale.share(value));
  const group = svg("g", { class: "dimension", tabindex: 0, role: "slider", "aria-label": axis.name, "aria-valuemin": 0, "aria-valuemax": 100 });
  const words = last ? ["", axis.name] : [axis.name.slice(0, axis.name.lastIndexOf(".") + 1), axis.name.slice(axis.name.lastIndexOf(".") + 1)];
  const room = Math.max(8, Math.floor(gap / 7.4));
  const cut = (text) => (text.length > room ? `${text.slice(0, room - 1)}…` : text);
  const place = k === 0 ? { x: x - 32 } : last ? { class: "end", x: x + 84 } : { class: "mid", x };
  const name = svg("text", { ...place, class: `name ${place.class ?? ""}`, y: top - 22 }, cut(words[1]), svg("title", {}, axis.name));
  const box = svg("rect", { class: "brush", x: x - 9, width: 18, y: 0, height: 0, rx: 3 });
  group.append(svg("rect", { class: "hit", x: x - 20, y: top - 8, width: 40, height: bottom - top + 16 }));
  if (words[0]) group.append(svg("text", { ...place, y: top - 37 }, cut(words[0])));
  group.append(name, svg("path", { class: "axis-line", d: `M${x} ${top}V${bottom}` }));
  const skip = Math.ceil((scale.ticks.length * 15) / (bottom - top));
  const best = last && drawing.best !== null ? trials[drawing.best].value : null;
  if (best !== null) group.append(svg("text", { class: "halo is-best", x: x + 8, y: y(up(best)) + 4 }, figures(best)));
  scale.ticks.forEach(([value, text], i) => {
    const height = y(up(value));
    if (best !== null && Math.abs(height - y(up(best))) < 14) return;
    group.append(svg("path", { class: "axis-line", d: `M${x - 3} ${height}H${x + 3}` }));
    if (i % skip === 0) group.append(svg("text", { class: "halo", x: x + 8, y: height + 4 }, cut(text), svg("title", {}, text)));
  });
  group.append(box);

  const show = () => {
    const part = brushes.get(k);
    box.setAttribute("y", part ? y(part[1]) : 0);
    box.setAttribute("height", part ? Math.max(2, y(part[0]) - y(part[1])) : 0);
    group.setAttribute("aria-valuenow", String(Math.round(part ? 50 * (part[0] + part[1]) : 50)));
    group.setAttribute("aria-valuetext", part ? rangeText(axis, scale, part, last) : "all trials are kept");
  };
  const keep = (part) => {
    brush(k, part && snapped(axis, part));
    show();
  };
  drag(group, { keep, y: (share) => y(share), top, bottom, axis, k });
  group.addEventListener("keydown", (event) => {
    const next = stepped(event.key, brushes.get(k), axis.kind === "choice" ? 1 / axis.values.length : 0.1);
    if (next === undefined) return;
    event.preventDefault();
    keep(next);
  });
  show();
  return group;
}

// Brushing by the pointer. A click lets go; on a list it keeps the value that was clicked.
function drag(group, { keep, top, bottom, axis, k }) {
  let from = null;
  const shareAt = (event) => {
    const picture = group.ownerSVGElement.getBoundingClientRect();
    const scale = group.ownerSVGElement.viewBox.baseVal.height / picture.height;
    return Math.min(1, Math.max(0, (bottom - (event.clientY - picture.top) * scale) / (bottom - top)));
  };
  group.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    from = shareAt(event);
    brushing = true;
    group.setPointerCapture(event.pointerId);
  });
  group.addEventListener("pointermove", (event) => {
    const to = from === null ? null : shareAt(event);
    if (to !== null && Math.abs(to - from) * (bottom - top) > 4) keep([Math.min(from, to), Math.max(from, to)]);
  });
  const end = (event) => {
    if (from === null) return;
    const still = Math.abs(shareAt(event) - from) * (bottom - top) <= 4;
    if (still) {
      const value = axis.kind === "choice" ? snapped(axis, [from, from]) : null;
      const had = brushes.get(k);
      keep(value && !(had && had[0] === value[0] && had[1] === value[1]) ? [from, from] : null);
    }
    from = null;
    brushing = false;
  };
  group.addEventListener("pointerup", end);
  group.addEventListener("pointercancel", end);
}

// A part of an axis of listed values holds whole steps.
function snapped(axis, [low, high]) {
  if (axis.kind !== "choice") return [low, high];
  const n = axis.values.length;
  const first = Math.min(n - 1, Math.floor(low * n + 1e-9));
  return [first / n, Math.max(first + 1, Math.ceil(high * n - 1e-9)) / n];
}

// What a key makes of a part; undefined: it is no key of ours.
function stepped(key, part, step) {
  if (key === "Escape") return null;
  const moved = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[key];
  if (moved) {
    if (!part) return moved > 0 ? [1 - step, 1] : [0, step];
    const by = Math.max(-part[0], Math.min(1 - part[1], moved * step));
    return [part[0] + by, part[1] + by];
  }
  if (!part || !["+", "=", "-"].includes(key)) return undefined;
  if (key !== "-") return [Math.max(0, part[0] - step), Math.min(1, part[1] + step)];
  const size = Math.max(step, part[1] - part[0] - 2 * step);
  const middle = (part[0] + part[1]) / 2;
  return [middle - size / 2, middle + size / 2];
}

function rangeText(axis, scale, [low, high], isLast) {
  if (axis.kind === "choice") {
    const n = axis.values.length;
    return axis.values.slice(Math.round(low * n), Math.round(high * n)).join(", ");
  }
  const [a, b] = isLast && drawing.mode === "min" ? [1 - high, 1 - low] : [low, high];
  return `${figures(scale.back(a))} to ${figures(scale.back(b))}`;
}
