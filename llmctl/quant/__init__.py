"""Quantization in pure torch: schemes, rounding methods, packed layers; knows no models, files or devices."""
