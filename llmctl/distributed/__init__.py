"""Launching processes, ranks, devices, gradient reduction and sharding."""
