"""Matrix products with a quantized weight: a portable one, and others that use CPU kernels.

All compute x W^T of the same weight. They differ in speed, and in rounding inputs to bfloat16, or to 8 bits if the
scheme requires it. Which is fastest depends on the number of rows of x and on the machine, so a table chooses; `usual`
is the default one, without measurements.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.quant.schemes import GROUPS, Scheme
from llmctl.quant.weight import QuantWeight

Product = Callable[[Tensor], Tensor]

ROWS = (1, 4, 16, 64, 256)
"""Row counts that are distinguished: x is rounded up to the next one, or down to the largest."""

FEW_ROWS = 32
"""The row count up to which kernels for few rows are usually faster on a CPU than unpacking the weight first."""

UNPACKED_WEIGHTS = 1 << 20
"""Weights that are unpacked at a time: what stays in the CPU cache."""

LARGEST_CODE = 127.0

INT4_BITS, INT4_ZERO = 4, 8
"""The code width of torch's int4 kernel, and its zero point."""

MOST_BITS_OF_STEPS = 6
"""The widest codes whose signed distance from the zero point fits into int8, and into two 4-bit codes."""


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize inputs (..., I) per token to symmetric int8 codes and scales (..., 1)."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE).clamp_(min=1e-30)
    return (wide / scales).round_().to(torch.int8), scales


def plain(layer: QuantWeight) -> Product:
    """Return the product with the dequantized weight, which works on any machine."""
    return on_rounded(layer, dequantized(layer))


def dequantized(layer: QuantWeight) -> Product:
    """Return the product of inputs as they are with the dequantized weight."""
    return lambda x: F.linear(x, layer.dequantized(x.dtype))


def on_rounded(layer: QuantWeight, product: Product) -> Product:
    """Return a product of inputs that are first rounded to 8 bits, if the scheme says so."""

    def rounded(x: Tensor) -> Tensor:
        codes, scales = rounded_inputs(x)
        return product((codes.float() * scales).to(x.dtype))

    return rounded if layer.scheme.activations else product


def unpacked(layer: QuantWeight) -> Product:
    """Return a product that dequantizes some rows of the weight at a time, in the precision of x."""
    scheme = layer.scheme
    if is_int8(scheme, layer.n_out, layer.n_in):
        product = unpacked_8(layer)
    elif scheme.bits == 4 and layer.n_in % 8 == 0:
        product = unpacked_4(layer)
    else:
        product = unpacked_steps(layer) if scheme.bits <= MOST_BITS_OF_STEPS else dequantized(layer)
    return on_rounded(layer, product)


def narrow(layer: QuantWeight) -> Product:
    """Return the same product computed in bfloat16, unless that would round scales of another dtype."""
    product = unpacked(layer)
    return (lambda x: product(x.bfloat16()).to(x.dtype)) if layer.has_bfloat16_scales else product


def unpacked_8(layer: QuantWeight) -> Product:
    """Multiply by the int8 codes, which every precision represents exactly, and scale the outputs."""
    scales_O, middle = layer.weight_scale.flatten(), layer.scheme.middle
    bytes_OI = layer.weight_packed.view(torch.uint8)

    def product(x: Tensor) -> Tensor:
        # Flipping a byte's top bit subtracts the zero point 128 without widening the bytes.
        signed = ((part ^ middle).view(torch.int8) for part in bytes_OI.split(rows_of(layer)))
        parts = [F.linear(x, part.to(x.dtype)) for part in signed]
        return torch.cat(parts, dim=-1).mul_(scales_O)

    return product


