"""The old name of `soundwave.demo.corpus`, kept for one version."""

from soundwave.demo.corpus import build_corpus as build_corpus
