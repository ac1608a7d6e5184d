
"use strict";
// Cells on a canvas: the reference in grey, a query's cells on it. They come as base64 of small integers from the JSON in
// the page and are decoded when a picture is first seen.

const shared = JSON.parse(document.getElementById("shared").textContent);
const tip = document.getElementById("tip");
const outlines = document.querySelectorAll(".shapes path");
const shapes = Array.from(outlines, (path) => new Path2D(path.getAttribute("d")));
const UNIT = 65535;
const view = { by: shared.columns.length ? 0 : "distance" }; // a label column's number, "uncertainty" or "distance"

// Pictures are drawn when they are seen, and again when they are seen after a change: five hundred cost nothing before.
const watched = new Set();
const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      target.paint();
    }
    document.documentElement.dataset.drawn = String(document.querySelectorAll("canvas[width]").length);
  },
  { rootMargin: "300px" },
);
function watch(target, paint) {
  target.paint = paint;
  watched.add(target);
  seen.observe(target);
}
function redraw() {
  colours = {};
  for (const target of watched) {
    seen.unobserve(target);
    seen.observe(target);
  }
}

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function decoded(text, words) {
  if (text === null || text === undefined) return null;
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  return words ? new Uint16Array(bytes.buffer) : bytes;
}

const many = shared.columns.map((column) => column.values.length > 255);
const reference = shared.reference && {
  n: shared.reference.n,
  points: decoded(shared.reference.points, true),
  labels: shared.reference.labels.map((codes, i) => decoded(codes, many[i])),
};

function cellsOf(holder) {
  const raw = JSON.parse(holder.textContent);
  return {
    n: raw.n,
    points: decoded(raw.points, true),
    labels: raw.labels.map((codes, i) => decoded(codes, many[i])),
    uncertainty: raw.uncertainty.map((values) => decoded(values)),
    distance: decoded(raw.distance),
  };
}

// Colours live in the style alone, in a light and a dark set.
let colours = {};
function colour(name) {
  return (colours[name] ??= getComputedStyle(document.documentElement).getPropertyValue(name).trim());
}
function channels(name) {
  const hex = colour(name);
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
function blend(names, share) {
  const at = Math.min(Math.max(share, 0), 1) * (names.length - 1);
  const i = Math.min(Math.floor(at), names.length - 2);
  const [from, to] = [channels(names[i]), channels(names[i + 1])];
  return `rgb(${from.map((v, k) => Math.round(v + (to[k] - v) * (at - i))).join(" ")})`;
}
const UNSURE = ["--u0", "--u1", "--u2", "--u3", "--u4"];
function ofUncertainty(byte) {
  return blend(UNSURE, byte / 255);
}
function ofDistance(byte) {
  const value = (byte / 255) * shared.farthest;
  return value <= 1 ? blend(["--d0", "--d1"], value) : blend(["--d2", "--d3"], (value - 1) / (shared.farthest - 1));
}

// What a picture shows: the reference, and the query where it reaches beyond it.
function frameOf(cells) {
  const frame = [Infinity, Infinity, -Infinity, -Infinity];
  for (const { points, n } of [reference, cells]) {
    for (let i = 0; i < 2 * n; i += 1) {
      frame[i % 2] = Math.min(frame[i % 2], points[i]);
      frame[2 + (i % 2)] = Math.max(frame[2 + (i % 2)], points[i]);
    }
  }
  return frame;
}

function draw(canvas, cells, { small = false, only = null } = {}) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return null;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const frame = (cells.frame ??= frameOf(cells));
  const pad = small ? 8 : 18;
  const x = (v) => pad + ((v - frame[0]) / (frame[2] - frame[0] || 1)) * (width - 2 * pad);
  const y = (v) => height - pad - ((v - frame[1]) / (frame[3] - frame[1] || 1)) * (height - 2 * pad);
  pen.fillStyle = colour("--ground");
  const dot = small ? 1.4 : 2.2;
  for (let i = 0; i < reference.n; i += 1) {
    pen.fillRect(x(reference.points[2 * i]) - dot / 2, y(reference.points[2 * i + 1]) - dot / 2, dot, dot);
  }
  const size = (small ? 1.5 : 2.6) * (cells.n < 200 ? 1.4 : 1);
  const paint = painter(cells);
  for (const i of orderOf(cells)) {
    const [fill, shape, code] = paint(i);
    pen.globalAlpha = only === null || only === code ? 0.88 : 0.05;
    pen.fillStyle = fill;
    const [cx, cy] = [x(cells.points[2 * i]), y(cells.points[2 * i + 1])];
    pen.translate(cx, cy);
    pen.scale(size, size);
    pen.fill(shapes[shape]);
    pen.scale(1 / size, 1 / size);
    pen.translate(-cx, -cy);
  }
  pen.globalAlpha = 1;
  if (!small) {
    names(pen, x, y, width);
    axes(pen, height);
  }
  return { x, y };
}

