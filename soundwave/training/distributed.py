"""The processes of a run that a launcher has started, one for each GPU, and what they tell each other.

    torchrun --nproc-per-node 8 --no-python soundwave train 2 …

All processes read the same manifests, hold the same weights, and train on a share of each batch of their own
(`BucketBatchSampler`); torch's DistributedDataParallel averages their gradients. The first process, of rank 0, prints
and writes the files. Whatever decides how a run goes on (a step that is skipped, a sample that is left out, a signal)
is decided by all processes together, because a process that goes another way leaves the others waiting for ever.

These messages are small, and go over gloo between the CPUs, so that no GPU is waited for. A process that has died
closes its connections, so the others know of it at their next message.

torch is imported inside functions: a command that only prints an error has no need of it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets for a process
GRACE = 15.0  # s, for the first process to print the same error and end; on a busy machine 5 s did not suffice
PATIENCE = timedelta(minutes=30)  # for a message: one process may load, or write a checkpoint, while others wait


class LostProcess(RuntimeError):
    """Another process of the run has ended, or cannot be reached. The message is one line."""


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate launch) has started this process as one of a run's."""
    return all(name in os.environ for name in LAUNCHED_BY)


def is_first() -> bool:
    """Whether this process prints and writes: that of rank 0, or the only one."""
    return not is_launched() or int(os.environ["RANK"]) == 0


def count_launched() -> int:
    """Number of processes that a launcher has started; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def refuse_several(command: str) -> None:
    """ValueError: a launcher has started several processes of a command that only one can do."""
    if (count := count_launched()) > 1:
        raise ValueError(
            f"a launcher has started {count} processes of `soundwave {command}`, which runs in one: leave the launcher "
            f"out. Several train a stage together: torchrun --nproc-per-node {count} --no-python soundwave train 1 …"
        )


def name_beside_others() -> str:
    """What to put before an error that is printed now: nothing in the first process, else the name of this one.

    Most errors meet all processes. The first one prints at once and ends, and a launcher then ends the others, which
    wait here. What is printed after the wait is an error of this process alone.
    """
    if is_first():
        return ""
    time.sleep(GRACE)
    return f"process {os.environ['RANK']}: "


class Processes:
    """The processes of a run. All of them have to call the same methods in the same order.

    Without arguments, a run of one process that no launcher has started: nothing is sent.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        launched: whether a launcher has started them; there may still be one only.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, launched: bool = False, group: Any = None):
        self.rank, self.count, self.launched, self._group = rank, count, launched, group

    @property
    def first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def of_first(self, value: Any) -> Any:
        """The value of the first process."""
        return self.gather(value if self.first else None)[0]

    def sums(self, *values: int) -> list[int]:
        """Each of the values, added up over the processes."""
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        together = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(together, group=self._group)
        return together.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one process at least."""
        return self.sums(int(flag))[0] > 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.sums(0)


@contextmanager
def joined(device_type: str) -> Iterator[Processes]:
    """Join the other processes of the run, if a launcher has started this one. On CUDA each gets a GPU of its own.

    Raises:
        ValueError: more processes were started on this machine than it has GPUs.
        LostProcess: another process has ended.
    """
    if not is_launched():
        yield Processes()
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    on_machine, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device_type == "cuda" and on_machine > gpus:
        raise ValueError(
            f"{on_machine} processes were started on this machine, but it has {gpus} GPUs; give --nproc-per-node {gpus}"
        )
    try:
        state = PartialState(cpu=device_type == "cpu", timeout=PATIENCE)
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Processes(state.process_index, state.num_processes, launched=True, group=group)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        what = "does not answer" if "imed out" in str(error) else "has ended, or cannot be reached"
        raise LostProcess(
            f"another process of this run {what}; the same command goes on from the newest checkpoint"
        ) from error


def _is_lost(error: BaseException) -> bool:
    """Whether an error is what torch raises when another process does not answer; gloo has no type of its own."""
    import torch.distributed as dist

    of_gloo = "gloo" in str(error) or "Connection closed by peer" in str(error)
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and of_gloo)
