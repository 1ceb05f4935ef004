"""`soundwave data speak`: sentences of a file or of the real language model, spoken by the real eSpeak."""

import json
import time

import numpy as np
import pytest

from soundwave.curation import speak as module
from soundwave.curation.speak import VARIANTS, speak
from soundwave.data.audio import load_audio
from soundwave.data.manifest import read_manifest
from tests.killing import until_done

LINES = ["Turn on the light.", "the  kettle boils", "Mach das Licht an!"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeff".encode() + "\r\n".join([*LINES, "", " "]).encode())
    return file


def files_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_each_line_of_a_file_is_spoken_as_it_stands(text, tmp_path):
    told = []
    made = speak(tmp_path / "out", text=text, voices=["de", "en-us"], progress=lambda *what: told.append(what))
    samples = read_manifest(made.manifest)
    assert [sample.text for sample in samples] == [" ".join(line.split()) for line in LINES]
    for sample in samples:
        audio = load_audio(sample.audio)
        assert len(audio) / 16_000 == pytest.approx(sample.duration, abs=1e-3) and np.abs(audio).max() > 0.05
        voice, _, variant = sample.extra["speaker"].partition("+")
        assert voice in ("de", "en-us") and variant in VARIANTS
    assert (made.sentences, made.words) == (3, 10)
    assert made.seconds == pytest.approx(sum(sample.duration for sample in samples))
    assert told == [("sentences spoken", number, 3) for number in (1, 2, 3)]


def test_the_seed_decides_the_bytes(text, tmp_path):
    first, again, other = (
        files_of(speak(tmp_path / name, text=text, seed=seed).manifest.parent)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert {name for name in first if first[name] != other[name]} >= {name for name in first if name.suffix == ".flac"}


def test_every_variant_is_known_to_espeak():
    with module.Espeak() as espeak:
        for number, variant in enumerate(VARIANTS):
            voice = f"{module.ENGLISH[number % len(module.ENGLISH)]}+{variant}"
            assert len(espeak.speak("yes", voice=voice).samples) > 1000, voice


def test_the_same_command_makes_nothing_twice_and_another_one_is_refused(text, tmp_path):
    made = speak(tmp_path / "out", text=text)
    before = made.manifest.stat().st_mtime_ns
    assert not made.was_there and speak(tmp_path / "out", text=text) == made._replace(was_there=True)
    assert made.manifest.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds something already, not of this command"):
        speak(tmp_path / "out", text=text, seed=1)
    assert made.manifest.stat().st_mtime_ns == before


def test_after_an_end_the_same_command_goes_on_with_the_sentences_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 24)

    def ends(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_spoken", ends)
        with pytest.raises(KeyboardInterrupt):
            speak(tmp_path / "out", count=5)
    assert not (tmp_path / "out").exists()
    kept = (tmp_path / "out.partial" / "sentences.txt").read_text().splitlines()
    assert len(set(kept)) == len(kept) >= 5
    monkeypatch.setattr(module, "_writer", lambda _: pytest.fail("the language model was loaded again"))
    made = speak(tmp_path / "out", count=5)
    rows = [json.loads(line) for line in made.manifest.read_text().splitlines()]
    assert [row["text"] for row in rows] == kept[:5] and not (tmp_path / "out.partial").exists()
    assert all(row["text"] == row["text"].lower() and len(row["text"].split()) >= 3 for row in rows)
    assert not list(tmp_path.glob(".*.lock"))
    (tmp_path / "out").rename(tmp_path / "out.partial")
    assert speak(tmp_path / "out", count=4).sentences == 4  # of those that are there
    (tmp_path / "out").rename(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"out\.partial has sentences of another language model or seed; delete it"):
        speak(tmp_path / "out", count=4, seed=1)


def test_kills_leave_no_half_folder(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"sentence number {number}\n" for number in range(40)))
    begun = time.monotonic()
    whole = files_of(speak(tmp_path / "whole", text=tmp_path / "text.txt").manifest.parent)
    seconds = time.monotonic() - begun
    killed = until_done(lambda: speak(tmp_path / "out", text=tmp_path / "text.txt") and None, 20, 10 * seconds)
    assert killed >= 10 and files_of(tmp_path / "out") == whole


def test_two_commands_do_not_write_one_folder(tmp_path, text):
    with module._alone(tmp_path / "out"), pytest.raises(ValueError, match="is being written by another process"):
        speak(tmp_path / "out", text=text)
    speak(tmp_path / "out", text=text)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, text):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(ValueError, match=r"out\.partial holds something that is not of this command"):
        speak(tmp_path / "out", text=text)
    assert (tmp_path / "out.partial" / "mine").exists()


def test_a_language_model_that_repeats_itself_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_writer", lambda _: lambda seed: ["the same again"])
    with pytest.raises(ValueError, match="has written 1 different sentences and no more; use fewer"):
        speak(tmp_path / "out", count=2)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("\nThe Cat, which sat. On", "the cat which sat"),
        ("\nDon't go there!", "don't go there"),
        ("\nHe came home and sa", "he came home and"),
        ("\nHe came.", ""),
        ("\nIn 1999 it began.", ""),
        ("\nThe café is open.", ""),
        ("", ""),
    ],
)
def test_what_is_taken_of_what_was_written(written, sentence):
    assert module._sentence(written) == sentence


def test_what_cannot_be_spoken_is_one_line(tmp_path, text, soundwave):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("für dich da".encode("latin-1"))
    (tmp_path / "signs.txt").write_text("...\n")
    (tmp_path / "long.txt").write_text("word " * 300)
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    for words, fault in (
        ((out, "--text", tmp_path / "empty.txt"), "has 0 sentences, one a line, but 1 are wanted"),
        ((out, "--text", text, "--count", "4"), "has 3 sentences, one a line, but 4 are wanted"),
        ((out, "--text", tmp_path / "latin.txt"), "latin.txt: is no text in UTF-8 (byte 1); save it as UTF-8"),
        ((tmp_path / "s", "--text", tmp_path / "signs.txt"), "sentence 1, '...': eSpeak says nothing; take it out"),
        ((tmp_path / "l", "--text", tmp_path / "long.txt"), "sentence 1 lasts over 30 s; cut it in two"),
        ((tmp_path / "v", "--text", text, "--voice", "elvish"), "is not a voice of eSpeak NG"),
        ((tmp_path / "w", "--text", text, "--voice", "de+f3"), "'de+f3': name the language alone, since variants are"),
        ((out, "--voice", "de"), "--voice needs --text, since the language model writes English"),
        ((out, "--text", text, "--language-model", "x"), "--language-model writes sentences, but --text has them"),
        ((tmp_path / "file", "--text", text), "file holds something already, not of this command; name a new folder"),
    ):
        status, _, err = soundwave("data", "speak", *words)
        assert status == 1 and fault in err.splitlines()[-1], (words, err)
    assert not out.exists()
    (tmp_path / "signs.txt").write_text("three dots\n")  # mended, it is spoken
    assert soundwave("data", "speak", tmp_path / "s", "--text", tmp_path / "signs.txt", "--quiet")[0] == 0
    status, said, err = soundwave("data", "speak", out, "--text", text, "--quiet")
    assert (status, err) == (0, "")
    assert said.splitlines()[0].startswith("3 sentences · 10 different words · 0.00 hours")
