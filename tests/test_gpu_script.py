"""bench/gpu.sh in a rehearsal on the CPU: its parts run one by one, leave files, and do not depend on each other."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.sh"


def gpu(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), "--python", sys.executable, *arguments]
    environment = {"OUT": str(out), "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)


def wheel(folder: Path, name: str, module: str) -> Path:
    """A wheel with one module, `name`.py."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", module)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_part_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    done = gpu(tmp_path, "--rehearse", "train-4")
    assert done.returncode == 64
    assert "unknown part 'train-4'" in done.stderr and "train-3" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_only_the_rehearsal_runs(tmp_path):
    done = gpu(tmp_path, "tests")
    assert done.returncode == 65
    assert "no CUDA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_leaves_its_files_and_the_next_one_runs(tmp_path):
    (tmp_path / "gpu-tests.xml").mkdir()  # pytest cannot write its results there
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "sitecustomize", "import sys; print('a wheel is on the path', file=sys.stderr)\n")
    done = gpu(tmp_path, "--rehearse", "--wheels", str(tmp_path / "wheels"), "tests", "sanitizer")
    assert done.returncode == 1, done.stderr
    records = {part: json.loads((tmp_path / f"gpu-{part}.json").read_text()) for part in ("tests", "sanitizer")}
    assert records["tests"]["exit_status"] != 0 and records["sanitizer"]["exit_status"] == 0
    assert records["sanitizer"].keys() >= {"device", "date", "commit", "versions", "seconds"}
    assert "1 passed" in (tmp_path / "gpu-sanitizer.log").read_text()
    assert "a wheel is on the path" in (tmp_path / "gpu-sanitizer.log").read_text()
    assert 'failures="0"' in (tmp_path / "gpu-sanitizer.xml").read_text()


def test_a_training_part_writes_what_it_measured(tmp_path):
    done = gpu(tmp_path, "--rehearse", "train-3")
    assert done.returncode == 0, done.stdout
    (file,) = tmp_path.glob("train_24gb-3-*.json")
    content = json.loads(file.read_text())
    assert not content["failures"]
    assert [(run["implementation"], run["kept_per_second"]) for run in content["runs"]] == [
        ("fused", 3.0), ("fused", 25.0), ("eager", 3.0), ("eager", 25.0)
    ]  # fmt: skip
    for run in content["runs"]:
        assert run["largest_batch"] == 2 and run["audio_seconds_per_second"] > 0
        assert run["kept_frames"] == 2 * run["kept_per_second"] * run["seconds"]  # the planted path
        assert run["phases"].keys() == {"encoder", "ctc", "language model", "backward", "optimiser"}
        assert run["parts"]["AdamW's states"] == 2 * run["parts"]["trained weights"]
