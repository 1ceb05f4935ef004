"""What the Soundwave model consists of, and how it is loaded and saved; `modeling` computes with it.

Every stage loads only what it needs: stage I loads no language model, only its output embedding, which is the CTC
head. A folder holds the trained parts only, and names the backbones.
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from soundwave import eager, fused
from soundwave.backbones.check import check_released, read_config, skeleton
from soundwave.backbones.load import (
    check_language_model_files,
    find_ctc_head,
    load_encoder,
    load_language_model,
    load_output_embedding,
)
from soundwave.backbones.released import is_released, our_name
from soundwave.backbones.shards import WEIGHTS_FILE, Stored, fault_of_shapes, read_tensors, stored_in
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.hub import arguments_of_auto, copy_records, push

if TYPE_CHECKING:
    from typing_extensions import Self

ADAPTERS = {"fused": fused, "eager": eager}  # the modules that hold them, by `SoundwaveConfig.implementation`


class SoundwavePreTrainedModel(PreTrainedModel):
    """The parts of a Soundwave model: frozen backbones, adapters, LoRA. `SoundwaveForConditionalGeneration` runs it."""

    config_class = SoundwaveConfig
    config: SoundwaveConfig
    audio_tower: Any  # Whisper's encoder; None until it is loaded
    language_model: Any  # a causal language model; None in stage I
    _head: Tensor | None  # its output embedding, in stage I
    ctc_head: nn.Parameter | None  # the CTC head [V, D], if it has one of its own (`config.ctc_head`)

    def __init__(
        self,
        config: SoundwaveConfig,
        audio_tower: nn.Module | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        adapters = ADAPTERS[config.implementation]
        self.alignment = adapters.AlignmentAdapter(config)
        self.shrinking = adapters.ShrinkingAdapter(config)
        # With a zero projection the adapter at first only normalises the kept frames. The LLM then learns to read them
        # in half the steps (docs/log.md).
        nn.init.zeros_(self.shrinking.out_proj.weight)
        own_head = config.ctc_head is not None  # then one of its rows is the blank
        self.blank_weight = None if own_head else nn.Parameter(torch.zeros(config.hidden_size))
        self.blank_bias = None if own_head else nn.Parameter(torch.zeros(()))
        self.register_parameter("ctc_head", None)
        self.post_init()
        self.audio_tower = audio_tower
        self.language_model = language_model
        self.register_buffer("_head", None, persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because the modules initialise themselves."""

    @classmethod
    def from_backbones(
        cls, config: SoundwaveConfig, *, dtype: torch.dtype = torch.float32, language_model: bool = True
    ) -> "Self":
        """A model with new adapters on frozen pretrained backbones, in evaluation mode.

        Args:
            dtype: dtype of the backbones; the trained parts stay float32.
            language_model: False loads only the CTC head, which is the language model's output embedding unless
                `config.ctc_head` is set (stage I).

        Raises:
            ValueError: the language model has other sizes than the configuration.
        """
        for name in dict.fromkeys((config.audio_tower, config.language_model, config.ctc_head)):
            if name is not None and is_released(name):
                check_released(name)
        width = read_config("audio_tower", config.audio_tower).d_model
        if width != config.audio_hidden_size:
            raise ValueError(
                f"audio_hidden_size = {config.audio_hidden_size}, but audio_tower = {config.audio_tower!r} is {width} "
                "wide; name a Whisper of the size that the adapters were trained with"
            )
        if language_model:
            check_language_model_files(config.language_model)
        ctc_head = None if config.ctc_head is None else find_ctc_head(config.ctc_head)
        if ctc_head is not None:
            cls._expect_sizes(config, f"{config.ctc_head} has a CTC head", ctc_head.shape)
        model = cls(config)
        if not language_model and config.ctc_head is None:
            model._head = load_output_embedding(config.language_model).to(dtype)
        model.audio_tower = load_encoder(config.audio_tower, dtype)
        if language_model:
            model.language_model = load_language_model(config.language_model, dtype, quantization=config.quantization)
            if config.lora_rank:
                model.add_lora()
        if ctc_head is not None:
            head = next(tensor for _, tensor in read_tensors({"": ctc_head}, [""]))
            model.ctc_head = nn.Parameter(head.to(dtype), requires_grad=False)
        if language_model or config.ctc_head is None:
            cls._expect_sizes(config, f"{config.language_model} has an output embedding", model.head_weight.shape)
        return model.eval()

    @staticmethod
    def _expect_sizes(config: SoundwaveConfig, what: str, shape: tuple[int, ...]) -> None:
        rows, width = shape
        if (rows, width) != (config.vocab_size, config.hidden_size):
            sizes = f"vocab_size, hidden_size = {config.vocab_size}, {config.hidden_size}"
            raise ValueError(f"{sizes}, but {what} of {rows} x {width}")

    def add_lora(self) -> None:
        """Add new LoRA matrices in float32 to the language model (peft).

        Raises:
            ValueError: the language model has no module of a name in `lora_target_modules`; peft would ignore the name.
        """
        from peft import LoraConfig

        config = self.config
        there = {name.rpartition(".")[2] for name, _ in self.language_model.named_modules()}
        missing = [name for name in config.lora_target_modules if name not in there]
        if missing:
            raise ValueError(
                f"lora_target_modules names {missing[0]!r}, but {config.language_model} has no such module: Soundwave "
                "trains language models of Llama's layout"
            )
        self.language_model.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(config.lora_target_modules),
                task_type="CAUSAL_LM",
            )
        )
        for name, parameter in self.language_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        language_model: bool = True,
        **config_changes: Any,
    ) -> "Self":
        """Load the trained parts of `folder` onto the backbones that its configuration names; in evaluation mode.

        Weights are read one after another. What can be told from the headers of the files is checked before.

        Args:
            folder: folder that `save_pretrained` wrote, with `config.json` and `model.safetensors`; or a checkpoint in
                the layout of the released one, which holds its backbones, too. A text may be a Hub id, "owner/name".
            dtype, language_model: as in `from_backbones`. The dtype may be a name, or "auto": the fastest one here.
            config_changes: values that replace those of the saved configuration, e.g. `quantization="nf4"`. A model
                without LoRA gets new matrices by `lora_rank=…`.

        Raises:
            FileNotFoundError: the folder holds no Soundwave model.
            ValueError: the file is damaged, its parameters are not exactly those that the configuration calls trained,
                or `config_changes` has an unknown name.
        """
        folder, dtype, config_changes = arguments_of_auto(folder, dtype, config_changes)
        released = is_released(folder)
        for name in ("config.json", *(() if released else (WEIGHTS_FILE,))):
            if not (folder / name).is_file():
                pickle = "; its pytorch_model.bin is a pickle, which is not read"
                why = pickle if (folder / "pytorch_model.bin").is_file() else ""
                raise FileNotFoundError(f"{folder} holds no Soundwave model: {name} is missing{why}")
        config, unknown = SoundwaveConfig.from_pretrained(folder, return_unused_kwargs=True, **config_changes)
        if unknown:
            raise ValueError(f"{next(iter(unknown))!r} is no setting of SoundwaveConfig; correct its name")
        if released:
            stored = {ours: at for name, at in check_released(folder).items() if (ours := our_name(name))}
        else:
            try:
                stored = stored_in(folder / WEIGHTS_FILE)
            except SafetensorError as error:
                raise ValueError(f"{folder / WEIGHTS_FILE} is damaged ({error}); copy it again") from None
        if not language_model:
            stored = {name: where for name, where in stored.items() if not name.startswith("language_model.")}
        new_lora = bool(config.lora_rank) and not SoundwaveConfig.from_pretrained(folder).lora_rank
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            empty = cls(config)
            if language_model and config.lora_rank and config.stage >= 2:
                empty.language_model = skeleton(read_config("language_model", config.language_model))
                if empty.language_model is not None:
                    empty.add_lora()
        lora_known = not language_model or empty.language_model is not None or not config.lora_rank
        _refuse_misfit(
            folder,
            {name: where for name, where in stored.items() if lora_known or ".lora_" not in name},
            empty._saved_shapes(new_lora),
        )
        model = cls.from_backbones(config, dtype=dtype, language_model=language_model)
        _refuse_misfit(folder, stored, model._saved_shapes(new_lora))
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in read_tensors(stored, stored):
                own[name].copy_(tensor)
        config.name_or_path = folder
        return model

    def _saved_shapes(self, new_lora: bool = False) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters in a saved model's file, which has no LoRA matrices if these are new."""
        return {
            name: tuple(parameter.shape)
            for name, parameter in self.trained_state_dict().items()
            if not (new_lora and ".lora_" in name)
        }

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The parameters that training has changed up to `config.stage`, by name. A saved model holds these."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(trained_prefixes(self.config.stage)) or (self.config.stage >= 2 and ".lora_" in name)
        }

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `config.json` and the trained parts (`model.safetensors`) to a folder.

        Trainer passes `state_dict`, `is_main_process` and others; the state is always read from the model itself.

        Raises:
            ValueError: a model of this stage has LoRA matrices, but it was loaded without its language model.
        """
        if self.config.stage >= 2 and self.config.lora_rank and self.language_model is None:
            raise ValueError(
                f"the model has seen stage {self.config.stage}, but was loaded with language_model=False: "
                "saving it would lose its LoRA matrices; load it whole"
            )
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub = True, but save_pretrained does not upload; call model.push_to_hub(repo_id)")
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        state = {name: parameter.detach().cpu().contiguous() for name, parameter in self.trained_state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read the file.
        (folder / WEIGHTS_FILE).chmod((folder / "config.json").stat().st_mode)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload the model to the Hub, with the card and the records of the folder that it was loaded from.

        Args:
            repo_id, settings: as in `soundwave.model.hub.push`.

        Returns:
            The address of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            copy_records(self.config.name_or_path or folder, folder)
            return push(folder, repo_id, **settings)

    @property
    def head_weight(self) -> Tensor:
        """The language model's output embedding [V, D]: the frozen rows of the CTC head."""
        if self.language_model is not None:
            return self.language_model.get_output_embeddings().weight
        if self._head is None:
            raise ValueError("the model has no language model and no output embedding; build it with from_backbones")
        return self._head


def _refuse_misfit(folder: Path, stored: dict[str, Stored], expected: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the stored parameters are exactly the expected ones."""
    if set(stored) != set(expected):
        missing, unknown = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit its configuration: "
            f"{len(missing)} parameters missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    if fault := fault_of_shapes(stored, expected):
        raise ValueError(fault)


def trained_prefixes(stage: int) -> tuple[str, ...]:
    """Prefixes of the parameters outside the language model that are trained at the end of a stage."""
    alignment = ("alignment.", "blank_weight", "blank_bias")
    return () if stage < 1 else alignment if stage == 1 else (*alignment, "shrinking.")


def freeze_all_but(model: nn.Module, prefixes: Iterable[str]) -> list[str]:
    """Let only parameters train whose name starts with one of `prefixes` ("lora": all LoRA matrices) -> their names."""
    prefixes = tuple(prefixes)
    trained = []
    for name, parameter in model.named_parameters():
        wanted = name.startswith(prefixes) or ("lora" in prefixes and ".lora_" in name)
        parameter.requires_grad_(wanted)
        if wanted:
            trained.append(name)
    return trained
