"""Hooks that sum up what comes into linear maps."""

from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from llmctl.quant.methods import Moments


class Observer:
    """The moments of what comes into maps, by their names; those that read the same, one after the other, share them.

    weights: how much every position counts, for each batch, of the maps that have some.
    """

    def __init__(self, weights: Mapping[str, list[Tensor] | None] | None = None) -> None:
        self.weights = weights or {}
        self.moments: dict[str, Moments] = {}
        self._last: tuple[Tensor, Moments] | None = None
        self._seen: Counter[str] = Counter()

    def hook(self, name: str) -> Callable[..., None]:
        """Return the hook of a map, to be called before it."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            own = self.weights.get(name)
            if own is None and self._last is not None and self._last[0] is args[0]:
                self.moments[name] = self._last[1]
                return
            n_in: int = module.in_features  # type: ignore[assignment]
            mine = self.moments.setdefault(name, Moments.empty(n_in, args[0].device))
            mine.add(args[0], None if own is None else own[self._seen[name]])
            self._seen[name] += 1
            if own is None:
                self._last = args[0], mine

        return hook
