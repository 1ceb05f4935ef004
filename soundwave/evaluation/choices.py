"""Multiple choice: the options of a prompt, and the option that an answer names.

A prompt lists options behind labels in their order: (A) … (B) …, [A] … [B] …, A) … B) …, A. … B. … or A: … B: …; small
letters, numbers from 1 and other alphabets likewise. A sample is a choice if its reference names an option of its
prompt, or, where the prompt lists none, if it is one letter from A to Z by itself: A, (A), A.

An answer names an option by its label, if that is
    all of the answer, apart from brackets and punctuation    b    (B)    **B.**
    in brackets, or at the beginning before ")", "." or ":"   the first one (b)    b) male    B. male
    a capital before punctuation, the end, "because" or "is correct"    The answer is B.    B is correct
    after "answer", "option" or "choice"                      the answer is b    Option b
or by its text, if that stands in the answer as whole words. An answer names none if it names several, if a label and a
text disagree, or if it denies ("not B", "it cannot be B", "nicht B"; `_DENIES` has the words), unless the option comes
first ("No, I cannot"). Digits name none as a part of another number ("-1", "1.5", "1,000", "1%"), and C none in "C#".

Where a sample lists its options (`"options": {"A": "male", "B": "female"}`), its prompt is not read for them.
"""

from collections.abc import Mapping

import regex

from soundwave.evaluation.words import UNSPACED, fold

FIRST = "Aa1АаΑα"  # the first label in Latin letters, in numbers, in Cyrillic and in Greek letters
ANY = {letter: "" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}  # the options where the prompt lists none
LABEL = r"(?<![\w'])(?P<label>\p{L}|[0-9]{1,2})(?![\w'])"
_AROUND = r"(?:[\s()\[\].,:;!?。，：；！？\"'`]|\*\*)*"
_STYLES = [rf"\({LABEL}\)", rf"\[{LABEL}\]", rf"{LABEL}\)", rf"{LABEL}[.:](?=\s|$)"]
_ALONE = regex.compile(rf"{_AROUND}(?P<label>\p{{L}}|[0-9]{{1,2}}){_AROUND}")
_MARKED = regex.compile(_AROUND + LABEL + r"\s*[)\].:](?!\d)")
_BRACKETS = regex.compile(rf"[(\[]{LABEL}[)\]]")
_CAPITAL = regex.compile(
    rf"(?<![[\w'-]--[{UNSPACED}]])(?P<label>\p{{Lu}}|[0-9]{{1,2}})"
    r"(?=[^\S\n]*\n|\s*(?:$|[)\]\";!?。，；：！？]|[.,:/](?!\d)|\*\*|(?:or|and|because|since)\b"
    r"|is (?:the )?(?:correct|right|best|answer)\b|です|입니다))",
    regex.V1,
)
_NAMED = regex.compile(
    rf"\b(?:answer|option|choice)(?: is| would be| must be)?\W*{LABEL}(?!\s+[\w\0])", regex.IGNORECASE
)
_DENIES = regex.compile(
    r"\b(?:not|cannot|\w+n't|neither|nor|never|except|anything but|rather than|instead of|nicht|kein\w*"
    r"|pas|no es|non|não|niet|geen|inte|ikke|nie|nem|не|değil|không|tidak|bukan|नहीं|ليس|ليست)\b"
    r"|不是|不選|不选|ではな|じゃな|아니|아닙",
    regex.IGNORECASE,
)
_BEGINS = regex.compile(rf"{_AROUND}(?:\0|{LABEL})[)\]\s]*[,.;!。，；！]")
_LABEL_BEHIND = regex.compile(r"\s*(?:$|[,;?!.]|(?:or|and)\b)")
_ENDS = " \t\r\n.,;:!?/|*\"'。，；：！？、"


