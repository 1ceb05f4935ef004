"""Results that an evaluation keeps in a folder: it goes on after a stop, and the files end with the same bytes.

The test that kills processes does it once by default. Twenty times:

    pytest tests/test_results.py -k killed --fuzz 20
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from soundwave.data.audio import SAMPLING_RATE, AudioError
from soundwave.data.collate import LeftOut
from soundwave.data.manifest import Sample, read_manifest, write_manifest
from soundwave.evaluation import results, run
from soundwave.evaluation.classes import Confusion
from soundwave.evaluation.results import open_results, read_answers
from tests.processes import WITHOUT_COMPILER

SCRIPT = Path(sys.executable).with_name("soundwave")
KEPT = ("evaluation.json", "answers.jsonl", "left_out.jsonl", "scores.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A manifest of 14 samples: transcriptions, choices, a recording of 40 s, a silent one and one without words."""
    folder = tmp_path_factory.mktemp("kept")
    chance = np.random.default_rng(0)
    rows = []
    for i in range(9):
        soundfile.write(folder / f"{i}.wav", 0.1 * chance.standard_normal(9000 + 900 * i), SAMPLING_RATE)
        rows.append({"audio_filepath": f"{i}.wav", "text": "turn on the light"})
    soundfile.write(folder / "long.wav", 0.1 * chance.standard_normal(40 * SAMPLING_RATE), SAMPLING_RATE)
    soundfile.write(folder / "silent.wav", np.zeros(SAMPLING_RATE), SAMPLING_RATE)
    rows += [{"audio_filepath": f"{name}.wav", "text": "stop"} for name in ("long", "silent")]
    rows[4]["text"] = "..."
    asked = {"task": "voice", "prompt": "Is it (A) male or (B) female?", "answer": "(A)"}
    rows += [{"audio_filepath": f"{i}.wav"} | asked for i in (2, 7, 5)]
    write_manifest(folder / "test.jsonl", rows)
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """The files of a folder but its lock and the times."""
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.name not in (".lock", "speed.json")}


class Stop(Exception):
    """What stops an evaluation of a test."""


class Model:
    """As much of a model as `evaluate` looks at, when its answers are made up."""

    config = SimpleNamespace(stage=3, keep="peaks")

    def eval(self) -> None:
        pass


