"""Soundwave through transformers' front door: auto classes, `pipeline`, cards, and the way up to the Hub."""

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

import soundwave
from soundwave.demo.espeak import Espeak
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

# ---------------------------------------------------------------- auto classes

KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

kind = type(AutoConfig.for_model("soundwave"))
assert kind.__module__ == "soundwave.model.configuration"
for mapping in (MODEL_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, PROCESSOR_MAPPING):
    assert mapping[kind].__module__.startswith("soundwave.model."), mapping[kind]
"""
# What may be imported before or in between; each of them once met a module that was imported to its half only.
ORDERS = {
    "transformers first": "from transformers import AutoConfig, AutoModel, AutoProcessor\nimport soundwave",
    "a model of transformers": "import soundwave\nfrom transformers import LlamaForCausalLM",
    "our model": "import soundwave.model.modeling",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_soundwave_whatever_is_imported_first(order, tmp_path):
    program = f"{ORDERS[order]}\n{KNOWN}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_saved_folder_is_loaded_by_the_auto_classes(model_folders):
    folder = str(model_folders[3])
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is SoundwaveConfig and config.stage == 3
    ours = SoundwaveForConditionalGeneration.from_pretrained(folder).trained_state_dict()
    for auto in (AutoModel, AutoModelForSpeechSeq2Seq):
        model = auto.from_pretrained(folder)
        assert type(model) is SoundwaveForConditionalGeneration and model.compute_dtype == torch.float32
        state = model.trained_state_dict()
        assert state.keys() == ours.keys() and all((state[name] == ours[name]).all() for name in ours)
    assert type(AutoProcessor.from_pretrained(folder)) is SoundwaveProcessor


def test_settings_given_to_the_auto_class_are_used(model_folders):
    model = AutoModel.from_pretrained(str(model_folders[3]), implementation="eager", dtype="bfloat16")
    assert model.config.implementation == "eager" and model.compute_dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'speed' is no setting"):
        AutoModel.from_pretrained(str(model_folders[3]), speed=1)
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        SoundwaveForConditionalGeneration.from_pretrained(model_folders[3], dtype="int8")


# ---------------------------------------------------------------- pipeline


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("recordings")
    files = []
    with Espeak() as espeak:
        for text in ("turn on the light in the kitchen", "seven"):
            files.append(folder / f"{len(files)}.wav")
            soundfile.write(files[-1], *espeak.synthesize(text))
    return files


@pytest.fixture(scope="module")
def listen(models_of_few_tokens):
    settings = {"pipeline_class": soundwave.SpeechPipeline, "dtype": torch.float32, "max_new_tokens": 12}
    return pipeline("automatic-speech-recognition", model=str(models_of_few_tokens[3]), **settings)


def test_a_pipeline_on_a_folder_writes_what_transcribe_writes(listen, models_of_few_tokens, recordings):
    loaded = soundwave.LoadedModel(listen.model, listen.processor)
    expected = soundwave.transcribe([*recordings], loaded, max_new_tokens=12)
    assert expected[0].text and listen([str(file) for file in recordings]) == [{"text": one.text} for one in expected]
    samples, rate = soundfile.read(recordings[0], dtype="float32")
    given = [
        recordings[0].read_bytes(),
        {"raw": samples, "sampling_rate": rate},
        {"array": samples, "sampling_rate": rate},
    ]
    assert listen(given, batch_size=1) == [{"text": expected[0].text}] * 3


def test_a_pipeline_is_built_from_a_loaded_model(listen, recordings):
    built = soundwave.SpeechPipeline(model=listen.model, max_new_tokens=12, batch_size=2)
    assert built(str(recordings[1])) == listen(str(recordings[1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"raw": [0.0]}, "keys 'raw', but a dictionary must have 'sampling_rate'", id="no rate"),
        pytest.param(b"junk", "^4 bytes: cannot be decoded", id="junk"),
        pytest.param("none.wav", "none.wav", id="no file"),
    ],
)
def test_a_pipeline_names_what_is_wrong_with_a_recording(given, message, listen):
    with pytest.raises(ValueError, match=message):
        listen(given)


def test_a_pipeline_refuses_settings_that_it_does_not_have(listen, recordings):
    with pytest.raises(ValueError, match="'chunk_length_s' is no setting of this pipeline"):
        listen(str(recordings[0]), chunk_length_s=30)
