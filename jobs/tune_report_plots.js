
// Curves of the objective by epoch, and the objective against each parameter.

const lookingAt = { closer: false };

// The trial whose line passes nearest to a point, if it does within `reach`; lines are [x, y] by ascending x.
function nearestLine(lines, px, py, reach) {
  let [best, least] = [null, reach];
  lines.forEach((line, i) => {
    if (!line || !line.length || !kept[i]) return;
    let gap = Infinity;
    if (line.length === 1) gap = Math.hypot(line[0][0] - px, line[0][1] - py);
    for (let k = 1; k < line.length; k += 1) {
      const [[ax, ay], [bx, by]] = [line[k - 1], line[k]];
      if (px < ax - reach || px > bx + reach) continue;
      const part = Math.min(1, Math.max(0, ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2 || 1)));
      gap = Math.min(gap, Math.hypot(ax + part * (bx - ax) - px, ay + part * (by - ay) - py));
    }
    if (gap < least) [best, least] = [i, gap];
  });
  return best;
}
const pathOf = (line) => `M${line.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;

// What a pointer over `picture` is told: `found(x, y)` is the trial there, or null.
function listen(picture, found) {
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const scale = picture.viewBox.baseVal.width / box.width;
    tell(event, found((event.clientX - box.left) * scale, (event.clientY - box.top) * scale));
  });
  picture.addEventListener("pointerleave", (event) => tell(event, null));
}

function frame(picture, x, y, { left, right, top, bottom }, names) {
  const lines = svg("g", {});
  for (const [value, text] of y.ticks) {
    const at = y.at(value);
    lines.append(svg("path", { class: "grid-line", d: `M${left} ${at}H${right}` }), svg("text", { class: "end", x: left - 8, y: at + 4 }, text));
  }
  const crowded = x.ticks.length > 1 && (right - left) / x.ticks.length < 46; // longer words than there is room for
  x.ticks.forEach(([value, text], i) => {
    if (crowded && i % Math.ceil((46 * x.ticks.length) / (right - left)) !== 0) return;
    const at = x.at(value);
    const room = Math.max(6, Math.floor((right - left) / x.ticks.length / 7));
    const shown = text.length > room && x.ticks.length > 1 ? `${text.slice(0, room - 1)}…` : text;
    lines.append(svg("text", { class: at > right - 14 ? "end" : "mid", x: at > right - 14 ? right : at, y: bottom + 17 }, shown, svg("title", {}, text)));
  });
  lines.append(svg("path", { class: "axis-line", d: `M${left} ${bottom}H${right}` }));
  if (names) lines.append(svg("text", { class: "end", x: right, y: bottom + 34 }, names));
  picture.append(lines);
}

function drawCurves() {
  const figure = control("curves");
  const [width, height] = [Math.max(320, figure.clientWidth), 360];
  const box = { left: 64, right: width - 8, top: 10, bottom: height - 42 };
  const epochs = trials.flatMap((trial) => trial.curve[0]);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${drawing.objective} by epoch of ${trials.length} trials` });
  if (!epochs.length) return figure.replaceChildren(element("p", "empty", "No trial has a value of the objective yet."));
  const span = lookingAt.closer ? closer() : drawing.curves;
  const pad = (span[1] - span[0]) * 0.03;
  const last = epochs.reduce((a, b) => Math.max(a, b));
  const first = epochs.reduce((a, b) => Math.min(a, b));
  const x = scaleOf({ kind: "linear", whole: true, low: first, high: last > first ? last : first + 1 }, box.left + 8, box.right - 8, 8);
  const y = scaleOf({ kind: "linear", low: span[0] - pad, high: span[1] + pad }, box.bottom, box.top);
  frame(picture, x, y, box, "epoch");
  picture.append(svg("clipPath", { id: "clip" }, svg("rect", { x: box.left, y: box.top - 4, width: box.right - box.left, height: box.bottom - box.top + 4 })));
  const group = svg("g", { "clip-path": "url(#clip)" });
  // Beyond the range a line goes on outside the picture: places are not held to it, as those of a scale are.
  const far = (value) => box.bottom + ((value - (span[0] - pad)) / (span[1] - span[0] + 2 * pad || 1)) * (box.top - box.bottom);
  const lines = trials.map((trial) => trial.curve[0].map((epoch, k) => [x.at(epoch), span[0] < span[1] ? far(trial.curve[1][k]) : y.at(trial.curve[1][k])]));
  const marks = [];
  for (const i of order) {
    if (!lines[i].length) continue;
    const [[px, py]] = lines[i];
    marks[i] = lines[i].length > 1 ? svg("path", { class: kindOf(trials[i], i), d: pathOf(lines[i]) }) : svg("circle", { class: kindOf(trials[i], i), cx: px, cy: py, r: 3 });
    group.append(marks[i]);
  }
  const lit = svg("path", { class: "lit" });
  group.append(lit);
  if (drawing.best !== null) group.append(bestPoint(lines[drawing.best], trials[drawing.best]));
  picture.append(group);
  figure.replaceChildren(picture);
  listen(picture, (px, py) => nearestLine(lines, px, py, 14));
  plots.push({ marks, light: (i) => lit.setAttribute("d", i !== null && lines[i].length > 1 ? pathOf(lines[i]) : "") });
}
function bestPoint(line, trial) {
  const [px, py] = line[trial.curve[0].indexOf(trial.at)];
  return svg("circle", { class: "trial best", cx: px, cy: py, r: 5 });
}
// From the best value to the worst but a third of what the trials reached: there they can be told apart.
function closer() {
  const values = trials.flatMap((trial) => (trial.value === null ? [] : [trial.value])).sort((a, b) => (drawing.mode === "min" ? a - b : b - a));
  const edge = values[Math.min(values.length - 1, Math.ceil(values.length * 0.67))];
  return edge === values[0] ? drawing.curves : [Math.min(values[0], edge), Math.max(values[0], edge)];
}

