"""The bytes of ggml's blocks, and codes and scales from them.

Source: ggml-common.h and ggml-quants.c of ggml-org/ggml. Shapes: N blocks, w weights of a block, G groups of a block.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llmctl.quant.gguf_blocks import grid_of
from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.grid import BlockGrid, Codes

BYTE, NIBBLE = 8, 15


class Parts(NamedTuple):
    """What blocks are made of.

    codes_Nw uint8; units_N1 and offset_units_N1 float32, exact in float16; integers_NG and offset_integers_NG int32.
    """

    codes_Nw: Tensor
    units_N1: Tensor
    offset_units_N1: Tensor
    integers_NG: Tensor
    offset_integers_NG: Tensor


def packed(codes: Codes, scheme: BlockScheme) -> Tensor:
    """Return the bytes (O, B) of a matrix, row by row."""
    grid = codes.grid
    assert isinstance(grid, BlockGrid)
    n_out, n_in = codes.codes_OI.shape
    whole = codes.codes_OI
    if scheme.table:
        entries = torch.tensor(scheme.table, dtype=torch.int8)
        whole = torch.searchsorted(entries, whole.contiguous()).to(torch.uint8)
    n_blocks = n_out * n_in // scheme.block
    parts = Parts(
        whole.reshape(n_blocks, scheme.block),
        grid.units_OS.reshape(n_blocks, 1),
        grid.offset_units_OS.reshape(n_blocks, 1),
        grid.integers_OG.reshape(n_blocks, -1).int(),
        grid.offset_integers_OG.reshape(n_blocks, -1).int(),
    )
    return torch.cat(LAYOUTS[scheme.name](parts), dim=1).reshape(n_out, -1)


def half_bytes(numbers_N1: Tensor) -> Tensor:
    """Return float16 numbers as bytes (N, 2), little-endian."""
    bits = numbers_N1.half().view(torch.int16).int()
    return torch.cat([bits & 255, (bits >> BYTE) & 255], dim=1).to(torch.uint8)


def nibbles(low: Tensor, high: Tensor) -> Tensor:
    """Pack pairs of 4-bit values into bytes."""
    return ((low & NIBBLE) | ((high & NIBBLE) << 4)).to(torch.uint8)


def stacked(values: Tensor, bits: int) -> Tensor:
    """Pack values (N, P, w), of P bit positions, into bytes (N, w): those of position p are shifted by p * bits."""
    shifts = torch.arange(values.shape[1], dtype=torch.int32)[:, None] * bits
    return (values.int() << shifts).sum(dim=1).to(torch.uint8)


def halves(codes_Nw: Tensor, size: int) -> Tensor:
    """Pack the low four bits of codes: the two halves of every `size` codes into the low and high nibbles of bytes."""
    low, high = codes_Nw.unflatten(1, (-1, 2, size // 2)).unbind(dim=2)
    return nibbles(low, high).flatten(1)


def q8_0(parts: Parts) -> list[Tensor]:
    """A scale and 32 signed codes."""
    codes = (parts.codes_Nw.int() - 128).to(torch.int8).view(torch.uint8)
    return [half_bytes(parts.units_N1), codes]


def four_bits(parts: Parts) -> list[Tensor]:
    """A scale and 32 codes of 4 bits: Q4_0, IQ4_NL."""
    return [half_bytes(parts.units_N1), halves(parts.codes_Nw, 32)]


def q4_1(parts: Parts) -> list[Tensor]:
    """A scale, an offset and 32 codes of 4 bits."""
    return [half_bytes(parts.units_N1), half_bytes(parts.offset_units_N1), halves(parts.codes_Nw, 32)]


def fifth_bits(codes_Nw: Tensor) -> Tensor:
    """Return the fifth bits of 32 codes as one little-endian 32-bit number, that of code 0 in its lowest bit."""
    return stacked((codes_Nw >> 4).view(-1, 4, 8).transpose(1, 2), 1)


def q5_0(parts: Parts) -> list[Tensor]:
    """A scale, the fifth bits of 32 codes, and their lower four bits."""
    return [half_bytes(parts.units_N1), fifth_bits(parts.codes_Nw), halves(parts.codes_Nw, 32)]


def q5_1(parts: Parts) -> list[Tensor]:
    """A scale, an offset, the fifth bits of 32 codes, and their lower four bits."""
    scale, fifth, codes = q5_0(parts)
    return [scale, half_bytes(parts.offset_units_N1), fifth, codes]


def six_bits(parts: Parts) -> Tensor:
    """Return 8 scales and 8 offsets of 6 bits in 12 bytes: the upper two bits of the last four in those of the first four."""
    (s_first, s_last), (o_first, o_last) = (
        numbers.split(4, dim=1) for numbers in (parts.integers_NG, parts.offset_integers_NG)
    )
    firsts = [s_first | ((s_last >> 4) << 6), o_first | ((o_last >> 4) << 6)]
    return torch.cat([*(first.to(torch.uint8) for first in firsts), nibbles(s_last, o_last)], dim=1)


def q4_k(parts: Parts) -> list[Tensor]:
    """Two units, 8 6-bit scales and offsets, 256 codes: even groups in the low nibbles, odd ones in the high."""
    units = [half_bytes(parts.units_N1), half_bytes(parts.offset_units_N1)]
    return [*units, six_bits(parts), halves(parts.codes_Nw, 64)]


def q5_k(parts: Parts) -> list[Tensor]:
    """As Q4_K, with the fifth bits of all groups before the lower four: bit g of byte i is that of code i of group g."""
    *before, codes = q4_k(parts)
    return [*before, stacked((parts.codes_Nw >> 4).view(-1, 8, 32), 1), codes]


def q6_k(parts: Parts) -> list[Tensor]:
    """Lower four and upper two bits of 256 codes, 16 scales of 8 bits, their unit."""
    # Of each half of 128 codes, quarters 1 and 3, 2 and 4 share bytes; so do all four upper bit pairs.
    quarters = parts.codes_Nw.view(-1, 2, 4, 32)
    first, second, third, fourth = quarters.unbind(dim=2)
    low = torch.cat([nibbles(first, third), nibbles(second, fourth)], dim=2).flatten(1)
    high = stacked((quarters >> 4).flatten(0, 1), 2).view(len(low), -1)
    return [low, high, parts.integers_NG.to(torch.int8).view(torch.uint8), half_bytes(parts.units_N1)]


def pairs(codes_Nw: Tensor) -> Tensor:
    """Return the lower two bits of 256 codes: the four quarters of each half share bytes."""
    return stacked((codes_Nw & 3).view(-1, 4, 32), 2).view(len(codes_Nw), -1)


def q3_k(parts: Parts) -> list[Tensor]:
    """The third bits of 256 codes, their lower two, 16 scales of 6 bits, their unit."""
    third = stacked((parts.codes_Nw >> 2).view(-1, 8, 32), 1)
    scales = parts.integers_NG + 32
    low = nibbles(scales[:, :8], scales[:, 8:])
    high = stacked((scales >> 4).view(-1, 4, 4), 2)
    return [third, pairs(parts.codes_Nw), low, high, half_bytes(parts.units_N1)]


def q2_k(parts: Parts) -> list[Tensor]:
    """16 scales and offsets of 4 bits, 256 codes of 2 bits, two units."""
    scales = nibbles(parts.integers_NG, parts.offset_integers_NG)
    return [scales, pairs(parts.codes_Nw), half_bytes(parts.units_N1), half_bytes(parts.offset_units_N1)]


def iq4_xs(parts: Parts) -> list[Tensor]:
    """A unit, upper two and lower four bits of 8 scales, 256 codes of 4 bits."""
    scales = parts.integers_NG + 32
    high = stacked((scales >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    low = nibbles(scales[:, ::2], scales[:, 1::2])
    return [half_bytes(parts.units_N1), high, low, halves(parts.codes_Nw, 32)]


LAYOUTS: Mapping[str, Callable[[Parts], list[Tensor]]] = {
    "Q8_0": q8_0,
    "Q5_1": q5_1,
    "Q5_0": q5_0,
    "Q4_1": q4_1,
    "Q4_0": four_bits,
    "IQ4_NL": four_bits,
    "Q6_K": q6_k,
    "Q5_K": q5_k,
    "Q4_K": q4_k,
    "IQ4_XS": iq4_xs,
    "Q3_K": q3_k,
    "Q2_K": q2_k,
}
"""Format -> what returns the parts of its blocks in order (N, b)."""


# --- reading ---------------------------------------------------------------------------------------------------------


def unpacked(bytes_OB: Tensor, scheme: BlockScheme) -> Codes:
    """Return the codes of a matrix from its bytes (O, B): the inverse of `packed`."""
    n_out = len(bytes_OB)
    parts = READERS[scheme.name](bytes_OB.reshape(-1, scheme.n_bytes).int())
    whole = parts.codes_Nw.to(torch.uint8)
    if scheme.table:
        whole = torch.tensor(scheme.table, dtype=torch.int8)[parts.codes_Nw.long()]
    rows = [part.float().reshape(n_out, -1) for part in parts[1:]]
    return Codes(whole.reshape(n_out, -1), grid_of(scheme, *rows))


def ones_like(units_N1: Tensor, n_groups: int) -> Tensor:
    """Return the integers of groups that have none."""
    return torch.ones_like(units_N1, dtype=torch.int32).expand(-1, n_groups)


def read_half(bytes_N2: Tensor) -> Tensor:
    """Return float16 numbers (N, 1)."""
    low, high = bytes_N2.split(1, dim=1)
    return (low | (high << BYTE)).to(torch.int16).view(torch.float16).float()


def fields_of(bytes_Nw: Tensor, bits: int) -> Tensor:
    """Return the fields (N, P, w) of `stacked` bytes (N, w)."""
    shifts = torch.arange(0, BYTE, bits, dtype=torch.int32)[:, None]
    return (bytes_Nw[:, None] >> shifts) & (2**bits - 1)


def read_halves(bytes_Nb: Tensor, size: int) -> Tensor:
    """Return the codes of `halves`."""
    return fields_of(bytes_Nb.reshape(-1, size // 2), 4).reshape(len(bytes_Nb), -1)


def plain(codes_Nw: Tensor, units_N1: Tensor, offset_units_N1: Tensor | None = None) -> Parts:
    """Return the parts of blocks of one group."""
    ones = ones_like(units_N1, 1)
    return Parts(
        codes_Nw, units_N1, torch.zeros_like(units_N1) if offset_units_N1 is None else offset_units_N1, ones, ones
    )


def read_q8_0(raw: Tensor) -> Parts:
    """Read Q8_0."""
    return plain(raw[:, 2:] ^ 128, read_half(raw[:, :2]))


def read_four_bits(raw: Tensor) -> Parts:
    """Read Q4_0 and IQ4_NL."""
    return plain(read_halves(raw[:, 2:], 32), read_half(raw[:, :2]))


def read_q4_1(raw: Tensor) -> Parts:
    """Read Q4_1."""
    return plain(read_halves(raw[:, 4:], 32), read_half(raw[:, :2]), read_half(raw[:, 2:4]))


def read_fifth_bits(bytes_N4: Tensor) -> Tensor:
    """Return the codes' fifth bits (N, 32) in their place."""
    return fields_of(bytes_N4, 1).transpose(1, 2).flatten(1) << 4


