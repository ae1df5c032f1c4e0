"""Find a model, load it, put adapters on it."""
