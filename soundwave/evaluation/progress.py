"""What evaluation and transcription say on stderr while they run: how far they are, and what is left out."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

from tqdm import tqdm

NAMED = 20  # so many samples are named in the lines; `Scores` has all of them
LINES_APART = 10.0  # seconds between two lines of progress where there is no terminal
SURE = 0.05  # share of the samples after which the time that is left can be told


def say(line: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def aside() -> AbstractContextManager[None]:
    """Within its `with` block there is no progress bar in the way of what is printed."""
    return tqdm.external_write_mode()


def named(ids: Sequence[str]) -> str:
    """Ids of samples on one line, the first `NAMED` of them."""
    rest = len(ids) - NAMED
    return ", ".join(ids[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


class Progress:
    """How much is done, for example of the samples: a bar on a terminal, and elsewhere a line every 10 s.

    Args:
        title: what is being done; None shows nothing.
        total: how much there is to do, in units.
        unit: what is counted.
    """

    def __init__(self, title: str | None, total: int, unit: str = "sample"):
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self.start = self.shown = time.monotonic()
        show = title is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True) if show else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        """One more unit is done."""
        self.go_to(self.done + 1)

    def go_to(self, done: int) -> None:
        """So many units are done now, in all."""
        before, self.done = self.done, done
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - before)
        elif self.title is not None and now - self.shown >= LINES_APART:
            self.shown = now
            known = ""
            # The samples of a batch are done one after the other, when the time of all of them is over.
            if done >= max(1, SURE * self.total):
                left = timedelta(seconds=round((now - self.start) / done * (self.total - done)))
                known = f" | {left} left"
            say(f"{self.title} | {self.unit} {done}/{self.total}{known}")
