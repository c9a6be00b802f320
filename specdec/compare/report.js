"use strict";
// Tables are sorted by a click on a title, methods shown and hidden by their checkboxes. All is
// there without this.

function sorted(table, column, down) {
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row, place) => {
    const cell = row.cells[column];
    const number = cell.dataset.key === undefined ? NaN : Number(cell.dataset.key);
    return { row, place, number, text: cell.textContent.trim() };
  });
  const unknown = (one) => Number.isNaN(one.number) && one.text === "";
  keyed.sort((a, b) => {
    if (unknown(a) !== unknown(b)) return unknown(a) ? 1 : -1; // last either way
    const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
    const order = numbers
      ? a.number - b.number
      : a.text.localeCompare(b.text, "en", { numeric: true });
    return (down ? -order : order) || a.place - b.place;
  });
  body.append(...keyed.map((one) => one.row));
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const title = head.querySelector(".head");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.replaceWith(button);
    button.addEventListener("click", () => {
      const numbers = table.tBodies[0].querySelector(`td:nth-child(${column + 1})[data-key]`);
      const before = head.getAttribute("aria-sort");
      const down = before === null ? numbers !== null : before === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sorted(table, column, down);
    });
  });
}

function show(group, method, visible) {
  for (const artist of group.querySelectorAll(`.method-${method}`)) {
    artist.style.display = visible ? "" : "none";
  }
  for (const box of group.querySelectorAll(`input[data-method="${method}"]`)) {
    box.checked = visible;
    box.parentElement.classList.toggle("off", !visible);
  }
}

document.documentElement.classList.add("live");
document.querySelectorAll("table").forEach(makeSortable);
document.addEventListener("change", (event) => {
  const method = event.target.dataset.method;
  if (method !== undefined) show(event.target.closest("article"), method, event.target.checked);
});
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((one) => (one.open = true));
});
