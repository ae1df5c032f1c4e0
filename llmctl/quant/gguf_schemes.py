"""ggml's block formats as schemes: how many weights share a scale, which values codes stand for, what a block takes.

A weight is scale * level + offset; level: the code less `middle`, or an entry of `table`. The scale of a group is a float16
number, or the product of one with an integer.
Source: ggml-common.h and ggml-quants.c of ggml-org/ggml.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of the IQ4 formats."""


@dataclass(frozen=True)
class BlockScheme:
    """A block format.

    bits: per code. group: adjacent weights that share a scale. block: weights of a block. n_bytes: of a block.
    middle: the code of level 0. least: the smallest code. affine: groups have an offset. scale_ends: the least and largest
    integer of a group's scale; (1, 1): it is a float16 number itself. offset_end: the largest integer of an offset, which is
    subtracted; 0: it is a float16 number.
    """

    name: str
    bits: int
    group: int
    block: int
    n_bytes: int
    middle: int = 0
    least: int = 0
    affine: bool = False
    scale_ends: tuple[int, int] = (1, 1)
    offset_end: int = 0
    table: tuple[int, ...] = ()

    activations = 0

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def has_table(self) -> bool:
        """Whether codes are kept as entries of a table."""
        return bool(self.table)

    @property
    def has_integers(self) -> bool:
        """Whether the scales of groups are integers times a scale of their block."""
        return self.scale_ends != (1, 1)

    def n_groups(self, n_in: int) -> int:
        """Return the number of groups in a row."""
        return n_in // self.group

    def fits(self, n_in: int) -> bool:
        """Tell whether a row divides into blocks."""
        return n_in > 0 and n_in % self.block == 0

    def size_bits(self, n_out: int, n_in: int) -> int:
        """Return the bits of a matrix (O, I)."""
        return n_out * n_in // self.block * self.n_bytes * 8

    def snap_(self, codes: "Tensor") -> "Tensor":
        """Round to the nearest codes, or entries of the table, in place."""
        if not self.table:
            return codes.round_().clamp_(self.least, self.levels)
        return codes.copy_(nearest_entry(codes, self.table))


def nearest_entry(values: "Tensor", table: tuple[int, ...]) -> "Tensor":
    """Return the entry of a sorted table nearest to each value."""
    import torch

    entries = torch.tensor(table, dtype=values.dtype, device=values.device)
    return entries[torch.bucketize(values, (entries[1:] + entries[:-1]) / 2)]


BLOCK_SCHEMES: Mapping[str, BlockScheme] = {
    scheme.name: scheme
    for scheme in (
        BlockScheme("Q8_0", 8, 32, 32, 34, middle=128, least=1),
        BlockScheme("Q5_1", 5, 32, 32, 24, affine=True),
        BlockScheme("Q5_0", 5, 32, 32, 22, middle=16),
        BlockScheme("Q4_1", 4, 32, 32, 20, affine=True),
        BlockScheme("Q4_0", 4, 32, 32, 18, middle=8),
        BlockScheme("IQ4_NL", 4, 32, 32, 18, table=IQ4),
        BlockScheme("Q6_K", 6, 16, 256, 210, middle=32, scale_ends=(-128, 127)),
        BlockScheme("Q5_K", 5, 32, 256, 176, affine=True, scale_ends=(1, 63), offset_end=63),
        BlockScheme("Q4_K", 4, 32, 256, 144, affine=True, scale_ends=(1, 63), offset_end=63),
        BlockScheme("IQ4_XS", 4, 32, 256, 136, scale_ends=(-32, 31), table=IQ4),
        BlockScheme("Q3_K", 3, 16, 256, 110, middle=4, scale_ends=(-32, 31)),
        BlockScheme("Q2_K", 2, 16, 256, 84, affine=True, scale_ends=(1, 15), offset_end=15),
    )
}
"""The formats that are written, by ggml's names."""
