"""What a person reads between the command and the first step, and when a run cannot begin, go on or fit.

case                                            what is said
a run that begins                               what is loaded, its size, the blank, the first step
stage 2 without a model                         fresh adapters
a run that has all its steps, once more         that, and not that it goes on
a finished run with more steps                  one line, which is an error
a run that fails at once                        its error; no folder is left
a model that does not fit                       its sizes and the free memory, before loading
out of memory                                   one line: which part, batch_size and accumulation, soundwave memory
a model trained in 4 bits, on a small CPU       used in 4 bits, which is said
"""

import json
import shutil

import pytest
import torch

from soundwave import backbones, hardware
from soundwave.backbones import wheels
from soundwave.inference.answer import load_model
from soundwave.model import sizes
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.training import stages
from soundwave.training.settings import ConfigError, make_config
from tests.short_runs import copy_recordings, manifest_of, train


@pytest.fixture(scope="module")
def manifest(tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return manifest_of(folder, copy_recordings(tiny_corpus, folder, 4))


def test_a_run_says_what_it_does_up_to_the_first_step(manifest, small_vocabulary, tmp_path, capsys):
    train(1, tmp_path / "1", manifest, language_model=str(small_vocabulary), accumulation=2)
    said = capsys.readouterr().err
    told = [
        "loading embedded:whisper-tiny.en (Whisper's encoder in float32, ",
        f"{small_vocabulary} (output embedding in float32, 1 MiB)",
        "setting the adapter's scale and the blank's bias from the first 2 recordings",
        "step 1 of 2 begins; a step has 4 samples",
        "kept per label ",
    ]
    places = [said.find(line) for line in told]
    assert -1 not in places and places == sorted(places)
    train(1, tmp_path / "2", manifest, language_model=str(small_vocabulary), quiet=True)
    said = capsys.readouterr().err
    assert not any(line in said for line in told)


def test_stage_2_without_a_model_says_that_adapters_are_fresh(manifest, small_vocabulary, tmp_path, capsys):
    train(2, tmp_path / "2", manifest, language_model=str(small_vocabulary), steps=1)
    assert "stage 2 starts from fresh adapters, because no model is given; model=" in capsys.readouterr().err


def test_a_date_in_prompts_is_said(manifest, small_vocabulary, tmp_path, capsys):
    folder = tmp_path / "dated"
    shutil.copytree(small_vocabulary, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y') }}\n" + template.read_text())
    train(2, tmp_path / "2", manifest, language_model=str(folder), steps=1)
    assert "today's date: prompts say 2024-07-26 on every day" in capsys.readouterr().err


def test_a_finished_run_says_one_true_thing(manifest, small_vocabulary, tmp_path, capsys):
    settings = {"language_model": str(small_vocabulary), "steps": 1}
    train(1, tmp_path / "1", manifest, **settings)
    capsys.readouterr()
    train(1, tmp_path / "1", manifest, **settings)
    said = capsys.readouterr().err
    assert "has seen all 1 steps already; its model is written again, without training" in said
    assert "going on" not in said and "begins" not in said
    with pytest.raises(ConfigError, match=r"a run with steps = 1 \(now 3\); continue anyway with resume=true"):
        train(1, tmp_path / "1", manifest, **settings | {"steps": 3})
    assert "going on" not in capsys.readouterr().err
    train(1, tmp_path / "1", manifest, resume=True, **settings | {"steps": 3})
    assert "checkpoint-1, step 1 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"model": "nothing"}, {"language_model": "nothing/there/at-all"}, {"audio_tower": "embedded:none"}],
    ids=["model", "language model", "audio tower"],
)
def test_a_run_that_fails_at_once_leaves_no_folder(manifest, tmp_path, wrong, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError):
        train(1, tmp_path / "runs" / "1", manifest, **wrong)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_was_there_stays(manifest, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError):
        train(1, tmp_path / "mine" / "1", manifest, model="nothing")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())


