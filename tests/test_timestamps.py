"""Times of words: the alignment against a search over all paths, gaps against true times, segments."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from soundwave.demo.corpus import timed_speech
from soundwave.inference.answer import LoadedModel
from soundwave.inference.long import transcribe
from soundwave.inference.timestamps import (
    LABEL_REACH,
    LONGEST_SEGMENT,
    LONGEST_TEXT,
    TimedWord,
    align,
    divide_gaps,
    frame_seconds,
    label_log_probs,
    place_words,
    read_clips,
    segments_of,
    text_of,
    words_of,
)
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

# What CTC of the demonstration's model reads in the first of 250 sentences, run by run: label (-1: blank) and frames.
PATHS = Path(__file__).parent / "data" / "ctc_paths.json"


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("labels", [[3], [3, 4], [3, 3], [3, 4, 3], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6])
def test_the_alignment_is_the_best_of_all_paths(labels, frames):
    rng = np.random.default_rng(frames)
    columns = {label: rng.normal(size=frames) for label in {*labels, 0}}
    found = align(np.stack([columns[label] for label in labels], 1), columns[0], labels)
    best, score = None, -np.inf
    for path in itertools.product({*labels, 0}, repeat=frames):
        written = [label for label, _ in itertools.groupby(path) if label]
        total = sum(columns[label][t] for t, label in enumerate(path))
        if written == labels and total > score:
            best, score = path, total
    if best is None:
        assert found is None
        return
    runs, t = [], 0
    for label, group in itertools.groupby(best):
        length = len(list(group))
        if label:
            runs.append((t, t + length - 1))
        t += length
    assert list(zip(*(x.tolist() for x in found), strict=True)) == runs


def test_a_constant_that_is_added_to_a_frame_changes_nothing():
    rng = np.random.default_rng(0)
    log_probs, blank, shift = rng.normal(size=(40, 5)), rng.normal(size=40), rng.normal(0, 100, size=40)
    first, last = align(log_probs, blank, [1, 2, 2, 3, 1])
    again = align(log_probs + shift[:, None], blank + shift, [1, 2, 2, 3, 1])
    np.testing.assert_array_equal(again, (first, last))


# ---------------------------------------------------------------- words


def test_words_begin_where_the_synthesiser_says():
    """Within a median of 60 ms, with the labels where the trained model writes them: 31 ms over 250 sentences."""
    starts = []
    for spoken, row in zip(timed_speech(250), json.loads(PATHS.read_text())):  # noqa: B905 (the first sentences)
        assert spoken.text == row["text"]
        path = np.repeat(*np.array(row["path"]).T)
        words = [(word, ids, True) for word, ids in row["words"]]
        labels = [label for _, ids, _ in words for label in ids]
        log_probs = np.where(path[:, None] == labels, 0.0, -9.0)
        found = place_words(words, log_probs, np.where(path == -1, 0.0, -9.0), 0.04, spoken.samples)
        assert [word.word for word in found] == spoken.text.split()
        places = iter(found)
        for true in spoken.words:  # a few words are not timed
            letters = re.sub(r"\W", "", true.word).casefold()
            word = next((word for word in places if word.word.casefold() == letters), None)
            assert word is not None
            starts.append(word.start - true.start)
    assert len(starts) > 250
    assert np.median(np.abs(starts)) <= 0.06 and abs(np.median(starts)) <= 0.02


def test_a_pause_ends_one_word_and_begins_the_next():
    quiet = np.zeros(200, bool)
    quiet[60:100] = True  # 1.2 s to 2.0 s
    starts, ends = divide_gaps(np.array([0.2, 2.4]), np.array([0.8, 2.6]), [4, 4], quiet, 4.0)
    assert ends[0] == pytest.approx(1.2) and starts[1] == pytest.approx(2.0)


def test_without_a_pause_letters_divide_a_gap():
    starts, ends = divide_gaps(np.array([0.2, 1.2]), np.array([0.4, 1.4]), [6, 2], np.zeros(100, bool), 2.0)
    assert ends[0] == starts[1] == pytest.approx(0.4 + 0.8 * 6 / 8)


def test_a_short_silence_inside_a_word_is_no_pause():
    quiet = np.zeros(100, bool)
    quiet[30:37] = True  # 0.14 s
    starts, ends = divide_gaps(np.array([0.2, 1.2]), np.array([0.4, 1.4]), [3, 3], quiet, 2.0)
    assert ends[0] == starts[1] == pytest.approx(0.8)


def test_no_word_lasts_through_music():
    starts, ends = divide_gaps(np.array([1.0, 20.0]), np.array([1.2, 20.2]), [5, 5], np.zeros(1500, bool), 30.0)
    assert ends[0] <= 1.2 + LABEL_REACH and starts[1] >= 20.0 - LABEL_REACH and ends[1] <= 21.0


@pytest.mark.parametrize("seed", range(20))
def test_times_never_run_backwards(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    edges = np.sort(rng.uniform(0, 10, 2 * count))
    quiet = rng.random(500) < rng.random()
    starts, ends = divide_gaps(edges[::2], edges[1::2], rng.integers(1, 9, count).tolist(), quiet, 10.0)
    times = np.stack([starts, ends], 1).ravel()
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] <= 10


def test_a_text_with_more_labels_than_frames_is_spread_over_the_clip():
    words = [(word, [number], True) for number, word in enumerate("abcdefgh")]
    found = place_words(words, np.zeros((4, 8)), np.zeros(4), 0.04, np.zeros(2560, np.float32))
    assert [word.start for word in found] == pytest.approx(np.arange(8) * 0.02)
    assert found[-1].end == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("turn on the light", ["turn", "on", "the", "light"]),
        ("  two\n spaces ", ["two", "spaces"]),
        ("", []),
        ("\u200b", []),
        ("it's 3,000 euros.", ["it's", "3,000", "euros."]),
    ],
)
def test_words_of_a_text(processor, text, wanted):
    found = words_of(processor, text)
    assert [word for word, _, _ in found] == wanted
    heard = [label for label in processor.ctc_ids(text) if processor.tokenizer.decode([label]).strip()]
    assert [label for _, ids, _ in found for label in ids] == heard  # not the space before digits


@pytest.mark.parametrize("text", ["今日は良い天気です", "สวัสดีครับ", "你好 world 世界"])
def test_writing_without_spaces_is_cut_at_labels_and_joined_again(processor, text):
    found = words_of(processor, text)
    assert len(found) > 2
    times = [TimedWord(word, 0.0, 0.0, tuple(ids), 0.0, spaced) for word, ids, spaced in found]
    assert text_of(times) == text


# ---------------------------------------------------------------- segments


def word(text: str, start: float, end: float) -> TimedWord:
    return TimedWord(text, start, end, (1, 2), -0.5, True)


def test_a_pause_or_the_end_of_a_sentence_begins_a_segment():
    words = [word("Turn", 0, 0.3), word("on.", 0.3, 0.6), word("The", 0.6, 0.8), word("light", 1.3, 1.6)]
    assert [(s.text, s.start, s.end) for s in segments_of(words)] == [
        ("Turn on.", 0, 0.6), ("The", 0.6, 0.8), ("light", 1.3, 1.6)
    ]  # fmt: skip


def test_no_segment_is_longer_than_a_subtitle():
    words = [word("word" * (1 + i % 3), i * 0.4, i * 0.4 + 0.4) for i in range(100)]
    segments = segments_of(words, 30.0)
    assert all(s.end - s.start <= LONGEST_SEGMENT and len(s.text) <= LONGEST_TEXT for s in segments)
    assert " ".join(s.text for s in segments) == text_of(words) and {s.window for s in segments} == {30.0}
    assert sum(len(s.tokens) for s in segments) == 200 and {s.avg_logprob for s in segments} == {-0.25}


def test_one_word_that_is_too_long_is_a_segment():
    assert [s.text for s in segments_of([word("x" * 100, 0, 9), word("y", 9, 9.1)])] == ["x" * 100, "y"]
    assert segments_of([]) == []


# ---------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def loaded(models_of_few_tokens) -> dict[int, LoadedModel]:
    return {
        stage: LoadedModel(
            SoundwaveForConditionalGeneration.from_pretrained(folder, language_model=stage > 1).eval(),
            SoundwaveProcessor.from_pretrained(folder),
        )
        for stage, folder in models_of_few_tokens.items()
    }


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return next(timed_speech(1)).samples


def test_the_labels_have_the_probabilities_of_the_whole_head(loaded, speech):
    model, processor = loaded[1]
    (reading,) = read_clips(model, processor, [processor.features(speech)])
    logits = np.concatenate(
        [
            (reading.hidden @ model.head_weight.T).detach().numpy(),
            (reading.hidden @ model.blank_weight + model.blank_bias).detach().numpy()[:, None],
        ],
        1,
    ).astype(np.float64)
    wanted = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    found, blank = label_log_probs(model, reading, [5, 7, 5])
    np.testing.assert_allclose(found, wanted[:, [5, 7, 5]], atol=1e-4)
    np.testing.assert_allclose(blank, wanted[:, -1], atol=1e-4)
    assert frame_seconds(model, processor) == 0.04


@pytest.mark.parametrize("stage", [1, 3])
def test_times_do_not_change_the_text_and_lie_in_the_recording(loaded, speech, stage):
    plain = transcribe(speech, loaded[stage], max_new_tokens=8)
    timed = transcribe(speech, loaded[stage], max_new_tokens=8, timestamps="word")
    assert timed == plain and (plain.words, plain.segments) == (None, None)
    assert [word.word for word in timed.words] == plain.text.split()
    assert " ".join(segment.text for segment in timed.segments) == plain.text
    times = [time for word in timed.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= timed.seconds
    assert all(0 <= word.probability <= 1 for word in timed.words)
    only = transcribe(speech, loaded[stage], max_new_tokens=8, timestamps="segment")
    assert only.words is None and only.segments == timed.segments


@pytest.mark.parametrize("samples", [np.zeros(16_000, np.float32), np.zeros(800, np.float32)], ids=["1 s", "0.05 s"])
def test_silence_has_no_times(loaded, samples):
    found = transcribe(samples, loaded[1], timestamps="word")
    assert (found.text, found.words, found.segments) == ("", (), ())


def test_a_recording_of_0_05_s_has_times(loaded, speech):
    found = transcribe(speech[8000:8800], loaded[1], timestamps="word")
    assert found.seconds == 0.05 and all(0 <= word.start <= word.end <= 0.05 for word in found.words)


@pytest.mark.parametrize("timestamps", ["words", "", True, 1])
def test_other_times_are_refused_before_the_model_is_loaded(timestamps):
    with pytest.raises(ValueError, match="timestamps = .*, but it must be 'word' or 'segment', or None"):
        transcribe([0.0] * 16_000, "no-such-folder", timestamps=timestamps)
