"""Configuration: sizes come from the backbones, bad values are refused by name, saving and loading changes nothing."""

import json

import pytest

from soundwave import backbones
from soundwave.model.configuration import CONFIG_VERSION, SoundwaveConfig


def test_sizes_come_from_the_backbones():
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL)
    sizes = {"audio_hidden_size": 384, "hidden_size": 576, "num_attention_heads": 9}
    sizes |= {"vocab_size": 49_152, "audio_placeholder_id": 49_152}
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert (config.audio_tower, config.language_model) == (backbones.WHISPER, backbones.LANGUAGE_MODEL)
    assert config.to_dict() == SoundwaveConfig().to_dict()  # the defaults are the embedded backbones'


def test_what_is_given_beside_the_backbones_wins():
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL, lora_rank=4, hidden_size=1_152)
    assert (config.lora_rank, config.hidden_size, config.audio_hidden_size) == (4, 1_152, 384)


def test_an_audio_tower_that_is_no_whisper_is_refused():
    with pytest.raises(ValueError, match="audio_tower = 'embedded:smollm2-135m-instruct' is a llama model"):
        SoundwaveConfig.from_backbones(backbones.LANGUAGE_MODEL, backbones.LANGUAGE_MODEL)


@pytest.mark.parametrize(
    ("semantics", "rules"),
    [("paper", ("frames", "peaks", "all")), ("released", ("self", "runs", "kept"))],
)
def test_semantics_set_three_rules_together(semantics, rules):
    config = SoundwaveConfig(semantics=semantics)
    assert (config.attend, config.keep, config.keys) == rules


def test_a_single_rule_can_be_changed():
    config = SoundwaveConfig(semantics="released", keep="peaks")
    assert (config.attend, config.keep, config.keys) == ("self", "peaks", "kept")


REFUSED = {
    "semantics": "Paper",
    "attend": "all",
    "keep": "all",
    "keys": "peaks",
    "quantization": "int8",
    "implementation": "triton",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_value_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} = '{REFUSED[name]}', but it must be one of "):
        SoundwaveConfig(**{name: REFUSED[name]})


SIZES = ("audio_hidden_size", "hidden_size", "num_attention_heads", "vocab_size", "frame_stack")


@pytest.mark.parametrize("value", [0, -2, 2.5, "8", None], ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_no_whole_number_from_1_up_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value!r}, but it must be a whole number from 1 up"):
        SoundwaveConfig(**{name: value})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size = 576, but it must be a multiple of num_attention_heads = 7"):
        SoundwaveConfig(num_attention_heads=7)


def test_saving_and_loading_changes_nothing(tmp_path):
    changes = {
        "audio_tower": "openai/whisper-large-v3",
        "language_model": "meta-llama/Llama-3.1-8B-Instruct",
        "semantics": "released",
        "attend": "frames",  # differs from the semantics' value and equals the default
        "keys": "all",
        "lora_target_modules": ("q_proj", "v_proj"),
        "quantization": "nf4",
        "ctc_weight": 0.0,
        "layer_norm_eps": 1e-6,
        "spec_augment_time_masks": 0,
        "stage": 2,
    }
    config = SoundwaveConfig(**changes)
    config.save_pretrained(tmp_path)
    loaded = SoundwaveConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"transformers_version": None} == config.to_dict() | {"transformers_version": None}
    assert (loaded.attend, loaded.keep, loaded.keys, loaded.stage) == ("frames", "runs", "all", 2)


def test_a_saved_configuration_names_backbones_and_version(tmp_path):
    SoundwaveConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["config_version"]) == ("soundwave", CONFIG_VERSION)
    assert (saved["audio_tower"], saved["language_model"]) == (backbones.WHISPER, backbones.LANGUAGE_MODEL)


def test_a_newer_version_is_refused_even_where_its_values_are_unknown(tmp_path):
    SoundwaveConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    newer = json.loads(path.read_text()) | {"config_version": CONFIG_VERSION + 1, "semantics": "of_tomorrow"}
    path.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=f"config_version = {CONFIG_VERSION + 1}, .*upgrade soundwave"):
        SoundwaveConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_changes_to_a_saved_configuration_are_checked(tmp_path, name):
    SoundwaveConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} = "):
        SoundwaveConfig.from_pretrained(tmp_path, **{name: REFUSED[name]})


def test_changes_to_a_saved_configuration_replace_its_values(tmp_path):
    SoundwaveConfig(quantization="nf4", lora_rank=8).save_pretrained(tmp_path)
    config = SoundwaveConfig.from_pretrained(tmp_path, quantization=None, ctc_weight=0.1)
    assert (config.quantization, config.ctc_weight, config.lora_rank) == (None, 0.1, 8)


def test_a_change_of_semantics_sets_its_rules_anew(tmp_path):
    SoundwaveConfig(semantics="paper", keys="kept").save_pretrained(tmp_path)
    config = SoundwaveConfig.from_pretrained(tmp_path, semantics="released", keep="peaks")
    assert (config.attend, config.keep, config.keys) == ("self", "peaks", "kept")
