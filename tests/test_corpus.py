"""The embedded corpus: nothing of the test is in training, labels hold in the sound, the seed gives the bytes."""

import json
import random
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import soundfile

from soundwave.curation.espeak import Espeak
from soundwave.data.manifest import read_manifest
from soundwave.demo import corpus, grammar, tasks

STAGES = ("stage1", "labels", "stage2", "stage3")
TESTS = ("test", "test_voices")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return corpus.build_corpus(tmp_path_factory.mktemp("corpus") / "tiny", seed=3, size="tiny")


def rows(folder, *names):
    return [json.loads(line) for name in names for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def words(text):
    return re.sub(r"[^a-z ]", "", text.lower()).split()


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# the split


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def split(request):
    return grammar.split_sentences(random.Random(request.param))


def texts(sentences):
    return {sentence.text for sentence in chain.from_iterable(sentences.values())}


def test_no_test_sentence_is_in_training(split):
    train, test = split
    assert len(texts(test)) > 300
    assert not texts(train) & texts(test)


def test_test_sentences_hold_no_unseen_word(split):
    train, test = split
    assert not set(" ".join(texts(test)).split()) - set(" ".join(texts(train)).split())


def test_grammar_has_a_hundred_words(split):
    assert len(set(" ".join(texts(split[0])).split())) >= 100


def test_each_fact_is_asked_in_training_and_otherwise_in_the_test(split):
    ways = [
        Counter((sentence.options[0], sentence.options[1:]) for sentence in sentences["question"])
        for sentences in split
    ]
    assert len(ways[0]) == 29
    assert ways[0].keys() == ways[1].keys()
    assert min(ways[0].values()) >= 5 and min(ways[1].values()) >= 1


def test_six_codes_in_ten_repeat_a_digit(split):
    codes = [sentence.text.split() for sentence in split[0]["code"]]
    repeating = sum(any(first == second for first, second in zip(code, code[1:], strict=False)) for code in codes)
    assert 0.5 < repeating / len(codes) < 0.7


def test_every_sentence_of_an_intent_names_no_other(split):
    intents = Counter(text for sentences in split for name in grammar.COMMANDS for text in texts({0: sentences[name]}))
    assert set(intents.values()) == {1}


@pytest.mark.parametrize("size", ["quick", "full"])
def test_training_drawn_holds_every_word_of_the_test(size):
    rng = random.Random(0)
    train, test = grammar.split_sentences(rng)
    spoken = Counter(
        word for sentence in corpus._draw(train, corpus.SIZES[size]["train"], rng) for word in sentence.text.split()
    )
    assert all(spoken[word] >= 2 for word in " ".join(texts(test)).split())


@pytest.mark.parametrize("task", ["transcribe", "voice", "rate", "intent", "question"])
def test_full_size_has_200_test_samples_a_task(task):
    commands, codes, questions = corpus.SIZES["full"]["test"]
    transcribed, asked = corpus.SIZES["full"]["asked"]
    fitting = {"intent": commands, "question": questions}.get(task, commands + codes + questions)
    assert min(fitting, transcribed if task == "transcribe" else asked) >= 200


# what is written


def test_no_test_sentence_is_in_a_training_manifest(tiny):
    seen = {" ".join(words(row[key])) for row in rows(tiny, *STAGES) for key in ("text", "prompt") if key in row}
    tested = {" ".join(words(row["text"])) for row in rows(tiny, *TESTS)}
    assert len(tested) > 15
    assert not seen & tested


def test_no_prompt_of_training_holds_a_test_question(tiny):
    prompts = {" ".join(words(row["prompt"])) for row in rows(tiny, *STAGES) if row["task"] == "qa"}
    asked = {row["text"] for row in rows(tiny, *TESTS) if "intent" not in row}
    assert not [(text, prompt) for text in asked for prompt in prompts if text in prompt]


@pytest.mark.parametrize("name", STAGES + TESTS)
def test_manifest_is_read_by_the_library(tiny, name):
    samples = read_manifest(tiny / f"{name}.jsonl")
    assert len(samples) == json.loads((tiny / "corpus.json").read_text())["samples"][name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage1", {"transcribe"}),
        ("labels", {"transcribe"}),
        ("stage2", {"transcribe", "voice", "rate", "qa"}),
        ("stage3", {"transcribe", "voice", "rate", "intent", "question", "qa"}),
        ("test", {"transcribe", "voice", "rate", "intent", "question"}),
        ("test_voices", {"transcribe", "voice", "rate"}),
    ],
)
def test_manifest_has_its_tasks(tiny, name, expected):
    assert {row["task"] for row in rows(tiny, name)} == expected


