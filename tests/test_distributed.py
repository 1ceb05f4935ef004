"""Two processes that a launcher starts train as one process with the same batches would; on the CPU, over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from soundwave.data.sampling import BucketBatchSampler, group_counts, paper_temperature
from soundwave.model.modeling import WEIGHTS_FILE
from soundwave.training import stages
from soundwave.training.checkpoints import newest_checkpoint
from soundwave.training.distributed import Processes
from soundwave.training.settings import ConfigError
from tests import processes
from tests.in_processes import run
from tests.short_runs import SETTINGS, copy_recordings, lines, manifest_of, same_bits, save_still_model, train

HERE = Path(__file__).resolve().parent
SCRIPT, TORCHRUN = (Path(sys.executable).with_name(name) for name in ("soundwave", "torchrun"))
LAUNCH = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2"]
SAME = {"loss", "ctc_loss", "lm_loss", "grad_norm", "blank_share", "batch_samples", "kept_per_label", "compression"}
STILL = {"spec_augment": False, "adapter_dropout": 0.0, "exact": True, "steps": 4}
BAD = "bad.wav"


# ---------------------------------------------------------------- shares of the batches


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("temperature", [None, paper_temperature], ids=["every-sample-once", "temperature"])
@pytest.mark.parametrize("count", [1, 7, 63, 100])
def test_shares_are_the_batches_of_one_process(ranks, temperature, count):
    lengths, groups = [float(i % 13) for i in range(count)], ["a" if i % 3 else "b" for i in range(count)]

    def sampler(size, **share):
        made = BucketBatchSampler(lengths, groups, size, seed=5, temperature=temperature, **share)
        made.set_epoch(2)
        return made

    alone = list(sampler(3 * ranks))
    shares = [list(sampler(3, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(alone)} == {len(sampler(3, rank=0, ranks=ranks))}
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(i for part in parts for i in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and max(map(len, parts)) <= 3
    drawn = [i for share in shares for batch in share for i in batch]
    if temperature is None:
        assert sorted(drawn) == list(range(count))
    else:
        sizes = {name: groups.count(name) for name in groups}
        assert {name: sum(groups[i] == name for i in drawn) for name in sizes} == group_counts(sizes, 11.0, count)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_beyond_the_processes_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank = {rank}, but it must be 0 to 1"):
        BucketBatchSampler([1.0], ["a"], 1, rank=rank, ranks=2)


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def data(tiny_corpus, tmp_path_factory) -> SimpleNamespace:
    """Manifests: seven recordings; recordings, text alone and a damaged file; text alone."""
    folder = tmp_path_factory.mktemp("data")
    rows = copy_recordings(tiny_corpus, folder, 7)
    (folder / BAD).write_bytes(b"no audio")
    bad = {"audio_filepath": BAD, "text": "nothing", "duration": 0.1}
    written = [
        {"task": "chat", "prompt": f"Who is {name}?", "answer": f"{name} is nobody in particular."}
        for name in ("Ann", "Bob", "Cy", "Dee", "Eve")
    ]
    return SimpleNamespace(
        speech=manifest_of(folder, rows, "speech.jsonl"),
        mixed=manifest_of(folder, [*rows[:4], *written, bad], "mixed.jsonl"),
        damaged=manifest_of(folder, [rows[0], bad, rows[1], rows[2]], "damaged.jsonl"),
        written=manifest_of(folder, written, "written.jsonl"),
    )


@pytest.fixture(scope="module")
def still(small_vocabulary, tmp_path_factory) -> Path:
    return save_still_model(small_vocabulary, tmp_path_factory.mktemp("still") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def runs(data, still, small_vocabulary, folder) -> dict[str, dict[str, Any]]:
    """The runs by name, as two processes do them: their batches are half of those of one process."""
    fresh = {"model": None, "language_model": str(small_vocabulary), "train": data.speech}
    lively = fresh | {"steps": 6, "save_steps": 2, "save_total_limit": 3, "batch_size": 1, "accumulation": 2, "seed": 3}
    of = {
        "fresh": (1, fresh | STILL | {"batch_size": 2}, {}),
        "mixed": (2, {"train": data.mixed, "batch_size": 1, "accumulation": 2, **STILL}, {}),
        "written": (3, {"train": data.written, "model": folder / "mixed" / "model", "batch_size": 2, **STILL}, {}),
        "masked": (1, {"train": data.speech, "batch_size": 2, **STILL, "spec_augment": True}, {}),
        "poison": (1, {"train": data.speech, "batch_size": 1, **STILL}, {"poison": "speech.jsonl:3"}),
        "always": (1, {"train": data.speech, "batch_size": 4, **STILL, "max_skipped": 2}, {"poison": "speech.jsonl:1"}),
        "strict": (1, {"train": data.damaged, "batch_size": 2, **STILL, "strict": True}, {}),
        "whole": (1, lively, {}),
        "stopped": (1, lively | {"save_steps": 9}, {"stop": 1}),
        "resumed": (1, lively | {"save_steps": 9}, {}),
        "killed": (1, lively, {}),
    }
    return {
        name: {"stage": stage, "settings": SETTINGS | {"model": still} | settings} | more
        for name, (stage, settings, more) in of.items()
    }


@pytest.fixture(scope="module")
def pair(runs, killed, folder) -> SimpleNamespace:
    """What two processes make of `runs`: results by name of the run, for each rank; outputs by rank.

    They have what a launcher gives them; the run `killed` has the launcher itself.
    """
    outs = {name: folder / ("stopped" if name == "resumed" else name) for name in runs}
    todo = [one | {"settings": one["settings"] | {"out": outs[name]}} for name, one in runs.items()]
    (folder / "runs.json").write_text(json.dumps(todo, default=str))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started, logs = [], [folder / f"{rank}.stderr" for rank in (0, 1)]
    for rank, log in enumerate(logs):
        given = master | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        with open(log, "w") as file:
            command = [sys.executable, HERE / "in_processes.py", folder / "runs.json"]
            started.append(processes.Popen(command, env=os.environ | processes.WITHOUT_COMPILER | given, stderr=file))
    try:
        ended = [process.wait(600) for process in started]
    finally:
        for process in started:
            process.kill()
    said = [log.read_text() for log in logs]
    assert ended == [0, 0], "".join(said)[-6000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(outs=outs, said=said, found=dict(zip(runs, zip(*found, strict=True), strict=True)))


def alone(runs, name: str, out: Path) -> dict[str, Any]:
    """Do one of the runs in this process, with batches as large as those of both together."""
    one = runs[name]
    settings = one["settings"] | {"batch_size": 2 * one["settings"]["batch_size"], "out": out}
    return run(one["stage"], settings, one.get("poison"))


@contextmanager
def launched_alone(device_type):
    yield Processes(launched=True)


@pytest.mark.parametrize("name", ["fresh", "mixed", "written", "masked", "poison"])
def test_two_processes_train_as_one_with_the_same_batches(runs, pair, tmp_path, monkeypatch, name):
    if name == "masked":  # what is masked follows from the samples' names if a launcher has started the run
        monkeypatch.setattr(stages, "joined", launched_alone)
    one = alone(runs, name, tmp_path)
    assert one["error"] is None
    both, first = lines(pair.outs[name] / "log"), lines(tmp_path / "log")
    assert len(both) == len(first) == 4
    for entry, wanted in zip(both, first, strict=True):
        assert entry["tasks"] == wanted["tasks"] and entry["left_out"] == wanted["left_out"]
        if entry["loss"] is None:  # a skipped step, of which only the process whose loss was finite has figures
            continue
        assert entry.keys() == wanted.keys()
        for figure in SAME & entry.keys():
            assert entry[figure] == pytest.approx(wanted[figure], rel=1e-4), (figure, entry["step"])
    for file in ("left_out", "skipped_steps"):
        rows = [lines(folder / file) for folder in (pair.outs[name], tmp_path)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for step, *shares in zip(one["steps"], *(found["steps"] for found in pair.found[name]), strict=True):
        assert sorted(shares[0] + shares[1]) == sorted(step)


def test_every_sample_comes_once_an_epoch_and_each_process_has_its_share(pair):
    shares = [found["steps"] for found in pair.found["fresh"]]
    assert sorted(name for share in shares for step in share[:2] for name in step) == [
        f"speech.jsonl:{number}" for number in range(1, 8)
    ]
    assert [len(step) for step in shares[0][:2]] + [len(step) for step in shares[1][:2]] in ([2, 2, 2, 1], [2, 2, 1, 2])


def test_a_step_is_skipped_by_all_processes_and_said_once_with_the_samples(pair):
    (row,) = lines(pair.outs["poison"] / "skipped_steps")
    assert "the loss is not finite (ctc_loss = nan)" in row["reason"] and row["samples"] == ["speech.jsonl:3"]
    assert sum(said.count("its samples are speech.jsonl:3\n") for said in pair.said) == 1


def test_too_many_skipped_steps_end_all_processes_and_the_batch_is_saved(pair):
    errors = [found["error"] for found in pair.found["always"]]
    assert errors[0] == errors[1] and errors[0].startswith("FloatingPointError: the loss at step 1 is not finite")
    bad = json.loads((pair.outs["always"] / "bad-batch.json").read_text())
    assert "speech.jsonl:1" in bad["samples"] and (pair.outs["always"] / "bad-batch.safetensors").is_file()


def test_a_sample_is_left_out_once_for_all_processes(pair):
    (row,) = lines(pair.outs["mixed"] / "left_out")
    assert row["file"].endswith(BAD)
    assert sum(line.startswith("left out: ") for line in pair.said[0].splitlines()) == 1


def test_strict_ends_all_processes_with_the_sample_and_the_file(pair):
    errors = [found["error"] for found in pair.found["strict"]]
    assert errors[0] == errors[1] and errors[0].startswith("SampleError: damaged.jsonl:2") and BAD in errors[0]


def test_what_a_step_has_is_said_at_the_start(pair):
    assert "step 1 of 4 begins; a step has 4 samples (batch_size 2 x accumulation 1 x 2 processes)\n" in pair.said[0]


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_the_run_goes_on_to_the_same_bits(pair):
    errors = [found["error"] for found in pair.found["stopped"]]
    assert errors[0] == errors[1] and errors[0].startswith("Interrupted: stopped after step 2 of 6, which is saved")
    assert "going on from" in pair.said[0] and [found["error"] for found in pair.found["resumed"]] == [None, None]
    states = [load_file(pair.outs[name] / "model" / WEIGHTS_FILE) for name in ("whole", "resumed")]
    assert same_bits(*states)


def test_another_number_of_processes_is_refused_or_told(runs, pair, capsys):
    settings = runs["whole"]["settings"] | {"out": pair.outs["resumed"], "steps": 6}
    with pytest.raises(ConfigError, match=r"with processes = 2 \(now 1\); continue anyway with resume=true"):
        train(1, settings.pop("out"), settings.pop("train"), **settings)
    settings = runs["whole"]["settings"] | {"resume": True}
    train(1, pair.outs["resumed"], settings.pop("train"), **settings)
    assert (
        "2 processes before, 1 now: a step has 2 samples, before 4; the samples of this epoch come in another order, "
        "so that some may come twice and some not at all"
    ) in capsys.readouterr().err


# ---------------------------------------------------------------- the command


def printed(logs: Path, rank: int) -> list[str]:
    """What a process has printed on stdout and stderr."""
    return [next(logs.rglob(f"{rank}/{name}.log")).read_text() for name in ("stdout", "stderr")]


def child(parent: int, rank: int) -> int | None:
    """The id of the process that a launcher has started for a rank, once it has."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            of = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # a process that has ended meanwhile
            continue
    return None


