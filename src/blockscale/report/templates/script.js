"use strict";
(() => {
  // A table of many bodies has one for each entry: its row, and a row that unfolds.
  const entries = (table) => (table.tBodies.length > 1 ? [...table.tBodies] : [...table.tBodies[0].rows]);
  const value = (entry, index) => {
    const cell = (entry.rows ? entry.rows[0] : entry).cells[index];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    const number = text === "" ? NaN : Number(text === "inf" ? Infinity : text);
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) {
      return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
    }
    return typeof a === "number" ? -1 : 1;
  };
  // Which entries are seen: those that the filter keeps, the first few of them until all are asked for.
  const filters = new Map();
  const show = (table) => {
    const words = filters.get(table) ?? [];
    const limit = Number(table.dataset.limit ?? Infinity);
    let found = 0;
    for (const entry of entries(table)) {
      const text = words.length ? entry.textContent.toLowerCase() : "";
      const matches = words.every((word) => text.includes(word));
      found += matches;
      entry.hidden = !matches || found > limit;
    }
    let button = table.nextElementSibling;
    if (!button?.classList.contains("all")) {
      button = document.createElement("button");
      button.className = "all";
      button.addEventListener("click", () => {
        delete table.dataset.limit;
        show(table);
      });
      table.after(button);
    }
    button.hidden = found <= limit;
    button.textContent = `Show all ${found.toLocaleString("en")}`;
  };
  const sort = (table, index, direction) => {
    const keyed = entries(table).map((entry) => [value(entry, index), entry]);
    const parent = keyed.length ? keyed[0][1].parentNode : table;
    keyed.sort(([a], [b]) => (direction === "descending" ? compare(b, a) : compare(a, b)));
    parent.append(...keyed.map(([, entry]) => entry));
    show(table);
    [...table.tHead.rows[0].cells].forEach((head, at) => {
      head.setAttribute("aria-sort", at === index ? direction : "none");
    });
    const select = document.querySelector(`select[data-sort-for="${table.id}"]`);
    if (select) select.value = `${index} ${direction}`;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      head.querySelector("button")?.addEventListener("click", () => {
        // Numbers are first wanted largest first, words from A.
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        sort(table, index, head.getAttribute("aria-sort") === first ? other : first);
      });
    });
    const select = document.querySelector(`select[data-sort-for="${table.id}"]`);
    if (select) {
      select.append(new Option("as given", ""));
      [...table.tHead.rows[0].cells].forEach((head, index) => {
        const label = head.textContent.trim();
        select.append(new Option(`${label} ↑`, `${index} ascending`));
        select.append(new Option(`${label} ↓`, `${index} descending`));
      });
      select.addEventListener("change", () => {
        const [index, direction] = select.value.split(" ");
        if (direction) sort(table, Number(index), direction);
      });
    }
  }
  for (const table of document.querySelectorAll("table[data-limit]")) show(table);
  for (const input of document.querySelectorAll("input[data-filter]")) {
    const table = document.getElementById(input.dataset.filter);
    input.addEventListener("input", () => {
      filters.set(table, input.value.toLowerCase().split(/\s+/).filter(Boolean));
      show(table);
    });
  }
  document.documentElement.classList.add("js");
})();
