"""What answers are worth: which pairs of texts are alike, which option an answer names, how word errors are counted.

Two tables list the kinds of fault that make a score too good or too bad: pairs of answers that differ, or do not, and
transcripts whose errors were counted by hand.
"""

import random
import unicodedata

import jiwer
import pytest
from whisper_normalizer.english import EnglishTextNormalizer

from soundwave.evaluation.choices import named_option, options_of
from soundwave.evaluation.intervals import tally
from soundwave.evaluation.scores import has_words, judge, names_of, normalise, word_error_rate
from soundwave.evaluation.words import check_language, is_language, rules_for, words_of

# ---------------------------------------------------------------- answers

DIFFERENT = {
    "brackets": [("(A)x", "(B)x"), ("[yes]", "[no]"), ("<male>", "<female>"), ("{1}", "{2}"), ("yes (loud)", "yes")],
    "nothing": [("yes", ""), ("", ""), ("...", ""), ("(B)", " \n"), ("yes", "..."), ("yes", "\u200b")],
    "signs": [("-5", "5"), ("+", "-"), ("+5", "5"), ("±5", "5"), ("A-", "A"), ("5-", "5"), ("−3", "3"), ("1-2", "12")],
    "symbols": [
        ("C++", "C#"),
        ("$5", "€5"),
        ("50%", "50"),
        ("×", "÷"),
        ("≥", "≤"),
        ("!=", "="),
        ("♀", "♂"),
        ("#1", "1"),
    ],
    "emoji": [("😀", "😢"), (":)", ":("), ("👍", "👎")],
    "digits": [
        ("7", "8"),
        ("3.5", "35"),
        ("3.5", "3 5"),
        (".5", "5"),
        ("10:30", "1030"),
        ("1,000", "1.000"),
        ("٣", "٤"),
    ],
    "powers and fractions": [("5²", "52"), ("x²", "x2"), ("½", "12"), ("2½", "21/2"), ("1/2", "12")],
    "marks": [("दिन", "दान"), ("année", "annee"), ("ไม่", "ไม้"), ("má", "ma"), ("שׁ", "שׂ"), ("कि", "की")],
    "letters": [("Maße", "Masse"), ("kız", "kiz"), ("ø", "o"), ("đ", "d"), ("don't", "dont"), ("seven", "7")],
    "punctuation alone": [("?", "!"), (".", "..."), ("*", "**")],
}
ALIKE = {
    "case": [("yes", "YES"), ("Straße", "STRASSE"), ("İstanbul", "istanbul"), ("KIZ", "kız"), ("ΟΔΟΣ", "οδος")],
    "stops": [("yes", "Yes."), ("No, it is.", "no it is"), ("Hello !", "hello"), ("¿Qué?", "qué"), ("U.S.", "US")],
    "stops of other scripts": [("हाँ।", "हाँ"), ("نعم؟", "نعم"), ("你好，世界。", "你好世界"), ("はい！", "はい")],
    "quotation marks": [("yes", "'Yes,'"), ("yes", "“Yes!”"), ("«oui»", "oui"), ("「はい」", "はい"), ("n’t", "n't")],
    "spaces": [("turn on\nlight", " turn  on light "), ("你好 世界", "你好世界"), ("a\u00a0b", "a b")],
    "one character in two forms": [("é", "e\u0301"), ("ＹＥＳ！", "yes"), ("５", "5"), ("ﬁve", "five"), ("한", "한")],
    "half width": [("ｶﾞ", "ガ"), ("ｺｰﾋｰ", "コーヒー")],
    "dashes and fractions": [("-5", "−5"), ("5 - 3", "5 – 3"), ("1/2", "½"), ("2 1/2", "2½")],
    "a sentence that ends": [("It is 3.5", "It is 3.5."), ("(yes)", "(yes.)"), ("C#", "C#."), ("50%", "50%.")],
}  # fmt: skip


def pairs(table):
    return [pytest.param(*pair, id=f"{kind}: {pair[0]!r} {pair[1]!r}") for kind in table for pair in table[kind]]


@pytest.mark.parametrize(("reference", "answer"), pairs(DIFFERENT))
def test_answers_that_differ_are_never_right(reference, answer):
    assert not judge(reference, answer).right
    assert not judge(answer, reference).right


@pytest.mark.parametrize(("reference", "answer"), pairs(ALIKE))
def test_case_stops_and_the_form_of_characters_do_not_count(reference, answer):
    assert judge(reference, answer).right
    assert judge(answer, reference).right
    assert judge(reference, reference).right


