"""When each word of a transcript is spoken: its text is aligned to the frames of CTC, and gaps are divided by sound.

The text may be the language model's own. `align` finds the most probable CTC path that writes exactly its labels
(Viterbi over 2U + 1 states). Every path passes each frame once, so a frame's normaliser changes nothing: the logits of
the text's labels and of the blank suffice, a product of the frames with U rows of the head.

CTC places a label somewhere inside its word, for a short word at its beginning and for a long one towards its end, and
writes blanks between. So the labels alone do not tell where a word begins; the gap between two of them is divided:

- where it holds a pause, the word before ends with the pause's beginning and the next one begins with its end;
- else in proportion to the lengths of the two words in letters.

Measured by `bench/timestamps.py` on speech whose times are known, a word's beginning is off by a median of 31 ms; the
first frame of its first label by 77 ms, the middle of the gap by 40 ms (embedded default, frames of 40 ms).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex
import torch
from torch import Tensor

from soundwave.data.audio import SAMPLING_RATE
from soundwave.eager import LinearCTCOutput
from soundwave.inference.transcript import Segment, Word
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor

LABEL_REACH = 0.8  # seconds that a word may go on before its first label and behind its last one; measured: 0.84
LETTER = 0.04  # seconds of a letter, where neither another word nor silence bounds a word
ENERGY_FRAME = 0.02  # seconds
PAUSE = 0.2  # seconds; stops inside of words are silent for up to 0.14 s (measured)
QUIET = 1e-3  # of the power of the loud frames (-30 dB)
LOUD = 0.95  # quantile of the frames' powers
# Of a subtitle: two lines of 42 characters, up to 7 s.
LONGEST_SEGMENT, LONGEST_TEXT = 7.0, 84
SENTENCE_END = regex.compile(r"[.?!…。？！]['\")\]»”’]*$")
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


class Reading(NamedTuple):
    """What CTC reads in a clip of T frames.

    Attributes:
        hidden: [T, D], the aligned frames.
        path: int64 [T], the most probable label of each frame.
        log_prob: [T], its log-probability.
    """

    hidden: Tensor
    path: Tensor
    log_prob: Tensor


class TimedWord(NamedTuple):
    """A word with its times and labels.

    Attributes:
        word: the word.
        start, end: seconds.
        tokens: its CTC labels.
        log_prob: the sum of their log-probabilities.
        spaced: whether white space stands before it.
    """

    word: str
    start: float
    end: float
    tokens: tuple[int, ...]
    log_prob: float
    spaced: bool

    def public(self) -> Word:
        """The word as a transcript gives it."""
        probability = float(np.exp(self.log_prob / max(1, len(self.tokens))))
        return Word(self.word, round(self.start, 3), round(self.end, 3), round(probability, 4))


@torch.no_grad()
def read_clips(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, clips: Sequence[Tensor]
) -> list[Reading]:
    """Read clips by CTC, one batch of log-mel features float32 [n_mels, T_mel] each."""
    batch = batch_to(processor.pad_features(list(clips)), model.device)
    return readings_of(model.align(**batch, packed=model.packed))


def readings_of(aligned: tuple[Tensor, Tensor, LinearCTCOutput]) -> list[Reading]:
    """The reading of each clip in what `SoundwaveForConditionalGeneration.align` returned, packed or padded."""
    hidden, lengths, ctc = aligned
    counts = lengths.tolist()
    if ctc.path.dim() == 1:
        parts = zip(*(x.split(counts) for x in (hidden, ctc.path, ctc.path_log_prob)), strict=True)
        return [Reading(*part) for part in parts]
    return [Reading(hidden[i, :n], ctc.path[i, :n], ctc.path_log_prob[i, :n]) for i, n in enumerate(counts)]


def frame_seconds(model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor) -> float:
    """Seconds of a frame of CTC: the mel hop, halved by Whisper's convolution and stacked by the adapter."""
    extractor = processor.feature_extractor
    return 2 * model.config.frame_stack * extractor.hop_length / extractor.sampling_rate


def words_of(processor: SoundwaveProcessor, text: str) -> list[tuple[str, list[int], bool]]:
    """The words of a text with their CTC labels, and whether white space stands before them.

    Of writing without spaces (Chinese, Japanese, Thai, …), the labels are the words. A label of a space alone, which
    stands before digits, is left out.
    """
    found = []
    for word in text.split():
        ids = processor.ctc_ids(word)
        if len(ids) < 2 or not UNSPACED.search(word):
            found.append((word, ids, True))
            continue
        begun, known = 0, 0
        for last in range(1, len(ids) + 1):
            part = processor.tokenizer.decode(ids[:last]).strip()
            if part.endswith("\ufffd"):  # a label ends inside of a character
                continue
            if len(part) > known:
                found.append((part[known:], ids[begun:last], known == 0))
            begun, known = last, max(known, len(part))
    return [item for item in found if item[1]]


