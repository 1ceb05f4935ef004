"""The old name of `soundwave.demo.tasks`, kept for one version."""

from soundwave.demo.tasks import FORMATS as FORMATS
from soundwave.demo.tasks import INTENTS as INTENTS
from soundwave.demo.tasks import PROMPTS as PROMPTS
from soundwave.demo.tasks import RATES as RATES
from soundwave.demo.tasks import SEXES as SEXES
from soundwave.demo.tasks import phrase as phrase
