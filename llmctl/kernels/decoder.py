"""Prepare a model for decoding: choose its products by measurement, fuse its weights, use a compiled step if present."""

from llmctl.kernels.compile import COMPILED, PACKAGED, verdict
from llmctl.kernels.compiled_step import find_library, is_disabled, make_native, variant_of
from llmctl.kernels.product_table import Measured, give_table
from llmctl.model.decode import Decoder, covers
from llmctl.model.transformer import LanguageModel


def make_decoder(model: LanguageModel) -> Decoder | None:
    """Return a decoder that takes over the model's weights, or None if the model is not supported."""
    if not covers(model.config):
        return None
    table = Measured()
    give_table(model, table)
    if table.tiles is not None:
        decoder = Decoder(model, fuses=False)
        decoder.native = make_native(table.tiles.library, decoder, table.tiles)
        if decoder.native is not None:
            return decoder
    decoder = Decoder(model)
    if table.tiles is not None:  # what it supports only with fused weights
        decoder.native = make_native(table.tiles.library, decoder, table.tiles)
    return decoder


def decoding_by(decoder: Decoder | None) -> str:
    """Return what computes the tokens of a model, and why if it is not the library."""
    if decoder is not None and decoder.model.device.type != "cpu":
        return f"PyTorch on {decoder.model.device.type}"
    if is_disabled():
        return "PyTorch (LLMCTL_NATIVE=0)"
    library = find_library()
    if library is None:
        reason = verdict()
        is_known = reason and reason not in (COMPILED, PACKAGED)
        return f"PyTorch ({reason if is_known else 'no C++ compiler was found; one makes this 2 to 5 times faster'})"
    if decoder is None or decoder.native is None:
        return "PyTorch (the compiled library does not support this model)"
    return f"compiled library ({variant_of(library)})"
