"""The models and operations on them, in pure torch: no files, no devices, no ranks."""
