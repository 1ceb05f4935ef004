"""What an evaluation says on stderr while it runs: how far it is, and what it leaves out."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from tqdm import tqdm

NAMED = 20  # so many samples are named in the lines; `Scores` has all of them
LINES_APART = 10.0  # seconds between two lines of progress where there is no terminal
SURE = 0.05  # share of the samples after which the time that is left can be told


def say(line: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def named(ids: Sequence[str]) -> str:
    """Ids of samples on one line, the first `NAMED` of them."""
    rest = len(ids) - NAMED
    return ", ".join(ids[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


class Progress:
    """How many of the samples are done: a bar on a terminal, and elsewhere a line every 10 s.

    Args:
        title: what is being done; None shows nothing.
        total: number of samples.
    """

    def __init__(self, title: str | None, total: int):
        self.title, self.total, self.done = title, total, 0
        self.start = self.shown = time.monotonic()
        show = title is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=title, unit="sample", dynamic_ncols=True) if show else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        """One more sample is done."""
        self.done += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
        elif self.title is not None and now - self.shown >= LINES_APART:
            self.shown = now
            left = timedelta(seconds=round((now - self.start) / self.done * (self.total - self.done)))
            # The samples of a batch are done one after the other, when the time of all of them is over.
            known = f" | {left} left" if self.done >= SURE * self.total else ""
            say(f"{self.title} | sample {self.done}/{self.total}{known}")
