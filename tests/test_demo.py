"""The demonstration: how long it says it takes, and a run of it that is cut to a few steps on the tiny corpus."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from soundwave.demo import run as demo
from soundwave.hardware import product_seconds
from soundwave.training.callbacks import Interrupted

SHORT = {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0, "dtype": "float32"}
PRODUCT = r"product of 160 x 576 by 576 x 1536 takes \S+ ms on one thread of \d+"
TIME = re.compile(rf"about (\d+) minutes? on this machine, .* {PRODUCT}")


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
    out, said = capsys.readouterr()
    assert (len(TIME.findall(said)), out) == (1, "")
    assert TIME.match(said)  # the first line, before any training
    assert "stage1 has seen all 2 steps already; its model is written again" in said and "stage2/checkpoint-" in said
    assert (tmp_path / "stage1" / "log.jsonl").read_bytes() == trained  # not trained again
    settings = json.loads((tmp_path / "stage2" / "run.json").read_text())["config"]
    assert settings["features"].endswith("frames-tiny") and not (tmp_path / "frames-tiny").exists()
    assert summary["seconds"]["stage1"] == pytest.approx(json.loads(trained.splitlines()[-1])["seconds"], abs=2)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {"report.html", "losses.png", "answers.jsonl", "model"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("*/checkpoint-*"))


# ---------------------------------------------------------------- the time that it takes


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_the_time_grows_with_that_of_the_product(quick):
    reference = demo.QUICK_MINUTES if quick else demo.FULL_MINUTES
    times = [demo.estimate_minutes(factor * demo.REFERENCE_PRODUCT, quick) for factor in (0, 0.5, 1, 1.5, 2.5)]
    assert times[0] == times[1] == times[2] == pytest.approx(reference)  # a faster product alone saves nothing
    steps = [b - a for a, b in zip(times[2:], times[3:], strict=False)]
    assert 2 * steps[0] == pytest.approx(steps[1]) and steps[0] > 0


def test_the_quick_demonstration_takes_the_same_share_of_the_full_one_on_any_machine():
    shares = {round(demo.estimate_minutes(s, True) / demo.estimate_minutes(s, False), 9) for s in (1e-4, 1e-3, 1e-2)}
    assert shares == {round(demo.QUICK_MINUTES / demo.FULL_MINUTES, 9)}


def test_a_machine_without_bfloat16_instructions_is_told_about_twice_the_time():
    # 4.6 ms: 123 GFLOP/s in float32 on two cores; such machines took 2 to 2.7 times as long.
    assert 2 <= demo.estimate_minutes(4.6e-3) / demo.FULL_MINUTES <= 2.7


def test_threads_share_the_work_up_to_four():
    one, two, four, many = (demo.estimate_minutes(1e-3, threads=threads) for threads in (1, 2, 4, 64))
    assert one == 2 * two == 4 * four == 4 * many


@pytest.mark.skipif(torch.cuda.is_available(), reason="the line for a CPU")
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_the_line_tells_this_machine_s_time_and_the_reference_s(quick):
    line = demo.expected_time(quick)
    assert TIME.match(line) and "\n" not in line
    assert line.endswith(f"needs {'3' if quick else '15'} minutes)")


def test_the_product_s_time_is_stable_and_leaves_the_threads_as_they_are():
    threads = torch.get_num_threads()
    times = [product_seconds(torch.float32) for _ in range(4)]
    assert torch.get_num_threads() == threads
    estimates = [demo.estimate_minutes(seconds) for seconds in times]
    assert max(estimates) <= 1.3 * min(estimates)  # beside other programs, too; about 1.1 was measured
