"""The demonstration, cut to a few steps on the tiny corpus."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from soundwave.demo import run as demo
from soundwave.training.callbacks import Interrupted

SHORT = {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0, "dtype": "float32"}


def interrupt_when_there(file: Path) -> None:
    def watch() -> None:
        while not file.is_file() or not file.stat().st_size:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def test_an_interrupted_demonstration_goes_on_and_the_next_one_starts_anew(tmp_path, monkeypatch, capsys):
    passes = {"stage1": SHORT | {"steps": 2}, "stage2": SHORT | {"steps": 4}, "stage3": SHORT | {"steps": 1}}
    monkeypatch.setattr(demo, "QUICK", demo.Recipe("tiny", passes))
    interrupt_when_there(tmp_path / "stage2" / "log.jsonl")
    with pytest.raises(Interrupted, match=r"stopped after step [12] of 4, .* the same command goes on from there"):
        demo.run_demo(tmp_path, quick=True)
    trained = (tmp_path / "stage1" / "log.jsonl").read_bytes()
    capsys.readouterr()
    summary = demo.run_demo(tmp_path, quick=True)
    said = capsys.readouterr().err
    assert "stage1/checkpoint-2, step 2 of 2\n" in said and "stage2/checkpoint-" in said
    assert (tmp_path / "stage1" / "log.jsonl").read_bytes() == trained  # not trained again
    assert summary["seconds"]["stage1"] == pytest.approx(json.loads(trained.splitlines()[-1])["seconds"], abs=2)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {"report.html", "losses.png", "answers.jsonl", "model"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("*/checkpoint-*"))
