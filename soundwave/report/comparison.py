"""The page of `soundwave compare`: scores of two models with intervals, their differences, and answers that differ.

One HTML file without a script; its style is the report's. Every text of a file stands in it escaped.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from soundwave.evaluation.compare import Compared, Comparison
from soundwave.evaluation.intervals import SURE
from soundwave.evaluation.scores import align
from soundwave.evaluation.words import Rules, rules_for

EXAMPLES = 30  # answers that differ most, of all tasks together, for each of the two models
WIDTH, HEIGHT, MARGIN = 360, 34, 10  # of the picture of a score
STYLE = """
.compare svg { display: inline-block; vertical-align: middle; }
.compare .first { fill: var(--c0); stroke: var(--c0); } .compare .second { fill: var(--c1); stroke: var(--c1); }
.compare .zero { stroke: var(--muted); stroke-dasharray: 3 3; }
.compare line { stroke-width: 2; }
.compare .name-first { color: var(--c0); } .compare .name-second { color: var(--c1); }
.compare td, .compare th { vertical-align: baseline; }
.compare .example { margin-top: 1.4rem; }
.compare .example p { margin: 0.1rem 0; }
.compare .example .words { margin: 0.15rem 0 0.4rem; }
"""


def write_comparison(comparison: Comparison, names: tuple[str, str], out: Path, about: Sequence[str] = ()) -> Path:
    """Write the page, and return `out`.

    Args:
        names: of the two models.
        out: the HTML file. Its folder is made if it does not exist.
        about: sentences for the page's head.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.new")
    aside.write_text(make_page(comparison, names, about), encoding="utf-8")
    aside.replace(out)
    return out


