"""The old name of `soundwave.model.modeling`, kept for one version."""

from soundwave.backbones.load import load_output_embedding as load_output_embedding
from soundwave.model.augment import spec_augment as spec_augment
from soundwave.model.modeling import WEIGHTS_FILE as WEIGHTS_FILE
from soundwave.model.modeling import SoundwaveForConditionalGeneration as SoundwaveForConditionalGeneration
from soundwave.model.modeling import SoundwaveOutput as SoundwaveOutput
from soundwave.model.modeling import batch_to as batch_to
from soundwave.model.modeling import freeze_all_but as freeze_all_but
