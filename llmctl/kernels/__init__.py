"""The compiled decoding step, and the choice of kernels for quantized products."""
