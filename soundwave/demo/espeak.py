"""The old name of `soundwave.curation.espeak`, kept for one version."""

from soundwave.curation.espeak import Espeak as Espeak
from soundwave.curation.espeak import Spoken as Spoken
from soundwave.curation.espeak import SpokenWord as SpokenWord
