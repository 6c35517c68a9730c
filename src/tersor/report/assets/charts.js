// Charts: the grid of layers, one layer's curve, shares of the predicted loss. Plotly draws; colours come from the page.

const METRICS = [
  { name: "Bits", title: "Bits per weight", about: "Everything stored for a layer, scales and tables included, over its weights.",
    value: (i) => view.layers[i].bits, log: false, text: (v) => v.toFixed(1) },
  { name: "Error", title: "Relative error", about: "Squared error of a layer's output on the calibration text, over the squared output.",
    value: (i) => data.layers[i].relative_error, log: true, text: (v) => short(v) },
  { name: "Loss", title: "Share of predicted loss, %", about: "What the plan expected a layer to add to the divergence, as a share of the whole.",
    value: (i) => percent(view.layers[i].share), log: false, text: (v) => v.toFixed(v < 9.95 ? 1 : 0) },
].filter((metric) => data.layers.some((_, i) => Number.isFinite(metric.value(i))));

const state = { layer: 0, metric: 0, columns: true };
const SERIES = 8;

function percent(share) {
  return share === null ? null : 100 * share;
}

/** Compact for a cell: .012 rather than 0.0120. */
function short(value) {
  if (value >= 0.1) return value.toFixed(2).replace(/^0/, "");
  if (value >= 0.001) return value.toFixed(3).replace(/^0/, "");
  return value.toExponential(0);
}

/** Plotly reads tags in texts; names are shown as they are. */
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** The page's colours as Plotly can read them: a hidden element resolves each variable for the theme in force. */
function colours() {
  const probe = document.body.appendChild(make("i", { hidden: true }));
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const names = ["surface", "sunken", "ink", "ink-2", "ink-3", "line", "line-2", "accent", "accent-mid", "bad"];
  const found = Object.fromEntries(names.map((name) => [name, read(name)]));
  found.heat = [0, 1, 2, 3].map((k) => [k / 3, read(`heat-${k}`)]);
  found.series = Array.from({ length: SERIES }, (_, k) => read(`s${k}`));
  probe.remove();
  return found;
}

function layout(colour, rest) {
  const family = getComputedStyle(document.body).fontFamily;
  const axis = { gridcolor: colour.line, linecolor: colour["line-2"], zeroline: false, fixedrange: true, tickfont: { color: colour["ink-3"] }, title: { font: { color: colour["ink-2"], size: 12 } }, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, showlegend: false,
    font: { family, size: 12, color: colour["ink-2"] },
    hoverlabel: { bgcolor: colour.surface, bordercolor: colour["line-2"], font: { family, color: colour.ink, size: 12 }, align: "left" },
    margin: { l: 8, r: 8, t: 8, b: 8 }, ...rest,
    xaxis: { ...axis, ...rest.xaxis, title: { ...axis.title, ...rest.xaxis?.title } },
    yaxis: { ...axis, ...rest.yaxis, title: { ...axis.title, ...rest.yaxis?.title } },
  };
}

function plot(id, traces, rest) {
  return Plotly.react(id, traces, rest, { displayModeBar: false, responsive: false, doubleClick: false });
}

function hoverText(i) {
  const facts = view.layers[i].facts.map(([name, value]) => `${plain(name)}: ${plain(value)}`);
  return `<b>${plain(data.layers[i].layer.name)}</b><br>${facts.join("<br>")}`;
}

/** Layer numbers by kind and block: cells[kind][block position], null where a block has no such layer. */
const cells = view.kinds.map(() => view.blocks.map(() => null));
view.layers.forEach((layer, i) => {
  if (layer.kind !== null) cells[layer.kind][view.blocks.indexOf(data.layers[i].layer.block)] = i;
});

