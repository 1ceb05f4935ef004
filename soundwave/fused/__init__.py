"""Fused operations and drop-in modules over `soundwave.kernels`; `functional` holds the operations."""