function drawEach() {
  const holder = control("each");
  holder.replaceChildren();
  if (!drawing.range) return holder.append(element("p", "empty", "No trial has a value of the objective yet."));
  axes.forEach((axis, k) => {
    const figure = element("figure");
    figure.append(element("figcaption", "", axis.name));
    holder.append(figure);
    const [width, height] = [Math.max(200, figure.clientWidth), 190];
    const box = { left: 54, right: width - 4, top: 8, bottom: height - 24 };
    const pad = (objective.high - objective.low) * 0.04;
    const x = scaleOf(axis, box.left + 8, box.right - 8, 4);
    const y = scaleOf({ ...objective, low: objective.low - pad, high: objective.high + pad }, box.bottom, box.top, 3);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${drawing.objective} against ${axis.name}` });
    frame(picture, x, y, box);
    const step = axis.kind === "choice" ? (box.right - box.left) / axis.values.length : 0;
    const places = trials.map((trial, i) =>
      trial.places[k] === null || trial.value === null ? null : [x.at(trial.places[k]) + apart(i) * Math.min(step * 0.3, 18), y.at(trial.value)],
    );
    const marks = [];
    for (const i of order) {
      if (!places[i]) continue;
      marks[i] = svg("circle", { class: kindOf(trials[i], i), cx: places[i][0].toFixed(1), cy: places[i][1].toFixed(1), r: i === drawing.best ? 5 : many ? 2.2 : 3.4 });
      picture.append(marks[i]);
    }
    const lit = svg("circle", { class: "lit", r: 6, visibility: "hidden" });
    picture.append(lit);
    figure.append(picture);
    listen(picture, (px, py) => nearestLine(places.map((place) => place && [place]), px, py, 12));
    plots.push({
      marks,
      light: (i) => {
        const place = i === null ? null : places[i];
        lit.setAttribute("visibility", place ? "visible" : "hidden");
        if (place) [lit.setAttribute("cx", place[0]), lit.setAttribute("cy", place[1])];
      },
    });
  });
}

// A number from -1 to 1 of each trial, always the same: equal values of a list would lie on each other.
function apart(i) {
  const turn = (i * 0.618034) % 1;
  return 2 * turn - 1;
}
