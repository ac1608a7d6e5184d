
// Sections of queries, whose pictures are drawn when they are seen. In a report of many, what a section holds stands in
// <noscript>: a reader without scripts has it at once, and for all others it is text until the section is opened. The text
// is what our own template wrote, every tag closed and every value escaped, and elements are made of it one by one: so
// nothing in the page ever asks the browser to read HTML, which its policy forbids.

const PART = /<(\/?)([a-z][a-z0-9]*)((?:\s+[\w-]+="[^"]*")*)\s*(\/?)>|([^<]+)/gi;
const SIGNS = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "&#34;": '"', "&#39;": "'" };
const plain = (text) => text.replace(/&(?:lt|gt|amp|#34|#39);/g, (sign) => SIGNS[sign]);

function elementsOf(text) {
  const all = document.createDocumentFragment();
  let at = all;
  for (const [, closing, name, attributes, empty, words] of text.matchAll(PART)) {
    if (words !== undefined) {
      at.append(plain(words));
    } else if (closing) {
      at = at.parentNode;
    } else {
      const vector = name === "svg" || (at.namespaceURI ?? "").endsWith("svg");
      const made = vector ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
      for (const [, key, value] of attributes.matchAll(/([\w-]+)="([^"]*)"/g)) made.setAttribute(key, plain(value));
      at.append(made);
      if (!empty) at = made;
    }
  }
  return all;
}

const sections = new Map(Array.from(document.querySelectorAll("details.query"), (one) => [one.dataset.number, one]));
const decodedCells = new Map();
function cellsAt(number) {
  if (!decodedCells.has(number)) decodedCells.set(number, cellsOf(sections.get(number).querySelector("script.cells")));
  return decodedCells.get(number);
}

function unfold(section) {
  const folded = section.querySelector("noscript.folded");
  if (folded) folded.replaceWith(elementsOf(folded.textContent));
  const holder = section.querySelector(".picture:empty");
  let paint = null;
  if (holder && !watched.has(holder)) watch(holder, () => (paint ??= picture(holder, cellsAt(section.dataset.number)))());
}
for (const section of sections.values()) {
  if (section.querySelector("noscript.folded")) section.addEventListener("toggle", () => unfold(section), { once: true });
  else unfold(section);
}
