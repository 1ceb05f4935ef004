"""Choose the samples of the manifests that a stage trains on."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from soundwave.data.audio import shown
from soundwave.data.collate import LeftOut
from soundwave.data.index import Index, Refusal, open_index
from soundwave.data.samples import Samples
from soundwave.data.scan import FIT


class SampleError(ValueError):
    """With `strict`, a sample that cannot be trained on. One line: sample, file, what is wrong, how to mend it."""


class Selection(NamedTuple):
    """The samples to train on.

    Attributes:
        samples: with durations, in the order of the manifests.
        read: number of samples that the manifests hold.
        unfit: number of those that stage I cannot learn from, because they have no recording with a text.
    """

    samples: Samples
    read: int
    unfit: int


def select_samples(
    manifests: Sequence[Path],
    left_out: list[LeftOut],
    *,
    stage: int,
    allow_outside: bool = False,
    strict: bool = False,
    note: Callable[[str], None] | None = None,
) -> Selection:
    """Read manifests and choose the samples that a stage can train on.

    A large manifest is read once; its index (`soundwave.data.index`) tells the same at each further start.

    Args:
        left_out: each sample that cannot be used is added to this list, with the reason.
        stage: stage 1 takes only recordings with a text, because its loss is CTC.
        allow_outside: audio may lie outside the folder of its manifest.
        strict: raise SampleError for a sample that cannot be used.
        note: as in `read_manifest`; it is also told what takes long.

    Raises:
        ManifestError: a manifest cannot be read.
        SampleError: with `strict`, a sample cannot be used.
    """

    def leave_out(sample: str, file: str, reason: str) -> None:
        left_out.append(LeftOut(sample, file, reason))
        if strict:
            raise SampleError(str(left_out[-1]))

    def tell(index: Index) -> None:
        for place, _, sentence in index.notes:
            line = f"{shown(index.path)}:{place}: {sentence}"
            note(line) if note is not None else warnings.warn(line, stacklevel=3)
        alone = sum(path.name == index.path.name for path in manifests) <= 1
        for place, file, fault, _ in index.missing:  # of two train.jsonl the path tells which one is meant
            leave_out(f"{shown(index.path.name)}:{place}", file if alone else str(index.root / file), fault)

    indexes = []
    for path in manifests:
        try:
            indexes.append(open_index(path, allow_outside=allow_outside, say=note))
        except Refusal as error:
            tell(error.before)
            raise
        tell(indexes[-1])
    chosen = []
    for index in indexes:
        takes = index.columns["flags"] & FIT > 0 if stage == 1 else np.ones(len(index.columns["flags"]), bool)
        unfit = ~takes
        for row, place, file, fault, _ in index.faults:
            if takes[row]:
                leave_out(f"{shown(index.path.name)}:{place}", file, fault)
                takes[row] = False
        chosen.append((np.flatnonzero(takes), int(unfit.sum())))
    return Selection(
        Samples(indexes, [rows for rows, _ in chosen]),
        sum(len(index.columns["line"]) for index in indexes),
        sum(unfit for _, unfit in chosen),
    )
