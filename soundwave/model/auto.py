"""transformers' auto classes know Soundwave after `import soundwave`, which imports neither torch nor transformers.

`AutoConfig`, `AutoModel`, `AutoModelForSpeechSeq2Seq` and `AutoProcessor` each have a `register`, which needs their
module and our class. So `announce` puts a finder before Python's own, which has the import of each of these modules
followed by `register`, and changes nothing else.

Nothing is imported then, because transformers may be in the middle of importing what our modules need. As long as one
of our classes is not imported, a stand-in is registered for it, which imports it when it is asked for an object.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

CONFIG, MODEL, PROCESSOR = (
    f"transformers.models.auto.{part}_auto" for part in ("configuration", "modeling", "processing")
)
OURS = {
    "soundwave.model.configuration": "SoundwaveConfig",
    "soundwave.model.modeling": "SoundwaveForConditionalGeneration",
    "soundwave.model.processing": "SoundwaveProcessor",
}
AWAITED = (CONFIG, MODEL, PROCESSOR, *OURS)


class _ConfigLater:
    """Stands for SoundwaveConfig."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from soundwave.model.configuration import SoundwaveConfig

        return SoundwaveConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        from soundwave.model.configuration import SoundwaveConfig

        return SoundwaveConfig.from_dict(*args, **kwargs)


class _ModelLater:
    """Stands for SoundwaveForConditionalGeneration."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from soundwave.model.modeling import SoundwaveForConditionalGeneration

        return SoundwaveForConditionalGeneration.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        from soundwave.model.modeling import SoundwaveForConditionalGeneration

        return SoundwaveForConditionalGeneration._from_config(*args, **kwargs)


class _ProcessorLater:
    """Stands for SoundwaveProcessor."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from soundwave.model.processing import SoundwaveProcessor

        return SoundwaveProcessor.from_pretrained(*args, **kwargs)


def register() -> None:
    """Register our classes, or their stand-ins, with those auto classes whose modules are imported."""
    config, model, processor = (getattr(sys.modules.get(name), OURS[name], None) for name in OURS)
    auto_config, auto_model, auto_processor = (_imported(name) for name in (CONFIG, MODEL, PROCESSOR))
    if auto_config:
        auto_config.AutoConfig.register("soundwave", config or _ConfigLater, exist_ok=True)
    if not config:  # the others are registered for this class: when it is imported
        return
    if auto_model:
        for auto in (auto_model.AutoModel, auto_model.AutoModelForSpeechSeq2Seq):
            auto.register(config, model or _ModelLater, exist_ok=True)
    if auto_processor:
        auto_processor.AutoProcessor.register(config, processor or _ProcessorLater, exist_ok=True)


def _imported(name: str) -> Any:
    """A module of transformers that is imported to its end; None if it is not."""
    module = sys.modules.get(name)
    return module if hasattr(module, "__all__") else None


class _Finder(MetaPathFinder):
    """Finds the modules of `AWAITED` where Python itself does, and has them followed by `register`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in AWAITED else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """A module's own loader, followed by `register`."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register()


def announce() -> None:
    """Have Soundwave registered: at once where it can be, and after each import that is missing for it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    register()
