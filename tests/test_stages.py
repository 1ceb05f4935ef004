"""The three stages run end to end on a few real recordings: what they train, write, log, resume and refuse."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from soundwave.data.collate import Collator
from soundwave.data.manifest import ManifestError, Sample, read_manifest, write_manifest
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import WEIGHTS_FILE, SoundwaveForConditionalGeneration
from soundwave.training.checkpoints import newest_checkpoint
from soundwave.training.settings import ConfigError, StageConfig, load_config, make_config
from soundwave.training.stages import _arguments, build_model, build_sampler, train_stage
from soundwave.training.trainer import SoundwaveTrainer
from tests.short_runs import save_still_model

CPU = torch.device("cpu")
COMMON = {"dtype": "float32", "accumulation": 1, "log_steps": 1, "warmup_steps": 0, "scheduler": "constant_with_warmup"}


@pytest.fixture(scope="module")
def data(tiny_corpus, tmp_path_factory) -> Path:
    """The corpus's eight shortest recordings: stage1.jsonl has all, stage2.jsonl four and two questions in text."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in (tiny_corpus / "stage1.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: row["duration"])[:8]
    for row in rows:
        shutil.copy(tiny_corpus / row["audio_filepath"], folder)
        row["audio_filepath"] = Path(row["audio_filepath"]).name
    write_manifest(folder / "stage1.jsonl", rows)
    write_manifest(folder / "one.jsonl", rows[:1])
    questions = [{"task": "qa", "prompt": f"What is {word}?", "answer": word} for word in ("red", "old")]
    write_manifest(folder / "stage2.jsonl", rows[:4] + questions)
    return folder


@pytest.fixture(scope="module")
def run(data, small_llm):
    """Trains a stage for a few steps on the small model; returns the model's folder, log, seconds and weights."""

    def run(stage: int, out: Path, manifest: str | None = None, **settings) -> SimpleNamespace:
        settings = COMMON | {"train": data / (manifest or f"stage{min(stage, 2)}.jsonl"), "out": out} | settings
        if "model" not in settings:
            settings |= {"language_model": str(small_llm), "lora_rank": 4}
        folder, log, seconds = train_stage(make_config(stage, **settings))
        return SimpleNamespace(folder=folder, log=log, seconds=seconds, state=load_file(folder / WEIGHTS_FILE))

    return run


@pytest.fixture(scope="module")
def chain(run, tmp_path_factory) -> dict[int, SimpleNamespace]:
    """The three stages, one after the other; stage II without spec_augment, and with a heavier CTC loss."""
    out = tmp_path_factory.mktemp("chain")
    runs = {1: run(1, out / "1", steps=2, batch_size=3, learning_rate=1e-3)}
    settings = {"steps": 2, "batch_size": 3, "learning_rate": 1e-3}
    runs[2] = run(2, out / "2", model=runs[1].folder, spec_augment=False, ctc_weight=0.7, **settings)
    runs[3] = run(3, out / "3", model=runs[2].folder, **settings)
    return runs


@pytest.fixture(scope="module")
def still(data, small_llm, tmp_path_factory) -> Path:
    """A model of stage I without dropout, so that two ways to compute the same loss can be compared."""
    return save_still_model(small_llm, tmp_path_factory.mktemp("still"))


