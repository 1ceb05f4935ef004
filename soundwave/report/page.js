// The last of the page's scripts: its sections, in order.

const legend = () =>
  h("div", { class: "legend" }, data.runs.map((run, i) =>
    h("span", {}, key({ colour: colour(i), dashed: i >= COLOURS }), run.name)));

const whose = (run, pass) => (several ? `${run.name} · ${titleOf(pass)}` : titleOf(pass));
const everyPass = (use) => data.runs.flatMap((run) => run.passes.flatMap((pass) => use(run, pass)));
const sum = (values) => values.reduce((a, b) => a + b, 0);

// ---------------------------------------------------------------- scores and training

/** How far trainings came that did not reach their end, and how to go on. */
function unfinished() {
  const lines = data.runs.flatMap((run) => {
    const stopped = run.passes.filter((pass) => pass.unfinished).map((pass) => {
      const { step, steps, checkpoint } = pass.unfinished;
      const from = known(checkpoint) ? `goes on from checkpoint-${checkpoint}` : "starts again: there is no checkpoint yet";
      return h("p", {}, `${whose(run, pass)} came to step ${whole(step)} of ${whole(steps)}; it was stopped, or still runs. `
        + `If it was stopped, the same command ${from}.`);
    });
    const begun = (run.begun || []).map((name) =>
      h("p", {}, `${several ? `${run.name} · ` : ""}${name} has begun, but logged no step yet.`));
    const command = run.command ? h("pre", { class: "command" }, h("code", {}, run.command)) : null;
    return [...stopped, ...begun, command].filter(Boolean);
  });
  return lines.length ? h("div", { class: "unfinished" }, lines) : null;
}

function heading() {
  const run = data.runs[0], { about, last } = run.passes[run.passes.length - 1];
  const facts = [about.device, about.commit && `commit ${about.commit}`, `page made ${data.made}`].filter(Boolean);
  const title = h("h1", {}, several ? `${data.runs.length} runs compared` : run.name);
  if (several) return [title, note(`Page made ${data.made}`), legend(), unfinished()];
  const losses = [["last CTC loss", last.ctc_loss], ["last next-token loss", last.lm_loss],
    ["kept frames per label", last.kept_per_label]];
  const figures = run.scores.length
    ? run.scores.filter((row) => row.final).map((row) => [row.name, percent(row.value)])
    : losses.filter(([, value]) => known(value)).map(([name, value]) => [name, number(value)]);
  const figure = ([name, value]) => h("div", {}, h("strong", {}, value), h("span", {}, name));
  return [title, note(facts.join(" · ")), h("div", { class: "figures" }, figures.map(figure)), unfinished()];
}

function scoreTable() {
  const names = [...new Set(data.runs.flatMap((run) => run.scores.map((row) => row.name)))];
  if (!names.length) return null;
  const bar = (share) =>
    h("span", { class: "share", "aria-hidden": "true" }, h("i", { style: { width: `${100 * Math.min(1, share)}%` } }));
  const rows = names.map((name) => {
    const found = data.runs.map((run) => run.scores.find((row) => row.name === name));
    const there = found.filter(known);
    const best = (there[0].better === "lower" ? Math.min : Math.max)(...there.map((row) => row.value));
    const differ = there.some((row) => row.value !== best);
    const kind = (row) => (differ && row && row.value === best ? "number best" : "number");
    const one = (row) => cell(percent(row && row.value), kind(row));
    const counts = [...new Set(there.map((row) => row.samples))];
    return h("tr", {}, rowHead(name), found.map(one), several ? null : cell(bar(there[0].value), null),
      cell(counts.map(whole).join(" / ")));
  });
  if (data.runs.some((run) => known(run.seconds))) {
    const times = data.runs.map((run) => cell(time(run.seconds)));
    rows.push(h("tr", {}, rowHead("time of the whole run"), times, several ? null : cell(""), cell("")));
  }
  const heads = data.runs.map((run) => columnHead(several ? run.name : "score", "number"));
  const normalised = [...new Set(data.runs.flatMap((run) => Object.values(run.normaliser)))];
  return section("scores", "Scores",
    note("Measured on samples that were not trained on.", several ? " The best of different values is bold." : "",
      normalised.length ? ` Texts are compared by ${normalised.join("; ")}.` : ""),
    table([h("th"), heads, several ? null : h("th"), columnHead("samples", "number")], rows));
}

