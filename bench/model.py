"""A whole Soundwave model with random weights at the widths of a size. It is built from configurations; no download.

The CTC path of random weights is meaningless, so a planted one replaces it: it has as many single peaks as speech has
sub-words. Everything else runs as usual, also CTC over the vocabulary.
"""

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from bench.shapes import DIMS, Case, kept_frames, lengths, planted_path
from soundwave import SoundwaveForConditionalGeneration, eager
from soundwave.eager import IGNORE_INDEX
from soundwave.model.modeling import freeze_all_but
from soundwave.training.stages import TRAINED

PROMPT, ANSWER = 24, 40  # tokens of the prompt (one of them is the recording's placeholder) and of the answer


class Planted(SoundwaveForConditionalGeneration):
    """The model with a planted path: the bench chooses the kept frames, not CTC."""

    planted: tuple[Tensor, Tensor] | None = None  # path and log-probabilities [B, T]; blank in the padding
    planted_rows: tuple[Tensor, Tensor] | None = None  # the same without the padding [N]

    def kept_frames(self, ctc, lengths):
        path, scores = self.planted_rows if ctc.path.dim() == 1 else self.planted
        return super().kept_frames(ctc._replace(path=path, path_log_prob=scores), lengths)


def make_backbones(size: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, PreTrainedModel]:
    """Whisper's encoder and a Llama of a size, frozen."""
    dims = DIMS[size]
    llama = dims.llama_config(tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with device:
        encoder = WhisperEncoder(dims.whisper_config()).to(dtype)
        language_model = AutoModelForCausalLM.from_config(llama, dtype=dtype)
    return encoder.requires_grad_(False).eval(), language_model.requires_grad_(False).eval()


@lru_cache(maxsize=1)
def make_models(size: str, dtype: torch.dtype, device: torch.device) -> "dict[str, Planted]":
    """Models "eager", "compiled" and "ours", which share the backbones, LoRA and the adapters' parameters.

    With `dtype` bfloat16 only the backbones are bfloat16; the trained parts are float32 under autocast, as in training.
    """
    encoder, language_model = make_backbones(size, dtype, device)
    models = {}
    for name, kind in {"eager": Planted, "compiled": Compiled, "ours": Planted}.items():
        config = DIMS[size].soundwave_config(
            adapter_dropout=0.0,
            spec_augment_time_masks=0,
            spec_augment_mel_masks=0,
            implementation="fused" if name == "ours" else "eager",
        )
        with device:
            models[name] = kind(config, encoder, language_model)
    models["eager"].add_lora()
    shared = {
        name: value
        for name, value in models["eager"].state_dict(keep_vars=True).items()
        if name.startswith(("alignment.", "shrinking.", "blank_"))
    }
    for model in models.values():
        model.load_state_dict(shared, strict=False, assign=True)
    return models


def prepare(case: Case, device: torch.device) -> "dict[str, Planted]":
    """The models, ready to train the stage of the case; stage 0: to generate."""
    models = make_models(case.size, case.dtype, device)
    blank = DIMS[case.size].vocab
    path, scores = planted_path(lengths(case.B, case.T, case.lengths), blank, blank, device)
    for model in models.values():
        freeze_all_but(model, TRAINED[case.stage] if case.stage else ())
        model.train(bool(case.stage))
        model.audio_tower.eval()
        model.planted = path.masked_fill(path < 0, blank), scores
        model.planted_rows = path[path >= 0], scores[path >= 0]
    return models


class Compiled(Planted):
    """Eager adapters and CTC under `torch.compile`. The backbones are not compiled: all contenders share them."""

    def compile_parts(self) -> "Compiled":
        torch.compiler.reset()
        self.alignment.compile(dynamic=False)
        self.shrinking.compile(dynamic=False)
        self._compiled = SimpleNamespace(
            **{name: getattr(eager, name) for name in ("ctc_peaks", "splice")},
            **{
                name: torch.compile(getattr(eager, name), dynamic=False)
                for name in ("linear_ctc_loss", "linear_cross_entropy")
            },
        )
        return self

    @property
    def _operations(self):
        return self._compiled


def batch_of(case: Case, device: torch.device, *, padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one step, or of `generate` at stage 0.

    Clips have their true lengths. With `padded` all of them are as long as the longest clip of the size, and the
    padding is treated as audio, as in the released code.
    """
    dims, generator = DIMS[case.size], torch.Generator().manual_seed(seed)
    frames = lengths(case.B, case.T, case.lengths)
    mels = torch.full_like(frames, 4 * case.T) if padded else 4 * frames
    batch = {
        "input_features": torch.randn(case.B, dims.mels, 4 * case.T, generator=generator),
        "feature_lengths": mels,
    }
    if case.stage in (1, 2):
        labels = torch.randint(dims.vocab, (case.B, case.U), generator=generator)
        counts = (frames * case.U // case.T).clamp(min=1)
        batch["ctc_labels"] = labels.masked_fill(torch.arange(case.U) >= counts[:, None], IGNORE_INDEX)
    if case.stage != 1:
        text = torch.randint(dims.vocab, (case.B, PROMPT + ANSWER if case.stage else PROMPT), generator=generator)
        text[:, 1] = dims.vocab  # the recording's placeholder
        batch |= {"input_ids": text, "attention_mask": torch.ones_like(text)}
        if case.stage:
            batch["labels"] = text.masked_fill(torch.arange(PROMPT + ANSWER) < PROMPT, IGNORE_INDEX)
    return {name: value.to(device) for name, value in batch.items()}


def flops(case: Case, model: Planted) -> float:
    """Operations that the definition of a step needs, over valid frames and tokens.

    Forward takes two operations for each weight and row. Backward takes as many again for the gradient of the inputs,
    except those of the frozen encoder, and as many for the gradient of trained weights. Attention takes twice as many
    backward as forward. The language model's weights are frozen; LoRA is too small to matter.
    """
    frames = lengths(case.B, case.T, case.lengths).double()
    tokens = kept_frames(frames.long()).double() + PROMPT - 1 + (ANSWER if case.stage else 0)

    def matrices(module: nn.Module) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "lora_" not in name)

    dims = DIMS[case.size]
    encoder = 2 * matrices(model.audio_tower.layers) * 2 * frames.sum()
    encoder = encoder + 4 * dims.audio_width * dims.audio_layers * ((2 * frames) ** 2).sum()
    alignment = 2 * matrices(model.alignment) * frames.sum() + 4 * dims.width * (frames**2).sum()
    trained_alignment = 3 * alignment - 4 * dims.audio_width * dims.width * frames.sum()  # none for the encoder
    product = 2 * dims.vocab * dims.width * frames.sum()
    shrinking = 4 * dims.width**2 * (frames.sum() + kept_frames(frames.long()).sum())
    layers = 2 * matrices(model.language_model.base_model.layers) * tokens.sum()
    pairs = 2 * dims.width * dims.layers * (tokens**2).sum()  # Causal attention needs half of the pairs.
    answers = 2 * dims.vocab * dims.width * case.B * (ANSWER if case.stage else case.new_tokens)
    learning = 2 * layers + 3 * pairs + 2 * answers
    heard = encoder + alignment + product + shrinking
    total = {
        0: heard + (layers + pairs) * (1 + case.new_tokens / tokens.mean()) + answers,
        1: encoder + trained_alignment + 2 * product,
        2: encoder + trained_alignment + 2 * product + 3 * shrinking + learning,
        3: heard + learning,
    }
    return float(total[case.stage])
