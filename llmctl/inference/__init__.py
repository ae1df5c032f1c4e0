"""Inference: generate, chat, fill and classify."""