function training() {
  const rows = everyPass((run, pass) => {
    const { last, settings } = pass, batch = settings.batch_size;
    const size = !known(batch) ? "–" : settings.accumulation > 1 ? `${batch} × ${settings.accumulation}` : `${batch}`;
    const values = [
      pass.unfinished ? `${whole(last.step)} of ${whole(pass.unfinished.steps)}` : whole(last.step), known(last.epoch) ? last.epoch.toFixed(2) : "–", size, time(last.seconds),
      number(last.audio_per_second), number(last.ctc_loss), number(last.lm_loss), number(last.kept_per_label),
      whole(pass.skipped),
    ];
    return h("tr", {}, rowHead(whose(run, pass)), values.map((value) => cell(value)));
  });
  const heads = ["steps", "epochs", "batch", "time", "audio s / s", "CTC", "next token", "kept per label", "skipped steps"];
  const averaged = Math.max(...everyPass((run, pass) => pass.averaged));
  return section("training", "Training",
    note("Loss in nats per token, on a logarithmic scale. ",
      several ? "Lines are running means." : "Strong lines are running means, faint ones the logged values.",
      averaged > 1 ? ` A point is the mean of up to ${averaged} log entries.` : ""),
    several ? legend() : null,
    grid(curvesOf({ ctc_loss: "CTC", lm_loss: "next token" }, { log: true, smoothed: true, height: 220 })),
    table([h("th"), heads.map((name) => columnHead(name, "number"))], rows),
    note("Values of the last log entry. A step is skipped if its loss or its gradient is not finite."));
}

// ---------------------------------------------------------------- recordings, alignment, optimiser

function recordings() {
  const { items, note: how } = data.utterances;
  const first = several && items.length ? ` Peaks, tokens and attention come from ${data.utterances.by}.` : "";
  const hint = " Click a token to see what its frame attends to. Click the spectrogram to listen from there.";
  return section("recordings", "Recordings", note(how, first, items.length ? hint : ""), items.map(utterance));
}

const block = (title, text, charts) =>
  charts.length ? [subtitle(title), text ? note(text) : null, grid(charts)] : [];

/** Labels a second of the recordings, from the last log entry: kept frames a second over kept frames per label. */
function labelsASecond(pass) {
  const { compression, kept_per_label: perLabel } = pass.last, rate = 50 / (pass.settings.frame_stack || 2);
  return compression && perLabel ? { rate, labels: rate / compression / perLabel } : null;
}

function expectedBlank() {
  const rows = everyPass((run, pass) => {
    const found = labelsASecond(pass);
    if (!found) return [];
    const wanted = Math.max(0, 1 - found.labels / found.rate);
    return [h("tr", {}, rowHead(whose(run, pass)), cell(found.labels.toFixed(1)), cell(percent(wanted)),
      cell(percent(pass.last.blank_share)), cell(number(pass.last.kept_per_label)))];
  });
  if (!rows.length) return null;
  const heads = ["labels a second", "expected blank share", "last blank share", "kept frames per label"];
  return table([h("th"), heads.map((name) => columnHead(name, "number"))], rows);
}

function alignment() {
  const share = curvesOf({ blank_share: "blank share" }, { format: percent, range: [0, 1] });
  const kept = curvesOf({ kept_per_label: "kept per label" }, {});
  return section("alignment", "Alignment",
    block("Kept frames per label", "A label is a token of the transcript. This is the better sign: it is close to 1 if "
      + "CTC writes each label once.", kept),
    block("Blank share", "Share of the frames whose most probable label is blank. What to expect depends on how fast "
      + "people speak: with one frame a label it is 1 − labels a second / frames a second. Read speech has about 1.5 "
      + "sub-words a second, so 94 % of 25 frames are blank. At 0 or 100 % the model has aligned nothing.", share),
    expectedBlank(),
    block("Compression", "Number of aligned frames for each kept frame.", curvesOf({ compression: "frames" }, {})));
}

function optimiser() {
  const norm = curvesOf({ grad_norm: "gradient norm" }, { log: true, smoothed: true });
  return section("optimiser", "Optimiser",
    block("Learning rate", null, curvesOf({ learning_rate: "learning rate" }, { height: 120 })),
    block("Gradient norm", "The norm before clipping, on a logarithmic scale.", norm));
}

// ---------------------------------------------------------------- tasks

const EPOCHS = 6;
/** At most EPOCHS of a list: its ends, and mostly early ones, because the temperature changes most there. */
function someEpochs(epochs) {
  if (epochs.length <= EPOCHS) return epochs;
  const last = epochs.length - 1;
  const places = Array.from({ length: EPOCHS }, (_, i) => (i ? Math.round(last ** (i / (EPOCHS - 1))) : 0));
  return [...new Set(places)].map((place) => epochs[place]);
}

