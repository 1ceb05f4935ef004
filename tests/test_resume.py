"""A run that was killed, interrupted or out of disk space continues, and ends with the same bits."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from bench import kills
from soundwave.hardware import pick_dtype
from soundwave.model.modeling import WEIGHTS_FILE
from soundwave.training.callbacks import Interrupted, StopOnSignal
from soundwave.training.checkpoints import WriteError, fault_of, newest_checkpoint, written_aside
from soundwave.training.settings import ConfigError
from tests import processes
from tests.short_runs import copy_recordings, lines, manifest_of, same_bits, train

STEPS = {"steps": 4, "save_steps": 1, "save_total_limit": 4, "seed": 3}


@pytest.fixture(scope="module")
def manifest(tiny_corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return manifest_of(folder, copy_recordings(tiny_corpus, folder, 5))


@pytest.fixture(scope="module")
def start(small_vocabulary) -> dict:
    return {"language_model": str(small_vocabulary), **STEPS}


@pytest.fixture(scope="module")
def whole(manifest, start, tmp_path_factory) -> SimpleNamespace:
    """An undisturbed run of stage I: four steps with a checkpoint at each. Tests must not change its folder `out`."""
    out = tmp_path_factory.mktemp("whole")
    run = train(1, out, manifest, **start)
    run.out = out
    return run


@pytest.fixture
def until(whole, tmp_path) -> Callable[[int], Path]:
    """Copies the run's folder as it was right after a step."""

    def until(step: int) -> Path:
        out = tmp_path / "out"
        for name in range(1, step + 1):
            shutil.copytree(whole.out / f"checkpoint-{name}", out / f"checkpoint-{name}")
        for name in ("run.json", "log.jsonl", "left_out.jsonl", "skipped_steps.jsonl"):
            shutil.copy(whole.out / name, out)
        return out

    return until


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- which checkpoint


def truncate(file: Path, share: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * share))


def flip_a_byte_of_the_tensors(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(file.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    file.write_bytes(data)


def change_step(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 1}))


def add_a_field_of_another_version(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"nobody_knows": 1}))


def keep_the_step_only(file: Path) -> None:
    file.write_text(json.dumps({"global_step": json.loads(file.read_text())["global_step"]}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        ("trainer_state.json", truncate, "trainer_state.json is damaged"),
        ("trainer_state.json", add_a_field_of_another_version, "trainer_state.json is damaged, or of another version"),
        ("trainer_state.json", keep_the_step_only, "trainer_state.json is incomplete"),
        ("config.json", truncate, "config.json is damaged"),
        ("trainer_state.json", change_step, "trainer_state.json belongs to step 1"),
        (WEIGHTS_FILE, truncate, f"{WEIGHTS_FILE} is damaged"),
        (WEIGHTS_FILE, lambda file: truncate(file, 0), f"{WEIGHTS_FILE} is damaged"),
        ("optimizer.pt", truncate, "optimizer.pt is damaged"),
        ("optimizer.pt", flip_a_byte_of_the_tensors, "optimizer.pt is damaged"),
        ("rng_state.pth", lambda file: truncate(file, 0), "rng_state.pth is damaged"),
    ],
    ids=[
        "no-optimizer",
        "no-state",
        "half-a-state",
        "other-version",
        "poor-state",
        "half-a-config",
        "other-step",
        "half-the-weights",
        "no-weights",
    ]
    + ["half-an-optimizer", "a-flipped-bit", "empty-rng"],
)
def test_a_torn_checkpoint_is_named_skipped_and_left_alone(until, name, damage, message):
    out = until(3)
    damage(out / "checkpoint-3" / name)
    before, said = contents(out / "checkpoint-3"), []
    assert newest_checkpoint(out, said.append) == out / "checkpoint-2"
    (line,) = said
    assert line.startswith(f"{out / 'checkpoint-3'} is skipped: {message}")
    assert contents(out / "checkpoint-3") == before


def test_the_newest_checkpoint_is_that_of_the_highest_step_not_of_the_last_name(whole, tmp_path):
    for step in (9, 10):
        shutil.copytree(whole.out / "checkpoint-4", folder := tmp_path / f"checkpoint-{step}")
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_torn_checkpoint_keeps_its_content_when_its_step_is_saved_again(until, whole, manifest, start):
    out = until(3)
    truncate(out / "checkpoint-3" / WEIGHTS_FILE)
    before = contents(out / "checkpoint-3")
    resumed = train(1, out, manifest, **start)
    assert same_bits(resumed.state, whole.state)
    assert contents(out / "checkpoint-3.torn") == before
    assert fault_of(out / "checkpoint-3") is None


def test_no_more_checkpoints_are_kept_than_wanted(until, manifest, start):
    out = until(3)
    train(1, out, manifest, **start | {"save_total_limit": 2})
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


