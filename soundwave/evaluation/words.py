"""The words of a transcript, for the word error rate: which normaliser it gets, by its language or its script.

    language                                       normaliser                              counted
    English                                        Whisper's English one                   words
    Chinese, Japanese, Thai, Lao, Khmer, Burmese   Whisper's basic one, marks kept         characters without spaces
    Turkish, Azeri                                 the same, with İ for i and I for ı      words
    all others, Korean too; "und" (none's rules)   Whisper's basic one, marks kept         words

Where no language is given, the script of the references decides. Latin ones are English if at most one in ten of them
has a letter outside of a to z, and then marks count nevertheless (a Spanish "ano" is no "año"). Other languages in the
Latin alphabet without marks, such as Indonesian, must therefore be named.

Whisper's basic normaliser would drop all marks (category M), and with them the vowels of Hindi; here it keeps them.
Both normalisers drop what stands in brackets, and punctuation. The English one writes numbers in digits and joins those
said one by one ("seven five" is "75", one word), spells words the American way, opens contractions ("don't" is "do
not"), and drops hesitations ("uh").

`NORMALISERS` names what can be chosen instead: "english" and "basic" for all references, whatever their language,
"characters" (the basic one, counted in characters), and "none", which splits at white space and changes nothing.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Literal, NamedTuple

import regex
from whisper_normalizer.basic import ADDITIONAL_DIACRITICS, BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

LIBRARY = f"whisper_normalizer {version('whisper-normalizer')}"
# Codes of ISO 639 and English names of the languages that have rules of their own.
ENGLISH = {"en", "eng", "english"}
TURKISH = {"tr", "tur", "turkish", "az", "aze", "azj", "azb", "azeri", "azerbaijani", "crh", "gag"}
WITHOUT_SPACES = {
    *("zh", "zho", "chi", "cmn", "yue", "wuu", "lzh", "chinese", "mandarin", "cantonese", "ja", "jpn", "japanese"),
    *("th", "tha", "thai", "lo", "lao", "km", "khm", "khmer", "my", "mya", "bur", "burmese"),
}
NO_LANGUAGE = {"", "na", "n/a", "nan", "none", "null", "unk", "unknown", "auto"}  # place-holders of manifests
NORMALISERS = ("auto", "english", "basic", "characters", "none")
OUTSIDE_ENGLISH = 0.1  # so large a share of English references may have letters such as é
UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}"
    r"\p{Tai_Tham}"
)
_UNITS = regex.compile(rf"[{UNSPACED}]|[\p{{L}}\p{{M}}--[{UNSPACED}]]+", regex.V1)
_FIRST_UNSPACED = regex.compile(rf"[{UNSPACED}]", regex.V1)
_TURKISH_LETTER = regex.compile("[ıİğĞ]")
# Capitals that several small letters have, the common one first: Greek capitals are often written without accents. A
# letter of Linear A stands for each of them until the other text tells which one it is.
_CAPITALS = {
    "SS": "ss|ß",
    "I": "i|ı",
    "Α": "α|ά",
    "Ε": "ε|έ",
    "Η": "η|ή",
    "Ι": "ι|ί",
    "Ο": "ο|ό",
    "Υ": "υ|ύ",
    "Ω": "ω|ώ",
}
_OPEN = {capital: chr(0x10700 + i) for i, capital in enumerate(_CAPITALS)}
_SMALL = {_OPEN[capital]: small.split("|")[0] for capital, small in _CAPITALS.items()}
_PATTERN = {_OPEN[capital]: f"({small})" for capital, small in _CAPITALS.items()}
_RARER = regex.compile("|".join(small.split("|")[1] for small in _CAPITALS.values()))
_MARKS = {chr(0x300 + i): chr(0x10600 + i) for i in range(0x70)}
_MARKS |= {letter: chr(0x10680 + i) for i, letter in enumerate(ADDITIONAL_DIACRITICS) if letter not in "ßẞ"}
_TO_LETTERS, _TO_MARKS = str.maketrans(_MARKS), str.maketrans({value: key for key, value in _MARKS.items()})
_SAME = str.maketrans(
    {"\u2044": "/", **dict.fromkeys("’‘ʼ‛", "'"), **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")}
)


class Rules(NamedTuple):
    """How the words of a transcript are found.

    Attributes:
        kind: Whisper's English normaliser, its basic one with words or characters, or none.
        marks: whether marks count in English.
        turkish: whether the lower case of I is ı, and that of İ is i.
    """

    kind: Literal["english", "words", "characters", "none"]
    marks: bool = True
    turkish: bool = False

    @property
    def name(self) -> str:
        """The normaliser's name and version, for results."""
        if self.kind == "none":
            return "none (words between white space)"
        parts = [f"{LIBRARY} {'English' if self.kind == 'english' else 'basic'}"]
        parts += ["marks kept"] * self.marks + ["Turkish case"] * self.turkish
        return ", ".join(parts + ["characters"] * (self.kind == "characters"))


