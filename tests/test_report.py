"""The report: reading a run, examining a recording, and the page in a real browser.

The browser is Chromium, driven by playwright. Its tests are skipped if one of the two is missing.
"""

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

from soundwave import eager, fused
from soundwave.data.audio import SAMPLING_RATE, load_audio
from soundwave.data.manifest import ManifestError, read_manifest, write_manifest
from soundwave.data.sampling import paper_temperature, temperature_weights
from soundwave.evaluation.run import evaluate
from soundwave.evaluation.scores import word_errors
from soundwave.evaluation.words import rules_for
from soundwave.inference.answer import load_model
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.report import RunError, make_page, write_report
from soundwave.report.runs import CURVES, Pass, Run, curves, mixture, read_run, reasons, run_names
from soundwave.report.utterances import ATTENTION_ROWS, align_words, audio_uri, cross_attention, describe, examine
from soundwave.training.settings import load_config, make_config
from soundwave.training.stages import train_stage

HOSTILE = "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 1'> & \u2028 “light”"
MEGABYTE = 1_000_000


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(folder: Path, stage: int = 1, steps: int = 20, **about) -> Path:
    """Make the folder of a training with a log, as training writes it."""
    folder.mkdir(parents=True)
    tasks = {"transcribe": 60, "voice": 20}
    config = {"stage": stage, "steps": steps, "batch_size": 8, "accumulation": 1, "train": [], "temperature": True}
    found = {"stage": stage, "config": config, "tasks": tasks, "device": "x86_64 CPU", "commit": None, "versions": {}}
    (folder / "run.json").write_text(json.dumps(found | about))
    loss = "ctc_loss" if stage == 1 else "lm_loss"
    entry = {"learning_rate": 1e-3, "grad_norm": 0.5, "blank_share": 0.6, "compression": 8.0, "skipped_steps": 0}
    entry |= {"kept_per_label": 1.0, "audio_per_second": 50.0, "tasks": {"transcribe": 6, "voice": 2}, "left_out": 0}
    steps = range(1, steps + 1)
    lines(
        folder / "log.jsonl",
        [entry | {"step": i, "epoch": i / 10, "seconds": i, loss: 9 / i, "loss": 9 / i} for i in steps],
    )
    return folder


def a_pass(tasks: dict[str, int], log: list[dict], stage: int = 2, **changes) -> Pass:
    values = {"config": {"temperature": True}, "about": {}, "left_out": [], "skipped": []} | changes
    return Pass(folder=Path("run"), stage=stage, number=1, tasks=tasks, log=log, **values)


# ---------------------------------------------------------------- reading a run


def test_a_trainings_own_folder_is_a_run_of_one_pass(tmp_path):
    run = read_run(training(tmp_path / "stage2", stage=2, steps=3))
    assert [(one.stage, one.number, len(one.log)) for one in run.passes] == [(2, 1, 3)]
    assert run.model is None and run.answers == [] and run.summary == {}


def test_trainings_stand_in_the_order_in_which_they_went_on(tmp_path):
    def going_on(name: str, stage: int, before: str | None) -> None:
        config = {"model": f"elsewhere/{before}/model" if before else None}
        training(tmp_path / name, stage=stage, config=config)

    going_on("labels", 1, "words")
    going_on("a-third", 3, "second")
    going_on("second", 2, "labels")
    going_on("words", 1, None)
    passes = read_run(tmp_path).passes
    assert [(one.folder.name, one.stage, one.number) for one in passes] == [
        ("words", 1, 1),
        ("labels", 1, 2),
        ("second", 2, 1),
        ("a-third", 3, 1),
    ]


def test_the_newest_model_is_the_runs_own_or_that_of_the_last_training(tmp_path):
    for name, stage in (("one", 1), ("two", 2)):
        training(tmp_path / name, stage=stage)
    assert read_run(tmp_path).model is None
    for place in ("one/model", "two/model", "model"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        assert read_run(tmp_path).model == tmp_path / place


def test_a_last_line_that_is_half_written_is_left_out(tmp_path):
    folder = training(tmp_path / "run", steps=3)
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text[:-30])
    assert [entry["step"] for entry in read_run(folder).passes[0].log] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = training(tmp_path / "run", steps=3)
    good = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text("\n".join([good[0], good[1][:20], good[2]]))
    with pytest.raises(RunError, match=rf"{re.escape(str(folder))}/log\.jsonl:2: is not JSON; copy the file again"):
        read_run(folder)


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no log.jsonl, nor a folder with one; give the `out` of a training"):
        read_run(tmp_path)


def test_a_log_without_its_settings_is_refused(tmp_path):
    (training(tmp_path / "run") / "run.json").unlink()
    with pytest.raises(RunError, match=r"run\.json is missing beside log\.jsonl"):
        read_run(tmp_path / "run")


