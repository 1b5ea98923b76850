"use strict";
// The table of all names: words that rows must have, and columns that sort. Without it all is shown.
(() => {
  const place = document.querySelector(".names-table");
  const table = place?.querySelector("table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const text = (row, column) => row.cells[column].textContent.trim();

  const compare = (column, a, b) => {
    const [x, y] = [text(a, column), text(b, column)];
    const [p, q] = [parseFloat(x), parseFloat(y)];
    const order = isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
    return order || text(a, 0).localeCompare(text(b, 0));
  };

  for (const head of table.tHead.rows[0].cells) {
    const column = head.cellIndex;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => (down ? -1 : 1) * compare(column, a, b));
      body.append(...rows);
    });
  }

  const label = document.createElement("label");
  const filter = document.createElement("input");
  const shown = document.createElement("output");
  filter.type = "search";
  filter.placeholder = "paged 8 torchao";
  label.append("Rows with all of these words: ", filter);
  // A word is looked for in cells; what is a whole word of a row ("8") must be one there.
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const cells = [...row.cells].map((cell) => cell.textContent.trim().toLowerCase());
      const paged = cells[4] === "yes" ? "paged" : "unpaged";
      const has = (word) => (/^\d+$/.test(word) ? cells[2] === word
        : word === "paged" || word === "unpaged" ? paged === word
        : cells.some((cell) => cell.includes(word)));
      row.hidden = !words.every(has);
      count += !row.hidden;
    }
    shown.textContent = ` ${count} of ${rows.length} names`;
  };
  filter.addEventListener("input", show);
  const tools = document.createElement("p");
  tools.append(label, shown);
  place.prepend(tools);
  show();
})();
