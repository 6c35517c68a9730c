// Draws the front. The page's tables hold the same numbers.

const { points, front } = JSON.parse(document.getElementById("survey").textContent);
const target = document.getElementById("front");

/** The page's colours as Plotly can read them. */
function colour(name) {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** Plotly reads tags in texts; names are shown as they are. */
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];

function traces() {
  const names = [...new Set(points.map((point) => point.recipe))];
  const line = {
    x: front.map((point) => point.bytes / 1e6), y: front.map((point) => point.kl), mode: "lines", name: "front",
    line: { color: colour("ink-3"), width: 1, dash: "dot" }, hoverinfo: "skip",
  };
  return [line, ...names.map((name, k) => {
    const own = points.filter((point) => point.recipe === name);
    const shade = colour(`s${k % 8}`);
    return {
      name: plain(name), mode: "markers", x: own.map((point) => point.bytes / 1e6), y: own.map((point) => point.kl),
      error_y: { type: "data", array: own.map((point) => 2 * point.error), color: shade, thickness: 1, width: 3 },
      marker: { color: shade, size: 9, symbol: symbols[Math.floor(k / 8 + k) % symbols.length] },
      text: own.map((point) => `${plain(name)}, ${point.bits.toFixed(3)} bits per weight<br>KL ${point.kl.toPrecision(3)} ± ${point.error.toPrecision(2)}<br>${Math.round(point.seconds)} s`),
      hoverinfo: "text",
    };
  })];
}

function draw() {
  const axis = { gridcolor: colour("line"), linecolor: colour("line-2"), zeroline: false, automargin: true };
  const family = getComputedStyle(document.body).fontFamily;
  Plotly.react(target, traces(), {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 8, b: 8 },
    font: { family, size: 12, color: colour("ink-2") }, hovermode: "closest",
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line-2"), font: { family, color: colour("ink") }, align: "left" },
    xaxis: { ...axis, title: { text: "bytes of the encoded layers, MB" } },
    yaxis: { ...axis, type: "log", title: { text: "KL, nats per token" } },
  }, { displayModeBar: false, responsive: true });
}

async function start() {
  if (!points.length) return;
  try {
    await unpack();
    draw();
  } catch {
    document.getElementById("chart-failure").hidden = false;
    return;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

start();