def read_q5_0(raw: Tensor) -> Parts:
    """Read Q5_0."""
    return plain(read_fifth_bits(raw[:, 2:6]) | read_halves(raw[:, 6:], 32), read_half(raw[:, :2]))


def read_q5_1(raw: Tensor) -> Parts:
    """Read Q5_1."""
    codes = read_fifth_bits(raw[:, 4:8]) | read_halves(raw[:, 8:], 32)
    return plain(codes, read_half(raw[:, :2]), read_half(raw[:, 2:4]))


def read_q4_k(raw: Tensor) -> Parts:
    """Read Q4_K, and Q5_K without the fifth bits."""
    first, second, last = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat([first & 63, (last & NIBBLE) | ((first >> 6) << 4)], dim=1)
    offsets = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], dim=1)
    codes = read_halves(raw[:, -128:], 64)
    return Parts(codes, read_half(raw[:, :2]), read_half(raw[:, 2:4]), scales, offsets)


def read_q5_k(raw: Tensor) -> Parts:
    """Read Q5_K."""
    parts = read_q4_k(raw)
    return parts._replace(codes_Nw=parts.codes_Nw | (fields_of(raw[:, 16:48], 1).flatten(1) << 4))


def signed(scales: Tensor, units_N1: Tensor, codes_Nw: Tensor) -> Parts:
    """Return the parts of blocks whose groups have no offset."""
    return Parts(codes_Nw, units_N1, torch.zeros_like(units_N1), scales, ones_like(units_N1, scales.shape[1]))


