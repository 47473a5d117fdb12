"use strict";
// Sorts and filters tables, and shows what points of figures are. The page is complete without it.
document.documentElement.classList.add("js");

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row, place) => {
        const cell = row.cells[column];
        const value = cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
        return { row, place, value };
      });
      rows.sort((a, b) => {
        const order = typeof a.value === "number" && typeof b.value === "number"
          ? a.value - b.value
          : String(a.value).localeCompare(String(b.value));
        return (up ? order : -order) || a.place - b.place;
      });
      body.append(...rows.map((one) => one.row));
    });
  });
}

for (const input of document.querySelectorAll(".filter input")) {
  const table = document.getElementById(input.dataset.table);
  const count = document.getElementById(input.dataset.count);
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !wanted.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  });
}

const tip = document.getElementById("tip");
let marked = null;
function place(x, y) {
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 16 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 16}px`;
}
function show(point, x, y) {
  if (marked) marked.classList.remove("on");
  marked = point;
  tip.hidden = point === null;
  if (point === null) return;
  point.classList.add("on");
  tip.textContent = point.dataset.tip;
  place(x, y);
}
document.addEventListener("pointermove", (event) => {
  const point = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  if (point !== null || marked !== null) show(point, event.clientX, event.clientY);
});

// a figure with points takes the focus; arrow keys go from point to point, Escape ends it
for (const figure of document.querySelectorAll("figure.points")) {
  const points = [...figure.querySelectorAll("[data-tip]")].sort(
    (a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left);
  let at = -1;
  figure.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { show(null); return; }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined || points.length === 0) return;
    event.preventDefault();
    at = (at + step + points.length) % points.length;
    const box = points[at].getBoundingClientRect();
    show(points[at], box.right, box.bottom);
  });
  figure.addEventListener("blur", () => show(null));
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