@torch.no_grad()
def label_log_probs(
    model: SoundwaveForConditionalGeneration, reading: Reading, labels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of labels, float32 [T, U], and of the blank, [T].

    The normaliser of a frame is the logit of its most probable label less that label's log-probability.
    """
    own = getattr(model, "ctc_head", None)
    head = model.head_weight if own is None else own
    hidden = reading.hidden.float()
    wanted = torch.tensor(labels, dtype=torch.int64, device=head.device)
    distinct, place = torch.cat([wanted, reading.path.to(head.device)]).unique(return_inverse=True)
    rows = head[distinct.clamp(max=head.shape[0] - 1)].float()
    if own is None:  # the blank is one row more
        blank_row, bias = model.blank_weight.float(), model.blank_bias.float()
    else:
        blank_row, bias = head[model.blank].float(), 0.0
    logits, blank = hidden @ rows.T, hidden @ blank_row + bias
    path = torch.where(reading.path == model.blank, blank, logits.gather(1, place[len(labels) :, None])[:, 0])
    normaliser = path - reading.log_prob.float()
    logits = logits[:, place[: len(labels)]]
    return (logits - normaliser[:, None]).cpu().numpy(), (blank - normaliser).cpu().numpy()


def align(log_probs: np.ndarray, blank: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The most probable CTC path that writes `labels` -> the first and the last frame of each, int [U].

    Args:
        log_probs: [T, U], of each label in each frame; anything that is added to a whole frame changes nothing.
        blank: [T], the same of the blank.

    Returns:
        None if the labels need more frames than there are, or there are none.
    """
    frames, count = log_probs.shape
    repeats = np.array([a == b for a, b in zip(labels, labels[1:], strict=False)], dtype=bool)
    if not count or frames < count + repeats.sum():
        return None
    may_skip = np.concatenate([[False], ~repeats])  # from the label before, without a blank between
    on_label, on_blank = np.full(count, -np.inf), np.full(count + 1, -np.inf)
    on_label[0], on_blank[0] = log_probs[0, 0], blank[0]
    label_from = np.zeros((frames, count), np.int8)  # 0 the label itself, 1 the blank before it, 2 the label before
    blank_from = np.zeros((frames, count + 1), bool)  # whether from the label before it
    for t in range(1, frames):
        label_before = np.concatenate([[-np.inf], on_label])
        choices = np.stack([on_label, on_blank[:-1], np.where(may_skip, label_before[:-1], -np.inf)])
        label_from[t] = choices.argmax(0)
        blank_from[t] = label_before > on_blank
        on_label = choices.max(0) + log_probs[t]
        on_blank = np.maximum(on_blank, label_before) + blank[t]
    first, last = np.zeros(count, np.int64), np.full(count, -1)
    is_blank = on_blank[-1] > on_label[-1]
    u = count if is_blank else count - 1
    for t in range(frames - 1, -1, -1):
        if is_blank:
            is_blank, u = (False, u - 1) if blank_from[t, u] else (True, u)
            continue
        first[u] = t
        last[u] = max(last[u], t)
        if label_from[t, u] == 1:
            is_blank = True
        elif label_from[t, u] == 2:
            u -= 1
    return first, last


def timed_words(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    reading: Reading,
    text: str,
    samples: np.ndarray,
) -> list[TimedWord]:
    """The words of `text` with their times, in seconds from the beginning of a clip.

    Args:
        reading: what CTC reads in the clip.
        samples: the clip, float32 [samples] at 16 kHz.
    """
    words = words_of(processor, text)
    if not words:
        return []
    labels = [label for _, ids, _ in words for label in ids]
    return place_words(words, *label_log_probs(model, reading, labels), frame_seconds(model, processor), samples)


def place_words(
    words: Sequence[tuple[str, list[int], bool]],
    log_probs: np.ndarray,
    blank: np.ndarray,
    step: float,
    samples: np.ndarray,
) -> list[TimedWord]:
    """The times of words that CTC may have read.

    Args:
        words: what `words_of` gives, at least one.
        log_probs, blank: of their U labels [T, U] and of the blank [T] in each frame.
        step: seconds of a frame.
        samples: the clip.

    The times never run backwards. Should the text have more labels than there are frames, its words are spread evenly
    over the clip: they cannot be what is said in it.
    """
    labels = [label for _, ids, _ in words for label in ids]
    found, seconds = align(log_probs, blank, labels), len(samples) / SAMPLING_RATE
    bounds = np.cumsum([0, *(len(ids) for _, ids, _ in words)])
    if found is None:
        first = last = (np.arange(len(labels)) * (len(blank) / len(labels))).astype(np.int64)
        edges = np.linspace(0, seconds, len(words) + 1)
        starts, ends = edges[:-1], edges[1:]
    else:
        first, last = found
        lower = np.minimum(first[bounds[:-1]] * step, seconds)
        upper = np.minimum((last[bounds[1:] - 1] + 1) * step, seconds)
        letters = [len(word) for word, _, _ in words]
        quiet = is_quiet(frame_powers(samples, round(ENERGY_FRAME * SAMPLING_RATE)))
        starts, ends = divide_gaps(lower, upper, letters, quiet, seconds)
    best = [max(log_probs[a : b + 1, u]) for u, (a, b) in enumerate(zip(first, last, strict=True))]
    return [
        TimedWord(word, float(start), float(end), tuple(ids), float(sum(best[a:b])), spaced)
        for (word, ids, spaced), start, end, a, b in zip(words, starts, ends, bounds, bounds[1:], strict=False)
    ]


def divide_gaps(
    lower: np.ndarray, upper: np.ndarray, letters: Sequence[int], quiet: np.ndarray, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of words, in seconds, from the times of their labels: `lower` to `upper`, [words] each."""
    starts, ends = np.array(lower, float), np.array(upper, float)
    pause = _longest_run(quiet, 0.0, lower[0])
    starts[0] = max(0.0, lower[0] - LETTER * letters[0]) if pause is None else max(pause[1], lower[0] - LABEL_REACH)
    for i in range(1, len(lower)):
        pause = _longest_run(quiet, upper[i - 1], lower[i], PAUSE)
        if pause is None:
            share = letters[i - 1] / (letters[i - 1] + letters[i])
            boundary = upper[i - 1] + (lower[i] - upper[i - 1]) * share
            pause = boundary, boundary
        ends[i - 1] = min(pause[0], upper[i - 1] + LABEL_REACH)
        starts[i] = max(pause[1], lower[i] - LABEL_REACH)
    pause = _longest_run(quiet, upper[-1], seconds)
    ends[-1] = min(seconds, upper[-1] + LETTER * letters[-1])
    if pause is not None:
        ends[-1] = min(pause[0], upper[-1] + LABEL_REACH)
    return starts, np.maximum(ends, starts)


def frame_powers(samples: np.ndarray, size: int) -> np.ndarray:
    """The mean square of each frame of `size` samples; the last frame is filled up with silence."""
    count = -(-len(samples) // size)
    return np.square(np.pad(samples, (0, count * size - len(samples))).reshape(count, size)).mean(axis=1)


def is_quiet(powers: np.ndarray, limit: float = QUIET) -> np.ndarray:
    """Which frames have at most `limit` of the power of the loud ones, bool [frames]."""
    return powers <= limit * np.quantile(powers, LOUD) if len(powers) else np.zeros(0, bool)


def quiet_runs(quiet: np.ndarray) -> Iterator[tuple[int, int]]:
    """First frame of each run of quiet ones, and the frame behind it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _longest_run(quiet: np.ndarray, start: float, end: float, shortest: float = ENERGY_FRAME):
    """Seconds at which the longest quiet run between two times begins and ends; None if it is too short."""
    first, last = int(np.ceil(round(start / ENERGY_FRAME, 3))), int(np.ceil(round(end / ENERGY_FRAME, 3)))
    runs = [(b - a, first + a, first + b) for a, b in quiet_runs(quiet[first:last])]
    length, a, b = max(runs, default=(0, 0, 0))
    return (a * ENERGY_FRAME, min(b * ENERGY_FRAME, end)) if length * ENERGY_FRAME >= shortest - 1e-9 else None


def segments_of(words: Sequence[TimedWord], window: float = 0.0) -> list[Segment]:
    """Words in parts of a subtitle's length: up to 7 s and 84 characters; a pause or a sentence's end begins a new one.

    Args:
        window: the second at which the window begins in which they were read.
    """
    groups: list[list[TimedWord]] = []
    for word in words:
        group = groups[-1] if groups else None
        if (
            group is None
            or word.start - group[-1].end >= 2 * PAUSE
            or SENTENCE_END.search(group[-1].word)
            or word.end - group[0].start > LONGEST_SEGMENT
            or len(text_of([*group, word])) > LONGEST_TEXT
        ):
            groups.append([word])
        else:
            group.append(word)
    found = []
    for group in groups:
        tokens = tuple(token for word in group for token in word.tokens)
        mean = sum(word.log_prob for word in group) / max(1, len(tokens))
        found.append(
            Segment(
                text_of(group), round(group[0].start, 3), round(group[-1].end, 3), tokens, round(mean, 4),
                round(window, 3),
            )
        )  # fmt: skip
    return found


def text_of(words: Sequence[TimedWord]) -> str:
    """The text that words make."""
    return "".join(f" {word.word}" if word.spaced else word.word for word in words).strip()
