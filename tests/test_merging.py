"""`soundwave merge`: LoRA in 16-bit weights, with the logits of the unmerged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import soundwave
from soundwave import backbones
from soundwave.backbones.load import load_language_model
from soundwave.inference.answer import LoadedModel
from soundwave.model import merging
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.merging import merge
from soundwave.model.modeling import WEIGHTS_FILE, SoundwaveForConditionalGeneration
from tests.short_runs import save_still_model

IDS = torch.arange(2, 60).view(2, 29)


def logits_of(model) -> torch.Tensor:
    """Float32 logits of a language model, with products in the dtype of its weights, as `forward` computes them."""
    dtype = model.get_output_embeddings().weight.dtype
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return model(input_ids=IDS).logits.float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def save_with_lora(language_model: str, folder: Path, **settings) -> Path:
    """An untrained model of stage II whose LoRA matrices are not 0."""
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, language_model, lora_rank=4, stage=2, **settings)
    torch.manual_seed(0)
    model = SoundwaveForConditionalGeneration.from_backbones(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(small_vocabulary, tmp_path_factory) -> Path:
    """A random Llama with a head of its own, in several shards."""
    folder = tmp_path_factory.mktemp("backbones") / "untied"
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=500, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(small_vocabulary).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def source(request, small_vocabulary, untied, tmp_path_factory) -> Path:
    """A model with LoRA on a language model whose embeddings are tied, or not."""
    language_model = {"tied": small_vocabulary, "untied": untied}[request.param]
    return save_with_lora(str(language_model), tmp_path_factory.mktemp("with-lora") / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_has_the_logits_of_the_unmerged_one(dtype, source, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", 200_000)
    out = merge(source, tmp_path / "out", dtype=dtype)
    whole = SoundwaveForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, dtype)).language_model
    exact = SoundwaveForConditionalGeneration.from_pretrained(source, dtype=torch.float32).language_model
    merged = AutoModelForCausalLM.from_pretrained(out / "language_model")
    assert merged.dtype == getattr(torch, dtype) and len(list((out / "language_model").glob("*.safetensors"))) > 1
    expected = logits_of(exact)
    # Rounded once more than the unmerged model, whose products with LoRA are rounded, too: at most twice its error.
    own_error = max(distance(logits_of(whole), expected), 10 * torch.finfo(torch.float32).eps)
    assert distance(logits_of(merged), expected) <= 2 * own_error
    exact.disable_adapters()
    assert distance(logits_of(exact), expected) > 10 * own_error  # without LoRA it is another model


def test_the_merged_folder_is_a_model_of_its_own(source, tmp_path):
    """It is loaded and transcribes after it has moved, and has no LoRA."""
    out = merge(source, tmp_path / "out", dtype="float32").rename(tmp_path / "moved")
    config = SoundwaveConfig.from_pretrained(out)
    assert config.language_model == str(out / "language_model") and (config.lora_rank, config.stage) == (0, 2)
    assert json.loads((out / "config.json").read_text())["language_model"] == "./language_model"
    # The auto class reads the configuration first, and does not know where a relative folder is.
    assert AutoModel.from_pretrained(str(out)).config.language_model == str(out / "language_model")
    assert not [name for name in soundwave.load(out).model.state_dict() if "lora_" in name]
    # In float32: `load` takes bfloat16 where that is fast, and there rounding decides between tokens that are nearly
    # as probable as each other, as those of a random model are.
    loaded, before = (
        LoadedModel(SoundwaveForConditionalGeneration.from_pretrained(folder).eval(), soundwave.load(folder).processor)
        for folder in (out, source)
    )
    torch.manual_seed(1)
    audio = [0.1 * torch.randn(16_000).numpy(), 0.1 * torch.randn(9_000).numpy()]
    for draft in ("ctc", "none"):
        texts = [
            [one.text for one in soundwave.transcribe(audio, model, max_new_tokens=8, draft=draft)]
            for model in (loaded, before)
        ]
        assert texts[0] == texts[1] and any(texts[0])
    assert soundwave.ask(audio[0], "What is it?", loaded, max_new_tokens=4).text == (
        soundwave.ask(audio[0], "What is it?", before, max_new_tokens=4).text
    )


@pytest.fixture(scope="module", params=["quantised when loaded", "stored in 4 bits"])
def in_4_bits(request, untied, tmp_path_factory) -> Path:
    language_model = untied
    if request.param == "stored in 4 bits":
        language_model = tmp_path_factory.mktemp("backbones") / "nf4"
        load_language_model(str(untied), torch.float32, quantization="nf4").save_pretrained(language_model)
        AutoTokenizer.from_pretrained(untied).save_pretrained(language_model)
    return save_with_lora(str(language_model), tmp_path_factory.mktemp("nf4") / "model", quantization="nf4")


def test_a_model_trained_in_4_bits_is_merged_into_the_weights_that_it_saw(in_4_bits, tmp_path):
    out = merge(in_4_bits, tmp_path / "out", dtype="float32")
    unmerged = SoundwaveForConditionalGeneration.from_pretrained(in_4_bits, dtype=torch.float32).language_model
    merged = AutoModelForCausalLM.from_pretrained(out / "language_model")
    assert not hasattr(merged.config, "quantization_config")
    assert distance(logits_of(merged), logits_of(unmerged)) < 20 * torch.finfo(torch.float32).eps
    assert SoundwaveConfig.from_pretrained(out).quantization is None


def test_the_original_weights_would_be_other_ones(untied, tmp_path):
    """So the test above can fail: what 4 bits lose is far more than rounding."""
    source = save_with_lora(str(untied), tmp_path / "model", quantization="nf4")
    unmerged = SoundwaveForConditionalGeneration.from_pretrained(source, dtype=torch.float32).language_model
    original = SoundwaveForConditionalGeneration.from_pretrained(source, quantization=None).language_model
    assert distance(logits_of(original), logits_of(unmerged)) > 1e-3


# ---------------------------------------------------------------- what cannot be merged


def test_nothing_is_left_of_a_merge_that_fails(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(merging, "copy_tensors", fail)
    with pytest.raises(OSError, match="full"):
        merge(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def refused(source: Path, target: Path, message: str, kind: type[Exception] = ValueError, **settings) -> None:
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(kind, match=message):
        merge(source, target, **settings)
    assert sorted(target.parent.rglob("*")) == before


def test_a_model_of_stage_1_has_nothing_to_merge(small_vocabulary, tmp_path):
    refused(
        save_still_model(small_vocabulary, tmp_path / "model"), tmp_path / "out", "stage 1 only, which trains no LoRA"
    )


def test_a_merged_model_is_merged_already(source, tmp_path):
    refused(merge(source, tmp_path / "once"), tmp_path / "twice", "has no LoRA: it is merged already")


def test_folders_that_cannot_be_written_or_read_are_named(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(source, tmp_path / "full", "full is there already and not empty")
    refused(source, source / "out", "lies within")
    refused(source.parent, tmp_path / "out", f"holds no model; give {source}", FileNotFoundError)
    refused(source, tmp_path / "out", "dtype = 'int8', but it must be one of bfloat16", dtype="int8")


def damaged(source: Path, folder: Path, change) -> Path:
    shutil.copytree(source, folder)
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE)
    return folder


def test_matrices_that_do_not_fit_are_named(source, tmp_path):
    def lose(state):
        del state[next(name for name in state if "lora_A" in name)]

    def widen(state):
        name = next(name for name in state if "lora_A" in name)
        state[name] = torch.ones(state[name].shape[0], state[name].shape[1] + 1)

    def rename(state):
        for name in [name for name in state if "layers.1." in name]:
            state[name.replace("layers.1.", "layers.9.")] = state.pop(name)

    refused(damaged(source, tmp_path / "1", lose), tmp_path / "out", "lora_A that belongs to it")
    refused(damaged(source, tmp_path / "2", widen), tmp_path / "out", "but its LoRA matrices make")
    refused(damaged(source, tmp_path / "3", rename), tmp_path / "out", "stores no model.layers.9")


def test_a_full_disk_is_told_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    refused(source, tmp_path / "out", "GiB, but .* has 0.0 GiB free; make room")
