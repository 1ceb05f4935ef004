// The frame of every page: sections with their links, tables, and the button that turns the colours over.

const sections = [];
function section(id, title, ...children) {
  sections.push([id, title]);
  return h("section", { id }, h("h2", {}, title), ...children);
}
const note = (...text) => h("p", { class: "muted small" }, ...text);
const subtitle = (...text) => h("h3", { class: "sub" }, ...text);
const cell = (value, kind = "number") => h("td", { class: kind }, value);
const columnHead = (name, kind = null) => h("th", { class: kind, scope: "col" }, name);
const rowHead = (name) => h("th", { scope: "row" }, name);
const table = (heads, rows) =>
  h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
const repaint = []; // functions that paint the canvases again, because their colours depend on the scheme

/** Fill the page: a bar with links to the sections, the heading, and the sections. */
function mount(heading, body) {
  const scheme = h("button", { class: "scheme", type: "button" });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let picked = null; // "light" or "dark" once the button was used
  const current = () => picked || (dark.matches ? "dark" : "light");
  function applyScheme() {
    const other = current() === "dark" ? "light" : "dark";
    document.documentElement.style.colorScheme = picked || "";
    scheme.textContent = other === "dark" ? "Dark" : "Light";
    scheme.setAttribute("aria-label", `Switch to ${other} colours`);
    for (const paint of repaint) paint();
  }
  scheme.addEventListener("click", () => {
    picked = current() === "dark" ? "light" : "dark";
    applyScheme();
  });
  dark.addEventListener("change", applyScheme);
  const links = sections.map(([id, title]) => h("a", { href: `#${id}` }, title));
  document.body.append(
    h("div", { class: "bar" }, h("nav", { "aria-label": "Sections" }, links), scheme),
    h("main", {}, heading, body));
  applyScheme();
}
