"""Make a model ready for decoding: its products measured, its weights joined, and a compiled step where there is one."""

from llmctl.kernels.compiled_step import make_native
from llmctl.kernels.product_table import Measured, give_table
from llmctl.model.decode import Decoder, covers
from llmctl.model.transformer import LanguageModel


def make_decoder(model: LanguageModel) -> Decoder | None:
    """Return a decoder that takes the model's weights over, or None for a model of another kind."""
    if not covers(model.config):
        return None
    table = Measured()
    give_table(model, table)
    decoder = Decoder(model)
    if table.library is not None:
        decoder.native = make_native(table.library, decoder)
    return decoder
