"""The old name of `soundwave.model.modeling`, kept for one version."""

from soundwave.model.modeling import WEIGHTS_FILE as WEIGHTS_FILE
from soundwave.model.modeling import SoundwaveForConditionalGeneration as SoundwaveForConditionalGeneration
from soundwave.model.modeling import SoundwaveOutput as SoundwaveOutput
from soundwave.model.modeling import batch_to as batch_to
from soundwave.model.modeling import freeze_all_but as freeze_all_but