def read_q6_k(raw: Tensor) -> Parts:
    """Read Q6_K."""
    low, high = raw[:, :128].reshape(-1, 64), raw[:, 128:192].reshape(-1, 32)
    codes = fields_of(low, 4).reshape(-1, 4, 32) | (fields_of(high, 2) << 4)
    scales = (raw[:, 192:208] ^ 128) - 128
    return signed(scales, read_half(raw[:, 208:]), codes.reshape(len(raw), -1))


def read_pairs(bytes_N64: Tensor) -> Tensor:
    """Return the codes of `pairs`."""
    return fields_of(bytes_N64.reshape(-1, 32), 2).reshape(len(bytes_N64), -1)


def read_q3_k(raw: Tensor) -> Parts:
    """Read Q3_K."""
    codes = (fields_of(raw[:, :32], 1).flatten(1) << 2) | read_pairs(raw[:, 32:96])
    scales = fields_of(raw[:, 96:104], 4).flatten(1) | (fields_of(raw[:, 104:108], 2).flatten(1) << 4)
    return signed(scales - 32, read_half(raw[:, 108:]), codes)


def read_q2_k(raw: Tensor) -> Parts:
    """Read Q2_K."""
    scales, offsets = fields_of(raw[:, :16], 4).unbind(dim=1)
    return Parts(read_pairs(raw[:, 16:80]), read_half(raw[:, 80:82]), read_half(raw[:, 82:]), scales, offsets)


def read_iq4_xs(raw: Tensor) -> Parts:
    """Read IQ4_XS."""
    high = fields_of(raw[:, 2:4], 2).transpose(1, 2).flatten(1)
    low = fields_of(raw[:, 4:8], 4).transpose(1, 2).flatten(1)
    return signed((low | (high << 4)) - 32, read_half(raw[:, :2]), read_halves(raw[:, 8:], 32))


READERS: Mapping[str, Callable[[Tensor], Parts]] = {
    "Q8_0": read_q8_0,
    "Q5_1": read_q5_1,
    "Q5_0": read_q5_0,
    "Q4_1": read_q4_1,
    "Q4_0": read_four_bits,
    "IQ4_NL": read_four_bits,
    "Q6_K": read_q6_k,
    "Q5_K": read_q5_k,
    "Q4_K": read_q4_k,
    "IQ4_XS": read_iq4_xs,
    "Q3_K": read_q3_k,
    "Q2_K": read_q2_k,
}
"""Format -> what returns the parts of its blocks from their bytes (N, b) int32."""
