"""Make batches of samples: decode the audio, extract features, build prompts and labels."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from soundwave.data.audio import SAMPLING_RATE, AudioError, load_audio, seconds_of, shown
from soundwave.data.features import FEW_FRAMES, Features, Frames
from soundwave.data.forms import TRANSCRIBE_PROMPT
from soundwave.data.manifest import Sample
from soundwave.model.chat import ChatError, Prompt, text_of
from soundwave.model.processing import SoundwaveProcessor

CHARACTERS_A_TOKEN = 4  # in English text
TOKENS_A_SECOND = 5  # 3 kept frames, and the encoder's work counts as 2 more tokens
SILENCE = 2**-15  # peak of a silent recording, full scale 1: dithering may leave one step of 16 bits


class LeftOut(NamedTuple):
    """A sample that is not trained on: its id, its audio file, and the reason (the fault and how to mend it)."""

    sample: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.sample}: {shown(self.file)}: {self.reason}"


class Collator:
    """Turns a list of samples into the keyword arguments of the model's `forward`.

    Args:
        processor: the model's.
        stage: 1 gives features and CTC labels only; 2 adds prompts and answers; 3 leaves the CTC labels out.
    """

    def __init__(self, processor: SoundwaveProcessor, stage: int):
        self.processor, self.stage = processor, stage

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        return self.collate(samples, [features(self.processor, sample) for sample in samples])

    def stand_in(self) -> dict[str, Tensor]:
        """A small batch of nothing worth learning: a second of silence without a text, or a prompt with an answer.

        It stands in where a process has no sample to train on, while others have: all must do the same work, or they
        wait for each other.
        """
        if self.stage == 1:
            silence = self.processor.features(np.zeros(SAMPLING_RATE, dtype=np.float32))
            return self.processor.pad_features([silence]) | {"ctc_labels": self.processor.ctc_labels([None])}
        return dict(self.processor([TRANSCRIBE_PROMPT], [None], ["."], [None] if self.stage == 2 else None))

    def collate(self, samples: list[Sample], clips: Sequence[Tensor | Frames | None]) -> dict[str, Tensor]:
        """The batch of `samples`; `clips` are their features [n_mels, T_mel], or frames, None for text only."""
        if any(isinstance(clip, Frames) for clip in clips):
            return self._collate_frames(samples, cast("Sequence[Frames | None]", clips))
        if self.stage == 1:
            labels = self.processor.ctc_labels([ctc_text_of(sample) for sample in samples])
            recordings = cast("list[Tensor]", clips)  # stage I has no sample without audio
            return self.processor.pad_features(recordings) | {"ctc_labels": labels}
        return dict(
            self.processor(
                [prompt_of(sample) for sample in samples],
                clips,
                [answer_of(sample) for sample in samples],
                [ctc_text_of(sample) for sample in samples] if self.stage == 2 else None,
            )
        )

    def _collate_frames(self, samples: list[Sample], clips: Sequence[Frames | None]) -> dict[str, Tensor]:
        """The same batch with `encoder_frames` [N, E], those of each clip after the clip before, for input_features."""
        heard = [clip is not None for clip in clips]
        batch: dict[str, Tensor] = {}
        if self.stage > 1:
            answers = [answer_of(sample) for sample in samples]
            batch = self.processor.text_inputs([prompt_of(sample) for sample in samples], heard, answers)
        found = [clip for clip in clips if clip is not None]
        batch["encoder_frames"] = torch.cat([clip.rows for clip in found])
        batch["feature_lengths"] = torch.tensor([clip.mel_frames for clip in found])
        if self.stage < 3:
            texts = [ctc_text_of(sample) for sample, is_heard in zip(samples, heard, strict=True) if is_heard]
            batch["ctc_labels"] = self.processor.ctc_labels(texts)
        return batch


class CheckedCollator(Collator):
    """A Collator that leaves out samples that cannot be trained on, and adds the names of the others to the batch.

    A sample is left out if its audio cannot be decoded, is silent although it has a transcript, or is so loud that its
    features are not finite, or if the chat template cannot write its chat. Stages 1 and 2 also leave out a transcript
    that needs more frames than its audio has.

    Args:
        processor, stage: as in Collator.
        frame_stack: encoder frames (50 Hz) per CTC frame, as in SoundwaveConfig.
        features: where the encoder's frames are read in place of the recordings, but for batches of few frames.
    """

    def __init__(
        self, processor: SoundwaveProcessor, stage: int, *, frame_stack: int = 2, features: Features | None = None
    ):
        super().__init__(processor, stage)
        self.frame_stack, self.features = frame_stack, features

    def __call__(self, samples: Sequence[Sample | LeftOut]) -> dict[str, Any]:
        """Make a batch; what stands for a sample that cannot be read is among those left out.

        Returns:
            The tensors of Collator, none if every sample was left out; `samples` and `tasks`, list[str], the ids and
            tasks in the batch; `recordings`, list[str], the ids of the samples with a recording; `left_out`,
            list[LeftOut]; and `seconds`, the length of the recordings together.
        """
        kept, clips, left_out = [], [], []
        for sample in samples:
            if isinstance(sample, LeftOut):
                left_out.append(sample)
                continue
            try:
                clip = self.clip(sample)
            except AudioError as error:
                left_out.append(LeftOut(sample.id, str(error.path), error.fault))
            else:
                kept.append(sample)
                clips.append(clip)
        if 0 < sum(len(clip.rows) for clip in clips if isinstance(clip, Frames)) < FEW_FRAMES:
            return CheckedCollator(self.processor, self.stage, frame_stack=self.frame_stack)([*left_out, *kept])
        batch: dict[str, Any] = self.collate(kept, clips) if kept else {}
        names = {"samples": [sample.id for sample in kept], "tasks": [sample.task for sample in kept]}
        names["recordings"] = [sample.id for sample, clip in zip(kept, clips, strict=True) if clip is not None]
        seconds = sum(sample.duration or 0.0 for sample in kept if sample.audio is not None)
        return batch | names | {"left_out": left_out, "seconds": seconds}

    def clip(self, sample: Sample) -> Tensor | Frames | None:
        """Log-mel features [n_mels, T_mel] of a sample, or the encoder's frames of it; None for text only.

        Raises:
            AudioError: the sample must be left out.
        """
        if self.stage > 1:
            _check_chat(self.processor, sample)
        if sample.audio is None:
            return None
        frames = None if self.features is None else self.features.of(sample)
        if frames is None:
            audio = load_audio(sample.audio, offset=sample.offset, duration=sample.duration)
        silent = is_silent(audio) if frames is None else frames.silent
        if silent and (sample.text or "").strip():
            raise AudioError(sample.audio, f"is silent, but its text is {_short(sample.text or '')}; record it again")
        clip: Tensor | Frames
        if frames is None:
            clip = self.processor.features(audio)
            if not clip.isfinite().all():
                raise AudioError(sample.audio, too_loud(audio))
            mel_frames = clip.shape[1]
        else:
            clip, mel_frames = frames, frames.mel_frames
        text = ctc_text_of(sample)
        if self.stage < 3 and text and text.strip():
            ids = self.processor.ctc_ids(text)
            needed = len(ids) + sum(a == b for a, b in pairwise(ids))
            there = -(-mel_frames // (2 * self.frame_stack))
            if needed > there:
                raise AudioError(
                    sample.audio,
                    f"has {there} frames, but its text {_short(text)} needs {needed}; correct the text, or the offset "
                    "and duration",
                )
        return clip


def is_silent(audio: np.ndarray) -> bool:
    """Whether nothing is heard in a recording."""
    return bool(np.abs(audio).max() <= SILENCE)


def too_loud(audio: np.ndarray) -> str:
    """What is wrong with a recording whose log-mel is not finite."""
    return f"has samples up to {np.abs(audio).max():.3g}; export it again with a full scale of 1"


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else repr(text[:40]) + "…"


def with_duration(sample: Sample) -> Sample:
    """The sample with its duration, which comes from the file's header if the manifest has none.

    Every sample needs one, because batches are made by length.

    Raises:
        AudioError: the file cannot be used, or ends before the sample's offset.
    """
    if sample.audio is None or sample.duration is not None:
        return sample
    try:
        length = seconds_of(sample.audio)
        if length == 0:
            raise AudioError(sample.audio, "holds no samples; record it again")
        if sample.offset >= length:
            raise AudioError(
                sample.audio,
                f"offset = {sample.offset:g} s, but the file lasts {length:g} s; give an offset inside it",
            )
        return sample.model_copy(update={"duration": length - sample.offset})
    except AudioError as error:
        raise _with_id(sample, error) from None


def tokens_of(sample: Sample) -> float:
    """Estimated work of a sample, in tokens of the language model."""
    seconds = sample.duration or 0.0 if sample.audio else 0.0
    return characters_of(sample) / CHARACTERS_A_TOKEN + TOKENS_A_SECOND * seconds


def characters_of(sample: Sample) -> int:
    """Length of a sample's prompt and answer."""
    return len(text_of(prompt_of(sample))) + len(answer_of(sample))


