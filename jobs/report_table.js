
// The overview: sorting and filtering its rows, the sections and the small pictures alike; opening a section by its link.

const rows = Array.from(document.querySelectorAll("#queries tbody tr"));
const control = (id) => document.getElementById(id);
const tiles = new Map();
const sorted = { key: null, down: false };

function sort(key, down) {
  sorted.key = key;
  sorted.down = down;
  const value = (row) => (key === "name" ? row.querySelector(".name bdi").textContent : row.dataset[key]);
  const plain = new Intl.Collator(undefined, { numeric: true });
  const numeric = key !== "name" && key !== "state";
  rows.sort((a, b) => {
    const [one, two] = [value(a), value(b)];
    if ((one === "") !== (two === "")) return one === "" ? 1 : -1; // what is not known comes last, either way
    const order = numeric ? Number(one) - Number(two) : plain.compare(one, two);
    return (down ? -order : order) || Number(a.dataset.number) - Number(b.dataset.number);
  });
  document.querySelector("#queries tbody").append(...rows);
  const numbers = rows.map((row) => row.dataset.number);
  control("sections").append(...numbers.flatMap((number) => sections.get(number) ?? []));
  if (tiles.size) control("pictures").append(...numbers.map((number) => tiles.get(number)));
  for (const head of document.querySelectorAll("#queries th")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }
}

function filter() {
  const wanted = control("filter").value.trim().toLowerCase();
  const state = control("state").value;
  let shown = 0;
  for (const row of rows) {
    const text = (row.searched ??= `${row.textContent} ${row.querySelector("td:last-child").title}`.toLowerCase());
    const seen =
      text.includes(wanted) &&
      (!state || row.dataset.state === state) &&
      (!control("only-far").checked || row.classList.contains("far")) &&
      (!control("only-warned").checked || Number(row.dataset.warnings) > 0);
    row.hidden = !seen;
    for (const other of [sections.get(row.dataset.number), tiles.get(row.dataset.number)]) if (other) other.hidden = !seen;
    shown += seen ? 1 : 0;
  }
  control("count").textContent = shown === rows.length ? "" : `${shown} of ${rows.length} shown`;
}

function fillTiles() {
  if (reference) control("pictures").append(switches(null));
  for (const row of rows) {
    const { number, state } = row.dataset;
    const tile = element("a", `tile ${row.className}`);
    tile.href = state === "done" ? `#q-${number}` : `#r-${number}`;
    const name = row.querySelector(".name bdi").textContent;
    if (sections.get(number)?.querySelector("script.cells")) {
      const canvas = element("canvas");
      watch(canvas, () => draw(canvas, cellsAt(number), { small: true }));
      tile.append(canvas);
    } else {
      tile.append(element("div", "no-cells", row.querySelector(".reason")?.textContent ?? "no picture"));
    }
    const beyond = row.querySelector("td.beyond span");
    tile.append(element("b", "", name), element("span", "", beyond ? `${beyond.textContent} beyond` : state));
    tile.title = name;
    tiles.set(number, tile);
    control("pictures").append(tile);
  }
}

function show(asPictures) {
  if (asPictures && !tiles.size) fillTiles();
  control("overview").hidden = asPictures;
  control("pictures").hidden = !asPictures;
  control("as-table").setAttribute("aria-pressed", String(!asPictures));
  control("as-pictures").setAttribute("aria-pressed", String(asPictures));
  filter();
}

// #q-3 opens a section, #r-3 shows a row, #sort=beyond-down sorts, #pictures shows the small pictures.
function follow() {
  const hash = window.location.hash.slice(1);
  const order = /^sort=([a-z]+)(-down)?$/.exec(hash);
  if (order && document.querySelector(`#queries th[data-key="${order[1]}"]`)) sort(order[1], Boolean(order[2]));
  if (hash === "pictures") show(true);
  if (/^r-\d+$/.test(hash)) show(false);
  const section = /^q-\d+$/.test(hash) ? document.getElementById(hash) : null;
  if (section) {
    section.open = true;
    unfold(section);
    section.scrollIntoView();
  }
}

for (const head of document.querySelectorAll("#queries th[data-key]")) {
  const button = element("button", "", head.textContent);
  button.type = "button";
  const falls = head.dataset.key !== "name" && head.dataset.key !== "state"; // numbers: the largest first
  button.addEventListener("click", () => sort(head.dataset.key, sorted.key === head.dataset.key ? !sorted.down : falls));
  head.replaceChildren(button);
}
for (const id of ["filter", "state", "only-far", "only-warned"]) control(id).addEventListener("input", filter);
control("as-table").addEventListener("click", () => show(false));
control("as-pictures").addEventListener("click", () => show(true));
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#q-"]');
  if (link && link.hash === window.location.hash) follow(); // a hash that stays the same fires no event
});
window.addEventListener("hashchange", follow);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (width !== window.innerWidth) redraw();
  width = window.innerWidth;
});
control("toolbar").hidden = false;
follow();
document.documentElement.dataset.ready = "1";
