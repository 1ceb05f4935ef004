"""The old name of `soundwave.evaluation.intervals`, kept for one version."""

from soundwave.evaluation.intervals import TASKS as TASKS
from soundwave.evaluation.intervals import differences as differences
from soundwave.evaluation.intervals import estimates
from soundwave.evaluation.intervals import markdown as markdown
from soundwave.evaluation.intervals import tally as tally

scores = estimates
