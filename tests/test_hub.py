"""Soundwave through transformers' front door: auto classes, `pipeline`, cards, and the way up to the Hub."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

import soundwave
from soundwave import backbones
from soundwave.curation.espeak import Espeak
from soundwave.evaluation.record import record_scores
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.hub import push, write_model_card
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from tests.processes import WITHOUT_COMPILER
from tests.short_runs import copy_recordings, manifest_of, save_still_model, train

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
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=os.environ | WITHOUT_COMPILER
    )
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


# ---------------------------------------------------------------- the card

RECORD = {
    "stage": 2,
    "steps": 300,
    "samples_a_step": 16,
    "learning_rate": 1e-3,
    "losses": {"ctc_loss": 0.0213, "lm_loss": 0.4},
    "seconds": 600.0,
    "device": "a | card",
    "commit": "abc1234",
    "versions": {"torch": "2.13.0"},
    "data": [
        {
            "manifest": "train.jsonl",
            "samples": 900,
            "hours": 1.5,
            "tasks": {"transcribe": 800, "intent": 100},
            "licences": {"CC-BY-4.0": 900},
        }
    ],
}


def answers_file(folder: Path, rows: list[dict]) -> Path:
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


ANSWERS = [
    {"sample": "test.jsonl:1", "task": "transcribe", "reference": "turn on the light", "answer": "turn on a light"},
    {"sample": "test.jsonl:2", "task": "transcribe", "reference": "call my mother", "answer": "call my mother"},
    # By the rules of the evaluation, which the row tells, the answer is right.
    {"sample": "test.jsonl:3", "task": "voice", "reference": "female", "answer": "(A) female", "right": True},
]


@pytest.fixture
def model_folder(model_folders, tmp_path) -> Path:
    folder = tmp_path / "kitchen" / "model"
    shutil.copytree(model_folders[3], folder)
    # As it is for a user who took no folder for a backbone.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"language_model": backbones.LANGUAGE_MODEL}))
    return folder


def test_a_card_tells_what_is_recorded(model_folder, tmp_path):
    (model_folder / "training.json").write_text(json.dumps([RECORD]))
    record_scores(model_folder, [answers_file(tmp_path, ANSWERS)])
    card = ModelCard.load(write_model_card(model_folder, licence="cc-by-4.0"))
    assert card.data.license == "cc-by-4.0" and card.data.pipeline_tag == "automatic-speech-recognition"
    assert card.data.base_model == ["openai/whisper-tiny.en", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    text = " ".join(card.text.split())
    for said in (
        "# kitchen",
        "| `train.jsonl` | 900 | 1.50 | transcribe 800, intent 100 | CC-BY-4.0 | 2 |",
        "| 2 | 300 | 16 | 0.001 | ctc_loss 0.0213, lm_loss 0.4 | 10.0 | a \\| card |",
        "| `answers.jsonl` | transcribe | WER | 14.3% (0.0% to 25.0%) | 2 |",
        "| `answers.jsonl` | voice | accuracy | 100.0% (100.0% to 100.0%) | 1 |",
        "| audio encoder (frozen) | `openai/whisper-tiny.en` | MIT | fetched |",
        "| language model | `HuggingFaceTB/SmolLM2-135M-Instruct` | Apache-2.0 | fetched |",
        "torch 2.13.0, commit abc1234",
        "soundwave.ask(",
    ):
        assert said in text, said


def test_a_card_says_what_is_not_recorded(model_folder):
    text = write_model_card(model_folder).read_text()
    assert "Not recorded." in text and "None are recorded." in text and "Nothing else is recorded." in text
    assert "license:" not in text.partition("# kitchen")[0]


def test_a_card_names_no_folder_of_this_machine(model_folders, tmp_path):
    """The name of a local backbone is told, and where it lies is nobody's business."""
    folder = tmp_path / "model"
    shutil.copytree(model_folders[3], folder)
    text = write_model_card(folder).read_text()
    assert (
        "`smollm2-2-layers`" in text and str(Path(SoundwaveConfig.from_pretrained(folder).language_model)) not in text
    )


def test_a_trained_run_has_what_its_card_needs(small_vocabulary, tiny_corpus, tmp_path):
    rows = copy_recordings(tiny_corpus, tmp_path, 3)
    rows[0]["license"] = rows[1]["licence"] = "CC0-1.0"
    start = save_still_model(small_vocabulary, tmp_path / "start")
    (start / "training.json").write_text(json.dumps([RECORD]))
    run = train(1, tmp_path / "1", manifest_of(tmp_path, rows), model=start, steps=1)
    first, last = json.loads((run.folder / "training.json").read_text())
    assert first == RECORD and (last["stage"], last["steps"], last["samples_a_step"]) == (1, 1, 2)
    assert last["losses"] == {"ctc_loss": pytest.approx(run.log[-1]["ctc_loss"])}
    (data,) = last["data"]
    assert data["hours"] == pytest.approx(sum(row["duration"] for row in rows) / 3600, abs=1e-4)
    assert (data["manifest"], data["samples"], data["licences"]) == ("m.jsonl", 3, {"CC0-1.0": 2})
    assert str(tmp_path) not in write_model_card(run.folder).read_text()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param(lambda f: (f / "README.md").touch(), FileExistsError, "README.md is there already", id="a card"),
        pytest.param(
            lambda f: (f / "training.json").write_text("{"), ValueError, "training.json is damaged", id="record"
        ),
        pytest.param(lambda f: (f / "scores.json").write_text("{}"), ValueError, "scores.json is damaged", id="scores"),
        pytest.param(lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json is damaged", id="config"),
        pytest.param(lambda f: (f / "config.json").unlink(), FileNotFoundError, "holds no model", id="no model"),
    ],
)
def test_a_card_that_cannot_be_written(change, kind, message, model_folder):
    change(model_folder)
    with pytest.raises(kind, match=message):
        write_model_card(model_folder)


