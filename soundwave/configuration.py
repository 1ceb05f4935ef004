"""The old name of `soundwave.model.configuration`, kept for one version."""

from soundwave.model.configuration import CONFIG_VERSION as CONFIG_VERSION
from soundwave.model.configuration import SEMANTICS as SEMANTICS
from soundwave.model.configuration import SoundwaveConfig as SoundwaveConfig
