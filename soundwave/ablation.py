"""The old name of `soundwave.demo.ablation`, kept for one version."""

from soundwave.demo.ablation import ALIGNMENTS as ALIGNMENTS
from soundwave.demo.ablation import VARIANTS as VARIANTS
from soundwave.demo.ablation import run_ablations as run_ablations