// (colour, shape, code) of a cell as it is to be shown now.
function painter(cells) {
  const column = typeof view.by === "number" ? view.by : 0;
  const codes = cells.labels[column];
  if (view.by === "uncertainty" && cells.uncertainty[0]) return (i) => [ofUncertainty(cells.uncertainty[0][i]), 0, null];
  if (view.by === "distance" && cells.distance) return (i) => [ofDistance(cells.distance[i]), 0, null];
  if (typeof view.by !== "number" || !codes) return () => [colour("--c0"), 0, null];
  const { marks } = shared.columns[column];
  return (i) => {
    const mark = marks[codes[i]];
    return mark ? [colour(`--c${mark[0]}`), mark[1], codes[i]] : [colour("--soft"), 0, codes[i]];
  };
}

// Cells that are far or unsure come last, on top; labels come as they are.
function orderOf(cells) {
  const order = Array.from({ length: cells.n }, (_, i) => i);
  const by = view.by === "distance" ? cells.distance : view.by === "uncertainty" ? cells.uncertainty[0] : null;
  return by ? order.sort((a, b) => by[a] - by[b]) : order;
}

// Names of the commonest labels where the reference's cells of that label lie; one that would cover another is left out.
function names(pen, x, y, width) {
  const column = typeof view.by === "number" ? view.by : 0;
  const codes = reference.labels[column];
  if (!codes) return;
  const places = (reference.places ??= [])[column] ??= medians(codes, shared.columns[column].values);
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  pen.lineWidth = 4;
  const taken = [];
  for (const place of places) {
    const text = place.name.length > 22 ? `${place.name.slice(0, 21)}…` : place.name;
    const half = pen.measureText(text).width / 2 + 3;
    const at = [Math.min(Math.max(x(place.x), half + 2), width - half - 2), y(place.y)];
    if (taken.some((other) => Math.abs(other[0] - at[0]) < other[2] + half && Math.abs(other[1] - at[1]) < 16)) continue;
    taken.push([...at, half]);
    pen.strokeStyle = colour("--halo");
    pen.strokeText(text, at[0], at[1]);
    pen.fillStyle = colour("--ink");
    pen.fillText(text, at[0], at[1]);
  }
}

function medians(codes, values) {
  const held = new Map();
  codes.forEach((code, i) => {
    if (code < values.length) (held.get(code) ?? held.set(code, []).get(code)).push(i);
  });
  const middle = (rows, k) => rows.map((i) => reference.points[2 * i + k]).sort((a, b) => a - b)[rows.length >> 1];
  return Array.from(held, ([code, rows]) => ({ name: values[code], n: rows.length, x: middle(rows, 0), y: middle(rows, 1) }))
    .sort((a, b) => b.n - a.n)
    .slice(0, 24);
}

function axes(pen, height) {
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "left";
  pen.textBaseline = "alphabetic";
  pen.fillStyle = colour("--soft");
  pen.fillText(`${shared.axes[0]} →`, 8, height - 7);
  pen.save();
  pen.translate(14, height - 22);
  pen.rotate(-Math.PI / 2);
  pen.fillText(`${shared.axes[1]} →`, 0, 0);
  pen.restore();
}
