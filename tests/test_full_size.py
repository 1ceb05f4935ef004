"""bench/full_size.py at small widths: the same path as at the paper's size, without its hour."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "full_size.py"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size")
    command = [sys.executable, SCRIPT, "--scale", "tiny", "--work", folder / "work", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("full_size-tiny-*.json")
    return json.loads(file.read_text()), folder / "work"


def test_every_command_ran_and_every_check_holds(rehearsal):
    content, _ = rehearsal
    commands = [one["command"] for part in content["parts"].values() for one in part["runs"]]
    trained = ["soundwave train 1"] * 2 + ["soundwave train 2", "soundwave train 3"]
    assert commands[:4] == trained
    assert [command.split()[1] for command in commands[4:]] == ["transcribe", "ask", "evaluate", "report"]
    checks = [check for part in content["parts"].values() for check in part["checks"]]
    assert len(checks) > 20 and all(check["holds"] for check in checks)


def test_what_was_killed_went_on(rehearsal):
    content, _ = rehearsal
    killed, continued = content["parts"]["stage1"]["runs"]
    assert (killed["status"], continued["status"]) == (-9, 0)


def test_the_backbones_lie_as_on_the_hub(rehearsal):
    _, work = rehearsal
    llama, whisper = work / "Llama-3.1-8B-Instruct", work / "whisper-large-v3"
    places = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in llama.glob("*.safetensors")} == set(places.values())
    assert len(set(places.values())) > 1
    assert json.loads((whisper / "preprocessor_config.json").read_text())["feature_size"] == 128
    files = {path.name for path in llama.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= files


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "stage4"], "--part stage4, but the parts are backbones, stage1"),
        (["--layers", "0"], "--layers 0, but it must be at least 1"),
    ],
    ids=["part", "layers"],
)
def test_what_cannot_be_is_named(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2 and said in capsys.readouterr().err
