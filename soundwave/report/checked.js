// The page of a manifest: its figures, what is wrong with it, and some of its recordings.

const plural = (count, one, many) => `${whole(count)} ${count === 1 ? one : many}`;

/** A recording: a button that plays it, its words, and its envelope, in which one can click. */
function recording(item, words, facts) {
  const audio = h("audio", { src: item.audio, preload: "metadata" });
  const icon = s("path", {});
  const play = h("button", { class: "play", type: "button", onclick: () => (audio.paused ? audio.play() : audio.pause()) },
    s("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, icon));
  const levels = Uint8Array.from(atob(item.envelope), (letter) => letter.charCodeAt(0));
  const top = [...levels].map((level, i) => `L${i} ${(20 - level / 13.5).toFixed(1)}H${i + 1}`).join("");
  const bottom = [...levels].map((level, i) => `L${i + 1} ${(20 + level / 13.5).toFixed(1)}H${i}`).reverse().join("");
  const head = s("line", { class: "head", y1: 0, y2: 40, "vector-effect": "non-scaling-stroke" });
  const wave = s("svg", { class: "wave", viewBox: `0 0 ${levels.length} 40`, preserveAspectRatio: "none", height: 40 },
    s("path", { d: `M0 20${top}${bottom}Z` }), head);
  wave.addEventListener("click", (event) => {
    audio.currentTime = (event.offsetX / wave.clientWidth) * item.seconds;
    audio.play();
  });
  function follow() {
    const x = (audio.currentTime / item.seconds) * levels.length;
    head.setAttribute("x1", x);
    head.setAttribute("x2", x);
    head.setAttribute("visibility", audio.paused && !audio.currentTime ? "hidden" : "visible");
    icon.setAttribute("d", audio.paused ? "M3 1 L13 7 L3 13 Z" : "M2 1 H5 V13 H2 Z M9 1 H12 V13 H9 Z");
    play.setAttribute("aria-label", `${audio.paused ? "Play" : "Pause"}: ${words}`);
    if (!audio.paused) requestAnimationFrame(follow);
  }
  for (const name of ["play", "pause", "ended", "seeked"]) audio.addEventListener(name, follow);
  follow();
  const loudest = item.peak > 0 ? `peak ${(20 * Math.log10(item.peak)).toFixed(0)} dB` : "silent";
  return h("article", { class: "clip" }, play, audio,
    h("div", {}, h("h3", {}, words), h("p", { class: "muted small" },
      [facts, `${item.seconds.toFixed(2)} s`, loudest].filter(Boolean).join(" · "))), wave);
}

function heading() {
  const figures = [[whole(data.samples), "samples"], [data.hours.toFixed(2), "hours of recordings"],
    [whole(data.texts), "different texts"], [whole(data.faults), data.faults === 1 ? "fault" : "faults"],
    [whole(data.remarks), data.remarks === 1 ? "remark" : "remarks"]];
  return [h("h1", {}, data.name), note(`${data.manifest} · ${plural(data.lines, "line", "lines")} · read ${data.made}`),
    h("div", { class: "figures" }, figures.map(([value, name]) =>
      h("div", {}, h("strong", {}, value), h("span", {}, name))))];
}

function findings() {
  const groups = data.findings.map((kind) => {
    const heard = kind.lines.filter((line) => line.audio);
    const others = kind.lines.filter((line) => !line.audio);
    const more = kind.count - kind.lines.length;
    return [
      h("h3", { class: "sub" }, h("span", { class: kind.fault ? "bad" : "muted" }, kind.fault ? "✗ " : "● "),
        `${whole(kind.count)} · ${kind.what}`),
      heard.map((line) => recording(line, line.text, line.place)),
      others.length ? table([columnHead("line"), columnHead("what was found")],
        others.map((line) => h("tr", {}, rowHead(h("code", {}, line.place)), cell(line.text, "found")))) : null,
      more ? note(`And ${whole(more)} more, which the command prints.`) : null,
    ];
  });
  const none = h("p", {}, "Nothing is wrong, as far as can be seen without listening.");
  return section("findings", "What is wrong", groups.length ? groups : none);
}

function bars(rows, name, value) {
  const most = Math.max(1, ...rows.map(value));
  const bar = (share) =>
    h("span", { class: "share", "aria-hidden": "true" }, h("i", { style: { width: `${100 * share}%` } }));
  return table([h("th"), h("th"), columnHead("recordings", "number")], rows.map((row) =>
    h("tr", {}, rowHead(name(row)), h("td", {}, bar(value(row) / most)), cell(whole(value(row)), "number"))));
}

const contents = () => section("contents", "What is in it",
  subtitle("Tasks"),
  table([columnHead("task"), columnHead("samples", "number"), columnHead("hours", "number"), columnHead("words", "number")],
    data.tasks.map((task) => h("tr", {}, rowHead(task.name), cell(whole(task.samples)), cell(task.hours.toFixed(2)),
      cell(whole(task.words))))),
  data.recordings ? [subtitle("Length of the recordings"), bars(data.lengths, (row) => row.name, (row) => row.count),
    subtitle("Sampling rates"), bars(data.rates, (row) => `${row.rate.toLocaleString("en")} Hz`, (row) => row.count)] : null);

function tokenizer() {
  const found = data.tokenizer;
  if (!found) return null;
  const rows = [["tokens of the vocabulary that occur", `${whole(found.used)} of ${whole(found.vocabulary)}`],
    ["tokens of a text, mean", number(found.tokens)], ["characters of a token, mean", number(found.characters)],
    ["texts that it does not give back", whole(found.unknown)]];
  return section("tokenizer", "Tokenizer", note(found.name),
    table([h("th"), h("th")], rows.map(([name, value]) => h("tr", {}, rowHead(name), cell(value)))));
}

function recordings() {
  const items = data.spread.filter((item) => item.audio);
  if (!items.length) return null;
  return section("recordings", "Listen", note("Samples without a fault, from all over the manifest."),
    items.map((item) => recording(item, item.text || item.answer || item.place,
      [item.place, item.task, item.prompt, item.answer && `answer: ${item.answer}`].filter(Boolean).join(" · "))));
}

const body = [findings(), recordings(), contents(), tokenizer()].filter(known);
mount(heading(), body);
