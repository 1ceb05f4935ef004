"""Measure what `soundwave curate` leaves out of a corpus of which a tenth of the transcripts were swapped.

    python bench/curation.py --lines 300                                   # speech that eSpeak NG synthesises
    python bench/curation.py --manifest my/train.jsonl --lines 300         # recordings with transcripts of your own

Of the synthetic corpus each line is two to four sentences in one of three plain voices, 3 to 15 s: the sentences of the
demonstration's grammar without its codes, and everyday questions. `--voices all` takes the demonstration's ten voices
instead, which Whisper-tiny hears badly. A tenth of the lines, drawn by the seed, get each other's transcripts. It
prints the share of the swapped lines and of the good ones that are left out, by reason, and how many seconds of audio
were transcribed in a second. With `--limits` the shares are printed for other word error rates, too; nothing is
transcribed again for them.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr

from soundwave import backbones
from soundwave.curation.curate import Filters, curate, limit_of
from soundwave.curation.espeak import Espeak
from soundwave.data.audio import SAMPLING_RATE
from soundwave.data.instructions import instructions
from soundwave.data.manifest import read_manifest, write_manifest
from soundwave.demo import corpus
from soundwave.demo.grammar import split_sentences

SWAPPED = 0.1
VOICES = {"plain": ["en-us", "en-gb-x-rp", "en"], "all": [*corpus.FEMALE, *corpus.MALE]}
WORDS_PER_MINUTE = 125, 155


def synthesise(folder: Path, lines: int, voices: list[str], rng: random.Random) -> list[dict]:
    """The rows of so many recordings, which are written to a folder."""
    kinds = split_sentences(rng)[0]
    sentences = [sentence.written for kind in kinds if kind != "code" for sentence in kinds[kind]] + instructions(400)
    rows = []
    with Espeak() as espeak:
        for number in range(lines):
            chosen = rng.sample(sentences, rng.randint(2, 4))
            rate = rng.randint(*WORDS_PER_MINUTE)
            spoken = espeak.speak(" ".join(chosen), voice=voices[number % len(voices)], rate=rate)
            samples = soxr.resample(spoken.samples, spoken.sampling_rate, SAMPLING_RATE)
            samples = np.pad(samples, (0, max(0, 3 * SAMPLING_RATE - len(samples))))
            soundfile.write(folder / f"{number:05d}.wav", samples, SAMPLING_RATE, subtype="PCM_16")
            row = {"audio_filepath": f"{number:05d}.wav", "duration": len(samples) / SAMPLING_RATE}
            rows.append(row | {"text": " ".join(chosen), "voice": voices[number % len(voices)]})
    return rows


def of_manifest(manifest: Path, lines: int, filters: Filters, rng: random.Random) -> list[dict]:
    """The rows of so many lines of a manifest, drawn from those that only their transcripts can put out."""
    found = [
        {"audio_filepath": str(sample.audio), "offset": sample.offset, "duration": sample.duration, "text": sample.text}
        for sample in read_manifest(manifest)
        if sample.text and sample.duration and not filters.fault(sample.text, sample.duration)
    ]
    return rng.sample(found, min(lines, len(found)))


def swap(rows: list[dict], rng: random.Random) -> None:
    """Give a tenth of the rows each other's transcripts, in a ring of different ones, and note it in `swapped`."""
    order = rng.sample(range(len(rows)), len(rows))
    ring: list[int] = []
    for number in order:
        texts = {rows[other]["text"].lower() for other in ring}
        if rows[number]["text"].lower() not in texts and len(ring) < max(2, round(SWAPPED * len(rows))):
            ring.append(number)
    texts = [rows[number]["text"] for number in ring]
    for row in rows:
        row["swapped"] = False
    for number, text in zip(ring, texts[1:] + texts[:1], strict=True):
        rows[number] |= {"text": text, "swapped": True}


def shares(curated) -> dict:
    """How many of the good and of the swapped lines there are, and how many are left out, by reason."""
    found = {name: {"lines": 0, "left_out": 0, "reasons": {}} for name in ("good", "swapped")}
    for file in (curated.kept, curated.left_out):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            which = found["swapped" if row["swapped"] else "good"]
            which["lines"] += 1
            if "reason" in row:
                which["left_out"] += 1
                which["reasons"][row["reason"]] = which["reasons"].get(row["reason"], 0) + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--voices", choices=VOICES, default="plain")
    parser.add_argument("--manifest", type=Path, help="recordings of your own, with a duration and a text each")
    parser.add_argument("--whisper", default=backbones.WHISPER)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limits", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder that stays, to look at; by default a temporary one")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.manifest:
            rows = of_manifest(arguments.manifest, arguments.lines, Filters(), rng)
        else:
            rows = synthesise(folder, arguments.lines, VOICES[arguments.voices], rng)
        swap(rows, rng)
        write_manifest(folder / "corpus.jsonl", rows)
        default = limit_of(arguments.whisper)
        for limit in sorted({default, *arguments.limits}, key=lambda limit: (limit != default, limit)):
            begin = time.monotonic()
            curated = curate(
                folder / "corpus.jsonl",
                filters=Filters(wer=limit),
                whisper=arguments.whisper,
                workers=arguments.workers,
                batch_size=arguments.batch_size,
                allow_outside=arguments.manifest is not None,
                progress="curating",
            )
            if curated.heard:
                print(
                    f"{curated.heard:.0f} s of audio in {curated.spent:.0f} s: "
                    f"{curated.heard / curated.spent:.1f} x real time (all: {time.monotonic() - begin:.0f} s)"
                )
            for name, found in shares(curated).items():
                share = found["left_out"] / max(found["lines"], 1)
                print(f"WER < {limit:.0%}: {name} left out {share:.1%} of {found['lines']}, {found['reasons']}")


if __name__ == "__main__":
    main()
