"""File formats: model folders and single files in Hugging Face's layout, adapters, quantized weights, GGUF."""