def rules_for(
    references: Sequence[str], languages: str | None | Sequence[str | None] = None, normaliser: str = "auto"
) -> list[Rules]:
    """The rules of each reference.

    Args:
        languages: language of all references, or of each: a code such as "en", "zh-CN" or "tur", or an English name.
            "und" stands for the rules of no language. None, and place-holders such as "na": the script decides.
        normaliser: one of `NORMALISERS`; "auto" chooses by language and script.

    Raises:
        ValueError: there is no such normaliser.
    """
    check_normaliser(normaliser)
    if languages is None or isinstance(languages, str):
        languages = [languages] * len(references)
    codes = [_code(language) for language in languages]
    undecided = [fold(text) for text, code in zip(references, codes, strict=True) if code is None]
    latin = [text for text in undecided if _is_latin(text) and not _TURKISH_LETTER.search(text)]
    outside = sum(any(c.isalpha() and not c.isascii() for c in text) for text in latin)
    english = outside <= OUTSIDE_ENGLISH * len(latin)
    found = [_rules(text, code, english) for text, code in zip(references, codes, strict=True)]
    if normaliser == "auto":
        return found
    if normaliser == "english":
        return [Rules("english", marks=False)] * len(found)
    if normaliser == "none":
        return [Rules("none")] * len(found)
    kind: Literal["words", "characters"] = "words" if normaliser == "basic" else "characters"
    return [Rules(kind, turkish=rules.turkish) for rules in found]


def check_normaliser(normaliser: str) -> None:
    """Raise ValueError for what is not one of `NORMALISERS`."""
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser = {normaliser!r}, but it must be one of {', '.join(NORMALISERS)}")


def check_language(language: str | None) -> None:
    """Raise ValueError for what is neither a code nor the English name of a language with rules of its own."""
    known = ENGLISH | TURKISH | WITHOUT_SPACES
    if language and not regex.fullmatch(r"[A-Za-z]{2,3}([-_]\w+)*", language) and _code(language) not in known:
        raise ValueError(f"language = {language!r}; give a code such as en, tr or zh; und has the rules of no language")


def is_language(code: object) -> bool:
    """Whether a manifest's value names a language; place-holders such as "na" do not."""
    return isinstance(code, str) and _code(code) is not None


def _code(language: str | None) -> str | None:
    code = (language or "").strip().lower().removeprefix("<|").removesuffix("|>")
    return None if code in NO_LANGUAGE else regex.split("[-_]", code)[0]


def _rules(text: str, code: str | None, english: bool) -> Rules:
    if code in ENGLISH:
        return Rules("english", marks=False)
    if code in WITHOUT_SPACES or (code in (None, "und") and _is_unspaced(text)):
        return Rules("characters")
    if code in TURKISH or (code is None and _TURKISH_LETTER.search(fold(text))):
        return Rules("words", turkish=True)
    return Rules("english") if code is None and english and _is_latin(text) else Rules("words")


