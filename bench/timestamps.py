"""Measure how far the times of words are from the true ones, which the speech synthesiser knows.

    python bench/timestamps.py MODEL [--clips 250] [--unseen-voices]

It speaks sentences that the embedded corpus keeps for its test, in its voices and rates, transcribes each of them, and
compares the words that are right with what the synthesiser has told. It prints a table: the median and mean distance
and the 90th percentile of the beginnings and the ends, in milliseconds, and how much too late they are (median).
"""

import argparse
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from soundwave.demo.corpus import timed_speech
from soundwave.evaluation.progress import Progress
from soundwave.inference.answer import load_model
from soundwave.inference.long import transcribe


def letters(word: str) -> str:
    """A word without punctuation, in small letters."""
    return "".join(letter for letter in word if letter.isalnum()).casefold()


def main(folder: Path, clips: int, unseen_voices: bool) -> None:
    """Print the table."""
    loaded = load_model(folder)
    starts, ends, words = [], [], 0
    with Progress("transcribing", clips, unit="clip") as progress:
        for spoken in timed_speech(clips, unseen_voices=unseen_voices):
            found = transcribe(spoken.samples, loaded, timestamps="word").words or ()
            a, b = [letters(word.word) for word in spoken.words], [letters(word.word) for word in found]
            words += len(a)
            for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
                for true, word in zip(spoken.words[block.a :][: block.size], found[block.b :], strict=False):
                    starts.append(1000 * (word.start - true.start))
                    ends.append(1000 * (word.end - true.end))
            progress.step()
    print(f"{clips} clips, {words} words, {len(starts)} of them right\n")
    print("| of words | median distance, ms | mean | 90 % within | too late by |")
    print("|---|---:|---:|---:|---:|")
    for name, errors in (("beginnings", np.array(starts)), ("ends", np.array(ends))):
        far = np.abs(errors)
        quantiles = np.median(far), far.mean(), np.quantile(far, 0.9), np.median(errors)
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in quantiles) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("--clips", type=int, default=250)
    parser.add_argument("--unseen-voices", action="store_true", help="two voices that the model has not heard")
    given = parser.parse_args()
    main(given.model, given.clips, given.unseen_voices)
