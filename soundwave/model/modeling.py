"""The Soundwave model: Whisper encoder (frozen) -> alignment adapter -> kept frames -> shrinking adapter -> LLM + LoRA.

`pretrained` loads and saves its parts.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from soundwave import eager, fused
from soundwave.fused.arguments import expect
from soundwave.fused.rows import Packed
from soundwave.fused.sequences import splice_packed
from soundwave.kernels.dispatch import to_device
from soundwave.model.augment import spec_augment
from soundwave.model.packed import ATTENTION, decode_packed, encode_packed, reason_against_packing
from soundwave.model.pretrained import WEIGHTS_FILE as WEIGHTS_FILE
from soundwave.model.pretrained import SoundwavePreTrainedModel
from soundwave.model.pretrained import freeze_all_but as freeze_all_but

LEAST_DEVIATION = 0.01  # of a dimension of the encoder's frames, as a share of the mean deviation
ALIKE = 1e-5  # frames whose deviation is this share of their root mean square do not differ
MOMENT_ROWS = 8192  # frames whose moments are taken at once
FP32_BYTES = 4
BLANK_CHUNK_BYTES = 256 << 20  # of the logits in float32 that `initialise_blank` makes at once
DECODING = threading.Lock()  # one for all models, because a lock cannot be copied with its model
OPERATIONS = {"fused": fused.functional, "eager": eager}  # the modules that hold them, by `config.implementation`


@dataclass
class SoundwaveOutput(ModelOutput):
    """The result of `forward`.

    Attributes:
        loss: scalar, the loss of the model's stage; None without labels.
        ctc_loss, lm_loss: scalars, the parts of the loss; None without the labels of a part.
        logits: [B, L', V] of the language model over the spliced sequence; None in stage I, and while training.
        path: int64 [A, T], the most probable CTC id of each frame, -1 past the length.
        path_lengths: int64 [A], frames of each recording; on the CPU with the fused implementation.
        cu_seqlens: int32 [A + 1], bounds of each recording's kept frames; None in stage I.
    """

    loss: Tensor | None = None
    ctc_loss: Tensor | None = None
    lm_loss: Tensor | None = None
    logits: Tensor | None = None
    path: Tensor | None = None
    path_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None


class SoundwaveForConditionalGeneration(SoundwavePreTrainedModel):
    """Speech LLM of arXiv 2502.12900.

    `__init__` builds only the adapters; `from_backbones` and `from_pretrained` also load the backbones.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # with True Trainer would not divide the loss by the accumulation steps
    _supports_sdpa = True
    _can_pack: bool | None = None  # whether the language model can, once that is known
    _decoding = 0  # threads that are
    _without_casts: Any = None  # the context of LoRA's switch meanwhile

    # ---------------------------------------------------------------- parts

    @property
    def blank(self) -> int:
        """Index of the CTC blank: one extra row after those of the language model's head, or a row of `ctc_head`."""
        return self.config.vocab_size if self.ctc_head is None else self.config.audio_placeholder_id

    def ctc_logits(self, hidden: Tensor) -> Tensor:
        """CTC's logits float32 [..., V + 1], or [..., V] with a head of its own, of aligned frames [..., D].

        `forward` never forms them.
        """
        if self.ctc_head is not None:
            return F.linear(hidden.float(), self.ctc_head.float())
        words = F.linear(hidden.float(), self.head_weight.float())
        blank = hidden.float() @ self.blank_weight.float() + self.blank_bias.float()
        return torch.cat([words, blank[..., None]], dim=-1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the backbones and of the matrix products; with float32 there is no autocast."""
        return self.audio_tower.conv1.weight.dtype

    @property
    def _operations(self) -> Any:
        return OPERATIONS[self.config.implementation]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it the language model computes as in training: in `compute_dtype`, LoRA on what it is given.

        peft would cast LoRA's input to float32, and autocast back. Its switch is in the layers, which threads that
        decode at once share: the first one turns it off, and the last one on again.
        """
        half = self.compute_dtype != torch.float32
        with DECODING:
            if not self._decoding:
                self._without_casts = disable_input_dtype_casting(self.language_model, active=half)
                self._without_casts.__enter__()
            self._decoding += 1
        try:
            with self._autocast():
                yield
        finally:
            with DECODING:
                self._decoding -= 1
                if not self._decoding:
                    self._without_casts.__exit__(None, None, None)
                    self._without_casts = None

    @property
    def packed(self) -> bool:
        """Whether the model computes on packed rows, so that padding costs nothing."""
        return self.config.packed and self.config.implementation == "fused"

    def encode(self, input_features: Tensor, feature_lengths: Tensor, packed: bool = False) -> tuple[Tensor, Tensor]:
        """Whisper's encoder at the clips' true lengths, or over its whole window if `config.whole_window`.

        Args:
            input_features: [A, n_mels, T_mel], log-mel at 100 Hz; padding may hold any values.
            feature_lengths: int [A], in mel frames.
            packed: return the frames of the clips one after another.

        Returns:
            Frames at 50 Hz [A, ceil(T_mel / 2), E] and their lengths; with `packed`, if the model computes on packed
            rows, they are [N, E]. A clip's frames do not depend on its neighbours in the batch: padding is zeroed
            before each convolution, as at a clip's own end, and masked in attention.
        """
        tower = self.audio_tower
        limit = 2 * tower.config.max_source_positions
        if input_features.shape[-1] > limit:
            raise ValueError(
                f"input_features has {input_features.shape[-1]} mel frames, but the encoder takes {limit} "
                f"({limit / 100:g} s): cut the recording, e.g. with soundwave.inference.long.windows"
            )
        if self.config.whole_window and (
            input_features.shape[-1] != limit or not bool((feature_lengths == limit).all())
        ):
            raise ValueError(
                f"input_features has {input_features.shape[-1]} mel frames and feature_lengths goes down to "
                f"{int(feature_lengths.min())}, but this model reads whole windows of {limit} ({limit / 100:g} s), "
                "padded with silence: make the features with its processor"
            )
        if self.packed:
            rows, lengths = encode_packed(tower, input_features, feature_lengths.cpu())
            return rows if packed else _padded(rows, lengths, -(-input_features.shape[-1] // 2)), lengths
        mel_lengths, lengths = to_device(feature_lengths, input_features.device), (feature_lengths + 1) // 2
        mel_mask = eager.length_mask(mel_lengths, input_features.shape[-1])[:, None, :]
        x = input_features.masked_fill(~mel_mask, 0.0).to(self.compute_dtype)  # no product, because padding may be NaN
        x = F.gelu(tower.conv1(x)) * mel_mask
        x = F.gelu(tower.conv2(x)).transpose(1, 2)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        attended = None
        if (lengths < x.shape[1]).any():
            mask = eager.length_mask((mel_lengths + 1) // 2, x.shape[1])
            attended = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        for layer in tower.layers:
            x = layer(x, attended)
        return tower.layer_norm(x), lengths

    def align(
        self,
        input_features: Tensor,
        feature_lengths: Tensor | None,
        ctc_labels: Tensor | None = None,
        packed: bool = False,
        augment_seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, eager.LinearCTCOutput]:
        """Encode the audio, align its frames to the LLM's embeddings, and run CTC over them, in `compute_dtype`.

        Args:
            input_features: [A, n_mels, T_mel], log-mel at 100 Hz.
            feature_lengths: int [A], in mel frames; None for T_mel.
            ctc_labels: int [A, U], padded with -100. Recordings whose labels are all -100 have no transcript and are
                left out of the loss. Without labels there is no loss.
            augment_seeds: as in `forward`.

        Lengths and labels may be on the CPU, where the host can read them without waiting for a GPU.

        Returns:
            Aligned frames [A, T, D], their lengths int [A] (on the CPU, with the eager implementation on the device),
            and the result of CTC; with `packed`, if the model computes on packed rows, frames [N, D] and a path [N].
        """
        hidden, lengths, ctc = self._align(input_features, feature_lengths, ctc_labels, augment_seeds)
        if self.packed and not packed:
            size = -(-input_features.shape[-1] // (2 * self.config.frame_stack))
            path, scores = (_padded(x, lengths, size, value) for x, value in ((ctc.path, -1), (ctc.path_log_prob, 0)))
            hidden, ctc = _padded(hidden, lengths, size), ctc._replace(path=path, path_log_prob=scores)
        return hidden, lengths, ctc

    def _align(
        self,
        input_features: Tensor,
        feature_lengths: Tensor | None,
        ctc_labels: Tensor | None,
        augment_seeds: Sequence[int] | None,
        encoded: bool = False,
    ) -> tuple[Tensor, Tensor, eager.LinearCTCOutput]:
        """`align`, packed if the model computes on packed rows; `encoded`: of the encoder's frames [N, E]."""
        if feature_lengths is None:
            feature_lengths = torch.full((input_features.shape[0],), input_features.shape[-1], device="cpu")
        # From here on the host reads them as often as it wants. The eager modules compute with them on the device.
        where = input_features.device if self.config.implementation == "eager" else torch.device("cpu")
        feature_lengths = to_device(feature_lengths, where)
        with self._autocast():
            if encoded:
                frames, lengths = input_features, (feature_lengths + 1) // 2
            else:
                if self.training:
                    on_device = to_device(feature_lengths, input_features.device)
                    input_features = spec_augment(input_features, on_device, self.config, augment_seeds)
                with torch.no_grad():
                    frames, lengths = self.encode(input_features, feature_lengths, self.packed)
            hidden, lengths = self.alignment(frames, lengths)
            if ctc_labels is None:
                return hidden, lengths, self._ctc(hidden, lengths)
            ctc_labels = to_device(ctc_labels, where)
            known = ctc_labels != eager.IGNORE_INDEX
            targets, counts = ctc_labels.masked_fill(~known, 0), known.sum(1)
            transcribed = counts > 0
            if transcribed.all():
                return hidden, lengths, self._ctc(hidden, lengths, targets, counts)
            path = torch.full(hidden.shape[:-1], -1, device=hidden.device)
            scores = torch.zeros(hidden.shape[:-1], device=hidden.device)
            # Without any transcript the CTC loss is 0, but it stays connected to the parameters, so each of them still
            # gets a (zero) gradient.
            of_head = (self.blank_weight, self.blank_bias) if self.ctc_head is None else (self.ctc_head,)
            loss = torch.cat([x.flatten()[:0] for x in (hidden, *of_head)]).sum()
            for chosen in (transcribed, ~transcribed):
                if chosen.any():
                    rows = chosen.repeat_interleave(lengths.to(torch.int64)) if self.packed else chosen
                    rows = to_device(rows.nonzero()[:, 0], hidden.device)
                    labels = (targets[chosen], counts[chosen]) if chosen is transcribed else ()
                    part = self._ctc(hidden.index_select(0, rows), lengths[chosen], *labels)
                    path.index_copy_(0, rows, part.path)
                    scores.index_copy_(0, rows, part.path_log_prob.to(scores.dtype))
                    loss = loss if part.loss is None else part.loss
            return hidden, lengths, eager.LinearCTCOutput(loss, path, scores)

    def _ctc(
        self, hidden: Tensor, lengths: Tensor, targets: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> eager.LinearCTCOutput:
        """CTC over the LLM's vocabulary. Without targets only the path is computed."""
        blank: dict[str, Any] = {"blank": self.blank}
        if self.ctc_head is None:
            blank |= {"blank_weight": self.blank_weight, "blank_bias": self.blank_bias}
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets is not None):
            return self._operations.linear_ctc_loss(
                hidden,
                self.head_weight if self.ctc_head is None else self.ctc_head,
                targets,
                lengths,
                target_lengths,
                **blank,
                reduction="mean",  # with "none" the skipping bound would have to hold for each utterance alone
                zero_infinity=True,
                **({"exact": self.config.exact} if self.config.implementation == "fused" else {}),
            )

    def kept_frames(self, ctc: eager.LinearCTCOutput, lengths: Tensor) -> eager.Peaks:
        """The frames that the language model reads: `config.keep` chooses them from the result of `align`."""
        if self.config.keep == "frames" and ctc.path.dim() == 1:
            bounds = to_device(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), ctc.path.device)
            index = torch.arange(len(ctc.path), device=ctc.path.device)
            return eager.Peaks(index, bounds, int(lengths.max()) if len(lengths) else 0)
        if self.config.keep == "frames":
            return eager.every_frame(lengths.to(ctc.path.device), ctc.path.shape[1])
        return self._operations.ctc_peaks(
            ctc.path, lengths, blank=self.blank, keep=self.config.keep, scores=ctc.path_log_prob
        )

    @torch.no_grad()
    def frame_moments(self, input_features: Tensor, feature_lengths: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number of the encoder's frames of a batch, their mean and mean square, fp64 [E] each, on the CPU."""
        with self._autocast():
            frames, lengths = self.encode(input_features, feature_lengths, self.packed)
        rows = frames if self.packed else frames[eager.length_mask(lengths, frames.shape[1])]
        total, square = (torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device) for _ in range(2))
        for chunk in rows.split(MOMENT_ROWS):  # in fp64 all of them would take four times the memory of the frames
            total += chunk.double().sum(0)
            square += chunk.double().square().sum(0)
        return len(rows), total.cpu() / len(rows), square.cpu() / len(rows)

    @torch.no_grad()
    def standardise_frames(self, mean: Tensor, mean_square: Tensor) -> bool:
        """Let a fresh alignment adapter start on frames of mean 0 and variance 1 in each dimension.

        Whisper's frames have a common mean several times as long as their differences, and deviations that differ
        tenfold by dimension. Scale and shift go into the first values of the projector's weight and bias; nothing else
        changes. Stage I learns in fewer steps then (measured: `docs/log.md`). The zero frame that fills up a clip with
        an odd number of frames is not of mean 0 any more.

        Args:
            mean, mean_square: of encoder frames, fp64 [E], as `frame_moments` gives them. A dimension that hardly
                varies is scaled as if it had a hundredth of the mean deviation, or what `compute_dtype` rounds off.

        Returns:
            False if the frames are all alike, so that nothing was done.

        Raises:
            ValueError: the moments are not finite.
        """
        if not bool(mean.isfinite().all() and mean_square.isfinite().all()):
            count = int((~(mean.isfinite() & mean_square.isfinite())).sum())
            raise ValueError(
                f"{count} of {len(mean)} dimensions of the encoder's frames are not finite in {self.compute_dtype}; "
                "use dtype=float32"
            )
        deviation = (mean_square - mean.square()).clamp_min(0).sqrt()
        if float(deviation.mean()) <= ALIKE * float(mean_square.mean().sqrt()):
            return False
        rounding = mean.abs() * torch.finfo(self.compute_dtype).eps
        deviation = deviation.maximum(rounding).clamp_min(float(deviation.mean()) * LEAST_DEVIATION)
        projector, stack = self.alignment.projector, self.config.frame_stack
        weight = projector.weight.double() / deviation.repeat(stack).to(projector.weight.device)
        shift = weight @ mean.repeat(stack).to(weight.device)
        projector.weight.copy_(weight)
        projector.bias.copy_(projector.bias.double() - shift)
        return True

    @torch.no_grad()
    def initialise_blank(self, input_features: Tensor, feature_lengths: Tensor) -> float:
        """Set the blank's bias to the head's mean log-sum-exp over a first batch -> the bias.

        With bias 0 the blank starts some 14 nats below the vocabulary's log-sum-exp and is never used (measured:
        `docs/log.md`).

        Raises:
            ValueError: the CTC head is one of its own, with a blank that is trained already.
        """
        if self.ctc_head is not None:
            raise ValueError("initialise_blank sets the bias of a new blank, but this model's ctc_head has its own")
        with self._autocast():
            frames, lengths = self.encode(input_features, feature_lengths, self.packed)
            hidden, lengths = self.alignment(frames, lengths)
            rows = hidden if self.packed else hidden[eager.length_mask(lengths, hidden.shape[1])]
            head = self.head_weight
            # In chunks, because the logits of 32 clips of 30 s take 23 GiB with the vocabulary of Llama 3.
            chunks = rows.split(max(1, BLANK_CHUNK_BYTES // (FP32_BYTES * head.shape[0])))
            normaliser = torch.cat([F.linear(chunk, head).float().logsumexp(-1) for chunk in chunks]).mean()
        self.blank_bias.copy_(normaliser)
        return float(normaliser)

    def _splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        hidden: Tensor | None,
        lengths: Tensor | None,
        ctc: eager.LinearCTCOutput | None,
        labels: Tensor | None,
        padding_side: str,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Splice the shrunk kept frames into the text -> embeddings, mask, labels, cu_seqlens of the kept frames."""
        input_ids, attention_mask = (to_device(x, self.device) for x in (input_ids, attention_mask))
        labels = None if labels is None else to_device(labels, self.device)
        embeddings = self._embed(input_ids)
        speech, cu_seqlens = self._speech(hidden, lengths, ctc, embeddings)
        embeddings, mask, labels = self._operations.splice(
            embeddings,
            input_ids,
            attention_mask,
            speech,
            cu_seqlens.to(input_ids.device),
            audio_placeholder_id=self.config.audio_placeholder_id,
            labels=labels,
            padding_side=padding_side,
        )
        return embeddings, mask, labels, cu_seqlens

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The language model's embeddings [B, L, D] of tokens, with anything at the placeholders."""
        tokens = input_ids.masked_fill(input_ids == self.config.audio_placeholder_id, 0)
        return self.language_model.get_input_embeddings()(to_device(tokens, self.device))

    def _speech(
        self, hidden: Tensor | None, lengths: Tensor | None, ctc: eager.LinearCTCOutput | None, embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The shrunk kept frames [K, D] that stand beside `embeddings`, and their bounds int32 [A + 1]."""
        if hidden is None or lengths is None or ctc is None:
            return embeddings.new_zeros(0, embeddings.shape[-1]), torch.zeros(1, dtype=torch.int32, device="cpu")
        peaks = self.kept_frames(ctc, lengths)
        return self.shrinking(hidden, lengths, peaks), peaks.cu_seqlens

    def _packs_sequences(self) -> bool:
        """Whether the language model trains on packed sequences. If it cannot, a warning gives the reason, once."""
        if self._can_pack is None:
            reason = reason_against_packing(self.language_model)
            self._can_pack = not reason
            if reason:
                kind = self.language_model.config.model_type
                warnings.warn(f"the language model ({kind}) trains on padded sequences, because {reason}", stacklevel=3)
        return self._can_pack

    def _answers_of_packed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden: Tensor | None,
        lengths: Tensor | None,
        ctc: eager.LinearCTCOutput | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The language model over packed sequences.

        Returns:
            [n, D], the last states of the rows before those tokens that have a label and a row before them.
            int64 [n], these labels, on the CPU. int32 [A + 1], the bounds of the kept frames.
        """
        input_ids, attention_mask, labels = (x.cpu() for x in (input_ids, attention_mask, labels))
        embeddings = self._embed(input_ids)
        speech, kept = self._speech(hidden, lengths, ctc, embeddings)
        sequences = splice_packed(
            embeddings,
            input_ids,
            attention_mask,
            speech,
            kept.cpu(),
            audio_placeholder_id=self.config.audio_placeholder_id,
            labels=labels,
        )
        spliced, bounds = sequences.labels, sequences.cu_seqlens
        assert spliced is not None
        answered = spliced != eager.IGNORE_INDEX
        answered[bounds[:-1][bounds.diff() > 0]] = False
        place = answered.nonzero()[:, 0]
        rows = decode_packed(self.language_model, sequences.embeddings, bounds, sequences.max_seqlen, place - 1)
        return rows, spliced[place].to(torch.int64), kept

    def _answers(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which tokens the language model has to answer, in the order of the text.

        Returns:
            int64 [B, L] on the CPU: 0, 1, 2, … for the tokens that have a label and a token or a frame before them, and
            -100 elsewhere.
            int64 [n], their labels.

        Raises:
            ValueError: tensors of other shapes than `input_ids`; labels that are no integers.
        """
        expect("input_ids", input_ids, ("B", "L"), floating=False)
        expect("attention_mask", attention_mask, tuple(input_ids.shape), floating=None)
        expect("labels", labels, tuple(input_ids.shape), floating=False)
        ids, mask, labels = torch.stack([x.to(torch.int64) for x in (input_ids, attention_mask, labels)]).cpu()
        is_text = mask.bool() & (ids != self.config.audio_placeholder_id)
        is_audio = mask.bool() & ~is_text
        if lengths is not None and int(is_audio.any(1).sum()) == len(lengths):
            is_audio[is_audio.any(1)] &= lengths.cpu()[:, None] > 0  # a recording of no frames takes no place
        before = (is_text | is_audio).cumsum(1) - is_text.to(torch.int64)
        answered = is_text & (labels != eager.IGNORE_INDEX) & (before > 0)
        order = answered.flatten().cumsum(0).view(answered.shape) - 1
        return order.masked_fill(~answered, eager.IGNORE_INDEX), labels[answered]

    def _attention_mask(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The mask of the language model for rows that are padded on the right.

        No token sees what comes after it, so padding on the right needs no mask of its own. Given `mask` [B, L'],
        transformers waits for a GPU to see whether there is padding; given a causal mask [1, 1, L', L'], it does not.
        Models without rotary embeddings get `mask`, because some of them count their positions or biases from it.
        """
        decoder, config, size = self.language_model.base_model, self.language_model.config, embeddings.shape[1]
        if not hasattr(decoder, "rotary_emb") or getattr(config, "alibi", False):
            return mask
        window = getattr(config, "sliding_window", None)
        if config._attn_implementation not in ("eager", "sdpa", ATTENTION) or (window is not None and window < size):
            return mask  # FlashAttention unpads the rows, and a window needs a mask of its own
        causal = torch.ones(size, size, dtype=torch.bool, device=embeddings.device).tril_()[None, None]
        if config._attn_implementation != "eager":
            return causal
        hidden = torch.finfo(embeddings.dtype).min
        return embeddings.new_zeros(causal.shape).masked_fill_(~causal, hidden)

    # ---------------------------------------------------------------- forward and generation

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        ctc_labels: Tensor | None = None,
        augment_seeds: Sequence[int] | None = None,
        encoder_frames: Tensor | None = None,
    ) -> SoundwaveOutput:
        """One step of any stage.

        Args:
            input_ids, attention_mask: int [B, L]. Each row with a recording has the audio placeholder once. Stage I
                needs neither of the two.
            input_features: [A, n_mels, T_mel], the recordings of those rows, in order; None for text only.
            feature_lengths: int [A], in mel frames; None for T_mel.
            labels: int [B, L] aligned with `input_ids`, -100 where nothing is learned (prompt, padding).
            ctc_labels: int [A, U], the transcripts' tokens, padded with -100; all -100 without a transcript.
            augment_seeds: a seed of each recording for SpecAugment; None draws from torch's generator.
            encoder_frames: [N, E] in place of `input_features`, what `encode` made of them before, packed. The model
                must compute on packed rows and mask nothing (SpecAugment), and `feature_lengths` must be given.

        All but `input_features` may be on the CPU: what the host has to know, it then knows without waiting for a GPU.

        Returns:
            `loss` = `lm_loss` + `ctc_weight` · `ctc_loss`, or the one of them that was computed. `lm_loss` is the mean
            over answer tokens. In training with labels only the answers are projected on the vocabulary, so `logits`
            is None.
        """
        with self._autocast():
            hidden = lengths = ctc = None
            if encoder_frames is not None:
                self._expect_encoded(input_features, feature_lengths)
                hidden, lengths, ctc = self._align(encoder_frames, feature_lengths, ctc_labels, None, encoded=True)
                longest = int(feature_lengths.max())
            elif input_features is not None:
                hidden, lengths, ctc = self.align(
                    input_features, feature_lengths, ctc_labels, self.packed, augment_seeds
                )
                longest = input_features.shape[-1]
            out = SoundwaveOutput()
            if ctc is not None:
                out.path, out.path_lengths, out.ctc_loss = ctc.path, lengths, ctc.loss
                if self.packed:
                    out.path = _padded(ctc.path, lengths, -(-longest // (2 * self.config.frame_stack)), -1)
            if self.language_model is None or input_ids is None:
                out.loss = out.ctc_loss
                return out
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            if labels is not None and self.training and self.packed and self._packs_sequences():
                rows, wanted, out.cu_seqlens = self._answers_of_packed(
                    input_ids, attention_mask, labels, hidden, lengths, ctc
                )
                self._add_lm_loss(out, rows, wanted)
                return out
            order = wanted = None
            if labels is not None:
                order, wanted = self._answers(input_ids, attention_mask, labels, lengths)
            embeddings, mask, order, out.cu_seqlens = self._splice(
                input_ids, attention_mask, hidden, lengths, ctc, order, "right"
            )
            states = self.language_model.base_model(
                inputs_embeds=embeddings, attention_mask=self._attention_mask(embeddings, mask), use_cache=False
            ).last_hidden_state
            if labels is None or not self.training:
                out.logits = self.language_model.get_output_embeddings()(states)
            if order is not None:
                # The k-th answered token is predicted by the row before it; rows of other tokens go to a last slot.
                places = torch.arange(order.numel(), device=order.device)
                slot = order.flatten().where(order.flatten() >= 0, len(wanted))
                place = places.new_empty(len(wanted) + 1).scatter_(0, slot, places)[:-1]
                self._add_lm_loss(out, states.flatten(0, 1).index_select(0, place - 1), wanted)
            return out

    def _expect_encoded(self, input_features: Tensor | None, feature_lengths: Tensor | None) -> None:
        """ValueError where frames of the encoder cannot take the place of `input_features`."""
        masks = self.config.spec_augment_time_masks or self.config.spec_augment_mel_masks
        if not self.packed:
            raise ValueError("encoder_frames are packed, but this model computes on padded rows; set packed = True")
        if input_features is not None or feature_lengths is None:
            raise ValueError("encoder_frames need feature_lengths, and no input_features beside them")
        if self.training and masks:
            raise ValueError("encoder_frames cannot be masked, but SpecAugment is on; set its numbers of masks to 0")

    def _add_lm_loss(self, out: SoundwaveOutput, rows: Tensor, wanted: Tensor) -> None:
        """Set the losses of `out`: `rows` [n, D] are the states that predict the tokens `wanted` int64 [n]."""
        wanted = to_device(wanted, rows.device) if self.config.implementation == "eager" else wanted
        summed = self._operations.linear_cross_entropy(rows, self.head_weight, wanted, reduction="sum")
        out.loss = out.lm_loss = summed / max(wanted.numel(), 1)  # 0 without any answer, where a mean would be NaN
        if out.ctc_loss is not None:
            out.loss = out.lm_loss + self.config.ctc_weight * out.ctc_loss

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """New tokens int64 [B, L_new] of the language model's `generate`, which gets `kwargs`; inputs as in `forward`.

        Raises:
            ValueError: the model was loaded without its language model.
        """
        embeddings, mask, _ = self.embed_prompts(input_ids, attention_mask, input_features, feature_lengths)
        with self.decoding():
            return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)

    @torch.no_grad()
    def embed_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        aligned: tuple[Tensor, Tensor, eager.LinearCTCOutput] | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """What the language model answers: prompts with the shrunk frames of their recordings; inputs as in `forward`.

        Args:
            aligned: what `align(input_features, feature_lengths, packed=model.packed)` returned, if that is known.

        Returns:
            Embeddings [B, L', D] and mask [B, L'], padded on the left; and of the recordings the CTC path int64 [A, T],
            -1 in the padding, with its log-probabilities [A, T], 0 there, or None without any recording.

        Raises:
            ValueError: the model was loaded without its language model.
        """
        if self.language_model is None:
            raise ValueError("generate needs the language model, but this model was loaded without it")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self._autocast():
            hidden = lengths = ctc = path = None
            if input_features is not None:
                hidden, lengths, ctc = aligned or self.align(input_features, feature_lengths, None, self.packed)
                path = ctc.path, ctc.path_log_prob
                if self.packed:
                    path = tuple(_padded(x, lengths, int(lengths.max()), v) for x, v in zip(path, (-1, 0), strict=True))
            embeddings, mask, _, _ = self._splice(input_ids, attention_mask, hidden, lengths, ctc, None, "left")
            return embeddings, mask, path


def _padded(rows: Tensor, lengths: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Packed `rows` [N, ...] as [A, size, ...], with `value` past the lengths."""
    padded = Packed.of("rows", rows, lengths).pad(rows, value)
    return F.pad(padded, (*[0] * (2 * rows.dim() - 2), 0, size - padded.shape[1]), value=value)


def batch_to(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