class Processor:
    """As much of a processor as `listen` looks at."""

    def features(self, samples):
        import torch

        return torch.zeros(1, len(samples) // 160)


@pytest.fixture
def made_up(monkeypatch):
    """Answers that tell in which batch and at which place they were made; `asked` has the batches."""
    asked = []

    def answer(model, processor, prompts, audio, *, max_new_tokens, cut_off, **_):
        asked.append([None if clip is None else clip.shape[1] for clip in audio])
        return [f"{place} of {asked[-1]}" for place in range(len(prompts))]

    monkeypatch.setattr(run, "answer", answer)
    monkeypatch.setattr(run, "read_windows", lambda reader, windows: (f"{len(list(windows))} windows", False))
    monkeypatch.setattr(run, "chat_fault", lambda *_: None)
    return asked


def evaluate(samples: list[Sample], out: Path, stop_after: int | None = None, **settings):
    """Evaluate with made-up answers into `out`, and stop behind the row or omission number `stop_after`."""
    with open_results(out, {"test": "it"}) as kept:
        if stop_after is not None:
            for name in ("add", "leave_out"):
                setattr(kept, name, counting(getattr(kept, name), stop_after, kept))
        scores = run.evaluate(Model(), Processor(), samples, batch_size=4, results=kept, **settings)
        kept.finish(scores.as_dict(), scores.speed)
    return scores


def counting(keep, stop_after: int, kept):
    def wrapped(one):
        if len(kept.rows) + len(kept.left_out) >= stop_after:
            raise Stop
        keep(one)

    return wrapped


def test_an_evaluation_that_was_stopped_anywhere_ends_with_the_same_bytes(folder, made_up, tmp_path):
    samples = read_manifest(folder / "test.jsonl")
    whole = evaluate(samples, tmp_path / "whole")
    batches, expected = list(made_up), contents(tmp_path / "whole")
    assert whole.samples == {"transcribe": 9, "voice": 3} and len(whole.left_out) == 2 and whole.in_pieces
    assert set(KEPT) <= set(expected)
    for place in range(14):
        made_up.clear()
        out = tmp_path / f"stopped{place}"
        with pytest.raises(Stop):
            evaluate(samples, out, stop_after=place)
        assert "scores.json" not in contents(out)
        found = evaluate(samples, out)
        assert contents(out) == expected, place
        assert (found.wer, found.accuracy, found.answers) == (whole.wer, whole.accuracy, whole.answers)
        assert all(batch in batches for batch in made_up)  # a sample stands in the batch that it would have had
        assert len(made_up) <= len(batches) + 1  # the batch in which it stopped is answered twice, no other one is
    made_up.clear()
    assert evaluate(samples, tmp_path / "whole").answers == whole.answers and not made_up
    assert contents(tmp_path / "whole") == expected


@pytest.mark.parametrize("torn", [b'{"sample": "test.jsonl:9", "ta', b"\x00\x00\x00", b'{"a": 1}'], ids=repr)
def test_a_torn_last_line_is_answered_again(folder, made_up, tmp_path, torn):
    samples = read_manifest(folder / "test.jsonl")
    evaluate(samples, tmp_path / "whole")
    with pytest.raises(Stop):
        evaluate(samples, tmp_path / "torn", stop_after=6)
    for name in ("answers.jsonl", "left_out.jsonl"):
        with open(tmp_path / "torn" / name, "ab") as file:
            file.write(torn)
    evaluate(samples, tmp_path / "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_each_recording_is_read_once(folder, made_up, tmp_path, monkeypatch):
    from soundwave.evaluation import listening

    read = []
    blocks = listening.read_blocks
    monkeypatch.setattr(listening, "read_blocks", lambda path, **_: read.append(path.name) or blocks(path, **_))
    samples = read_manifest(folder / "test.jsonl")[:11]
    run.evaluate(Model(), Processor(), samples, batch_size=4)
    assert sorted(read) == sorted(sample.audio.name for sample in samples if sample.text != "...")


def test_a_recording_that_was_answered_and_is_now_gone_stops_it(folder, made_up, tmp_path):
    samples = read_manifest(folder / "test.jsonl")
    gone = tmp_path / "gone.wav"
    gone.write_bytes((folder / "8.wav").read_bytes())
    samples[8] = samples[8].model_copy(update={"audio": gone})  # in the first batch
    with pytest.raises(Stop):
        evaluate(samples, tmp_path / "out", stop_after=4)
    for content in (b"", (folder / "silent.wav").read_bytes()):  # its header says so, or its samples
        gone.write_bytes(content)
        with pytest.raises(AudioError, match=r"gone.wav: was answered before, but now .*; begin the evaluation anew"):
            evaluate(samples, tmp_path / "out")


# ---------------------------------------------------------------- the folder


def test_another_evaluation_in_the_folder_is_refused_by_what_differs(tmp_path):
    with open_results(tmp_path / "a", {"model": "x", "batch_size": 4}):
        pass
    with (
        pytest.raises(ValueError, match=r"a: holds another evaluation: batch_size = 4, but this one has 8; name"),
        open_results(tmp_path / "a", {"model": "x", "batch_size": 8}),
    ):
        pass
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with (
        pytest.raises(ValueError, match=r"b: holds thesis.tex, which is no evaluation's; name a new folder"),
        open_results(tmp_path / "b", {}),
    ):
        pass
    for text in ("", "[]", "{"):
        (tmp_path / "a" / "evaluation.json").write_text(text)
        with (
            pytest.raises(ValueError, match="evaluation.json: is damaged; name a new folder"),
            open_results(tmp_path / "a", {}),
        ):
            pass


def test_what_is_known_after_loading_must_be_the_same_too(tmp_path):
    for _ in range(2):
        with open_results(tmp_path / "a", {"model": "x"}) as kept:
            kept.settle(device="cpu", dtype="torch.float32")
    with (
        open_results(tmp_path / "a", {"model": "x"}) as kept,
        pytest.raises(
            ValueError, match='holds another evaluation: dtype = "torch.float32", but this one has "torch.bf'
        ),
    ):
        kept.settle(device="cpu", dtype="torch.bfloat16")


def test_two_evaluations_at_once_are_refused(tmp_path):
    with (
        open_results(tmp_path / "a", {}),
        pytest.raises(BlockingIOError, match="a: another evaluation writes here; wait for it, or name another"),
        open_results(tmp_path / "a", {}),
    ):
        pass
    with open_results(tmp_path / "a", {}):
        pass


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    good = json.dumps(dict.fromkeys(results.KEYS, "a"))
    (tmp_path / "answers.jsonl").write_text(f"{good}\nnonsense\n{good}\n")
    with pytest.raises(ValueError, match=r"answers.jsonl:2: is no answer with the keys sample, task, reference, ans"):
        read_answers(tmp_path)
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"answers.jsonl: holds no answers"):
        read_answers(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none: does not exist; give what evaluate --answers or --out wrote"):
        read_answers(tmp_path / "none")


def test_each_task_has_a_picture_of_its_own(tmp_path):
    confusion = Confusion(["a", "b"], [[1, 0, 0], [0, 1, 0]])
    tasks = ["male or female", "male/or/female", "Male or female", "质" * 80]
    with open_results(tmp_path / "out", {}) as kept:
        files = [kept.draw(task, confusion) for task in tasks]
        assert kept.draw(tasks[1], confusion) == files[1]
    assert [file.name for file in files[:3]] == [
        "confusion-male-or-female.png", "confusion-male-or-female-2.png", "confusion-Male-or-female-3.png"
    ]  # fmt: skip
    assert len({file.read_bytes() for file in files}) == 4


def test_a_sample_is_left_out_once(tmp_path):
    for _ in range(2):
        with open_results(tmp_path / "a", {}) as kept:
            kept.leave_out(LeftOut("1", "a.wav", "is silent"))
    assert (tmp_path / "a" / "left_out.jsonl").read_text().count("\n") == 1


# ---------------------------------------------------------------- the command


def test_an_evaluation_that_is_killed_ends_with_the_same_bytes(folder, models_of_few_tokens, tmp_path, soundwave, fuzz):
    chance, kills = random.Random(0), fuzz(1)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    write_manifest(folder / "many.jsonl", rows * -(-kills // 4))
    words = ["--model", models_of_few_tokens[3], "--batch-size", "2", "--max-new-tokens", "12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, out, err = soundwave("evaluate", folder / "many.jsonl", *words, "--out", whole, "--quiet")
    assert status == 0, err
    assert "RTFx" in out and "to the first token" in out and "frames kept a second" in out and "left out: " in out
    speed = json.loads((whole / "speed.json").read_text())
    assert set(speed) == {"audio_seconds", "seconds", "rtfx", "seconds_to_first_token"}
    answers, process = killed / "answers.jsonl", [folder / "many.jsonl", *words, "--out", killed]
    for _ in range(kills):
        before = answers.read_bytes().count(b"\n") if answers.exists() else 0
        wanted, wait = chance.choice(
            [(0, chance.uniform(0, 8)), (1, 0.0), (1, 0.02), (2, 0.2)] if kills > 1 else [(3, 0)]
        )
        with subprocess.Popen(
            [SCRIPT, "evaluate", *map(str, process)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | WITHOUT_COMPILER,
        ) as started:
            deadline = time.monotonic() + 120
            while started.poll() is None and time.monotonic() < deadline:
                if wanted == 0 or answers.exists() and answers.read_bytes().count(b"\n") >= before + wanted:
                    break
                time.sleep(0.005)
            time.sleep(wait)
            assert started.poll() is None  # else it was not killed, but had ended
            started.send_signal(signal.SIGKILL)
        assert not (killed / "scores.json").exists()
    status, _, err = soundwave("evaluate", *process, "--quiet")
    assert status == 0, err
    assert contents(killed) == contents(whole)


def test_mistakes_are_one_line_before_a_model_is_loaded(folder, tmp_path, soundwave, monkeypatch):
    monkeypatch.setattr("soundwave.cli.common.load_model", lambda *_: pytest.fail("a model was loaded"))
    test, model = folder / "test.jsonl", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    out = ("--out", tmp_path / "out")
    for words, fault in (
        (("meld",), "meld: give the folder of its corpus with --data"),
        (("librispeach",), "librispeach: is neither a manifest nor a test; the tests are librispeech-test-clean, "),
        ((test, "--data", folder), "test.jsonl: is no test; --data belongs to one of librispeech-test-clean"),
        ((test, "--prompt", "x"), "--prompt belongs to a named test"),
        (("meld", "--data", tmp_path), "holds no test_sent_emo.csv or test/test_sent_emo.csv; give --data the folder"),
        (("meld", "--data", tmp_path / "none"), "none: is no folder; give --data the folder of MELD"),
        ((test, "--judge", "http://x/v1"), "--judge is for airbench-chat alone"),
        ((test, "--out", "a", "--answers", "b"), "--out keeps the answers, in a/answers.jsonl; leave out --answers"),
        ((test, "--judge-model", "x"), "--judge-model and --judge-prompt need --judge"),
        ((test, "--model", model, "--out", folder), "which is no evaluation's; name a new folder"),
        ((test, "--model", model, "--out", tmp_path / "file" / "x"), "Not a directory"),
    ):
        status, _, err = soundwave("evaluate", *words)
        assert status == 1 and fault in err.splitlines()[-1], (words, err)
    with open_results(out[1], {"batch_size": 1}):
        pass
    status, _, err = soundwave("evaluate", test, "--model", model, *out)
    assert status == 1 and "out: holds another evaluation: " in err