def test_the_language_says_what_a_capital_i_is():
    assert judge("IRAK", "ırak", turkish=True).right and not judge("Irak", "irak", turkish=True).right
    assert judge("Irak", "irak").right


def test_composed_and_decomposed_characters_are_the_same():
    letters = "aAıİß .,!?'\"()-−5½²ＡéΣς你。，हिêガ한\u0301\u0323\u200bσ💡%$"
    chance = random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choices(letters, k=chance.randint(0, 9)))
        composed, decomposed = (normalise(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
        assert normalise(text) == composed == decomposed, text


# ---------------------------------------------------------------- multiple choice

SEX = "Is it (A) male or (B) female? Answer with the letter."
SOUND = "Which?\nA. dog barking\nB. vitamin C\nC. cat\nD. a dog"
BEHIND = "Is the speaker male (A) or female (B)? Give the letter."


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (SEX, {"A": "male", "B": "female"}),
        (SOUND, {"A": "dog barking", "B": "vitamin c", "C": "cat", "D": "a dog"}),
        ("[a] one [b] two", {"A": "one", "B": "two"}),
        ("1) slow\n2) fast", {"1": "slow", "2": "fast"}),
        ("A: x, B: y, C: z", {"A": "x", "B": "y", "C": "z"}),
        ("（Ａ）男性（Ｂ）女性", {"A": "男性", "B": "女性"}),
        ("(а) да (б) нет", {"А": "да", "Б": "нет"}),
        (BEHIND, {"A": "", "B": ""}),
        ("What is 3.5 (a number)?", {}),
        ("J. K. Rowling wrote it. Who?", {}),
        ("(B) x (C) y", {}),
        ("", {}),
    ],
)
def test_the_options_of_a_prompt(prompt, options):
    assert options_of(prompt) == options


