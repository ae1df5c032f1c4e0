"""How weights are held in few bits: the codes' width, who shares a scale, and what happens to the inputs.

A weight is (code - zero) * scale with an unsigned code; inputs in groups share scale and zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SCALE_BITS = 16
"""Of a scale that is a bfloat16 number by itself."""

EXPONENT_BITS = 8
"""Of the power of two, one for a row, that a row's scales in fewer bits are multiples of."""

GROUPS = (128, 64, 32)
"""Group sizes that kernels know, the widest first."""

FEWEST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """How one matrix is held.

    bits: of a code. group: neighboring inputs that share a scale; 0 is the whole row. symmetric: the zero is the
    middle code and is not stored. activations: 8 where inputs are rounded to eight bits, token by token, when they are
    multiplied; 0 where they stay as they are. scale_bits: of a scale; with 8, scales are multiples of a power of two that
    their row has in common.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    activations: int = 0
    scale_bits: int = SCALE_BITS

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of zero where the scheme is symmetric."""
        return 2 ** (self.bits - 1)

    @property
    def has_small_scales(self) -> bool:
        """Whether scales are codes too, each row with an exponent."""
        return self.scale_bits < SCALE_BITS

    def n_groups(self, n_in: int) -> int:
        """Return the groups of a row."""
        return n_in // self.group if self.group else 1

    def fits(self, n_in: int) -> bool:
        """Tell whether a row can be cut into whole groups."""
        return n_in > 0 and (not self.group or n_in % self.group == 0)

    def size_bits(self, n_out: int, n_in: int) -> int:
        """Return the bits of a matrix (O, I) by the theory: codes, scales, and zeros where they are stored."""
        per_group = self.scale_bits + (0 if self.symmetric else self.bits)
        per_row = EXPONENT_BITS if self.has_small_scales else 0
        return n_out * (n_in * self.bits + self.n_groups(n_in) * per_group + per_row)


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8),
    "w8a8": Scheme(8, activations=8),
    "int4-sym": Scheme(4, 32),
    **{f"int{bits}": Scheme(bits, 32, symmetric=False, scale_bits=8) for bits in (6, 5, 4, 3, 2)},
}
"""Names of schemes. int8 and w8a8: one scale per output (Jacob et al. 2018, arXiv:1712.05877). int4-sym: groups as llama.cpp's
Q4_0 and many published models have them. The others: groups with a zero of their own, and scales that are held in few bits
themselves (QLoRA's double quantization, arXiv:2305.14314, section 3; llama.cpp's K-quants). int2 is for study."""

BY_BITS = {bits: f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)}
"""What a number of bits alone means."""


def weight_schemes() -> tuple[str, ...]:
    """Return the schemes that quantize weights only."""
    return tuple(name for name, scheme in SCHEMES.items() if not scheme.activations)
