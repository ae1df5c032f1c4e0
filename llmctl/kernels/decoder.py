"""Prepare a model for decoding: choose its products by measurement, fuse its weights, use a compiled step if present."""

from llmctl.kernels.compiled_step import make_native
from llmctl.kernels.product_table import Measured, give_table
from llmctl.model.decode import Decoder, covers
from llmctl.model.transformer import LanguageModel


def make_decoder(model: LanguageModel) -> Decoder | None:
    """Return a decoder that takes over the model's weights, or None if the model is not supported."""
    if not covers(model.config):
        return None
    table = Measured()
    give_table(model, table)
    decoder = Decoder(model)
    if table.tiles is not None:
        decoder.native = make_native(table.tiles.library, decoder, table.tiles)
    return decoder
