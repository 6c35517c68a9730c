// Shared by all parts of the page: the data, small helpers, theme, copying and saving.

const report = JSON.parse(document.getElementById("report").textContent);
const { data, view } = report;
const byId = (id) => document.getElementById(id);

/** An element with properties and children; text never becomes markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Three significant digits, like the rest of the report. */
function digits(value) {
  const number = Number(value);
  if (!Number.isFinite(number)) return String(value);
  if (number === 0) return "0";
  if (Math.abs(number) < 1e-4 || Math.abs(number) >= 1e6) return number.toExponential(1);
  return Math.abs(number) >= 1000 ? Math.round(number).toLocaleString("en") : String(Number(number.toPrecision(3)));
}

const themes = ["system", "light", "dark"];
const listeners = [];
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function remembered() {
  try {
    return localStorage.getItem("tersor-theme");
  } catch {
    return null; // Storage is blocked: the choice lasts as long as the page.
  }
}

function setTheme(theme) {
  const root = document.documentElement;
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  byId("theme").lastElementChild.textContent = theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}. Change`);
  listeners.forEach((listener) => listener());
}

function startTheme() {
  const button = byId("theme");
  let theme = themes.includes(remembered()) ? remembered() : "system";
  button.hidden = false;
  setTheme(theme);
  button.addEventListener("click", () => {
    // From "system", the first step is to the theme that differs from what is shown.
    const order = prefersDark.matches ? ["system", "light", "dark"] : ["system", "dark", "light"];
    theme = order[(order.indexOf(theme) + 1) % 3];
    try {
      localStorage.setItem("tersor-theme", theme);
    } catch {
      // As above.
    }
    setTheme(theme);
  });
  prefersDark.addEventListener("change", () => setTheme(theme));
}

async function copy(button) {
  const source = byId(button.dataset.copy);
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    // The browser forbids writing: select the text so that the reader's own shortcut copies it.
    for (let box = source.closest("details"); box; box = null) box.open = true;
    getSelection().selectAllChildren(source);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = label; }, 1600);
}

function save(button) {
  const text = button.dataset.save === "plan" ? data.plan : JSON.stringify(data, null, 1);
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: button.dataset.name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function startSections() {
  const links = new Map([...document.querySelectorAll(".bar nav a")].map((a) => [a.hash.slice(1), a]));
  const visible = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => visible.observe(section));
}

startTheme();
startSections();
document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button)));
document.querySelectorAll("[data-save]").forEach((button) => button.addEventListener("click", () => save(button)));
