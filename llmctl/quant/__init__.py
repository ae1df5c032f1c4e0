"""Quantized linear layers as pure torch: they know nothing of models, files or devices."""
