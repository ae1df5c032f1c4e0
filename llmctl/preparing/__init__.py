"""Text and examples to shards of token ids."""
