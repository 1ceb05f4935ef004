"""The ablations: swapped and drawn samples, intervals, and a whole run of two variants on the real backbones."""

import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from soundwave.data.audio import load_audio
from soundwave.data.manifest import read_manifest
from soundwave.demo import ablation
from soundwave.evaluation import intervals
from soundwave.training.checkpoints import newest_checkpoint
from soundwave.training.settings import ConfigError
from tests import processes


@pytest.fixture(scope="module")
def settings(small_vocabulary) -> dict:
    """Settings of short trainings: two steps each, on two layers of the language model and 500 rows of its head."""
    changes = {
        "language_model": str(small_vocabulary),
        "lora_rank": 4,
        "batch_size": 2,
        "dtype": "float32",
        "log_steps": 1,
    }
    return {"scale": 0.01, "size": "tiny", **changes, "quiet": True}


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("ablations")
    return out, ablation.run_ablations(out, ["no-stage-1", "stacked-4"], **settings)


def started(*words: Path) -> subprocess.Popen:
    """A script in a process of its own, whose stderr is kept."""
    return processes.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_interval_of_a_share_is_that_of_the_normal_approximation():
    low, high = intervals.interval([1] * 60 + [0] * 140, [1] * 200, [str(i) for i in range(200)])
    half = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.01) and high == pytest.approx(0.3 + half, abs=0.01)


def test_interval_weighs_long_samples():
    assert intervals.interval([5, 0], [5, 5], ["a", "b"]) == [0.0, 1.0]


def test_interval_draws_a_sentence_that_comes_twice_as_one():
    once = intervals.interval([1, 0, 0, 1, 0], [1] * 5, list("abcde"))
    assert intervals.interval([1, 0, 0, 1, 0] * 2, [1] * 10, list("abcde") * 2) == once


