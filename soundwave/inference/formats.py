"""Write transcripts in the formats of OpenAI's API and of Whisper's command: pure functions from times to text.

| format | what it is |
|---|---|
| text | the words on one line |
| json | `{"text": …}` |
| verbose_json | text, duration, language, and the segments and words that the transcript has |
| srt, vtt | subtitles: SubRip and WebVTT |
| tsv | start and end in milliseconds, and the text, of each segment |
"""

import json
import re
import zlib
from typing import Any

from soundwave.inference.transcript import Segment, Transcript

FORMATS = ("text", "json", "verbose_json", "srt", "vtt", "tsv")
TIMED = ("verbose_json", "srt", "vtt", "tsv")  # these need a transcript with times
ENDINGS = {"text": ".txt", "json": ".json", "verbose_json": ".json", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv"}
UNKNOWN_LANGUAGE = "und"  # ISO 639: undetermined
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
ARROW = re.compile("--+>")  # between the times of a cue; in its text it would end the cue


def check_format(format: str) -> None:
    """ValueError: `format` is none of `FORMATS`."""
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}, but it must be one of {', '.join(FORMATS)}")


def render(transcript: Transcript, format: str, *, language: str | None = None) -> str:
    """A transcript as the text of a file, which ends with a line's end.

    Args:
        format: one of `FORMATS`. srt, vtt and tsv need segments; verbose_json needs segments or words.
        language: what verbose_json calls the language; "und" (undetermined) without it, since the model does not tell.

    Raises:
        ValueError: another format, or the transcript has no times.
    """
    check_format(format)
    if format == "text":
        return f"{one_line(transcript.text)}\n"
    if format == "json":
        return f"{json.dumps({'text': transcript.text}, ensure_ascii=False)}\n"
    if transcript.segments is None and not (format == "verbose_json" and transcript.words is not None):
        raise ValueError(f'format = {format!r}, but the transcript has no times; transcribe with timestamps="segment"')
    if format == "verbose_json":
        return f"{json.dumps(verbose(transcript, language), ensure_ascii=False)}\n"
    segments = transcript.segments or ()
    if format == "srt":
        return "".join(srt_cue(number, segment) for number, segment in enumerate(segments, 1))
    if format == "vtt":
        return "WEBVTT\n\n" + "".join(map(vtt_cue, segments))
    return "start\tend\ttext\n" + "".join(map(tsv_row, segments))


def verbose(transcript: Transcript, language: str | None = None) -> dict[str, Any]:
    """What verbose_json holds; `segments` and `words` are there if the transcript has them.

    Of a segment's fields, `temperature` is 0 because decoding is greedy, and `no_speech_prob` because nothing estimates
    it: silence is found before the model reads. `seek` is the begin of the window in frames of 10 ms.
    """
    found: dict[str, Any] = {
        "task": "transcribe",
        "language": language or UNKNOWN_LANGUAGE,
        "duration": transcript.seconds,
        "text": transcript.text,
    }
    if transcript.segments is not None:
        found["segments"] = [
            {
                "id": number,
                "seek": round(segment.window * 100),
                "start": segment.start,
                "end": segment.end,
                "text": segment.text,
                "tokens": list(segment.tokens),
                "temperature": 0.0,
                "avg_logprob": segment.avg_logprob,
                "compression_ratio": _compression(segment.text),
                "no_speech_prob": 0.0,
            }
            for number, segment in enumerate(transcript.segments)
        ]
    if transcript.words is not None:
        found["words"] = [{"word": word.word, "start": word.start, "end": word.end} for word in transcript.words]
    return found


def srt_cue(number: int, segment: Segment) -> str:
    """A cue of SubRip, the blank line behind it included. The format has no escapes: an arrow gets shorter."""
    text = ARROW.sub("->", one_line(segment.text))
    return f"{number}\n{clock(segment.start, ',')} --> {clock(segment.end, ',')}\n{text}\n\n"


def vtt_cue(segment: Segment) -> str:
    """A cue of WebVTT, the blank line behind it included. `&`, `<` and `>` are escaped."""
    text = one_line(segment.text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{clock(segment.start, '.')} --> {clock(segment.end, '.')}\n{text}\n\n"


def tsv_row(segment: Segment) -> str:
    """Start and end in milliseconds, and the text, with tabs between them."""
    return f"{round(segment.start * 1000)}\t{round(segment.end * 1000)}\t{one_line(segment.text)}\n"


def clock(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds behind `point`; 100 hours and more have more digits."""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def one_line(text: str) -> str:
    """A text on one line, without control characters: a blank line would end a cue."""
    return CONTROL.sub("", " ".join(text.split()))


def _compression(text: str) -> float:
    """How many times shorter zlib makes a text: far above 2 if a model repeats itself. As in Whisper."""
    encoded = text.encode()
    return round(len(encoded) / len(zlib.compress(encoded)), 3) if encoded else 0.0