function drawGrid() {
  const colour = colours();
  const metric = METRICS[state.metric];
  const box = byId("grid-box").clientWidth;
  state.columns = box > 560;
  const scaled = (i) => {
    const value = i === null ? NaN : Number(metric.value(i) ?? NaN);
    return metric.log ? (value > 0 ? Math.log10(value) : null) : Number.isFinite(value) ? value : null;
  };
  const turn = (rows) => (state.columns ? rows : view.blocks.map((_, b) => rows.map((row) => row[b])));
  const grid = turn(cells);
  const inside = cells.flat().filter((i) => i !== null).map(scaled).filter((v) => v !== null);
  const [low, high] = inside.length ? [Math.min(...inside), Math.max(...inside)] : [0, 1];
  const shade = (i) => mix(colour.heat, (scaled(i) - low) / (high > low ? high - low : 1));
  const room = state.columns ? (box - 130) / view.blocks.length : (box - 60) / view.kinds.length;
  const size = Math.max(12, room);
  const row = view.blocks.length > 48 ? 16 : 22;
  const texts = size >= (metric.log ? 29 : 23) && (state.columns || row > 20);
  const every = Math.max(1, Math.ceil(18 / (state.columns ? size : row)));
  const blockTicks = { tickvals: view.blocks.map((_, b) => b).filter((b) => b % every === 0), ticktext: view.blocks.filter((_, b) => b % every === 0).map((block) => `${block} `), tickangle: 0 };
  const kindTicks = { tickvals: view.kinds.map((_, k) => k), ticktext: view.labels.map((label) => `${plain(label)} `), tickangle: 0, tickfont: { color: colour["ink-2"], size: 12 } };
  const bare = { showgrid: false, ticks: "", showline: false };
  const across = { ...bare, range: [-0.5, grid[0].length - 0.5] };
  const down = { ...bare, range: [grid.length - 0.5, -0.5] };
  const xaxis = state.columns ? { ...across, ...blockTicks, title: { text: "block", standoff: 6 } } : { ...across, ...kindTicks, tickangle: -90, side: "top" };
  const yaxis = { ...down, ...(state.columns ? kindTicks : blockTicks) };
  drawLegend(metric, low, high);
  return plot("grid", [{
    type: "heatmap", z: grid.map((row) => row.map(scaled)), zmin: low, zmax: high > low ? high : low + 1, colorscale: colour.heat, showscale: false,
    xgap: size > 16 ? 2 : 1, ygap: 2, hoverongaps: false, customdata: grid,
    hovertext: grid.map((row) => row.map((i) => (i === null ? "" : hoverText(i)))), hovertemplate: "%{hovertext}<extra></extra>",
  }, ...(texts ? [numbers(grid, (i) => (scaled(i) === null ? null : metric.text(Number(metric.value(i)))), shade, size > 34 ? 11 : 10)] : [])], layout(colour, {
    xaxis, yaxis, shapes: outline(colour), margin: { l: 4, r: 4, t: 4, b: 4 },
    width: state.columns ? Math.max(box, 12 * view.blocks.length + 130) : box,
    height: state.columns ? 30 * view.kinds.length + 62 : row * view.blocks.length + 110,
  }));
}

/** The numbers in the cells, each black or white, whichever stands out more from its cell. */
function numbers(grid, text, shade, size) {
  const trace = { type: "scatter", mode: "text", x: [], y: [], text: [], textfont: { size, color: [] }, hoverinfo: "skip" };
  grid.forEach((row, y) => row.forEach((i, x) => {
    if (i === null || text(i) === null) return;
    trace.x.push(x);
    trace.y.push(y);
    trace.text.push(text(i));
    trace.textfont.color.push(luminance(shade(i)) > 0.179 ? "#000000" : "#ffffff");
  }));
  return trace;
}

/** The colour of a scale at a place from 0 to 1, as [red, green, blue]. */
function mix(scale, place) {
  const stops = scale.map(([at, text]) => [at, text.match(/[\d.]+/g).map(Number)]);
  const k = Math.max(1, stops.findIndex(([at]) => at >= Math.min(1, place)));
  const [[from, a], [to, b]] = [stops[k - 1], stops[k]];
  return a.map((value, c) => value + ((b[c] - value) * (place - from)) / (to - from));
}

/** Relative luminance as WCAG defines it. */
function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function outline(colour) {
  const kind = view.layers[state.layer].kind;
  if (kind === null) return [];
  const block = view.blocks.indexOf(data.layers[state.layer].layer.block);
  const [x, y] = state.columns ? [block, kind] : [kind, block];
  const frame = { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5 };
  return [{ ...frame, line: { color: colour.surface, width: 5 } }, { ...frame, line: { color: colour.ink, width: 2 } }];
}

function drawLegend(metric, low, high) {
  const show = (v) => (metric.log ? digits(10 ** v) : v.toFixed(2));
  byId("grid-legend").replaceChildren(show(low), make("i"), show(high));
  byId("grid-title").textContent = metric.title;
  byId("grid-about").textContent = metric.about;
}

