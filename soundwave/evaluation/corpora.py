"""Samples from local copies of public corpora: LibriSpeech, CoVoST 2, MELD, VocalSound.

The names of files come from the corpora's tables: one that leads out of its folder is refused.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from soundwave.data.audio import shown
from soundwave.data.forms import language_name
from soundwave.data.manifest import Sample, read_manifest

EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
VOCAL_SOUNDS = {
    "laughter": "laughter",
    "sigh": "sigh",
    "cough": "cough",
    "throatclearing": "throat clearing",
    "sneeze": "sneeze",
    "sniff": "sniff",
}
SOUND_PROMPT = f"Which sound does the person make: {', '.join(VOCAL_SOUNDS.values())}? Answer with the sound alone."
EMOTION_PROMPT = f"Which emotion does the speaker show: {', '.join(EMOTIONS)}? Answer with the emotion alone."


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` in `folder`.

    Raises:
        ValueError: it leads out of the folder, also through a link; `where` names the table that says so.
    """
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {shown(name)} leads out of {shown(folder)}; correct the table")
    return path


def folder_with(folder: Path, found: Iterable[str], name: str) -> Path:
    """The first of several files or folders that are there. FileNotFoundError: none of them is."""
    found = list(found)
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown(folder)}: is no folder; give --data the folder of {name}")
    for place in found:
        if (folder / place).exists():
            return folder / place
    raise FileNotFoundError(f"{shown(folder)}: holds no {' or '.join(found)}; give --data the folder of {name}")