def test_a_training_that_has_logged_nothing_yet_leaves_those_before_it_to_be_seen(tmp_path):
    training(tmp_path / "stage1")
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "log.jsonl").touch()  # it has just begun, and has no run.json yet
    assert [one.stage for one in read_run(tmp_path).passes] == [1]
    with pytest.raises(RunError, match=r"stage2/log.jsonl holds no entry yet; wait until training has logged a step"):
        read_run(tmp_path / "stage2")


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("run.json", "{}", "run.json: stage is missing; copy it again"),
        ("run.json", '{"stage": 9}', "run.json: stage = 9: input should be 1, 2 or 3"),
        ("run.json", '{"stage": 1, "config": null}', "run.json: config = None: input should be a valid dictionary"),
        ("run.json", "[]", "run.json holds a list, but it must be a JSON object"),
        ("summary.json", '{"stage1": null}', "summary.json: stage1 = None: "),
        ("summary.json", '{"seconds": 3}', "summary.json: seconds = 3: input should be a valid dictionary"),
        ("answers.jsonl", '{}\n{"sample": "a"}', "answers.jsonl:1: sample is missing"),
        ("answers.jsonl", '{"sample": 3, "reference": "a", "answer": "b"}', "answers.jsonl:1: sample = 3: "),
        ("log.jsonl", '{"step": 1, "loss": "low"}', "log.jsonl:1: loss = 'low': input should be a valid number"),
        ("skipped_steps.jsonl", '{"step": "a"}', "skipped_steps.jsonl:1: step = 'a': "),
        ("left_out.jsonl", "3\n{}", "left_out.jsonl:1 holds a int, but it must be a JSON object"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line_that_names_it(tmp_path, file, text, fault):
    folder = training(tmp_path / "run")
    (folder / file).write_text(text)
    with pytest.raises(RunError) as caught:
        read_run(folder)
    assert str(caught.value).startswith(f"{folder}/{fault}")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b"], ids=ascii)
def test_answers_may_hold_characters_that_end_a_line_elsewhere(tmp_path, end):
    folder = training(tmp_path / "run")
    row = {"sample": "a:1", "task": "transcribe", "reference": f"one{end}two", "answer": f"three{end}four"}
    write_manifest(folder / "answers.jsonl", [row, row])
    assert read_run(folder).answers == [row, row]


def test_a_run_cannot_permit_itself_recordings_outside_its_data(demo, tmp_path):
    """The settings of a run lie in its folder, which may come from somebody else."""
    moved = tmp_path / "run"
    shutil.copytree(demo, moved)
    (moved / "answers.jsonl").unlink()
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, np.zeros(16_000), 16_000)
    write_manifest(moved / "data" / "m.jsonl", [{"audio_filepath": str(secret), "text": "turn on the light"}])
    for about in moved.glob("stage*/run.json"):
        found = json.loads(about.read_text())
        found["config"] |= {"allow_outside": True, "train": [str(moved / "data" / "m.jsonl")]}
        about.write_text(json.dumps(found))
    refused = describe(read_run(moved), {}, 1)
    assert refused["items"] == [] and "m.jsonl:1: audio" in refused["note"] and "--allow-outside" in refused["note"]
    assert len(describe(read_run(moved), {}, 1, allow_outside=True)["items"]) == 1


def test_a_run_that_is_given_twice_is_refused_because_one_of_both_would_vanish(tmp_path):
    folder = training(tmp_path / "one")
    with pytest.raises(RunError, match="one is given twice; name each run once"):
        write_report([folder, folder / ".." / "one"], tmp_path / "report.html")


@pytest.mark.parametrize("count", [0, 3])
def test_a_manifest_that_is_not_there_is_an_error_without_a_model_too(tmp_path, count):
    folder = training(tmp_path / "one")
    with pytest.raises(ManifestError, match=r"none\.jsonl"):
        write_report([folder], tmp_path / "report.html", utterances=count, test=tmp_path / "none.jsonl")
    assert not (tmp_path / "report.html").exists()


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run was given"):
        write_report([], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/demo"], ["demo"]),
        (["/a/demo", "/a/other"], ["demo", "other"]),
        (["/a/demo", "/b/demo"], ["a/demo", "b/demo"]),
        (["/demo", "/b/demo"], ["//demo", "/b/demo"]),
        (["/a/mine/1"], ["mine/1"]),
        (["/a/mine/stage2"], ["mine/stage2"]),
        (["/a/mine/1", "/a/mine/2"], ["mine/1", "mine/2"]),
        (["/a/mine/1", "/a/yours/1"], ["mine/1", "yours/1"]),
        (["/a/mine/1", "/a/demo"], ["mine/1", "a/demo"]),
        (["/a/7/1"], ["7/1"]),
    ],
    ids=["one", "different", "same-end", "root", "number", "stage", "numbers", "same-number", "mixed", "only-numbers"],
)
def test_runs_are_called_by_the_shortest_end_that_tells_them_apart(folders, names):
    found = run_names([Path(folder) for folder in folders])
    assert len(set(found)) == len(found)
    if "//demo" not in names:
        assert found == names


def test_a_curve_of_many_entries_becomes_means_of_neighbours():
    log = [{"step": i, "loss": float(i), "lm_loss": None, "ctc_loss": 1.0 if i == 7 else None} for i in range(1, 8)]
    found = curves(log, 3)
    assert found == {"step": [3, 6, 7], "loss": [2.0, 5.0, 7.0], "ctc_loss": [None, None, 1.0]}


def test_a_short_curve_stays_as_it_was_logged():
    log = [{"step": i, "loss": i / 3} for i in (1, 10, 20)]
    assert curves(log, 3) == {"step": [1, 10, 20], "loss": [1 / 3, 10 / 3, 20 / 3]}


