"""The fused operations as functions. `impl="auto"` is Triton for CUDA tensors and torch elsewhere.

Dimension letters: B utterances, T frames of the longest, N packed rows, D width, V rows of the head, U labels of the
longest target, K kept frames of all utterances together.
"""