function mixtureOf(run, pass) {
  if (!pass.mixture.length) return [];
  const tasks = Object.keys(pass.tasks).sort((a, b) => pass.tasks[b] - pass.tasks[a]);
  const epochs = someEpochs(pass.mixture).map((epoch) => {
    const total = sum(Object.values(epoch.drawn));
    const shares = Object.fromEntries(tasks.map((task) => [task, (epoch.drawn[task] || 0) / total]));
    return { ...epoch, total, shares };
  });
  const most = Math.max(...epochs.flatMap((epoch) => [epoch.shares, epoch.planned].flatMap(Object.values)));
  const wide = (share) => `${(100 * share) / most}%`;
  const value = (text) => h("span", { class: "value" }, text);
  const bar = (epoch, task) => h("div", {},
    h("span", { class: "share", "aria-hidden": "true" },
      h("i", { style: { width: wide(epoch.shares[task]) } }), h("b", { style: { left: wide(epoch.planned[task]) } })),
    value(`${percent(epoch.shares[task])} · planned ${percent(epoch.planned[task])}`));
  const top = epochs.map((epoch) =>
    h("div", {}, `Epoch ${epoch.epoch + 1}`, value(`${whole(epoch.total)} drawn · T = ${number(epoch.temperature)}`)));
  const rows = tasks.map((task) =>
    [h("div", {}, task, value(`${whole(pass.tasks[task])} samples`)), epochs.map((epoch) => bar(epoch, task))]);
  const across = `7rem repeat(${epochs.length}, minmax(0, ${epochs.length > 1 ? "1fr" : "34rem"}))`;
  const some = epochs.length < pass.mixture.length ? ` · ${epochs.length} of ${pass.mixture.length} epochs` : "";
  return [
    subtitle(whose(run, pass), h("span", { class: "muted" }, some)),
    h("div", { class: "mixture", style: { "grid-template-columns": across } }, h("div"), top, rows),
  ];
}

function mixtures() {
  const parts = everyPass(mixtureOf);
  if (!parts.length) return null;
  return section("tasks", "Task mixture",
    note("The bars show the share of each task in the samples that were drawn, the upright lines the planned share: "
      + "p ∝ share^(1/T). T = 1 keeps the shares of the manifests; a higher T makes them more equal."),
    parts);
}

// ---------------------------------------------------------------- left out, settings

const few = (names, count) => names.slice(0, count).join(", ") + (names.length > count ? ", …" : "");

function leftOut() {
  const heads = (figure, names) =>
    [columnHead("stage"), columnHead(figure, "number"), columnHead("reason"), columnHead(names)];
  const row = (run, pass, figure, reason, names) =>
    h("tr", {}, rowHead(whose(run, pass)), cell(whole(figure)), cell(reason, null), cell(names, "muted small"));
  const left = everyPass((run, pass) => pass.left_out.map((one) =>
    row(run, pass, one.count, one.reason, one.samples.join(", ") + (one.count > one.samples.length ? " …" : ""))));
  const skipped = everyPass((run, pass) => pass.skipped_steps.map((one) =>
    row(run, pass, one.step, one.reason || "", few(one.samples || [], 4))));
  const totals = everyPass((run, pass) => whole(sum(Object.values(pass.tasks))));
  return section("left-out", "Left out",
    left.length
      ? table(heads("samples", "such as"), left)
      : h("p", {}, `No sample was left out: all samples of the manifests could be used (${totals.join(", ")}).`),
    skipped.length
      ? [subtitle("Skipped steps"), table(heads("step", "its samples"), skipped)]
      : h("p", {}, "No step was skipped."));
}

function settings() {
  const all = everyPass((run, pass) => [{ run, pass }]);
  const names = [...new Set(all.flatMap(({ pass }) => Object.keys(pass.settings)))];
  const text = (value) => (!known(value) ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
  const values = (column, name) => column.passes.map((pass) => text(pass && pass.settings[name]));
  const differs = (column, name) => column.passes.every(known) && new Set(values(column, name)).size > 1;
  const changed = columns.flatMap((column) => names.filter((name) => differs(column, name)).map((name) =>
    h("tr", {}, rowHead([h("code", {}, name), h("span", { class: "muted small" }, ` ${column.title}`)]),
      values(column, name).map((value) => cell(value, null)))));
  const listed = (wanted) => table(
    [h("th"), all.map(({ run, pass }) => columnHead(whose(run, pass)))],
    wanted.map((name) =>
      h("tr", {}, rowHead(h("code", {}, name)), all.map(({ pass }) => cell(text(pass.settings[name]), null)))));
  const versions = data.runs.map((run) => {
    const { about } = run.passes[run.passes.length - 1];
    const list = Object.entries(about.versions || {}).map(([name, version]) => `${name} ${version}`);
    const facts = [several && run.name, about.device, about.commit && `commit ${about.commit}`, ...list];
    return note(facts.filter(Boolean).join(" · "));
  });
  return section("settings", "Settings",
    changed.length
      ? [note("Settings that differ between the runs."),
        table([h("th"), data.runs.map((run) => columnHead(run.name))], changed)]
      : null,
    several && !changed.length ? h("p", {}, "The runs have the same settings.") : null,
    h("details", {}, h("summary", {}, `All ${names.length} settings`), listed(names)),
    versions);
}

// ---------------------------------------------------------------- the page

const body = [
  scoreTable(), training(), recordings(), alignment(), optimiser(), mixtures(), leftOut(), settings(),
].filter(known);
mount(heading(), body);
