"""Artifacts on disk: the run folder and the single file, Hugging Face families, GGUF."""
