"""Every code block of the documentation is run, and every link leads somewhere.

Each page is one test. Its blocks run from top to bottom in a folder as a user has it (`home`): recordings, manifests
and trained models. What is done with a block depends on its language (`LANGUAGES`); a command of a shell block must
fit one of `RULES`. A block without a language, with another one, or with an unknown command fails the test.
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import soundfile
import torch
import yaml
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

from soundwave import backbones
from soundwave.curation.espeak import Espeak
from soundwave.curation.recipes import Recipe
from soundwave.data.manifest import read_manifest, write_manifest
from soundwave.inference.answer import load_model
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.serve.app import create_app
from soundwave.serve.batches import Engine
from soundwave.serve.metrics import Metrics
from soundwave.serve.settings import Limits
from soundwave.training.settings import StageConfig, load_config
from tests.released import random_tensors, write_released
from tests.serving import InThread
from tests.short_runs import copy_recordings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BIN = Path(sys.executable).parent
# What is added to a command so that it takes a second: a later word or option replaces an earlier one. `--help` makes
# the command check its options and stop.
APPENDED = {
    "train": "steps=1 batch_size=2 accumulation=1 dtype=float32 lora_rank=4 quantization=none "
    f"audio_tower={backbones.WHISPER} language_model=$SMALL_LLM",
    "train model=Soundwave": "steps=1 batch_size=2 accumulation=1 dtype=float32 lora_rank=4 quantization=none",
    "splice": "--count 2",
    "features": "--dtype float32",
    "curate": "--help",
    "data data/spliced": "--help",
    "data data/speech": "--text data/sentences.txt",
    "demo": "--help",
    "ablate": "--help",
    "serve": "--help",
    "merge runs/mine/vllm": "--help",
}
WORDS = ("zero", "one", "two", "three")
SERVED = "127.0.0.1:8000"  # in the documents


class Block(NamedTuple):
    """A code block: its language ("" without one), its text and the number of the line before the text."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page, fenced or indented."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    found = [token for token in tokens if token.type in ("fence", "code_block")]
    return [Block(page, token.map[0] + 1, token.info.strip(), token.content) for token in found]


