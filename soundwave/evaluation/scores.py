"""What answers are worth: word error rates, right answers, and `Scores`, which an evaluation returns."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jiwer
import regex

from soundwave.data.collate import LeftOut
from soundwave.evaluation.choices import named_option, option_of
from soundwave.evaluation.classes import Confusion, label_of, named_label
from soundwave.evaluation.words import UNSPACED, Rules, fold, lower, rules_for, words_of, words_of_pair

ANSWER_RULES = "soundwave answers 2"  # name and version of the rules of `judge`; 0.1.0 had the first ones
_TURKISH = regex.compile("[ıİğĞ]")
_QUOTES = regex.compile(r"[“”„‟«»‹›「」『』]|(?<!\w)([\"'])(?=\S)(.+?)(?<=\S)\1(?!\w)")
_LETTERS_DOTS = regex.compile(r"(?<=\p{L})\.(?=\p{L})")
# Behind a word, before another one or a space: not "3.5", ".5", "!=" or ":)".
_STOPS = regex.compile(
    r"[¿¡]+|(?<=\p{L}\p{M}*)[\p{Terminal_Punctuation}…]+(?=[\s\p{L}\p{N})\]}\"']|$)"
    r"|(?<=[^\s\p{L}\p{M}])[\p{Terminal_Punctuation}…]+(?=[\s\p{L}\"']|$)|(?<=\s)[\p{Terminal_Punctuation}…]+(?=\s|$)"
)
_UNSPACED_GAP = regex.compile(rf"(?<=[{UNSPACED}])\s+(?=[{UNSPACED}])", regex.V1)


def normalise(text: str, *, turkish: bool | None = None) -> str:
    """The text of an answer, for comparison with another one: in lower case, with one space between words.

    Full stops, commas, colons, question marks and the like do not count behind a word, and quotation marks do not
    around one. All else counts: brackets, signs, symbols, digits, the marks of letters ("5" is no "-5", "3.5" no "35",
    "C++" no "C#"). Characters are compared in one form (NFC; full width like half width), numbers are not spelt out.

    Args:
        turkish: whether the lower case of I is ı. By default it is if the text has a letter that only Turkish and its
            kin have (ı, İ, ğ).
    """
    text = fold(text)
    text = lower(text, turkish=bool(_TURKISH.search(text)) if turkish is None else turkish)
    if regex.search(r"[\p{L}\p{N}]", text):  # else it consists of signs, and each of them counts
        text = _QUOTES.sub(lambda match: match[2] or " ", text)
        text = regex.sub(r"\s+(?=[)\]}])", "", _STOPS.sub(" ", _LETTERS_DOTS.sub("", text)))
    return _UNSPACED_GAP.sub("", " ".join(unicodedata.normalize("NFC", text).split()))


class Verdict(NamedTuple):
    """What an answer is worth.

    Attributes:
        right: whether it is right.
        choice: whether the sample is a multiple choice (`soundwave.evaluation.choices` has the rule).
        option: the option that the answer names, None if it names none; such an answer is wrong.
    """

    right: bool
    choice: bool = False
    option: str | None = None


def judge(
    reference: str,
    answer: str,
    prompt: str = "",
    *,
    turkish: bool | None = None,
    labels: Sequence[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> Verdict:
    """Compare an answer with the reference: the labels that they name, or of a multiple choice the options, or texts.

    Texts are compared as `normalise` gives them. An answer without text is never right.

    Args:
        prompt: the sample's prompt, which may list options.
        turkish: as in `normalise`; by default the reference decides.
        labels: the labels of which the reference is one, if the sample has such.
        options: the options, if they are not to be read from the prompt: label -> text.
    """
    if labels is not None:
        return Verdict(named_label(answer, labels) == label_of(reference, labels))
    if choice := option_of(reference, prompt, options):
        option = named_option(answer, choice[1])
        return Verdict(option == choice[0], True, option)
    if turkish is None:
        turkish = bool(_TURKISH.search(fold(reference)))
    wanted, given = normalise(reference, turkish=turkish), normalise(answer, turkish=turkish)
    same = wanted == given or _same_capitals(reference, answer)
    return Verdict(same and bool(given))


def classes_named(
    reference: str,
    answer: str,
    prompt: str = "",
    *,
    labels: Sequence[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[str, str | None] | None:
    """The class of a reference, and that which an answer names, or None: the labels, else the texts of the options.

    Options without texts are classes themselves. None: the sample has neither labels nor options. Arguments as in
    `judge`.
    """
    if labels is not None:
        return label_of(reference, labels) or reference, named_label(answer, labels)
    if choice := option_of(reference, prompt, options):
        label, found = choice
        named, texts = named_option(answer, found), found if all(found.values()) else {}
        return texts.get(label, label), None if named is None else texts.get(named, named)
    return None


def _same_capitals(one: str, other: str) -> bool:
    """Whether one text is in capitals and is the other one in capitals, as STRASSE is "Straße", and KIZ "kız"."""
    one, other = fold(one), fold(other)
    return (one.isupper() or other.isupper()) and normalise(one.upper()) == normalise(other.upper())


@dataclass
class Scores:
    """Scores over a list of samples.

    Attributes:
        wer: word error rate of the transcriptions (0.02 is 2 %): all word errors divided by all reference words. None
            without transcriptions in words.
        cer: character error rate of the transcriptions in scripts without spaces. None without any.
        accuracy: for each other task the share of right answers.
        samples: number of samples of each task that were scored.
        normaliser: for each task the name and version of what texts were normalised with before they were compared.
        unparsed: for each task with multiple choice the number of answers that name no option; they count as wrong.
        blank_share: share of the frames in which CTC writes the blank.
        kept_per_label: CTC peaks divided by transcript tokens.
        compression: frames of the alignment adapter divided by kept frames.
        left_out: the samples that were not scored, with the reason.
        cut_off: ids of the samples whose answer ended at the token limit.
        first_window: ids of the samples, not of transcription, of whose recording only the first 30 s were heard.
        in_pieces: ids of the recordings over 30 s that were transcribed in pieces.
        answers: (sample id, task, reference, answer) in the order of the samples.
        intervals: for each task and score its bootstrap interval of 95 % (`soundwave.evaluation.intervals`).
        bleu, chrf: for each task of translation the scores of sacrebleu, 0 to 100; `normaliser` has the signatures. A
            task with several target languages has a score for each: "translate (de)".
        macro_f1: for each task whose answers are one of a few classes the mean F1 of the classes.
        confusion: for the same tasks what was answered (`soundwave.evaluation.classes.Confusion`).
        kept_per_second: kept frames, which the language model reads, in a second of audio.
        speed: `audio_seconds` that were answered, the `seconds` that this took with reading and features, and `rtfx`,
            their quotient; of an evaluation that was gone on with only what it has answered itself.
    """

    wer: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    blank_share: float | None = None
    kept_per_label: float | None = None
    compression: float | None = None
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)
    cer: float | None = None
    normaliser: dict[str, str] = field(default_factory=dict)
    unparsed: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    first_window: list[str] = field(default_factory=list)
    in_pieces: list[str] = field(default_factory=list)
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bleu: dict[str, float] = field(default_factory=dict)
    chrf: dict[str, float] = field(default_factory=dict)
    macro_f1: dict[str, float] = field(default_factory=dict)
    confusion: dict[str, Confusion] = field(default_factory=dict)
    kept_per_second: float | None = None
    speed: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All but the answers, for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "answers"}
        found["confusion"] = {task: confusion._asdict() for task, confusion in self.confusion.items()}
        return found | {"left_out": [left._asdict() for left in self.left_out]}

    def text_of(self, task: str) -> str:
        """A task's scores on one line."""
        if task in self.bleu:
            return f"BLEU {self.bleu[task]:.1f} · chrF {self.chrf[task]:.1f}"
        if task != "transcribe":
            f1 = f" · macro F1 {self.macro_f1[task]:.1%}" if task in self.macro_f1 else ""
            return f"accuracy {self.accuracy[task]:.1%}{f1}"
        rates = {"WER": self.wer, "CER": self.cer}
        return " · ".join(f"{name} {rate:.1%}" for name, rate in rates.items() if rate is not None)

    def interval_of(self, task: str) -> str:
        """The bootstrap intervals of a task on one line."""
        found = self.intervals.get(task, {})
        scale = {name: 1 if name == "BLEU" else 100 for name in found}
        texts = {name: f"{low * scale[name]:.1f} – {high * scale[name]:.1f}" for name, (low, high) in found.items()}
        return " · ".join(text if len(texts) == 1 else f"{name} {text}" for name, text in texts.items())