def test_transcripts_are_words_without_punctuation_and_only_names_have_capitals(tiny):
    texts = [row["text"] for row in rows(tiny, *STAGES, *TESTS) if "text" in row]
    assert texts and all(re.fullmatch(r"(I|[a-z]+)( [A-Z]?[a-z]+| I)*", text) for text in texts)


@pytest.mark.parametrize("name", ["labels", "stage2"])
def test_ctc_writes_voice_and_rate_after_the_words(tiny, name):
    heard = [row for row in rows(tiny, name) if "text" in row]
    assert heard and all(row["ctc_text"] == f"{row['text']} {row['sex']} {row['rate']}" for row in heard)


def test_ctc_writes_the_words_alone_elsewhere(tiny):
    assert not any("ctc_text" in row for row in rows(tiny, "stage1", "stage3", *TESTS))


def test_qa_has_no_audio(tiny):
    qa = [row for row in rows(tiny, "stage2") if row["task"] == "qa"]
    assert qa and all(row.keys() == {"task", "prompt", "answer"} for row in qa)


def test_test_manifests_ask_for_direct_answers(tiny):
    answers = {"transcribe": "text", "voice": "sex", "rate": "rate", "intent": "intent"}
    for row in rows(tiny, *TESTS):
        assert row["answer"] == row[answers.get(row["task"], "answer")]


