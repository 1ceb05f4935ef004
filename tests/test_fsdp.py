"""Two processes that share the language model's layers (FSDP2) train as one would; on the CPU, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from soundwave import cli
from soundwave.model.modeling import WEIGHTS_FILE
from soundwave.training import sharding
from soundwave.training.checkpoints import newest_checkpoint
from soundwave.training.distributed import LAUNCHED_BY
from soundwave.training.settings import ConfigError, make_config
from soundwave.training.stages import train_stage
from tests.processes import WITHOUT_COMPILER
from tests.short_runs import SETTINGS, copy_recordings, lines, manifest_of, same_bits, save_still_model, train

HERE = Path(__file__).resolve().parent
SCRIPT, TORCHRUN = (Path(sys.executable).with_name(name) for name in ("soundwave", "torchrun"))
SAME = {"loss", "ctc_loss", "lm_loss", "grad_norm", "blank_share", "batch_samples", "kept_per_label", "compression"}
STILL = {"spec_augment": False, "adapter_dropout": 0.0, "exact": True, "steps": 4}
FSDP2 = {"sharding": "fsdp2", "quantization": "none"}


@pytest.fixture(scope="module")
def still(small_vocabulary, tmp_path_factory) -> Path:
    return save_still_model(small_vocabulary, tmp_path_factory.mktemp("still") / "model")


@pytest.fixture(scope="module")
def pair(tiny_corpus, still, tmp_path_factory) -> SimpleNamespace:
    """What two processes make of a few runs: results by name of the run, for each rank; outputs by rank."""
    folder = tmp_path_factory.mktemp("pair")
    rows = copy_recordings(tiny_corpus, folder, 4)
    written = [{"task": "chat", "prompt": f"Who is {name}?", "answer": f"{name} is nobody."} for name in ("Ann", "Bob")]
    speech = manifest_of(folder, rows, "speech.jsonl")
    mixed = manifest_of(folder, [*rows, *written], "mixed.jsonl")
    base = SETTINGS | STILL | FSDP2 | {"model": still, "batch_size": 1, "accumulation": 2, "train": mixed}
    base["gradient_checkpointing"] = True
    plain, own_answers = {"sharding": "none"}, {"train": speech, "text_only": 0.5, "save_steps": 1}
    runs = {
        "whole": (base, {}),
        "stopped": (base, {"stop": 1}),
        "resumed": (base | plain, {}),
        "plain": (base | plain, {"stop": 0}),
        "sharded": (base, {}),
        "killed": (base | own_answers, {"kill": 1}),
    }
    outs = {name: folder / {"resumed": "stopped", "sharded": "plain"}.get(name, name) for name in runs}
    todo = [{"stage": 2, "settings": one | {"out": outs[name]}} | more for name, (one, more) in runs.items()]
    (folder / "runs.json").write_text(json.dumps(todo, default=str))
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", folder / "logs"]
    done = subprocess.run(
        [*command, HERE / "sharded_processes.py", folder / "runs.json"],
        env=os.environ | WITHOUT_COMPILER, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [path.read_text() for path in sorted((folder / "logs").rglob("stderr.log"))]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(found[0]) == len(found[1]) == len(runs) - 1, done.stderr[-3000:] + "".join(said)[-6000:]
    return SimpleNamespace(
        outs=outs, said=said, base=base, status=done.returncode,
        found=dict(zip(runs, zip(*found, strict=True), strict=False)),
    )  # fmt: skip


def state_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / WEIGHTS_FILE)


def test_two_processes_with_shares_train_as_one_with_the_same_batches(pair, tmp_path):
    assert [found["error"] for found in pair.found["whole"]] == [None, None]
    one = pair.base | {"batch_size": 2, "sharding": "none", "gradient_checkpointing": False, "out": tmp_path}
    train_stage(make_config(2, **one))
    both, first = lines(pair.outs["whole"] / "log"), lines(tmp_path / "log")
    assert len(both) == len(first) == 4
    for entry, wanted in zip(both, first, strict=True):
        assert entry.keys() == wanted.keys() and entry["tasks"] == wanted["tasks"]
        for figure in SAME & entry.keys():
            assert entry[figure] == pytest.approx(wanted[figure], rel=1e-4), (figure, entry["step"])
    states = state_of(pair.outs["whole"]), state_of(tmp_path)
    assert {name: tensor.shape for name, tensor in states[0].items()} == {
        name: tensor.shape for name, tensor in states[1].items()
    }


def test_each_process_keeps_half_of_the_frozen_layers(pair, small_vocabulary):
    layers = AutoModelForCausalLM.from_pretrained(small_vocabulary, dtype="float32").model.layers
    whole = sum(parameter.nbytes for parameter in layers.parameters())
    assert [found["bytes"] for found in pair.found["whole"]] == [[whole // 2, whole]] * 2
    assert [found["bytes"] for found in pair.found["resumed"]] == [[0, 0]] * 2
    line = f"2 processes share the language model's frozen layers: {whole / 2**31:.2f} GiB of {whole / 2**30:.2f} GiB"
    assert pair.said[0].count(line) == 4 and line not in pair.said[1]


@pytest.mark.parametrize("first, then", [("stopped", "resumed"), ("plain", "sharded")], ids=["to-whole", "to-shares"])
def test_a_run_goes_on_with_and_without_shares_to_the_same_bits(pair, first, then):
    for found in pair.found[first]:
        assert found["error"].startswith("Interrupted: stopped after step 2 of 4, which is saved")
    assert [found["error"] for found in pair.found[then]] == [None, None]
    assert same_bits(state_of(pair.outs["whole"]), state_of(pair.outs[then]))


def test_a_killed_process_ends_the_run_and_one_process_goes_on_without_shares(pair, capsys):
    out = pair.outs["killed"]
    last = newest_checkpoint(out)
    assert pair.status != 0 and last.name == "checkpoint-2" and not (out / "model").exists()
    assert "mixing in 2 text-only answers of the language model itself" in pair.said[0]
    settings = pair.base | {"sharding": "none", "text_only": 0.5, "resume": True}
    train(2, out, out.parent / "speech.jsonl", **{k: v for k, v in settings.items() if k not in ("train", "out")})
    assert f"going on from {last}, step 2 of 4\n" in capsys.readouterr().err
    assert state_of(out).keys() == state_of(pair.outs["whole"]).keys()


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def launched(monkeypatch):
    """As in the first of two processes that a launcher has started."""
    for name in LAUNCHED_BY:
        monkeypatch.setenv(name, {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.get(name, "0"))


@pytest.mark.parametrize(
    "stage, device, settings, text",
    [
        (1, "cpu", {}, "sharding = 'fsdp2', but stage 1 loads no layers of the language model: leave it out"),
        (2, "cpu", {"quantization": "nf4"}, r"weights in 4 bits \(quantization = 'nf4'\) cannot be shared out; give"),
        (2, "cuda", {"quantization": "auto"}, r"weights in 4 bits \(the default on a GPU\) cannot be shared out; give"),
    ],
    ids=["stage-1", "nf4", "nf4-on-cuda"],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_read(launched, stage, device, settings, text):
    config = make_config(stage, train="nowhere.jsonl", out="nowhere", **FSDP2 | settings)
    with pytest.raises(ConfigError, match=text):
        sharding.check_sharding(config, device)


def test_a_run_of_one_process_has_nothing_to_share():
    with pytest.raises(ConfigError, match="but this run has one: start it with `torchrun --nproc-per-node N"):
        train_stage(make_config(2, train="nowhere.jsonl", out="nowhere", **FSDP2))


def test_accelerates_own_fsdp_is_refused_with_the_setting_that_takes_its_place(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="which is a setting here: .* give sharding=fsdp2 quantization=none"):
        train_stage(make_config(2, train="nowhere.jsonl", out="nowhere"))


def test_a_language_model_without_layers_is_refused():
    model = SimpleNamespace(base_model=torch.nn.Linear(1, 1), config=SimpleNamespace(model_type="mystery"))
    with pytest.raises(ValueError, match="of the kind 'mystery' has no `layers`"):
        sharding.shard_layers(model, "cpu")


# ---------------------------------------------------------------- commands that one process does

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
COMMANDS += [group.name for group in cli.app.registered_groups]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_a_command_of_one_process_is_refused_to_several(launched, command):
    found = CliRunner().invoke(cli.app, [command])
    assert isinstance(found.exception, ValueError)
    assert str(found.exception).startswith(f"a launcher has started 2 processes of `soundwave {command}`, which runs")


def test_training_and_a_launcher_with_one_process_are_let_through(launched, monkeypatch):
    assert "setting 'train' is missing" in str(CliRunner().invoke(cli.app, ["train", "1"]).exception)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert CliRunner().invoke(cli.app, ["doctor", "--help"]).exit_code == 0


def test_the_refusal_is_one_line_and_nothing_is_begun(launched, tmp_path):
    done = subprocess.run([SCRIPT, "demo"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr == (
        "error: a launcher has started 2 processes of `soundwave demo`, which runs in one: leave the launcher out. "
        "Several train a stage together: torchrun --nproc-per-node 2 --no-python soundwave train 1 …\n"
    )