class Home:
    """A user's folder, in which the blocks of one page are run; they share a namespace, as cells of a notebook."""

    def __init__(self, language_model: Path):
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.variables = {"SMALL_LLM": str(language_model)}
        self.address = SERVED  # where the model of runs/demo is served

    def run(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {', '.join(LANGUAGES)}"
        block = block._replace(code=block.code.replace(SERVED, self.address))
        try:
            LANGUAGES[block.language](self, block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------- languages


def run_python(home: Home, block: Block) -> None:
    # With the page's own line numbers, so that a traceback shows the line that failed.
    exec(compile("\n" * block.line + block.code, block.page, "exec"), home.namespace)


def parse_stub(_: Home, block: Block) -> None:
    compile(block.code, block.page, "exec", dont_inherit=True)


def parse_json(_: Home, block: Block) -> None:
    json.loads(block.code)


def read_manifest_lines(_: Home, block: Block) -> None:
    """Lines of JSON are a manifest. The recordings that they name are put in their places."""
    for line in block.code.splitlines():
        row = json.loads(line)
        for name in [*row.get("audios", []), *filter(None, [row.get("audio_filepath"), row.get("source")])]:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            if not Path(name).exists():
                shutil.copy("recording.wav", name)
    Path("block.jsonl").write_text(block.code, encoding="utf-8")
    assert read_manifest("block.jsonl")


def load_yaml(_: Home, block: Block) -> None:
    """Settings of a stage are checked as such, and left in the file that the first line names: `# stage1.yaml`.

    So are recipes of data, which have tasks.
    """
    values = yaml.safe_load(block.code)
    if "sources" in values:
        Recipe.model_validate(values)
    elif set(values) & set(StageConfig.model_fields):
        named = re.match(r"# (\w*?(\d?)\.yaml)", block.code)
        name, stage = (named[1], int(named[2] or 1)) if named else ("settings.yaml", 1)
        Path(name).write_text(block.code, encoding="utf-8")
        load_config(stage, Path(name))


def check_text(_: Home, block: Block) -> None:
    """Text is what a program prints or a drawing, and nothing to be run."""
    commands = [line for line in block.code.splitlines() if re.match(r"(\$|soundwave|make|pip|python|pytest) ", line)]
    assert not commands, f"{block}: {commands[0]!r} is a command; call the block sh"


def run_shell(home: Home, block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    for command in commands_of(block.code, home.variables):
        run_command(home, command)


LANGUAGES: dict[str, Callable[[Home, Block], None]] = {
    "python": run_python,
    "pyi": parse_stub,
    "sh": run_shell,
    "json": parse_json,
    "jsonl": read_manifest_lines,
    "yaml": load_yaml,
    "text": check_text,
}


# ---------------------------------------------------------------- commands


def commands_of(code: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The commands of a shell block as words; `NAME=value` on a line of its own goes into `variables`."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word.strip(";&|"):
                command.append(word)
                continue
            assigned = {}
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                name, _, value = command.pop(0).partition("=")
                assigned[name] = value
            if command:
                yield [part for word in command for part in expanded(word, variables)]
            else:
                variables |= assigned
            command = []


def expanded(word: str, variables: dict[str, str]) -> list[str]:
    """A word with `$NAME` replaced; a word that is nothing else becomes the words of its value."""
    if re.fullmatch(r"\$\w+", word):
        return shlex.split(variables[word[1:]])
    return [re.sub(r"\$(\w+)", lambda name: variables[name[1]], word)]


def run_command(home: Home, words: list[str]) -> None:
    line = " ".join(words)
    for pattern, rule in RULES:
        if re.match(rf"(?:\S*/)?(?:{pattern})(?= |$)", line):
            rule(home, words)
            return
    raise AssertionError(f"no rule for the command {line!r}")


def run_soundwave(home: Home, words: list[str]) -> None:
    """What the console script calls, in this process: starting torch takes seconds."""
    (script,) = entry_points(group="console_scripts", name="soundwave")
    command = words[1] if len(words) > 1 else ""
    # A model that is given, as the released checkpoint, decides the backbones.
    added = next((APPENDED[key] for key in (f"{command} {words[-1]}", command) if key in APPENDED), "")
    appended = [part for word in added.split() for part in expanded(word, home.variables)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["soundwave", *words[1:], *appended])
        try:
            script.load()()
        except SystemExit as end:
            assert not end.code, f"{shlex.join(sys.argv)} ended with {end.code}"


def dry_make(_: Home, words: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parse_pip(_: Home, words: list[str]) -> None:
    """pip checks its options; what is to be installed are requirements, ours by its name and its extras."""
    arguments = words[words.index("install") :]
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    takes_value = {"-c", "-r", "-e", "--index-url", "--extra-index-url"}
    for before, word in zip(arguments, arguments[1:], strict=False):
        if before == "-e" or re.match(r"\.(\[|$)", word):
            word = word.replace(".", "soundwave-fused", 1)
        elif word.startswith("-") or before in takes_value:
            continue
        wanted = Requirement(word)
        assert not wanted.name.startswith("soundwave") or wanted.name == "soundwave-fused", word
        if wanted.name == "soundwave-fused":
            unknown = wanted.extras - extras()
            assert not unknown, f"{word}: setup.py has no extra {', '.join(unknown)}"


def extras() -> set[str]:
    """Names of the extras in setup.py."""
    statements = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
    values = [x.value for x in statements if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "EXTRAS"]
    return set(ast.literal_eval(values[0]))


def collect_tests(_: Home, words: list[str]) -> None:
    collect(tuple(words[1:]))


@cache
def collect(arguments: tuple[str, ...]) -> None:
    command = [BIN / "pytest", *arguments, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def check_options(_: Home, words: list[str]) -> None:
    """A script of the checkout that would run for long: it is there, and its help names the options that are used."""
    line = shlex.join(words)
    if words[0].rpartition("/")[2].startswith("python"):
        command = [sys.executable, *(words[1:4] if words[1] == "-m" else words[1:2])]  # of a module also its command
    else:
        command = [BIN / Path(words[0]).name]
    said = help_of(*command)
    assert said.lower().lstrip().startswith("usage") or "Usage:" in said, f"{line}: it has no --help"
    for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert option in said, f"{line}: its help has no {option}"


@cache
def help_of(*command: str | Path) -> str:
    """What a command prints with --help; asked once."""
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_wrapped(home: Home, words: list[str]) -> None:
    """A profiler in front of a command; the profiler itself is not there."""
    starts = [place for place, word in enumerate(words) if word in ("pytest", "soundwave", "python")]
    if starts:
        run_command(home, words[starts[0] :])


def run_launched(home: Home, words: list[str]) -> None:
    """A launcher in front of our command: its help names the options; the command is run by itself."""
    start, launcher = words.index("soundwave"), words[:2] if words[0] == "accelerate" else words[:1]
    said = help_of(BIN / launcher[0], *launcher[1:])
    for option in [word for word in words[:start] if word.startswith("--")]:
        assert option in said, f"{shlex.join(words)}: its help has no {option}"
    run_command(home, words[start:])


def run_curl(_: Home, words: list[str]) -> None:
    """A request to the server. Without curl the command is only parsed."""
    if shutil.which("curl"):
        subprocess.run([*words, "--fail", "--silent", "--show-error"], check=True, timeout=300)


def leave(_: Home, words: list[str]) -> None:
    """Commands that need a network, a program that is no dependency, or that change the shell: only parsed."""


# The first pattern that a command begins with, its program's folder aside, decides.
RULES: list[tuple[str, Callable[[Home, list[str]], None]]] = [
    ("soundwave", run_soundwave),
    ("make", dry_make),
    (r"(python -m )?pip install", parse_pip),
    ("pytest", collect_tests),
    (r"python ([\w/]+\.py|-m tests\.ptx)|ruff|tensorboard", check_options),
    ("nsys profile|ncu", run_wrapped),
    ("torchrun|accelerate launch", run_launched),
    ("curl", run_curl),
    ("evalscope|schemathesis|nsys stats|git clone|cd|source|ffmpeg", leave),
    ("hf auth login|hf download|apt install|python3? -m venv", leave),
]


# ---------------------------------------------------------------- the user's folder


@pytest.fixture(scope="module")
def brief_llm(small_llm, tmp_path_factory) -> Path:
    """The small language model. Its configuration ends each answer after 0.2 s, since untrained it goes on for long."""
    folder = tmp_path_factory.mktemp("backbones") / "brief"
    shutil.copytree(small_llm, folder, copy_function=os.link)
    configuration = folder / "generation_config.json"
    values = json.loads(configuration.read_text())
    configuration.unlink()  # a link to the other model's
    configuration.write_text(json.dumps(values | {"max_time": 0.2}))
    return folder


@pytest.fixture(scope="module")
def furnished(brief_llm, tiny_corpus, tmp_path_factory) -> Path:
    """What the documentation supposes: recordings, manifests, single words, a trained model in `runs/demo`, and a
    checkpoint as the released one in `Soundwave`.
    """
    folder = tmp_path_factory.mktemp("home")
    with Espeak() as espeak:
        soundfile.write(folder / "recording.wav", *espeak.synthesize("turn on the light in the kitchen"))
        for index in (folder / "index.jsonl", folder / "fsdd" / "index.jsonl"):
            rows = []
            for place, word in enumerate(WORDS * 2):
                rows.append({"audio_filepath": f"words/{place}.wav", "text": word, "speaker": "anna"})
                rows[-1]["split"] = "train" if place < len(WORDS) else "test"
                (index.parent / "words").mkdir(parents=True, exist_ok=True)
                soundfile.write(index.parent / f"words/{place}.wav", *espeak.synthesize(word, pitch=40 + place))
            write_manifest(index, rows)
    (folder / "data").mkdir()
    rows = copy_recordings(tiny_corpus, folder / "data", 4)
    intent = {"task": "intent", "prompt": "What is the command about?", "answer": "light"}
    write_manifest(folder / "data" / "train.jsonl", [*rows, rows[0] | intent])
    write_manifest(folder / "data" / "test.jsonl", [rows[1], rows[2] | intent])
    recipes = folder / "configs" / "data"
    recipes.mkdir(parents=True)
    shutil.copy(ROOT / "configs/data/phrasings.yaml", recipes)
    shutil.copy(ROOT / "configs/data/speeds.yaml", recipes)
    (folder / "data" / "sentences.txt").write_text("".join(f"{row['text']}\n" for row in rows))
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(brief_llm), lora_rank=4, stage=3)
    torch.manual_seed(0)
    SoundwaveForConditionalGeneration.from_backbones(config).save_pretrained(folder / "runs" / "demo" / "model")
    write_released(folder / "Soundwave", random_tensors())
    return folder


@pytest.fixture
def home(furnished, brief_llm, tmp_path, monkeypatch) -> Home:
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Home(brief_llm)


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_every_block_runs(page, home):
    with ExitStack() as stack:
        if page.name == "serve.md":
            home.address = stack.enter_context(served("runs/demo/model"))
        for block in blocks_of(page):
            home.run(block)


@contextmanager
def served(folder: str) -> Iterator[str]:
    """Serves a model, called `demo`; gives the address."""
    limits = Limits(max_window_tokens=8)  # untrained, it does not end
    engine = Engine(load_model(folder), limits)
    server = InThread(create_app(engine, Metrics(), name="demo", limits=limits), limits)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.close()


def test_training_on_own_recordings_needs_no_demonstration(home):
    """Commands take the demonstration's model unless they name one, so the README's block must name its own."""
    shutil.rmtree("runs/demo")
    (block,) = [block for block in blocks_of(ROOT / "README.md") if "soundwave train 1" in block.code]
    home.run(block)


BROKEN = {
    "no language": ("```\nls\n```", "'' is none of python"),
    "a language that nobody knows": ("```fortran\nend\n```", "'fortran' is none of python"),
    "indented": ("Text:\n\n    x = 1\n", "'' is none of python"),
    "in a list": ("- Text:\n\n  ```python\n  undefined\n  ```\n", "undefined"),
    "a fault in Python": ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", "x == 2|AssertionError"),
    "no Python": ("```pyi\ndef f(: ...\n```", "invalid syntax"),
    "a command without a rule": ("```sh\nrm -rf /\n```", "no rule for the command 'rm -rf /'"),
    "no shell": ("```sh\nsoundwave 'doctor\n```", "unexpected EOF"),
    "a command that fails": ("```sh\nsoundwave transcribe none.wav\n```", "ended with 1"),
    "an unknown option": ("```sh\nsoundwave demo --fast\n```", "ended with 2"),
    "an unknown setting": ("```sh\nsoundwave train 1 train=data/train.jsonl out=x speed=1\n```", "ended with 1"),
    "an unknown target": ("```sh\nmake coffee\n```", "coffee"),
    "an unknown extra": ('```sh\npip install "soundwave-fused[coffee]"\n```', "no extra coffee"),
    "another's package": ("```sh\npip install soundwave\n```", "soundwave"),
    "an unknown option of pip": ("```sh\npip install --coffee soundwave-fused\n```", "--coffee"),
    "an unknown option of a launcher": ("```sh\ntorchrun --coffee soundwave train 3 --show\n```", "no --coffee"),
    "an unknown option of a script": ("```sh\npython bench/history.py --coffee\n```", "no --coffee"),
    "a test that is not there": ("```sh\npytest tests/test_coffee.py\n```", "test_coffee"),
    "an unknown key": ("```yaml\n# stage1.yaml\nsteps: 5\nspeed: 1\n```", "unknown setting 'speed'"),
    "no manifest": ('```jsonl\n{"task": "qa", "prompt": "Why?"}\n```', "answer"),
    "no JSON": ("```json\n{1}\n```", "Expecting property name"),
    "a command as text": ("```text\nsoundwave doctor\n```", "is a command"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_block_is_found(name, home, tmp_path):
    """Each rule above finds the fault that it is for."""
    text, message = BROKEN[name]
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=rf"page.md:\d+: (?s:.)*({message})"):
        for block in blocks_of(page):
            home.run(block)


# ---------------------------------------------------------------- links


def anchors_of(page: Path) -> set[str]:
    """The targets that GitHub makes of a page's headings."""
    tokens, found = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")), []
    for heading, inline in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return set(found)


def links_of(page: Path) -> Iterator[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    for token in tokens:
        for child in token.children or []:
            link = child.attrs.get("href") or child.attrs.get("src")
            if link and "://" not in str(link):
                yield str(link)
        if token.type in ("html_block", "html_inline"):
            yield from (
                link for link in re.findall(r'(?:href|src|srcset)="([^"]+)"', token.content) if "://" not in link
            )


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_every_link_leads_somewhere(page):
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link} names no file"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: {target.name} has no heading {anchor!r}"


# ---------------------------------------------------------------- api.md


def test_the_api_page_is_current():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert make_api.page() == written, f"docs/api.md is older than the docstrings: run {make_api.COMMAND}"


@pytest.mark.parametrize("module", ["soundwave", "soundwave.fused", "soundwave.eager"])
def test_the_api_page_has_every_public_name(module):
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    members = {name: getattr(importlib.import_module(module), name) for name in dir(importlib.import_module(module))}
    names = [name for name, x in members.items() if inspect.isclass(x) or inspect.isfunction(x)]
    entries = [(f"### `{module}.{name}`", f"- `{name}`: [`soundwave.") for name in names]  # its own, or a link to it
    assert names and not [entry for entry in entries if not any(text in written for text in entry)]
