// Measurements of the page, for the browser tests.

function channels(text) {
  const found = text.match(/[\d.]+/g).map(Number);
  return [found[0], found[1], found[2], found[3] ?? 1];
}

/** A colour laid over an opaque one. */
function over(top, under) {
  return [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
}

/** Relative luminance as WCAG defines it. */
function luminance(rgb) {
  const parts = [0, 1, 2].map((i) => rgb[i] / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}

function ratio(one, two) {
  const [light, dark] = [luminance(one), luminance(two)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}

function backdrop(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(channels(getComputedStyle(e).backgroundColor));
  return layers.reduceRight((under, top) => over(top, under), [255, 255, 255, 1]);
}

/** How many texts are visible, and those with too little contrast. Numbers in cells of the grid are not among them. */
function faintTexts() {
  const skipped = "script, noscript, .hidden, .skip, [hidden], :disabled, .scatterlayer, .hoverlayer";
  const faint = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    if (!walker.currentNode.data.trim() || !box.width || !box.height || element.closest(skipped)) continue;
    const style = getComputedStyle(element);
    const under = backdrop(element);
    const found = ratio(over(channels(element.closest("svg") ? style.fill : style.color), under), under);
    seen += 1;
    if (found < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) faint.push([walker.currentNode.data.trim(), found, style.color]);
  }
  return [seen, faint];
}

/** Contrast of each number in the grid with its cell, read from the pixels of the heatmap. */
async function cellContrasts() {
  const heatmap = document.querySelector("#grid .heatmaplayer image");
  const box = heatmap.getBoundingClientRect();
  const image = new Image();
  image.src = heatmap.href.baseVal;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: box.width, height: box.height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, box.width, box.height);
  return [...document.querySelectorAll("#grid .textpoint text")].map((text) => {
    const place = text.getBoundingClientRect();
    const cell = pen.getImageData(place.x + place.width / 2 - box.x, place.y - box.y, 1, 1).data;
    return ratio(channels(getComputedStyle(text).fill), cell);
  });
}

/** Elements that stick out of the page to the right, other than inside boxes that scroll by themselves. */
function tooWide() {
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("main *, header *, footer *")]
    .filter((e) => !e.closest(".scroll, .bar nav, .hidden, .skip"))
    .map((e) => [e.tagName, e.className.baseVal ?? e.className, e.getBoundingClientRect()])
    .filter(([, , box]) => box.width && box.right > width + 1)
    .map(([tag, name, box]) => `${tag}.${name} ${Math.round(box.right)}`);
}

/** Where the chosen point of the curve is, as shares of the plot's width and height. */
function chosenPlace() {
  const plot = document.querySelector("#curve .nsewdrag").getBoundingClientRect();
  const box = [...document.querySelectorAll("#curve .points .point")].pop().getBoundingClientRect();
  return [(box.x + box.width / 2 - plot.x) / plot.width, (box.y + box.height / 2 - plot.y) / plot.height];
}

/** Colours of the page and of a chart. */
function look() {
  const tick = document.querySelector("#curve .xtick text");
  return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("h1")).color, getComputedStyle(tick).fill];
}

/** What can scroll or be pressed, but not be reached with the keyboard. */
function unreachable() {
  const scrolling = (e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1;
  return [...document.querySelectorAll("button, a, select, input, summary, .scroll")]
    .filter((e) => e.tabIndex < 0 && (!e.matches(".scroll") || scrolling(e)) && !e.querySelector("[tabindex='0']"))
    .map((e) => e.outerHTML.slice(0, 80));
}
