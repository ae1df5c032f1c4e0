"""Prefix caching: a prefix shared by several prompts is computed once and its keys and values are reused.

Only the newest text is stored, which bounds the memory to one row: the header that all lines of a pipe share, or a
conversation so far. A server would store many in a tree (RadixAttention, Zheng et al. 2023, arXiv:2312.07104, section
3). Keys encode the position of a token in its text, not its index in the cache, so they fit after any padding.
"""

from collections.abc import Sequence

from torch import Tensor

from llmctl.model.cache import KVCache

LEAST_KNOWN = 16
"""Shorter prefixes are not reused: attention over existing keys costs more than plain causal attention."""
LEAST_SAVED = 64
"""Tokens that a separate prefill of a shared prefix must save to be worth its extra forward pass.

Measured with 30M parameters on one thread, 2 to 16 rows, 8 to 64 shared tokens: it breaks even at about 10 (int4), 24
(float32) and 48 (bfloat16).
"""


class Prefix:
    """The ids of a text and their keys and values from one model; initially empty."""

    ids: list[int]
    parts: list[Tensor]

    def __init__(self) -> None:
        self.ids, self.parts = [], []

    def store(self, ids: Sequence[int], cache: KVCache) -> None:
        """Replace the stored text by `ids`, copying their keys and values from row 0 of a cache without padding."""
        if n_common(self.ids, ids) < len(ids):
            self.ids, self.parts = list(ids), cache.taken(len(ids))

    def known(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are cached; never the last one, whose logits are needed."""
        return min(n_common(self.ids, prompt), len(prompt) - 1)

    def shared(self, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
        """Return the prefix shared by all prompts if computing it separately pays off, else an empty sequence."""
        n_shared = min(n_common(prompts[0], prompt) for prompt in prompts)
        beginning = prompts[0][:n_shared]
        n_saved = (n_shared - n_common(self.ids, beginning)) * (len(prompts) - 1)
        return beginning if n_saved >= LEAST_SAVED else []

    def put(self, cache: KVCache, prompts: Sequence[Sequence[int]]) -> int:
        """Fill the first cache positions of left-padded prompts; return how many positions are filled in every row.

        All rows are prefilled together, so the row with the most uncached tokens decides: others recompute some.
        """
        longest = max(map(len, prompts))
        n_known = longest - max(len(prompt) - self.known(prompt) for prompt in prompts)
        if n_known < LEAST_KNOWN:
            return 0
        for row, prompt in enumerate(prompts):
            n_padding = longest - len(prompt)
            if n_padding < n_known:
                cache.put(self.parts, row, n_padding, n_known - n_padding)
        return n_known


def n_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix of two texts, in tokens."""
    both = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(both) if a != b), min(len(left), len(right)))
