"""Processes that load data: what is said when one has died, and what they do at Ctrl-C."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\) (?P<how>[^\n.]*)")


@contextmanager
def lost_worker_named(kind: type[Exception], goes_on: str) -> Iterator[None]:
    """Raise `kind` in place of torch's error where a process that loads data has died.

    Args:
        goes_on: where the same command goes on, e.g. "from the newest checkpoint".
    """
    try:
        yield
    except RuntimeError as error:
        found = LOST.search(str(error))
        if found is None:
            raise
        raise kind(
            f"a process that loads data (pid {found['pid']}) {found['how'].strip()}; if the memory was full, use fewer "
            f"workers; the same command goes on {goes_on}"
        ) from error


def ignore_ctrl_c(worker: int) -> None:
    """Leave Ctrl-C, which all processes of a group get, to the first one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
