"""Samples to batches: decode the audio, extract features, build prompts and labels."""

from typing import Any

from torch import Tensor

from soundwave.data.audio import load_audio, seconds_of
from soundwave.data.manifest import Sample
from soundwave.processing import SoundwaveProcessor

TRANSCRIBE_PROMPT = "Transcribe the speech."
CHARACTERS_A_TOKEN = 4  # of English text
TOKENS_A_SECOND = 5  # 3 kept frames, and as much work as 2 more tokens in the encoder


class Collator:
    """Turns a list of samples into the keyword arguments of the model's `forward`.

    Args:
        processor: of the model.
        stage: 1 gives features and CTC labels only; 2 adds prompts and answers; 3 leaves the CTC labels out.
    """

    def __init__(self, processor: SoundwaveProcessor, stage: int):
        self.processor, self.stage = processor, stage

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        if self.stage == 1:
            clips = [features(self.processor, sample) for sample in samples]
            labels = self.processor.ctc_labels([ctc_text_of(sample) for sample in samples])
            return self.processor.pad_features(clips) | {"ctc_labels": labels}
        return dict(
            self.processor(
                [prompt_of(sample) for sample in samples],
                [features(self.processor, sample) for sample in samples],
                [answer_of(sample) for sample in samples],
                [ctc_text_of(sample) for sample in samples] if self.stage == 2 else None,
            )
        )


def with_duration(sample: Sample) -> Sample:
    """The sample with the duration that its manifest left out, from the file's header: batches are made by length."""
    if sample.audio is None or sample.duration is not None:
        return sample
    return sample.model_copy(update={"duration": seconds_of(sample.audio) - sample.offset})


def tokens_of(sample: Sample) -> float:
    """About how much work a sample is, in tokens of the language model."""
    characters = len(prompt_of(sample)) + len(answer_of(sample))
    return characters / CHARACTERS_A_TOKEN + TOKENS_A_SECOND * (sample.duration or 0.0 if sample.audio else 0.0)


def features(processor: SoundwaveProcessor, sample: Sample) -> Tensor | None:
    """Log-mel features [n_mels, T_mel] of a sample's audio, None for text only."""
    if sample.audio is None:
        return None
    return processor.features(load_audio(sample.audio, offset=sample.offset, duration=sample.duration))


def ctc_text_of(sample: Sample) -> str | None:
    """What CTC learns to write: `ctc_text`, or else the transcript."""
    return sample.ctc_text if sample.ctc_text is not None else sample.text


def prompt_of(sample: Sample) -> str:
    """What the user says in this sample; a transcription without a prompt gets the usual one."""
    return sample.prompt if sample.prompt is not None else TRANSCRIBE_PROMPT


def answer_of(sample: Sample) -> str:
    """What the model is to say; a transcription's answer is its transcript."""
    answer: Any = sample.answer if sample.answer is not None else sample.text
    if answer is None:
        raise ValueError(f"{sample.id}: the sample has neither answer nor text")
    return answer
