"use strict";
// The first of the page's scripts: the data, helpers that make elements, and charts of curves.
// The text of the data only becomes text nodes; nothing of it is parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const STAGES = { 1: "I · alignment", 2: "II · shrinking", 3: "III · instruction tuning" };
const COLOURS = 8; // --c0 to --c7
const colour = (index) => `var(--c${index % COLOURS})`;

// ---------------------------------------------------------------- elements, and numbers as text

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, set] of Object.entries(value)) node.style.setProperty(key, set);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const known = (value) => value !== null && value !== undefined;
function number(value) {
  if (!known(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1).replace(".0e", "e").replaceAll("-", "−");
  const digits = Math.abs(value) < 1000 ? { maximumSignificantDigits: 3 } : { maximumFractionDigits: 0 };
  return value.toLocaleString("en", digits);
}
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : "–");
function time(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
const titleOf = (pass) =>
  (STAGES[pass.stage] || `stage ${pass.stage}`) + (pass.number > 1 ? `, pass ${pass.number}` : "");
const keyOf = (pass) => `${pass.stage}.${pass.number}`;

/** The trainings of all runs: one entry for each stage and pass, with the training of each run or undefined. */
const columns = [...new Set(data.runs.flatMap((run) => run.passes.map(keyOf)))]
  .sort((a, b) => a.localeCompare(b, "en", { numeric: true }))
  .map((key) => ({
    key,
    passes: data.runs.map((run) => run.passes.find((pass) => keyOf(pass) === key)),
    title: titleOf(data.runs.flatMap((run) => run.passes).find((pass) => keyOf(pass) === key)),
  }));

// ---------------------------------------------------------------- curves

/**
 * Running mean of a curve, of its logarithms if the axis is logarithmic. The weight of a neighbour halves with every
 * thirtieth of the curve's length; neighbours on both sides count, so the mean does not lag behind.
 */
function smooth(values, log) {
  const keep = 0.5 ** (1 / Math.max(1, values.length / 30));
  const levels = values.map((value) => (!known(value) || (log && value <= 0) ? null : log ? Math.log(value) : value));
  const oneWay = (list) => {
    let total = 0, weight = 0;
    return list.map((level) => {
      total *= keep;
      weight *= keep;
      const before = [total, weight]; // without the value itself, which is added once below
      if (known(level)) [total, weight] = [total + level, weight + 1];
      return before;
    });
  };
  const left = oneWay(levels), right = oneWay([...levels].reverse()).reverse();
  return levels.map((level, i) => {
    if (!known(level)) return null;
    const mean = (left[i][0] + right[i][0] + level) / (left[i][1] + right[i][1] + 1);
    return log ? Math.exp(mean) : mean;
  });
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step + 0); // not -0
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  const decades = Math.log10(high / low);
  const fine = decades > 0.4 ? [1, 2, 3, 5, 7] : [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
  const factors = decades > 2.5 ? [1] : decades > 0.9 ? [1, 2, 5] : fine;
  const skip = Math.max(1, Math.ceil(decades / 6));
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of power % skip ? [] : factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

/** The index at which a sorted list comes closest to a value. */
function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

/**
 * A chart of curves over the steps. The pointer and the arrow keys show the values of a step.
 * series: [{name, colour, dashed, x, y, smoothed}]; y may hold null. range: [low, high] of a linear axis.
 */
function chart({ title, series, log = false, format = number, range = null, height = 150 }) {
  const shown = series.filter((one) => one.y.some((value) => known(value) && (!log || value > 0)));
  for (const one of shown) one.line = one.smoothed && one.y.length >= 12 ? smooth(one.y, log) : one.y;
  const caption = h("figcaption", {}, h("span", { class: "name" }, title));
  if (!several) {
    for (const one of shown) {
      const last = one.line.findLast(known);
      caption.append(h("span", {}, ...(shown.length > 1 ? [key(one), `${one.name} `] : []), format(last)));
    }
  }
  const figure = h("figure", {}, caption);
  if (!shown.length) {
    caption.append(h("span", {}, "not logged"));
    return figure;
  }
  const ends = (one) => `${one.name} from ${format(one.line.find(known))} to ${format(one.line.findLast(known))}`;
  const label = `${title}: ${shown.map(ends).join("; ")}`;
  const canvas = s("svg", { height, tabindex: 0, role: "img", "aria-label": label });
  const tip = h("div", { class: "tip", hidden: true });
  figure.append(canvas, tip);
  let place = null; // set by draw

  function draw() {
    const width = figure.clientWidth;
    if (!width) return;
    const left = 46, right = 8, top = 8, bottom = 22;
    const xs = shown.flatMap((one) => [one.x[0], one.x[one.x.length - 1]]);
    const first = Math.min(...xs), last = Math.max(...xs, first + 1);
    const values = shown.flatMap((one) => one.y.filter((value) => known(value) && (!log || value > 0)));
    let [low, high] = range || [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    if (!range && !log) low = Math.min(low, 0);
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low, high + 1];
    if (!range && !log) high += (high - low) * 0.05;
    if (log) [low, high] = [low / 1.1, high * 1.1];
    const level = log ? Math.log : (value) => value;
    const x = (step) => left + ((step - first) / (last - first)) * (width - left - right);
    const y = (value) => top + (1 - (level(value) - level(low)) / (level(high) - level(low))) * (height - top - bottom);
    const path = (one, values) => {
      let text = "", open = false;
      values.forEach((value, i) => {
        const drawn = known(value) && (!log || value > 0);
        if (drawn) text += `${open ? "L" : "M"}${x(one.x[i]).toFixed(1)} ${y(value).toFixed(1)}`;
        open = drawn;
      });
      return text;
    };
    const nodes = [];
    for (const tick of log ? logTicks(low, high) : linearTicks(low, high, 4)) {
      nodes.push(s("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
      const text = format(tick).replace(/\.0 %$/, " %");
      nodes.push(s("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, text));
    }
    for (const tick of linearTicks(first, last, Math.max(3, width / 70)).filter(Number.isInteger)) {
      nodes.push(s("text", { x: x(tick), y: height - 4, "text-anchor": "middle" }, whole(tick)));
    }
    for (const one of shown) {
      const dashes = one.dashed ? "5 3" : null;
      const pen = { fill: "none", stroke: one.colour, "stroke-linejoin": "round", "stroke-dasharray": dashes };
      if (one.line !== one.y && !several) {
        nodes.push(s("path", { ...pen, d: path(one, one.y), "stroke-width": 1, "stroke-opacity": 0.4 }));
      }
      nodes.push(s("path", { ...pen, d: path(one, one.line), "stroke-width": 1.8 }));
    }
    const cross = s("g", {});
    canvas.setAttribute("width", width);
    canvas.replaceChildren(...nodes, cross);
    place = (step) => {
      const steps = shown.map((one) => one.x[nearest(one.x, step)]);
      const at = steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
      cross.replaceChildren(s("line", { class: "cross", x1: x(at), x2: x(at), y1: top, y2: height - bottom }));
      const rows = shown.map((one) => {
        const i = nearest(one.x, at);
        if (known(one.line[i]) && (!log || one.line[i] > 0)) {
          cross.append(s("circle", { cx: x(one.x[i]), cy: y(one.line[i]), r: 3.2, fill: one.colour }));
        }
        const smoothed = one.line !== one.y && known(one.line[i]) ? ` (mean ${format(one.line[i])})` : "";
        return h("tr", {}, h("td", {}, key(one), one.name), h("td", {}, format(one.y[i]) + smoothed));
      });
      tip.replaceChildren(h("div", { class: "muted" }, `step ${whole(at)}`), h("table", {}, rows));
      tip.hidden = false;
      const from = x(at) + 12 + tip.offsetWidth > width ? x(at) - 12 - tip.offsetWidth : x(at) + 12;
      tip.style.left = `${Math.max(-8, from)}px`;
      tip.style.top = `${caption.offsetHeight + 12}px`;
      return at;
    };
    canvas.onpointermove = (event) => {
      const along = event.clientX - canvas.getBoundingClientRect().left;
      current = place(first + ((along - left) / (width - left - right)) * (last - first));
    };
    hide = () => { tip.hidden = true; current = null; cross.replaceChildren(); };
    canvas.onpointerleave = () => hide();
  }
  let current = null, hide = () => {};
  canvas.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!turn) return;
    event.preventDefault();
    const all = shown[0].x;
    const from = known(current) ? nearest(all, current) : turn > 0 ? -1 : all.length;
    current = place(all[Math.max(0, Math.min(all.length - 1, from + turn))]);
  });
  canvas.addEventListener("blur", () => hide());
  new ResizeObserver(draw).observe(figure);
  return figure;
}

const key = (one) => h("span", { class: one.dashed ? "key dashed" : "key", style: { color: one.colour } });

/**
 * Charts of columns of the log; names: {column: name}. A single run gets one chart for each training, with all columns.
 * Several runs get one chart for each training and column, with a curve for each run.
 */
function curvesOf(names, options) {
  const all = Object.entries(names);
  return columns.flatMap((column) => {
    const charts = several ? all.map((one) => [one]) : [all];
    return charts.map((wanted) => {
      const series = column.passes.flatMap((pass, run) =>
        !pass ? [] : wanted.filter(([name]) => pass.curves[name]).map(([name, called]) => ({
          name: several ? data.runs[run].name : called,
          colour: several ? colour(run) : colour(all.findIndex((one) => one[0] === name)),
          dashed: several && run >= COLOURS,
          x: pass.curves.step, y: pass.curves[name], smoothed: options.smoothed,
        })));
      if (!series.length) return null;
      const called = several && all.length > 1 ? ` · ${wanted[0][1]}` : "";
      return chart({ ...options, title: column.title + called, series });
    });
  }).filter(known);
}

function grid(charts) {
  const across = charts.length === 4 ? 4 : Math.min(3, charts.length);
  return h("div", { class: "charts", style: { "--columns": across, "--narrow": Math.min(2, across) } }, charts);
}
