"""Products with a weight in few bits: the plain one that is right everywhere, and those that a processor has kernels for.

Each computes x W^T of the same weight; they differ in speed, and by the rounding of their inputs to bfloat16, or to eight
bits where the scheme says so.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.quant.weight import QuantWeight

Product = Callable[[Tensor], Tensor]

FEW_ROWS = 16
"""Rows up to which products that unpack as they go are the faster ones on a CPU; beyond, unpacking once is."""

LARGEST_CODE = 127.0


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs (..., I) as int8 codes and scales (..., 1), token by token, symmetric."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE).clamp_(min=1e-30)
    return (wide / scales).round_().to(torch.int8), scales


def plain(layer: QuantWeight) -> Product:
    """Return the product with the weight multiplied out, which needs nothing of the machine."""

    def product(x: Tensor) -> Tensor:
        if layer.scheme.activations:
            codes, scales = rounded_inputs(x)
            x = (codes.float() * scales).to(x.dtype)
        return F.linear(x, layer.dequantised(x.dtype))

    return product


def int8_rows(layer: QuantWeight) -> Product:
    """Return the product of torch's int8 kernel for few rows (one scale per output)."""
    codes_OI = (layer.codes().codes_OI.to(torch.int16) - layer.scheme.middle).to(torch.int8).contiguous()
    scales_O = layer.weight_scale.flatten()

    def product(x: Tensor) -> Tensor:
        rows_NI = x.reshape(-1, layer.n_in)
        if len(rows_NI) > FEW_ROWS:
            return F.linear(x, (codes_OI.to(x.dtype) * scales_O[:, None].to(x.dtype)))
        y_NO = torch.ops.aten._weight_int8pack_mm(rows_NI.bfloat16(), codes_OI, scales_O)  # noqa: SLF001
        return y_NO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


def int8_both(layer: QuantWeight) -> Product:
    """Return the product of int8 inputs with an int8 weight, summed in 32 bits."""
    codes_IO = (layer.codes().codes_OI.to(torch.int16) - layer.scheme.middle).to(torch.int8).t()
    scales_O = layer.weight_scale.flatten().float()

    def product(x: Tensor) -> Tensor:
        codes_NI, scales_N1 = rounded_inputs(x.reshape(-1, layer.n_in))
        y_NO = torch._int_mm(codes_NI, codes_IO).float() * scales_N1 * scales_O  # noqa: SLF001
        return y_NO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


def int4_groups(layer: QuantWeight) -> Product:
    """Return the product of torch's int4 kernel for few rows."""
    codes_OI, (scales_OG, zeros_OG) = layer.codes()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)  # noqa: SLF001
    # The kernel's codes are signed ones: its zero is the value of code 8.
    middles_OG = (layer.scheme.middle - zeros_OG.float()) * scales_OG
    scales_GO2 = torch.stack([scales_OG, middles_OG], dim=-1).transpose(0, 1).contiguous().bfloat16()

    def product(x: Tensor) -> Tensor:
        rows_NI = x.reshape(-1, layer.n_in)
        if len(rows_NI) > FEW_ROWS:
            return F.linear(x, layer.dequantised(x.dtype))
        y_NO = torch.ops.aten._weight_int4pack_mm_for_cpu(rows_NI.bfloat16(), words, layer.scheme.group, scales_GO2)  # noqa: SLF001
        return y_NO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


def choose(layer: QuantWeight) -> Product:
    """Return the product for a layer where it lies."""
    scheme, on_cpu = layer.scheme, layer.weight_packed.device.type == "cpu"
    if not on_cpu or layer.n_out % 16 or layer.n_in % 32:
        return plain(layer)
    if scheme.bits == 8 and not scheme.group and scheme.symmetric:
        return int8_both(layer) if scheme.activations else int8_rows(layer)
    if scheme.bits == 4 and scheme.group in (32, 64, 128) and not scheme.activations:
        return int4_groups(layer)
    return plain(layer)
