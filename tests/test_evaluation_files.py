"""Evaluations of recordings that are long, damaged, silent or missing: each ends with a score, and says what it lost.

recording                      transcription         another task            --strict
30 s and up to 159 samples     one piece             heard whole             read
longer                         in pieces             first 30 s, named       read
missing, empty, no audio       left out, named       left out, named         stops before the first answer
cut, damaged within            left out, named       left out, named         stops before the first answer
silent, too short, NaN         left out, named       left out, named         stops before the first answer
ends before its offset         left out, named       left out, named         stops before the first answer
"""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import soundwave
from soundwave.curation.espeak import Espeak
from soundwave.data.audio import LONGEST_SAMPLES, SAMPLING_RATE, AudioError
from soundwave.data.manifest import Sample, read_manifest, write_manifest
from soundwave.evaluation import progress, run
from soundwave.evaluation.listening import Heard, _clips
from tests import processes

BAD = {
    "missing": "does not exist",
    "empty": "is an empty file",
    "text": "cannot be decoded|no audio|not audio",
    "cut": "cannot be decoded|cut short|ends after",
    "damaged": "cannot be decoded|damaged",
    "silent": "is silent, but its text is 'turn on the light'",
    "short": "lasts 5 ms, too short for speech",
    "hurried": "lasts 0.1 s, too short for its text",
    "nan": "holds NaN",
    "loud": "samples up to|not finite|infinite|export it again",
    "beyond": "the file lasts",
}


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """A sentence, float32 [samples] at 16 kHz."""
    with Espeak() as espeak:
        samples, rate = espeak.synthesize("turn on the light")
    return np.interp(np.arange(0, len(samples), rate / SAMPLING_RATE), np.arange(len(samples)), samples).astype("f4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speech) -> Path:
    """Recordings of every kind, and manifests: `bad.jsonl` with all of BAD between two good ones, `long.jsonl`."""
    folder = tmp_path_factory.mktemp("files")
    soundfile.write(folder / "good.wav", speech, SAMPLING_RATE)
    for name, length in (("thirty", LONGEST_SAMPLES), ("more", LONGEST_SAMPLES + 1), ("long", 40 * SAMPLING_RATE)):
        soundfile.write(folder / f"{name}.wav", np.resize(speech, length), SAMPLING_RATE)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("turn on the light\n" * 100)
    soundfile.write(folder / "whole.flac", np.resize(speech, 65 * SAMPLING_RATE), SAMPLING_RATE)
    whole = bytearray((folder / "whole.flac").read_bytes())
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    whole[-len(whole) // 8 : -len(whole) // 9] = bytes(len(whole) // 8 - len(whole) // 9)
    (folder / "damaged.flac").write_bytes(whole)
    soundfile.write(folder / "silent.wav", np.zeros(SAMPLING_RATE), SAMPLING_RATE)
    soundfile.write(folder / "short.wav", speech[2000:2080], SAMPLING_RATE)
    soundfile.write(folder / "hurried.wav", speech[2000:3600], SAMPLING_RATE)
    soundfile.write(folder / "nan.wav", np.where(np.arange(len(speech)) == 99, np.nan, speech), SAMPLING_RATE, "FLOAT")
    soundfile.write(folder / "loud.wav", speech * np.float32(1e25), SAMPLING_RATE, "FLOAT")
    names = {"cut": "cut.flac", "damaged": "damaged.flac", "beyond": "good.wav"}
    rows = [{"audio_filepath": names.get(kind, f"{kind}.wav"), "text": "turn on the light"} for kind in BAD]
    rows[-1]["offset"] = 60.0
    good = {"audio_filepath": "good.wav", "text": "turn on the light"}
    write_manifest(folder / "bad.jsonl", [good, *rows, good])
    asked = {"task": "voice", "prompt": "Is it (A) male or (B) female?", "answer": "(A)"}
    long = [{"audio_filepath": f"{name}.wav", "text": "turn on the light"} for name in ("thirty", "more", "long")]
    write_manifest(folder / "long.jsonl", [*long, *(row | asked for row in long)])
    return folder


@pytest.fixture(scope="module")
def loaded(model_folders):
    return {stage: soundwave.load(model_folders[stage]) for stage in (1, 3)}


def score(loaded, samples, stage, **settings):
    if stage == 1:
        return run.evaluate_ctc(*loaded[1], samples, **settings)
    return run.evaluate(*loaded[3], samples, max_new_tokens=3, **settings)


def bad_samples(folder) -> list[Sample]:
    """The samples of `bad.jsonl`, those of missing and empty files too, which `read_manifest` would not give."""
    samples = {}
    read = read_manifest(folder / "bad.jsonl", leave_out=lambda identity, name, fault: samples.update({identity: name}))
    gone = [read[0].model_copy(update={"id": i, "audio": folder / name}) for i, name in samples.items()]
    return sorted([*read, *gone], key=lambda sample: int(sample.id.rpartition(":")[2]))


# ---------------------------------------------------------------- long recordings


def test_a_recording_over_thirty_seconds_is_transcribed_in_the_pieces_of_transcribe(loaded, folder):
    samples = read_manifest(folder / "long.jsonl")[:3]
    for stage in (1, 3):
        found = score(loaded, samples, stage, batch_size=1)  # a text depends on its batch in half precision
        assert (
            found.in_pieces == ["long.jsonl:2", "long.jsonl:3"]
            and found.left_out == []
            and found.samples == {"transcribe": 3}
        )
        limit = {} if stage == 1 else {"max_new_tokens": 3}
        for sample, (*_, given) in zip(samples, found.answers, strict=True):
            with warnings.catch_warnings(action="ignore"):  # that the text is cut off
                assert given.split() == soundwave.transcribe(sample.audio, loaded[stage], **limit).text.split()


def test_for_another_task_the_first_thirty_seconds_are_heard_and_the_others_are_told(loaded, folder, capsys):
    samples = read_manifest(folder / "long.jsonl")[3:]
    found = score(loaded, samples, 3, batch_size=1)
    assert found.first_window == ["long.jsonl:5", "long.jsonl:6"] and found.in_pieces == []
    told = "recordings of which only the first 30 s were heard: 2, of long.jsonl:5, long.jsonl:6"
    assert told in capsys.readouterr().err.splitlines()
    for sample, (*_, given) in zip(samples, found.answers, strict=True):
        with warnings.catch_warnings(action="ignore"):  # that the answer is cut off
            assert given == soundwave.ask(sample.audio, sample.prompt, loaded[3], max_new_tokens=3).text


def test_memory_does_not_grow_with_the_recording(loaded, folder, speech, tmp_path):
    peaks = []
    for minutes in (2, 6):
        file = tmp_path / f"{minutes}.flac"
        soundfile.write(file, np.resize(speech, minutes * 60 * SAMPLING_RATE), SAMPLING_RATE)
        sample = Sample(id="1", audio=file, text="a", answer="a")
        tracemalloc.start()
        count = sum(1 for _ in _clips(sample, "a", loaded[1].processor, Heard(0), to_the_end=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count >= 2 * minutes
    assert peaks[1] < 1.1 * peaks[0]


# ---------------------------------------------------------------- recordings that cannot be used


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bad_recording_is_left_out_and_named_and_the_others_are_scored(loaded, folder, capsys, stage):
    samples = bad_samples(folder)
    found = score(loaded, samples, stage, batch_size=3)
    assert found.samples == {"transcribe": 2} and [row[0] for row in found.answers] == ["bad.jsonl:1", "bad.jsonl:13"]
    assert [left.sample for left in found.left_out] == [f"bad.jsonl:{place}" for place in range(2, 13)]
    for left, (kind, fault), sample in zip(found.left_out, BAD.items(), samples[1:], strict=False):
        assert re.search(fault, left.reason) or kind in ("missing", "empty"), left
        assert left.file == str(sample.audio)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line for line in lines if line.startswith("left out")) == sorted(
        f"left out: {left}" for left in found.left_out
    )
    alone = score(loaded, [samples[0], samples[-1]], stage, batch_size=3)
    assert (alone.answers, alone.wer, alone.blank_share) == (found.answers, found.wer, found.blank_share)


@pytest.mark.parametrize("kind", BAD)
def test_strict_stops_before_the_first_answer(loaded, folder, monkeypatch, kind):
    monkeypatch.setattr(run, "answer", lambda *_, **__: pytest.fail("an answer was made"))
    samples = bad_samples(folder)
    bad = samples[1 + list(BAD).index(kind)]
    with pytest.raises(AudioError, match=rf"^{bad.id}: .*{bad.audio.name}: "):
        score(loaded, [samples[0], bad], 3, strict=True)


def test_strict_hears_what_lies_behind_the_first_window(loaded, folder, speech):
    late = np.resize(speech, 70 * SAMPLING_RATE)
    late[-1000:] = np.nan
    soundfile.write(folder / "late.wav", late, SAMPLING_RATE, "FLOAT")
    task = {"id": "1", "audio": folder / "late.wav", "task": "voice", "prompt": "Is it a man?", "answer": "yes"}
    with pytest.raises(AudioError, match="^1: .*late.wav: holds NaN"):
        score(loaded, [Sample(**task)], 3, strict=True)
    assert score(loaded, [Sample(**task)], 3).first_window == ["1"]
    spoken = Sample(**task | {"task": "transcribe"})
    good = spoken.model_copy(update={"id": "2", "audio": folder / "good.wav"})
    for batch_size in (1, 8):  # the windows before the fault are answered, or wait for their batch
        found = score(loaded, [spoken, good], 3, batch_size=batch_size)
        assert [left.sample for left in found.left_out] == ["1"] and found.samples == {"transcribe": 1}


@pytest.mark.parametrize("stage", [1, 3])
def test_nothing_that_can_be_used_is_an_error_that_says_why(loaded, folder, stage):
    samples = bad_samples(folder)[1:-1]
    with pytest.raises(ValueError, match=r"no sample can be used; the first: bad.jsonl:2: .*missing.wav: does not"):
        score(loaded, samples, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_transcripts_without_words_are_left_out_and_named(loaded, folder, stage):
    good = read_manifest(folder / "long.jsonl")[0].model_copy(update={"audio": folder / "good.wav"})
    wordless = good.model_copy(update={"id": "2", "text": "[laughs]", "answer": "[laughs]"})
    found = score(loaded, [wordless, good], stage)
    assert [(left.sample, left.reason) for left in found.left_out] == [
        ("2", "its text '[laughs]' has no words, so it has no word error rate")
    ]
    assert found.samples == {"transcribe": 1}


def test_many_samples_left_out_are_counted_after_the_first(loaded, folder, capsys):
    good, bad = bad_samples(folder)[:2]
    found = score(loaded, [good, *[bad.model_copy(update={"id": f"{i}"}) for i in range(progress.NAMED + 5)]], 1)
    assert len(found.left_out) == progress.NAMED + 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == progress.NAMED + 1 and lines[-1].endswith("more samples, which the scores list (left_out)")


# ---------------------------------------------------------------- answers


def choices(count: int) -> list[Sample]:
    return [
        Sample(id=str(i), audio=None, task="choice", prompt="Is it (A) male or (B) female?", answer="(A)")
        for i in range(count)
    ]


def test_rows_come_with_their_batches_and_say_what_became_of_the_answer(monkeypatch):
    said = iter([["A", "B."], ["perhaps", ""], ["It is male."]])
    rows, batches = [], []

    def answer(model, processor, prompts, audio, *, max_new_tokens, cut_off, draft):
        assert draft == "none"  # CTC reads no answers
        batches.append(len(rows))
        cut_off += [1] if len(batches) == 1 else []
        return next(said)

    monkeypatch.setattr(run, "answer", answer)
    model = type("Model", (), {"eval": lambda self: None})()
    found = run.evaluate(model, None, choices(5), batch_size=2, each=rows.append)
    assert batches == [0, 2, 4]  # the rows of a batch are given before the next one is answered
    assert [row["option"] for row in rows] == ["A", "B", None, None, "A"]
    assert [row["cut_off"] for row in rows] == [False, True, False, False, False]
    assert {row["normaliser"] for row in rows} == {"soundwave answers 2"} == set(found.normaliser.values())
    assert found.accuracy == {"choice": 2 / 5} and found.unparsed == {"choice": 2} and found.cut_off == ["1"]


def test_languages_come_from_the_sample_unless_one_is_given(monkeypatch, loaded, folder):
    monkeypatch.setattr(run, "answer", lambda model, processor, prompts, audio, **_: ["qiz"] * len(prompts))
    sample = Sample(id="1", audio=folder / "good.wav", text="QIZ", answer="QIZ")
    for more, language, wer in (({}, None, 0), ({"target_lang": "az"}, None, 1), ({}, "tr", 1),
                                ({"target_lang": "az"}, "en", 0), ({"extra": {"lang": "az"}}, None, 1),
                                ({"source_lang": "na"}, None, 0)):  # fmt: skip
        found = run.evaluate(*loaded[3], [sample.model_copy(update=more)], language=language)
        assert found.wer == wer, (more, language)
    with pytest.raises(ValueError, match="language = 'Klingonish'"):
        run.evaluate(*loaded[3], [sample], language="Klingonish")


def test_scripts_without_spaces_have_a_character_error_rate(monkeypatch, loaded, folder):
    monkeypatch.setattr(run, "answer", lambda model, processor, prompts, audio, **_: ["你好世"] * len(prompts))
    texts = ["你好世界", "turn it on"]
    samples = [Sample(id=text, audio=folder / "good.wav", text=text, answer=text) for text in texts]
    found = run.evaluate(*loaded[3], samples)
    assert (found.cer, found.wer) == (1 / 4, 1) and found.samples == {"transcribe": 2}
    assert found.normaliser["transcribe"].count("(1 samples)") == 2
    assert found.text_of("transcribe") == "WER 100.0% · CER 25.0%"
    found = run.evaluate(*loaded[3], samples[:1])
    assert (found.cer, found.wer) == (1 / 4, None) and found.text_of("transcribe") == "CER 25.0%"


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(soundwave):
    """Runs `soundwave evaluate` in this process and returns exit status, stdout and stderr."""
    return lambda *words: soundwave("evaluate", *words)


def test_the_command_scores_what_it_can_and_says_what_it_left_out(command, folder, model_folders, tmp_path):
    answers = tmp_path / "a.jsonl"
    words = (folder / "bad.jsonl", "--model", model_folders[3], "--max-new-tokens", "2", "--answers", answers)
    status, out, err = command(*words, "--json")
    scores = json.loads(out)
    assert status == 0, err
    assert scores["samples"] == {"transcribe": 2} and len(scores["left_out"]) == len(BAD)
    assert {left["sample"] for left in scores["left_out"]} == {f"bad.jsonl:{place}" for place in range(2, 13)}
    assert all(f"{left['sample']}: {left['file']}: " in err for left in scores["left_out"])
    assert scores["normaliser"]["transcribe"].startswith("whisper_normalizer 0.1.15 English")
    assert scores["cut_off"] == ["bad.jsonl:1", "bad.jsonl:13"] and "answers cut off at the token limit: 2" in err
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["sample"] for row in rows] == ["bad.jsonl:1", "bad.jsonl:13"] and rows[0]["cut_off"]
    assert rows[0]["normaliser"] == scores["normaliser"]["transcribe"]
    status, out, err = command(*words, "--strict")
    assert (status, out) == (1, "") and f"{folder}/bad.jsonl:2: " in err.splitlines()[-1]
    assert [json.loads(line) for line in answers.read_text().splitlines()] == rows  # no answer replaced them
    status, out, _ = command(*words, "--ctc")
    assert status == 0 and "left out: 11 of 13 samples" in out and "0.1.15" in out


def test_answers_never_replace_what_is_read(command, folder, tmp_path, model_folders):
    audio = tmp_path / "a.wav"
    audio.write_bytes((folder / "good.wav").read_bytes())
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [{"audio_filepath": "a.wav", "text": "turn on the light"}])
    for file in (manifest, audio):
        before = file.read_bytes()
        status, _, err = command(manifest, "--model", model_folders[1], "--answers", file)
        assert status == 1 and f"error: {file}: is read by this evaluation; name another file" in err
        assert file.read_bytes() == before


def test_a_sample_without_a_text_is_named_as_such(loaded, folder):
    good = read_manifest(folder / "long.jsonl")[0].model_copy(update={"audio": folder / "good.wav"})
    found = score(loaded, [good.model_copy(update={"id": "2", "text": None, "answer": "x"}), good], 1)
    assert [left.reason for left in found.left_out] == ["has no text, so it has no word error rate"]


def test_options_reach_the_evaluation(command, folder, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "soundwave.cli.common.load_model", lambda *_, **__: (SimpleNamespace(config=SimpleNamespace(stage=3)), None)
    )
    monkeypatch.setattr(run, "evaluate", lambda *_, **settings: given.update(settings) or run.Scores())
    assert command(folder / "long.jsonl", "--language", "tr", "--quiet", "--strict")[0] == 0
    assert (given["language"], given["progress"], given["strict"]) == ("tr", None, True)
    assert command(folder / "long.jsonl")[0] == 0
    assert (given["language"], given["progress"], given["strict"]) == (None, "evaluating long.jsonl", False)
    status, _, err = command(folder / "long.jsonl", "--language", "Klingonish")
    assert status == 1 and err.startswith("error: language = 'Klingonish'")


def test_a_killed_evaluation_leaves_the_answers_that_it_had(folder, model_folders, tmp_path):
    answers = tmp_path / "a.jsonl"
    rows = [{"audio_filepath": "good.wav", "text": "turn on the light"}] * 400
    write_manifest(folder / "many.jsonl", rows)
    words = [
        "many.jsonl",
        "--model",
        model_folders[3],
        "--batch-size",
        "1",
        "--answers",
        answers,
        "--max-new-tokens",
        "9",
    ]
    command = [processes.SCRIPT, "evaluate", *map(str, words)]
    with processes.Popen(command, cwd=folder, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (answers.exists() and answers.read_bytes().count(b"\n") > 1):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    lines = answers.read_text().splitlines()
    assert 1 < len(lines) < 400 and all(json.loads(line)["sample"] for line in lines[:-1])


def test_progress_is_a_bar_on_a_terminal():
    code = "from soundwave.evaluation.progress import *\nwith Progress({}, 2) as p: p.step(), say('a'), p.step()"
    for title, shown in (("'scoring'", True), ("None", False)):
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        subprocess.run([sys.executable, "-c", code.format(title)], stderr=follower, check=True)
        os.close(follower)
        said = os.read(leader, 10_000).decode()
        os.close(leader)
        assert ("scoring: 100%" in said and "2/2" in said) is shown and "a\r\n" in said


def test_what_is_printed_aside_is_not_on_the_line_of_the_bar():
    code = "from soundwave.evaluation.progress import *\nwith Progress('reading', 60, unit='second') as p:"
    code += "\n    p.go_to(30)\n    with aside(): print('words', flush=True)\n    p.go_to(60)"
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", code], stdout=follower, stderr=follower, check=True)
    os.close(follower)
    said = os.read(leader, 10_000).decode()
    os.close(leader)
    before, _, after = said.partition("words\r\n")
    assert "reading:   0%" in before and before.endswith(" \r") and "60/60" in after and "second/s" in after


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINES_APART", 0.0)
    with progress.Progress("scoring", 3) as shown:
        for _ in range(3):
            shown.step()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" | ")[0] for line in lines] == [f"scoring | sample {i}/3" for i in (1, 2, 3)]
    with progress.Progress("scoring", 100) as shown:
        for _ in range(5):
            shown.step()
    told = ["left" in line for line in capsys.readouterr().err.splitlines()]
    assert told == [False, False, False, False, True]  # not from the first sample of a batch
    with progress.Progress(None, 1) as shown:
        shown.step()
    assert capsys.readouterr().err == ""
