"""Methods that merge models. To add one: a row here and its function in model/merging.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MergeRow:
    """A method: what it is, its source, how many models it takes at most (0: any number), and whether it needs their base."""

    summary: str
    source: str
    most: int = 0
    needs_base: bool = False


MERGES: dict[str, MergeRow] = {
    "linear": MergeRow("weighted mean", "model soups, arXiv:2203.05482"),
    "slerp": MergeRow("spherical interpolation of two models", "Shoemake 1985", most=2),
    "ties": MergeRow("changes that most models agree on", "TIES, arXiv:2306.01708", needs_base=True),
}
