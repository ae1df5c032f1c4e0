"""Preparation of training data: text and examples to shards of token ids."""
