"""Tokenizers: one interface over sentencepiece and Hugging Face `tokenizers`."""
