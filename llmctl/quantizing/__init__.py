"""Quantize the weights of a model: calibration, bit allocation, report."""
