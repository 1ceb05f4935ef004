"""The page of `soundwave data check`: what a manifest holds and what is wrong with it, with sound."""

import base64
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from soundwave.curation.check import EDGES, FAULTS, REMARKS, Checked, Finding
from soundwave.curation.sounds import Part
from soundwave.data.audio import LONGEST_SECONDS, SAMPLING_RATE, AudioError, load_audio, shown
from soundwave.report.page import page_of
from soundwave.report.utterances import audio_uri

SCRIPTS = ("charts.js", "frame.js", "checked.js")
HEARD = 4  # findings of a kind that can be listened to
LISTED = 1000  # findings of a kind that are listed; the command prints all
COLUMNS = 400  # of the envelope of a recording


def write_page(checked: Checked, out: str | Path) -> Path:
    """Write the page and return `out`, whose folder is made if it does not exist."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(shown(checked.manifest.name), _data(checked), SCRIPTS), encoding="utf-8")
    return out


def _data(checked: Checked) -> dict[str, Any]:
    total, coverage = checked.total, checked.coverage
    return {
        "runs": [],  # the charts of a report have none to draw
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "name": shown(checked.manifest.name),
        "manifest": shown(checked.manifest),
        "lines": checked.lines,
        "samples": checked.samples,
        "recordings": total.recordings,
        "hours": total.seconds / 3600,
        "faults": len(checked.faults),
        "remarks": len(checked.findings) - len(checked.faults),
        "tasks": [
            {"name": name, "samples": one.samples, "hours": one.seconds / 3600, "words": one.words}
            for name, one in sorted(checked.tasks.items(), key=lambda item: -item[1].samples)
        ],
        "lengths": [
            {"name": f"over {start} s" if stop is None else f"{start} to {stop} s", "count": count}
            for start, stop, count in zip(EDGES, [*EDGES[1:], None], checked.lengths, strict=True)
        ],
        "rates": [{"rate": rate, "count": count} for rate, count in sorted(checked.rates.items())],
        "texts": checked.texts,
        "tokenizer": None
        if coverage is None or not coverage.texts
        else {
            "name": coverage.name,
            "vocabulary": coverage.vocabulary,
            "used": len(coverage.used),
            "tokens": coverage.tokens / coverage.texts,
            "characters": coverage.characters / max(1, coverage.tokens),
            "unknown": checked.count("unknown"),
        },
        "findings": [
            _kind(name, what, name in FAULTS, [finding for finding in checked.findings if finding.kind == name])
            for name, what in (FAULTS | REMARKS).items()
            if checked.count(name)
        ],
        "spread": [
            {"place": sample.id, "text": sample.text or "", "task": sample.task, "prompt": sample.prompt or ""}
            | ({} if sample.task == "transcribe" else {"answer": sample.answer or ""})
            | _sound(Part(str(sample.audio), sample.offset, sample.duration))
            for sample in checked.spread
        ],
    }


def _kind(name: str, what: str, is_fault: bool, findings: list[Finding]) -> dict[str, Any]:
    heard = [finding for finding in findings if finding.part is not None][:HEARD]
    return {
        "name": name,
        "what": what,
        "fault": is_fault,
        "count": len(findings),
        "lines": [
            {"place": finding.place, "text": finding.text} | (_sound(finding.part) if finding in heard else {})
            for finding in findings[:LISTED]
        ],
    }


def _sound(part: Part | None) -> dict[str, Any]:
    """A recording for the page, its first 30 s; nothing if it cannot be read any more."""
    with suppress(AudioError):
        if part is not None:
            duration = None if part.duration is None else min(part.duration, LONGEST_SECONDS)
            audio = load_audio(part.audio, offset=part.offset, duration=duration)[
                : int(LONGEST_SECONDS * SAMPLING_RATE)
            ]
            edges = np.linspace(0, len(audio), min(COLUMNS, len(audio)), endpoint=False).astype(int)
            envelope = np.maximum.reduceat(np.abs(audio), edges)
            rows = np.rint(255 * np.clip(envelope / max(float(envelope.max()), 1e-9), 0, 1)).astype(np.uint8)
            return {
                "audio": audio_uri(audio),
                "seconds": len(audio) / SAMPLING_RATE,
                "peak": float(envelope.max()),
                "envelope": base64.b64encode(rows.tobytes()).decode(),
            }
    return {}