def unpacked_4(layer: QuantWeight) -> Product:
    """Multiply even inputs by the low nibbles and odd ones by the high: permuting x avoids interleaving the weight."""
    n_groups = layer.scheme.n_groups(layer.n_in)
    bytes_OB = layer.weight_packed.view(torch.uint8)
    zeros_OG = layer.codes().grid.zeros_OG

    def product(x: Tensor) -> Tensor:
        halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        outputs, n_rows = [], rows_of(layer)
        for start in range(0, layer.n_out, n_rows):
            part = slice(start, start + n_rows)
            bytes_PB = bytes_OB[part]
            # Dequantized in float32: faster in torch than bfloat16 for short groups, and also rounded only once.
            weight_P2B = x.new_empty(len(bytes_PB), 2, bytes_PB.shape[1], dtype=torch.float32)
            weight_P2B[:, 0].copy_(bytes_PB & 15)
            weight_P2B[:, 1].copy_(bytes_PB >> 4)
            groups_P2Gh = weight_P2B.view(len(bytes_PB), 2, n_groups, -1)
            zeros, scales = zeros_OG[part, None, :, None].float(), layer.weight_scale[part, None, :, None].float()
            groups_P2Gh.sub_(zeros).mul_(scales)
            outputs.append(F.linear(halves, weight_P2B.flatten(1).to(x.dtype)))
        return torch.cat(outputs, dim=-1)

    return product


def unpacked_steps(layer: QuantWeight) -> Product:
    """Keep one byte per weight, its signed distance from the zero point, and multiply by it times the scale."""
    steps_OI, n_groups = steps_of(layer), layer.scheme.n_groups(layer.n_in)
    scales_OG1 = layer.weight_scale[..., None]

    def product(x: Tensor) -> Tensor:
        outputs, n_rows = [], rows_of(layer)
        for steps_PI, scales_PG1 in zip(steps_OI.split(n_rows), scales_OG1.split(n_rows), strict=True):
            groups_PGg = steps_PI.float().view(len(steps_PI), n_groups, -1).mul_(scales_PG1)
            outputs.append(F.linear(x, groups_PGg.flatten(1).to(x.dtype)))
        return torch.cat(outputs, dim=-1)

    return product


def steps_of(layer: QuantWeight) -> Tensor:
    """Return code - zero point of every weight (O, I) int8; codes have at most `MOST_BITS_OF_STEPS` bits."""
    codes_OI, grid = layer.codes()
    zeros_OG = grid.zeros_OG
    groups_OGg = codes_OI.view(torch.int8).view(*zeros_OG.shape, -1)
    return (groups_OGg - zeros_OG.view(torch.int8)[..., None]).flatten(1)