def test_the_planned_mixture_of_stage_two_follows_the_temperature():
    tasks = {"asr": 900, "qa": 100}
    log = [{"epoch": epoch, "tasks": {"asr": 5, "qa": 5}} for epoch in (1.0, 2.0, 3.0)]
    found = mixture(a_pass(tasks, log))
    assert [row["epoch"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["planned"] == temperature_weights(tasks, paper_temperature(row["epoch"]))


@pytest.mark.parametrize(
    ("stage", "config"), [(3, {"temperature": True}), (2, {"temperature": False})], ids=["stage-3", "switched-off"]
)
def test_without_temperature_the_natural_shares_are_planned(stage, config):
    log = [{"epoch": 2.0, "tasks": {"asr": 9, "qa": 1}}]
    found = mixture(a_pass({"asr": 900, "qa": 100}, log, stage=stage, config=config))
    assert [row["planned"] for row in found] == [{"asr": 0.9, "qa": 0.1}] * 2


def test_a_log_entry_over_several_epochs_is_divided_among_them():
    log = [{"epoch": 0.5, "tasks": {"asr": 10}}, {"epoch": 2.5, "tasks": {"asr": 20, "qa": 20}}]
    found = mixture(a_pass({"asr": 9, "qa": 9}, log))
    assert [row["drawn"] for row in found] == [{"asr": 15, "qa": 5}, {"asr": 10, "qa": 10}, {"asr": 5, "qa": 5}]


def test_left_out_samples_are_counted_by_their_reason():
    left = [{"sample": f"t.jsonl:{i}", "file": f"{i}.wav", "reason": f"lasts {i}.5 s"} for i in range(5)]
    left.append({"sample": "t.jsonl:9", "reason": "is empty"})
    assert reasons(a_pass({}, [], left_out=left)) == [
        {"reason": "lasts 0.5 s", "count": 5, "samples": [f"t.jsonl:{i} {i}.wav" for i in range(3)]},
        {"reason": "is empty", "count": 1, "samples": ["t.jsonl:9"]},
    ]


# ---------------------------------------------------------------- examining a recording


def test_words_are_aligned_as_the_word_error_rate_counts_them():
    texts = "Turn on the light, please please", "turn the lights please please now"
    found = align_words(*texts)
    assert [(word["kind"], word["reference"], word["given"]) for word in found] == [
        ("equal", "turn", "turn"),
        ("delete", "on", ""),
        ("equal", "the", "the"),
        ("substitute", "light", "lights"),
        ("equal", "please", "please"),
        ("equal", "please", "please"),
        ("insert", "", "now"),
    ]
    errors = sum(word["kind"] != "equal" for word in found)
    assert errors == word_errors(*texts, rules_for([texts[0]])[0]).errors
    # English rules join the digits to one number, and the demonstration counts each word.
    assert [word["reference"] for word in align_words("seven five two", "seven five")] == ["752"]
    assert [word["kind"] for word in align_words("seven five two", "seven five", "und")] == ["equal", "equal", "delete"]


@pytest.mark.parametrize(
    ("reference", "given", "kinds"),
    [
        ("Twenty-one, isn't it?", "21 is not it", ["equal"] * 4),
        ("İZMİR ılık", "izmir ilik", ["equal", "substitute"]),
        ("आज मौसम", "आज मासम", ["equal", "substitute"]),
        ("今天天气", "今天天", ["equal"] * 3 + ["delete"]),
    ],
    ids=["english", "turkish", "marks", "no-spaces"],
)
def test_words_are_aligned_by_the_rules_of_their_script(reference, given, kinds):
    assert [word["kind"] for word in align_words(reference, given)] == kinds


@pytest.mark.parametrize(
    ("reference", "given", "kinds"),
    [("", "red blue", ["insert"] * 2), ("red blue", "", ["delete"] * 2), ("", "", [])],
    ids=["no-reference", "no-answer", "neither"],
)
def test_words_are_aligned_with_nothing(reference, given, kinds):
    assert [word["kind"] for word in align_words(reference, given)] == kinds


@pytest.mark.parametrize("adapters", [eager, fused], ids=["eager", "fused"])
@pytest.mark.parametrize("keys", ["all", "kept"])
def test_the_attention_shown_is_the_one_the_shrinking_adapter_computes_with(adapters, keys):
    torch.manual_seed(0)
    config = SoundwaveConfig(hidden_size=24, num_attention_heads=3, keys=keys)
    shrinking = adapters.ShrinkingAdapter(config).eval()
    hidden, kept = torch.randn(1, 13, 24), torch.tensor([0, 4, 5, 12])
    peaks = eager.Peaks(kept, torch.tensor([0, 4], dtype=torch.int32), 4)
    with torch.no_grad():
        wanted = shrinking(hidden, torch.tensor([13]), peaks)
        weights = cross_attention(shrinking, hidden[0], kept)
        value = F.linear(hidden[0], shrinking.in_proj_weight[48:], shrinking.in_proj_bias[48:])
        gathered = (weights @ value.unflatten(-1, (3, 8)).transpose(0, 1)).transpose(0, 1).flatten(1)
        found = shrinking.norm(hidden[0, kept] + shrinking.out_proj(gathered))
    assert weights.shape == (3, 4, 13)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))
    torch.testing.assert_close(found, wanted)  # float32's default tolerance: the same sums in another order
    others = torch.ones(13, dtype=torch.bool).index_fill(0, kept, False)
    assert bool(weights[..., others].any()) is (keys == "all")


@pytest.fixture(scope="module")
def spoken(tiny_corpus) -> np.ndarray:
    return load_audio(min((tiny_corpus / "audio").glob("test-*.wav"), key=lambda path: path.stat().st_size))


def test_audio_is_embedded_without_loss(spoken):
    kind, _, text = audio_uri(spoken).partition(",")
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(text)), dtype="float32")
    assert (kind, rate) == ("data:audio/flac;base64", SAMPLING_RATE)
    np.testing.assert_allclose(samples, spoken, atol=1 / 32768)


