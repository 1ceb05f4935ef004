"""Runs the PTX that Triton compiles, on the CPU, in numpy, and checks what it does with memory."""

from tests.ptx.emulator import Allocation, EmulationError, Launch, Unsupported, program

__all__ = ["Allocation", "EmulationError", "Launch", "Unsupported", "program"]
