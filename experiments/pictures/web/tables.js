/* Tables that sort and can be searched, and their numbers for other programs. */
"use strict";

/** A table whose columns sort it, with a choice of rows by one of them, and a search. */
function drawTable(table) {
  const { columns, rows, choose } = table;
  const value = (cell) => (Array.isArray(cell) ? cell[0] : cell);
  const text = (cell) => (Array.isArray(cell) ? cell[1] : (cell ?? ""));
  const numeric = columns.map((_, column) => rows.some((row) => typeof value(row[column]) === "number"));
  const kinds = choose === null ? [] : [...new Set(rows.map((row) => text(row[choose])))];
  const state = { column: null, down: false, kind: kinds[0], search: "" };
  const body = make("tbody");
  const count = make("span", { "aria-live": "polite" });
  const heads = columns.map((column, n) => {
    const sort = make("button", { type: "button", title: column.about || null, click: () => sortBy(n) }, column.name);
    return make("th", { scope: "col", class: numeric[n] ? "number" : null, "aria-sort": "none" }, sort);
  });
  function sortBy(column) {
    state.down = state.column === column ? !state.down : false;
    state.column = column;
    heads.forEach((head, n) =>
      head.setAttribute("aria-sort", n === column ? (state.down ? "descending" : "ascending") : "none"),
    );
    fill();
  }
  function compared(one, other) {
    const [a, b] = [value(one[state.column]), value(other[state.column])];
    const [none, nothing] = [a === null || a === "", b === null || b === ""];
    if (none || nothing) return none - nothing; // empty cells last, whichever way
    const order =
      typeof a === "number" && typeof b === "number"
        ? a - b
        : String(a).localeCompare(String(b), undefined, { numeric: true });
    return state.down ? -order : order;
  }
  function fill() {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => {
      if (choose !== null && state.kind !== ALL && text(row[choose]) !== state.kind) return false;
      const all = row.map(text).join(" ").toLowerCase();
      return words.every((word) => all.includes(word));
    });
    if (state.column !== null) found.sort(compared);
    const cells = (row) =>
      row.map((cell, n) =>
        make(
          n ? "td" : "th",
          { scope: n ? null : "row", class: numeric[n] ? "number" : String(text(cell)).length > 60 ? "long" : null },
          String(text(cell)),
        ),
      );
    body.replaceChildren(...found.map((row) => make("tr", {}, ...cells(row))));
    count.textContent = `${found.length} of ${rows.length} rows`;
  }
  const tools = make("div", { class: "controls" });
  if (kinds.length > 1)
    tools.append(
      choice(columns[choose].name, [...kinds.map((kind) => [kind, kind]), [ALL, "all"]], kinds[0], (kind) => {
        state.kind = kind;
        fill();
      }),
    );
  const search = make("input", {
    type: "search",
    input: () => {
      state.search = search.value;
      fill();
    },
  });
  tools.append(
    make("label", {}, make("span", {}, "Rows with"), search),
    download("table as CSV", `${table.title}.csv`, "text/csv", () => csv(table)),
    count,
  );
  fill();
  const caption = make("caption", { class: "unseen" }, table.title);
  const grid = make("table", {}, caption, make("thead", {}, make("tr", {}, ...heads)), body);
  const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": table.title }, grid);
  return make(
    "section",
    {},
    make("h2", {}, table.title),
    ...(table.about ? [make("p", { class: "about" }, table.about)] : []),
    ...(rows.length > 6 ? [tools] : []),
    scroll,
  );
}

/** A table for other programs: values, not the words for them. */
function csv({ columns, rows }) {
  const field = (cell) => {
    const text = String((Array.isArray(cell) ? cell[0] : cell) ?? "");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns.map((column) => column.name), ...rows].map((row) => row.map(field).join(",")).join("\r\n");
}
