"""Runs the PTX that Triton compiles on the CPU, in numpy, and checks what it does with memory.

    launch = Launch(program(ptx), (blocks, 1, 1), num_threads, shared, params, [Allocation(base, nbytes, "X")])
    report = launch.run()
    assert not report.findings

PTX is what ptxas gets: shuffles, barriers, asynchronous copies, products on tensor cores. One idea a file:

    storage        how types of PTX lie in numpy arrays           parser       text to instructions
    translator     instructions to Python functions               instructions opcodes on registers
    arithmetic     rounding, fma, approximations                  transfers    opcodes on memory, lanes, tensor cores
    memory         loads and stores, checked                      races        who touches what between barriers
    asynchronous   cp.async                                       warps        shuffles, reductions
    tensor_cores   ldmatrix, mma.sync, wgmma                      schedule     warps, blocks, barriers, branches

Not emulated: atomics, TMA and mbarrier, tcgen05, clusters, local memory, calls. What is not known is refused.
"""

from tests.ptx.memory import Allocation
from tests.ptx.schedule import Launch
from tests.ptx.storage import EmulationError, Unsupported
from tests.ptx.translator import program

__all__ = ["Allocation", "EmulationError", "Launch", "Unsupported", "program"]
