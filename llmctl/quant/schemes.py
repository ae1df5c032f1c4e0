"""How weights are held in few bits: the codes' width, who shares a scale, and what happens to the inputs.

A weight is (code - zero) * scale with an unsigned code; inputs in groups share scale and zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SCALE_BITS = 16
GROUPS = (128, 64, 32)
"""Group sizes that kernels know, the widest first."""

FEWEST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """How one matrix is held.

    bits: of a code. group: neighbouring inputs that share a scale; 0 is the whole row. symmetric: the zero is the
    middle code and is not stored. activations: 8 where inputs are rounded to eight bits, token by token, when they are
    multiplied; 0 where they stay as they are.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    activations: int = 0

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of zero where the scheme is symmetric."""
        return 2 ** (self.bits - 1)

    def n_groups(self, n_in: int) -> int:
        """Return the groups of a row."""
        return n_in // self.group if self.group else 1

    def fits(self, n_in: int) -> bool:
        """Tell whether a row can be cut into whole groups."""
        return n_in > 0 and (not self.group or n_in % self.group == 0)

    def size_bits(self, n_out: int, n_in: int) -> int:
        """Return the bits of a matrix (O, I) by the theory: codes, scales, and zeros where they are stored."""
        per_group = SCALE_BITS + (0 if self.symmetric else self.bits)
        return n_out * (n_in * self.bits + self.n_groups(n_in) * per_group)


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8),
    "w8a8": Scheme(8, activations=8),
    "int4": Scheme(4, 64, symmetric=False),
    "int4-sym": Scheme(4, 32),
    "int3": Scheme(3, 64, symmetric=False),
    "int2": Scheme(2, 32, symmetric=False),
}
"""Names of schemes. int8 and w8a8: one scale per output (Jacob et al. 2018, arXiv:1712.05877); the others: groups with a
zero of their own, or symmetric ones, as GPTQ's and llama.cpp's files have them. int2 is for study."""

BY_BITS = {8: "int8", 4: "int4", 3: "int3", 2: "int2"}
"""What a number of bits alone means."""
