"""Files from somebody else are read, never executed: model folders, checkpoints, and the paths in manifests."""

import ast
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import soundwave
from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.data.manifest import ManifestError, read_manifest
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import WEIGHTS_FILE, SoundwaveForConditionalGeneration
from soundwave.training.checkpoints import TENSOR_FILES, fault_of, newest_checkpoint
from tests.short_runs import copy_recordings, manifest_of, same_bits, train


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def write_pickle(payload: Payload, file: Path) -> None:
    file.write_bytes(pickle.dumps(payload))


def write_archive(payload: Payload, file: Path) -> None:
    torch.save({"state": payload}, file)


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that a payload makes; nothing else makes it."""
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def trained(tiny_corpus, small_llm, tmp_path_factory) -> SimpleNamespace:
    """A run of stage I: two steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("data")
    manifest = manifest_of(folder, copy_recordings(tiny_corpus, folder, 3))
    settings = {"language_model": str(small_llm), "save_steps": 1}
    run = train(1, folder / "out", manifest, **settings)
    return SimpleNamespace(**vars(run), out=folder / "out", manifest=manifest, settings=settings)


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(trained.out, tmp_path / "out"))


# ---------------------------------------------------------------- checkpoints and models


@pytest.mark.parametrize("write", [write_pickle, write_archive])
def test_the_payload_of_these_tests_would_work(mark, tmp_path, write):
    write(Payload(mark), tmp_path / "file")
    if write is write_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert mark.is_file()


@pytest.mark.parametrize("write", [write_pickle, write_archive])
@pytest.mark.parametrize("name", [*TENSOR_FILES, "scaler.pt"])
def test_a_pickle_in_a_checkpoint_is_not_run_and_the_checkpoint_is_skipped(out, mark, name, write):
    write(Payload(mark), out / "checkpoint-2" / name)
    assert newest_checkpoint(out) == out / "checkpoint-1"
    assert fault_of(out / "checkpoint-2").startswith(f"{name} ")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["training_args.bin", "pytorch_model.bin", "adapter_model.bin"])
def test_other_pickles_in_a_checkpoint_are_not_read(trained, out, mark, name):
    shutil.rmtree(out / "checkpoint-2")
    write_archive(Payload(mark), out / "checkpoint-1" / name)
    resumed = train(1, out, trained.manifest, **trained.settings)
    assert same_bits(resumed.state, trained.state)
    assert not mark.exists()


@pytest.mark.parametrize("write", [write_pickle, write_archive])
def test_a_model_is_loaded_from_safetensors_only(trained, tmp_path, mark, write):
    model = Path(shutil.copytree(trained.folder, tmp_path / "model"))
    write(Payload(mark), model / "pytorch_model.bin")
    SoundwaveForConditionalGeneration.from_pretrained(model, language_model=False)
    (model / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS_FILE} is missing"):
        SoundwaveForConditionalGeneration.from_pretrained(model, language_model=False)
    write(Payload(mark), model / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} is damaged"):
        SoundwaveForConditionalGeneration.from_pretrained(model, language_model=False)
    assert not mark.exists()


def test_code_in_a_model_folder_is_not_run(trained, tmp_path, mark):
    model = Path(shutil.copytree(trained.folder, tmp_path / "model"))
    (model / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass A: ...\n")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.A", "AutoModel": "code.A", "AutoProcessor": "code.A"}
    (model / "config.json").write_text(json.dumps(config))
    SoundwaveForConditionalGeneration.from_pretrained(model, language_model=False)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["audio_tower", "language_model"])
def test_a_backbone_is_loaded_from_safetensors_only(small_llm, tmp_path, mark, part):
    source = {"audio_tower": wheels.resolve(backbones.WHISPER), "language_model": small_llm}[part]
    folder = Path(shutil.copytree(source, tmp_path / "backbone"))
    (folder / "model.safetensors").unlink()
    write_archive(Payload(mark), folder / "pytorch_model.bin")
    names = {"audio_tower": backbones.WHISPER, "language_model": str(small_llm)} | {part: str(folder)}
    config = SoundwaveConfig.from_backbones(**names, lora_rank=4)
    with pytest.raises(OSError, match="model.safetensors"):
        SoundwaveForConditionalGeneration.from_backbones(config)
    assert not mark.exists()


def test_a_language_model_that_brings_its_own_code_is_refused(small_llm, tmp_path, mark):
    folder = Path(shutil.copytree(small_llm, tmp_path / "backbone"))
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass A: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unheard_of|custom code"):
        SoundwaveConfig.from_backbones(backbones.WHISPER, str(folder))
    assert not mark.exists()


# ---------------------------------------------------------------- paths


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder `data` for manifests, and a recording outside it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.wav").write_bytes(b"RIFF")
    return tmp_path


@pytest.mark.parametrize("link", ["a.wav", "folder"])
def test_a_symbolic_link_out_of_the_manifests_folder_is_refused_unless_permitted(outside, link):
    target = outside / "private" / ("a.wav" if link == "a.wav" else "")
    (outside / "data" / link).symlink_to(target)
    name = "a.wav" if link == "a.wav" else "folder/a.wav"
    manifest = manifest_of(outside / "data", [{"audio_filepath": name, "text": "a"}])
    with pytest.raises(ManifestError) as caught:
        read_manifest(manifest)
    found = json.dumps(str((outside / "private" / "a.wav").resolve()))
    assert f"is a symbolic link out of the manifest's folder, to {found[:40]}" in str(caught.value)
    assert "allow_outside=true" in str(caught.value)
    assert read_manifest(manifest, allow_outside=True)[0].audio == outside / "data" / name


def test_a_symbolic_link_within_the_folder_is_followed(outside):
    shutil.copy(outside / "private" / "a.wav", outside / "data" / "real.wav")
    (outside / "data" / "a.wav").symlink_to("real.wav")
    manifest = manifest_of(outside / "data", [{"audio_filepath": "a.wav", "text": "a"}])
    assert read_manifest(manifest)[0].audio == outside / "data" / "a.wav"


def test_a_folder_that_is_itself_a_link_is_fine(outside):
    shutil.copy(outside / "private" / "a.wav", outside / "data")
    manifest_of(outside / "data", [{"audio_filepath": "a.wav", "text": "a"}])
    (outside / "linked").symlink_to(outside / "data")
    assert read_manifest(outside / "linked" / "m.jsonl")[0].audio == outside / "linked" / "a.wav"


# ---------------------------------------------------------------- the source itself


def calls() -> list[tuple[str, str, dict[str, object]]]:
    """Every call in the package: file and line, name of the function, keyword arguments."""
    found = []
    for file in sorted(Path(soundwave.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {k.arg: getattr(k.value, "value", k.value) for k in node.keywords if k.arg}
                found.append((f"{file.name}:{node.lineno}", ast.unparse(node.func), keywords))
    return found


def test_tensors_are_loaded_as_weights_only():
    loads = [(where, keywords) for where, name, keywords in calls() if name == "torch.load"]
    assert loads
    assert [where for where, keywords in loads if keywords.get("weights_only") is not True] == []


def test_nothing_that_unpickles_or_runs_is_called():
    forbidden = ("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "eval", "exec", "os.system")
    assert [where for where, name, _ in calls() if name in forbidden] == []
    permitted = [
        where
        for where, _, keywords in calls()
        if keywords.get("trust_remote_code") or keywords.get("allow_pickle") or keywords.get("shell")
    ]
    assert permitted == []