@pytest.fixture(scope="module")
def killed(runs, folder) -> SimpleNamespace:
    """The run `killed` by the command, in two processes, of which the second one is killed after the second step."""
    out, logs, second = folder / "killed", folder / "logs of killed", None
    words = [f"{name}={'null' if value is None else value}" for name, value in runs["killed"]["settings"].items()]
    command = [SCRIPT, "train", "1", *words, f"out={out}"]
    process = processes.Popen(
        [sys.executable, *LAUNCH, "--redirects", "3", "--log-dir", logs, "--no-python", *command],
        env=os.environ | processes.WITHOUT_COMPILER,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    while not (out / "checkpoint-2").exists():
        second = second or child(process.pid, 1)
        assert process.poll() is None, printed(logs, 0)
        time.sleep(0.02 if second else 0.2)  # until then all processes of the machine are looked through
    os.kill(second, signal.SIGKILL)
    start = time.monotonic()
    process.communicate(timeout=60)
    seconds, last, has_model = time.monotonic() - start, newest_checkpoint(out), (out / "model").exists()
    return SimpleNamespace(logs=logs, seconds=seconds, status=process.returncode, last=last, has_model=has_model)


def test_a_killed_process_ends_the_run_with_a_checkpoint_and_only_the_first_process_prints(killed):
    assert killed.status != 0 and killed.seconds < 45  # the launcher's patience is 30 s
    assert killed.last is not None and not killed.has_model
    assert "step 1 of 6 begins; a step has 4 samples (batch" in printed(killed.logs, 0)[1]
    assert printed(killed.logs, 1) == ["", ""]


def test_a_run_whose_process_was_killed_goes_on_to_the_same_bits(pair, killed):
    assert f"going on from {killed.last}, step {killed.last.name.partition('-')[2]} of 6\n" in pair.said[0]
    states = [load_file(pair.outs[name] / "model" / WEIGHTS_FILE) for name in ("whole", "killed")]
    assert same_bits(*states)
