"""Word error rate and accuracy of hand-made texts, and whole evaluations with the real backbones and new adapters."""

import itertools

import pytest
import soundfile
import torch

from soundwave import backbones
from soundwave.curation.espeak import Espeak
from soundwave.data.collate import features
from soundwave.data.manifest import read_manifest, write_manifest
from soundwave.eager import length_mask
from soundwave.evaluation.run import alike, evaluate, evaluate_ctc
from soundwave.evaluation.scores import normalise, word_error_rate
from soundwave.inference.answer import answer, read_ctc
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration

# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("text", ["yes", "Yes.", " YES! ", "'Yes,'", "yes\n"])
def test_case_punctuation_and_outer_space_do_not_count(text):
    assert normalise(text) == "yes"


@pytest.mark.parametrize("text", ["no", "yes yes", "y es", "7", ""])
def test_words_and_numbers_count(text):
    assert normalise(text) != "yes"


def test_numbers_are_not_read_as_words():
    assert normalise("Seven") != normalise("7")


@pytest.mark.parametrize(
    ("references", "answers", "expected"),
    [
        (["red green blue"], ["red green blue"], 0),
        (["Red, green -- blue."], ["red green blue"], 0),
        (["red green blue white"], ["red blue blue white grey"], 2 / 4),
        (["red green blue", "white"], ["red green blue", "grey"], 1 / 4),  # errors over all words, not by sample
        (["red green"], [""], 1),
        (["red"], ["a b c"], 3),
    ],
)
def test_word_error_rate_is_errors_over_reference_words(references, answers, expected):
    assert word_error_rate(references, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reference", ["", " ", "...", "[laughs]"])
def test_a_reference_without_words_is_refused(reference):
    with pytest.raises(ValueError, match="a reference has no words"):
        word_error_rate(["one", reference], ["one", "two"])


# ---------------------------------------------------------------- whole evaluations


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Five spoken samples of different lengths, and between them three without a recording."""
    folder = tmp_path_factory.mktemp("samples")
    rows = []
    with Espeak() as espeak:
        for i, text in enumerate(["seven", "turn on the light in the kitchen", "two three", "stop now please", "one"]):
            audio, rate = espeak.synthesize(text, voice="en-us")
            soundfile.write(folder / f"{i}.wav", audio, rate)
            row = {"audio_filepath": f"{i}.wav", "duration": len(audio) / rate, "text": text}
            rows.append(row if i < 3 else row | {"task": "intent", "prompt": "What is wanted?", "answer": "nothing"})
    for country in ("France", "Italy", "Japan"):
        prompt = f"What is the capital of {country}? Give its name alone."
        rows.insert(2, {"task": "capital", "prompt": prompt, "answer": "?"})
    write_manifest(folder / "test.jsonl", rows)
    return read_manifest(folder / "test.jsonl")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL, lora_rank=0)
    return SoundwaveForConditionalGeneration.from_backbones(config).eval()


def test_batches_hold_one_task_the_longest_first_and_every_sample_once(samples):
    batches = list(alike(samples, 3))
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    assert max(map(len, batches)) <= 3
    for batch in batches:
        assert len({samples[i].task for i in batch}) == 1
        durations = [samples[i].duration or 0 for i in batch]
        assert durations == sorted(durations, reverse=True)


@pytest.fixture(scope="module")
def scores(model, processor, samples):
    return evaluate(model, processor, samples, batch_size=3, max_new_tokens=6)


def test_each_answer_stands_beside_its_own_sample(model, processor, samples, scores):
    assert [row[:3] for row in scores.answers] == [(s.id, s.task, s.answer) for s in samples]
    for i in (1, 3):  # the longest recording and a sample without one, each in a batch of its own
        prompt = samples[i].prompt or "Transcribe the speech."
        (alone,) = answer(model, processor, [prompt], [features(processor, samples[i])], max_new_tokens=6)
        assert scores.answers[i][3] == alone
    assert len({row[3] for row in scores.answers}) > 3


def test_tasks_are_counted_and_scored_apart(scores):
    assert scores.samples == {"transcribe": 3, "capital": 3, "intent": 2}
    assert set(scores.accuracy) == {"capital", "intent"}
    pairs = [(reference, given) for _, task, reference, given in scores.answers if task == "transcribe"]
    assert scores.wer == word_error_rate(*zip(*pairs, strict=True))


def test_accuracy_is_the_share_of_right_answers_case_and_full_stop_aside(model, processor, samples, scores):
    texts = [(s, row[3]) for s, row in zip(samples, scores.answers, strict=True) if s.task == "capital"]
    right = [s.model_copy(update={"answer": f" {given.upper()}."}) for s, given in texts[:2]]
    wrong = [s.model_copy(update={"answer": f"{given} or not"}) for s, given in texts[2:]]
    found = evaluate(model, processor, right + wrong, max_new_tokens=6)
    assert found.accuracy == {"capital": pytest.approx(2 / 3)}
    assert found.wer is None


def test_each_task_may_have_a_longest_answer_of_its_own(model, processor, samples, scores):
    found = evaluate(
        model, processor, samples, batch_size=3, max_new_tokens={"transcribe": 6, "capital": 1, "intent": 6}
    )
    for (_, task, _, long), (_, _, _, short) in zip(scores.answers, found.answers, strict=True):
        if task == "capital":
            assert len(processor.tokenizer(short)["input_ids"]) <= 1 and long.startswith(short)
        else:
            assert short == long


def test_the_language_model_knows_what_it_knew(scores):
    answers = {sample_id: given for sample_id, task, _, given in scores.answers if task == "capital"}
    assert any("Paris" in given for given in answers.values())


def test_nothing_to_evaluate_is_refused(model, processor):
    with pytest.raises(ValueError, match="samples is empty"):
        evaluate(model, processor, [])


def test_recordings_in_which_nothing_is_said_alone_are_refused(model, processor, samples):
    spoken = next(sample for sample in samples if sample.task == "transcribe")
    with pytest.raises(ValueError, match="samples holds only recordings in which nothing is said"):
        evaluate(model, processor, [spoken.model_copy(update={"text": "...", "answer": "..."})])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_1_is_refused(model, processor, samples, batch_size):
    for score in (evaluate, evaluate_ctc):
        with pytest.raises(ValueError, match=f"batch_size = {batch_size}, but it must be 1 or more"):
            score(model, processor, samples, batch_size=batch_size)


@pytest.mark.parametrize("most", [0, {"transcribe": 8, "capital": -3}], ids=["all tasks", "one task"])
def test_a_longest_answer_of_no_tokens_is_refused(model, processor, samples, most):
    with pytest.raises(ValueError, match=r"max_new_tokens = (0|-3), but it must be 1 or more"):
        evaluate(model, processor, samples, max_new_tokens=most, draft="ctc")


def test_a_task_without_a_longest_answer_is_named(model, processor, samples):
    with pytest.raises(ValueError, match="max_new_tokens has no entry for task 'transcribe'"):
        evaluate(model, processor, [s for s in samples if s.task == "transcribe"], max_new_tokens={"capital": 8})


def test_no_recording_with_a_transcript_is_refused(model, processor, samples):
    with pytest.raises(ValueError, match="samples holds no recording with a transcript"):
        evaluate_ctc(model, processor, [sample for sample in samples if sample.audio is None])


@pytest.fixture
def blank(model):
    """The model's blank row, `weight` and `bias`. A test may change it; it is restored afterwards."""
    before = model.blank_weight.detach().clone(), model.blank_bias.detach().clone()
    with torch.no_grad():
        yield model.blank_weight, model.blank_bias
        model.blank_weight.copy_(before[0])
        model.blank_bias.copy_(before[1])


def test_a_model_that_writes_blanks_alone_has_read_nothing(model, processor, samples, blank):
    blank[1].fill_(1e4)
    scores = evaluate_ctc(model, processor, samples, batch_size=2)
    assert (scores.wer, scores.blank_share, scores.kept_per_label) == (1, 1, 0)
    assert [given for *_, given in scores.answers] == [""] * 5
    assert scores.samples == {"transcribe": 5}


def test_ctc_scores_are_those_of_the_paths_taken_one_by_one(model, processor, samples, blank):
    spoken = [sample for sample in samples if sample.audio is not None]
    # With a bias between two of the frames' largest logits, near the median, blank wins about half of the frames.
    batch = processor.pad_features([features(processor, sample) for sample in spoken])
    hidden, lengths, _ = model.align(**batch)
    rows = hidden[length_mask(lengths, hidden.shape[1])]
    largest = (rows @ model.head_weight.T).amax(-1).sort().values
    blank[1].copy_(largest[len(largest) // 2 :][:2].mean())
    scores = evaluate_ctc(model, processor, samples, batch_size=2)
    frames = blanks = peaks = 0
    for sample, row in zip(spoken, scores.answers, strict=True):
        (text,), path = read_ctc(model, processor, [features(processor, sample)])
        assert row == (sample.id, "transcribe", sample.text, text)
        runs = [label for label, _ in itertools.groupby(path[0].tolist())]
        frames += path.shape[1]
        blanks += path[0].tolist().count(model.blank)
        peaks += len(runs) - runs.count(model.blank)
    labels = sum(len(processor.ctc_ids(sample.text)) for sample in spoken)
    assert 0.1 < scores.blank_share < 0.9
    assert scores.blank_share == pytest.approx(blanks / frames)
    assert scores.compression == pytest.approx(frames / peaks)
    assert scores.kept_per_label == pytest.approx(peaks / labels)
