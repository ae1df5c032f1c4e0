"""The beginning that prompts have in common: read once, its keys and values put before what follows it in every row.

One text is held, the newest, so that memory is bounded by one row's context: the header that the lines of a pipe share, or
a conversation so far. A server would hold many, as a tree (RadixAttention, Zheng et al. 2023, arXiv:2312.07104, section 3).
Keys carry the position of their token in its text, not their place in a cache, so that they fit behind any padding.
"""

from collections.abc import Sequence

from torch import Tensor

from llmctl.model.cache import KVCache

LEAST_KNOWN = 16
"""Tokens below which nothing is put: attention to keys that are there already costs more than plain causal attention."""
LEAST_SAVED = 64
"""Tokens that reading a beginning on its own has to save, as another pass has a price.

Measured with 30M parameters on one thread, 2 to 16 rows, 8 to 64 tokens in common: it breaks even at about 10 (int4), 24
(float32) and 48 (bfloat16).
"""


class Prefix:
    """Ids of a text with the keys and values that one model made of them; empty at first."""

    ids: list[int]
    parts: list[Tensor]

    def __init__(self) -> None:
        self.ids, self.parts = [], []

    def hold(self, ids: Sequence[int], cache: KVCache) -> None:
        """Hold a text in the place of the last one: a copy of what the first row of a cache, not padded, begins with."""
        if n_common(self.ids, ids) < len(ids):
            self.ids, self.parts = list(ids), cache.taken(len(ids))

    def known(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt need not be read; its last one is, as its logits are asked for."""
        return min(n_common(self.ids, prompt), len(prompt) - 1)

    def shared(self, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
        """Return what all prompts begin with, where reading it on its own saves more than it costs; else nothing."""
        n_shared = min(n_common(prompts[0], prompt) for prompt in prompts)
        beginning = prompts[0][:n_shared]
        n_saved = (n_shared - n_common(self.ids, beginning)) * (len(prompts) - 1)
        return beginning if n_saved >= LEAST_SAVED else []

    def put(self, cache: KVCache, prompts: Sequence[Sequence[int]]) -> int:
        """Fill the first positions of prompts padded on the left, and return how many are known in every row.

        The longest rest of a prompt decides: of the others more is known than is used, as all are read side by side.
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


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two texts have in common."""
    both = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))
