"""Processes, devices, ranks."""
