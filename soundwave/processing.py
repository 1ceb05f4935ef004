"""The old name of `soundwave.model.processing`, kept for one version."""

from soundwave.model.processing import AUDIO_TOKEN as AUDIO_TOKEN
from soundwave.model.processing import SoundwaveProcessor as SoundwaveProcessor
