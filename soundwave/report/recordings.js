// One recording: spectrogram, CTC, tokens, attention, sound and answers.

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const seconds = (value) => `${value.toFixed(2)} s`;
// A token that does not begin with a space continues a word.
const spoken = (text) => (text.trim() ? `“${text[0] === " " ? "" : "…"}${text.trim()}”` : text ? "space" : "blank");
const WORTH_NAMING = 0.0005; // A smaller probability of an alternative would be shown as 0.0 %.

/** Red, green and blue of a custom property in the current scheme. */
function rgb(name) {
  const probe = h("span", { style: { color: `var(${name})` } });
  document.body.append(probe);
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return parts;
}

function paintSpectrogram(canvas, mel) {
  const stops = ["--s0", "--s1", "--s2", "--s3"].map(rgb);
  const small = h("canvas", { width: mel.columns, height: mel.bins });
  const context = small.getContext("2d"), image = context.createImageData(mel.columns, mel.bins);
  const shades = Array.from({ length: 256 }, (_, level) => {
    const at = (level / 255) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at));
    return stops[i].map((part, c) => part + (stops[i + 1][c] - part) * (at - i));
  });
  for (let bin = 0; bin < mel.bins; bin++) {
    for (let column = 0; column < mel.columns; column++) {
      const shade = shades[mel.values[bin * mel.columns + column]];
      const pixel = 4 * ((mel.bins - 1 - bin) * mel.columns + column);
      for (let c = 0; c < 3; c++) image.data[pixel + c] = shade[c];
      image.data[pixel + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  canvas.width = mel.columns * 2;
  canvas.height = 300;
  const large = canvas.getContext("2d");
  large.imageSmoothingQuality = "high";
  large.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function utterance(item) {
  const mel = { ...item.mel, values: bytes(item.mel.rows) };
  const used = bytes(item.used), frames = used.length;
  const attention = item.attention && { rows: bytes(item.attention.rows), scale: item.attention.scale };
  const moment = (frame) => Math.min(item.seconds, (frame + 0.5) * item.frame_seconds);
  let chosen = 0, width = 0;

  const audio = h("audio", { src: item.audio, preload: "metadata" });
  const icon = s("path", {});
  const turn = () => (audio.paused ? audio.play() : audio.pause());
  const play = h("button", { class: "play", type: "button", onclick: turn },
    s("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, icon));
  function showState() {
    icon.setAttribute("d", audio.paused ? "M3 1 L13 7 L3 13 Z" : "M2 1 H5 V13 H2 Z M9 1 H12 V13 H9 Z");
    play.setAttribute("aria-label", `${audio.paused ? "Play" : "Pause"}: ${item.text}`);
  }
  const shown = `Log-mel spectrogram, ${seconds(item.seconds)}; ${item.kept.length} kept frames`;
  const canvas = h("canvas", { role: "img", "aria-label": shown, title: "Click to play from here" });
  const over = s("svg", { class: "over", height: 150 }), axis = s("svg", { height: 18 });
  const usedStrip = s("svg", { height: 44 }), attendedStrip = s("svg", { height: 56 });
  const playhead = s("line", { class: "head", y1: 0, y2: 150 });
  const detail = h("p", { class: "detail", "aria-live": "polite" });
  const buttons = item.kept.map((kept, i) => h("button", {
    class: kept.text ? "token" : "token blank", type: "button", onclick: () => choose(i),
    title: `${seconds(moment(kept.frame))}, ${percent(kept.probability)}`,
  }, kept.text.trim() ? kept.text.trim() : kept.text ? "␣" : "blank"));
  const tokens = h("div", { class: "tokens" }, buttons);
  const inner = h("div", {}, h("div", { style: { position: "relative" } }, canvas, over), axis,
    h("div", { class: "strip-name" }, "CTC: probability that a frame is not blank. The dots are the kept frames."),
    usedStrip, tokens,
    attention ? [h("div", { class: "strip-name" }, "Cross-attention of the chosen frame, mean of the heads"),
      attendedStrip] : null);
  const strips = h("div", { class: "strips" }, inner);

  const at = (second) => (second / item.seconds) * width;
  function area(values, scale, height, from) {
    const edge = (i) => at(Math.min(item.seconds, i * item.frame_seconds)).toFixed(1);
    const level = (value) => (height - (value / scale) * (height - 4)).toFixed(1);
    const points = values.map((value, i) => `L${edge(i)} ${level(value)}H${edge(i + 1)}`);
    return `M${from} ${height}${points.join("")}L${width} ${height}Z`;
  }
  function lines() {
    const peaks = item.kept.map((kept, i) => {
      const x = at(moment(kept.frame)), mine = i === chosen;
      return s("line", { class: mine ? "peak chosen" : "peak", x1: x, x2: x, y1: mine ? 0 : 118, y2: 150 });
    });
    over.replaceChildren(...peaks, playhead);
  }
  function choose(i) {
    chosen = i;
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", place === i));
    lines();
    const kept = item.kept[i];
    const others = kept.others.filter(([, p]) => p >= WORTH_NAMING).map(([text, p]) => `${spoken(text)} ${percent(p)}`);
    const then = others.length ? `; then ${others.join(", ")}.` : ".";
    const place = ` at ${seconds(moment(kept.frame))}, ${percent(kept.probability)}${then}`;
    const words = [h("b", {}, spoken(kept.text)), place];
    if (attention) {
      const row = [...attention.rows.subarray(i * frames, (i + 1) * frames)], x = at(moment(kept.frame));
      attendedStrip.replaceChildren(
        s("line", { class: "grid", x1: 0, x2: width, y1: 55.5, y2: 55.5 }),
        s("path", { class: "attended", d: area(row, 255, 55, 0) }),
        s("line", { class: "peak", x1: x, x2: x, y1: 0, y2: 55, "stroke-dasharray": "2 3" }));
      const total = row.reduce((a, b) => a + b, 0);
      let sum = 0, count = 0;
      for (const value of [...row].sort((a, b) => b - a)) if (sum < total / 2) { sum += value; count++; }
      const largest = percent(attention.scale[i]);
      words.push(` Half of its attention lies on ${count} of ${frames} frames; the largest weight is ${largest}.`);
    }
    detail.replaceChildren(...words);
  }
  function draw() {
    const room = strips.clientWidth;
    if (!room) return;
    width = Math.max(room, item.seconds * 110);
    inner.style.width = `${width}px`;
    for (const strip of [over, usedStrip, attendedStrip, axis]) strip.setAttribute("width", width);
    const ticks = linearTicks(0, item.seconds, Math.max(3, width / 130)).filter((tick) => at(tick) < width - 20);
    axis.replaceChildren(...ticks.map((tick) =>
      s("text", { x: at(tick), y: 13, "text-anchor": tick ? "middle" : "start" }, `${number(tick)} s`)));
    usedStrip.replaceChildren(
      s("line", { class: "grid", x1: 0, x2: width, y1: 43.5, y2: 43.5 }),
      s("path", { class: "used", d: area([...used], 255, 43, 0) }),
      ...item.kept.map((kept) =>
        s("circle", { class: "dot", cx: at(moment(kept.frame)), cy: 43 - kept.probability * 39, r: 3 })));
    // Each token stands below its frame, in the first line that has room for it.
    const ends = [];
    buttons.forEach((button, i) => {
      const half = button.offsetWidth / 2;
      const middle = Math.max(half, Math.min(width - half, at(moment(item.kept[i].frame))));
      let line = ends.findIndex((end) => end + 3 <= middle - half);
      if (line < 0) line = ends.length;
      ends[line] = middle + half;
      button.style.left = `${middle}px`;
      button.style.top = `${line * 1.85}rem`;
    });
    tokens.style.height = `${Math.max(1, ends.length) * 1.85}rem`;
    choose(chosen);
  }
  function follow() {
    playhead.setAttribute("x1", at(audio.currentTime));
    playhead.setAttribute("x2", at(audio.currentTime));
    playhead.setAttribute("visibility", audio.paused && !audio.currentTime ? "hidden" : "visible");
    if (!audio.paused) requestAnimationFrame(follow);
  }
  for (const name of ["play", "pause", "ended"]) audio.addEventListener(name, () => { showState(); follow(); });
  canvas.addEventListener("click", (event) => {
    audio.currentTime = (event.offsetX / canvas.clientWidth) * item.seconds;
    audio.play();
  });
  repaint.push(() => paintSpectrogram(canvas, mel));
  showState();
  follow();
  const gauge = h("div"); // Its width is observed, because drawing changes the size of the strips themselves.
  new ResizeObserver(draw).observe(gauge);
  const whole = item.whole_seconds || item.seconds; // a long recording is shown up to its first cut
  const length = whole > item.seconds + 0.01 ? `first ${seconds(item.seconds)} of ${seconds(whole)}` : seconds(whole);
  const facts = `${length} · ${item.kept.length} of ${frames} frames kept · ${item.id}`;
  return h("article", { class: "utterance" },
    h("header", {}, play, audio, h("h3", {}, item.text || item.id), h("span", { class: "muted small" }, facts)),
    gauge, strips, detail, answers(item));
}

/** The words of two texts, one below the other; differences are marked. */
function alignedWords(words) {
  const errors = words.filter((word) => word.kind !== "equal").length;
  return h("div", { class: "words wrong" },
    h("span", { class: "rows", "aria-hidden": "true" }, h("span", {}, "said"), h("span", {}, "written")),
    words.map((word) => h("span", { class: word.kind === "equal" ? "word" : `word error ${word.kind}` },
      h("span", {}, word.reference || "–"), h("span", {}, word.given || "–"))),
    h("span", { class: "prompt" }, `${errors} word error${errors > 1 ? "s" : ""}`));
}

function oneAnswer(answer) {
  const cut = answer.cut_off ? h("p", { class: "muted small" }, "This answer was cut off at the longest length.") : null;
  if (answer.words && !answer.right) return h("div", {}, alignedWords(answer.words), cut);
  const aside = (text) => h("span", { class: "prompt" }, text);
  return h("div", { class: answer.right ? "right" : "wrong" },
    h("span", { class: "mark" }, answer.right ? "✓" : "✗"), answer.given || "(nothing)",
    answer.right ? null : aside(`right: ${answer.reference}`),
    answer.task === "transcribe" ? null : aside(answer.prompt), cut);
}

function answers(item) {
  const row = (name, answer) => [h("span", { class: "task" }, name), oneAnswer(answer)];
  return h("div", { class: "answers" }, item.answers.map((answer) => {
    const same = (other) => other.task === answer.task && other.reference === answer.reference;
    const theirs = Object.entries(item.others).map(([name, list]) => [name, list.find(same)]);
    return [
      row(several ? `${answer.task} · ${data.utterances.by}` : answer.task, answer),
      theirs.filter(([, other]) => other).map(([name, other]) => row(`· ${name}`, other)),
    ];
  }));
}