def make_page(comparison: Comparison, names: tuple[str, str], about: Sequence[str] = ()) -> str:
    """The HTML of the page."""
    style = files("soundwave.report").joinpath("page.css").read_text(encoding="utf-8") + STYLE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    first, second = map(escape, names)
    alone = [
        f"{count} samples that only {name} has answered are not compared."
        for name, count in zip(names, comparison.alone, strict=True)
        if count
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{first} and {second} · Soundwave</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main class="compare">
<h1><span class="name-first">{first}</span> and <span class="name-second">{second}</span></h1>
{"".join(f"<p>{escape(line)}</p>" for line in [*about, *alone])}
<p class="muted small">Intervals hold 95 % (bootstrap over sentences; for the difference both models' answers to a
sentence are drawn together). p is that of a randomisation test, two-sided. Bold: p below {SURE}.</p>
<section><h2>Scores</h2>
{"".join(_score(one, names) for one in comparison.scores)}
</section>
{_examples(comparison, names, 1)}
{_examples(comparison, names, -1)}
</main>
</body>
</html>
"""


def _score(one: Compared, names: tuple[str, str]) -> str:
    scale, digits = (1, 1) if one.score == "BLEU" else (100, 1)

    def text(value: float, bounds: Sequence[float], sign: str = "") -> str:
        low, high = (f"{scale * bound:{sign}.{digits}f}" for bound in bounds)
        return f"{scale * value:{sign}.{digits}f}</td><td class='number muted'>{low} to {high}"

    rows = [
        f"<tr><th><span class='name-{which}'>{escape(name)}</span></th><td class='number'>{text(value, bounds)}</td>"
        f"<td class='number'>{better}</td></tr>"
        for which, name, value, bounds, better in zip(
            ("first", "second"), names, one.values, one.intervals, one.better, strict=True
        )
    ]
    found = text(one.difference, one.interval, "+")
    sure = one.p < SURE
    p = f"p = {one.p:.4f}" if one.p >= 0.001 else "p &lt; 0.001"
    rows.append(
        f"<tr><th>difference</th><td class='number{' best' if sure else ''}'>{found}</td>"
        f"<td class='number{' best' if sure else ''}'>{p}</td></tr>"
    )
    unit = "" if one.score == "BLEU" else ", %"
    return (
        f"<h3 class='sub'>{escape(one.task)}: {one.score}{unit} <span class='muted'>({one.samples} samples, "
        f"{'lower' if one.lower else 'higher'} is better)</span></h3>{_picture(one, scale)}"
        f"<div class='scroll'><table><thead><tr><th></th><th class='number'>{one.score}</th>"
        f"<th class='number'>95 %</th><th class='number'>better on</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _picture(one: Compared, scale: float) -> str:
    """Both intervals on one axis."""
    bounds = [scale * bound for pair in one.intervals for bound in pair] + [scale * value for value in one.values]
    low, high = min(bounds), max(bounds)
    room = (high - low) * 0.08 or 1.0
    low, high = max(0.0, low - room), high + room
    if one.score == "accuracy":
        high = min(100.0, high)

    def x(value: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (scale * value - low) / (high - low)

    marks = "".join(
        f"<g class='{which}'><line x1='{x(pair[0]):.1f}' x2='{x(pair[1]):.1f}' y1='{y}' y2='{y}'/>"
        f"<circle cx='{x(value):.1f}' cy='{y}' r='4'/></g>"
        for which, pair, value, y in zip(("first", "second"), one.intervals, one.values, (8, 20), strict=True)
    )
    axis = f"<text x='{MARGIN}' y='{HEIGHT}'>{low:.1f}</text>"
    axis += f"<text x='{WIDTH - MARGIN}' y='{HEIGHT}' text-anchor='end'>{high:.1f}</text>"
    label = f"{one.score} of both models with intervals"
    return f"<svg role='img' aria-label='{label}' width='{WIDTH}' height='{HEIGHT + 4}'>{marks}{axis}</svg>"


def _examples(comparison: Comparison, names: tuple[str, str], sign: int) -> str:
    """The answers on which the second model is better (sign 1), or the first (sign -1), most different first."""
    tasks: dict[str, list[int]] = {}
    for place in sorted(range(len(comparison.gains)), key=lambda place: -abs(comparison.gains[place])):
        if sign * comparison.gains[place] > 0:
            tasks.setdefault(comparison.pairs[place][0]["task"], []).append(place)
    if not tasks:
        return ""
    better, most = escape(names[1] if sign > 0 else names[0]), -(-EXAMPLES // len(tasks))
    parts = [
        f"<h3 class='sub'>{escape(task)} <span class='muted'>({min(most, len(places))} of {len(places)} answers, those "
        f"that differ most first)</span></h3>"
        + "".join(_example(comparison.pairs[place], names) for place in places[:most])
        for task, places in tasks.items()
    ]
    return f"<section><h2>Where {better} is better</h2>{''.join(parts)}</section>"


def _example(pair: tuple[Mapping[str, Any], Mapping[str, Any]], names: tuple[str, str]) -> str:
    row = pair[0]
    head = f"<p class='small muted'>{escape(row['sample'])}</p>"
    if row["task"] != "transcribe":
        head += f"<p>{escape(row['reference'])}</p>"
    answers = "".join(_answer(*one) for one in zip(pair, names, ("first", "second"), strict=True))
    return f"<div class='example'>{head}{answers}</div>"


def _answer(row: Mapping[str, Any], name: str, which: str) -> str:
    title = f"<p class='small'><span class='name-{which}'>{escape(name)}</span>"
    if row["task"] == "transcribe":
        words = "".join(
            f"<span class='word{'' if word['kind'] == 'equal' else ' error ' + word['kind']}'>"
            f"<span>{escape(word['reference']) or '&nbsp;'}</span>"
            f"<span>{escape(word['given']) or '&nbsp;'}</span></span>"
            for word in align(row["reference"], row["answer"], _rules(row))
        )
        return f"{title}</p><div class='words'>{words}</div>"
    mark = "" if "right" not in row else "✓ " if row["right"] else "✗ "
    return f"{title} {mark}{escape(row['answer']) or '(nothing)'}</p>"


def _rules(row: Mapping[str, Any]) -> Rules:
    """The rules by which a row's words were counted, from the name of its normaliser."""
    name = str(row.get("normaliser", ""))
    if name.startswith("none"):
        return Rules("none")
    if " English" in name:
        return Rules("english", marks="marks kept" in name)
    if " basic" in name:
        return Rules("characters" if name.endswith("characters") else "words", turkish="Turkish case" in name)
    return rules_for([row["reference"]])[0]
