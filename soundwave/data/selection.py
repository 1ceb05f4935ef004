"""Choose the samples of the manifests that a stage trains on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from soundwave.data.audio import LONGEST_SAMPLES, LONGEST_SECONDS, SAMPLING_RATE, AudioError
from soundwave.data.collate import LeftOut, ctc_text_of, with_duration
from soundwave.data.manifest import Sample, read_manifest


class SampleError(ValueError):
    """With `strict`, a sample that cannot be trained on. One line: sample, file, what is wrong, how to mend it."""


class Selection(NamedTuple):
    """The samples to train on.

    Attributes:
        samples: with durations, in the order of the manifests.
        read: number of samples that the manifests hold.
        unfit: number of those that stage I cannot learn from, because they have no recording with a text.
    """

    samples: list[Sample]
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

    Args:
        left_out: each sample that cannot be used is added to this list, with the reason.
        stage: stage 1 takes only recordings with a text, because its loss is CTC.
        allow_outside: audio may lie outside the folder of its manifest.
        strict: raise SampleError for a sample that cannot be used.
        note: as in `read_manifest`.

    Raises:
        ManifestError: a manifest cannot be read.
        SampleError: with `strict`, a sample cannot be used.
    """

    def leave_out(sample: str, file: str, reason: str) -> None:
        left_out.append(LeftOut(sample, file, reason))
        if strict:
            raise SampleError(str(left_out[-1]))

    read = [
        sample
        for path in manifests
        for sample in read_manifest(path, allow_outside=allow_outside, leave_out=leave_out, note=note)
    ]
    fitting = [s for s in read if stage > 1 or (s.audio is not None and (ctc_text_of(s) or "").strip())]
    samples = []
    for sample in fitting:
        try:
            samples.append(_checked_duration(sample))
        except AudioError as error:
            leave_out(sample.id, str(sample.audio), error.fault)
    return Selection(samples, len(read), len(read) - len(fitting))


def _checked_duration(sample: Sample) -> Sample:
    sample = with_duration(sample)
    if sample.audio and sample.duration and round(sample.duration * SAMPLING_RATE) > LONGEST_SAMPLES:
        raise AudioError(
            sample.audio,
            f"duration = {sample.duration:g}, but at most {LONGEST_SECONDS:g} s can be trained on; cut it, or "
            "give offset and duration",
        )
    return sample
