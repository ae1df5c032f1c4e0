"""Plans that reduce vocabulary, layers, widths and bits of a model to fit a file size; measured, predicted and tried."""