def test_what_does_not_fit_is_said_with_its_sizes_before_loading(manifest, small_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 100 << 20)
    with pytest.raises(ValueError, match=r"108 MiB\) do not fit into the 100 MiB that are free on this machine"):
        train(1, tmp_path / "1", manifest, language_model=str(small_llm))


def test_predicted_sizes_are_those_that_are_loaded(small_llm):
    for quantization, dtype in ((None, torch.float32), ("nf4", torch.bfloat16)):
        config = SoundwaveConfig.from_backbones(
            backbones.WHISPER, str(small_llm), lora_rank=0, quantization=quantization
        )
        model = SoundwaveForConditionalGeneration.from_backbones(config, dtype=dtype)
        encoder, language_model = sizes.sizes_of(config, dtype)
        found = [sum(p.nbytes for p in part.parameters()) for part in (model.audio_tower, model.language_model)]
        assert encoder.size == found[0]
        assert language_model.size == pytest.approx(found[1], rel=0.02)  # the scales of 4 bits are no parameters


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("unable to mmap 17179869184 bytes from file: Cannot allocate memory (12)"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "mmap", "Python"],
)
def test_out_of_memory_is_one_line(manifest, small_vocabulary, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(SoundwaveForConditionalGeneration, "align", fail)
    with pytest.raises(hardware.OutOfMemory) as raised:
        train(1, tmp_path / "1", manifest, language_model=str(small_vocabulary), batch_size=4, accumulation=3)
    said = str(raised.value)
    assert said.startswith("out of memory in a training step; use batch_size=2 accumulation=6 in place of 4 and 3")
    assert "`soundwave memory --stage 1`" in said and "\n" not in said


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "advice"),
    [
        (7, 2, "batch_size=1 accumulation=14 in place of 7 and 2, "),
        (9, 1, "batch_size=3 accumulation=3 in place of 9 and 1, "),
        (1, 4, "a batch is one sample already: "),
    ],
)
def test_the_advice_without_memory_keeps_the_samples_of_a_step(batch_size, accumulation, advice):
    settings = {"train": "m", "out": "o", "batch_size": batch_size, "accumulation": accumulation}
    assert advice in stages._smaller_batch(make_config(3, **settings))


@pytest.mark.parametrize(("gpu", "machine", "said"), [(90, 200, "90 MiB .* the GPU"), (200, 90, "90 MiB .* this ma")])
def test_what_is_short_is_named(monkeypatch, gpu, machine, said):
    monkeypatch.setattr(sizes, "free_bytes", lambda device: (gpu if device == "cuda" else machine) << 20)
    part = sizes.Part("name", "language model in 4 bits", 100 << 20)
    with pytest.raises(ValueError, match=f"100 MiB.* do not fit into the {said}"):
        sizes.refuse_what_does_not_fit([part], torch.device("cuda"))


def test_a_model_trained_in_4_bits_is_used_in_4_bits_where_16_do_not_fit(model_folders, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folders[3].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"quantization": "nf4"}))
    assert load_model(folder).model.config.quantization is None
    assert "4 bits" not in capsys.readouterr().err
    monkeypatch.setattr("soundwave.inference.answer.pick_dtype", lambda device: (torch.float32, ""))
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 160 << 20)  # 138 MB of embedding and head, 28 MB of layers
    model = load_model(folder).model
    assert model.config.quantization == "nf4"
    assert torch.uint8 in {p.dtype for p in model.language_model.parameters()}
    assert "is used in 4 bits, as it was trained" in capsys.readouterr().err
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 50 << 20)
    with pytest.raises(ValueError, match="do not fit into the 50 MiB that are free on this machine"):
        load_model(folder)


def test_a_home_that_cannot_be_written_names_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(wheels.EmbeddedError, match="cannot be written to .*; set XDG_CACHE_HOME to a folder"):
        wheels.resolve(backbones.WHISPER)
