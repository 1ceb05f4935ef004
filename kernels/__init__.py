"""Triton kernels, installed as `soundwave.kernels`: one operation a file, on torch and triton alone."""