def test_audio_is_16_khz_mono_of_the_stated_duration(tiny):
    for row in rows(tiny, "stage1", *TESTS):
        info = soundfile.info(tiny / row["audio_filepath"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.duration == pytest.approx(row["duration"], abs=1e-3)


def test_held_out_voices_speak_in_their_test_only(tiny):
    unseen = {*corpus.HELD_OUT_FEMALE, *corpus.HELD_OUT_MALE}
    assert {row["voice"] for row in rows(tiny, "test_voices")} == unseen
    assert not {row["voice"] for row in rows(tiny, *STAGES, "test") if "voice" in row} & unseen


# building


def test_same_seed_gives_the_same_bytes(tiny, tmp_path):
    assert files(corpus.build_corpus(tmp_path / "again", seed=3, size="tiny")) == files(tiny)


def test_another_seed_gives_other_sentences_and_replaces_the_corpus(tmp_path):
    folder = corpus.build_corpus(tmp_path / "tiny", seed=4, size="tiny")
    before = {row["text"] for row in rows(folder, "stage1")}
    corpus.build_corpus(folder, seed=5, size="tiny")
    assert {row["text"] for row in rows(folder, "stage1")} != before
    assert json.loads((folder / "corpus.json").read_text())["seed"] == 5


def test_complete_corpus_is_left_alone(tiny):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    assert corpus.build_corpus(tiny, seed=3, size="tiny") == tiny
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before


def test_interrupted_build_is_done_again(tmp_path):
    (tmp_path / "tiny.partial" / "audio").mkdir(parents=True)
    (tmp_path / "tiny.partial" / "audio" / "stray.wav").write_bytes(b"")
    folder = corpus.build_corpus(tmp_path / "tiny", seed=3, size="tiny")
    assert not (folder / "audio" / "stray.wav").exists() and not (tmp_path / "tiny.partial").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"seed"'], ids=["empty", "list", "half"])
def test_a_damaged_marker_is_named(tmp_path, text):
    (tmp_path / "corpus.json").write_text(text)
    with pytest.raises(ValueError, match=r"corpus.json is damaged; delete .*, and the corpus is made again"):
        corpus.build_corpus(tmp_path, size="tiny")


def test_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files but no corpus.json"):
        corpus.build_corpus(tmp_path, size="tiny")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unknown_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size = 'huge', wanted one of full, quick, tiny"):
        corpus.build_corpus(tmp_path / "corpus", size="huge")


# voices


def fundamental(samples, sampling_rate):
    """Median over loud frames of the lag where the autocorrelation peaks, in Hz."""
    size = sampling_rate // 25
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 2]
    frames = frames[np.sqrt((frames**2).mean(1)) > 0.7 * np.sqrt((samples**2).mean())]
    frames = frames - frames.mean(1, keepdims=True)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * size)) ** 2)[:, :size]
    correlation /= correlation[:, :1] * (1 - np.arange(size) / size)
    lags = np.arange(sampling_rate // 400, sampling_rate // 60)
    # the smallest lag that is nearly as good: a period fits twice as well as once
    good = correlation[:, lags] > 0.9 * correlation[:, lags].max(1, keepdims=True)
    return np.median(sampling_rate / lags[good.argmax(1)])


def test_there_are_twelve_voices_half_of_them_female():
    female, male = {**corpus.FEMALE, **corpus.HELD_OUT_FEMALE}, {**corpus.MALE, **corpus.HELD_OUT_MALE}
    assert len(female) == len(male) >= 6 and not female.keys() & male.keys()


def test_female_voices_are_higher_than_male_ones():
    pitches = corpus.FEMALE | corpus.MALE | corpus.HELD_OUT_FEMALE | corpus.HELD_OUT_MALE
    sentence = "Is it sunny in London today? Tell me the weather for Rome."
    with Espeak() as espeak:
        heard = {
            voice: fundamental(*espeak.synthesize(sentence, voice=voice, pitch=pitch))
            for voice, pitch in pitches.items()
        }
    female = [heard[voice] for voice in (*corpus.FEMALE, *corpus.HELD_OUT_FEMALE)]
    male = [heard[voice] for voice in (*corpus.MALE, *corpus.HELD_OUT_MALE)]
    assert min(female) > 175 and max(male) < 145, heard


def test_rates_are_heard_in_the_durations(tiny):
    seconds = {rate: [] for rate in tasks.RATES}
    for row in rows(tiny, "stage1"):
        seconds[row["rate"]].append(row["duration"] / len(row["text"]))
    slow, normal, fast = (np.mean(seconds[rate]) for rate in ("slow", "normal", "fast"))
    assert slow > 1.25 * normal and normal > 1.25 * fast


# tasks

FIELDS = {
    "text": "what is the capital of france",
    "sex": "female",
    "rate": "slow",
    "intent": "music",
    "question": "What is the capital of France?",
    "answer": "Paris",
    "options": ("Paris", "Rome", "Berlin", "Madrid"),
}
TASK_FORMATS = [(task, format) for task, formats in tasks.FORMATS.items() for format in formats]


def phrasings(task, format="direct", count=3000):
    rng = random.Random(0)
    return [tasks.phrase(task, FIELDS, rng, format) for _ in range(count)]


@pytest.mark.parametrize(("task", "format"), TASK_FORMATS)
def test_task_has_at_least_fifty_prompts_in_every_format(task, format):
    prompts = {re.sub(r"(Options|Choose|One of): .*", r"\1", prompt) for prompt, _ in phrasings(task, format)}
    assert len(prompts) >= (50 if task != "qa" or format == "direct" else 20)


@pytest.mark.parametrize("task", tasks.FORMATS)
def test_direct_prompts_are_short(task):
    assert max(len(prompt.split()) for prompt, _ in phrasings(task)) <= 12


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("transcribe", "what is the capital of france"),
        ("voice", "female"),
        ("rate", "slow"),
        ("intent", "music"),
        ("question", "Paris"),
        ("qa", "Paris"),
    ],
)
def test_direct_answer_is_the_label(task, answer):
    assert {given for _, given in phrasings(task, count=50)} == {answer}


@pytest.mark.parametrize("task", [task for task, format in TASK_FORMATS if format == "choice"])
def test_choice_lists_the_answer_among_options_in_any_order(task):
    orders = set()
    for prompt, answer in phrasings(task, "choice", 50):
        options = re.search(r"(?:Options|Choose|One of): (.*)\.$", prompt)[1].split(", ")
        assert answer in options and len(set(options)) == len(options) == {"voice": 2, "rate": 3}.get(task, 4)
        orders.add(tuple(options))
    assert len(orders) > 1 and len({order.index(answer) for order in orders}) == len(options)


@pytest.mark.parametrize("task", [task for task, format in TASK_FORMATS if format == "natural"])
def test_natural_answer_is_a_sentence_around_the_label(task):
    label = phrasings(task, count=1)[0][1]
    assert all(label in answer and len(answer) > len(label) + 5 for _, answer in phrasings(task, "natural", 20))


@pytest.mark.parametrize("task", [task for task, format in TASK_FORMATS if format == "transcribe"])
def test_transcribe_first_gives_the_transcript_and_then_the_label(task):
    label = phrasings(task, count=1)[0][1]
    assert {answer for _, answer in phrasings(task, "transcribe", 20)} == {f"what is the capital of france\n{label}"}


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format = 'choice' of task = 'transcribe'"):
        tasks.phrase("transcribe", FIELDS, random.Random(0), "choice")
