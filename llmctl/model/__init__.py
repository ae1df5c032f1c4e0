"""The model core: pure torch; no files, no devices, no ranks."""