def read_rows(file: Path, columns: Iterable[str], delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table with a header, each with its place. ValueError: a column or a cell is missing.

    In a table with tabs quotes are no marks, and a backslash stands before a character that is meant as such: so write
    and read the scripts of CoVoST 2 (get_covost_splits.py).
    """
    how: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "escapechar": "\\"} if delimiter == "\t" else {}
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        rows = csv.DictReader(opened, delimiter=delimiter, **how)
        for column in columns:
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"{shown(file)}: has no column {column}; give the corpus's own table")
        for row in rows:
            place = f"{shown(file)}:{rows.line_num}"
            for column in columns:
                if row[column] is None:
                    raise ValueError(f"{place}: lacks {column}; the file is cut short, copy it again")
            yield place, row


def read_librispeech(
    folder: Path, split: str, prompt: str | None, leave_out: Callable[[str, str, str], None] | None = None
) -> list[Sample]:
    """The recordings of a split of LibriSpeech, such as "test-clean".

    Args:
        prompt: replaces the usual one.
        leave_out: called with name, recording and fault of each recording that is missing; without it that is an error.
    """
    places = (split, f"LibriSpeech/{split}")
    root = folder if folder.name == split else folder_with(folder, places, "LibriSpeech")
    change = {"source_lang": "en", "prompt": prompt} if prompt else {"source_lang": "en"}
    return [sample.model_copy(update=change) for sample in read_manifest(root, leave_out=leave_out)]


def read_covost(folder: Path, source: str, target: str, prompt: str | None) -> list[Sample]:
    """The test set of a pair of languages of CoVoST 2. `prompt` replaces the usual one."""
    pair = f"{source}_{target}"
    tables = [f"{place}covost_v2.{pair}{part}.tsv" for place in ("", f"{source}/") for part in (".test", "")]
    table = folder_with(folder, tables, "CoVoST 2")
    clips = folder_with(folder, ("clips", f"{source}/clips"), "CoVoST 2")
    split = not table.name.endswith(".test.tsv")
    columns = ["path", "translation", *(["split"] if split else [])]
    prompt = prompt or f"Translate the speech into {language_name(target)}."
    languages = {"source_lang": source, "target_lang": target}
    samples = []
    for place, row in read_rows(table, columns, "\t"):
        if not split or row["split"] == "test":
            name = row["path"] if row["path"].endswith(".mp3") else f"{row['path']}.mp3"
            samples.append(
                Sample(
                    id=f"{table.name}:{place.rpartition(':')[2]}",
                    audio=inside(clips, name, place),
                    task="translate",
                    prompt=prompt,
                    answer=row["translation"],
                    **languages,
                )
            )
    return _any(samples, table)


def read_meld(folder: Path, prompt: str | None) -> list[Sample]:
    """The test set of MELD, with its seven emotions. `prompt` replaces the usual one."""
    table = folder_with(folder, ("test_sent_emo.csv", "test/test_sent_emo.csv"), "MELD")
    places = ("output_repeated_splits_test", "test/output_repeated_splits_test", "test", "audio", ".")
    recordings = folder_with(folder, places, "MELD")
    samples = []
    for place, row in read_rows(table, ("Emotion", "Dialogue_ID", "Utterance_ID"), ","):
        emotion = row["Emotion"].strip().lower()
        if emotion not in EMOTIONS:
            raise ValueError(f"{place}: Emotion = {row['Emotion']!r}, but MELD has {', '.join(EMOTIONS)}")
        stem = f"dia{row['Dialogue_ID'].strip()}_utt{row['Utterance_ID'].strip()}"
        files = [inside(recordings, f"{stem}{ending}", place) for ending in (".wav", ".flac", ".mp4")]
        samples.append(
            Sample(
                id=stem,
                audio=next((file for file in files if file.is_file()), files[-1]),
                task="emotion",
                prompt=prompt or EMOTION_PROMPT,
                answer=emotion,
                extra={"labels": list(EMOTIONS)},
            )
        )
    return _any(samples, table)


def read_vocalsound(folder: Path, prompt: str | None) -> list[Sample]:
    """The test set of VocalSound, with its six sounds. `prompt` replaces the usual one."""
    table = folder_with(folder, ("datafiles/te.json", "meta/te_meta.csv"), "VocalSound")
    recordings = folder_with(folder, ("audio_16k", "audio_44k", "data"), "VocalSound")
    samples = []
    for place, name in _names_of_vocalsound(table, recordings):
        stem = re.split(r"[/\\]", name)[-1].removesuffix(".wav")  # the table has its makers' own folders
        sound = VOCAL_SOUNDS.get(stem.rpartition("_")[2])
        if sound is None:
            raise ValueError(f"{place}: {shown(name)} names none of the sounds {', '.join(VOCAL_SOUNDS)}")
        samples.append(
            Sample(
                id=stem,
                audio=inside(recordings, f"{stem}.wav", place),
                task="vocal sound",
                prompt=prompt or SOUND_PROMPT,
                answer=sound,
                extra={"labels": list(VOCAL_SOUNDS.values())},
            )
        )
    return _any(samples, table)


def _names_of_vocalsound(table: Path, recordings: Path) -> Iterator[tuple[str, str]]:
    """The recordings of the test set: those that the list names, or those of the speakers that the table names."""
    if table.suffix == ".json":
        try:
            found = [entry["wav"].strip() for entry in json.loads(table.read_text(encoding="utf-8"))["data"]]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f'{shown(table)}: is no list of VocalSound, {{"data": [{{"wav": …}}]}}') from None
        yield from ((f"{shown(table)}, entry {number}", name) for number, name in enumerate(found, 1))
        return
    with open(table, encoding="utf-8", newline="") as opened:
        for number, row in enumerate(csv.reader(opened), start=1):
            if row and re.fullmatch(r"[fm]\d+", row[0].strip()):
                speaker = row[0].strip()  # each take has all sounds, so that one that is missing is told
                takes = {file.stem.rpartition("_")[0] for file in recordings.glob(f"{speaker}_*_*.wav")}
                for take in sorted(takes) or [f"{speaker}_0"]:
                    yield from ((f"{shown(table)}:{number}", f"{take}_{sound}.wav") for sound in VOCAL_SOUNDS)


def _any(samples: list[Sample], table: Path) -> list[Sample]:
    if not samples:
        raise ValueError(f"{shown(table)}: lists no recording of the test set")
    return samples