def rows_of(layer: QuantWeight) -> int:
    """Return the number of weight rows to unpack at a time."""
    return max(1, UNPACKED_WEIGHTS // layer.n_in)


def int8_rows(layer: QuantWeight) -> Product:
    """Return the product with torch's int8 kernel for few rows (one scale per output)."""
    codes_OI = signed_codes(layer)
    scales_O = layer.weight_scale.flatten()
    # The kernel takes bfloat16 scales: others are applied to its outputs.
    is_exact = layer.has_bfloat16_scales
    kernel_scales_O = scales_O.bfloat16() if is_exact else torch.ones_like(scales_O, dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        rows_NI, scales_N1 = x.reshape(-1, layer.n_in), None
        if layer.scheme.activations:
            rows_NI, scales_N1 = rounded_inputs(rows_NI)  # bfloat16 represents their codes
        # For float32 inputs, this kernel and the int4 one fall back to slow scalar code.
        y_NO = torch.ops.aten._weight_int8pack_mm(rows_NI.bfloat16(), codes_OI, kernel_scales_O)  # noqa: SLF001
        y_NO = y_NO if is_exact else y_NO.float() * scales_O
        y_NO = y_NO if scales_N1 is None else y_NO.float() * scales_N1
        return y_NO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


def int8_both(layer: QuantWeight) -> Product:
    """Return the product of int8 inputs with an int8 weight, accumulated in int32."""
    codes_IO = signed_codes(layer).t()
    scales_O = layer.weight_scale.flatten().float()

    def product(x: Tensor) -> Tensor:
        codes_NI, scales_N1 = rounded_inputs(x.reshape(-1, layer.n_in))
        y_NO = torch._int_mm(codes_NI, codes_IO).float() * scales_N1 * scales_O  # noqa: SLF001
        return y_NO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


@cache
def onednn_is_exact() -> bool:
    """Tell whether oneDNN's products of 8-bit integers are exact.

    Without VNNI it adds pairs of products in 16 bits, where large ones saturate.
    """
    codes_OI = torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes_OI, None)
    one, none = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    for n_rows in (1, 40):
        y_NO = torch.ops.onednn.qlinear_pointwise(
            torch.full((n_rows, 64), 255, dtype=torch.uint8),
            torch.ones(()),
            torch.tensor(128),
            packed,
            one,
            none,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        if not bool((y_NO == 64 * 127 * 127).all()):
            return False
    return True


def int8_onednn(layer: QuantWeight) -> Product:
    """Return the same product with oneDNN, on a weight in its blocked layout."""
    codes_OI = signed_codes(layer)
    packed = torch.ops.onednn.qlinear_prepack(codes_OI, None)
    scales_O = layer.weight_scale.flatten().float()
    zeros_O = torch.zeros(layer.n_out, dtype=torch.int64)
    middle = torch.tensor(128)

    def product(x: Tensor) -> Tensor:
        codes_NI, scales_N1 = rounded_inputs(x.reshape(-1, layer.n_in))
        codes_NI = (codes_NI.to(torch.int16) + 128).to(torch.uint8)  # the kernel requires unsigned inputs
        unit = torch.ones(())
        y_NO = torch.ops.onednn.qlinear_pointwise(
            codes_NI, unit, middle, packed, scales_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (y_NO * scales_N1).to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


def int4_groups(layer: QuantWeight) -> Product:
    """Return the product with torch's int4 kernel for few rows; wider codes are split into two int4 products."""
    codes_OI, grid = layer.codes()
    scales_OG, zeros_OG = grid.scales_OG, grid.zeros_OG
    halves: list[Product] = []
    is_exact = layer.has_bfloat16_scales
    for part_OG in [scales_OG] if is_exact else scale_parts(scales_OG):
        if layer.scheme.bits == INT4_BITS:
            halves.append(int4_half(layer, codes_OI, part_OG, (INT4_ZERO - zeros_OG.float()) * part_OG))
            continue
        # Code - zero point, since the kernel takes (zero point * scale) in bfloat16, which rounds it.
        steps_OI, none_OG = steps_of(layer).int() + INT4_ZERO, torch.zeros_like(part_OG)
        upper_OI = steps_OI >> INT4_BITS
        halves.append(int4_half(layer, steps_OI - (upper_OI << INT4_BITS), part_OG, none_OG))
        if layer.scheme.bits > INT4_BITS:
            halves.append(int4_half(layer, upper_OI + INT4_ZERO, part_OG * 2**INT4_BITS, none_OG))

    def product(x: Tensor) -> Tensor:
        rows_NI = x.reshape(-1, layer.n_in).bfloat16()
        y_NO = halves[0](rows_NI)
        # In bfloat16, the sum would round away the product with the lower parts of the scales.
        y_NO = y_NO if is_exact else y_NO.float()
        for half in halves[1:]:
            y_NO = y_NO + half(rows_NI)
        return y_NO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

    return product


def scale_parts(scales_OG: Tensor) -> list[Tensor]:
    """Return two parts of scales for bfloat16: of float16 ones it represents both, of float32 ones to 16 bits."""
    upper_OG = scales_OG.bfloat16().float()
    return [upper_OG, scales_OG - upper_OG]


def int4_half(layer: QuantWeight, codes_OI: Tensor, scales_OG: Tensor, middles_OG: Tensor) -> Product:
    """Return the kernel's product for codes below 16; middles: the values that the code `INT4_ZERO` decodes to."""
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)  # noqa: SLF001
    scales_GO2 = torch.stack([scales_OG, middles_OG], dim=-1).transpose(0, 1).contiguous().bfloat16()
    kernel = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
    return lambda rows_NI: kernel(rows_NI, words, layer.scheme.group, scales_GO2)


def signed_codes(layer: QuantWeight) -> Tensor:
    """Return the codes of a symmetric 8-bit scheme as int8 (O, I)."""
    return (layer.codes().codes_OI.to(torch.int16) - layer.scheme.middle).to(torch.int8).contiguous()


def is_int8(scheme: Scheme, n_out: int, n_in: int) -> bool:
    """Tell whether the int8 kernels support a weight."""
    return scheme.bits == 8 and not scheme.group and scheme.symmetric and n_out % 16 == 0 and n_in % 32 == 0


def is_int4(scheme: Scheme, n_out: int, n_in: int) -> bool:
    """Tell whether one or two int4 kernels support a weight."""
    has_groups = scheme.bits <= MOST_BITS_OF_STEPS and scheme.group in GROUPS and not scheme.activations
    return has_groups and scheme.fits(n_in) and n_out % 16 == 0 and n_in % 32 == 0


def has_int8_products() -> bool:
    """Tell whether this CPU has instructions for products of int8 inputs; without them, float32 is 20 times faster."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # unknown, as in `losses.logits.is_native`
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001


@dataclass(frozen=True)
class Kind:
    """An implementation: the factory of a layer's product, and a test of (scheme, O, I) for support."""

    make: Callable[[QuantWeight], Product]
    fits: Callable[[Scheme, int, int], bool]


PRODUCTS: Mapping[str, Kind] = {
    "plain": Kind(plain, lambda _scheme, _n_out, _n_in: True),
    "unpacked": Kind(unpacked, lambda _scheme, _n_out, _n_in: True),
    "narrow": Kind(narrow, lambda scheme, _n_out, _n_in: not scheme.activations),
    "int8_rows": Kind(int8_rows, is_int8),
    "int8_both": Kind(int8_both, lambda scheme, n_out, n_in: is_int8(scheme, n_out, n_in) and scheme.activations == 8),
    "int8_onednn": Kind(
        int8_onednn,
        lambda scheme, n_out, n_in: is_int8(scheme, n_out, n_in) and scheme.activations == 8 and onednn_is_exact(),
    ),
    "int4_groups": Kind(int4_groups, is_int4),
}
"""The implementations for a CPU; other devices use `plain`."""


class Table:
    """Chooses a product for a weight and a row count of `ROWS`; this one by what is fastest on most CPUs."""

    kinds: Mapping[str, Kind] = PRODUCTS

    def fitting(self, scheme: Scheme, n_out: int, n_in: int) -> list[str]:
        """Return the products that support a weight."""
        return [name for name, kind in self.kinds.items() if kind.fits(scheme, n_out, n_in)]

    def __call__(self, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> str:
        """Return the name of the chosen product, a key of `kinds`."""
        names = self.fitting(scheme, n_out, n_in)
        if "int8_both" in names and has_int8_products():
            return "int8_both"
        many = "unpacked" if "unpacked" in names else "plain"
        few = next((name for name in ("int8_rows", "int4_groups") if name in names), many)
        return few if n_rows <= FEW_ROWS else many


usual = Table()


def counted_as(n_rows: int) -> int:
    """Round a number of rows to one of `ROWS`."""
    return next((size for size in ROWS if n_rows <= size), ROWS[-1])


class ByRows:
    """A layer's product, chosen by a table for each number of rows and created on first use."""

    def __init__(self, layer: QuantWeight, table: Table) -> None:
        self.layer, self.table = layer, table
        self.made: dict[str, Product] = {}
        self.of_rows: dict[int, Product] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        n_rows = x.numel() // self.layer.n_in
        product = self.of_rows.get(n_rows)
        return (product or self._choose(n_rows))(x)

    def _choose(self, n_rows: int) -> Product:
        layer = self.layer
        name = self.table(layer.scheme, layer.n_out, layer.n_in, counted_as(n_rows))
        if name not in self.made:
            # Packed weights outlive this call: created in inference mode, they could not be used in training later.
            with torch.inference_mode(mode=False), torch.no_grad():
                self.made[name] = self.table.kinds[name].make(layer)
        self.of_rows[n_rows] = self.made[name]
        return self.made[name]


def choose(layer: QuantWeight, table: Table = usual) -> Product:
    """Return a layer's product for the device it is on."""
    return ByRows(layer, table) if layer.weight_packed.device.type == "cpu" else plain(layer)