def options_of(prompt: str) -> dict[str, str]:
    """The options of a prompt: label, in capitals -> text. Empty without at least two labels in their order."""
    prompt = fold(prompt)
    for style in _STYLES:
        labels = []
        for match in regex.finditer(style, prompt):
            label = match["label"]
            if (label in FIRST) if not labels else label == _next(labels[-1]["label"]):
                labels.append(match)
        if len(labels) > 1:
            ends = [match.start() for match in labels[1:]] + [len(prompt)]
            texts = [prompt[match.end() : end] for match, end in zip(labels, ends, strict=True)]
            if any(map(_LABEL_BEHIND.match, texts)):  # "male (A) or female (B)?"
                texts = [""] * len(labels)
            texts[-1] = regex.split(r"[.?!](?=\s)", texts[-1])[0]  # "Answer with the letter."
            return {match["label"].upper(): _text(text) for match, text in zip(labels, texts, strict=True)}
    return {}


def _next(label: str) -> str:
    return str(int(label) + 1) if label.isdecimal() else chr(ord(label) + 1)


def _text(text: str) -> str:
    """The text of an option without what leads to the next one, in lower case."""
    text = text.strip().partition("\n")[0]
    return regex.sub(r"(?<=\s)(?:or|and)$", "", text.rstrip(_ENDS + "([").lower()).strip(_ENDS)


def texts_of(options: Mapping[str, str]) -> dict[str, str]:
    """The texts of options that are known, as those of a prompt: in lower case, without punctuation at their end."""
    return {label: _text(text) for label, text in options.items()}


def named_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The label of the one option that an answer names by the module's rule, or None.

    Args:
        options: label -> text, from `options_of`; or `ANY`.
    """
    answer = fold(answer).strip()
    alone = _ALONE.fullmatch(answer)
    if alone and alone["label"].upper() in options:
        return alone["label"].upper()
    rest, texts = _without_texts(answer, options)
    if _DENIES.search(rest) and not _BEGINS.match(rest):
        return None
    found = [match for pattern in (_BRACKETS, _CAPITAL, _NAMED) for match in pattern.finditer(rest)]
    found += filter(None, [_MARKED.match(rest)])
    labels = {match["label"].upper() for match in found} & options.keys()
    named = labels or texts
    return next(iter(named)) if len(named) == 1 and (not texts or texts == named) else None


def _without_texts(answer: str, options: Mapping[str, str]) -> tuple[str, set[str]]:
    """The answer without the texts of options that stand in it, and the labels of those options."""
    found = set()
    for label, text in sorted(options.items(), key=lambda option: -len(option[1])):  # "male" is in "male child"
        if text:
            whole = [regex.match(rf"[\w--[{UNSPACED}]]", edge, regex.V1) for edge in (text[0], text[-1])]
            before = r"(?<!\w)" * bool(whole[0]) + r"(?<![-+.$€£]|\d[,:/])" * text[0].isdigit()
            behind = r"(?![\w#%°]|\+\+|[.,:/]\d)" * bool(whole[1])
            pattern = before + regex.escape(text) + behind
            answer, count = regex.subn(pattern, "\0", answer, flags=regex.IGNORECASE)
            if count:
                found.add(label)
    return answer, found


def listed_options(value: object) -> dict[str, str] | None:
    """The options that a sample lists: two and more capitals with a text each. None if it lists none."""
    if not isinstance(value, Mapping) or len(value) < 2:
        return None
    pairs = list(value.items())
    if all(isinstance(label, str) and label in ANY and isinstance(text, str) and text.strip() for label, text in pairs):
        return {str(label): str(text) for label, text in pairs}
    return None


def option_of(
    reference: str, prompt: str, options: Mapping[str, str] | None = None
) -> tuple[str, Mapping[str, str]] | None:
    """The option that a reference names, and the options; None if the sample is no choice.

    Args:
        options: the options, if they are not those of the prompt: label, a capital -> text.
    """
    options = texts_of(options) if options else options_of(prompt)
    if options:
        label = named_option(reference, options)
        return None if label is None else (label, options)
    alone = regex.fullmatch(r"[(\[]?([A-Za-z])[)\].:]?", fold(reference).strip())
    return (alone[1].upper(), ANY) if alone else None
