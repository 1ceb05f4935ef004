"""Hugging Face's Hub: a model by its id, its card, and the way up.

    local_folder("anna/soundwave-kitchen")     the folder of a model on the Hub, which is downloaded
    write_model_card("runs/mine/3/model")      README.md: data, stages, scores, backbones, licences, how to use it
    push("runs/mine/3/model", "anna/…")        create the repository and upload the folder, with its card

A card says what is recorded and nothing else. `training.json` in the model's folder, which training writes, tells of
data and stages; `scores.json`, which `soundwave card --answers` writes, of scores.
"""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soundwave.hardware import pick_device, pick_dtype
from soundwave.model.configuration import BACKBONES, SoundwaveConfig
from soundwave.provenance import versions

TRAINING_FILE, SCORES_FILE, CARD_FILE = "training.json", "scores.json", "README.md"
WEIGHTS_FILE = "model.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
# What transformers' auto classes add to the arguments of `from_pretrained`, beside those that the Hub takes.
ADDED = ("trust_remote_code", "code_revision", "adapter_kwargs", "name_or_path", "use_safetensors", "low_cpu_mem_usage")
TAKEN_BY_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
EMBEDDED = {  # name -> what it is, its licence
    "embedded:whisper-tiny.en": ("openai/whisper-tiny.en", "MIT"),
    "embedded:smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"),
}
LICENCE = re.compile(r"^licen[sc]e:\s*(\S+)\s*$", re.MULTILINE)


def local_folder(name: str | Path, **settings: Any) -> Path:
    """The folder of a model: `name` itself, or the folder that a model of the Hub, "owner/name", is downloaded to.

    Args:
        settings: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of `snapshot_download`.

    Raises:
        ValueError: there is no such folder and no such model on the Hub, or no way to it.
    """
    # A Path is meant as a folder; of a text, only what has the form of an id is asked for.
    if not isinstance(name, str) or Path(name).exists() or not HUB_ID.fullmatch(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED), **settings))
    except Exception as error:  # those of its HTTP client differ between versions and have no base in common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name!r}: there is no such folder here, and Hugging Face's Hub gives no such model ({reason}); correct "
            "the path or the id, or log in with `hf auth login`"
        ) from None


def arguments_of_auto(name: str | Path, dtype: Any, given: Mapping[str, Any]) -> tuple[Path, torch.dtype, dict]:
    """What `AutoModel` passes to `from_pretrained`, as the folder, the dtype and the changes of our own one.

    Args:
        dtype: a dtype or its name; "auto" is the one that is fastest on this machine.
        given: changes to the saved configuration, and whatever transformers adds.
    """
    changes = {key: value for key, value in given.items() if key not in ADDED and not key.startswith("_from_")}
    changes.pop("_commit_hash", None)
    folder = local_folder(name, **{key: changes.pop(key) for key in TAKEN_BY_HUB if key in changes})
    named = changes.pop("torch_dtype", None)
    dtype = dtype if named is None else named
    if dtype == "auto":
        dtype = pick_dtype(pick_device()[0].type)[0]
    elif isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype = {dtype!r}, but it must be a floating-point dtype of torch, or 'auto'")
        dtype = found
    config = changes.pop("config", None)
    if config is not None:
        if not isinstance(config, SoundwaveConfig):
            raise ValueError(f"config is a {type(config).__name__}, but it must be a SoundwaveConfig; leave it out")
        known = inspect.signature(SoundwaveConfig.__init__).parameters.keys() - {"self", "kwargs", "config_version"}
        values = {key: getattr(config, key) for key in known}
        # A folder relative to config.json is found from there; the auto class did not know where a Hub's one is.
        changes = {key: value for key, value in values.items() if not _is_relative(value)} | changes
    return folder, dtype, changes


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("./", "../"))


