"""Text to token ids and back: one small interface over sentencepiece and Hugging Face `tokenizers`."""