# ---------------------------------------------------------------- going on


def test_a_run_goes_on_by_itself_says_from_where_and_ends_with_the_same_bits(until, whole, manifest, start, capsys):
    out = until(2)
    (out / ".writing" / "checkpoint-3").mkdir(parents=True)  # a kill during the writing leaves this
    resumed = train(1, out, manifest, **start)
    assert f"going on from {out / 'checkpoint-2'}, step 2 of 4\n" in capsys.readouterr().err
    assert same_bits(resumed.state, whole.state)
    assert not (out / ".writing").exists()


def test_the_log_of_a_resumed_run_has_every_step_once_and_time_goes_on(until, whole, manifest, start):
    out = until(2)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 5, "sec')  # a kill leaves this
    resumed = train(1, out, manifest, **start)
    assert [entry["step"] for entry in resumed.entries] == [1, 2, 3, 4]
    assert resumed.entries[:2] == whole.entries[:2]
    seconds = [entry["seconds"] for entry in resumed.entries]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for before, after in zip(whole.entries, resumed.entries, strict=True):
        assert before["loss"] == after["loss"] and before["tasks"] == after["tasks"]


def test_a_run_killed_before_its_model_was_written_only_writes_it(until, whole, manifest, start):
    out = until(4)
    done = train(1, out, manifest, **start)
    assert same_bits(done.state, whole.state)
    assert done.entries == whole.entries
    assert not (out / "checkpoint-5").exists()


def test_another_setting_is_refused_by_name_unless_resume_is_asked_for(until, manifest, start):
    out = until(3)
    with pytest.raises(ConfigError, match=r"holds checkpoints of a run with learning_rate = 0\.001 \(now 0\.01\); "):
        train(1, out, manifest, **start | {"learning_rate": 0.01})
    assert train(1, out, manifest, **start | {"learning_rate": 0.01, "resume": True}).log[-1]["learning_rate"] == 0.01


def test_other_samples_are_refused(until, manifest, start, tmp_path):
    fewer = tmp_path / manifest.name
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:4]
    fewer.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        shutil.copy(manifest.parent / row["audio_filepath"], tmp_path)
    with pytest.raises(ConfigError, match=r"samples = {'transcribe': 5} \(now {'transcribe': 4}\)"):
        train(1, until(3), fewer, **start)


@pytest.mark.parametrize("change", [lambda rows: rows[::-1], lambda rows: [rows[0] | {"text": "no"}, *rows[1:]]])
def test_as_many_samples_in_another_order_or_with_other_texts_are_refused(until, manifest, start, change):
    out, text = until(3), manifest.read_text()
    rows = change([json.loads(line) for line in text.splitlines()])
    try:
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(
            ConfigError, match=r"holds checkpoints of a run with data = '\w+' \(now '\w+'\); continue anyway"
        ):
            train(1, out, manifest, **start)
    finally:
        manifest.write_text(text)


@pytest.mark.parametrize(
    "damage", [Path.unlink, truncate, lambda file: file.write_text("{}")], ids=["no", "half", "{}"]
)
def test_checkpoints_whose_settings_are_lost_are_refused_unless_resume_is_asked_for(until, manifest, start, damage):
    out = until(3)
    damage(out / "run.json")
    with pytest.raises(ConfigError, match="holds checkpoint-3, but run.json, which has its settings, is missing or"):
        train(1, out, manifest, **start)
    train(1, out, manifest, **start, resume=True)
    assert json.loads((out / "run.json").read_text())["config"]["steps"] == 4


@pytest.mark.parametrize("change", [{"frame_stack": 4}, {"optimizer": "adamw_8bit"}], ids=str)
def test_what_does_not_fit_the_checkpoint_is_refused_whatever_is_asked_for(until, manifest, start, change):
    out = until(3)
    before = (out / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"a run with {next(iter(change))} = .* \(now .*\); name another folder$"):
        train(1, out, manifest, **start | change | {"resume": True})
    assert (out / "run.json").read_bytes() == before


def test_another_stage_is_refused_without_advice_that_would_be_refused_too(until, whole, manifest, start):
    out = until(3)
    with pytest.raises(ConfigError, match=r"a run with stage = 1 \(now 2\); .*'\)?; name another folder$") as refused:
        train(2, out, manifest, **start | {"model": str(whole.folder)})
    assert "resume=true" not in str(refused.value)


def test_weight_decay_that_is_changed_holds(until, manifest, start):
    changed = train(1, out := until(3), manifest, **start, weight_decay=0.5, resume=True)
    groups = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert json.loads((changed.folder.parent / "run.json").read_text())["config"]["weight_decay"] == 0.5


