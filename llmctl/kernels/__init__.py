"""Compiled decoding step and the choice of matmul kernels."""
