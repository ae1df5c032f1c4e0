"""Fuse quantized layers with the same input (query, key, value) into one: a single product instead of three."""

from collections.abc import Sequence

import torch

from llmctl.quant.linear import QuantLinear
from llmctl.quant.packing import pack, unpack


def join_quantized(layers: Sequence[QuantLinear]) -> QuantLinear:
    """Return a layer with concatenated outputs; the given layers' codes and scales become views of its tensors.

    The layers must have the same scheme and number of inputs, and either all or none have biases.
    """
    first = layers[0]
    scheme = first.scheme
    joined = QuantLinear(first.n_in, sum(layer.n_out for layer in layers), scheme, bias=first.bias is not None)
    joined.weight_packed = torch.cat([layer.weight_packed for layer in layers])
    joined.weight_scale = torch.cat([layer.weight_scale for layer in layers])
    if first.bias is not None:
        joined.bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
    if not scheme.symmetric:  # zero points are packed along the outputs, so words cannot simply be concatenated
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
