"""Text sources, shards, streams and masking; no model, and token functions are passed in."""