def test_a_long_noisy_recording_is_embedded_small_and_whole():
    noise = np.random.default_rng(0).uniform(-1, 1, 30 * SAMPLING_RATE).astype(np.float32)
    kind, _, text = audio_uri(noise).partition(",")
    info = soundfile.info(io.BytesIO(base64.b64decode(text)))
    assert kind == "data:audio/mpeg;base64" and len(text) < 0.3 * MEGABYTE
    assert info.duration == pytest.approx(30, abs=0.2)


# ---------------------------------------------------------------- a real run, small


@pytest.fixture(scope="module")
def demo(tiny_corpus, small_llm, tmp_path_factory) -> Path:
    """Three stages of two steps on eight samples, scored on three recordings, in folders like a demonstration's."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    corpus = out / "corpus-tiny"
    shutil.copytree(tiny_corpus, corpus)
    for name in ("stage1", "stage2", "stage3"):
        rows = [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().splitlines()]
        spoken = sorted((row for row in rows if "duration" in row), key=lambda row: row["duration"])
        written = [row for row in rows if "duration" not in row]
        write_manifest(corpus / f"{name}.jsonl", spoken[:6] + written[:2])
    common = {"dtype": "float32", "accumulation": 1, "log_steps": 1, "scheduler": "constant_with_warmup"}
    common |= {"steps": 2, "batch_size": 4, "learning_rate": 1e-5, "warmup_steps": 0}
    before = None
    for stage in (1, 2, 3):
        settings = {"model": before} if before else {"language_model": str(small_llm), "lora_rank": 4}
        config = make_config(
            stage, train=corpus / f"stage{stage}.jsonl", out=out / f"stage{stage}", **common, **settings
        )
        before, _, _ = train_stage(config)
    shutil.copytree(before, out / "model")
    model, processor = load_model(before)
    samples = [sample for sample in read_manifest(corpus / "test.jsonl")]
    chosen = [sample for sample in samples if sample.task in ("transcribe", "voice")]
    audio = sorted({sample.audio for sample in chosen if sample.task == "voice"})[:3]
    scores = evaluate(model, processor, [sample for sample in chosen if sample.audio in audio], max_new_tokens=3)
    rows = [
        {"sample": i, "task": task, "reference": wanted, "answer": given} for i, task, wanted, given in scores.answers
    ]
    right = next(row for row in rows if row["task"] == "transcribe")
    right["answer"] = right["reference"]  # After two steps the model gets none right.
    lines(out / "answers.jsonl", rows)
    last = {"wer": scores.wer, "wer_unseen_voices": None, "accuracy": scores.accuracy}
    summary = {"stage1": {"wer": 1.0}, "stage2": {"wer": 1.0}, "stage3": last, "samples": scores.samples}
    (out / "summary.json").write_text(json.dumps(summary | {"seconds": {"total": 20.0}}))
    return out


@pytest.fixture(scope="module")
def recordings(demo) -> dict:
    return describe(read_run(demo), {}, 3)


def test_a_kept_frame_has_the_token_that_the_model_hears_there(demo, spoken):
    # In float32, like the probabilities of the page, which are then only rounded to four digits.
    model = SoundwaveForConditionalGeneration.from_pretrained(demo / "model", language_model=False)
    processor = SoundwaveProcessor.from_pretrained(demo / "model")
    found = examine(model, processor, spoken)
    batch = processor.pad_features([processor.features(spoken)])
    path = model(**batch).path
    with torch.no_grad():
        _, lengths, ctc = model.align(**batch)
    peaks = model._operations.ctc_peaks(ctc.path, lengths, blank=model.blank, keep="peaks", scores=ctc.path_log_prob)
    assert [kept["frame"] for kept in found["kept"]] == peaks.index.tolist()
    words = "".join(kept["text"] for kept in found["kept"]).strip()
    assert words == processor.ctc_text(path[0], model.blank)
    for kept in found["kept"]:
        assert kept["probability"] == pytest.approx(float(ctc.path_log_prob[0, kept["frame"]].exp()), rel=1e-3)
        assert all(other <= kept["probability"] for _, other in kept["others"])


def test_a_recordings_arrays_have_the_sizes_that_the_page_reads(demo, spoken):
    model, processor = load_model(demo / "model")
    found = examine(model, processor, spoken)
    frames, kept = -(-found["mel"]["columns"] // 4), len(found["kept"])
    assert len(base64.b64decode(found["mel"]["rows"])) == found["mel"]["bins"] * found["mel"]["columns"]
    assert len(base64.b64decode(found["used"])) == frames
    assert len(base64.b64decode(found["attention"]["rows"])) == kept * frames
    assert len(found["attention"]["scale"]) == kept
    assert found["seconds"] == pytest.approx(frames * found["frame_seconds"], abs=found["frame_seconds"])


def test_a_model_of_stage_one_has_no_attention_to_show(demo, spoken):
    assert examine(*load_model(demo / "stage1" / "model"), spoken)["attention"] is None


def test_recordings_are_those_scored_and_half_of_them_wrong_where_they_can_be(demo, recordings):
    assert len(recordings["items"]) == 3
    assert recordings["note"].startswith("From the test: 2 with word errors in the transcript and 1 without.")
    for item in recordings["items"]:
        assert {answer["task"] for answer in item["answers"]} == {"transcribe", "voice"}
        assert item["text"] == item["answers"][0]["reference"]


def test_a_run_that_was_not_scored_answers_about_its_training(demo):
    first, second = (describe(read_run(demo / f"stage{stage}"), {}, 2) for stage in (1, 2))
    for found in (first, second):
        assert found["note"].startswith("From the manifests of the training")
        assert len(found["items"]) == 2
        assert all(isinstance(item["answers"][0]["given"], str) for item in found["items"])
    assert first["items"][0]["attention"] is None and second["items"][0]["attention"]


def test_what_ctc_reads_is_held_to_what_it_learns_to_write(demo, spoken, tmp_path):
    run = tmp_path / "stage1"
    shutil.copytree(demo / "stage1", run)
    soundfile.write(tmp_path / "a.wav", spoken, SAMPLING_RATE)
    write_manifest(
        tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": "light", "ctc_text": "light female slow"}]
    )
    about = json.loads((run / "run.json").read_text())
    about["config"]["train"] = [str(tmp_path / "m.jsonl")]
    (run / "run.json").write_text(json.dumps(about))
    (item,) = describe(read_run(run), {}, 1)["items"]
    assert item["answers"][0]["reference"] == "light female slow"


def test_recordings_that_are_gone_leave_the_rest_of_the_page(demo, tmp_path):
    moved = tmp_path / "demo"
    shutil.copytree(demo, moved, ignore=shutil.ignore_patterns("corpus-*", "checkpoint-*"))
    for about in moved.glob("*/run.json"):
        text = json.loads(about.read_text())
        text["config"]["train"] = [str(tmp_path / "gone" / "train.jsonl")]
        about.write_text(json.dumps(text))
    found = describe(read_run(moved), {}, 3)
    assert found["items"] == [] and "None can be shown: test.jsonl is in none of" in found["note"]


def test_recordings_are_found_where_the_run_was_moved_with_its_corpus(demo, tmp_path):
    moved = tmp_path / "demo"
    shutil.copytree(demo, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    for about in moved.glob("*/run.json"):
        text = json.loads(about.read_text())
        text["config"]["train"] = [path.replace(str(demo), "/elsewhere") for path in text["config"]["train"]]
        about.write_text(json.dumps(text))
    assert len(describe(read_run(moved), {}, 1)["items"]) == 1


def test_answers_to_another_corpus_are_not_shown_beside_these_recordings(demo, tmp_path):
    moved = tmp_path / "demo"
    shutil.copytree(demo, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    rows = [json.loads(line) for line in (moved / "answers.jsonl").read_text().splitlines()]
    lines(moved / "answers.jsonl", [row | {"reference": "other words"} for row in rows])
    assert "is no longer the sample that the run was scored on" in describe(read_run(moved), {}, 3)["note"]


def test_another_runs_answers_about_the_same_recordings_stand_beside(demo):
    run = read_run(demo)
    other = Run(run.folder, run.passes, {}, [row | {"answer": "what else"} for row in run.answers])
    (item,) = describe(run, {"other": other}, 1)["items"]
    assert [answer["given"] for answer in item["others"]["other"]] == ["what else"] * 2
    assert [answer["task"] for answer in item["others"]["other"]] == [answer["task"] for answer in item["answers"]]


# ---------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def page(demo, tmp_path_factory) -> Path:
    return write_report([demo], tmp_path_factory.mktemp("page") / "new" / "report.html", utterances=3)


def test_the_page_refers_to_nothing_outside_itself(page):
    text = page.read_text()
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text)
    assert "@import" not in text and "url(" not in text


def test_text_of_the_data_cannot_end_the_pages_script(tmp_path):
    run = read_run(training(tmp_path / "run", tasks={HOSTILE: 3, "b": 2}, device=HOSTILE))
    text = make_page({HOSTILE: run}, {"items": [], "note": HOSTILE})
    assert len(re.findall(r"<script", text, re.I)) == len(re.findall(r"</script", text, re.I)) == 2
    assert "<img" not in text


def test_the_largest_page_stays_below_five_megabytes(demo, tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, 30 * SAMPLING_RATE).astype(np.float32)
    model, processor = load_model(demo / "model")
    item = examine(model, processor, noise) | {"id": "noise", "text": "noise", "answers": [], "others": {}}
    assert item["attention"] is None or len(item["kept"]) <= ATTENTION_ROWS
    item["attention"] = {"rows": "A" * (ATTENTION_ROWS * 750 * 4 // 3), "scale": [0.123] * ATTENTION_ROWS}
    item["kept"] = [{"frame": i, "text": "token", "probability": 0.123, "others": [["o", 0.1]] * 3} for i in range(750)]
    log = [{"step": i, "epoch": i / 9} | dict.fromkeys(CURVES, i / 7) for i in range(1, 3_000)]
    skipped = [
        {"step": i, "reason": "the loss is not finite", "samples": ["train.jsonl:123456"] * 256} for i in range(99)
    ]
    run = Run(tmp_path, [a_pass({"a": 1, "b": 2}, log, skipped=skipped)] * 4)
    text = make_page({f"run {i}": run for i in range(8)}, {"items": [item] * 6, "note": ""})
    assert len(text.encode()) < 5 * MEGABYTE


def test_values_that_json_cannot_hold_are_written_as_missing(tmp_path):
    log = [{"step": 1, "epoch": 0.1, "loss": float("nan"), "grad_norm": float("inf"), "ctc_loss": 1.23456789}]
    text = make_page({"run": Run(tmp_path, [a_pass({"a": 1}, log)])}, {"items": [], "note": ""})
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    found = data["runs"][0]["passes"][0]["curves"]
    assert found == {"step": [1], "loss": [None], "grad_norm": [None], "ctc_loss": [1.23457]}


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a file. The test fails if the page caused an error, a console line or a request to another place."""
    said, contexts = [], []

    def open_page(path: Path, scheme: str = "light", width: int = 1280):
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(f"error: {error}"))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("#settings")
        tab.wait_for_function("document.querySelectorAll('figure svg path').length > 0")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` by WCAG."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


COLOUR = """name => { const probe = document.createElement('i'); probe.style.color = `var(--${name})`;
document.body.append(probe); const found = getComputedStyle(probe).color; probe.remove(); return found; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_every_section(visit, page, scheme):
    tab = visit(page, scheme)
    titles = tab.locator("section h2").all_inner_texts()
    assert titles == [
        "Scores",
        "Training",
        "Recordings",
        "Alignment",
        "Optimiser",
        "Task mixture",
        "Left out",
        "Settings",
    ]
    assert tab.locator("#training figure").count() == 3
    assert tab.locator(".utterance").count() == 3
    assert tab.locator("nav a").all_inner_texts() == titles


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_paper(visit, page, scheme):
    tab = visit(page, scheme)
    paper, raised = tab.evaluate(COLOUR, "paper"), tab.evaluate(COLOUR, "raised")
    assert (luminance(paper) > 0.5) is (scheme == "light")
    for name in ("ink", "muted", "good", "bad", "kept", *(f"c{i}" for i in range(8))):
        for ground in (paper, raised):
            assert contrast(tab.evaluate(COLOUR, name), ground) >= 4.5, name  # WCAG AA for text
    assert contrast(tab.evaluate(COLOUR, "bad"), tab.evaluate(COLOUR, "bad-wash")) >= 4.5


@pytest.mark.parametrize("kind", ["token", "token blank"])
@pytest.mark.parametrize("pressed", ["true", "false"], ids=["chosen", "not-chosen"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_stands_out_from_its_ground(visit, page, scheme, pressed, kind):
    """The page's own recordings may keep no blank frame, so the first token is made one."""
    tab = visit(page, scheme)
    found = tab.locator(".token").first.evaluate(
        """(token, [kind, pressed]) => { token.className = kind; token.setAttribute("aria-pressed", pressed);
        const style = getComputedStyle(token); return [style.color, style.backgroundColor]; }""",
        [kind, pressed],
    )
    assert contrast(*found) >= 4.5


def test_the_button_switches_the_scheme_and_repaints_the_spectrograms(visit, page):
    tab = visit(page, "light")
    pixel = """(() => { const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    copy.drawImage(document.querySelector(".utterance canvas"), 0, 0);
    return copy.getImageData(0, 0, 1, 1).data.join(); })()"""
    before = tab.evaluate(COLOUR, "paper"), tab.evaluate(pixel)
    tab.get_by_role("button", name="Switch to dark colours").click()
    after = tab.evaluate(COLOUR, "paper"), tab.evaluate(pixel)
    assert luminance(before[0]) > 0.5 > luminance(after[0]) and before[1] != after[1]
    tab.get_by_role("button", name="Switch to light colours").click()
    assert (tab.evaluate(COLOUR, "paper"), tab.evaluate(pixel)) == before


def test_a_click_on_a_token_shows_what_its_frame_attends_to(visit, page):
    tab = visit(page)
    recording = tab.locator(".utterance").first
    tokens = recording.locator(".token")
    assert tokens.count() > 1
    attended, detail = recording.locator(".attended"), recording.locator(".detail")
    assert tokens.nth(0).get_attribute("aria-pressed") == "true"
    before = attended.get_attribute("d"), detail.inner_text()
    tokens.nth(1).click()
    assert tokens.nth(1).get_attribute("aria-pressed") == "true"
    assert tokens.nth(0).get_attribute("aria-pressed") == "false"
    assert attended.get_attribute("d") != before[0] and detail.inner_text() != before[1]
    assert "of its attention lies on" in detail.inner_text()


def test_every_recording_can_be_played(visit, page, recordings):
    tab = visit(page)
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(one => one.readyState > 0)")
    found = tab.evaluate("[...document.querySelectorAll('audio')].map(one => one.duration)")
    assert found == pytest.approx([item["seconds"] for item in recordings["items"]], abs=0.01)
    button = tab.locator(".play").first
    assert button.get_attribute("aria-label").startswith("Play: ")


def test_a_curves_values_are_shown_under_the_pointer_and_by_the_arrow_keys(visit, page):
    tab = visit(page)
    figure = tab.locator("#training figure").first
    tip = figure.locator(".tip")
    assert not tip.is_visible()
    figure.locator("svg").hover()
    assert re.match(r"step [12]\s", tip.inner_text()) and "CTC" in tip.inner_text()
    tab.mouse.move(0, 0)
    assert not tip.is_visible()
    figure.locator("svg").focus()
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        tab.keyboard.press(key)
        assert tip.inner_text().startswith(f"step {step}")


def test_word_errors_are_marked_by_more_than_their_colour(visit, page):
    tab = visit(page)
    wrong = tab.locator(".words .error")
    assert wrong.count() > 0
    assert tab.locator(".words").first.locator(".prompt").inner_text().endswith(("word error", "word errors"))
    assert tab.locator(".right .mark").first.inner_text() == "✓"


def test_text_of_the_data_stays_text(visit, demo, recordings, tmp_path):
    texts = {"id": HOSTILE, "text": HOSTILE}
    answer = {"task": HOSTILE, "prompt": HOSTILE, "reference": HOSTILE, "given": HOSTILE, "right": False, "words": None}
    words = align_words("<script>window.hostile = 1</script> light", "<b>bold</b> light")
    answers = [answer, answer | {"task": "transcribe", "words": words}]
    item = recordings["items"][0] | texts | {"answers": answers, "others": {HOSTILE: answers}}
    item["kept"] = [kept | {"text": HOSTILE} for kept in item["kept"]]
    left = [{"sample": HOSTILE, "reason": HOSTILE}]
    run = read_run(demo)
    passes = [
        a_pass({HOSTILE: 3, "b": 1}, one.log, left_out=left, config={HOSTILE: HOSTILE}, about={"device": HOSTILE})
        for one in run.passes
    ]
    path = tmp_path / "report.html"
    runs = {HOSTILE: Run(run.folder, passes, run.summary), "other": Run(run.folder, passes, run.summary)}
    path.write_text(make_page(runs, {"items": [item], "note": HOSTILE}))
    tab = visit(path)
    assert tab.evaluate("window.hostile") is None
    assert tab.locator("main img, main script, main b[onerror]").count() == 0
    assert tab.title().startswith(HOSTILE.replace("\u2028", " ")[:40])
    assert tab.locator(".utterance h3").evaluate("node => node.textContent") == HOSTILE


def test_several_runs_share_their_charts_and_one_table(visit, demo, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(demo, other, ignore=shutil.ignore_patterns("checkpoint-*"))
    summary = json.loads((other / "summary.json").read_text())
    summary["stage3"]["wer"] = 0.5
    (other / "summary.json").write_text(json.dumps(summary))
    about = other / "stage2" / "run.json"
    found = json.loads(about.read_text())
    found["config"]["ctc_weight"] = 0.7
    about.write_text(json.dumps(found))
    tab = visit(write_report([demo, other], tmp_path / "report.html", utterances=1))
    assert tab.locator("h1").inner_text() == "2 runs compared"
    # Stage I has the CTC loss, stage III that of the next token, stage II both: four charts with a line for each run.
    charts = tab.locator("#training figure")
    assert charts.count() == 4
    for place in range(4):
        strokes = (
            charts.nth(place).locator("svg path").evaluate_all("all => all.map(one => one.getAttribute('stroke'))")
        )
        assert strokes == ["var(--c0)", "var(--c1)"]
    row = tab.locator("#scores tr", has_text="word error rate, stage 3")
    assert row.locator("td").nth(1).inner_text() == "50.0 %"
    assert row.locator("td.best").inner_text() == "50.0 %"
    changed = tab.locator("#settings table").first
    assert changed.locator("tbody tr").all_inner_texts() == ["ctc_weight II · shrinking\t0.3\t0.7"]
    assert tab.locator(".answers .task", has_text="· other").count() == 2


@pytest.mark.parametrize("width", [1280, 720, 390, 360])
def test_the_page_fits_the_window(visit, page, width):
    tab = visit(page, width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 360])
def test_every_link_and_caption_is_on_the_screen(visit, page, width):
    """Elements that can be scrolled sideways hide what lies beyond the window's edge, and a phone shows no bar."""
    tab = visit(page, width=width)
    for kind in ("nav a", ".strip-name", "figcaption", "figcaption *", "section > p", "h2", "h3"):
        boxes = tab.locator(kind).evaluate_all(
            "all => all.map(one => [one.textContent, one.getBoundingClientRect().left, "
            "one.getBoundingClientRect().right, one.scrollWidth - one.clientWidth])"
        )
        assert boxes, kind
        for text, left, right, hidden in boxes:
            assert left >= 0 and right <= width and hidden <= 1, (kind, text, left, right, hidden)


def test_kept_frames_per_label_and_the_blank_share_that_they_let_expect_are_shown(visit, tmp_path):
    """The log has a compression of 8 and 1.0 kept frames a label: 25 / 8 labels a second, and 7 / 8 blank."""
    tab = visit(write_report([training(tmp_path / "run")], tmp_path / "report.html"))
    (row,) = tab.locator("#alignment tbody tr").all_inner_texts()
    assert row.split("\t")[1:] == ["3.1", "87.5 %", "60.0 %", "1"]
    text = tab.locator("#alignment").inner_text()
    assert "94 % of 25 frames" in text and "85 %" not in text
    heads = tab.locator("#training thead th").all_inner_texts()
    assert tab.locator("#training tbody tr td").nth(heads.index("kept per label") - 1).inner_text() == "1"
    assert "kept frames per label" in tab.locator(".figures").inner_text()


# ---------------------------------------------------------------- runs that were stopped


def stopped(demo: Path, folder: Path, steps: int = 100, checkpoint: bool = True) -> Path:
    """The first stage as it is on the disk if 100 steps were wanted and it was stopped after two."""
    shutil.copytree(demo / "stage1", folder, ignore=shutil.ignore_patterns("model"))
    if not checkpoint:
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    about = json.loads((folder / "run.json").read_text())
    about["config"] |= {"steps": steps, "out": str(folder)}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def test_a_stopped_training_says_how_far_it_came_and_the_command_that_goes_on(visit, demo, tmp_path):
    folder = stopped(demo, tmp_path / "mine" / "1")
    tab = visit(write_report([folder], tmp_path / "report.html"), width=360)
    assert tab.title() == "mine/1 · Soundwave" and tab.locator("h1").inner_text() == "mine/1"
    said = tab.locator(".unfinished").inner_text()
    assert "came to step 2 of 100" in said and "goes on from checkpoint-2" in said
    assert tab.locator("#training tbody td").first.inner_text() == "2 of 100"
    command = shlex.split(tab.locator(".command").inner_text())
    assert command[:3] == ["soundwave", "train", "1"]
    again = load_config(1, overrides=command[3:])
    wanted = json.loads((folder / "run.json").read_text())["config"]
    assert again.model_dump(mode="json") == wanted
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_stopped_training_without_a_checkpoint_says_that_it_starts_again(visit, demo, tmp_path):
    folder = stopped(demo, tmp_path / "run", checkpoint=False)
    tab = visit(write_report([folder], tmp_path / "report.html"))
    assert "starts again: there is no checkpoint yet" in tab.locator(".unfinished").inner_text()


def test_a_finished_training_says_nothing_of_going_on(visit, page):
    assert visit(page).locator(".unfinished").count() == 0


@pytest.mark.parametrize("size", ["full", "quick"])
def test_a_stopped_demonstration_goes_on_with_its_own_command(demo, tmp_path, size):
    folder = tmp_path / "my demo"
    stopped(demo, folder / "stage1")
    (folder / f"corpus-{size}").mkdir()
    (folder / "stage2").mkdir()
    (folder / "stage2" / "log.jsonl").touch()
    run = read_run(folder)
    assert run.command == f"soundwave demo{' --quick' if size == 'quick' else ''} --out '{folder}'"
    assert run.begun == ["stage2"]
    assert "stage2" in make_page({"run": run}, describe(run, {}, 1))


# ---------------------------------------------------------------- recordings that were held out


def test_held_out_recordings_are_shown_with_all_their_lines(demo):
    run, test = read_run(demo / "stage3"), next(demo.glob("corpus-*")) / "test.jsonl"
    found = describe(run, {}, 2, test=test)
    assert found["note"].startswith("From test.jsonl, at even distances of ") and "learned" not in found["note"]
    rows = {sample.id: sample for sample in read_manifest(test)}
    assert len(found["items"]) == 2
    for item in found["items"]:
        lines_of_it = [sample for sample in rows.values() if sample.audio == rows[item["id"]].audio]
        assert [answer["task"] for answer in item["answers"]] == [sample.task for sample in lines_of_it]
        assert all(isinstance(answer["given"], str) for answer in item["answers"])


def test_a_scored_run_shows_held_out_recordings_too_if_they_are_named(demo):
    test = next(demo.glob("corpus-*")) / "test_voices.jsonl"
    found = describe(read_run(demo), {}, 1, test=test)
    assert found["note"].startswith("From test_voices.jsonl") and found["items"][0]["id"].startswith(
        "test_voices.jsonl"
    )


def test_recordings_that_were_trained_on_are_no_test(demo):
    manifest = next(demo.glob("corpus-*")) / "stage1.jsonl"
    note = describe(read_run(demo / "stage1"), {}, 1, test=manifest)["note"]
    assert "6 of them are in the manifests of the training, so the model has learned them" in note


def test_a_long_recording_is_asked_whole_and_a_bad_one_is_named(demo, spoken, tmp_path):
    long = np.concatenate([spoken] * (int(31 * SAMPLING_RATE / len(spoken)) + 1))
    soundfile.write(tmp_path / "long.wav", long, SAMPLING_RATE)
    soundfile.write(tmp_path / "bad.wav", spoken, SAMPLING_RATE)
    (tmp_path / "bad.wav").write_bytes((tmp_path / "bad.wav").read_bytes()[:2000])
    rows = [{"audio_filepath": f"{name}.wav", "text": "turn on the light"} for name in ("bad", "long", "gone")]
    write_manifest(tmp_path / "t.jsonl", rows)
    found = describe(read_run(demo / "stage1"), {}, 2, test=tmp_path / "t.jsonl")
    (item,) = found["items"]
    assert item["id"] == "t.jsonl:2" and item["seconds"] < 30 < item["whole_seconds"]
    assert "bad.wav" in found["note"] and "t.jsonl:3" in found["note"]


def test_a_test_manifest_that_cannot_be_read_is_an_error(demo, tmp_path):
    with pytest.raises(ManifestError, match=r"none\.jsonl"):
        write_report([demo], tmp_path / "report.html", test=tmp_path / "none.jsonl")
    write_manifest(tmp_path / "text.jsonl", [{"task": "question", "prompt": "Why?", "answer": "so"}])
    with pytest.raises(ManifestError, match=r"text\.jsonl: holds no recording"):
        write_report([demo], tmp_path / "report.html", test=tmp_path / "text.jsonl")


def test_of_several_stages_the_last_ones_model_hears_the_recordings(visit, demo, tmp_path):
    stages = [demo / f"stage{stage}" for stage in (1, 3, 2)]
    path = write_report(stages, tmp_path / "report.html", utterances=1)
    tab = visit(path)
    assert tab.title() == "demo/stage1 · demo/stage3 · demo/stage2 · Soundwave"
    assert "come from demo/stage3." in tab.locator("#recordings").inner_text()
    assert tab.locator(".attended").count() == 1  # stage I has no attention
    assert "demo/stage3" in tab.locator(".answers .task").first.inner_text()


def test_a_training_that_has_just_begun_has_a_page_too(visit, tmp_path):
    tab = visit(write_report([training(tmp_path / "run", steps=2)], tmp_path / "report.html"))
    assert "There is no model in" in tab.locator("#recordings").inner_text()
    assert tab.locator("#scores").count() == 0


def test_what_was_left_out_and_skipped_is_listed(visit, tmp_path):
    folder = training(tmp_path / "run")
    lines(folder / "left_out.jsonl", [{"step": 0, "sample": "t.jsonl:4", "file": "a.wav", "reason": "is silent"}])
    lines(folder / "skipped_steps.jsonl", [{"step": 7, "reason": "grad_norm = nan", "samples": ["t.jsonl:2"]}])
    rows = visit(write_report([folder], tmp_path / "report.html")).locator("#left-out tbody tr").all_inner_texts()
    assert [row.split("\t")[1:] for row in rows] == [
        ["1", "is silent", "t.jsonl:4 a.wav"],
        ["7", "grad_norm = nan", "t.jsonl:2"],
    ]
