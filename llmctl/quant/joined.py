"""Several layers over the same input as one layer whose outputs stand side by side: one product in place of three."""

from collections.abc import Sequence

import torch

from llmctl.quant.linear import QuantLinear
from llmctl.quant.packing import pack, unpack


def join_quantized(layers: Sequence[QuantLinear]) -> QuantLinear:
    """Return one layer; the weights are moved: the given layers hold views of its codes and scales from now on.

    The layers must have one scheme and equal inputs, and biases all or none.
    """
    first = layers[0]
    scheme = first.scheme
    joined = QuantLinear(first.n_in, sum(layer.n_out for layer in layers), scheme, bias=first.bias is not None)
    joined.weight_packed = torch.cat([layer.weight_packed for layer in layers])
    joined.weight_scale = torch.cat([layer.weight_scale for layer in layers])
    if first.bias is not None:
        joined.bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
    if not scheme.symmetric:  # words of zeros run along the outputs
        zeros_GO = torch.cat(
            [unpack(layer.weight_zero_point.T.contiguous(), scheme.bits, layer.n_out) for layer in layers], dim=1
        )
        joined.weight_zero_point = pack(zeros_GO, scheme.bits).T.contiguous()
    start = 0
    for layer in layers:
        part = slice(start, start + layer.n_out)
        layer.weight_packed, layer.weight_scale = joined.weight_packed[part], joined.weight_scale[part]
        start += layer.n_out
    joined.table = first.table
    return joined
