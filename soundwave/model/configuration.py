"""Configuration of a Soundwave model: its backbones, the sizes of its adapters, and the stage of its training.

`audio_tower` and `language_model` name the backbones (a Hub id, a local folder, or an `embedded:` name of
`soundwave.backbones`). Their weights are not saved: a saved model holds only its trained parts. In a saved
configuration a folder may be relative to it, as "./backbones/audio_tower".
"""

import inspect
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from soundwave.backbones import LANGUAGE_MODEL, WHISPER, released

SEMANTICS = {
    "paper": {"attend": "frames", "keep": "peaks", "keys": "all"},
    "released": {"attend": "self", "keep": "runs", "keys": "kept"},
}
CONFIG_VERSION = 2
BACKBONES = ("audio_tower", "language_model", "ctc_head")  # settings that may name a folder
TEMPLATE_DATE = "2024-07-26"  # the date that Llama 3's chat templates write where they are given none


class SoundwaveConfig(PretrainedConfig):
    """Sizes and rules of a Soundwave model (arXiv 2502.12900).

    Args:
        audio_tower: Whisper model whose frozen encoder is used.
        language_model: causal LM that is adapted with LoRA; its frozen output embedding is the CTC head.
        audio_hidden_size: width of the Whisper encoder (d_enc).
        hidden_size: width of the language model (d_llm), and of both adapters.
        num_attention_heads: attention heads of both adapters; `from_backbones` takes the language model's number.
        vocab_size: rows of the language model's output embedding. The CTC blank is one further row, index `vocab_size`.
        audio_placeholder_id: id of the placeholder token, which the kept frames of a recording replace.
        ctc_head: folder with a frozen CTC head [vocab_size, hidden_size] of its own, in which row
            `audio_placeholder_id`, a token of the tokenizer, is the blank (the released checkpoint). None: the head is
            the language model's output embedding, with a blank row that is trained.
        whole_window: recordings are padded with silence to the encoder's whole window (30 s), and its frames count.
        frame_stack: number of neighbouring encoder frames that are concatenated (2: 50 Hz -> 25 Hz).
        adapter_dropout: dropout inside the alignment adapter while training.
        layer_norm_eps: epsilon of the adapters' LayerNorms.
        semantics: "paper" or "released" (the authors' inference code); sets `attend`, `keep` and `keys` together.
        attend: "frames" (attention across an utterance's frames) or "self" (each frame sees only itself).
        keep: "peaks" (most probable frame of each run of a non-blank id), "runs" (first frame of every run) or
            "frames" (all of them: nothing is shrunk).
        keys: "all" (kept frames attend to every valid frame), "kept" (to the kept frames only) or "none" (there is no
            cross-attention: the LLM reads the normed kept frames).
        ctc_weight: weight of the CTC loss beside the next-token loss in stage II.
        lora_rank, lora_alpha, lora_dropout, lora_target_modules: settings of LoRA on the language model.
        quantization: "nf4" (4-bit, double quantisation, through bitsandbytes) or None.
        spec_augment_time_masks, spec_augment_time_width: number of time masks and their largest width in 10 ms frames.
        spec_augment_mel_masks, spec_augment_mel_width: number of frequency masks and their largest width in mel bins.
        implementation: "fused" (`soundwave.fused`) or "eager" (`soundwave.eager`, plain PyTorch); the same parameters.
        packed: the fused modules compute on packed rows, and language models that can train on packed sequences. False
            pads them.
        exact: the fused CTC computes its gradient over all columns instead of skipping those that are almost 0.
        template_date: the day, as YYYY-MM-DD, that a chat template takes for today. It is saved, so that prompts are
            the same on every day.
        ctc_space_label: a space alone may be the first CTC label. Models of version 0.1 were trained on such labels.
        stage: the last training stage that this model has seen; 0 if it is untrained.
    """

    model_type = "soundwave"

    def __init__(
        self,
        audio_tower: str = WHISPER,
        language_model: str = LANGUAGE_MODEL,
        audio_hidden_size: int = 384,
        hidden_size: int = 576,
        num_attention_heads: int = 9,
        vocab_size: int = 49_152,
        audio_placeholder_id: int = 49_152,
        ctc_head: str | None = None,
        whole_window: bool = False,
        frame_stack: int = 2,
        adapter_dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        semantics: str = "paper",
        attend: str | None = None,
        keep: str | None = None,
        keys: str | None = None,
        ctc_weight: float = 0.3,
        lora_rank: int = 64,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        lora_target_modules: tuple[str, ...] | list[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        quantization: str | None = None,
        spec_augment_time_masks: int = 2,
        spec_augment_time_width: int = 10,
        spec_augment_mel_masks: int = 2,
        spec_augment_mel_width: int = 10,
        implementation: str = "fused",
        packed: bool = True,
        exact: bool = False,
        template_date: str = TEMPLATE_DATE,
        ctc_space_label: bool = False,
        stage: int = 0,
        config_version: int = CONFIG_VERSION,
        **kwargs: Any,
    ):
        # Checked first, because a newer version may know values that this one refuses.
        if not isinstance(config_version, int) or config_version > CONFIG_VERSION:
            raise ValueError(
                f"config_version = {config_version!r}, but this soundwave reads up to {CONFIG_VERSION}: "
                "the model was saved by a newer version; upgrade soundwave"
            )
        sizes = {
            "audio_hidden_size": audio_hidden_size,
            "hidden_size": hidden_size,
            "num_attention_heads": num_attention_heads,
            "vocab_size": vocab_size,
            "frame_stack": frame_stack,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}, but it must be a whole number from 1 up")
        if ctc_head is not None and (not isinstance(audio_placeholder_id, int) or audio_placeholder_id >= vocab_size):
            raise ValueError(
                f"audio_placeholder_id = {audio_placeholder_id!r}, but with a ctc_head of its own it must be below "
                f"vocab_size = {vocab_size}, because its row is the blank"
            )
        rules = SEMANTICS[_one_of("semantics", semantics, tuple(SEMANTICS))]
        self.audio_tower = audio_tower
        self.language_model = language_model
        self.audio_hidden_size = audio_hidden_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.vocab_size = vocab_size
        self.audio_placeholder_id = audio_placeholder_id
        self.ctc_head = ctc_head
        self.whole_window = whole_window
        self.frame_stack = frame_stack
        self.adapter_dropout = adapter_dropout
        self.layer_norm_eps = layer_norm_eps
        self.semantics = semantics
        self.attend = _one_of("attend", attend or rules["attend"], ("frames", "self"))
        self.keep = _one_of("keep", keep or rules["keep"], ("peaks", "runs", "frames"))
        self.keys = _one_of("keys", keys or rules["keys"], ("all", "kept", "none"))
        self.ctc_weight = ctc_weight
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_target_modules = list(lora_target_modules)
        self.quantization = _one_of("quantization", quantization, (None, "nf4"))
        self.spec_augment_time_masks = spec_augment_time_masks
        self.spec_augment_time_width = spec_augment_time_width
        self.spec_augment_mel_masks = spec_augment_mel_masks
        self.spec_augment_mel_width = spec_augment_mel_width
        self.implementation = _one_of("implementation", implementation, ("fused", "eager"))
        self.packed = packed
        self.exact = exact
        self.template_date = _day("template_date", template_date)
        self.ctc_space_label = ctc_space_label
        self.stage = stage
        self.config_version = CONFIG_VERSION
        super().__init__(**kwargs)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size = {hidden_size}, but it must be a multiple of num_attention_heads = {num_attention_heads}"
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The values of a saved configuration, with the folders that it names relative to itself made absolute.

        Those of a checkpoint in the released layout are turned into ours: it is its own backbones and CTC head.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and values.get("model_type") == released.MODEL_TYPE:
            values = _of_released(released.released_values(folder)) | dict.fromkeys(BACKBONES, str(folder.resolve()))
        for name in BACKBONES:
            value = values.get(name)
            if isinstance(value, str) and value.startswith(("./", "../")) and (folder / value).is_dir():
                values[name] = str((folder / value).resolve())
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in a dictionary, e.g. a saved one, with values overridden by `kwargs`.

        The new values are checked as in `__init__`, and a new `semantics` also sets `attend`, `keep` and `keys`. The
        inherited method would set attributes afterwards, without any check.
        """
        known = inspect.signature(cls.__init__).parameters
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        rules = SEMANTICS["paper"] if "semantics" in changes else {}
        saved = {"ctc_space_label": True}  # Version 0.1 saved no such key.
        saved |= {name: value for name, value in config_dict.items() if name not in rules}
        return super().from_dict(saved | changes, **kwargs)

    @classmethod
    def from_backbones(cls, audio_tower: str, language_model: str, **kwargs: Any) -> "SoundwaveConfig":
        """The configuration whose sizes fit two backbones; their weights are not read.

        `audio_placeholder_id` is the first id that the tokenizer does not use; `SoundwaveProcessor` adds the token.

        Raises:
            ValueError: `audio_tower` is no Whisper model, or `language_model` none that can be trained; the message
                names the setting.
        """
        # Imported here: they import torch and transformers' models, which a configuration alone does not need.
        from soundwave.backbones.check import check_language_model, check_tokenizer, check_whisper

        audio = check_whisper(audio_tower)
        lora = {name: getattr(cls(), name) for name in ("lora_rank", "lora_target_modules")} | kwargs
        targets = lora["lora_target_modules"] if lora["lora_rank"] else ()
        language = check_language_model(language_model, targets).get_text_config()
        sizes = {
            "audio_hidden_size": audio.d_model,
            "hidden_size": language.hidden_size,
            "num_attention_heads": language.num_attention_heads,
            "vocab_size": language.vocab_size,
            "audio_placeholder_id": len(check_tokenizer(language_model)),
        }
        return cls(audio_tower=audio_tower, language_model=language_model, **{**sizes, **kwargs})


def _of_released(values: dict[str, Any]) -> dict[str, Any]:
    """Our configuration for the released checkpoint with these values, but for the folders."""
    return {
        "model_type": SoundwaveConfig.model_type,
        "audio_hidden_size": values["adapter_size"],
        "hidden_size": values["hidden_size"],
        "num_attention_heads": values["num_attention_heads"],
        "vocab_size": values["vocab_size"],
        "audio_placeholder_id": values["audio_patch_token"],
        "whole_window": True,
        "semantics": "released",
        "lora_rank": 0,  # what LoRA has learnt is part of its language model
        "stage": 3,
        "ctc_space_label": False,
    } | SEMANTICS["released"]


def _day(name: str, value: Any) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}, but it must be a day, e.g. {TEMPLATE_DATE}") from None


def _one_of(name: str, value: Any, allowed: tuple) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}, but it must be one of {list(allowed)}")
    return value