function drawCurve() {
  const colour = colours();
  const i = state.layer;
  const curve = data.layers[i].curve;
  const has = curve.some((point) => Number.isFinite(point.distortion));
  byId("curve").hidden = !has;
  byId("no-curve").hidden = has;
  const others = siblings(i);
  byId("siblings-label").hidden = !has || !others.length;
  if (!has) return;
  // A log axis has no zero: points without loss stand on the bottom line, and say 0 when asked.
  const floor = 0.3 * Math.min(...[i, ...others].flatMap((k) => data.layers[k].curve).map((p) => p.distortion).filter((d) => d > 0));
  const height = (point) => (point.distortion > 0 ? point.distortion : Number.isFinite(floor) ? floor : 1e-9);
  const xy = (k, indices) => {
    const points = indices.map((n) => data.layers[k].curve[n]);
    return { x: points.map((p) => (8 * p.nbytes) / weights(k)), y: points.map(height) };
  };
  const valid = curve.map((_, n) => n).filter((n) => Number.isFinite(curve[n].distortion));
  const pointText = (n) => `<b>${plain(curve[n].choice)}</b><br>${((8 * curve[n].nbytes) / weights(i)).toFixed(2)} bits per weight<br>${plain(view.layers[i].sizes[n])} (${curve[n].nbytes.toLocaleString("en")} bytes)<br>expected loss ${digits(curve[n].distortion)} nats${n === view.layers[i].chosen ? "<br><b>chosen</b>" : ""}`;
  const hover = { hovertext: valid.map(pointText), hovertemplate: "%{hovertext}<extra></extra>" };
  const traces = [
    { name: "hull", ...xy(i, view.layers[i].hull), mode: "lines", line: { color: colour.accent, width: 1.5 }, hoverinfo: "skip" },
    { name: "points", ...xy(i, valid), mode: "markers", marker: { size: 8, color: colour.surface, line: { color: colour.accent, width: 1.5 } }, ...hover },
  ];
  if (byId("siblings").checked && others.length) {
    const line = { x: [], y: [] };
    for (const k of others) {
      const part = xy(k, view.layers[k].hull);
      line.x.push(...part.x, null);
      line.y.push(...part.y, null);
    }
    traces.unshift({ name: "siblings", ...line, mode: "lines", line: { color: colour["line-2"], width: 1 }, hoverinfo: "skip" });
  }
  const chosen = view.layers[i].chosen;
  if (chosen !== null && valid.includes(chosen)) {
    traces.push({ name: "chosen", ...xy(i, [chosen]), mode: "markers+text", marker: { size: 13, color: colour.accent }, text: [plain(curve[chosen].choice)], textposition: curve[chosen].nbytes > 0.5 * Math.max(...curve.map((p) => p.nbytes)) ? "top left" : "top right", textfont: { color: colour.ink, size: 12 }, hovertext: [pointText(chosen)], hovertemplate: hover.hovertemplate });
  }
  return plot("curve", traces, layout(colour, {
    height: 340, width: byId("curve").parentElement.clientWidth, hovermode: "closest", margin: { l: 8, r: 16, t: 16, b: 8 },
    xaxis: { type: "log", tickvals: [0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32], title: { text: "bits per weight, everything stored" } },
    yaxis: { type: "log", title: { text: "expected loss, nats per token" }, exponentformat: "power", dtick: 1, tickfont: { size: 10, color: colour["ink-3"] } },
  }));
}

function siblings(i) {
  const kind = view.layers[i].kind;
  if (kind === null) return [];
  return cells[kind].filter((k) => k !== null && k !== i && data.layers[k].curve.length);
}

function weights(i) {
  const { copies, shape } = data.layers[i].layer;
  return copies * shape[0] * shape[1];
}

function drawShares() {
  if (!byId("shares")) return;
  const colour = colours();
  const outside = view.layers.map((_, i) => i).filter((i) => view.layers[i].kind === null);
  const name = (i) => data.layers[i].layer.name.split(".").pop();
  const first = data.layers.findIndex((layer) => layer.layer.block !== null);
  const x = [...outside.filter((i) => i < first).map(name), ...view.blocks.map(String), ...outside.filter((i) => i >= first).map(name)];
  const series = new Map();
  view.layers.forEach((layer, i) => {
    if (layer.share === null) return;
    const number = layer.kind === null ? SERIES - 1 : view.colours[layer.kind];
    const shared = view.colours.filter((other) => other === number).length > 1;
    const title = layer.kind === null ? "outside the blocks" : shared ? "others" : view.labels[layer.kind];
    if (!series.has(title)) series.set(title, { x: [], y: [], text: [], number });
    const trace = series.get(title);
    trace.x.push(layer.kind === null ? name(i) : String(data.layers[i].layer.block));
    trace.y.push(100 * layer.share);
    trace.text.push(hoverText(i));
  });
  const traces = [...series].map(([title, { x: at, y, text, number }]) => ({
    type: "bar", name: plain(title), x: at, y, hovertext: text, hovertemplate: "%{hovertext}<extra></extra>", textposition: "none",
    marker: { color: colour.series[number], line: { color: colour.surface, width: 1 } },
  }));
  byId("shares-legend").replaceChildren(...[...series].map(([title, { number }]) => make("span", {}, make("i", { className: `swatch s${number}` }), title)));
  const panel = byId("shares").parentElement;
  const width = panel.clientWidth - 2 * parseFloat(getComputedStyle(panel).paddingLeft);
  const every = Math.ceil(x.length / Math.max(1, width / 30));
  const ticks = view.blocks.filter((_, b) => b % every === 0).map(String);
  return plot("shares", traces, layout(colour, {
    height: 290, width, barmode: "stack", bargap: 0.12,
    xaxis: { type: "category", categoryorder: "array", categoryarray: x, tickvals: ticks, tickangle: 0, title: { text: "block", standoff: 8 }, showgrid: false },
    yaxis: { title: { text: "share of predicted loss, %" } },
  }));
}

