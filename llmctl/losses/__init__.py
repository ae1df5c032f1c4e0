"""Losses as pure functions of tensors, each with its source; they know no models, batches or ranks."""
