"""Kill work at random moments with kill -9, without the seconds that a new process needs to import torch."""

import os
import random
import signal
import time
from collections.abc import Callable


def until_done(work: Callable[[], None], kills: int, seconds: float, seed: int = 0) -> int:
    """Do `work` in copies of this process until `kills` of them were killed, and once more to its end.

    Args:
        seconds: what the work takes without kills. The copies live for random times that add up to about half of it,
            so that some of it is left for the last one, however fast the machine is.

    Returns:
        How many copies were killed before they had done their work.
    """
    rng, killed = random.Random(seed), 0
    for number in range(kills + 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        if number < kills:
            time.sleep(rng.uniform(0, seconds / kills))
            os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(ended)
        assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0
    return killed
