"""Named tests over local copies of public corpora: which files, what is asked, what the score is, the paper's figure.

    name                            files in the folder                                       score
    librispeech-test-clean, -other  LibriSpeech's split: 1089/134686/1089-134686.trans.txt    word error rate
    covost2-en-de, covost2-fr-en …  covost_v2.en_de.tsv (or ….test.tsv), and clips/           BLEU
    meld                            test_sent_emo.csv, and dia0_utt0.mp4 (or .wav, .flac)     accuracy, macro F1
    vocalsound                      datafiles/te.json (or meta/te_meta.csv), and audio_16k/   accuracy, macro F1
    airbench-foundation             Foundation_meta.json, and <task>_<dataset>/ (`airbench`)  accuracy
    airbench-chat                   Chat_meta.json, and <task>_<dataset>/ (`airbench`)        a judge's score

Nothing is downloaded. A recording that is missing is named and left out, and every other one is scored.

Figures of the paper (arXiv 2502.12900) are its model's of 9 billion parameters. They were taken from a public list of
results (wizwand.com), not from the paper itself. What is asked of the model is worded here, and the paper's wording is
not known; `prompt` replaces it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from soundwave.data.manifest import Sample
from soundwave.evaluation.airbench import read_chat, read_foundation
from soundwave.evaluation.corpora import read_covost, read_librispeech, read_meld, read_vocalsound

LIBRISPEECH = tuple(f"librispeech-{part}-{kind}" for part in ("test", "dev") for kind in ("clean", "other"))
LeaveOut = Callable[[str, str, str], None]
PAPER = {
    "librispeech-test-clean": ("WER", 2.1),
    "librispeech-test-other": ("WER", 5.0),
    "covost2-en-de": ("BLEU", 30.6),
    "meld": ("accuracy", 63.5),
    "vocalsound": ("accuracy", 90.5),
}
_COVOST = re.compile(r"covost2-([a-z]{2,3}(?:-[A-Z]{2})?)-([a-z]{2,3}(?:-[A-Z]{2})?)")


@dataclass(frozen=True)
class Protocol:
    """A named test.

    Attributes:
        name: as the user writes it.
        read: folder, a prompt or None, and what is called with each missing recording or None -> the samples.
        paper: the score and its figure in per cent (BLEU: 0 to 100) in the paper; None if it is not known here.
    """

    name: str
    read: Callable[[Path, str | None, LeaveOut | None], list[Sample]]
    paper: tuple[str, float] | None


def protocol_named(name: str) -> Protocol | None:
    """The protocol of a name, None if there is none."""
    readers: dict[str, Callable[[Path, str | None, LeaveOut | None], list[Sample]]] = {
        **{name: partial(_librispeech, name.partition("-")[2]) for name in LIBRISPEECH},
        "meld": partial(_table, read_meld),
        "vocalsound": partial(_table, read_vocalsound),
        "airbench-foundation": partial(_table, read_foundation),
        "airbench-chat": partial(_table, read_chat),
    }
    if match := _COVOST.fullmatch(name):
        readers[name] = partial(_covost, match[1], match[2])
    return Protocol(name, readers[name], PAPER.get(name)) if name in readers else None


def _librispeech(split: str, folder: Path, prompt: str | None, leave_out: LeaveOut | None) -> list[Sample]:
    return read_librispeech(folder, split, prompt, leave_out)


def _table(
    read: Callable[[Path, str | None], list[Sample]], folder: Path, prompt: str | None, leave_out: LeaveOut | None
) -> list[Sample]:
    """The samples of a table. One whose recording is missing is among them, and the evaluation leaves it out."""
    return read(folder, prompt)


def _covost(source: str, target: str, folder: Path, prompt: str | None, leave_out: LeaveOut | None) -> list[Sample]:
    return read_covost(folder, source, target, prompt)


def names() -> str:
    """The names of the protocols, for a message."""
    return (
        "librispeech-test-clean, librispeech-test-other, covost2-en-de (any pair of languages), meld, vocalsound, "
        "airbench-foundation, airbench-chat"
    )
