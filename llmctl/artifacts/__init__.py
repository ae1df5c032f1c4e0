"""Resolve a model name, load the model, apply adapters and classification heads."""
