"""Text sources, token shards, batches and masking; models are unknown here and encode functions are passed in."""