def _is_unspaced(text: str) -> bool:
    """Whether most of a text, counted in words and characters, is in a script without spaces."""
    units = _UNITS.findall(fold(text))
    return 2 * sum(bool(_FIRST_UNSPACED.match(unit)) for unit in units) > len(units)


def _is_latin(text: str) -> bool:
    """Whether at least half of the letters are Latin ones; a text of digits alone is."""
    letters = regex.findall(r"\p{L}", fold(text))
    return 2 * sum(bool(regex.match(r"\p{Latin}", letter)) for letter in letters) >= len(letters)


def fold(text: str) -> str:
    """The text with one form for each character: composed, of full width or half width alike, one apostrophe, one dash.

    Characters of no width are dropped, except for the joiners of Persian and Indic scripts. Superscripts stay: 5² is
    not 52.
    """
    if text.isascii():
        return text.translate(_SAME)
    return unicodedata.normalize("NFC", "".join(map(_fold, unicodedata.normalize("NFC", text)))).translate(_SAME)


@cache
def _fold(character: str) -> str:
    if unicodedata.category(character) == "Cf" and character not in "\u200c\u200d" or character in "\ufe0e\ufe0f":
        return ""
    tag = unicodedata.decomposition(character).partition(" ")[0]
    if tag in ("<super>", "<sub>"):
        return character
    folded = unicodedata.normalize("NFKC", character)
    return f" {folded}" if tag == "<fraction>" else folded


def lower(text: str, *, turkish: bool = False) -> str:
    """A folded text in lower case. The Greek final sigma becomes a common one; "ß" stays."""
    text = text.replace("İ", "i")
    return (text.replace("I", "ı") if turkish else text).lower().replace("i\u0307", "i").replace("ς", "σ")


def words_of(text: str, rules: Rules) -> list[str]:
    """The words of a transcript, or its characters."""
    return words_of_pair(text, "", rules)[0]


def words_of_pair(reference: str, answer: str, rules: Rules) -> tuple[list[str], list[str]]:
    """The words of a reference and of an answer. A capital equals each small letter that it is the capital of.

    STRASSE is "straße" or "strasse", and KIZ is "kız" or "kiz", whichever the other text has.
    """
    one, other = _words(reference, rules), _words(answer, rules)
    return _resolved(one, other), _resolved(other, one)


def _words(text: str, rules: Rules) -> list[str]:
    """The words, in which letters of Linear A stand for `_CAPITALS`."""
    if rules.kind == "none":
        return text.split()
    text = fold(text)
    if rules.kind == "english":
        english = _english()
        if rules.marks:
            spelt = unicodedata.normalize("NFD", text.lower()).translate(_TO_LETTERS)
            text = unicodedata.normalize("NFC", english(spelt).translate(_TO_MARKS))
        else:
            text = english(text)
        return [word for word in text.split() if regex.search(r"\w", word)]  # of "..." it leaves full stops
    for capital, letter in _OPEN.items():
        if capital != "I" or not rules.turkish:
            text = text.replace(capital, letter)
    words = unicodedata.normalize("NFC", _basic(lower(text, turkish=rules.turkish))).split()
    if rules.kind == "words":
        return words
    return list("".join(words).replace("\u0e4d\u0e32", "ำ").replace("\u0ecd\u0eb2", "ຳ"))  # one letter each, as typed


def _resolved(words: list[str], others: list[str]) -> list[str]:
    """`words` with small letters for the capitals that leave several open: those of the same word in `others`."""
    rarer = [other for other in others if _RARER.search(other)]
    found = []
    for word in words:
        if any(letter in word for letter in _SMALL):
            pattern = "".join(_PATTERN.get(letter, regex.escape(letter)) for letter in word)
            plain = "".join(_SMALL.get(letter, letter) for letter in word)
            word = next((other for other in rarer if regex.fullmatch(pattern, other)), plain)
        found.append(word)
    return found


_basic = BasicTextNormalizer(preserve_marks=True)


@cache
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()  # reads a table of spellings