def features(processor: SoundwaveProcessor, sample: Sample) -> Tensor | None:
    """Log-mel features [n_mels, T_mel] of a sample's audio; None for text only.

    Raises:
        AudioError: the audio cannot be used, or the chat template cannot write the sample's chat.
    """
    try:
        _check_chat(processor, sample)
        if sample.audio is None:
            return None
        return processor.features(load_audio(sample.audio, offset=sample.offset, duration=sample.duration))
    except AudioError as error:
        raise _with_id(sample, error) from None


def chat_fault(processor: SoundwaveProcessor, sample: Sample) -> str | None:
    """Why the language model's chat template cannot write the turns of a sample; None if it can."""
    try:
        if sample.chat:
            processor.prompt_ids(sample.chat, has_audio=sample.audio is not None)
    except ChatError as error:
        return f"{error}; write the chat in other turns, or take another language model"
    return None


def _check_chat(processor: SoundwaveProcessor, sample: Sample) -> None:
    if fault := chat_fault(processor, sample):
        raise AudioError(sample.audio or "no recording", fault)


def _with_id(sample: Sample, error: AudioError) -> AudioError:
    """The same error with the sample's id before the file."""
    return AudioError(f"{sample.id}: {shown(error.path)}", error.fault)


def ctc_text_of(sample: Sample) -> str | None:
    """The text that CTC learns: `ctc_text` if the sample has it, else the transcript."""
    return sample.ctc_text if sample.ctc_text is not None else sample.text


def prompt_of(sample: Sample) -> Prompt:
    """The user's prompt, with its turns where it is a chat; `TRANSCRIBE_PROMPT` if the sample has none."""
    if sample.chat:
        return sample.chat
    return sample.prompt if sample.prompt is not None else TRANSCRIBE_PROMPT


def answer_of(sample: Sample) -> str:
    """The answer that the model learns: `answer` if the sample has it, else the transcript.

    Raises:
        ValueError: the sample has neither.
    """
    answer: Any = sample.answer if sample.answer is not None else sample.text
    if answer is None:
        raise ValueError(f"{sample.id}: the sample has neither answer nor text")
    return answer
