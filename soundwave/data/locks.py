"""A lock that keeps two processes out of one folder."""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from soundwave.data.audio import shown

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without locks


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def locked(file: Path, what: Path, busy: Exception, say: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Hold a lock, which the system releases when the process ends, even when it is killed.

    On a file system without locks the work goes on without one, which is said.

    Args:
        file: made if it is missing; it stays.
        what: what is locked, as a message names it.
        busy: raised where another process holds the lock.
        say: called with a line for the user.

    Raises:
        OSError: the file cannot be written.
    """
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise busy from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"{shown(what)} cannot be locked ({error.strerror}): make sure that no other process writes there")
    try:
        yield
    finally:
        lock.release()
