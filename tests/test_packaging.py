"""The wheel, the sdist, the editable install, and the folder `kernels/`, which must never be found as a top level."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from soundwave import __version__

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


def source_modules(checkout: Path) -> set[str]:
    """Names the wheel must hold: all modules below soundwave/ and, as soundwave/kernels/, below kernels/."""
    soundwave = {path.relative_to(checkout).as_posix() for path in (checkout / "soundwave").rglob("*.py")}
    kernels = {f"soundwave/{path.relative_to(checkout).as_posix()}" for path in (checkout / "kernels").rglob("*.py")}
    return soundwave | kernels


class Built(NamedTuple):
    checkout: Path  # the copy that was built
    wheel: Path  # built from the checkout
    sdist: Path
    wheel_of_sdist: Path  # built from the unpacked sdist


class Installed(NamedTuple):
    python: Path
    site_packages: Path

    def script(self, *arguments, cwd="/") -> str:
        """Standard output of the console script `soundwave`."""
        return run(self.python.with_name("soundwave"), *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Wheel and sdist of a copy of the checkout, where no earlier build/ can add to them."""
    copy = tmp_path_factory.mktemp("checkout") / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    both, direct = copy.with_name("both"), copy.with_name("direct")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", both, copy, cwd=copy.parent)
    run(*build, "--wheel", "--outdir", direct, copy, cwd=copy.parent)
    (wheel,), (sdist,), (wheel_of_sdist,) = direct.glob("*.whl"), both.glob("*.tar.gz"), both.glob("*.whl")
    return Built(copy, wheel, sdist, wheel_of_sdist)


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return built.wheel


@pytest.fixture(scope="module")
def sdist(built) -> set[str]:
    """The files of the sdist, relative to its one folder."""
    with tarfile.open(built.sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    """A new environment with the wheel alone, which finds the requirements in this one's folders.

    Python reads no `.pth` file of a folder that a `.pth` file names: the editable soundwave stays out, and the wheel's
    files come before whatever else those folders hold. They are named after pip has run, which would find the
    distributions in them.
    """
    root = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=root)
    (site_packages,) = root.glob("lib/python*/site-packages")
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "requirements.pth").write_text("\n".join(here))
    return Installed(python, site_packages)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


# ---------------------------------------------------------------- the wheel


def test_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"soundwave", f"soundwave_fused-{__version__}.dist-info"}


def test_wheel_holds_every_module_of_the_checkout(built):
    modules = {name for name in zipfile.ZipFile(built.wheel).namelist() if name.endswith(".py")}
    assert modules == source_modules(built.checkout)
    assert "soundwave/kernels/__init__.py" in modules


def test_wheel_holds_the_parts_of_the_report(wheel):
    found = (ROOT / "soundwave" / "report").glob("*.*")
    parts = {f"soundwave/report/{path.name}" for path in found if path.suffix != ".py"}
    assert parts and parts <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_tells_type_checkers_to_read_it(wheel):
    assert "soundwave/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert "Typing :: Typed" in metadata(wheel).get_all("Classifier")


def test_wheel_names_its_licence_and_its_console_script(wheel):
    archive = zipfile.ZipFile(wheel)
    files = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert "License: Apache-2.0" in files["METADATA"] or "License-Expression: Apache-2.0" in files["METADATA"]
    assert "soundwave = soundwave.cli:main" in files["entry_points.txt"]
    assert "licenses/LICENSE" in files


def test_wheel_describes_itself_with_the_readme(built):
    found = metadata(built.wheel)
    assert (found["Name"], found["Version"]) == ("soundwave-fused", __version__)
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload(decode=True).decode().strip() == (built.checkout / "README.md").read_text("utf-8").strip()
    pythons = {line for line in found.get_all("Classifier") if re.search(r":: 3\.\d+$", line)}
    assert pythons == {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)}


def test_changelog_begins_with_the_version():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert [version for version in versions if version != "Unreleased"][0] == __version__


# ---------------------------------------------------------------- the sdist


def test_the_wheel_of_the_sdist_has_the_same_files(built):
    direct, of_sdist = zipfile.ZipFile(built.wheel), zipfile.ZipFile(built.wheel_of_sdist)
    assert {name: direct.read(name) for name in direct.namelist()} == {
        name: of_sdist.read(name) for name in of_sdist.namelist()
    }


def test_sdist_holds_the_checkout(built, sdist):
    folders = ("soundwave", "kernels", "tests", "bench", "configs", "docs", "examples")
    files = {path for folder in folders for path in (built.checkout / folder).rglob("*") if path.is_file()}
    top = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
    assert {path.relative_to(built.checkout).as_posix() for path in files} | top <= sdist
    assert [name for name in sdist if "__pycache__" in name] == []


def test_sdist_holds_what_the_readme_links_to(built, sdist):
    readme = (built.checkout / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|srcset|href)=\"([^\"\s]+)", readme)
    relative = {(one or other).partition("#")[0].rstrip("/") for one, other in links if "://" not in one + other}
    assert relative - {""} and relative - {""} <= sdist


# ---------------------------------------------------------------- installed in a new environment


def test_installed_wheel_is_used_from_outside_the_checkout(installed, tmp_path):
    code = "import soundwave, soundwave.kernels; print(soundwave.__file__); print(soundwave.kernels.__file__)"
    found = run(installed.python, "-c", code, cwd=tmp_path).split()
    assert found == [
        str(installed.site_packages / "soundwave/__init__.py"),
        str(installed.site_packages / "soundwave/kernels/__init__.py"),
    ]


def test_installed_wheel_loads_no_file_of_the_checkout(installed):
    code = """
import sys, torch, soundwave
loss = soundwave.fused.CTCLoss()(torch.zeros(3, 1, 2).log_softmax(-1), torch.tensor([[1]]), [3], [1])
print(loss.item())
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "soundwave"), sep="\\n")
"""
    loss, *files = run(installed.python, "-c", code, cwd="/").splitlines()
    assert float(loss) > 0
    assert "soundwave/kernels/ctc.py" in {Path(file).relative_to(installed.site_packages).as_posix() for file in files}


def test_installed_command_prints_its_version(installed):
    assert installed.script("--version") == f"soundwave {__version__}\n"


def test_installed_doctor_runs_from_the_root_folder(installed):
    told = installed.script("doctor")
    assert "soundwave-fused" in told and "implementation" in told
    assert "missing" not in told and "make" not in told


@pytest.mark.parametrize("where", ["installed", "checkout"])
def test_doctor_says_how_to_install_what_is_missing(where, installed):
    """Without `site` Python finds no package but what PYTHONPATH names: torch and all others are missing."""
    code = "import json, soundwave.doctor; print(json.dumps(soundwave.doctor.findings()))"
    place = {"installed": installed.site_packages, "checkout": ROOT}[where]
    rows = json.loads(run(installed.python, "-S", "-c", code, cwd="/", PYTHONPATH=str(place)))
    told = {what: (value, why) for what, value, why in rows}
    command = {"installed": "pip install soundwave-fused", "checkout": "make -B setup"}[where]
    assert told["torch"] == ("missing", f"needed; run {command}")
    value, why = told["flash-attn"]
    assert (value, why) == ("not installed", "optional: pip install --no-build-isolation 'soundwave-fused[flash]'")


# ---------------------------------------------------------------- the checkout


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
