"""The old name of `soundwave.backbones.wheels` and `soundwave.curation.espeak`, kept for one version."""

from soundwave.backbones import LANGUAGE_MODEL as LANGUAGE_MODEL
from soundwave.backbones import WHISPER as WHISPER
from soundwave.backbones.wheels import EmbeddedError as EmbeddedError
from soundwave.backbones.wheels import cache_dir as cache_dir
from soundwave.backbones.wheels import folder_of as folder_of
from soundwave.backbones.wheels import resolve as resolve
from soundwave.curation.espeak import Espeak as Espeak
