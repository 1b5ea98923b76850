"use strict";
// Sorting and filtering of the table of names; without it the page shows them all, by name.
(() => {
  const table = document.getElementById("names");
  const body = table.tBodies[0];
  const rows = [...body.rows];

  const compare = (key, a, b) => {
    const [x, y] = [a.dataset[key], b.dataset[key]];
    const order = isNaN(x) ? x.localeCompare(y) : x - y;
    return order || a.dataset.name.localeCompare(b.dataset.name);
  };

  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => (down ? -1 : 1) * compare(button.dataset.key, a, b));
      body.append(...rows);
    });
  }

  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = `${row.dataset.name} ${row.dataset.family} ${row.dataset.verdict ?? ""}`;
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length} names`;
  };
  filter.addEventListener("input", show);
  document.querySelector(".tools").hidden = false;
  show();
})();