def write_model_card(folder: str | Path, *, licence: str | None = None, replace: bool = False) -> Path:
    """Write the card of a trained model, `README.md` in its folder.

    It tells what is recorded: data with their hours and licences, stages, scores with intervals, backbones and their
    licences, versions, and how the model is used. What is not recorded is said to be so.

    Args:
        licence: the Hub's name of the licence that the model is given, such as "cc-by-4.0".
        replace: write over a card that is there already.

    Returns:
        The card's path.

    Raises:
        FileNotFoundError: the folder holds no Soundwave model. FileExistsError: it has a card already.
        ValueError: its configuration or a record is damaged.
    """
    folder = Path(folder)
    saved, card = saved_config(folder), folder / CARD_FILE
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        raise ValueError(f"licence = {licence!r}, but it must be the Hub's name of one, such as cc-by-4.0")
    if card.exists() and not replace:
        raise FileExistsError(f"{card} is there already; replace it with --force, or edit it by hand")
    config = SoundwaveConfig.from_pretrained(folder)
    stages, scores = _record(folder / TRAINING_FILE), _record(folder / SCORES_FILE)
    names = {setting: saved.get(setting, getattr(config, setting)) for setting in ("audio_tower", "language_model")}
    backbones = {setting: _backbone(name, getattr(config, setting)) for setting, name in names.items()}
    parts = [
        _front_matter([origin for origin, _ in backbones.values()], licence),
        f"# {_title(folder)}\n",
        "A speech model: it writes down what is said"
        + (" and answers questions about a recording" if config.stage != 1 else "")
        + ". It is a language model that hears through the encoder of a Whisper and trained adapters "
        "([Soundwave](https://arxiv.org/abs/2502.12900)), and was trained with soundwave-fused.\n",
        _use(config),
        _backbones_section(backbones, config, folder),
        _data_section(stages),
        _stages_section(stages, config),
        _scores_section(scores),
        _versions_section(stages),
    ]
    card.write_text("\n".join(parts), encoding="utf-8")
    return card


def saved_config(folder: Path, kinds: tuple[str, ...] = (SoundwaveConfig.model_type,)) -> dict[str, Any]:
    """The content of `config.json`, as it stands there.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the file is damaged, or of a model whose type is none of `kinds`.
    """
    if not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f"give {inside}" if (inside / "config.json").is_file() else "give the folder that training printed"
        raise FileNotFoundError(f"{folder} holds no model; {hint}")
    try:
        saved = json.loads((folder / "config.json").read_bytes())
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{folder / 'config.json'} is damaged (not a JSON object); copy it again")
    if saved.get("model_type") not in kinds:
        raise ValueError(f"{folder} holds a model of type {saved.get('model_type')!r}, but not a Soundwave model")
    return saved


def _record(file: Path) -> list[dict[str, Any]]:
    """The entries of a record; none if there is no such file."""
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{file} is damaged (not a JSON array of objects); copy it again, or delete it")
    return found


def _title(folder: Path) -> str:
    """A name for the model: that of its folder, or of the folder above one that is called "model"."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _backbone(name: str, folder: str) -> tuple[str, str | None]:
    """What a backbone is, and its licence where that is known.

    Args:
        name, folder: the name that is saved, and as it is found from here.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    if _is_relative(name) or Path(folder).is_dir():
        readme = Path(folder) / CARD_FILE
        found = LICENCE.search(readme.read_text("utf-8", "replace")) if readme.is_file() else None
        return Path(folder).name, found and found[1]  # its name alone: nobody needs to know where it lies
    return name, None


def _front_matter(backbones: list[str], licence: str | None) -> str:
    lines = ["library_name: soundwave-fused", "pipeline_tag: automatic-speech-recognition"]
    lines += [f"license: {licence}"] if licence else []
    known = [name for name in backbones if HUB_ID.fullmatch(name)]
    lines += ["base_model:", *(f"- {name}" for name in known)] if known else []
    return "\n".join(["---", *lines, "tags:", "- soundwave", "- speech-llm", "---", ""])


def _use(config: SoundwaveConfig) -> str:
    ask = "" if config.stage == 1 else 'print(soundwave.ask("recording.wav", "What is the command about?", model))\n'
    return (
        "## How to use it\n\n```sh\npip install soundwave-fused\n```\n\n```python\nimport soundwave\n\n"
        'model = soundwave.load("FOLDER OR HUB ID OF THIS MODEL")\n'
        f'print(soundwave.transcribe("recording.wav", model))\n{ask}```\n\n'
        "After `import soundwave`, transformers' `AutoModel` and `AutoProcessor` load it, too. It knows the voices, "
        "words and tasks that it was trained on, and may be wrong about others.\n"
    )


def _backbones_section(backbones: Mapping[str, tuple[str, str | None]], config: SoundwaveConfig, folder: Path) -> str:
    rows = []
    for setting, (name, licence) in backbones.items():
        what = {"audio_tower": "audio encoder (frozen)", "language_model": "language model"}[setting]
        inside = _is_relative(saved_config(folder).get(setting))
        rows.append([what, f"`{name}`", licence or "see its own page", "in this folder" if inside else "fetched"])
    merged = config.stage >= 2 and not config.lora_rank
    note = "LoRA is merged into the language model. " if merged else ""
    note += "The licences of the backbones hold for this model, too."
    return f"## Backbones\n\n{_table(['part', 'name', 'licence', 'weights'], rows)}\n{note}\n"