def test_a_licence_is_one_word(model_folder):
    with pytest.raises(ValueError, match="licence = 'mine"):
        write_model_card(model_folder, licence="mine\nbase_model: x")


def test_transcripts_in_words_and_in_characters_have_a_score_each(model_folder, tmp_path):
    rows = [
        {"sample": "1", "reference": "turn on", "answer": "turn", "normaliser": "x English", "errors": 1, "of": 2},
        {"sample": "2", "reference": "东京", "answer": "东", "normaliser": "x characters", "errors": 1, "of": 2},
        {"sample": "3", "reference": "abcd", "answer": "abc", "normaliser": "x characters", "errors": 1, "of": 4},
        {"sample": "4", "reference": "turn on", "answer": "turn on"},
    ]
    found = record_scores(model_folder, [answers_file(tmp_path, [{"task": "transcribe"} | row for row in rows])])
    assert [(entry["score"], entry["value"], entry["samples"]) for entry in found] == [
        ("WER", 1 / 4, 2),
        ("CER", 2 / 6, 2),
    ]
    assert found[1]["normaliser"] == "x characters" and "not stated" not in found[0]["normaliser"]


def test_translations_have_a_bleu_on_the_card(model_folder, tmp_path):
    row = {"sample": "1", "task": "translate", "reference": "das ist ein Satz", "answer": "das ist ein Satz"}
    (entry,) = record_scores(model_folder, [answers_file(tmp_path, [row | {"target_lang": "de"}])])
    assert (entry["task"], entry["score"]) == ("translate (de)", "BLEU") and "tok:13a" in entry["normaliser"]
    card = ModelCard.load(write_model_card(model_folder))
    assert "| translate (de) | BLEU | 100.0 (100.0 to 100.0) | 1 |" in card.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "answers.jsonl: holds no answers"),
        ("junk\n", "answers.jsonl:1: is no answer"),
        ('{"sample": "a", "task": "transcribe", "reference": "b"}\n', "answers.jsonl:1: is no answer"),
    ],
    ids=["empty", "junk", "incomplete"],
)
def test_answers_that_cannot_be_scored_are_named(text, message, model_folder, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        record_scores(model_folder, [file])
    assert not (model_folder / "scores.json").exists()


# ---------------------------------------------------------------- the way up


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as takes an upload: all files come within the commit."""

    files: ClassVar[dict[str, bytes]] = {}
    refuse: ClassVar[int | None] = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuse:
            return self.reply({"error": "Invalid username or password."}, self.refuse)
        where = f"http://127.0.0.1:{self.server.server_port}/anna/kitchen"
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self.reply({"files": modes})
        if "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            return self.reply({"commitUrl": f"{where}/commit/0a1b", "commitOid": "0a1b", "success": True})
        self.reply({"url": where, "name": "anna/kitchen", "id": "anna/kitchen"})

    def do_GET(self) -> None:
        self.reply({"error": "not here"}, 404)

    def reply(self, value: dict, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_) -> None: ...


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "refuse", None)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_folder_is_pushed_with_its_card(hub, model_folder):
    (model_folder / ".hidden").touch()
    address = push(model_folder, "anna/kitchen", token="hf_token")
    assert address.endswith("/anna/kitchen/commit/0a1b")
    names = {path.name for path in model_folder.iterdir()} - {".hidden"}
    assert set(hub.files) == names >= {"README.md", "config.json", "model.safetensors"}
    assert hub.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert b"# kitchen" in hub.files["README.md"]


def test_a_model_is_pushed_with_the_records_of_its_folder(hub, model_folder):
    (model_folder / "training.json").write_text(json.dumps([RECORD]))
    model = SoundwaveForConditionalGeneration.from_pretrained(model_folder, language_model=False)
    model.config.stage = 1  # which needs no language model to be saved
    assert model.push_to_hub("anna/kitchen", token="hf_token").endswith("0a1b")
    assert b"`train.jsonl`" in hub.files["README.md"] and json.loads(hub.files["training.json"]) == [RECORD]


def test_what_cannot_be_pushed_is_told_before_the_network(model_folders, model_folder, hub):
    with pytest.raises(ValueError, match="language_model = .* is a folder of this machine"):
        push(model_folders[3], "anna/kitchen")
    with pytest.raises(ValueError, match="repo_id = 'kitchen', but it must be 'owner/name'"):
        push(model_folder, "kitchen")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        push(model_folder, "anna/kitchen")
    assert not hub.files


def test_a_hub_that_refuses_or_is_not_there_is_one_line(model_folder, hub, monkeypatch):
    monkeypatch.setattr(hub, "refuse", 401)
    with pytest.raises(ValueError, match="was not uploaded .*; log in with `hf auth login`"):
        push(model_folder, "anna/kitchen", token="hf_wrong")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="was not uploaded"):
        push(model_folder, "anna/kitchen", token="hf_wrong")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="was not uploaded .*offline"):
        push(model_folder, "anna/kitchen", token="hf_wrong")
    with pytest.raises(ValueError, match="'anna/kitchen': there is no such folder here"):
        soundwave.load("anna/kitchen")
