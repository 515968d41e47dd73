"use strict";

// Tables and curves can be read without this file. It adds sorting, filters, what is behind a row,
// the numbers of points, and the slider.

const all = (what, within = document) => [...within.querySelectorAll(what)];
const one = (what) => document.querySelector(what);

// ---- sorting

const table = one("#main");

function key(row, by) {
  if (by in row.dataset) return row.dataset[by];
  const { value } = row.querySelector(`[data-column="${by}"]`).dataset;
  return value === undefined ? null : Number(value);
}

const isNumber = (button) => /^\d/.test(button.dataset.sort);

function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);  // what is unknown comes last
  const order = typeof a === "number" ? a - b : a.localeCompare(b);
  return down ? -order : order;
}

function sortBy(button) {
  const head = button.closest("th");
  const down = isNumber(button) ? head.ariaSort !== "descending" : head.ariaSort === "ascending";
  for (const other of all("thead th", table)) other.ariaSort = "none";
  head.ariaSort = down ? "descending" : "ascending";
  const rows = all("tbody tr", table);
  const by = button.dataset.sort;
  rows.sort((a, b) => compare(key(a, by), key(b, by), down));
  one("#main tbody").append(...rows);
  one("#said").textContent = `Sorted by ${button.textContent}, ${head.ariaSort}`;
}

for (const button of all("[data-sort]", table)) button.addEventListener("click", () => sortBy(button));

// ---- filters

const filters = one("#filters");

function filter() {
  const off = all("input:not(:checked)", filters).map((box) => [box.name, box.value]);
  for (const part of all("main [data-method], main [data-objective]")) {
    // As an attribute, since elements of SVG have no such property.
    part.toggleAttribute("hidden", off.some(([name, value]) => part.dataset[name] === value));
  }
  const shown = all("tbody tr:not([hidden])", table).length;
  one("#none").hidden = shown > 0;
  one("#said").textContent = `${shown} rows`;
}

filters.hidden = !filters.querySelector("input");
filters.addEventListener("change", filter);
filters.addEventListener("submit", (event) => event.preventDefault());

// ---- axes

function showAxis() {
  const chosen = one("[name=axis]:checked");
  if (!chosen) return;
  for (const charts of all(".charts[class*=axis-]")) charts.hidden = !charts.classList.contains(`axis-${chosen.value}`);
}

for (const radio of all("[name=axis]")) radio.addEventListener("change", showAxis);
showAxis();

// ---- details of a row

function open(row) {
  const number = row.dataset.row;
  const dialog = one(`#row-${number}`);
  const place = dialog.querySelector(".here");
  const strip = one(`#strip-${number} .strip`);
  if (strip && !place.children.length) {
    place.append(slider.cloneNode(true), strip.cloneNode(true));
    place.querySelector("input").removeAttribute("id");
    place.querySelector("input").value = one("#cut").value;
  }
  dialog.showModal();
  dialog.scrollTop = 0;
}

for (const row of all("tbody tr", table)) row.addEventListener("click", () => open(row));
for (const dialog of all("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}

// ---- before and after

const slider = one(".slider");
if (slider) slider.hidden = false;
document.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  document.documentElement.style.setProperty("--cut", `${event.target.value}%`);
  for (const other of all("[type=range]")) other.value = event.target.value;
});

// ---- points

const tip = one("#tip");

function tell(point) {
  for (const other of all(".point.on")) other.classList.remove("on");
  tip.hidden = !point;
  if (!point) return;
  point.classList.add("on");
  tip.textContent = point.getAttribute("aria-label");
  const place = point.getBoundingClientRect();
  const width = tip.offsetWidth;
  tip.style.left = `${Math.max(4, Math.min(innerWidth - width - 4, place.x + place.width / 2 - width / 2))}px`;
  tip.style.top = `${place.y > 50 ? place.y - tip.offsetHeight - 6 : place.bottom + 6}px`;
}

for (const point of all(".point")) {
  point.addEventListener("pointerenter", () => tell(point));
  point.addEventListener("pointerleave", () => tell(null));
  point.addEventListener("focus", () => tell(point));
  point.addEventListener("blur", () => tell(null));
}
for (const panel of all(".panel")) {
  panel.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const points = all("g:not([hidden]) .point", panel);
    const now = points.indexOf(document.activeElement);
    points[now < 0 ? 0 : (now + step + points.length) % points.length]?.focus();
  });
}
addEventListener("scroll", () => tell(one(".point.on")), { passive: true });
