"""Soundwave, fused: train and run the speech LLM of arXiv 2502.12900 on one GPU, or on a laptop.

    model = soundwave.load("runs/demo/model")             a trained model and its processor
    soundwave.transcribe("recording.wav", model)          what is said in it
    soundwave.ask("recording.wav", "Who speaks?", model)  an answer about it
    soundwave.fused                                       the operations, losses and adapters, for any model
    soundwave.eager                                       the same in plain PyTorch, their definition

Every name is imported when it is first used, so that `import soundwave` is quick. It also lets transformers'
`AutoConfig`, `AutoModel` and `AutoProcessor` load Soundwave models (`soundwave.model.auto`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from soundwave.model.auto import announce

if TYPE_CHECKING:
    from soundwave import eager, fused
    from soundwave.inference.answer import LoadedModel
    from soundwave.inference.answer import load_model as load
    from soundwave.inference.long import Answer, Transcript, ask, transcribe
    from soundwave.inference.pipeline import SpeechPipeline
    from soundwave.model.configuration import SoundwaveConfig
    from soundwave.model.modeling import SoundwaveForConditionalGeneration
    from soundwave.model.processing import SoundwaveProcessor

__version__ = "0.2.0"
__all__ = [
    "Answer",
    "LoadedModel",
    "SoundwaveConfig",
    "SoundwaveForConditionalGeneration",
    "SoundwaveProcessor",
    "SpeechPipeline",
    "Transcript",
    "__version__",
    "ask",
    "eager",
    "fused",
    "load",
    "transcribe",
]
# Public name: where it is defined, and its name there.
_DEFINED = {
    "Answer": ("soundwave.inference.long", "Answer"),
    "LoadedModel": ("soundwave.inference.answer", "LoadedModel"),
    "SoundwaveConfig": ("soundwave.model.configuration", "SoundwaveConfig"),
    "SoundwaveForConditionalGeneration": ("soundwave.model.modeling", "SoundwaveForConditionalGeneration"),
    "SoundwaveProcessor": ("soundwave.model.processing", "SoundwaveProcessor"),
    "SpeechPipeline": ("soundwave.inference.pipeline", "SpeechPipeline"),
    "Transcript": ("soundwave.inference.long", "Transcript"),
    "ask": ("soundwave.inference.long", "ask"),
    "load": ("soundwave.inference.answer", "load_model"),
    "transcribe": ("soundwave.inference.long", "transcribe"),
}


if not TYPE_CHECKING:  # a type checker would take any name for a public one

    def __getattr__(name: str) -> Any:
        """A public name on its first use."""
        if name in ("eager", "fused"):
            return import_module(f"soundwave.{name}")
        if name not in _DEFINED:
            raise AttributeError(f"module 'soundwave' has no attribute {name!r}")
        module, attribute = _DEFINED[name]
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


announce()
