"""How much memory this process may take, where the machine has more than its container.

control groups                           what is free
version 2: memory.max a number           memory.max - memory.current + file cache
version 2: memory.max "max"              no limit
version 1                                memory.limit_in_bytes - memory.usage_in_bytes + file cache
a group below one that has a limit       the smaller of the two
a path of the host, seen in a container  that of the root, which is the container's own
none, or a file that cannot be read      what the machine has
"""

import psutil
import pytest
import torch

from soundwave import hardware

MIB = 2**20


def group(root, path, *, limit, used, active=0, inactive=0, version=2):
    """Write the files of a control group, sizes in MiB; `limit` may be a text."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit = limit if isinstance(limit, str) else str(limit * MIB)
    prefix = "" if version == 2 else "total_"
    cache = f"anon 5\n{prefix}active_file {active * MIB}\n{prefix}inactive_file {inactive * MIB}\n"
    if version == 1:
        cache = f"active_file 1\ninactive_file 1\n{cache}"  # of the group without those below it
    for name, text in zip((*names, "memory.stat"), (limit, str(used * MIB), cache), strict=True):
        (folder / name).write_text(text if name == "memory.stat" else f"{text}\n")


@pytest.fixture
def free(tmp_path, monkeypatch):
    """free(line of /proc/self/cgroup, ...) is the free memory in MiB on a machine that has 1000 of them."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000 * MIB}))

    def of(*lines):
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
        return hardware.free_bytes("cpu", tmp_path) / MIB

    return of


def test_a_container_of_version_2_has_its_own_limit(tmp_path, free):
    group(tmp_path, "", limit=300, used=200, active=30, inactive=50)
    assert free("0::/") == 300 - 200 + 80


def test_a_group_without_a_limit_has_what_the_machine_has(tmp_path, free):
    group(tmp_path, "a/b", limit="max", used=200)
    assert free("0::/a/b") == 1000


@pytest.mark.parametrize(("above", "below", "wanted"), [(300, 250, 50), (300, 900, 100), ("max", 280, 80)])
def test_each_group_above_counts(tmp_path, free, above, below, wanted):
    group(tmp_path, "a", limit=above, used=200)
    group(tmp_path, "a/b c", limit=below, used=200)
    assert free("0::/a/b c") == wanted


def test_a_group_over_its_limit_has_nothing(tmp_path, free):
    group(tmp_path, "a", limit=100, used=120)
    assert free("0::/a") == 0


@pytest.mark.parametrize("controllers", ["memory", "cpuset,memory,pids"])
def test_a_container_of_version_1_has_its_own_limit(tmp_path, free, controllers):
    group(tmp_path, "memory", limit="9223372036854771712", used=700, version=1)
    group(tmp_path, "memory/job", limit=300, used=200, inactive=70, version=1)
    (tmp_path / "sys/fs/cgroup/pids/job").mkdir(parents=True)
    assert free("9:pids:/job", f"4:{controllers}:/job", "1:name=systemd:/job", "0::/") == 170


def test_a_path_of_the_host_stands_for_the_containers_root(tmp_path, free):
    group(tmp_path, "memory", limit=300, used=100, version=1)
    assert free("4:memory:/docker/0123abc", "0::/system.slice/docker.service") == 200


@pytest.mark.parametrize("lines", [[], ["0::/gone"], ["4:memory:/gone"], ["0::/../../outside"]], ids=str)
def test_without_files_the_machine_decides(free, lines):
    assert free(*lines) == 1000


def test_without_control_groups_the_machine_decides(tmp_path):
    assert hardware.free_bytes("cpu", tmp_path) > MIB


def test_memory_that_torch_holds_without_using_it_is_free(monkeypatch):
    sizes = {"mem_get_info": (100, 900), "memory_reserved": 70, "memory_allocated": 20}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size)
    assert hardware.free_bytes("cuda") == 150


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_errors_of_memory_are_known_by_their_words(said):
    assert hardware.is_out_of_memory(RuntimeError(said))
    assert not hardware.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not hardware.is_out_of_memory(ValueError(said))