def _data_section(stages: list[dict[str, Any]]) -> str:
    rows: dict[tuple, list[str]] = {}
    for entry in stages:
        for data in entry.get("data", []):
            tasks = ", ".join(f"{task} {count}" for task, count in data["tasks"].items())
            licences = ", ".join(data["licences"]) or "not stated"
            row = [f"`{data['manifest']}`", str(data["samples"]), f"{data['hours']:.2f}", tasks, licences]
            rows.setdefault(tuple(row), []).append(str(entry["stage"]))
    if not rows:
        return "## Data\n\nNot recorded.\n"
    table = [[*row, ", ".join(sorted(set(seen)))] for row, seen in rows.items()]
    return f"## Data\n\n{_table(['manifest', 'samples', 'hours', 'tasks', 'licence', 'stages'], table)}"


def _stages_section(stages: list[dict[str, Any]], config: SoundwaveConfig) -> str:
    if not stages:
        return f"## Training\n\nThe model has seen stage {config.stage}. Nothing else is recorded.\n"
    columns = ["stage", "steps", "samples a step", "learning rate", "loss at the end", "minutes", "device"]
    rows = [
        [
            str(entry["stage"]),
            str(entry["steps"]),
            str(entry["samples_a_step"]),
            f"{entry['learning_rate']:g}",
            ", ".join(f"{name} {value:.3g}" for name, value in entry["losses"].items()) or "–",
            f"{entry['seconds'] / 60:.1f}",
            entry["device"],
        ]
        for entry in stages
    ]
    return f"## Training\n\n{_table(columns, rows)}"


def _score_text(score: str, value: float, low: float, high: float) -> str:
    """BLEU goes to 100, the other scores are shares."""
    one = "{:.1f}" if score == "BLEU" else "{:.1%}"
    return f"{one.format(value)} ({one.format(low)} to {one.format(high)})"


def _scores_section(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return "## Scores\n\nNone are recorded.\n"
    rows = [
        [
            f"`{entry['test']}`",
            entry["task"],
            entry["score"],
            _score_text(entry["score"], entry["value"], *entry["interval"]),
            str(entry["samples"]),
            entry["normaliser"],
        ]
        for entry in scores
    ]
    table = _table(["answers", "task", "score", "value (95 % interval)", "samples", "normaliser"], rows)
    return f"## Scores\n\n{table}\nThe intervals are percentile bootstraps over sentences.\n"


def _versions_section(stages: list[dict[str, Any]]) -> str:
    lines = [f"- this card: soundwave-fused {versions(['soundwave']).get('soundwave', 'unknown')}"]
    for entry in stages:
        packages = ", ".join(f"{name} {version}" for name, version in entry.get("versions", {}).items())
        of = f", commit {entry['commit']}" if entry.get("commit") else ""
        lines.append(f"- stage {entry['stage']}: {packages or 'not recorded'}{of}")
    return "## Versions\n\n" + "\n".join(dict.fromkeys(lines)) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in cells)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a Soundwave model",
    create_pr: bool = False,
    licence: str | None = None,
) -> str:
    """Upload the folder of a trained model to the Hub; a card is written before, if it has none.

    Args:
        repo_id: "owner/name" of the repository, which is made if it does not exist.
        private, token, revision, commit_message, create_pr: as in huggingface_hub's `create_repo`, `upload_folder`.
        licence: as in `write_model_card`.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: `repo_id` is no id, the model needs a folder of this machine, or the Hub refuses or is not reached.
    """
    folder = Path(folder)
    saved = saved_config(folder)
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id = {repo_id!r}, but it must be 'owner/name'")
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; name the folder that training printed")
    for setting in BACKBONES:
        name = saved.get(setting)
        if isinstance(name, str) and not _is_relative(name) and (Path(name).is_absolute() or Path(name).is_dir()):
            raise ValueError(
                f"{setting} = {name!r} is a folder of this machine, which nobody else has; write the Hub id of the "
                f"same model into {folder / 'config.json'}, or merge it: `soundwave merge` puts it there"
            )
    if not (folder / CARD_FILE).exists():
        write_model_card(folder, licence=licence)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=[".*", "*/.*"],
        )
    except Exception as error:  # those of its HTTP client differ between versions and have no base in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"repo_id = {repo_id!r}: {folder} was not uploaded ({reason}); log in with `hf auth login`, and look at "
            "the id and the network"
        ) from None
    return str(done.commit_url)


def copy_records(source: str | Path, target: str | Path) -> None:
    """Copy what a model's folder records, and its card, to another folder of the same model."""
    for name in (TRAINING_FILE, SCORES_FILE, CARD_FILE):
        if (Path(source) / name).is_file():
            (Path(target) / name).write_bytes((Path(source) / name).read_bytes())
