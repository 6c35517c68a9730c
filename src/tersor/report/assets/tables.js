// The two long tables: searched, filtered and sorted here, a page of rows at a time.

const PAGE = 100;

/**
 * columns: {title, value(row), cell?(row), numeric?, wrap?}; value sorts and, with the others, is searched.
 * groups: {title, test(row)} shown as buttons.
 */
function startTable(id, columns, rows, groups = []) {
  const table = byId(id);
  if (!table) return;
  const state = { words: [], group: null, sort: null, down: false, limit: PAGE };
  const texts = rows.map((row) => columns.map((column) => column.value(row) ?? "").join(" ").toLowerCase());
  const body = make("tbody");
  const headers = columns.map((column, i) => {
    const button = make("button", { type: "button", onclick: () => sortBy(i) }, column.title);
    return make("th", { scope: "col", className: column.numeric ? "n" : "" }, button);
  });
  table.append(make("thead", {}, make("tr", {}, ...headers)), body);
  addTools();
  draw();

  function sortBy(i) {
    state.down = state.sort === i ? !state.down : Boolean(columns[i].numeric);
    state.sort = i;
    headers.forEach((header, k) => header.removeAttribute("aria-sort"));
    headers[i].setAttribute("aria-sort", state.down ? "descending" : "ascending");
    draw();
  }

  function addTools() {
    const search = make("input", { type: "search", placeholder: "Search", "aria-label": `Search: ${table.caption.textContent}` });
    search.addEventListener("input", () => {
      state.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      state.limit = PAGE;
      draw();
    });
    const buttons = groups.map((group) => {
      const count = rows.filter(group.test).length;
      const button = make("button", { type: "button", "aria-pressed": "false" }, `${group.title} ${count.toLocaleString("en")}`);
      button.addEventListener("click", () => {
        state.group = state.group === group ? null : group;
        state.limit = PAGE;
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button && state.group === group)));
        draw();
      });
      return button;
    });
    byId(`${id}-tools`).append(search, make("div", { className: "chips" }, ...buttons));
  }

  function chosen() {
    const kept = rows.map((_, i) => i).filter((i) =>
      (!state.group || state.group.test(rows[i])) && state.words.every((word) => texts[i].includes(word)));
    if (state.sort === null) return kept;
    const value = columns[state.sort].value;
    const [present, missing] = [kept.filter((i) => !isMissing(value(rows[i]))), kept.filter((i) => isMissing(value(rows[i])))];
    present.sort((a, b) => (state.down ? -1 : 1) * compare(value(rows[a]), value(rows[b])) || a - b);
    return present.concat(missing);
  }

  function draw() {
    const found = chosen();
    const shown = found.slice(0, state.limit);
    body.replaceChildren(...shown.map((i) => make("tr", {}, ...columns.map((column) => {
      const content = (column.cell ?? column.value)(rows[i]) ?? "–";
      return make("td", { className: column.numeric ? "n" : column.wrap ? "wrap" : "" }, content);
    }))));
    const more = byId(`${id}-more`);
    const count = found.length === rows.length ? "" : ` that match, of ${rows.length.toLocaleString("en")}`;
    more.replaceChildren(make("span", { role: "status" }, `${shown.length.toLocaleString("en")} of ${found.length.toLocaleString("en")} rows${count}`));
    if (shown.length < found.length) {
      more.append(make("button", { type: "button", className: "quiet", onclick: () => { state.limit = Infinity; draw(); } }, "Show all"));
    }
  }
}

function isMissing(value) {
  return value === null || value === undefined;
}

const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

const layerOf = new Map(data.layers.map((layer, i) => [layer.layer.parameter, i]));

startTable("tensor-table", [
  { title: "Tensor", value: (t) => t.name, cell: (t) => make("code", {}, t.name) },
  { title: "Fate", value: (t) => t.fate },
  { title: "Type", value: (t) => t.dtype },
  { title: "Shape", value: (t) => t.shape.join(" × ") || "scalar" },
  { title: "Codec", value: (t) => (t.fate === "encoded" && layerOf.has(t.target) ? data.layers[layerOf.get(t.target)].codec : null) },
  { title: "Reason", value: (t) => t.reason || null, wrap: true },
], data.tensors, ["encoded", "kept", "tied", "dropped"]
  .filter((fate) => data.tensors.some((t) => t.fate === fate))
  .map((fate) => ({ title: fate, test: (t) => t.fate === fate })));

startTable("layer-table", [
  { title: "Layer", value: (i) => data.layers[i].layer.name,
    cell: (i) => make("button", { type: "button", className: "link", onclick: () => { select(i); byId("curve-panel").scrollIntoView(); } },
      make("code", {}, data.layers[i].layer.name)) },
  { title: "Codec", value: (i) => data.layers[i].codec },
  { title: "Bits per weight", numeric: true, value: (i) => view.layers[i].bits, cell: (i) => view.layers[i].bits.toFixed(2) },
  { title: "Bytes", numeric: true, value: (i) => data.layers[i].nbytes, cell: (i) => data.layers[i].nbytes.toLocaleString("en") },
  { title: "Relative error", numeric: true, value: (i) => data.layers[i].relative_error, cell: (i) => optional(data.layers[i].relative_error) },
  { title: "Predicted loss", numeric: true, value: (i) => data.layers[i].predicted, cell: (i) => optional(data.layers[i].predicted) },
  { title: "Share", numeric: true, value: (i) => view.layers[i].share,
    cell: (i) => (view.layers[i].share === null ? null : `${(100 * view.layers[i].share).toFixed(2)}%`) },
], data.layers.map((_, i) => i));

function optional(value) {
  return value === null ? null : digits(value);
}
