"""Using a trained model from Python: real backbones, two layers of the language model, untrained adapters, real speech.

The texts mean nothing, but the same samples always give the same text and other samples another one.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import save_file

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.curation.espeak import Espeak
from soundwave.data.audio import AudioError, load_audio
from soundwave.inference.answer import LoadedModel, answer, load_model, read_ctc
from soundwave.inference.long import Answer, Transcript, ask, transcribe, transcribe_each, windows
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

SENTENCES = ("turn on the light in the kitchen", "set a timer for seven minutes", "what is the capital of France")
QUESTION = "What is wanted?"
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def model_folders(models_of_few_tokens) -> dict[int, Path]:
    return models_of_few_tokens


@pytest.fixture(scope="module")
def models(model_folders) -> dict[int, LoadedModel]:
    """The models of `model_folders` in float32, so that a text does not depend on what else is in a batch."""
    return {
        stage: LoadedModel(
            SoundwaveForConditionalGeneration.from_pretrained(folder, language_model=stage > 1),
            SoundwaveProcessor.from_pretrained(folder),
        )
        for stage, folder in model_folders.items()
    }


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    """Three spoken sentences, float32 [samples] at 16 kHz."""
    with Espeak() as espeak:
        spoken = [espeak.synthesize(sentence, voice="en-us") for sentence in SENTENCES]
    return [soxr.resample(samples, rate, 16_000) for samples, rate in spoken]


@pytest.fixture(scope="module")
def files(recordings, tmp_path_factory) -> list[Path]:
    """The sentences as WAV files that hold the very same samples."""
    folder = tmp_path_factory.mktemp("recordings")
    for index, samples in enumerate(recordings):
        soundfile.write(folder / f"{index}.wav", samples, 16_000, subtype="FLOAT")
    return [folder / f"{index}.wav" for index in range(len(recordings))]


@pytest.fixture(scope="module")
def texts(models, recordings) -> list[str]:
    """What the model of stage 3 writes about each sentence, from the parts that `transcribe` is made of."""
    model, processor = models[3]
    clips = [processor.features(samples) for samples in recordings]
    found = [answer(model, processor, ["Transcribe the speech."], [clip], **SHORT)[0] for clip in clips]
    texts = [" ".join(text.split()) for text in found]
    assert len(set(texts)) == len(texts) and all(texts)
    return texts


@pytest.fixture(scope="module")
def long(recordings) -> np.ndarray:
    """70 s of speech, with a pause of 0.4 s behind each sentence."""
    pause = np.zeros(6_400, np.float32)
    return np.resize(np.concatenate([part for samples in recordings for part in (samples, pause)]), 70 * 16_000)


# ---------------------------------------------------------------- what may be transcribed


def test_one_file_gives_one_transcript(models, files, recordings, texts):
    transcript = transcribe(files[0], models[3], **SHORT)
    assert isinstance(transcript, Transcript)
    assert transcript == (texts[0], round(len(recordings[0]) / 16_000, 3))
    assert transcribe(str(files[0]), models[3], **SHORT) == transcript


@pytest.mark.parametrize(
    "form",
    [
        np.asarray,
        lambda samples: samples.astype(np.float64),
        torch.from_numpy,
        lambda samples: torch.from_numpy(samples).requires_grad_(),
        np.ndarray.tolist,
        lambda samples: tuple(samples.tolist()),
        list,  # of NumPy's scalars
    ],
    ids=["float32", "float64", "tensor", "tensor with a gradient", "list", "tuple", "list of float32"],
)
def test_samples_of_any_form_give_the_text_of_their_file(models, recordings, texts, form):
    assert transcribe(form(recordings[1]), models[3], **SHORT).text == texts[1]


@pytest.mark.parametrize("form", [lambda x: x.astype(np.float16), lambda x: torch.from_numpy(x).bfloat16()])
def test_samples_in_half_precision_are_taken(models, recordings, form):
    transcript = transcribe(form(recordings[1]), models[1])
    assert transcript.seconds == round(len(recordings[1]) / 16_000, 3) and transcript.text


def test_a_list_of_files_and_samples_gives_a_list_in_its_order(models, files, recordings, texts):
    mixed = [files[2], recordings[0], str(files[1]), torch.from_numpy(recordings[0]), recordings[1].tolist()]
    found = transcribe(mixed, models[3], **SHORT)
    assert [transcript.text for transcript in found] == [texts[i] for i in (2, 0, 1, 0, 1)]
    assert transcribe(tuple(mixed), models[3], **SHORT) == found


@pytest.mark.parametrize("count", [0, 1])
def test_a_list_of_one_gives_a_list_of_one_and_of_none_an_empty_list(models, files, texts, count):
    assert [transcript.text for transcript in transcribe(files[:count], models[3], **SHORT)] == texts[:count]


def test_samples_at_another_rate_are_resampled(models, recordings):
    low = soxr.resample(recordings[0], 16_000, 8_000)
    transcript = transcribe(low, models[3], sampling_rate=8_000, **SHORT)
    assert transcript == transcribe(soxr.resample(low, 8_000, 16_000), models[3], **SHORT)
    assert transcript != transcribe(low, models[3], **SHORT)  # half as long, an octave up


def test_a_file_brings_its_own_rate(models, recordings, tmp_path):
    soundfile.write(tmp_path / "low.wav", soxr.resample(recordings[0], 16_000, 8_000), 8_000, subtype="FLOAT")
    transcript = transcribe(tmp_path / "low.wav", models[3], **SHORT)
    assert transcript == transcribe(tmp_path / "low.wav", models[3], sampling_rate=44_100, **SHORT)
    assert transcript.seconds == pytest.approx(len(recordings[0]) / 16_000, abs=1e-3)


def test_one_sample_is_padded_with_silence(models):
    assert transcribe(np.full(1, 0.1, np.float32), models[1]).seconds == 0.0
    assert transcribe(np.zeros(1, np.float32), models[1]).seconds == 0.0


@pytest.mark.parametrize("stage", [1, 3])
def test_silence_has_no_words(models, stage):
    clip = np.full(16_000, 2**-15, np.float32)  # one step of 16 bits, as dithering leaves it
    assert transcribe(clip, models[stage], **SHORT) == ("", 1.0)
    loud = np.concatenate([clip, np.full(1, 0.1, np.float32)])
    assert transcribe(loud, models[stage], **SHORT).text  # else this test would show nothing


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (
            np.zeros(9, np.int16),
            "audio is int16, but samples are floating point .*; divide samples of 16 bits by 32768",
        ),
        (torch.zeros(9, dtype=torch.int16), "audio is int16, but samples are floating point"),
        ([0, 1, -1], "audio is int64, but samples are floating point"),
        (np.zeros(9, complex), "audio is complex128, but samples are floating point"),
        (np.zeros((9, 2)), r"audio has shape \[9, 2\], but one recording is \[samples\], mono and not empty"),
        (torch.zeros(1, 9), r"audio has shape \[1, 9\], but one recording is \[samples\]"),
        (np.zeros(0, np.float32), r"audio has shape \[0\], but one recording is \[samples\]"),
        (0.5, r"audio has shape \[\], but one recording is \[samples\]"),
        (np.array([0, np.nan]), "audio holds NaN or infinite samples"),
        (np.array([0, np.inf]), "audio holds NaN or infinite samples"),
        (torch.tensor([0, 12345.0]), r"audio has samples up to 1.23e\+04, but their full scale is ±1; divide samples"),
        (np.array([1e300]), r"audio has samples up to 1e\+300, but their full scale is ±1"),
        (None, "audio is of type NoneType, but a recording is a file or an array of samples"),
        ({"array": np.zeros(9)}, "audio is of type dict, but a recording is a file or an array of samples"),
        ((path for path in ["a.wav"]), "audio is of type generator, but a recording is a file or an array of samples"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_samples_that_are_no_recording_are_refused_by_name(audio, message):
    with pytest.raises(ValueError, match=message):
        transcribe(audio, "no model: it is not loaded before the samples are checked")
    with pytest.raises(ValueError, match=message):
        ask(audio, QUESTION, "no model")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros(9, np.int16), r"audio\[2\] is int16"),
        (np.zeros((9, 2)), r"audio\[2\] has shape \[9, 2\]"),
        (np.array([np.nan]), r"audio\[2\] holds NaN"),
        (16_000, r"audio\[2\] has shape \[\]"),  # (samples, rate), as other libraries return them
        ([[0.5], [0.5, 0.5]], r"audio\[2\] is of type list, but a recording is a file or an array of samples"),
        ("missing.wav", r"missing\.wav: does not exist; name an audio file"),
        (Path("missing.wav"), r"missing\.wav: does not exist; name an audio file"),
    ],
)
def test_one_wrong_recording_among_several_is_named_before_the_model_is_loaded(files, recordings, wrong, message):
    with pytest.raises(ValueError, match=message):
        transcribe([files[0], recordings[0], wrong, files[1]], "no model")


def test_a_file_that_is_no_recording_is_an_audio_error(models, tmp_path):
    (tmp_path / "text.wav").write_text("turn on the light")
    with pytest.raises(AudioError, match=r"text\.wav: cannot be decoded"):
        transcribe([tmp_path / "text.wav"], models[1])
    with pytest.raises(AudioError, match=r"text\.wav: cannot be decoded"):
        ask(tmp_path / "text.wav", QUESTION, models[3])


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused_before_the_model_is_loaded(recordings, question):
    with pytest.raises(ValueError, match=r"^the question is empty; ask something about the recording$"):
        ask(recordings[0], question, "no model")


def test_several_recordings_cannot_be_asked_at_once(models, files, recordings):
    for several in (files, recordings, recordings[:1]):
        with pytest.raises(ValueError, match=r"audio (is of type list|has shape \[1, \d+\])"):
            ask(several, QUESTION, models[3])


@pytest.mark.parametrize("rate", [0, -8_000, 16, 2_000_000])
def test_a_sampling_rate_that_no_recorder_has_is_refused(models, recordings, rate):
    for use in (lambda: transcribe(recordings[0], models[1], sampling_rate=rate),
                lambda: ask(recordings[0], QUESTION, models[3], sampling_rate=rate)):  # fmt: skip
        with pytest.raises(ValueError, match=r"sampling_rate = .*, but it must be 1000 to 1000000 Hz"):
            use()


def test_a_recording_too_short_for_one_sample_at_16_khz_is_refused(models):
    with pytest.raises(ValueError, match="audio is too short: no sample is left of it at 16000 Hz"):
        ask(np.zeros(1, np.float32), QUESTION, models[3], sampling_rate=1_000_000)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_windows_is_refused_at_the_call(models, batch_size):
    with pytest.raises(ValueError, match=f"batch_size = {batch_size}, but it must be 1 or more"):
        transcribe_each([], models[1], batch_size=batch_size)


# ---------------------------------------------------------------- the model


def test_a_model_is_given_as_a_folder_or_loaded(model_folders, files):
    loaded = load_model(model_folders[3])
    assert not loaded.model.training
    expected = transcribe(files[0], loaded, **SHORT)
    for folder in (model_folders[3], str(model_folders[3])):
        assert transcribe(files[0], folder, **SHORT) == expected
        assert list(transcribe_each(files[:1], folder, **SHORT)) == [expected]
    assert ask(files[0], QUESTION, model_folders[3], **SHORT) == ask(files[0], QUESTION, loaded, **SHORT)


@pytest.mark.parametrize("model", [None, 3, ("model", "processor")], ids=repr)
def test_what_is_no_model_is_refused(recordings, model):
    kind = type(model).__name__
    for use in (transcribe, transcribe_each, lambda audio, model: ask(audio, QUESTION, model)):
        with pytest.raises(TypeError, match=f"model is of type {kind}, but it must be what soundwave.load returned"):
            use(recordings[0], model)


def test_a_folder_that_holds_no_model_is_named(model_folders, recordings, tmp_path):
    for folder in (tmp_path, tmp_path / "missing", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="holds no model; give the folder that training printed"):
            transcribe(recordings[0], folder)
        with pytest.raises(FileNotFoundError, match="holds no model; give the folder that training printed"):
            ask(recordings[0], QUESTION, folder)
    with pytest.raises(FileNotFoundError, match=f"stage3 holds no model; give {model_folders[3]}$"):
        load_model(model_folders[3].parent)


def test_a_model_of_another_kind_is_named(model_folders, tmp_path):
    with pytest.raises(ValueError, match="holds a model of type 'whisper', but not a Soundwave model"):
        load_model(wheels.resolve(backbones.WHISPER))
    (tmp_path / "config.json").write_text((model_folders[1] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="holds a model of type None, but not a Soundwave model"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"], ids=repr)
def test_a_damaged_configuration_is_named(model_folders, tmp_path, text):
    folder = shutil.copytree(model_folders[1], tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged \(not a JSON object\); copy it again"):
        load_model(folder)


def test_a_model_that_has_seen_no_stage_keeps_its_language_model(model_folders, recordings, tmp_path):
    SoundwaveConfig.from_pretrained(model_folders[3], stage=0).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert transcribe(recordings[0], loaded, **SHORT).seconds == ask(recordings[0], QUESTION, loaded, **SHORT).seconds


def test_a_model_of_stage_one_is_read_by_ctc_and_cannot_be_asked(models, files, recordings):
    model, processor = models[1]
    ((text,), path) = read_ctc(model, processor, [processor.features(recordings[0])])
    assert transcribe(files[0], models[1]).text == " ".join(text.split()) != ""
    assert path.dtype == torch.int64 and path.shape[0] == 1 and (path >= 0).all()
    with pytest.raises(ValueError, match="the model has seen stage 1 only and cannot answer; train stage 2"):
        ask(files[0], QUESTION, models[1])


# ---------------------------------------------------------------- one after the other


def test_recordings_are_taken_one_by_one_as_transcripts_are_asked_for(models, recordings, texts):
    taken = []

    def supply():
        for index, samples in enumerate(recordings):
            taken.append(index)
            yield samples

    transcripts = transcribe_each(supply(), models[3], **SHORT)
    assert taken == []
    for index, text in enumerate(texts):
        assert next(transcripts).text == text
        assert taken == list(range(index + 1))
    assert next(transcripts, None) is None


def test_a_batch_takes_as_many_recordings_as_it_has_windows(models, recordings):
    taken = []

    def supply():
        for index, samples in enumerate(recordings):
            taken.append(index)
            yield samples

    transcripts = transcribe_each(supply(), models[1], batch_size=2)
    next(transcripts)
    assert taken == [0, 1]
    next(transcripts)
    assert taken == [0, 1]
    next(transcripts)
    assert taken == [0, 1, 2]


def test_how_much_is_read_is_told_after_every_batch(models, recordings):
    seconds = [len(samples) / 16_000 for samples in recordings[:3]]
    silent = np.zeros(16_000, np.float32)
    told: list[float] = []
    list(transcribe_each([*recordings[:2], silent, recordings[2]], models[1], batch_size=2, heard=told.append))
    assert told == pytest.approx([sum(seconds[:2]), sum(seconds[:2]) + 1, sum(seconds) + 1])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_transcripts_before_a_wrong_recording_are_given_first(models, files, recordings, texts, batch_size):
    transcripts = transcribe_each(
        iter([files[0], recordings[1], "missing.wav", files[2]]), models[3], batch_size=batch_size, **SHORT
    )
    assert [next(transcripts).text, next(transcripts).text] == texts[:2]
    with pytest.raises(AudioError, match=r"missing\.wav: does not exist"):
        next(transcripts)
    transcripts = transcribe_each([recordings[0], np.zeros(9, int)], models[1], batch_size=batch_size)
    assert next(transcripts).text
    with pytest.raises(ValueError, match=r"recordings\[1\] is int64"):
        next(transcripts)


def test_one_file_is_not_taken_for_an_iterable_of_its_letters(models, files):
    for file in (str(files[0]), files[0]):
        with pytest.raises(TypeError, match=r"0\.wav', but it must be an iterable; use transcribe for one file"):
            transcribe_each(file, models[1])


@pytest.mark.parametrize("stage", [1, 3])
def test_three_windows_at_a_time_give_the_texts_of_one_at_a_time(models, files, recordings, long, stage):
    audio = [files[0], recordings[1], long[: 35 * 16_000], files[2], recordings[0]]
    one = transcribe(audio, models[stage], **SHORT)
    assert transcribe(audio, models[stage], batch_size=3, **SHORT) == one
    assert len({transcript.text for transcript in one}) == 4  # the last is the first


# ---------------------------------------------------------------- long recordings


@pytest.mark.parametrize("stage", [1, 3])
def test_a_long_recording_has_the_texts_of_its_windows(models, long, stage):
    pieces = windows(long)
    assert [len(piece) <= 30 * 16_000 for piece in pieces] == [True] * 3
    transcript = transcribe(long, models[stage], **SHORT)
    alone = transcribe(pieces, models[stage], **SHORT)
    assert transcript.seconds == 70.0
    assert transcript.text == " ".join(piece.text for piece in alone)
    assert "\n" not in transcript.text and all(piece.text for piece in alone)


@pytest.mark.parametrize("seconds", [31, 70])
def test_of_a_long_recording_the_first_window_is_asked(models, long, tmp_path, seconds):
    samples = long[: seconds * 16_000]
    first = windows(samples)[0]
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    about_file = ask(tmp_path / "long.wav", QUESTION, models[3], **SHORT)
    assert isinstance(about_file, Answer)
    assert about_file == ask(load_audio(tmp_path / "long.wav"), QUESTION, models[3], **SHORT)
    assert (about_file.seconds, about_file.heard) == (seconds, round(len(first) / 16_000, 3))
    assert about_file.text == ask(first, QUESTION, models[3], **SHORT).text


def test_a_short_recording_is_heard_to_its_end(models, files, recordings):
    found = ask(files[0], QUESTION, models[3], **SHORT)
    assert found.heard == found.seconds == round(len(recordings[0]) / 16_000, 3)
    assert found.text != ask(files[0], "Who speaks?", models[3], **SHORT).text


# ---------------------------------------------------------------- what is shown


def test_transcripts_and_answers_print_as_their_texts(models, files, texts, capsys):
    transcript, found = transcribe(files[0], models[3], **SHORT), ask(files[0], QUESTION, models[3], **SHORT)
    capsys.readouterr()
    print(transcript)
    print(found)
    assert capsys.readouterr().out == f"{texts[0]}\n{found.text}\n"
    assert f"{transcript}" == transcript.text
    assert repr(transcript) == f"Transcript(text={transcript.text!r}, seconds={transcript.seconds})"
