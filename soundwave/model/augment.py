"""SpecAugment, the augmentation of log-mel features while training."""

import torch
from torch import Tensor

from soundwave.model.configuration import SoundwaveConfig


def spec_augment(features: Tensor, lengths: Tensor, config: SoundwaveConfig) -> Tensor:
    """SpecAugment (arXiv 1904.08779) without time warping: masked features become 0, the middle of Whisper's scale.

    The random numbers come from torch's generator of the features' device. A checkpoint holds its state, so a resumed
    run draws the same masks.

    Args:
        features: [A, n_mels, T_mel], log-mel.
        lengths: int [A], in mel frames. A time mask covers at most a fifth of its clip.
        config: number and width of the masks.

    Returns:
        A masked copy of the features.
    """
    batch, mels, frames = features.shape

    def masked(size: int, count: int, width: Tensor, limit: Tensor) -> Tensor:
        shape = (batch, count, 1)
        widths = torch.rand(shape, device=features.device) * (width[:, None, None] + 1)
        starts = torch.rand(shape, device=features.device) * (limit[:, None, None] - widths).clamp(min=0)
        position = torch.arange(size, device=features.device)
        return ((position >= starts.floor()) & (position < starts.floor() + widths.floor())).any(1)

    time_width = torch.clamp(lengths // 5, max=config.spec_augment_time_width)
    mel_width = torch.full_like(lengths, config.spec_augment_mel_width)
    in_time = masked(frames, config.spec_augment_time_masks, time_width, lengths)
    in_mel = masked(mels, config.spec_augment_mel_masks, mel_width, torch.full_like(lengths, mels))
    return features.masked_fill(in_time[:, None, :] | in_mel[:, :, None], 0.0)