class WordErrors(NamedTuple):
    """Errors of an answer, and the number of words (or characters) of its reference."""

    errors: int
    of: int


def word_errors(reference: str, answer: str, rules: Rules) -> WordErrors:
    """Count substitutions, deletions and insertions. ValueError: the reference has no words."""
    wanted, given = words_of_pair(reference, answer, rules)
    if not wanted:
        raise ValueError("a reference has no words: leave samples without a transcript out of the word error rate")
    found = jiwer.process_words(" ".join(wanted), " ".join(given))
    return WordErrors(found.substitutions + found.deletions + found.insertions, len(wanted))


def align(reference: str, answer: str, rules: Rules) -> list[dict[str, str]]:
    """Align two texts word by word.

    Returns:
        For each place the `kind` (equal, substitute, delete or insert) and the words `reference` and `given`; a
        missing word is empty.
    """
    wanted, found = words_of_pair(reference, answer, rules)
    if not wanted:
        return [{"kind": "insert", "reference": "", "given": word} for word in found]
    pairs = []
    for chunk in jiwer.process_words([" ".join(wanted)], [" ".join(found)]).alignments[0]:
        left = wanted[chunk.ref_start_idx : chunk.ref_end_idx]
        right = found[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for place in range(max(len(left), len(right))):
            one, other = (words[place] if words else "" for words in (left, right))
            pairs.append({"kind": chunk.type, "reference": one, "given": other})
    return pairs


def word_error_rate(
    references: Sequence[str], answers: Sequence[str], *, language: str | None | Sequence[str | None] = None
) -> float:
    """Word error rate, 0 or more; of scripts without spaces the characters count instead of the words.

    `soundwave.evaluation.words` says which normaliser a text gets.

    Args:
        language: language of all texts, or of each reference: a code such as "en". By default the script decides.

    Raises:
        ValueError: a reference has no words.
    """
    rules = rules_for(references, language)
    found = [word_errors(*texts) for texts in zip(references, answers, rules, strict=True)]
    return rate(found)


def rate(found: Sequence[WordErrors]) -> float:
    """All errors divided by all words."""
    return sum(one.errors for one in found) / sum(one.of for one in found)


def has_words(text: str, rules: Rules | None = None) -> bool:
    """Whether a transcript has any words, brackets such as [laughs] and punctuation aside."""
    return bool(words_of(text, rules or rules_for([text])[0]))


def names_of(rules: Sequence[Rules]) -> str:
    """The names of the normalisers, each with the number of its samples if there are several."""
    names = [one.name for one in rules]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return "; ".join(name if len(counts) == 1 else f"{name} ({count} samples)" for name, count in counts.items())
