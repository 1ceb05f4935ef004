"""Turn text and audio into the model's tensors: log-mel features, chat prompts with a placeholder, labels."""

import re
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin, WhisperFeatureExtractor

from soundwave.backbones import wheels
from soundwave.backbones.check import chat_fault, check_tokenizer, check_whisper
from soundwave.backbones.released import is_released
from soundwave.eager import IGNORE_INDEX
from soundwave.model.chat import ChatError, Prompt, Turn, mark, split_at_marks, turns_of
from soundwave.model.configuration import TEMPLATE_DATE, SoundwaveConfig
from soundwave.model.hub import TAKEN_BY_HUB, local_folder

AUDIO_TOKEN = "<|soundwave_audio|>"
# Not seen, and no white space in Python's eyes: zero-width space, word joiner, byte-order mark.
INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
# A tokenizer keeps `split_special_tokens` as its state. A thread that changed it while another encodes would break the
# other's template into words, or let words of a user be special tokens.
ENCODING = threading.Lock()
MINIMUM_SECONDS = 0.1  # a shorter clip is padded with silence, because the first analysis window needs it


class SoundwaveProcessor(ProcessorMixin):
    """Whisper's feature extractor, and the language model's tokenizer with one more token for the recording.

    Args:
        feature_extractor: gives log-mel features [n_mels, T_mel] at 100 Hz from 16 kHz audio.
        tokenizer: must have a chat template; `AUDIO_TOKEN` is added to its tokens, unless `audio_placeholder_id` is
            given.
        template_date, ctc_space_label, whole_window: as in SoundwaveConfig.
        audio_placeholder_id: the token of the tokenizer that is the placeholder (a released checkpoint).

    Raises:
        ValueError: the tokenizer has no end token, no chat template that writes a user's turn, or no such token.
    """

    attributes = ["feature_extractor", "tokenizer"]
    feature_extractor_class = "WhisperFeatureExtractor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: Any,
        *,
        template_date: str = TEMPLATE_DATE,
        ctc_space_label: bool = False,
        whole_window: bool = False,
        audio_placeholder_id: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(feature_extractor, tokenizer)
        if fault := chat_fault(tokenizer):
            raise ValueError(fault)
        if audio_placeholder_id is None:
            tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
            audio_placeholder_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        elif audio_placeholder_id not in tokenizer.get_vocab().values():
            raise ValueError(
                f"the tokenizer has no token {audio_placeholder_id}, the placeholder of a recording: copy all of the "
                "checkpoint's tokenizer files"
            )
        self.audio_placeholder_id = audio_placeholder_id
        # A tokenizer without a padding token pads with the end token; the attention mask tells the two apart.
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.template_date, self.ctc_space_label = template_date, ctc_space_label
        self.whole_window = whole_window
        # Tokenizers of SentencePiece's kind put a space before the first word themselves.
        self._adds_space = self._plain_ids("a a") == 2 * self._plain_ids("a")

    @classmethod
    def from_backbones(
        cls,
        audio_tower: str,
        language_model: str,
        *,
        template_date: str = TEMPLATE_DATE,
        ctc_space_label: bool = False,
        whole_window: bool = False,
        audio_placeholder_id: int | None = None,
    ) -> "SoundwaveProcessor":
        """The processor that fits two backbones (Hub ids, local folders or embedded names)."""
        extractor = feature_extractor_of(audio_tower)
        tokenizer = check_tokenizer(language_model)
        try:
            return cls(
                extractor,
                tokenizer,
                template_date=template_date,
                ctc_space_label=ctc_space_label,
                whole_window=whole_window,
                audio_placeholder_id=audio_placeholder_id,
            )
        except ValueError as error:
            raise ValueError(f"language_model = {language_model!r}: {error}") from None

    @classmethod
    def for_config(cls, config: SoundwaveConfig) -> "SoundwaveProcessor":
        """The processor of a model: that of the backbones which its configuration names."""
        return cls.from_backbones(
            config.audio_tower,
            config.language_model,
            template_date=config.template_date,
            ctc_space_label=config.ctc_space_label,
            whole_window=config.whole_window,
            audio_placeholder_id=None if config.ctc_head is None else config.audio_placeholder_id,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "SoundwaveProcessor":
        """The processor of a saved model, as of its configuration; a text may be a Hub id, "owner/name"."""
        folder = local_folder(folder, **{key: kwargs[key] for key in TAKEN_BY_HUB if key in kwargs})
        return cls.for_config(SoundwaveConfig.from_pretrained(folder))

    def features(self, audio: np.ndarray, sampling_rate: int = 16_000) -> Tensor:
        """Log-mel features float32 [n_mels, T_mel] of one clip, float32 [samples], at its true length.

        With `whole_window` the clip is padded with silence to the encoder's window.

        Raises:
            ValueError: another sampling rate than the feature extractor's, not one clip, or not floating point.
        """
        wanted = self.feature_extractor.sampling_rate
        if sampling_rate != wanted:
            raise ValueError(f"sampling_rate = {sampling_rate}, but the feature extractor takes {wanted}")
        if audio.ndim != 1 or not len(audio):
            raise ValueError(f"audio has shape {list(audio.shape)}, but it must be one clip, [samples], and not empty")
        if not np.issubdtype(audio.dtype, np.floating):
            raise ValueError(
                f"audio is {audio.dtype}, but samples are floating point with a full scale of ±1; divide samples of 16 "
                "bits by 32768"
            )
        return log_mel(self.feature_extractor, audio, whole_window=self.whole_window)

    def prompt_ids(self, prompt: Prompt, *, has_audio: bool = True) -> list[int]:
        """Token ids of a prompt up to the start of the answer.

        A text is one user turn, in which the placeholder of the recording precedes the text; in a chat it stands where
        the turns say. White space around each content is dropped.

        Raises:
            ChatError: the chat template cannot write these turns. ValueError: the turns have another number of places
                for the recording.
        """
        turns = turns_of(prompt, has_audio)
        # The words are tokenised apart from the template, because only the template may hold special tokens.
        try:
            rendered = self.render([{"role": turn.role, "content": mark(i)} for i, turn in enumerate(turns)])
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            roles = ", ".join(turn.role for turn in turns)
            raise ChatError(f"the language model's chat template cannot write the turns {roles} ({error})") from None
        pieces, order = split_at_marks(rendered, len(turns))
        first, *others = self._encode(pieces, split=False)
        contents = (self._content_ids(turns[i]) for i in order)
        return [*first, *(token for parts in zip(contents, others, strict=True) for part in parts for token in part)]

    def _content_ids(self, turn: Turn) -> list[int]:
        if turn.audio_at is None:
            return self._plain_ids(turn.content.strip())
        before, after = turn.content[: turn.audio_at].lstrip(), turn.content[turn.audio_at :].rstrip()
        if not before:  # as for a prompt that is a text
            after = f"\n{after.lstrip()}" if after else ""
        parts = [self._plain_ids(part) if part else [] for part in (before, after)]
        return [*parts[0], self.audio_placeholder_id, *parts[1]]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text that the chat template makes of messages, up to the start of the answer.

        A template that writes today's date (Llama 3.2's, SmolLM3's, Granite's) writes `template_date` in its place:
        otherwise the model would read other prompts on each day than those that it was trained on.
        """
        template = self.tokenizer.get_chat_template()
        if self.writes_date:
            template = _clock(self.template_date) + template
        return self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    @property
    def writes_date(self) -> bool:
        """Whether the chat template asks for today's date."""
        return "strftime_now" in self.tokenizer.get_chat_template()

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of a text; the name of a special token in it is ordinary text."""
        return self._encode([text], split=True)[0]

    def _encode(self, texts: list[str], split: bool) -> list[list[int]]:
        """Token ids of texts; with `split` the names of special tokens are ordinary text."""
        with ENCODING:
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=split)["input_ids"]

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer, with the end token."""
        return [*self._plain_ids(answer), self.tokenizer.eos_token_id]

    def ctc_ids(self, text: str) -> list[int]:
        """Token ids of a transcript for CTC: every word, also the first one, has a space before it.

        Any white space counts as one space, and what is not seen is left out. Without `ctc_space_label` there is no
        label for a space alone at the beginning, where nothing is heard. A text without words has no labels.
        """
        words = " ".join(INVISIBLE.sub("", text).split())
        ids = self._plain_ids(words if self._adds_space else f" {words}") if words else []
        while ids and not self.ctc_space_label and not self.tokenizer.decode(ids[:1]).strip():
            ids = ids[1:]
        return ids

    def ctc_text(self, path: Tensor, blank: int) -> str:
        """Text of one utterance's greedy CTC path, int [T] (-1: padding): repeats are merged, blanks dropped."""
        ids = torch.unique_consecutive(path)
        return self.tokenizer.decode(ids[(ids != blank) & (ids >= 0)].tolist(), skip_special_tokens=True).strip()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        audio: Sequence[np.ndarray | Tensor | None] | None = None,
        answers: Sequence[str] | None = None,
        transcripts: Sequence[str | None] | None = None,
        *,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """A batch for the model's `forward` (with `answers`) or `generate` (without).

        Args:
            prompts: the user's prompts, one per sample: each a text, or the turns of a chat.
            audio: per sample a clip (float32 [samples], 16 kHz), its features (Tensor [n_mels, T_mel]), or None for
                text only.
            answers: the answers that the model learns; everything else is -100 in `labels`.
            transcripts: CTC targets, which are used for samples with a recording; None if a transcript is unknown.
            padding_side: by default "right" with answers and "left" without.

        Returns:
            input_ids, attention_mask int64 [B, L]; with recordings input_features float32 [A, n_mels, T_mel],
            feature_lengths int64 [A]; with answers labels int64 [B, L]; with transcripts ctc_labels int64 [A, U].

        Raises:
            ValueError: lists of different lengths, one text in place of a list, audio of a wrong shape or dtype, or
                another padding side.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts = {prompts!r}, but it must be a list of texts: write [{prompts!r}]")
        recordings: Sequence[np.ndarray | Tensor | None] = [None] * len(prompts) if audio is None else audio
        for name, values in {"audio": audio, "answers": answers, "transcripts": transcripts}.items():
            if values is not None and len(values) != len(prompts):
                raise ValueError(f"{name} has {len(values)} entries, but prompts has {len(prompts)}")
        heard = [recording is not None for recording in recordings]
        data = self.text_inputs(prompts, heard, answers, padding_side=padding_side)
        clips = [clip if isinstance(clip, Tensor) else self.features(clip) for clip in recordings if clip is not None]
        if clips:
            data |= self.pad_features(clips)
            if transcripts is not None:
                data["ctc_labels"] = self.ctc_labels(
                    [text for text, clip in zip(transcripts, recordings, strict=True) if clip is not None]
                )
        return BatchFeature(data)

    def text_inputs(
        self,
        prompts: Sequence[Prompt],
        has_audio: Sequence[bool],
        answers: Sequence[str] | None = None,
        *,
        padding_side: str | None = None,
    ) -> dict[str, Tensor]:
        """What `__call__` makes of the texts alone: `input_ids`, `attention_mask`, and with answers `labels`.

        Args:
            has_audio: per sample whether its prompt has a place for a recording.
        """
        padding_side = padding_side or ("left" if answers is None else "right")
        rows, labels = [], []
        for i, prompt in enumerate(prompts):
            prompt_ids = self.prompt_ids(prompt, has_audio=has_audio[i])
            answer_ids = [] if answers is None else self.answer_ids(answers[i])
            rows.append(prompt_ids + answer_ids)
            labels.append([IGNORE_INDEX] * len(prompt_ids) + answer_ids)
        data = {
            "input_ids": pad(rows, self.pad_token_id, padding_side),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, padding_side),
        }
        if answers is not None:
            data["labels"] = pad(labels, IGNORE_INDEX, padding_side)
        return data

    def pad_features(self, clips: list[Tensor]) -> dict[str, Tensor]:
        """`input_features` [A, n_mels, T_mel] and `feature_lengths` int64 [A] from features [n_mels, T_mel] of clips.

        Raises:
            ValueError: no clips, or features of another shape.
        """
        if not clips:
            raise ValueError("clips is empty, but a batch needs at least one recording")
        mels = self.feature_extractor.feature_size
        for clip in clips:
            if clip.ndim != 2 or clip.shape[0] != mels:
                raise ValueError(
                    f"audio holds a Tensor of shape {list(clip.shape)}, but features are [{mels}, T_mel]; "
                    "give samples as a NumPy array"
                )
        lengths = torch.tensor([clip.shape[1] for clip in clips])
        features = torch.zeros(len(clips), clips[0].shape[0], int(lengths.max()))
        for row, clip in zip(features, clips, strict=True):
            row[:, : clip.shape[1]] = clip
        return {"input_features": features, "feature_lengths": lengths}

    def ctc_labels(self, transcripts: Sequence[str | None]) -> Tensor:
        """CTC targets int64 [A, U], padded with -100; without a transcript the whole row is -100."""
        return pad([self.ctc_ids(text or "") for text in transcripts], IGNORE_INDEX, "right")


def pad(rows: list[list[int]], value: int, side: str) -> Tensor:
    """Pad rows on one side -> int64 [len(rows), longest]; if all rows are empty the width is 1.

    Raises:
        ValueError: `side` is neither "left" nor "right".
    """
    if side not in ("left", "right"):
        raise ValueError(f'padding_side = {side!r}, but it must be "left" or "right"')
    width = max([1, *(len(row) for row in rows)])
    filled = [
        [value] * (width - len(row)) + row if side == "left" else row + [value] * (width - len(row)) for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64)


def log_mel(extractor: WhisperFeatureExtractor, audio: np.ndarray, *, whole_window: bool) -> Tensor:
    """Log-mel features float32 [n_mels, T_mel] of one clip, float32 [samples] at 16 kHz, at its true length.

    With `whole_window` the clip is padded with silence to the encoder's window.
    """
    rate = extractor.sampling_rate
    least = extractor.n_samples if whole_window else int(MINIMUM_SECONDS * rate)
    audio = np.pad(audio, (0, max(0, least - len(audio))))
    features = extractor(audio, sampling_rate=rate, padding=False, truncation=False, return_tensors="np")
    return torch.from_numpy(features["input_features"][0])


def feature_extractor_of(audio_tower: str) -> WhisperFeatureExtractor:
    """The feature extractor of a Whisper (Hub id, local folder or embedded name).

    Raises:
        ValueError: its files are missing, or do not fit each other.
    """
    audio = check_whisper(audio_tower)
    folder = wheels.resolve(audio_tower)
    if is_released(folder) and not (Path(folder) / "preprocessor_config.json").is_file():
        window = audio.max_source_positions // 50  # seconds; all other settings are the same for every Whisper
        extractor = WhisperFeatureExtractor(feature_size=audio.num_mel_bins, chunk_length=window)
    else:
        extractor = _read_feature_extractor(audio_tower, folder)
    if extractor.feature_size != audio.num_mel_bins:
        raise ValueError(
            f"audio_tower = {audio_tower!r} reads {audio.num_mel_bins} mel bins, but its preprocessor_config.json "
            f"makes {extractor.feature_size}; copy the file that belongs to the model"
        )
    return extractor


def _read_feature_extractor(audio_tower: str, folder: str) -> WhisperFeatureExtractor:
    try:
        return WhisperFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        file = "preprocessor_config.json"
        missing = Path(folder).is_dir() and not (Path(folder) / file).is_file()
        reason = "it is missing" if missing else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"audio_tower = {audio_tower!r}: its {file} cannot be read ({reason}); copy the model's whole folder"
        ) from None


def _clock(day: str) -> str:
    """The beginning of a chat template in which `strftime_now`, otherwise transformers' own, tells of one `day`.

    It is a macro, because transformers turns a function that it is given into text.
    """
    time, written = datetime.fromisoformat(day), {}
    for directive in ("%" + flag + letter for letter in ascii_letters for flag in ("", *"-_0^#")):
        if (text := time.strftime(directive)) != directive:
            written[directive] = text
    # "%%" comes first and last, so that "%%d" stays "%d".
    return (
        "{%- macro strftime_now(format) -%}{%- set now = namespace(text=format.replace('%%', '\x00')) -%}"
        f"{{%- for directive, text in {written!r}.items() -%}}"
        "{%- set now.text = now.text.replace(directive, text) -%}{%- endfor -%}"
        "{{- now.text.replace('\x00', '%') -}}{%- endmacro %}\n"
    )
