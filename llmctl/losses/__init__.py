"""Losses as pure functions of tensors, each with its source; they know nothing of models, batches or ranks."""
