"""Long recordings: windows that overlap lose and double no word, what is left out is read again, results go on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from soundwave.inference import reading
from soundwave.inference.answer import LoadedModel
from soundwave.inference.long import transcribe, transcribe_each
from soundwave.inference.reading import Text, Window, cut_into_windows, join, share_read, split, together
from soundwave.inference.results import FolderOfFiles, JsonLines, plan, settings_of
from soundwave.inference.timestamps import TimedWord, text_of
from soundwave.inference.transcript import Segment, Transcript
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

RATE = 16_000


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def timed(word: str, start: float, end: float) -> TimedWord:
    return TimedWord(word, start, end, (1,), 0.0, True)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("seconds", [0.0, 29.0, 30.0, 30.5, 31.5, 61.2, 100.0])
@pytest.mark.parametrize("block", [577, 10**7])
def test_windows_without_a_pause_share_three_seconds(seconds, block):
    audio = noise(seconds)
    found = list(cut_into_windows(audio[start : start + block] for start in range(0, len(audio), block)))
    assert found[0].before == found[-1].after == 0.0 and all(window.seconds <= 30.01 for window in found)
    for one, two in zip(found, found[1:], strict=False):
        assert one.after == two.before == 3.0 and one.start + one.seconds == pytest.approx(two.start + 3.0)
    parts = [window.samples[round(window.before * RATE) :] for window in found]
    np.testing.assert_array_equal(np.concatenate(parts), audio)


def test_a_pause_of_the_last_five_seconds_is_cut_in_its_middle():
    audio = noise(40)
    audio[round(26.0 * RATE) : round(26.3 * RATE)] *= 1e-3
    audio[round(28.0 * RATE) : round(28.5 * RATE)] *= 1e-3
    first, second = cut_into_windows(iter([audio]))
    assert first.seconds == pytest.approx(28.25, abs=0.011) and (first.after, second.before) == (0.0, 0.0)


# ---------------------------------------------------------------- seams


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("window", [8.0, 30.0])
def test_no_word_is_lost_or_doubled_at_a_seam(seed, window):
    """Windows hear the words inside of them, each at its own times; a word that an edge cuts is heard as another."""
    rng = np.random.default_rng(seed)
    words, now = [], 0.0
    while now < 100:
        length = rng.uniform(0.15, 0.7)
        words.append(timed(str(rng.choice(["five", "two", "the", "light", "now"])), now, now + length))
        now += length
    windows = list(cut_into_windows(iter([noise(now + 0.1)]), seconds=window, overlap=3.0))
    texts = []
    for each in windows:
        start, end = each.start, each.start + each.seconds
        heard = []
        for word in words:
            if word.end > start and word.start < end:
                inside = word.start >= start and word.end <= end
                shift = rng.normal(0, 0.03)
                heard.append(timed(word.word if inside else "?", word.start + shift, word.end + shift))
        texts.append(Text(text_of(heard), tuple(heard)))
    joined = join(windows, texts)
    assert len(windows) > 3 and all(each.before for each in windows[1:])
    assert joined.text == text_of(words) == text_of(joined.words)


def test_windows_that_hear_nothing_in_common_have_their_halves():
    before = Text("a b c", (timed("a", 26.0, 27.0), timed("b", 27.2, 28.0), timed("c", 29.0, 30.0)))
    after = Text("x y z", (timed("x", 27.1, 28.0), timed("y", 29.0, 29.9), timed("z", 33.0, 34.0)))
    windows = [Window(noise(30), 0.0, 0.0, 3.0), Window(noise(10), 27.0, 3.0, 0.0)]
    assert join(windows, [before, after]).text == "a b y z"


def test_windows_that_share_nothing_are_put_behind_each_other():
    assert join([Window(noise(1)), Window(noise(1), 1.0)], [Text("a b"), Text("")]) == Text("a b", None, False)


# ---------------------------------------------------------------- what the language model leaves out


@pytest.mark.parametrize(
    ("text", "by_ctc", "share"),
    [
        ("turn on the light", "turn on the light male slow", None),
        ("turn on the light", "turn on the light male slow set a timer", 4 / 9),
        ("turn on the light", "set a timer now please male turn on the light", 4 / 10),
        ("", "one two three four five", 0.0),
        ("Turn on", "turn ON the light in the kitchen", 2 / 7),
        ("it is 2024", "it is two thousand and twenty four", None),  # one word stands for five
        ("bonjour madame", "one two three four five six", None),  # CTC reads something else
        ("", "", None),
    ],
)
def test_what_is_missing_in_one_place_is_noticed(text, by_ctc, share):
    found = share_read(text, by_ctc)
    assert found == share if share is None else found == pytest.approx(share)


def sentences(*lengths: float, pause: float = 0.4) -> np.ndarray:
    return np.concatenate([part for n in lengths for part in (noise(n), np.zeros(round(pause * RATE), np.float32))])


def test_a_window_is_split_at_its_pauses_and_silence_is_left_out():
    pieces = split(Window(sentences(1.5, 2.0, 3.0), 10.0, 1.0, 2.0), 0.1)
    assert [round(piece.seconds, 1) for piece in pieces] == [1.7, 2.2, 3.2]
    assert [round(piece.start, 1) for piece in pieces] == [10.0, 11.9, 14.3]
    assert (pieces[0].before, pieces[-1].after) == (1.0, 2.0)
    assert len(split(Window(sentences(1.5, 2.0, 3.0)), 0.7)) == 2  # the longer the part that is read
    assert [piece.seconds for piece in split(Window(noise(2.0)), 0.1)] == []


def test_a_window_without_pauses_is_split_into_windows_that_overlap():
    pieces = split(Window(noise(9.0), 30.0), 0.1)
    assert len(pieces) > 3 and all(piece.before == 0.5 for piece in pieces[1:])
    assert pieces[-1].start + pieces[-1].seconds == pytest.approx(39.0)


@pytest.fixture(scope="module")
def loaded(models_of_few_tokens) -> LoadedModel:
    folder = models_of_few_tokens[3]
    model = SoundwaveForConditionalGeneration.from_pretrained(folder).eval()
    return LoadedModel(model, SoundwaveProcessor.from_pretrained(folder))


Sentences = list[list[str]]


@pytest.fixture
def hearing(loaded, monkeypatch) -> Callable[..., list[Sentences]]:
    """Let the model hear six times the word of its length, in mel frames, in each sentence of a clip.

    `write` makes of them what the language model writes, `read` what CTC reads, by default all. The clips come back.
    """

    def sentences_of(features) -> Sentences:
        loud = (features.max(0).values > features.max() - 1.0).numpy()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]])))
        runs = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 30]
        return [[f"w{b - a}"] * 6 for a, b in runs]

    def install(write, read=all_words):
        asked: list[Sentences] = []

        def answer(model, processor, prompts, clips, *, readings, **_):
            found = [sentences_of(clip) for clip in clips]
            asked.extend(found)
            readings += [_Read(read(sentences).split()) for sentences in found]
            return [write(sentences) for sentences in found]

        monkeypatch.setattr(reading, "answer", answer)
        monkeypatch.setattr(SoundwaveProcessor, "ctc_text", lambda self, path, blank: path.text)
        return asked

    return install


def all_words(sentences: Sentences) -> str:
    return " ".join(word for sentence in sentences for word in sentence)


def first_sentence(sentences: Sentences) -> str:
    return all_words(sentences[:1])


class _Read:
    """A reading that is its own path, and its text."""

    def __init__(self, words):
        self.path, self.text = self, " ".join(words)

    def cpu(self):
        return self


def lengths(text: str) -> list[int]:
    """Those of the sentences of a text, in mel frames."""
    assert len(text.split()) % 6 == 0
    return [int(word[1:]) for word in text.split()[::6]]


def test_what_is_left_out_is_read_again_in_smaller_windows(loaded, hearing):
    hearing(first_sentence)
    text = transcribe(sentences(1.5, 2.0, 2.5, 3.0), loaded, batch_size=2).text
    assert lengths(text) == pytest.approx([150, 200, 250, 300], abs=4)


def test_a_text_that_nobody_says_is_read_again_phrase_by_phrase(loaded, hearing):
    asked = hearing(lambda heard: all_words(heard) if len(heard) == 1 else "call: call call temperature call: call")
    text = transcribe(sentences(1.5, 2.0, 2.5, 3.0), loaded, batch_size=2).text
    assert lengths(text) == pytest.approx([150, 200, 250, 300], abs=4) and len(asked) == 5


def test_a_text_stays_that_ctc_reads_otherwise_in_its_phrases_too(loaded, hearing):
    asked = hearing(all_words, read=lambda heard: "one two three four five six " * len(heard))
    text = transcribe(sentences(1.5, 2.0, 2.5), loaded).text
    assert lengths(text) == pytest.approx([150, 200, 250], abs=4) and len(asked) == 4  # once more, and no further


def test_a_text_stays_if_its_pieces_agree_with_ctc_less(loaded, hearing):
    """CTC writes five labels behind a sentence of two phrases, so that words seem to be missing."""
    hearing(
        lambda heard: all_words(heard) if len(heard) > 1 else "night: ten",
        read=lambda heard: f"{all_words(heard)} male slow normal slow normal",
    )
    assert lengths(transcribe(sentences(1.5, 2.0), loaded).text) == pytest.approx([150, 200], abs=4)


def test_phrases_that_ctc_does_not_confirm_are_read_with_the_phrase_behind_the_shorter_pause(loaded, hearing):
    """A sentence has a pause; the language model writes it only as a whole, and other sentences only alone."""

    def write(heard: Sentences) -> str:
        sizes = [int(sentence[0][1:]) for sentence in heard]
        known = len(sizes) == 1 and sizes[0] > 220 or len(sizes) == 2 and max(sizes) < 220
        return all_words(heard) if known else "I hear: call"

    audio = np.concatenate([sentences(2.5), sentences(1.5, pause=0.25), sentences(2.0), sentences(3.0)])
    for batch_size in (1, 3):
        hearing(write)
        text = transcribe(audio, loaded, batch_size=batch_size).text
        assert lengths(text) == pytest.approx([250, 150, 200, 300], abs=4)


@pytest.mark.parametrize(
    ("agreed", "runs"),
    [
        ([1, 1, 1, 1], []),
        ([1, -1, 1, 1], [range(1, 3)]),
        ([-1, 1, -1, -1], [range(0, 4)]),
        ([1, 1, 1, -1], [range(2, 4)]),
        ([-1, 1, 1, -1], [range(0, 2), range(2, 4)]),
    ],
)
def test_a_phrase_is_put_to_the_nearer_neighbour(agreed, runs):
    pieces = [Window(noise(1), start) for start in (0.0, 1.5, 2.7, 4.0)]  # pauses of 0.5, 0.2 and 0.3 s
    assert together(pieces, agreed) == runs


def test_words_that_overlapping_pieces_double_do_not_count(loaded, hearing, monkeypatch):
    """Each piece hears its word in the part that it shares with the piece before, so that one word is left of all."""
    monkeypatch.setattr(reading, "timed_words", lambda *_: [timed("piece", 0.0, 0.1)])
    window = Window(noise(9.0))

    def is_whole(heard: Sentences) -> bool:
        return int(heard[0][0][1:]) > 500

    asked = hearing(
        lambda heard: "whole" if is_whole(heard) else "piece",
        read=lambda heard: "whole b c d e f" if is_whole(heard) else "piece",
    )
    assert reading.Reader(loaded).read([window])[0].text == "whole"
    assert len(asked) == 1 + len(split(window, 0.0)) > 4


# ---------------------------------------------------------------- results


@pytest.fixture
def files(tmp_path) -> list:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "in" / f"{name}.wav").write_bytes(name.encode() * 10)
    return sorted((tmp_path / "in").iterdir())


def fill(path, files, model="m", **kwargs) -> list[str]:
    """Write the rows of what is not finished, and return the names that were read."""
    results = JsonLines(path, files, model, **kwargs)
    names = []
    for file in files:
        if file not in results.finished:
            results.write(file, Transcript(f"text of {file.name}", 1.0, (), ()))
            names.append(file.name)
    results.close()
    return names


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_run_reads_nothing(files, tmp_path):
    out = tmp_path / "new" / "x.jsonl"
    assert fill(out, files) == ["a.wav", "b.wav", "c.wav"]
    before = out.read_bytes()
    assert fill(out, files) == [] and out.read_bytes() == before
    assert [row["text"] for row in rows(out)] == ["text of a.wav", "text of b.wav", "text of c.wav"]


def test_after_a_kill_at_any_byte_each_recording_has_one_row(files, tmp_path):
    out = tmp_path / "x.jsonl"
    fill(out, files)
    whole = out.read_bytes()
    for size in range(0, len(whole), 7):
        out.write_bytes(whole[:size])
        read = fill(out, files)
        # A row that lacks but its line's end is whole.
        assert len(read) == 3 - whole[:size].count(b"\n") - (whole[size : size + 1] == b"\n")
        assert sorted(row["file"] for row in rows(out)) == [str(file) for file in files]
        assert out.read_bytes().endswith(b"\n")


def test_a_changed_recording_another_model_and_missing_times_are_read_again(files, tmp_path):
    out = tmp_path / "x.jsonl"
    fill(out, files)
    files[1].write_bytes(b"other")
    assert fill(out, files) == ["b.wav"] and len(rows(out)) == 3
    os.utime(files[2], ns=(1, 1))
    assert fill(out, files) == ["c.wav"]
    assert fill(out, files, model="other") == ["a.wav", "b.wav", "c.wav"] and len(rows(out)) == 3
    assert fill(out, files, model="other", times=True) == ["a.wav", "b.wav", "c.wav"] and len(rows(out)) == 3
    assert fill(out, files, model="other") == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "other"}, 'model was "m" and is "other"'),
        ({"accept": 0.9}, "accept was null and is 0.9"),
        ({"draft": "none"}, 'draft was "ctc" and is "none"'),
        ({"trained": 2}, "the weights of the model have changed"),
        ({"new": True}, "new was not known and is true"),
        ({"times": True}, "its words have no times"),
    ],
)
def test_rows_that_other_settings_made_are_read_again_and_the_reason_is_told(files, tmp_path, change, reason):
    out, settings = tmp_path / "x.jsonl", {"trained": 1, "draft": "ctc", "accept": None}
    fill(out, files[:2], settings=settings)
    same = JsonLines(out, files[:2], "m", settings=settings)
    same.close()
    assert same.finished == set(files[:2]) and not same.again
    changed = {"model": "m", "times": False, **settings, **change}
    other = JsonLines(out, files, changed.pop("model"), times=changed.pop("times"), settings=changed)
    other.close()
    assert other.finished == set() and other.again == {reason: 2}


def test_weights_that_are_trained_again_are_another_setting(tmp_path):
    assert settings_of(tmp_path, draft="ctc") == {"trained": None, "draft": "ctc"}
    for number, name in enumerate(("model-1.safetensors", "config.json"), 5):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, ns=(number, number))
    assert settings_of(tmp_path) == {"trained": 5}


def test_rows_of_other_recordings_stay(files, tmp_path):
    out = tmp_path / "x.jsonl"
    fill(out, files[:1])
    assert fill(out, files[1:]) == ["b.wav", "c.wav"]
    assert [row["file"] for row in rows(out)] == [str(file) for file in files]


@pytest.mark.parametrize(
    "line", ['{"audio_filepath": "a.wav", "text": "a"}', "[1]", "no JSON", '{"file": 3, "text": ""}']
)
def test_a_file_of_something_else_is_left_alone(files, tmp_path, line):
    out = tmp_path / "x.jsonl"
    out.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl: line 1 is no transcript; name another file, or a new one"):
        JsonLines(out, files, "m")
    assert out.read_text() == f"{line}\n"


def test_two_runs_cannot_write_one_file(files, tmp_path):
    first = JsonLines(tmp_path / "x.jsonl", files, "m")
    with pytest.raises(ValueError, match=r"x\.jsonl is being written by another run; wait for it"):
        JsonLines(tmp_path / "x.jsonl", files, "m")
    first.close()
    JsonLines(tmp_path / "x.jsonl", files, "m").close()


def test_a_folder_has_a_file_for_each_recording_in_its_place(files, tmp_path):
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / "a.wav").write_bytes(b"a")
    (tmp_path / "in" / "a.mp3").write_bytes(b"a")
    files = [*files, tmp_path / "in" / "deep" / "a.wav", tmp_path / "in" / "a.mp3"]
    results = FolderOfFiles(tmp_path / "out", files, "srt")
    for file in files:
        results.write(file, file.name)
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert made == {"a.wav.srt", "a.mp3.srt", "b.srt", "c.srt", "deep/a.srt"}
    assert FolderOfFiles(tmp_path / "out", files, "srt").finished == set(files)
    assert FolderOfFiles(tmp_path / "out", files, "vtt").finished == set()
    later = (tmp_path / "out" / "b.srt").stat().st_mtime_ns + 10**9
    os.utime(files[1], ns=(later, later))
    assert FolderOfFiles(tmp_path / "out", files, "srt").finished == set(files) - {files[1]}


def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(files):
    with pytest.raises(OSError):
        FolderOfFiles(Path("/proc/soundwave"), files, "srt")


@pytest.mark.parametrize(
    ("out", "count", "format", "as_json", "wanted"),
    [
        (None, 1, None, False, ("text", "text")),
        (None, 3, None, False, ("text", "text")),
        (None, 3, None, True, ("json", "json")),
        (None, 1, "srt", False, ("one", "srt")),
        ("x.srt", 1, None, False, ("one", "srt")),
        ("x.txt", 3, None, False, ("text", "text")),
        ("x", 3, "vtt", False, ("folder", "vtt")),
        ("x/", 1, None, False, ("folder", "text")),
        ("x.jsonl", 3, None, False, ("lines", "json")),
        ("x.jsonl", 1, "verbose_json", False, ("lines", "verbose_json")),
        ("x.json", 1, None, False, ("lines", "json")),
        ("x.json", 1, "verbose_json", False, ("one", "verbose_json")),
    ],
)
def test_what_a_command_line_asks_for(files, tmp_path, monkeypatch, out, count, format, as_json, wanted):
    monkeypatch.chdir(tmp_path)
    assert plan(out, files[:count], format, as_json, False)[:2] == wanted


@pytest.mark.parametrize(
    ("out", "count", "format", "as_json", "stream", "message"),
    [
        (None, 3, "srt", False, False, "3 recordings in the format srt need a file each, but the terminal is one"),
        ("x.srt", 2, None, False, False, "2 recordings in the format srt need a file each, but --out x.srt is one"),
        (None, 1, "srt", True, False, "--json gives JSON lines, and --format srt something else"),
        ("x.jsonl", 1, "srt", False, False, "--out x.jsonl holds JSON lines, but --format is srt"),
        ("x/", 1, None, True, False, "--json gives one file of JSON lines, but --out x/ is a folder"),
        (None, 1, "srt", False, True, "--stream prints text as it is read"),
        (None, 1, None, True, True, "--stream prints text as it is read"),
        ("x.jsonl", 1, None, False, True, "--stream prints text as it is read"),
    ],
)
def test_what_contradicts_itself_is_refused(files, out, count, format, as_json, stream, message):
    with pytest.raises(ValueError, match=message):
        plan(out, files[:count], format, as_json, stream)


# ---------------------------------------------------------------- streams and memory


def test_windows_are_told_as_soon_as_they_are_read(loaded):
    audio, told = sentences(*[3.0] * 11), []
    transcripts = transcribe_each(
        [audio, audio[:RATE]], loaded, max_new_tokens=4, timestamps="segment", cut_off=[],
        said=lambda number, part: told.append((number, part)),
    )  # fmt: skip
    whole, short = list(transcripts)
    assert [number for number, _ in told] == [0, 0, 1]
    assert " ".join(part.text for number, part in told if number == 0) == whole.text
    assert sum(part.seconds for number, part in told if number == 0) == pytest.approx(whole.seconds, abs=0.01)
    assert told[-1][1] == short
    assert isinstance(whole.segments[0], Segment)


def test_half_an_hour_of_silence_takes_no_more_memory_than_two_minutes(tmp_path, models_of_few_tokens):
    program = (
        "import resource, sys, numpy as np, soundfile\n"
        "from soundwave.inference.answer import load_model\n"
        "from soundwave.inference.long import transcribe\n"
        "loaded = load_model(sys.argv[1])\n"
        "peaks = []\n"
        "for minutes in (2, 30):\n"
        "    with soundfile.SoundFile(sys.argv[2], 'w', 16000, 1) as file:\n"
        "        for _ in range(minutes):\n"
        "            file.write(np.zeros(60 * 16000, np.float32))\n"
        "    found = transcribe(sys.argv[2], loaded, timestamps='word')\n"
        "    assert (found.text, found.seconds, found.segments) == ('', minutes * 60, ())\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
        "print(*peaks)\n"
    )
    command = [sys.executable, "-c", program, models_of_few_tokens[1], tmp_path / "x.flac"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, many = map(int, done.stdout.split())
    assert many <= 1.05 * two