NAMED = [
    (SEX, "A", ["A", "(A)", "A.", "a", "(a)", "[A]", "**A**", "（Ａ）", "'A'", "A) male", "A. Male.", "(A) It is low.",
                "The answer is A.", "the answer is a", "Answer: A", "Option A", "I choose A because it is low.",
                "The correct choice is (A).", "male", "MALE!", "The speaker is male.", "(A) male", "A\n\nIt is low."]),
    (SEX, "B", ["B", "female", "The answer is B", "It is B.", "I'm sure it is B.", "La respuesta es B", "答案是B。",
                "答えはBです。", "정답은 B입니다.", "B is correct", "Female, it cannot be anything else."]),
    (SEX, None, ["", " ", "C", "A or B", "A/B", "Both A and B.", "A) female", "It is not A.", "not male", "A man",
                 "It cannot be A.", "It can't be A", "never B", "Anything but A", "nicht A", "pas B.", "не B", "不是B",
                 "I'm not sure", "(A) male (B) female", "neither", "males", "A-", "?"]),
    (SOUND, "A", ["dog barking", "I hear a dog barking.", "A: dog barking"]),
    (SOUND, "B", ["vitamin C", "B. vitamin C"]),
    (SOUND, "C", ["c", "C", "cat", "The answer is a cat", "答案是C"]),
    (SOUND, "D", ["a dog", "It is a dog.", "I choose D, since it barks."]),
    (BEHIND, "B", ["B", "(B)", "The answer is B"]),
    (BEHIND, None, ["female"]),
    ("说话人？A. 男性 B. 女性", "B", ["女性", "说话人是女性", "B"]),
    ("1) slow 2) fast", "2", ["2", "The answer is 2.", "2) fast", "fast"]),
    ("1) slow 2) fast", None, ["2.5", "-2", "2,000", "2:30"]),
    ("(A) 1 (B) 2 (C) 10", "A", ["1", "1.", "There is 1", "1, I think"]),
    ("(A) 1 (B) 2 (C) 10", None, ["-1", "1.5", "1,000", "2.0", "$2", "1%", "10:30"]),
    ("(A) C (B) G", None, ["the note C#", "C++"]),
    ("Can you hear it? (A) Yes (B) No", "B", ["No, I cannot.", "No. It isn't there", "no"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "option", "answer"), [(prompt, option, text) for prompt, option, texts in NAMED for text in texts]
)
def test_the_option_that_an_answer_names(prompt, option, answer):
    assert named_option(answer, options_of(prompt)) == option


def test_a_choice_is_right_if_both_name_the_same_option_and_a_failure_is_told():
    assert judge("(B)", "It is female.", SEX) == (True, True, "B")
    assert judge("female", "B", SEX) == (True, True, "B")
    assert judge("(B)", "A", SEX) == (False, True, "A")
    assert judge("(B)", "", SEX) == (False, True, None)
    assert judge("(B)", "b.", "no options here").right and not judge("(B)", "(A)", "").right
    assert not judge("C", "C#", "Which key?").right and not judge("A", "A*", "Which grade?").right
    assert judge("turn left", "Turn left.", SEX) == (True, False, None)  # names no option: a text


# ---------------------------------------------------------------- words

ERRORS = [  # reference, answer, errors, words or characters of the reference, language
    ("Hindi, another vowel", "दिन", "दान", 1, 1, None),
    ("Hindi, one of three", "वह घर जाता।", "वह घर जाती", 1, 3, None),
    ("Malayalam, a word missing", "ഞാൻ വീട്ടിലേക്ക് പോകുന്നു", "ഞാൻ പോകുന്നു", 1, 3, None),
    ("Tamil", "நான் வீடு", "நான் வீடி", 1, 2, None),
    ("Bengali, composed or not", "ভালো", "ভাল\u09c7\u09be", 0, 1, None),
    ("Arabic, a vowel sign", "كَتَبَ", "كُتِبَ", 1, 1, None),
    ("Vietnamese, a tone", "bán nhà", "bàn nhà", 1, 2, None),
    ("Spanish", "año nuevo", "ano nuevo", 1, 2, None),
    ("Spanish, the other way round", "ano", "año", 1, 1, None),
    ("German, umlaut", "schon", "schön", 1, 1, "de"),
    ("German, capitals", "die Straße", "DIE STRASSE", 0, 2, None),
    ("German, two words", "Maße", "Masse", 1, 1, "de"),
    ("German, a word that English drops", "um acht", "acht", 1, 2, "de"),
    ("Polish", "łaska", "laska", 1, 1, None),
    ("Turkish, capitals", "İstanbul IŞIK", "istanbul ışık", 0, 2, None),
    ("Turkish, capitals without a letter that tells", "KIZ", "kız", 0, 1, "tr"),
    ("Turkish, other words", "kız", "kiz", 1, 1, None),
    ("Azeri", "QIZ", "qiz", 1, 1, "az"),
    ("Greek, final sigma", "ΟΔΟΣ", "οδος", 0, 1, None),
    ("Greek, capitals without accents", "ΚΑΛΗΜΕΡΑ ΣΑΣ", "καλημέρα σας", 0, 2, None),
    ("Greek, an accent", "πότε", "ποτέ", 1, 1, None),
    ("Russian", "Ёж, ёж", "ёж еж", 1, 2, None),
    ("Hebrew", "שלום, עולם", "שלום עולם", 0, 2, None),
    ("Chinese, a comma", "你好，世界", "你好世界", 0, 4, None),
    ("Chinese, spaces", "你 好 世 界", "你好世界", 0, 4, None),
    ("Chinese, one of four", "你好世界", "你好世间", 1, 4, None),
    ("Chinese with English", "我用 Python 写", "我用python写", 0, 9, None),
    ("Japanese", "コーヒーを飲む。", "コーヒを飲む", 1, 7, None),
    ("Japanese, half width", "ｺｰﾋｰ", "コーヒー", 0, 4, None),
    ("Thai", "น้ำ", "นำ", 1, 3, None),
    ("Thai, spaces", "สวัสดี ครับ", "สวัสดีครับ", 0, 10, None),
    ("Lao", "ສະບາຍດີ", "ສະບາຍດ", 1, 7, None),
    ("Khmer", "សួស្តី", "សួស្ត", 1, 6, None),
    ("Burmese", "မင်္ဂလာပါ", "မင်္ဂလာပ", 1, 9, None),
    ("Korean is counted in words", "안녕 하세요", "안녕하세요", 2, 2, None),
    ("one character in two forms", "café au lait", "cafe\u0301 au lait", 0, 3, "fr"),
    ("full width", "ＡＢＣ １２", "abc 12", 0, 2, None),
    ("English, contraction", "I don’t know", "i do not know", 0, 4, None),
    ("English, spelling and numbers", "twenty-five colours", "25 colors", 0, 2, None),
    ("English, hesitation and title", "Um, Mr. Smith", "mister smith", 0, 2, None),
    ("English, digits one by one", "seven five", "seventy five", 0, 1, None),
    ("no language's rules, digits one by one", "seven five", "seven four", 1, 2, "und"),
    ("English, named: marks do not count", "cafe", "café", 0, 1, "en"),
    ("brackets", "hello (laughs) world", "hello world", 0, 2, None),
    ("brackets of full width", "（笑）你好", "你好", 0, 2, None),
]


@pytest.mark.parametrize(("reference", "answer", "errors", "of", "language"), [row[1:] for row in ERRORS],
                         ids=[row[0] for row in ERRORS])  # fmt: skip
def test_word_errors_counted_by_hand(reference, answer, errors, of, language):
    assert len(words_of(reference, rules_for([reference], language)[0])) == of
    assert word_error_rate([reference], [answer], language=language) == pytest.approx(errors / of, abs=1e-12)


def test_english_is_counted_as_whisper_counts_it():
    whisper = EnglishTextNormalizer()
    texts = [
        "Mr. O'Neil's got £20 and 5 per cent",
        "We'd been there, colour TV, the 3rd of May",
        "gonna pay $3 and 50 cents",
    ]
    answers = ["mister o'neil got 20 pounds", "we had been their color t v the third may", "going to pay $3.50"]
    expected = jiwer.wer([whisper(text).strip() for text in texts], [whisper(text).strip() for text in answers])
    assert 0 < expected < 1
    assert word_error_rate(texts, answers, language="en") == pytest.approx(expected)
    assert word_error_rate(texts, answers) == pytest.approx(expected)


def test_latin_references_are_english_if_nearly_all_are_plain():
    plain, german = ["the light is on"] * 19, ["das Licht ist schön"]
    assert {rules.kind for rules in rules_for(plain)} == {"english"}
    assert {rules.kind for rules in rules_for(plain + german)} == {"english"}
    assert {rules.kind for rules in rules_for(plain[:8] + german)} == {"words"}  # one in nine
    mixed = rules_for(["the light", "你好", "дом", "ışık", "12"])
    assert [rules.kind for rules in mixed] == ["english", "characters", "words", "words", "english"]
    assert [rules.turkish for rules in mixed] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("language", "kind"),
    [("en-US", "english"), ("eng_Latn", "english"), ("English", "english"), ("<|en|>", "english"), ("de", "words"),
     ("zh-CN", "characters"), ("cmn", "characters"), ("Thai", "characters"), ("ko", "words"), ("na", "english"),
     ("", "english"), (None, "english"), ("und", "words")],
)  # fmt: skip
def test_a_language_is_known_by_its_code_or_name(language, kind):
    check_language(language)
    assert rules_for(["it is on"], language)[0].kind == kind