def test_differences_are_those_of_the_same_sentences():
    """An error of both models is no difference. One more error of one model has a narrower interval than its rate."""
    said = {str(i): f"sentence {i}" for i in range(50)}

    def answers(wrong):
        rows = [(i, "transcribe", said[i], "sentence" if i in wrong else said[i]) for i in said]
        rows += [(i, task, "yes", "no" if i in wrong else "Yes.") for i in said for task in intervals.TASKS[1:]]
        return [dict(zip(("sample", "task", "reference", "answer"), row, strict=True)) for row in rows]

    one, two = (intervals.tally(answers(wrong), said) for wrong in ({"3"}, {"3", "7"}))
    assert intervals.estimates(one)["wer"]["value"] == 0.01  # of 100 words
    assert intervals.estimates(one)["accuracy"]["voice"]["value"] == 0.98
    assert intervals.differences(one, one)["wer"] == {"value": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    found = intervals.differences(two, one)
    assert found["wer"]["value"] == 0.01 and found["accuracy"]["rate"]["value"] == pytest.approx(-0.02)
    wide, narrow = intervals.estimates(two)["wer"]["interval"], found["wer"]["interval"]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_answers_to_other_samples_are_not_compared():
    said = {"a": "light on", "b": "light off"}
    rows = [{"sample": i, "task": "transcribe", "reference": said[i], "answer": said[i]} for i in said]
    with pytest.raises(ValueError, match="'transcribe' belong to other samples"):
        intervals.differences(intervals.tally(rows, said), intervals.tally(rows[:1], said))


def test_what_surely_differs_stands_out():
    rows = {"value": 0.03, "interval": [0.01, 0.05], "p": 0.009}, {"value": -0.01, "interval": [-0.02, 0.0], "p": 0.02}
    assert [intervals._points(row) for row in rows] == ["**+3.0 (+1.0 to +5.0)**", "-1.0 (-2.0 to +0.0)"]


@pytest.mark.parametrize(("worse", "better"), [(6, 1), (12, 4), (10, 0), (0, 0)])
def test_p_is_that_of_the_exact_sign_test_where_each_answer_is_a_sentence(worse, better):
    counts = [-1] * worse + [1] * better + [0] * 50
    tail = sum(math.comb(worse + better, k) for k in range(worse, worse + better + 1))
    exact = min(1.0, 2 * tail / 2 ** (worse + better))
    found = intervals.p_value(counts, [str(i) for i in range(len(counts))])
    assert found == pytest.approx(exact, abs=0.012)


def test_p_takes_the_answers_about_one_sentence_as_one():
    once = intervals.p_value([1, 1, 1, 0], list("abcd"))
    assert intervals.p_value([1, 1, 1, 0] * 2, list("abcd") * 2) == once


def test_a_fifth_of_the_transcripts_is_swapped_and_nothing_else(done):
    corpus = done[0] / "corpus"
    for name in ("stage1", "labels"):
        clean, swapped = rows(corpus / f"{name}.jsonl"), rows(corpus / f"{name}-swapped.jsonl")
        assert [row["audio_filepath"] for row in clean] == [row["audio_filepath"] for row in swapped]
        assert Counter(row["text"] for row in clean) == Counter(row["text"] for row in swapped)
        differ = sum(a["text"] != b["text"] for a, b in zip(clean, swapped, strict=True))
        assert 0.1 * len(clean) < differ <= round(0.2 * len(clean))
        assert all(b["ctc_text"].startswith(b["text"]) for b in swapped if "ctc_text" in b)
        read_manifest(corpus / f"{name}-swapped.jsonl")


def test_every_variant_is_scored_with_its_interval(done):
    out, results = done
    assert json.loads((out / "ablations.json").read_text()) == results
    for found in results.values():
        noisy = found["noise"]
        for score in (found["wer"], *found["accuracy"].values(), noisy["wer"], *noisy["accuracy"].values()):
            low, high = score["interval"]
            assert 0 <= low <= score["value"] <= high
        assert set(noisy["accuracy"]) == {"voice", "rate"}
        assert set(found["accuracy"]) == {"voice", "rate", "intent", "question"}
        assert len(found["lm_loss"]) == 3 and sum(found["drawn"].values()) == pytest.approx(1)
        assert found["seconds_a_step"] > 0 and found["seconds_to_first_token"] > 0
        assert found["differences"] is None  # nothing to compare with


def test_scores_are_those_of_the_answers(done):
    """The intervals' values are the scores that the evaluation has counted."""
    out, results = done
    for name, found in results.items():
        summary = json.loads((out / name / "summary.json").read_text())["stage3"]
        assert found["wer"]["value"] == pytest.approx(summary["wer"])
        for task, score in found["accuracy"].items():
            assert score["value"] == pytest.approx(summary["accuracy"][task])


def test_the_harder_test_is_of_unheard_voices_in_noise(done, tmp_path):
    corpus = done[0] / "corpus"
    samples, train = read_manifest(corpus / "test_voices.jsonl"), read_manifest(corpus / "stage2.jsonl")
    assert not {sample.extra["voice"] for sample in samples} & {sample.extra.get("voice") for sample in train}
    answers = rows(done[0] / "stacked-4" / "answers-in-noise.jsonl")
    assert {row["sample"] for row in answers} == {sample.id for sample in samples}
    again, one, two = (load_audio(ablation._noisy(samples[i], tmp_path).audio) for i in (0, 0, 1))
    assert (again == one).all()  # a recording's noise is always the same
    noise = [noisy - load_audio(sample.audio) for noisy, sample in zip((one, two), samples, strict=False)]
    for difference, sample in zip(noise, samples, strict=False):
        power = np.square(load_audio(sample.audio)).mean() / np.square(difference).mean()
        assert 10 * np.log10(power) == pytest.approx(10, abs=0.3)
    short = min(map(len, noise))
    assert abs(np.corrcoef(noise[0][:short], noise[1][:short])[0, 1]) < 0.05


def test_stacked_frames_are_all_read(done):
    found = done[1]["stacked-4"]
    assert found["kept_per_second"] == pytest.approx(12.5, rel=0.05)  # a last group may not be full
    assert found["alignment"]["wer"] > 0 and found["alignment"]["jump"] > 0


def test_without_stage_one_there_is_no_alignment(done):
    assert done[1]["no-stage-1"]["alignment"] is None
    assert json.loads((done[0] / "no-stage-1/stage2/run.json").read_text())["config"]["model"] is None


def test_tables_and_page_name_every_variant(done):
    out, results = done
    tables, page = (out / "ablations.md").read_text(), (out / "report.html").read_text()
    assert all(tables.count(f"| {name} |") == 4 and name in page for name in results)
    assert "stacked-4" in (out / "alignments.html").read_text()
    said = {sample.id: sample.text for sample in read_manifest(out / "corpus" / "test.jsonl")}
    answers = intervals.tally(rows(out / "stacked-4" / "answers.jsonl"), said)
    none = intervals.differences(answers, answers)
    again = {name: found | {"differences": none | {"noise": none}} for name, found in results.items()}
    compared = intervals.markdown(again)
    assert compared.count("| stacked-4 |") == 6 and compared.count("| no-stage-1 |") == 4  # the first is the plain one


def test_the_same_call_goes_on_and_trains_only_what_is_missing(done, settings):
    out, results = done
    before = {file: file.stat().st_mtime_ns for file in out.glob("**/model.safetensors")}
    (out / "stacked-4" / "result.json").unlink()
    again = ablation.run_ablations(out, ["stacked-4"], **settings)
    assert again.keys() == results.keys()  # the table keeps what was there
    assert again["stacked-4"]["wer"] == results["stacked-4"]["wer"]
    assert not list(out.glob("**/checkpoint-*"))
    assert {file: file.stat().st_mtime_ns for file in out.glob("**/model.safetensors")} == before


@pytest.mark.parametrize("change", [{"scale": 0.02}, {"seed": 1}, {"lora_rank": 8}], ids=str)
def test_a_folder_of_other_settings_is_refused(done, settings, change):
    with pytest.raises(ConfigError, match=f"holds ablations with .*{next(iter(change))}.*, now .*; name another"):
        ablation.run_ablations(done[0], ["runs"], **settings | change)


def test_a_folder_of_another_recipe_is_refused(done, settings, monkeypatch):
    monkeypatch.setitem(ablation.FULL.passes["stage2"], "steps", 1)
    with pytest.raises(ConfigError, match="holds ablations with passes = "):
        ablation.run_ablations(done[0], ["runs"], **settings)


@pytest.mark.parametrize("text", ["", "[1]", '{"scale"'], ids=["empty", "list", "half"])
def test_a_damaged_stamp_is_named(tmp_path, text):
    (tmp_path / ablation.STAMP).write_text(text)
    with pytest.raises(ConfigError, match=r"settings.json is damaged; name another folder, or delete this one"):
        ablation.run_ablations(tmp_path, ["runs"])


@pytest.mark.parametrize("change", [{"scale": 0}, {"scale": float("nan")}, {"jobs": 0}, {"lora_rnk": 4}], ids=str)
def test_wrong_settings_are_told_before_anything_is_written(tmp_path, settings, change):
    with pytest.raises(ConfigError, match="none may be 0 or less|unknown setting 'lora_rnk'; did you mean 'lora_rank'"):
        ablation.run_ablations(tmp_path / "out", ["runs"], **settings | change)
    assert not (tmp_path / "out").exists()


def test_trainings_side_by_side_give_what_one_after_the_other_does(done, settings, tmp_path, monkeypatch):
    # Processes are started as always when a signal is tested; here one imports what they need and is forked.
    for name, value in processes.WITHOUT_COMPILER.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soundwave.demo.ablation", "soundwave.training.stages", "soundwave.evaluation.run"])
    monkeypatch.setattr(ablation.multiprocessing, "get_context", lambda method: context)
    shutil.copytree(done[0] / "corpus", tmp_path / "corpus")
    results = ablation.run_ablations(tmp_path, ["no-stage-1", "stacked-4"], jobs=2, **settings)
    for name, found in results.items():
        assert found["lm_loss"] == pytest.approx(done[1][name]["lm_loss"], rel=1e-3)
        assert found["kept_per_second"] == done[1][name]["kept_per_second"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_alone_saves_all_trainings_and_the_same_call_goes_on(settings, done, tmp_path, number):
    """Here only the parent gets the signal. Ctrl-C on a terminal reaches the whole group; trainings still get one."""
    shutil.copytree(done[0] / "corpus", tmp_path / "corpus")
    words = f"{str(tmp_path)!r}, ['stacked-3', 'stacked-4'], jobs=2, **{settings | {'scale': 1.0}!r}"
    main = f"if __name__ == '__main__':\n    ablation.run_ablations({words})\n"
    (tmp_path / "run.py").write_text(f"from soundwave.demo import ablation\n{main}")
    process = started(tmp_path / "run.py")
    logs = [tmp_path / "alignments" / name / "stage1" / "log.jsonl" for name in ("stacked-3", "stacked-4")]
    while not all(log.is_file() and log.stat().st_size for log in logs):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "Interrupted: stopped after step" in said
    assert all(newest_checkpoint(log.parent) for log in logs)


ONE_ENDS_THE_OTHER_WAITS_FOR_A_SIGNAL = """
import sys, time
from pathlib import Path
from soundwave.demo import ablation
from soundwave.training.callbacks import Interrupted, StopOnSignal

def work(name, folder):
    if name == "short":
        return
    with StopOnSignal() as stop:
        (folder / "began").touch()
        while not stop.asked:
            time.sleep(0.01)
        time.sleep(0.3)  # the rest of the step
    (folder / "saved").touch()
    raise Interrupted("stopped after a step")

if __name__ == "__main__":
    ablation._each(work, ["short", "long"], {"folder": Path(sys.argv[1])}, jobs=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_beside_an_idle_process_lets_the_other_one_save(tmp_path, number):
    """The process beside it is idle or, if the other one has taken both names, still imports its modules."""
    (tmp_path / "run.py").write_text(ONE_ENDS_THE_OTHER_WAITS_FOR_A_SIGNAL)
    process = started(tmp_path / "run.py", tmp_path)
    while not (tmp_path / "began").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and said.splitlines()[-1].endswith("Interrupted: stopped after a step")
    assert (tmp_path / "saved").is_file()


def test_an_unknown_variant_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="variant = 'soundwav', but known are soundwave, no-cross-attention"):
        ablation.run_ablations(tmp_path, ["soundwav"])


def test_a_variant_may_go_on_from_the_words_alone(done, settings):
    out, _ = done
    ablation.run_ablations(out, ["no-labels"], **settings | {"scale": 0.01})
    config = json.loads((out / "no-labels" / "stage2" / "run.json").read_text())["config"]
    assert config["model"] == str(out / "alignments" / "clean" / "stage1" / "model")
    words, whole = (rows(out / "corpus" / f"{name}.jsonl") for name in ("words", "stage2"))
    assert [row | {"ctc_text": None} for row in words] == [row | {"ctc_text": None} for row in whole]
    assert not any("ctc_text" in row for row in words) and any("ctc_text" in row for row in whole)


def test_alignments_and_variants_fit():
    assert {variant.alignment for variant in ablation.VARIANTS.values()} - {None} == set(ablation.ALIGNMENTS)
