
// The table of trials: sorted and filtered, in step with the pictures; and what makes the page come alive.

const sorted = { column: 2, down: drawing.mode === "max" };
const lines = rows.map((row, i) => ({ row, i }));

function sort(column, down) {
  sorted.column = column;
  sorted.down = down;
  const collator = new Intl.Collator(undefined, { numeric: true });
  // Parameters may be words or numbers; a number is before a word, and what is not there comes last either way.
  const value = ({ row }) => {
    const cell = row.cells[column];
    if (column === 0) return cell.querySelector("bdi").textContent;
    return cell.dataset.value ?? cell.textContent;
  };
  const keys = new Map(lines.map((line) => [line, value(line)]));
  const numbers = new Map(lines.map((line) => [line, Number(keys.get(line).replaceAll(",", ""))]));
  lines.sort((a, b) => {
    const [one, two] = [keys.get(a), keys.get(b)];
    if ((one === "") !== (two === "")) return one === "" ? 1 : -1;
    const [x, y] = [numbers.get(a), numbers.get(b)];
    const found = Number.isNaN(x) || Number.isNaN(y) ? (Number.isNaN(x) - Number.isNaN(y)) || collator.compare(one, two) : x - y;
    return (down ? -found : found) || a.i - b.i;
  });
  control("trials").tBodies[0].append(...lines.map(({ row }) => row));
  heads.forEach((head, k) => {
    head.removeAttribute("aria-sort");
    if (k === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
  });
}

function filter() {
  const wanted = control("filter").value.trim().toLowerCase();
  const state = control("state").value;
  let shown = 0;
  for (const { row, i } of lines) {
    row.searched ??= row.textContent.toLowerCase();
    row.hidden = !(kept[i] && row.searched.includes(wanted) && (!state || row.dataset.state === state));
    shown += row.hidden ? 0 : 1;
  }
  control("count").textContent = shown === rows.length ? "" : `${shown} of ${rows.length} shown`;
}

const heads = Array.from(document.querySelectorAll("#trials th"));
heads.forEach((head, column) => {
  const button = element("button");
  button.type = "button";
  button.append(...head.childNodes);
  const falls = column === 2 && drawing.mode === "max"; // the best first
  button.addEventListener("click", () => sort(column, sorted.column === column ? !sorted.down : falls));
  head.replaceChildren(button);
});

// A browser lays out a table as a whole, which takes a second for a thousand rows, and again after each sort. Of many
// rows each is a grid of its own with columns of fixed widths, and only those on the screen are laid out.
if (many) {
  const width = (column) => {
    const longest = lines.reduce((most, { row }) => Math.max(most, row.cells[column].textContent.length), 4);
    const words = Array.from(heads[column].querySelector("button").childNodes, (one) => one.textContent.length);
    return Math.round(Math.max(7.6 * longest, 7.2 * Math.max(...words) + 16)) + 14;
  };
  const columns = heads.map((_, column) => (column ? `${Math.min(260, width(column))}px` : "minmax(230px, 1fr)"));
  control("trials").style.setProperty("--columns", columns.join(" "));
  const roles = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TH: "columnheader", TD: "cell" };
  for (const one of [control("trials"), ...control("trials").querySelectorAll("thead, tbody, tr, th, td")]) one.setAttribute("role", roles[one.tagName]);
}

// One row is in the order of tabs; arrow keys go to the others and point at their trials in the pictures.
let current = null;
function stand(row) {
  if (current) current.tabIndex = -1;
  current = row;
  if (row) row.tabIndex = 0;
}
const body = control("trials").tBodies[0];
body.addEventListener("keydown", (event) => {
  const way = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  let next = way && event.target.closest("tr")?.[way];
  while (next?.hidden) next = next[way];
  if (!next) return;
  event.preventDefault();
  stand(next);
  next.focus();
});
body.addEventListener("focusin", (event) => {
  const row = event.target.closest("tr");
  stand(row);
  point(rows.indexOf(row));
});
body.addEventListener("focusout", () => point(null));
body.addEventListener("pointerover", (event) => point(rows.indexOf(event.target.closest("tr"))));
body.addEventListener("pointerleave", () => point(null));

control("filter").addEventListener("input", filter);
control("state").addEventListener("input", filter);
control("clear").addEventListener("click", () => {
  brushes.clear();
  brush(0, null);
  draw();
});
for (const id of ["whole", "closer"]) {
  control(id).addEventListener("click", () => {
    lookingAt.closer = id === "closer";
    for (const one of ["whole", "closer"]) control(one).setAttribute("aria-pressed", String(one === id));
    draw();
  });
}
const copy = control("copy");
if (copy) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    const text = control("toml");
    window.getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      control("copied").textContent = "Copied.";
    } catch {
      control("copied").textContent = "It is selected: copy it with your keyboard."; // a page on disk may not be allowed to
    }
  });
}

function draw() {
  plots.length = 0;
  pointed = null;
  drawCurves();
  drawAxes();
  drawEach();
  mark();
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn ?? 0) + 1);
}
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (width !== window.innerWidth) draw();
  width = window.innerWidth;
});
control("toolbar").hidden = false;
control("drawn").hidden = !trials.length;
if (trials.length) {
  stand(body.rows[0]);
  heads[2].setAttribute("aria-sort", drawing.mode === "max" ? "descending" : "ascending"); // as they come
  draw();
}