def test_what_is_no_language_is_refused_or_passed_over():
    for wrong in ("englsh", "en US", "1"):
        with pytest.raises(ValueError, match=f"language = '{wrong}'; give a code such as en"):
            check_language(wrong)
    assert not is_language("na") and not is_language(None) and not is_language(5) and is_language("fr")


def test_results_name_the_normaliser_and_its_version():
    names = names_of(rules_for(["the light is on", "it is off", "你好"]))
    assert names == (
        "whisper_normalizer 0.1.15 English, marks kept (2 samples); "
        "whisper_normalizer 0.1.15 basic, marks kept, characters (1 samples)"
    )
    assert names_of(rules_for(["it"], "tr")) == "whisper_normalizer 0.1.15 basic, marks kept, Turkish case"
    assert names_of(rules_for(["it"], "en")) == "whisper_normalizer 0.1.15 English"


@pytest.mark.parametrize("text", ["", " ", "...", "[laughs]", "(笑)", "。", "\u200b", "?!", "♪"])
def test_what_holds_no_words(text):
    assert not has_words(text)
    assert has_words(f"{text} a")


def test_any_text_is_counted_and_equals_itself():
    chance = random.Random(0)
    letters = [chr(chance.randrange(0x20, 0x3000)) for _ in range(500)] + list("IİıßSSς$£%.,'’5 0one")
    for i in range(1500):
        text = "a " + "".join(chance.choices(letters, k=chance.randint(1, 12)))
        for language in (None, "en", "tr", "zh", "de"):
            rules = rules_for([text], language)[0]
            assert words_of(text, rules) == words_of(text, rules)
            if has_words(text, rules):
                assert word_error_rate([text], [text], language=language) == 0, (i, text, language)


def test_tallies_count_as_the_scores_do():
    rows = [
        {"sample": "1", "task": "transcribe", "reference": "seven five", "answer": "seven four"},
        {"sample": "2", "task": "voice", "reference": "(A)", "answer": ""},
        {"sample": "3", "task": "voice", "reference": "-5", "answer": "5"},
        {"sample": "4", "task": "voice", "reference": "male", "answer": "Male."},
    ]
    found = tally(rows, {row["sample"]: row["sample"] for row in rows}, language="und")
    assert (found["transcribe"].count, found["transcribe"].of) == ([1], [2])
    assert found["voice"].count == [0, 0, 1]
