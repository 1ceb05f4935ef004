"""The wheel, the editable install, and the folder `kernels/`, which must never be found as a top level."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("soundwave")
# What a person has in the environment may hide a broken installation.
CLEAN_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command, cwd, **environment) -> str:
    """Standard output of `command`; a failure shows both streams."""
    command = [str(part) for part in command]
    result = subprocess.run(command, cwd=cwd, env={**CLEAN_ENVIRONMENT, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def kernels_folders() -> list[str]:
    """Where a top-level `import kernels` would look in this process; empty where there is no such package."""
    spec = find_spec("kernels")
    return [] if spec is None else [str(Path(place).resolve()) for place in spec.submodule_search_locations]


def source_modules() -> set[str]:
    """Names the wheel must hold: all modules below soundwave/ and, as soundwave/kernels/, below kernels/."""
    soundwave = {path.relative_to(ROOT).as_posix() for path in (ROOT / "soundwave").rglob("*.py")}
    kernels = {f"soundwave/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    return soundwave | kernels


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout, where no earlier build/ can add to it."""
    copy = tmp_path_factory.mktemp("checkout") / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    out = copy.with_name("wheels")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        copy,
        cwd=out.parent,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder into which the wheel alone is installed."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"soundwave", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_wheel_holds_every_module_of_the_checkout(wheel):
    modules = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert modules == source_modules()
    assert "soundwave/kernels/__init__.py" in modules


def test_wheel_holds_the_parts_of_the_report(wheel):
    found = (ROOT / "soundwave" / "report").glob("*.*")
    parts = {f"soundwave/report/{path.name}" for path in found if path.suffix != ".py"}
    assert parts and parts <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_names_its_licence_and_its_console_script(wheel):
    archive = zipfile.ZipFile(wheel)
    files = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert "License: Apache-2.0" in files["METADATA"] or "License-Expression: Apache-2.0" in files["METADATA"]
    assert "soundwave = soundwave.cli:main" in files["entry_points.txt"]
    assert "licenses/LICENSE" in files


def test_installed_wheel_is_used_from_outside_the_checkout(installed, tmp_path):
    code = "import soundwave, soundwave.kernels; print(soundwave.__file__); print(soundwave.kernels.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert found == [
        str(installed / "soundwave/__init__.py"),
        str(installed / "soundwave/kernels/__init__.py"),
    ]


def test_editable_install_finds_kernels_from_anywhere(tmp_path):
    code = "import soundwave.kernels; print(soundwave.kernels.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == str(ROOT / "kernels/__init__.py")


def test_kernels_is_not_the_checkouts_under_pytest():
    assert str(ROOT / "kernels") not in kernels_folders()


def test_kernels_is_not_the_checkouts_under_python_m_pytest():
    name = f"{__file__}::test_kernels_is_not_the_checkouts_under_pytest"
    assert "1 passed" in run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name, cwd=ROOT)


def test_kernels_is_not_the_checkouts_under_the_console_script(tmp_path):
    probe = """
import atexit, importlib.util, json, sys
def report():
    spec = importlib.util.find_spec("kernels")
    folders = [] if spec is None else list(spec.submodule_search_locations)
    print(json.dumps({"script": sys.argv[0], "kernels": folders}))
atexit.register(report)
"""
    (tmp_path / "sitecustomize.py").write_text(probe)
    seen = json.loads(run(SCRIPT, "--help", cwd=ROOT, PYTHONPATH=str(tmp_path)).splitlines()[-1])
    assert seen["script"] == str(SCRIPT)
    assert str(ROOT / "kernels") not in seen["kernels"]


def test_llama_imports_under_pytest():
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.__module__ == "transformers.models.llama.modeling_llama"


def test_llama_imports_in_a_script_started_in_the_checkout(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import transformers\nfrom transformers import LlamaForCausalLM\nimport soundwave.kernels\n")
    run(sys.executable, script, cwd=ROOT)
