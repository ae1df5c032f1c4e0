"""Models in use: generate, chat, fill, classify."""
