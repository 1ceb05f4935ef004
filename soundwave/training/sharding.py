"""The language model's frozen layers, shared among the processes of a run by torch's FSDP2.

A process keeps one of N equal parts of every weight of these layers, and has a layer whole only while it computes. What
is trained, and what is read outside of the layers, is whole in each process:

    sharded   the frozen weights of the language model's layers, in 16 or 32 bits
    whole     LoRA, adapters, blank, their gradients and the optimiser's states; the embeddings, since CTC and the loss
              read the output embedding by itself; Whisper, which a process with a batch of text alone does not run

So a checkpoint is the same as without sharding, and either kind of run goes on from it. All processes have to run the
same layers in the same order, or they wait for each other without an end: each batch runs the language model once.

DistributedDataParallel sends gradients as they become known, between the layers that are gathered, and in an order that
differs between a batch of text and one of speech. Here they are averaged after the last backward pass of a step.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soundwave.backbones.check import language_model_bytes, read_config, stored_in_4_bits
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.sizes import Part
from soundwave.training.distributed import count_launched, is_launched
from soundwave.training.settings import ConfigError, StageConfig

BUCKET = 8 << 20  # numbers of the gradients that are sent at once


def check_sharding(config: StageConfig, device_type: str) -> None:
    """Refuse what cannot be sharded, before anything is read.

    Raises:
        ConfigError: `sharding` contradicts another setting, or the launcher.
    """
    if is_launched() and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ConfigError(
            "accelerate launch asks for FSDP, which is a setting here: launch with `torchrun --no-python`, or with "
            "--multi_gpu, and give sharding=fsdp2 quantization=none"
        )
    if config.sharding == "none":
        return
    if config.stage == 1:
        raise ConfigError("sharding = 'fsdp2', but stage 1 loads no layers of the language model: leave it out")
    in_4_bits = config.quantization == "nf4" or (config.quantization == "auto" and device_type == "cuda")
    if in_4_bits:
        which = "the default on a GPU" if config.quantization == "auto" else f"quantization = {config.quantization!r}"
        raise ConfigError(
            f"sharding = 'fsdp2', but weights in 4 bits ({which}) cannot be shared out; give quantization=none, or "
            "leave sharding out: in 4 bits the language model is a third as large"
        )
    if count_launched() < 2:
        raise ConfigError(
            "sharding = 'fsdp2' shares the language model among processes, but this run has one: start it with "
            "`torchrun --nproc-per-node N --no-python soundwave train …`, or leave it out"
        )


def sharded_sizes(parts: list[Part], config: SoundwaveConfig, dtype: torch.dtype) -> list[Part]:
    """The parts that a process keeps of those that `sizes_of` gives.

    Raises:
        ConfigError: the files of the language model are in 4 bits.
    """
    name = config.language_model
    if stored_in_4_bits(name):
        raise ConfigError(
            f"sharding = 'fsdp2', but {name} is stored in 4 bits, which cannot be shared out: leave it out"
        )
    tied = read_config("language_model", name).get_text_config().tie_word_embeddings
    embeddings = (language_model_bytes(name, dtype, whole=False) or 0) * (1 if tied else 2)
    count = count_launched()
    return [
        part._replace(size=embeddings + (part.size - embeddings) // count, what=f"1/{count} of the {part.what}")
        if part.size and part.what.startswith("language model")
        else part
        for part in parts
    ]


def shard_layers(language_model: Any, device_type: str) -> None:
    """Share out the frozen weights of a language model's layers; each layer is on the device afterwards.

    Raises:
        ValueError: the layers are not where Llama has them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = language_model.base_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        kind = language_model.config.model_type
        raise ValueError(f"sharding = 'fsdp2', but a language model of the kind {kind!r} has no `layers`: leave it out")
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))  # their root, with no weight of its own


def shares_of(language_model: Any) -> tuple[int, int]:
    """Bytes of the sharded weights that this process keeps, and of all of them."""
    from torch.distributed.tensor import DTensor

    sharded = [p for p in language_model.parameters() if isinstance(p, DTensor)]
    return sum(p.to_local().nbytes for p in sharded), sum(p.numel() * p.element_size() for p in sharded)


class Replica(nn.Module):
    """The model of a process, beside those of others: what is trained begins with the weights of the first process."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model
        for parameter in self._trained():
            dist.broadcast(parameter.data, src=0)

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        return self.module(**inputs)

    def _trained(self) -> Iterator[Tensor]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Give all processes the mean of their gradients; where one has none, it counts as 0."""
        waiting: list[Tensor] = []
        for parameter in self._trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
            if sum(gradient.numel() for gradient in waiting) >= BUCKET:
                _average(waiting)
                waiting = []
        if waiting:
            _average(waiting)


def _average(gradients: list[Tensor]) -> None:
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
