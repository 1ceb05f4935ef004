"""What is loaded of the backbones, and what is said of those that cannot be."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.backbones.load import load_encoder

# ---------------------------------------------------------------- Whisper without its decoder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """The real Whisper without its decoder in one file, and whole in several, by name."""
    source, folders = wheels.resolve(backbones.WHISPER), {}
    folders["one file"] = tmp_path_factory.mktemp("whisper") / "one"
    shutil.copytree(source, folders["one file"])
    state = load_file(folders["one file"] / "model.safetensors")
    encoder = {name: x for name, x in state.items() if name.startswith("model.encoder.")}
    save_file(encoder, folders["one file"] / "model.safetensors", {"format": "pt"})
    folders["base model"] = tmp_path_factory.mktemp("whisper") / "base"
    shutil.copytree(source, folders["base model"])
    save_file(
        {name.removeprefix("model."): x for name, x in encoder.items()},
        folders["base model"] / "model.safetensors",
        {"format": "pt"},
    )
    folders["shards"] = tmp_path_factory.mktemp("whisper") / "shards"
    whole = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float16)
    whole.save_pretrained(folders["shards"], max_shard_size="5MB")
    return folders


@pytest.mark.parametrize("form", ["one file", "base model", "shards"])
def test_the_decoder_of_whisper_is_not_read(whisper, form):
    encoder = load_encoder(str(whisper[form]), torch.float32)
    wanted = load_encoder(backbones.WHISPER, torch.float32).state_dict()
    found = encoder.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
