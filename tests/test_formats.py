"""Formats of transcripts: OpenAI's and Whisper's shapes, read back by rules of each format."""

import json
import pickle
import re

import pytest

from soundwave.inference.formats import ENDINGS, FORMATS, TIMED, clock, one_line, render
from soundwave.inference.transcript import Segment, Transcript, Word

WORDS = (Word("Turn", 0.2, 0.4, 0.9), Word("on", 0.4, 0.56, 0.8), Word("now.", 3.0, 3.44, 0.7))
SEGMENTS = (
    Segment("Turn on", 0.2, 0.56, (11, 12), -0.25, 0.0),
    Segment("now.", 3.0, 3661.5, (13,), -0.5, 3.0),
)
TRANSCRIPT = Transcript("Turn on now.", 3662.0, WORDS, SEGMENTS)


def with_text(text: str) -> Transcript:
    return Transcript(text, 2.0, None, (Segment(text, 0.5, 1.5),))


def test_a_transcript_is_still_a_tuple_of_text_and_seconds():
    text, seconds = TRANSCRIPT
    assert (text, seconds) == TRANSCRIPT == ("Turn on now.", 3662.0) and len(TRANSCRIPT) == 2
    assert repr(TRANSCRIPT) == "Transcript(text='Turn on now.', seconds=3662.0)" and str(TRANSCRIPT) == text
    copied = pickle.loads(pickle.dumps(TRANSCRIPT))
    assert (copied.words, copied.segments) == (WORDS, SEGMENTS)
    plain = Transcript("a", 1.0)
    assert (plain.words, plain.segments) == (None, None)
    assert TRANSCRIPT._replace(text="b").words is None  # the times belong to the other text


def test_text_and_json_hold_the_words_only():
    assert render(TRANSCRIPT, "text") == "Turn on now.\n"
    assert json.loads(render(TRANSCRIPT, "json")) == {"text": "Turn on now."}
    assert render(Transcript("", 1.0), "text") == "\n"
    assert "ü" in render(Transcript("für", 1.0), "json")


def test_srt():
    assert render(TRANSCRIPT, "srt") == (
        "1\n00:00:00,200 --> 00:00:00,560\nTurn on\n\n2\n00:00:03,000 --> 01:01:01,500\nnow.\n\n"
    )


def test_vtt():
    assert render(TRANSCRIPT, "vtt") == (
        "WEBVTT\n\n00:00:00.200 --> 00:00:00.560\nTurn on\n\n00:00:03.000 --> 01:01:01.500\nnow.\n\n"
    )


def test_tsv():
    assert render(TRANSCRIPT, "tsv") == "start\tend\ttext\n200\t560\tTurn on\n3000\t3661500\tnow.\n"


def test_verbose_json_has_openai_s_fields():
    found = json.loads(render(TRANSCRIPT, "verbose_json", language="english"))
    assert set(found) == {"task", "language", "duration", "text", "segments", "words"}
    assert (found["language"], found["duration"], found["text"]) == ("english", 3662.0, "Turn on now.")
    assert found["words"][0] == {"word": "Turn", "start": 0.2, "end": 0.4}
    first, second = found["segments"]
    assert set(first) == {
        "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
        "no_speech_prob",
    }  # fmt: skip
    assert (first["id"], first["seek"], first["tokens"], first["avg_logprob"]) == (0, 0, [11, 12], -0.25)
    assert (second["id"], second["seek"], second["start"], second["end"]) == (1, 300, 3.0, 3661.5)
    assert json.loads(render(TRANSCRIPT, "verbose_json"))["language"] == "und"


def test_verbose_json_has_what_the_transcript_has():
    only_words = Transcript("Turn", 1.0, WORDS[:1], None)
    only_segments = Transcript("Turn", 1.0, None, SEGMENTS[:1])
    assert "segments" not in json.loads(render(only_words, "verbose_json"))
    assert "words" not in json.loads(render(only_segments, "verbose_json"))


@pytest.mark.parametrize("format", TIMED)
def test_a_transcript_without_times_says_how_to_get_them(format):
    with pytest.raises(ValueError, match=f"format = '{format}', but the transcript has no times; .*timestamps="):
        render(Transcript("a", 1.0), format)


@pytest.mark.parametrize("format", ["", "SRT", "docx", "jsonl"])
def test_an_unknown_format_names_the_known_ones(format):
    with pytest.raises(ValueError, match=f"format = '{format}', but it must be one of text, json, verbose_json, srt"):
        render(TRANSCRIPT, format)


@pytest.mark.parametrize("format", FORMATS)
def test_silence_gives_a_file_without_cues(format):
    text = render(Transcript("", 5.0, (), ()), format)
    assert (text.endswith("\n") or format == "srt") and "-->" not in text
    assert ENDINGS[format].startswith(".")


# ---------------------------------------------------------------- texts that could break a format

NASTY = [
    "a --> b", "a ---> b", "1\n00:00:00,000 --> 00:00:09,000\nforged", "line\r\n\r\nline", "a\tb", "\x00\x1b[31mred",
    "<b>bold</b> & <v Bob>", "&amp;", "WEBVTT", "NOTE no comment", "\u2028x\u2029y\x85z", "שלום \u200f, مرحبا",
    "日本語 です", "👩\u200d🚀 up", '"quoted"', "  padded  ", "7",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_breaks_a_cue(text):
    srt = render(with_text(text), "srt")
    assert re.fullmatch(r"1\n00:00:00,500 --> 00:00:01,500\n([^\n]+)\n\n", srt)
    assert srt.count("-->") == 1
    vtt = render(with_text(text), "vtt")
    cue = re.fullmatch(r"WEBVTT\n\n00:00:00\.500 --> 00:00:01\.500\n([^\n]+)\n\n", vtt)
    assert vtt.count("-->") == 1 and not re.search(r"[<>]|&(?!amp;|lt;|gt;)", cue[1])
    unescaped = cue[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert unescaped == one_line(text)
    head, row = render(with_text(text), "tsv").splitlines()
    assert row.split("\t") == ["500", "1500", one_line(text)] and head == "start\tend\ttext"
    assert render(with_text(text), "text").count("\n") == 1
    assert json.loads(render(with_text(text), "verbose_json"))["segments"][0]["text"] == text


def test_what_joins_letters_and_signs_is_kept():
    assert one_line("👩\u200d🚀 \u200fa") == "👩\u200d🚀 \u200fa"


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(0, "00:00:00.000"), (0.0004, "00:00:00.000"), (59.9996, "00:01:00.000"), (3599.9999, "01:00:00.000"),
     (360_000, "100:00:00.000"), (7265.25, "02:01:05.250")],
)  # fmt: skip
def test_clock(seconds, wanted):
    assert clock(seconds, ".") == wanted
