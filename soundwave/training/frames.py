"""Training from frames that `soundwave features` has written: what is refused, and what is said, before it begins."""

from contextlib import suppress

import torch

from soundwave.data.audio import AudioError, shown
from soundwave.data.collate import CheckedCollator
from soundwave.data.features import FEW_FRAMES, Features
from soundwave.data.samples import Samples
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.training.journal import say
from soundwave.training.settings import ConfigError, StageConfig

LOOKED_AT = 20_000  # samples whose frames are looked for before training
COMPARED = 8  # recordings that are encoded again to compare their frames


def open_frames(config: StageConfig) -> Features | None:
    """The frames that a stage reads in place of recordings.

    Raises:
        ConfigError, FeaturesError: they cannot take the place of recordings.
    """
    if config.features is None:
        return None
    found = f"features = {str(config.features)!r}, but"
    if config.spec_augment:
        raise ConfigError(
            f"{found} spec_augment = True masks other parts of a recording in each epoch, and its frames are of whole "
            "ones; give spec_augment=false, or leave out features"
        )
    if config.implementation != "fused" or not config.packed:
        raise ConfigError(
            f"{found} its frames are of packed rows, with other last bits than padded ones; give implementation=fused "
            "and packed=true, or leave out features"
        )
    return Features(config.features)


def refuse_missing_frames(config: StageConfig, features: Features, samples: Samples) -> None:
    """ConfigError if the frames have another dtype, or samples have none; of many samples some are looked at.

    One that is not looked at is left out, with its name, when its batch is made.
    """
    if features.about["dtype"] != config.dtype:
        raise ConfigError(
            f"dtype = {config.dtype!r}, but features = {str(config.features)!r} holds frames of "
            f"{features.about['dtype']!r}; give dtype={features.about['dtype']}, or leave out features"
        )
    for sample in samples[:: max(1, len(samples) // LOOKED_AT)]:
        if sample.audio is not None and not features.holds(sample):
            raise ConfigError(
                f"features = {str(config.features)!r} holds no frames of {sample.id} ({shown(sample.audio)}, offset "
                f"{sample.offset:g}, duration {sample.duration:g}); write those of this manifest: soundwave features"
            )


@torch.no_grad()
def compare_frames(
    config: StageConfig,
    model: SoundwaveForConditionalGeneration,
    reader: CheckedCollator,
    features: Features,
    samples: Samples,
) -> None:
    """Say it if the encoder gives other bits for the first recordings than there are in the folder of frames."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for sample in (sample for sample in samples[: 4 * COMPARED] if sample.audio is not None):
        with suppress(AudioError):  # such a sample is left out, with a message, when its batch is made
            clip, frames = reader.clip(sample), features.of(sample).rows
            found += [(clip, frames)] if isinstance(clip, torch.Tensor) else []
        if len(found) == COMPARED:
            break
    if sum(len(frames) for _, frames in found) < FEW_FRAMES:
        return
    inputs, dtype = reader.processor.pad_features([clip for clip, _ in found]), model.compute_dtype
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        own, _ = model.encode(inputs["input_features"].to(model.device), inputs["feature_lengths"], packed=True)
    kept = torch.cat([frames for _, frames in found])
    own = own.to(kept.dtype).cpu().float()
    off = float((own - kept.float()).norm() / own.norm())
    if off > 0:
        say(
            f"the encoder gives other last bits here than in {config.features} (by {off:.1g} of the frames), "
            "because they depend on the device and on what is encoded together: the weights will not be those of a run "
            "without features, bit for bit"
        )
