"""Quantization schemes: bits, group size, symmetry, and whether activations are quantized too.

A weight is (code - zero) * scale with an unsigned code; a group of adjacent inputs shares scale and zero point.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BITS = 16
"""Bits of a bfloat16 scale."""

EXPONENT_BITS = 8
"""Bits of the exponent that a row's 8-bit scales share."""

GROUPS = (128, 64, 32)
"""Group sizes that kernels support, the largest first."""

FEWEST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """The quantization of one matrix.

    bits: per code. group: adjacent inputs that share a scale; 0 is the whole row. symmetric: the zero point is the
    middle code and not stored. activations: 8 to quantize inputs to 8 bits per token at run time, 0 to leave them.
    scale_bits: per scale; 8-bit scales are multiples of a power of two that their row shares.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    activations: int = 0
    scale_bits: int = SCALE_BITS

    has_table = False

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 2 ** (self.bits - 1)

    @property
    def has_small_scales(self) -> bool:
        """Whether scales are quantized too, with one exponent per row."""
        return self.scale_bits < SCALE_BITS

    def n_groups(self, n_in: int) -> int:
        """Return the number of groups in a row."""
        return n_in // self.group if self.group else 1

    def fits(self, n_in: int) -> bool:
        """Tell whether a row divides into groups."""
        return n_in > 0 and (not self.group or n_in % self.group == 0)

    def size_bits(self, n_out: int, n_in: int) -> int:
        """Return the nominal bits of a matrix (O, I): codes, scales and stored zero points, without padding."""
        per_group = self.scale_bits + (0 if self.symmetric else self.bits)
        per_row = EXPONENT_BITS if self.has_small_scales else 0
        return n_out * (n_in * self.bits + self.n_groups(n_in) * per_group + per_row)

    def snap_(self, codes: "Tensor") -> "Tensor":
        """Round to the nearest codes, in place."""
        return codes.round_().clamp_(0, self.levels)


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8),
    "w8a8": Scheme(8, activations=8),
    "int4-sym": Scheme(4, 32),
    **{f"int{bits}": Scheme(bits, 32, symmetric=False, scale_bits=8) for bits in (6, 5, 4, 3, 2)},
}
"""Schemes by name. int8 and w8a8: one scale per output (Jacob et al. 2018, arXiv:1712.05877). int4-sym: groups as in
llama.cpp's Q4_0 and many published models. The others: groups with zero points and quantized scales (QLoRA's double
quantization, arXiv:2305.14314, section 3; llama.cpp's K-quants). int2 is experimental."""

BY_BITS = {bits: f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)}
"""The default scheme of each number of bits."""


def weight_schemes() -> tuple[str, ...]:
    """Return the schemes that quantize weights only."""
    return tuple(name for name, scheme in SCHEMES.items() if not scheme.activations)
