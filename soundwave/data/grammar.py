"""The old name of `soundwave.demo.grammar`, kept for one version."""

from soundwave.demo.grammar import COMMANDS as COMMANDS
from soundwave.demo.grammar import Sentence as Sentence
from soundwave.demo.grammar import split_sentences as split_sentences
