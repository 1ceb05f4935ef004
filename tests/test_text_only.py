"""Answers of the language model itself, which a training on recordings alone mixes in."""

import json

import pytest

from soundwave.data.instructions import instructions
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.training import text_only
from soundwave.training.settings import ConfigError, make_config
from tests.short_runs import copy_recordings, lines, manifest_of, save_still_model, train


def test_instructions_differ_and_are_the_same_for_a_seed():
    every = instructions(10_000)
    assert len(every) == len(set(every)) > 500 and not [text for text in every if "{" in text or text != text.strip()]
    assert instructions(20, seed=3) == instructions(20, seed=3) != instructions(20, seed=4)
    assert instructions(0) == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It is a tool. It has a", "It is a tool."),
        ("Is it 3.5 m? Yes! It", "Is it 3.5 m? Yes!"),
        ("这是工具。它有", "这是工具。"),
        ("It has", ""),
        ("", ""),
    ],
)
def test_an_answer_that_is_too_long_ends_with_a_sentence(text, kept):
    assert text_only._whole_sentences(text) == kept


@pytest.fixture(scope="module")
def spoken(small_vocabulary, tiny_corpus, tmp_path_factory):
    """A model of stage I and a manifest of 8 recordings."""
    folder = tmp_path_factory.mktemp("spoken")
    rows = copy_recordings(tiny_corpus, folder, 8)
    return save_still_model(small_vocabulary, folder / "stage1" / "model"), manifest_of(folder, rows), rows


def test_stage_2_mixes_in_what_the_model_itself_answers(spoken, tmp_path, capsys, monkeypatch):
    model, manifest, _ = spoken
    monkeypatch.setattr(text_only, "LONGEST", 8)
    # The cut model writes no sentence, and each of its answers would be left out.
    monkeypatch.setattr(text_only, "_whole_sentences", lambda text: text)
    settings = {"model": model, "steps": 4, "temperature": False, "batch_size": 3}
    train(2, tmp_path / "2", manifest, text_only=0.5, **settings)
    assert "mixing in 4 text-only answers of the language model itself" in capsys.readouterr().err
    rows = lines(tmp_path / "2" / "text_only")
    assert {row["task"] for row in rows} == {"text_only"} and len(rows) == len({row["prompt"] for row in rows}) == 4
    record = json.loads((tmp_path / "2" / "model" / "training.json").read_text())
    assert [entry["manifest"] for entry in record[-1]["data"]] == ["m.jsonl", "text_only.jsonl"]
    # The answers are the model's own without LoRA, which stage III has trained: the same from there.
    again = train(3, tmp_path / "3", manifest, model=tmp_path / "2" / "model", text_only=0.5, steps=1)
    assert lines(tmp_path / "3" / "text_only") == rows
    trained = SoundwaveForConditionalGeneration.from_pretrained(again.folder)
    assert any(".lora_" in name for name in trained.trained_state_dict())


def test_a_run_that_goes_on_keeps_its_answers(spoken, tmp_path, monkeypatch):
    model, manifest, _ = spoken
    monkeypatch.setattr(text_only, "LONGEST", 4)
    monkeypatch.setattr(text_only, "_whole_sentences", lambda text: text)
    settings = {"model": model, "text_only": 0.5, "save_steps": 1, "temperature": False}
    train(2, tmp_path / "2", manifest, steps=1, **settings)
    monkeypatch.setattr("soundwave.training.stages.own_answers", None)  # which would be called
    train(2, tmp_path / "2", manifest, steps=2, resume=True, **settings)
    (tmp_path / "2" / "text_only.jsonl").unlink()  # as of a run that an older version began
    train(2, tmp_path / "2", manifest, steps=3, resume=True, **settings)
    assert not (tmp_path / "2" / "text_only.jsonl").exists()


@pytest.mark.parametrize("case", ["data with text", "switched off", "few recordings", "stage 1"])
def test_nothing_is_mixed_in(case, spoken, tmp_path, monkeypatch):
    model, manifest, rows = spoken
    monkeypatch.setattr("soundwave.training.stages.own_answers", None)
    if case == "data with text":
        asked = {"task": "qa", "prompt": "What is the capital of France?", "answer": "Paris"}
        manifest = manifest_of(manifest.parent, [*rows, asked], "with-text.jsonl")
    share = {"switched off": 0.0, "few recordings": 0.05}.get(case, 0.5)
    stage = 1 if case == "stage 1" else 2
    train(stage, tmp_path / "out", manifest, model=model, steps=1, text_only=share)
    assert not (tmp_path / "out" / "text_only.jsonl").exists()


@pytest.mark.parametrize("share", [-0.1, 1, "all", float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="text_only"):
        make_config(2, train="x", out="y", text_only=share)