def test_without_a_whole_checkpoint_a_run_starts_anew_and_says_so_unless_resume_is_asked_for(
    until, whole, manifest, start, capsys
):
    out = until(1)
    truncate(out / "checkpoint-1" / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match="holds no complete checkpoint, but resume = True; leave it out"):
        train(1, out, manifest, **start, resume=True)
    capsys.readouterr()
    assert same_bits(train(1, out, manifest, **start).state, whole.state)
    assert f"{out} holds no complete checkpoint: starting at step 0\n" in capsys.readouterr().err


def test_a_link_to_a_checkpoint_that_is_gone_is_moved_out_of_the_way(until, whole, manifest, start):
    out = until(2)
    (out / "checkpoint-3").symlink_to(out / "gone")
    assert same_bits(train(1, out, manifest, **start).state, whole.state)
    assert (out / "checkpoint-3.torn").is_symlink() and fault_of(out / "checkpoint-3") is None


def test_two_trainings_in_one_folder_are_refused(until, manifest, start):
    out = until(2)
    with FileLock(out / ".lock"), pytest.raises(ConfigError, match="is in use by a training that still runs; wait"):
        train(1, out, manifest, **start)
    train(1, out, manifest, **start)


def test_a_seed_decides_the_weights_however_the_dtype_was_found(whole, manifest, start, tmp_path):
    """Whether the short timing behind dtype=auto ran in this process before must not matter."""
    pick_dtype.cache_clear()
    one = train(1, tmp_path / "1", manifest, **start, dtype="auto")
    two = train(1, tmp_path / "2", manifest, **start, dtype="auto")
    assert one.log[0]["loss"] == two.log[0]["loss"] and same_bits(one.state, two.state)


def test_settings_that_decide_no_weight_may_change(until, whole, manifest, start):
    changed = {"workers": 1, "save_steps": 2, "log_steps": 2, "quiet": True}
    resumed = train(1, out := until(1), manifest, **start | changed)
    assert same_bits(resumed.state, whole.state)
    assert [entry["step"] for entry in resumed.entries] == [1, 2, 4]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


def test_resume_false_refuses_a_folder_with_checkpoints(until, manifest, start):
    with pytest.raises(ConfigError, match="holds checkpoint-2 of an earlier run, but resume = False; name another"):
        train(1, until(2), manifest, **start, resume=False)


def test_a_checkpoint_past_the_last_step_is_refused(until, manifest, start):
    with pytest.raises(ConfigError, match="holds checkpoint-4, but steps = 3; name another folder"):
        train(1, until(4), manifest, **start | {"steps": 3, "resume": True})


