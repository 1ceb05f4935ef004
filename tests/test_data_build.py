"""Data built by recipes: each building block, the same bytes wherever a run is killed, and recipes that are refused."""

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from soundwave.cli import main
from soundwave.curation.build import build
from soundwave.curation.recipes import load_recipe
from soundwave.data.manifest import read_manifest
from soundwave.data.splicing import at_level, loudest_part
from tests.killing import until_done

ROOT = Path(__file__).resolve().parents[1]
RATE = 16_000
PITCH = {"anna": 200, "ben": 120, "cleo": 300}  # Hz
WORDS = ("one", "two", "three")
SOUNDS = ("bell", "dog", "rain", "saw", "sea")

PHRASINGS = {
    "tasks": {
        "transcribe": {"prompts": ["Write it down."], "natural": ["It says {answer}."]},
        "said": {"prompts": ["Who says what?"], "natural": ["The {nth} speaker says {answer}."]},
        "turn": {"prompts": ["What does the {nth} speaker say?"], "natural": ["Speaker {number} says {answer}."]},
        "speakers": {"prompts": ["How many speakers?"], "natural": ["There are {answer}."]},
        "sound": {
            "prompts": [{"pattern": "{} {}.", "words": [["Name", "Give"], ["the sound", "the noise", "what rings"]]}],
            "natural": ["It is {answer}."],
        },
    },
    "formats": {"choice": [" Choose: {options}"], "natural": [" In a sentence."], "transcribe": [" Words first."]},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder of words by three speakers, a tone of its own for each, and of sounds whose loud second is known."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    time = np.arange(RATE // 4) / RATE
    words = []
    for speaker, pitch in PITCH.items():
        for place, word in enumerate(WORDS):
            soundfile.write(
                folder / f"{speaker}-{word}.wav", 0.1 * np.sin(2 * np.pi * pitch * (1 + place) * time), RATE
            )
            words.append(
                {"audio_filepath": f"{speaker}-{word}.wav", "text": word, "speaker": speaker, "split": "train"}
            )
    words.append(words[0] | {"text": "never", "split": "test"})
    sounds = []
    for label in SOUNDS:
        samples = rng.normal(0, 0.01, 5 * RATE)
        samples[2 * RATE : 3 * RATE] *= 20
        soundfile.write(folder / f"{label}.wav", samples, RATE)
        sounds.append({"audio_filepath": f"{label}.wav", "sound": label, "fold": 1})
    for name, rows in (("words", words), ("sounds", sounds)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "phrasings.yaml").write_text(yaml.safe_dump(PHRASINGS))
    return folder


def write_recipe(folder: Path, given: Path, tasks: list, **changes) -> Path:
    recipe = {
        "seed": 3,
        "phrasings": str(given / "phrasings.yaml"),
        "sources": {
            "words": {"manifest": str(given / "words.jsonl"), "where": {"split": "train"}},
            "sounds": {"manifest": str(given / "sounds.jsonl"), "label": "sound", "where": {"fold": [1, 2]}},
        },
        "tasks": tasks,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def made(folder: Path, sources: Path, task: dict, **changes) -> list[dict]:
    built = build(write_recipe(folder, sources, [task], **changes), folder / "out")
    read_manifest(built.manifest)  # it trains as it stands
    return [json.loads(line) for line in built.manifest.read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


ASK = {"kind": "question", "source": "sounds", "task": "sound"}
EVERY = [
    {"kind": "strings", "source": "words", "count": 4, "clips": [1, 3]},
    {"kind": "speakers", "source": "words", "count": 6, "clips": [1, 2], "ask": {"said": 1, "turn": 1, "speakers": 1}},
    {"kind": "sound", "source": "words", "sounds": "sounds", "count": 4, "formats": {"direct": 1, "choice": 1}},
    {"kind": "question", "source": "sounds", "task": "sound", "formats": {"natural": 1}},
]


# ---------------------------------------------------------------- the building blocks


def test_strings(sources, tmp_path):
    rows = made(tmp_path, sources, EVERY[0] | {"count": 20})
    assert all(row["task"] == "transcribe" and row["answer"] == row["text"] for row in rows)
    assert {len(row["text"].split()) for row in rows} == {1, 2, 3}
    assert {row["speaker"] for row in rows} == set(PITCH)
    assert not any("never" in row["text"] for row in rows)  # of another split


def test_speakers_say_what_the_answer_says(sources, tmp_path):
    task = {"kind": "speakers", "source": "words", "count": 20, "speakers": [2, 3], "ask": {"said": 1}}
    for row in made(tmp_path, sources, task):
        said = re.findall(r"The (\w+) speaker says (\w+)\.", row["answer"])
        assert [nth for nth, _ in said] == ["first", "second", "third"][: len(row["speakers"])]
        assert " ".join(word for _, word in said) == row["text"]
        assert len(set(row["speakers"])) == len(row["speakers"]) in (2, 3)
        # The loudest frequency of each part is that of its speaker and word.
        samples, _ = soundfile.read(tmp_path / "out" / row["audio_filepath"])
        spectrum = np.abs(np.fft.rfft(samples))
        for speaker, (_, word) in zip(row["speakers"], said, strict=True):
            bin_ = PITCH[speaker] * (1 + WORDS.index(word)) * len(samples) / RATE
            near = spectrum[round(bin_) - 8 : round(bin_) + 9].max()
            assert near > 0.2 * spectrum.max()


@pytest.mark.parametrize("form", ["direct", "natural"])
def test_one_speaker_is_asked_for(sources, tmp_path, form):
    task = {"kind": "speakers", "source": "words", "count": 12, "ask": {"turn": 1}, "formats": {form: 1}}
    for row in made(tmp_path, sources, task):
        nth = re.search(r"the (\w+) speaker", row["prompt"])[1]
        turn = ["first", "second", "third"].index(nth)
        word = row["text"].split()[turn]
        assert row["answer"] == (word if form == "direct" else f"Speaker {turn + 1} says {word}.")


def test_speakers_are_counted(sources, tmp_path):
    task = {"kind": "speakers", "source": "words", "count": 12, "ask": {"speakers": 1}}
    for row in made(tmp_path, sources, task):
        assert row["answer"] == ["one", "two", "three"][len(row["speakers"]) - 1]


def test_sound_between_words_has_its_token(sources, tmp_path):
    task = {"kind": "sound", "source": "words", "sounds": "sounds", "count": 10, "seconds": 1.0, "token": "<{label}>"}
    for row in made(tmp_path, sources, task | {"level": [0, 0]}):
        first, second = row["text"].split()
        assert row["ctc_text"] == f"{first} <{row['sound']}> {second}"
        assert row["answer"] == (row["text"] if row["task"] == "transcribe" else row["sound"])
        samples, _ = soundfile.read(tmp_path / "out" / row["audio_filepath"])
        # A second of noise as loud as the words, which are tones of a quarter of a second each, with gaps.
        assert 1.5 + 4 * 0.05 <= row["duration"] == len(samples) / RATE <= 1.5 + 4 * 0.3
        # The tones are below 1 000 Hz, and what is above is the noise of the sound.
        middle, begin = samples[len(samples) // 2 - 2000 :][:4000], samples[:4000]
        above = [np.square(np.abs(np.fft.rfft(part))[4000 * 1200 // RATE :]).sum() for part in (middle, begin)]
        assert above[0] > 20 * above[1]


@pytest.mark.parametrize("answer_with", ["text", "letter", "both"])
def test_choices_are_shuffled_and_hold_the_answer(sources, tmp_path, answer_with):
    task = {"kind": "question", "source": "sounds", "task": "sound", "count": 40, "options": 4}
    rows = made(tmp_path, sources, task | {"formats": {"choice": 1}, "answer_with": answer_with})
    letters = Counter()
    for row in rows:
        options = dict(re.findall(r"\((\w)\) (\w+)", row["prompt"]))
        label = Path(row["audio_filepath"]).stem
        wanted = SOUNDS[int(label.rpartition("-")[2])]
        letter = next(name for name, text in options.items() if text == wanted)
        assert list(options) == list("ABCD") and len(set(options.values())) == 4
        assert row["answer"] == {"text": wanted, "letter": letter, "both": f"({letter}) {wanted}"}[answer_with]
        letters[letter] += 1
    assert set(letters) == set("ABCD") and "text" not in rows[0]
    assert Counter(row["audio_filepath"] for row in rows) == dict.fromkeys(
        Counter(row["audio_filepath"] for row in rows), 8
    )


def test_transcribe_then_answer(sources, tmp_path):
    task = {
        "kind": "question",
        "source": "words",
        "task": "speakers",
        "answer": "speaker",
        "formats": {"transcribe": 1},
    }
    for row in made(tmp_path, sources, task):
        index = int(Path(row["audio_filepath"]).stem.rpartition("-")[2])
        assert row["answer"] == f"{WORDS[index % 3]}\n{list(PITCH)[index // 3]}"
        assert row["prompt"] == "How many speakers? Words first."


def test_ctc_learns_the_token_of_a_sound_that_is_asked_for(sources, tmp_path):
    task = {"kind": "question", "source": "sounds", "task": "sound", "token": "heard: {label}"}
    rows = made(tmp_path, sources, task)
    assert {(row["answer"], row["ctc_text"]) for row in rows} == {(each, f"heard: {each}") for each in SOUNDS}
    assert not any("text" in row for row in rows)


def test_each_sound_may_have_a_word_of_its_own(sources, tmp_path):
    words = {label: f"word {place}" for place, label in enumerate(SOUNDS)}
    for kind in (EVERY[2] | {"count": 20}, ASK):
        (folder := tmp_path / kind["kind"]).mkdir()
        for row in made(folder, sources, kind | {"token": words, "formats": {"direct": 1}}):
            sound = row.get("sound", row["answer"])
            assert words[sound] in row["ctc_text"] and sound not in row["ctc_text"]


def test_the_token_may_stand_at_the_end_before_a_tail_of_silence(sources, tmp_path):
    kind = EVERY[2] | {"count": 10, "token": "{label}", "token_at": "end", "tail": 0.25}
    for row in made(tmp_path, sources, kind):
        assert row["ctc_text"] == f"{row['text']} {row['sound']}"
        samples, _ = soundfile.read(tmp_path / "out" / row["audio_filepath"])
        assert (
            len(samples) / RATE == row["duration"] and not samples[-RATE // 4 :].any() and samples[: -RATE // 4].any()
        )


def test_questions_with_and_without_a_tail_have_recordings_of_their_own(sources, tmp_path):
    tasks = [ASK | {"count": 2}, ASK | {"count": 2, "tail": 0.5}]
    built = build(write_recipe(tmp_path, sources, tasks), tmp_path / "out")
    rows = [json.loads(line) for line in built.manifest.read_text().splitlines()]
    assert Counter(row["duration"] for row in rows) == {5.0: 2, 5.5: 2}
    for row in rows:
        assert soundfile.info(tmp_path / "out" / row["audio_filepath"]).duration == row["duration"]


def test_recordings_are_played_at_other_speeds(sources, tmp_path):
    task = {"kind": "question", "source": "words", "task": "transcribe", "times": 2, "speed": [0.8, 1.25]}
    rows = made(tmp_path, sources, task)
    assert len({row["audio_filepath"] for row in rows}) == len(rows) == 2 * len(PITCH) * len(WORDS)
    assert all(row["answer"] == row["text"] for row in rows)
    speeds = [row["speed"] for row in rows]
    assert 0.8 <= min(speeds) < 0.9 and 1.1 < max(speeds) <= 1.25
    tones = {pitch * (1 + place) for pitch in PITCH.values() for place in range(len(WORDS))}
    for row in rows:
        audio, _ = soundfile.read(tmp_path / "out" / row["audio_filepath"])
        assert len(audio) == pytest.approx(RATE / 4 / row["speed"], abs=2)
        tone = np.abs(np.fft.rfft(audio, RATE)).argmax()  # Hz
        assert min(abs(tone - row["speed"] * each) for each in tones) < 3


def test_sounds_are_played_at_other_speeds_and_words_are_not(sources, tmp_path):
    task = EVERY[2] | {"count": 12, "seconds": 2.0, "speed": [0.6, 1.8], "formats": {"direct": 1}}
    rows = made(tmp_path, sources, task)
    speeds = [row["speed"] for row in rows]
    assert 0.6 <= min(speeds) < 0.8 and 1.4 < max(speeds) <= 1.8
    for row in rows:
        audio, _ = soundfile.read(tmp_path / "out" / row["audio_filepath"])
        spectrum = np.fft.rfft(audio)
        spectrum[: 2000 * len(audio) // RATE] = 0  # without the words
        power = np.square(np.fft.irfft(spectrum, len(audio)))
        power = power[: len(power) // 160 * 160].reshape(-1, 160).mean(1)  # each hundredth of a second
        assert (power > power.max() / 10).sum() / 100 == pytest.approx(1 / row["speed"], abs=0.05)
        assert len(audio) / RATE > 2.5


def test_phrasings_are_all_used(sources, tmp_path):
    rows = made(tmp_path, sources, {"kind": "question", "source": "sounds", "task": "sound", "count": 100})
    assert len({row["prompt"] for row in rows}) == 6


def test_the_loudest_part_is_taken():
    samples = np.zeros(5 * RATE, np.float32)
    samples[34_000:50_000] = 0.5
    part = loudest_part(samples, 1.0)
    assert len(part) == RATE and part.sum() > 0.5 * RATE * 0.98
    assert loudest_part(samples[:100], 1.0) is not samples and len(loudest_part(samples[:100], 1.0)) == 100


def test_a_sound_is_as_loud_as_wanted():
    rng = np.random.default_rng(0)
    sound, speech = rng.normal(0, 0.01, 3 * RATE), rng.normal(0, 0.2, RATE)
    power = np.square(at_level(sound, speech, -6.0)).mean() / np.square(speech).mean()
    assert abs(10 * np.log10(power) + 6) < 0.1
    with pytest.raises(ValueError, match="silent"):
        at_level(np.zeros(RATE), speech, 0.0)


# ---------------------------------------------------------------- the same bytes


@pytest.fixture
def whole(sources, tmp_path):
    recipe = write_recipe(tmp_path, sources, EVERY)
    build(recipe, tmp_path / "whole")
    return recipe, files_of(tmp_path / "whole")


def test_the_same_seed_gives_the_same_bytes(whole, tmp_path):
    recipe, files = whole
    build(recipe, tmp_path / "again")
    assert files_of(tmp_path / "again") == files
    recipe.write_text(recipe.read_text().replace("seed: 3", "seed: 4"))
    build(recipe, tmp_path / "other")
    assert files_of(tmp_path / "other")["manifest.jsonl"] != files["manifest.jsonl"]


def test_kills_do_not_show(whole, tmp_path):
    recipe, files = whole
    begun = time.monotonic()
    build(recipe, tmp_path / "once more")
    seconds = time.monotonic() - begun
    killed = until_done(lambda: build(recipe, tmp_path / "killed") and None, 20, seconds)
    assert killed >= 15
    assert files_of(tmp_path / "killed") == files
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "whole", "once more", "killed"}


def test_a_full_folder_is_left_alone(whole, tmp_path):
    recipe, files = whole
    assert build(recipe, tmp_path / "whole").was_there
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(ValueError, match="holds something already, not of this recipe; name a new folder"):
        build(recipe, tmp_path / "mine")
    assert files_of(tmp_path / "whole") == files and files_of(tmp_path / "mine") == {"file": b"x"}


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "unknown key": ([EVERY[0] | {"cout": 3}], {}, "unknown key 'tasks.0.cout'; did you mean 'count'"),
    "unknown key above": ([EVERY[0]], {"seeds": 1}, "unknown key 'seeds'; did you mean 'seed'"),
    "missing key": ([{"kind": "strings", "source": "words"}], {}, "lacks 'tasks.0.count'"),
    "no kind": ([{"source": "words"}], {}, "give its kind: strings, speakers, sound or question"),
    "another kind": ([{"kind": "song", "source": "words"}], {}, "give its kind"),
    "unknown source": ([EVERY[0] | {"source": "word"}], {}, "takes from 'word', but the sources are sounds, words"),
    "token of speech": ([ASK | {"source": "words", "token": "a"}], {}, "'words', which has no label; leave token out"),
    "no word for a sound": ([ASK | {"token": {}}], {}, f"token has no word for {min(SOUNDS)!r}; the labels are "),
    "a word that YAML reads as no text": ([ASK | {"token": {"rain": True}}], {}, "'rain': True is no text; put both"),
    "braces in a word": (
        [ASK | {"token": {"rain": "<{label}>"}}],
        {},
        "'rain': '<{label}>' has braces; write the word",
    ),
    "one word for two": ([ASK | {"token": dict.fromkeys(SOUNDS, "x")}], {}, "two sounds have the same word"),
    "a word for nothing": (
        [ASK | {"token": {label: label for label in (*SOUNDS, "wind")}}],
        {},
        "token has 'wind', which nothing in the source is; the labels are ",
    ),
    "blank word": ([ASK | {"token": {"rain": " "}}], {}, "' ' is blank; write what CTC shall write for the sound"),
    "token of nothing": ([ASK | {"token": "{lable}"}], {}, "'{lable}' has {lable}; what may stand in braces is label"),
    "sounds without a label": ([EVERY[2] | {"sounds": "words"}], {}, "sounds = 'words' has no label"),
    "speech with a label": ([EVERY[0] | {"source": "sounds"}], {}, "source 'sounds' has a label, so it is no speech"),
    "wrong order": ([EVERY[0] | {"clips": [3, 1]}], {}, "tasks.0.clips.*3 is more than 1"),
    "no weight": ([EVERY[1] | {"ask": {"said": 0}}], {}, "one of the weights must be above 0"),
    "unknown question": ([EVERY[1] | {"ask": {"sung": 1}}], {}, "tasks.0.ask"),
    "unknown format": ([ASK | {"formats": {"prose": 1}}], {}, "tasks.0.formats"),
    "no phrasings": ([ASK | {"task": "noise"}], {}, "asks for 'noise', but .* add tasks.noise"),
    "too many speakers": ([EVERY[1] | {"speakers": [2, 4]}], {}, "source 'words' has 3 speakers; lower the number"),
    "too long": ([EVERY[0] | {"max_seconds": 0.1}], {}, "50 draws gave no recording of at most 0.1 s"),
    "too long to ask": ([ASK | {"max_seconds": 1}], {}, "is longer than max_seconds = 1"),
    "no such answer": ([{**ASK, "source": "words", "answer": "mood"}], {}, "words.jsonl:1: has no 'mood' to ask for"),
    "no such file": ([ASK], {"phrasings": "none.yaml"}, "none.yaml: cannot be read"),
    "negative seed": ([ASK], {"seed": -1}, "seed = '-1'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_are_refused_by_name(sources, tmp_path, case):
    tasks, changes, message = REFUSED[case]
    recipe = write_recipe(tmp_path, sources, tasks, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        build(recipe, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"a: [1, 2\n", "is not YAML"),
        (b"seed: 1\nsources: {a: {manifest: x}, a: {manifest: y}}\n", "is not YAML (the key 'a' stands twice"),
        (b"\xff\xfe\x00a", "is not UTF-8 text"),
        (b"a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        (b"sources: {}\ntasks: []\nphrasings: x\n", "sources"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path, monkeypatch, capsys, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    monkeypatch.setattr(
        sys, "argv", ["soundwave", "data", "build", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 1 and message in error and len(error.splitlines()) == 1


def test_a_source_without_such_lines_is_refused(sources, tmp_path):
    where = {"words": {"manifest": str(sources / "words.jsonl"), "where": {"split": "dev"}}}
    recipe = write_recipe(tmp_path, sources, [EVERY[0]], sources=where)
    with pytest.raises(ValueError, match="no line is as `where` of source 'words' says; split is train, test"):
        build(recipe, tmp_path / "out")


# ---------------------------------------------------------------- the examples


@pytest.mark.parametrize("name", ["spliced", "sounds", "speeds", "questions"])
def test_examples_have_fifty_phrasings_of_every_task(name):
    recipe, phrasings = load_recipe(ROOT / "configs/data" / f"{name}.yaml")
    assert recipe.tasks
    for task, found in phrasings.tasks.items():
        assert len(set(found.prompts)) >= 50, task