def changed(before: dict, after: dict) -> set[str]:
    """First parts of the names of the parameters that differ."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------- what a stage does


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_leaves_a_model_logs_and_a_checkpoint(chain, stage):
    out = chain[stage].folder.parent
    assert json.loads((out / "model" / "config.json").read_text())["stage"] == stage
    assert [entry["step"] for entry in chain[stage].log] == [1, 2]
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    assert newest_checkpoint(out) == out / "checkpoint-2"
    assert chain[stage].seconds > 0


def test_stage_two_starts_from_stage_one_and_trains_both_adapters_and_lora(chain, small_llm):
    config = make_config(2, train="t", out="o", model=chain[1].folder, dtype="float32")
    start = build_model(config, CPU).trained_state_dict()
    assert not changed(chain[1].state, start)
    assert changed(chain[1].state, chain[2].state) == {"alignment", "blank_weight", "blank_bias"}
    assert all(chain[2].state[name].any() for name in chain[2].state if ".lora_B" in name)


def test_stage_three_trains_lora_alone(chain):
    assert chain[3].state.keys() == chain[2].state.keys()
    assert changed(chain[2].state, chain[3].state) == {"language_model"}


def test_stage_three_can_train_the_shrinking_adapter_too(chain, run, tmp_path):
    after = run(3, tmp_path, model=chain[2].folder, steps=1, batch_size=6, learning_rate=1e-3, train_shrinking=True)
    assert changed(chain[2].state, after.state) == {"language_model", "shrinking"}


def test_each_stage_logs_its_losses(chain):
    assert all(entry["loss"] == pytest.approx(entry["ctc_loss"], rel=1e-5) for entry in chain[1].log)
    with_audio = [entry for entry in chain[2].log if "ctc_loss" in entry]
    assert with_audio
    for entry in with_audio:
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.7 * entry["ctc_loss"], rel=1e-5)
    assert all(entry["loss"] == pytest.approx(entry["lm_loss"], rel=1e-5) for entry in chain[3].log)
    assert all("ctc_loss" not in entry for entry in chain[3].log)


def test_spec_augment_is_a_setting_of_each_stage(chain):
    masks = {}
    for stage, result in chain.items():
        config = SoundwaveConfig.from_pretrained(result.folder)
        masks[stage] = (config.spec_augment_time_masks, config.spec_augment_mel_masks)
    assert masks == {1: (2, 2), 2: (0, 0), 3: (2, 2)}


def test_weights_are_saved_in_float32_whatever_the_backbones_dtype(run, tmp_path):
    result = run(1, tmp_path, steps=1, batch_size=2, dtype="bfloat16")
    assert {value.dtype for value in result.state.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in result.state.values())


def test_dtype_auto_takes_what_this_machine_computes_fastest(data, small_llm):
    from soundwave.hardware import pick_dtype

    config = make_config(1, train="t", out="o", language_model=str(small_llm))
    assert build_model(config, CPU).compute_dtype == pick_dtype("cpu")[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_fresh_model_starts_with_a_used_blank(run, tmp_path, stage):
    result = run(stage, tmp_path, "stage1.jsonl", steps=1, batch_size=2, learning_rate=1e-9)
    assert 5 < result.state["blank_bias"] < 40
    assert result.log[0]["blank_share"] > 0.1


def test_lora_size_can_be_set_up_to_stage_two(chain):
    config = make_config(2, train="t", out="o", model=chain[1].folder, lora_rank=3, dtype="float32")
    state = build_model(config, CPU).trained_state_dict()
    assert {p.shape[0] for name, p in state.items() if ".lora_A" in name} == {3}


def test_the_8_bit_optimiser_keeps_its_state_in_8_bits(run, tmp_path):
    result = run(1, tmp_path, steps=1, batch_size=2, learning_rate=1e-3, optimizer="adamw_8bit")
    optimizer = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in optimizer["state"].values()]
    assert max(moments, key=torch.numel).dtype == torch.uint8
    assert result.log[0]["loss"] > 0


@pytest.mark.parametrize("temperature", [True, False], ids=["on", "off"])
def test_temperature_decides_whether_an_epoch_is_every_sample_once(data, temperature):
    config = make_config(2, train=data / "stage2.jsonl", out="o", batch_size=2, temperature=temperature)
    samples = read_manifest(data / "stage2.jsonl")
    sampler = build_sampler(config, samples)
    sampler.set_epoch(30)  # T = 151: both tasks in equal parts, 3 of 6 draws each
    counts = Counter(samples[i].task for batch in sampler for i in batch)
    assert counts == ({"transcribe": 3, "qa": 3} if temperature else {"transcribe": 4, "qa": 2})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_batches_are_of_similar_length_in_what_the_stage_pads(data, stage):
    settings = {"model": "m"} if stage == 3 else {}
    config = make_config(stage, train="t", out="o", batch_size=2, temperature=False, **settings)
    row = read_manifest(data / "stage1.jsonl")[0].model_dump() | {"task": "question", "answer": "yes"}
    clips = [(short, prompt) for short in (1.0, 3.0) for prompt in ("Why?", "Why? " * 40)]
    samples = [Sample(**row | {"duration": seconds, "prompt": prompt}) for seconds, prompt in clips]
    found = {tuple(sorted(batch)) for batch in build_sampler(config, samples)}
    assert found == ({(0, 1), (2, 3)} if stage == 1 else {(0, 2), (1, 3)})


def test_gradient_checkpointing_changes_memory_and_not_the_gradient(run, still, tmp_path):
    settings = {"model": still, "steps": 1, "batch_size": 4, "spec_augment": False, "learning_rate": 1e-3}
    found = [run(2, tmp_path / str(on), gradient_checkpointing=on, **settings).log[0] for on in (True, False)]
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_gradient_checkpointing_runs_each_layer_again(still, tmp_path):
    config = make_config(2, train="t", out=tmp_path, model=still, gradient_checkpointing=True, **COMMON)
    layers = build_model(config, CPU).train().language_model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)


# ---------------------------------------------------------------- steps, logs, resume


def test_accumulation_over_two_batches_equals_one_batch_of_both(run, still, tmp_path):
    # The CTC loss is a mean over recordings, each over its labels: halves of equal size average to the whole.
    settings = {"model": still, "steps": 1, "spec_augment": False, "learning_rate": 1e-3}
    whole = run(1, tmp_path / "8", batch_size=8, **settings)
    halves = run(1, tmp_path / "4x2", batch_size=4, accumulation=2, **settings)
    for name in ("loss", "ctc_loss", "grad_norm", "blank_share", "kept_per_second", "compression", "batch_samples"):
        assert halves.log[0][name] == pytest.approx(whole.log[0][name], rel=1e-3), name
    assert whole.log[0]["batch_samples"] == 8


def test_accumulation_over_answers_of_equal_length_equals_one_batch(run, still, tmp_path):
    # The next-token loss is a mean over a batch's answer tokens, and batches count alike.
    row = {"task": "qa", "answer": "yes"}
    write_manifest(tmp_path / "m.jsonl", [row | {"prompt": f"Is {word} a word?"} for word in ("red", "old", "a", "it")])
    settings = {"train": tmp_path / "m.jsonl", "model": still, "steps": 1, "learning_rate": 1e-3}
    whole = run(2, tmp_path / "4", batch_size=4, **settings)
    halves = run(2, tmp_path / "2x2", batch_size=2, accumulation=2, **settings)
    for name in ("loss", "lm_loss", "grad_norm"):
        assert halves.log[0][name] == pytest.approx(whole.log[0][name], rel=1e-3), name


def test_every_epoch_has_an_order_of_its_own(still, data, processor, tmp_path):
    config = make_config(1, train="t", out=tmp_path, model=still, steps=3, batch_size=4, **COMMON)
    samples = read_manifest(data / "stage1.jsonl")[:4]
    sampler = build_sampler(config, samples)
    trainer = SoundwaveTrainer(
        model=build_model(config, CPU),
        args=_arguments(config, CPU),
        train_dataset=samples,
        data_collator=Collator(processor, 1),
        batch_sampler=sampler,
    )
    trainer.train()
    assert sampler.epoch == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_logged_figures_are_those_of_the_batch(run, still, data, processor, tmp_path, stage):
    settings = {"steps": 1, "spec_augment": False, "batch_size": 8, "learning_rate": 1e-4}
    (entry,) = run(stage, tmp_path, "stage1.jsonl", model=still, **settings).log
    samples = read_manifest(data / "stage1.jsonl")
    model = SoundwaveForConditionalGeneration.from_pretrained(still, language_model=False)
    batch = Collator(processor, 1)(samples)
    with torch.no_grad():
        path = model(**batch).path
    seconds = int(batch["feature_lengths"].sum()) / 100
    frames, blank = int((path >= 0).sum()), int((path == model.blank).sum())
    runs = [torch.unique_consecutive(row[row >= 0]) for row in path]
    labelled = [int((run != model.blank).sum()) for run in runs]
    # The language model gets at least one frame of each recording.
    kept = sum(labelled) if stage == 1 else sum(max(count, 1) for count in labelled)
    labels = int((batch["ctc_labels"] >= 0).sum())
    assert 0 < blank < frames and sum(labelled) > 0
    expected = {
        "batch_samples": 8,
        "blank_share": blank / frames,
        "kept_per_second": kept / seconds,
        "kept_per_label": sum(labelled) / labels,
        "compression": frames / kept,
    }
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_audio_per_second_is_audio_over_time(run, data, tmp_path):
    result = run(1, tmp_path, steps=3, batch_size=4, log_steps=3)
    seconds = sum(soundfile.info(sample.audio).duration for sample in read_manifest(data / "stage1.jsonl")) * 12 / 8
    # The log at step 1 ends the first interval; the rest is about two thirds of the audio, in less than the whole time.
    assert [entry["step"] for entry in result.log] == [1, 3]
    assert result.log[1]["audio_per_second"] * result.seconds > 0.5 * seconds * 2 / 3
    assert result.log[1]["audio_per_second"] < 1000


@pytest.mark.parametrize("cut", [1, 3], ids=["mid-epoch-1", "mid-epoch-2"])
def test_a_resumed_run_ends_with_the_same_bits(run, still, tmp_path_factory, uninterrupted, tmp_path, cut):
    whole, settings = uninterrupted
    shutil.copytree(whole.folder.parent / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    resumed = run(2, tmp_path, resume=True, **settings)
    assert [entry["step"] for entry in resumed.log] == [1, 2, 3, 4]
    assert resumed.state.keys() == whole.state.keys()
    assert not changed(whole.state, resumed.state)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory, still) -> tuple[SimpleNamespace, dict]:
    """Four steps of two batches over epochs of three batches, with SpecAugment, and a checkpoint at each step."""
    settings = {"model": still, "steps": 4, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3}
    settings |= {"save_steps": 1, "save_total_limit": 4, "seed": 3}
    return run(2, tmp_path_factory.mktemp("whole"), **settings), settings


def test_resume_without_a_checkpoint_starts_at_the_first_step(run, tmp_path):
    assert run(1, tmp_path, "one.jsonl", steps=1, batch_size=1, resume=True).log[0]["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run, still, tmp_path):
    shutil.copytree(still, tmp_path / "model")
    state = load_file(tmp_path / "model" / WEIGHTS_FILE)
    state["blank_bias"].fill_(float("nan"))
    save_file(state, tmp_path / "model" / WEIGHTS_FILE)
    with pytest.raises(FloatingPointError, match=r"loss at step 1 is not finite \(ctc_loss = nan\)"):
        run(1, tmp_path / "out", "one.jsonl", model=tmp_path / "model", steps=2, batch_size=1)
    assert not (tmp_path / "out" / "model").exists()


# ---------------------------------------------------------------- what is refused


def test_stage_three_without_a_model_is_refused(run, tmp_path, small_llm):
    with pytest.raises(ConfigError, match="setting 'model' is missing; stage 3 starts from a model of stage 2"):
        build_model(make_config(3, train="t", out="o", language_model=str(small_llm)), CPU)


@pytest.mark.parametrize(("stage", "of"), [(1, 2), (3, 1)], ids=["back-to-one", "two-left-out"])
def test_a_model_of_the_wrong_stage_is_refused(chain, stage, of):
    config = make_config(stage, train="t", out="o", model=chain[of].folder)
    with pytest.raises(ConfigError, match=f"has seen stage {of}, but stage {stage} starts from one of stage "):
        build_model(config, CPU)


@pytest.mark.parametrize(
    ("name", "value", "of"),
    [
        ("lora_rank", 7, 2),
        ("keep", "runs", 2),
        ("frame_stack", 3, 1),
        ("semantics", "released", 1),
        ("language_model", "another/model", 1),
    ],
)
def test_a_setting_that_the_model_has_decided_is_refused(chain, name, value, of):
    config = make_config(2, train="t", out="o", model=chain[of].folder, **{name: value})
    with pytest.raises(ConfigError, match=f"{name} = {value!r}, but the model in .* has .*: leave it out"):
        build_model(config, CPU)


def test_stage_two_may_choose_what_is_kept_and_attended_to(chain):
    config = make_config(2, train="t", out="o", model=chain[1].folder, keep="frames", keys="none", dtype="float32")
    model = build_model(config, CPU)
    assert (model.config.keep, model.config.keys, model.shrinking.keys) == ("frames", "none", "none")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no model; name the folder that the stage before printed"):
        build_model(make_config(2, train="t", out="o", model=tmp_path), CPU)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"holds no model; write model={re.escape(str(tmp_path / 'model'))}$"):
        build_model(make_config(2, train="t", out="o", model=tmp_path), CPU)


def test_stage_one_wants_recordings_with_a_text(run, data, tmp_path):
    write_manifest(tmp_path / "text.jsonl", [{"task": "qa", "prompt": "What is red?", "answer": "A colour."}])
    with pytest.raises(ConfigError, match="no sample to train on; stage 1 needs recordings with a text"):
        run(1, tmp_path / "out", train=tmp_path / "text.jsonl", steps=1, batch_size=1)


def test_a_recording_that_is_too_long_is_named_before_training(run, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * 16_000, np.float32), 16_000)
    write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "long.wav", "duration": 31.0, "text": "a"}])
    with pytest.raises(ConfigError, match=r"m.jsonl:1: .*long.wav: duration = 31, but at most 30 s can be trained on"):
        run(1, tmp_path / "out", train=tmp_path / "m.jsonl", steps=1, batch_size=1)


def test_audio_outside_the_folder_is_used_where_it_is_permitted(run, data, tmp_path):
    (tmp_path / "manifests").mkdir()
    shutil.copy(read_manifest(data / "one.jsonl")[0].audio, tmp_path / "a.wav")
    write_manifest(tmp_path / "manifests" / "m.jsonl", [{"audio_filepath": "../a.wav", "text": "yes"}])
    settings = {"train": tmp_path / "manifests" / "m.jsonl", "steps": 1, "batch_size": 1}
    with pytest.raises(ManifestError, match="allow_outside=true"):
        run(1, tmp_path / "out", **settings)
    assert run(1, tmp_path / "out", allow_outside=True, **settings).log


# ---------------------------------------------------------------- settings


def fault(*words: str, stage: int = 1, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(stage, file, list(words))
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def yaml_file(folder: Path, text: str) -> Path:
    (folder / "stage.yaml").write_text(text, encoding="utf-8")
    return folder / "stage.yaml"


@pytest.mark.parametrize(
    ("stage", "steps", "batch", "accumulation", "rate"),
    [(1, 6000, 32, 8, 1e-4), (2, 6000, 16, 8, 3e-5), (3, 4000, 8, 4, 3e-5)],
)
def test_defaults_are_the_papers(stage, steps, batch, accumulation, rate):
    config = make_config(stage, train="t.jsonl", out="o")
    found = (
        config.steps,
        config.batch_size,
        config.accumulation,
        config.learning_rate,
        config.lora_rank,
        config.lora_alpha,
    )
    assert found == (steps, batch, accumulation, rate, 64, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rat=1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["lr=1"], "unknown setting 'lr'; did you mean 'learning_rate'?"),
        (["zzz=1"], "unknown setting 'zzz'; known are stage, train, "),
        ([], "setting 'train' is missing; give train=…; setting 'out' is missing; give out=…"),
        (["train=a", "out=b", "steps=many"], "steps = 'many': input should be a valid integer"),
        (["train=a", "out=b", "steps=many"], "parse string as an integer; allowed: an integer, 1 or more"),
        (["train=a", "out=b", "steps=2.5"], "got a number with a fractional part; allowed: an integer, 1 or more"),
        (["train=a", "out=b", "strict=maybe"], "unable to interpret input; allowed: true, false"),
        (["train=a", "out=b", "steps=0"], "steps = 0: input should be greater than or equal to 1"),
        (["train=a", "out=b", "learning_rate=fast"], "learning_rate = 'fast', but a number is wanted"),
        (["train=a", "out=b", "learning_rate=nan"], "learning_rate = nan: input should be a finite number"),
        (["train=a", "out=b", "learning_rate=.inf"], "learning_rate = inf: input should be a finite number"),
        (["train=a", "out=b", "seed=-1"], "seed = -1: input should be greater than or equal to 0"),
        (["train=a", "out=b", "seed=4294967296"], "seed = 4294967296: input should be less than 4294967296"),
        (["train=a", "out="], "out = None, but a path is wanted"),
        (["train=a", "out=b", "scheduler=cosin"], "scheduler = 'cosin': input should be 'cosine', 'linear' or"),
        (["train=[]", "out=b"], "train = []: list should have at least 1 item"),
        (["train"], "'train': settings are written key=value, without spaces, e.g. learning_rate=1e-4"),
        (["train=a", "out=b", "stage=2"], "stage = 2, but stage 1 was asked for"),
        (["train=[a", "out=b"], "train = '[a' cannot be read; quote it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_word_is_one_line_that_names_the_key(words, message):
    assert message in fault(*words)


@pytest.mark.parametrize("value", ["1e-4", "0.0001", "'1e-4'", "1.0e-4"])
def test_a_number_may_be_written_in_any_way(tmp_path, value):
    file = yaml_file(tmp_path, f"train: a.jsonl\nout: o\nlearning_rate: {value}\n")
    assert load_config(1, file).learning_rate == 1e-4


@pytest.mark.parametrize("value", ["1000", "1e3", "1.0e+3"])
def test_a_whole_number_too(tmp_path, value):
    assert load_config(1, None, ["train=a", "out=b", f"steps={value}"]).steps == 1000


@pytest.mark.parametrize("name", ["5", "2026-01-31", "on", "1e3"])
def test_a_word_that_yaml_reads_as_something_else_may_name_a_folder(name):
    config = load_config(1, None, [f"train={name}", f"out={name}", f"model={name}"])
    assert (config.train, config.out, config.model) == ([Path(name)], Path(name), Path(name))
    assert load_config(1, None, ["train=[a, b]", "out=o", "model=null"]).model is None


def test_a_key_of_a_file_that_is_no_string_is_an_unknown_setting(tmp_path):
    assert "unknown setting '1'; known are stage, train" in fault(file=yaml_file(tmp_path, "1: 2\n"))


def test_every_setting_says_what_it_is():
    assert not [name for name, field in StageConfig.model_fields.items() if not field.description]


def test_a_files_paths_are_relative_to_it_and_a_words_to_the_working_directory(tmp_path):
    file = yaml_file(tmp_path, "train: [a.jsonl, sub/b.jsonl]\nout: runs/1\nmodel: ../m\n")
    config = load_config(2, file, ["out=here"])
    assert config.train == [tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl"]
    assert (config.out, config.model) == (Path("here"), tmp_path / "../m")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    file = tmp_path / "stage.yaml"
    file.write_text("train: [~/a.jsonl, b.jsonl]\nout: ~/out\n")
    config = load_config(2, file, ["model=~/model"])
    assert config.train == [Path("/home/somebody/a.jsonl"), tmp_path / "b.jsonl"]
    assert (config.out, config.model) == (Path("/home/somebody/out"), Path("/home/somebody/model"))


def test_a_backbones_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    file = yaml_file(tmp_path, "train: a\nout: o\nlanguage_model: llm\naudio_tower: openai/whisper-tiny\n")
    config = load_config(1, file)
    assert (config.language_model, config.audio_tower) == (str(tmp_path / "llm"), "openai/whisper-tiny")
    monkeypatch.chdir(tmp_path)
    assert load_config(1, None, ["train=a", "out=o", "language_model=./llm"]).language_model == str(tmp_path / "llm")


def test_words_win_over_the_file_and_the_file_over_the_paper(tmp_path):
    file = yaml_file(tmp_path, "train: a\nout: o\nsteps: 7\nbatch_size: 3\n")
    config = load_config(1, file, ["steps=9", "spec_augment=false"])
    assert (config.steps, config.batch_size, config.accumulation, config.spec_augment) == (9, 3, 8, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list; write one `key: value` a line"),
        ("a: [1\n", "is not YAML ("),
        ("steps: 1\nseed: 2\nsteps: 3\n", "is not YAML (the key 'steps' stands twice"),
        ("lr: 1\n", "unknown setting 'lr'"),
    ],
    ids=["list", "broken", "twice", "unknown"],
)
def test_a_bad_file_is_one_line(tmp_path, text, message):
    assert message in fault(file=yaml_file(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    assert f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory)" in fault(file=tmp_path / "none.yaml")