# ---------------------------------------------------------------- kill -9, Ctrl-C


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(tiny_corpus, small_llm, monkeypatch, capsys):
    # In stages I and III the kill comes while a checkpoint is written, in stage II between steps.
    words = ["--stages", 1, 2, 3, "--kills", 1, "--workers", 1, "--accumulation", 2, "--steps", 4, "--batch-size", 2]
    words += ["--language-model", small_llm, "--corpus", tiny_corpus]
    monkeypatch.setattr(kills, "subprocess", processes)
    monkeypatch.setattr(sys, "argv", ["kills.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        kills.main()
    assert not end.value.code
    told = capsys.readouterr().out.splitlines()
    assert told[::2] == [f"stage {stage}, 1 workers, accumulation 2: same" for stage in (1, 2, 3)]
    assert all(line.startswith("  killed ") for line in told[1::2])


def when_logged(out: Path, step: int, act: Callable[[], None]) -> threading.Thread:
    """Calls `act` in another thread when a run has logged `step` steps."""

    def watch() -> None:
        while not (out / "log.jsonl").is_file() or (out / "log.jsonl").read_bytes().count(b"\n") < step:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(whole, manifest, start, tmp_path, number):
    settings, before = start | {"save_steps": 100}, signal.getsignal(number)
    when_logged(tmp_path, 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"stopped after step [23] of 4, which is saved in .*; the same command goes"):
        train(1, tmp_path, manifest, **settings)
    assert newest_checkpoint(tmp_path) is not None and not (tmp_path / "model").exists()
    assert same_bits(train(1, tmp_path, manifest, **settings).state, whole.state)
    assert signal.getsignal(number) == before


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def inherited(request) -> Iterator[None]:
    """What SIGINT does before training. A shell without job control ignores it in the commands that it starts with &.

    Without this fixture the tests would inherit the one or the other from the shell that started them.
    """
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("inherited")
def test_the_same_signal_twice_is_one_request_and_a_later_one_stops_at_once():
    """The terminal and a parent process, or a service manager, may send the same request twice."""
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        stop._asked_at -= stop.ONE_REQUEST
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_a_signal_in_the_last_step_stops_what_would_follow_the_stage(manifest, start, tmp_path):
    when_logged(tmp_path, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    steps = start | {"save_steps": 100, "steps": 3}
    with pytest.raises(Interrupted, match="stopped at the end of stage 1, whose model is in"):
        train(1, tmp_path, manifest, **steps)
    assert (tmp_path / "model" / WEIGHTS_FILE).is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_the_command_with_status_130(manifest, small_llm, tmp_path, number):
    settings = ["steps=500", "batch_size=1", "accumulation=1", "log_steps=1", f"language_model={small_llm}"]
    words = [processes.SCRIPT, "train", "1", f"train={manifest}", f"out={tmp_path / 'out'}", "workers=2", *settings]
    process = processes.Popen(
        [*words, "--quiet"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Ctrl-C in a terminal, and the signal of a service manager, reach the data workers too.
    when_logged(tmp_path / "out", 2, lambda: os.killpg(process.pid, number))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    asked, told = [line for line in err.splitlines() if line]
    assert asked == "stopping after the current step, which is saved; press or send it again to stop at once"
    assert told.startswith("stopped after step ") and "the same command goes on from there" in told


# ---------------------------------------------------------------- disks


@pytest.fixture
def file_size_limit():
    """Limits the size of files in bytes, which acts like a full disk, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["weights-do-not-fit", "optimizer-does-not-fit"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(
    until, whole, manifest, start, file_size_limit, share
):
    out = until(2)
    before = contents(out / "checkpoint-2")
    file_size_limit(int(share * (out / "checkpoint-2" / WEIGHTS_FILE).stat().st_size))
    with pytest.raises(WriteError) as caught:
        train(1, out, manifest, **start)
    message = str(caught.value)
    assert message.startswith(f"{out / 'checkpoint-3'} cannot be written (") and message.splitlines() == [message]
    assert message.endswith("checkpoint-2 is complete: make room, then start the same command again")
    assert contents(out / "checkpoint-2") == before
    assert not (out / ".writing").exists() and not (out / "checkpoint-3").exists()
    file_size_limit(resource.RLIM_INFINITY)
    assert same_bits(train(1, out, manifest, **start).state, whole.state)


def test_a_full_disk_that_the_log_meets_first_is_one_line_that_says_what_is_safe(until, manifest, start):
    out = until(2)
    log = out / "log.jsonl"

    def fill() -> None:
        log.unlink()
        log.symlink_to("/dev/full")

    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    when_logged(out, 3, fill)
    full = "log.jsonl cannot be written (No space left on device); checkpoint-2 is complete: make room, then start the "
    full += "same"
    with pytest.raises(WriteError, match=re.escape(full)):
        train(1, out, manifest, **start | {"save_steps": 100})


def test_training_goes_on_without_tensorboard_where_its_files_cannot_be_written(
    whole, manifest, start, tmp_path, capsys
):
    (tmp_path / "runs").write_text("a file where TensorBoard wants a folder")
    assert same_bits(train(1, tmp_path, manifest, **start).state, whole.state)
    assert capsys.readouterr().err.count("TensorBoard's log cannot be written") == 1


@pytest.mark.parametrize("moment", ["killed", "error"])
def test_what_was_to_be_replaced_goes_back_when_its_successor_does_not_come(tmp_path, monkeypatch, moment):
    (model := tmp_path / "model").mkdir()
    (model / "weights").write_text("old")
    if moment == "killed":  # between the two renamings
        (tmp_path / ".writing").mkdir()
        model.rename(tmp_path / ".writing" / "model.old")
        with written_aside(tmp_path / "checkpoint-1") as folder:
            (folder / "weights").write_text("of a checkpoint")
    else:
        rename = os.rename

        def failing(source, target):
            if Path(target) == model and Path(source).name == "model":
                raise OSError(28, "No space left on device")
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(WriteError, match="model cannot be written"), written_aside(model) as folder:
            (folder / "weights").write_text("new")
    assert (model / "weights").read_text() == "old"
    assert not (tmp_path / ".writing").exists()


def test_a_model_that_does_not_fit_leaves_the_one_before(until, whole, manifest, start, file_size_limit):
    out = until(4)
    shutil.copytree(whole.folder, out / "model")
    file_size_limit(1_000_000)
    with pytest.raises(WriteError, match="model cannot be written"):
        train(1, out, manifest, **start)
    assert same_bits(load_file(out / "model" / WEIGHTS_FILE), whole.state)


def test_a_folder_that_cannot_be_written_is_one_line(manifest, start):
    with pytest.raises(WriteError, match=r"^/sys/soundwave cannot be written \("):
        train(1, Path("/sys/soundwave"), manifest, **start)


def test_a_file_in_place_of_the_folder_is_named_and_stays(manifest, start, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(WriteError, match=r"^out = '.*run' is a file; name a folder$"):
        train(1, tmp_path / "run", manifest, **start)
    assert (tmp_path / "run").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_lines_of_the_run_are_there_as_json(whole):
    assert [lines(whole.out / name) for name in ("left_out", "skipped_steps")] == [[], []]
