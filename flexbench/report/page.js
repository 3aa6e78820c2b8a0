"use strict";
// Filters and sorting; the page is whole without them. The state is in the address, so that a link
// shows what its sender saw: index.html#suite=lra&model=hzip&sort=lra-quick:rows:2:descending
(() => {
  const form = document.querySelector("form");
  const count = form.querySelector("output");
  const names = ["suite", "preset", "model", "variants"];
  const sorted = new Map();

  function sort(table, column, direction) {
    const sign = direction === "descending" ? -1 : 1;
    const body = table.tBodies[0];
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const number = (text) => (text === "" || text === "–" ? NaN : Number(text));
    const rows = [...body.rows].map((row) => [row, key(row)]);
    const numeric = rows.every(([, text]) => text === "" || text === "–" || !isNaN(Number(text)));
    rows.sort(([, a], [, b]) => {
      if (!numeric) return sign * a.localeCompare(b, "en", { numeric: true });
      const [x, y] = [number(a), number(b)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what has no value comes last
      return sign * (x - y);
    });
    body.append(...rows.map(([row]) => row));
    for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
    sorted.set(table.id, `${column}:${direction}`);
  }

  function filter() {
    const chosen = Object.fromEntries(names.map((name) => [name, form.elements[name].value]));
    let shown = 0;
    for (const section of document.querySelectorAll("section[data-suites]")) {
      const there =
        (!chosen.suite || section.dataset.suites.split(" ").includes(chosen.suite)) &&
        (!chosen.preset || section.dataset.preset === chosen.preset);
      let rows = 0;
      for (const row of section.querySelectorAll("tr[data-model]")) {
        row.hidden =
          (chosen.model && row.dataset.model !== chosen.model) ||
          (chosen.variants === "own" && row.dataset.variant === "1") ||
          (chosen.suite && row.dataset.suite !== chosen.suite);
        rows += row.hidden ? 0 : 1;
      }
      section.hidden = !there || !rows;
      shown += section.hidden ? 0 : rows;
      for (const mark of section.querySelectorAll("g[data-model]"))
        mark.style.opacity = chosen.model && mark.dataset.model !== chosen.model ? 0.12 : "";
    }
    for (const link of document.querySelectorAll("nav li"))
      link.hidden = document.querySelector(link.firstElementChild.getAttribute("href"))?.hidden;
    count.textContent = `${shown} rows shown`;
    return chosen;
  }

  function write(chosen) {
    const state = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value));
    for (const [table, how] of sorted) state.append("sort", `${table}:${how}`);
    history.replaceState(null, "", `#${state}`);
  }

  function read() {
    const state = new URLSearchParams(location.hash.slice(1));
    if (!names.concat("sort").some((name) => state.has(name))) return;
    for (const name of names) {
      const options = [...form.elements[name].options].map((option) => option.value);
      form.elements[name].value = options.includes(state.get(name)) ? state.get(name) : "";
    }
    for (const each of state.getAll("sort")) {
      const [, id, column, direction] = each.match(/^(.*):(\d+):(\w+)$/) ?? [];
      const table = document.getElementById(id ?? "");
      if (table?.tHead?.rows[0].cells[column]) sort(table, Number(column), direction);
    }
  }

  for (const table of document.querySelectorAll("table.sortable"))
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending" || head.classList.contains("text");
        const again = head.getAttribute("aria-sort") === "ascending";
        sort(table, column, up && !again ? "ascending" : "descending");
        write(filter());
      });
    });
  form.hidden = false;
  form.addEventListener("change", () => write(filter()));
  form.addEventListener("reset", () => setTimeout(() => write(filter())));
  addEventListener("hashchange", () => (read(), filter()));
  read();
  filter();
})();
