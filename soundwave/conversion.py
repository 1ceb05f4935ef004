"""The old name of `soundwave.backbones.conversion`, kept for one version."""

from soundwave.backbones.conversion import convert_smollm2 as convert_smollm2
from soundwave.backbones.conversion import convert_whisper as convert_whisper
