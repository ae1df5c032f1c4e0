"""Measure speed and check this machine."""
