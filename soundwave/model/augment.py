"""SpecAugment, the augmentation of log-mel features while training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from soundwave.model.configuration import SoundwaveConfig


def spec_augment(
    features: Tensor, lengths: Tensor, config: SoundwaveConfig, seeds: Sequence[int] | None = None
) -> Tensor:
    """SpecAugment (arXiv 1904.08779) without time warping: masked features become 0, the middle of Whisper's scale.

    The random numbers come from torch's generator of the features' device. A checkpoint holds its state, so a resumed
    run draws the same masks. With seeds the masks of a clip follow from its own seed, whatever else is in the batch.

    Args:
        features: [A, n_mels, T_mel], log-mel.
        lengths: int [A], in mel frames. A time mask covers at most a fifth of its clip.
        config: number and width of the masks.
        seeds: one of each clip.

    Returns:
        A masked copy of the features.
    """
    batch, mels, frames = features.shape
    generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(*shape: int) -> Tensor:
        if generators is None:
            return torch.rand(batch, *shape, device=features.device)
        drawn = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
        return drawn.to(features.device, non_blocking=True)

    def masked(size: int, count: int, width: Tensor, limit: Tensor) -> Tensor:
        widths = uniform(count, 1) * (width[:, None, None] + 1)
        starts = uniform(count, 1) * (limit[:, None, None] - widths).clamp(min=0)
        position = torch.arange(size, device=features.device)
        return ((position >= starts.floor()) & (position < starts.floor() + widths.floor())).any(1)

    time_width = torch.clamp(lengths // 5, max=config.spec_augment_time_width)
    mel_width = torch.full_like(lengths, config.spec_augment_mel_width)
    in_time = masked(frames, config.spec_augment_time_masks, time_width, lengths)
    in_mel = masked(mels, config.spec_augment_mel_masks, mel_width, torch.full_like(lengths, mels))
    return features.masked_fill(in_time[:, None, :] | in_mel[:, :, None], 0.0)