function select(i) {
  state.layer = i;
  byId("layer").value = String(i);
  byId("previous").disabled = i === 0;
  byId("next").disabled = i === data.layers.length - 1;
  byId("curve-title").textContent = data.layers[i].layer.name;
  byId("facts").replaceChildren(...view.layers[i].facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  if (!window.Plotly) return;
  drawCurve();
  if (METRICS.length && cells.length) Plotly.relayout("grid", { shapes: outline(colours()) });
}

/** Arrow keys walk over the grid, skipping places that no layer holds. */
function walk(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [dx, dy] = step;
  const [across, down] = state.columns ? [dx, dy] : [dy, dx];
  const kind = view.layers[state.layer].kind;
  let [k, b] = kind === null ? [0, 0] : [kind + down, view.blocks.indexOf(data.layers[state.layer].layer.block) + across];
  while (cells[k]?.[b] === null) [k, b] = [k + down, b + across];
  if (cells[k]?.[b] !== undefined) select(cells[k][b]);
}

function startControls() {
  const places = new Map();
  data.layers.forEach(({ layer }, i) => {
    const title = layer.block === null ? "Outside the blocks" : `Block ${layer.block}`;
    if (!places.has(title)) places.set(title, make("optgroup", { label: title }));
    places.get(title).append(make("option", { value: String(i) }, layer.name));
  });
  byId("layer").append(...places.values());
  byId("layer").addEventListener("change", (event) => select(Number(event.target.value)));
  byId("previous").addEventListener("click", () => select(state.layer - 1));
  byId("next").addEventListener("click", () => select(state.layer + 1));
  byId("siblings").addEventListener("change", drawCurve);
  byId("grid").addEventListener("keydown", walk);
  const buttons = METRICS.map((metric, m) => make("button", { type: "button", "aria-pressed": String(m === 0), onclick: () => {
    state.metric = m;
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === m)));
    drawGrid();
  } }, metric.name));
  byId("metrics").append(...buttons);
  const outside = view.layers.map((_, i) => i).filter((i) => view.layers[i].kind === null);
  byId("outside").append(...outside.map((i) => make("button", { type: "button", onclick: () => select(i) },
    `${data.layers[i].layer.name} · ${data.layers[i].codec} · ${view.layers[i].bits.toFixed(2)} bits`)));
}

async function drawAll() {
  if (!window.Plotly) return;
  status("waiting");
  await Promise.all([METRICS.length && cells.length && drawGrid(), drawCurve(), drawShares()]);
  status("drawn");
}

/** Paper is light and narrow, whatever the screen. */
function print(begins) {
  const root = document.documentElement;
  root.classList.toggle("printing", begins);
  if (begins) {
    print.theme = root.dataset.theme;
    root.dataset.theme = "light";
  } else if (print.theme) root.dataset.theme = print.theme;
  else delete root.dataset.theme;
  drawAll();
}

/** The chart library travels compressed; this unpacks it and runs it as a script of the page. */
async function unpack() {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", { textContent: await new Response(stream).text() }));
}

/** How the charts are, for whoever drives the page. */
function status(word) {
  document.documentElement.dataset.charts = word;
}

async function startCharts() {
  if (!data.layers.length) {
    status("none");
    return;
  }
  startControls();
  select(Math.max(0, data.layers.findIndex((layer) => layer.layer.block !== null)));
  try {
    await unpack();
  } catch {
    byId("chart-failure").hidden = false;
    status("failed");
    return;
  }
  listeners.push(drawAll);
  await drawAll();
  byId("grid").on?.("plotly_click", ({ points }) => { if (points[0].customdata !== null) select(points[0].customdata); });
  let waiting;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // Phones resize when their address bar hides.
    width = innerWidth;
    status("waiting");
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
}

startCharts();
