"""What changes while training, besides weights and optimizer; saved with every checkpoint, each number needed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmctl.errors import ArtifactError

WINDOW = 128
"""Steps whose losses and gradient norms tell what is usual (OLMo's SkipStepOptimizer)."""

FEWEST = 32
"""Steps before which nothing is called a spike."""

N_DEVIATIONS = 6.0


@dataclass
class State:
    """The numbers of the loop.

    There is no position in the data and no state of random numbers: both follow from (seed, step). Nor is there one
    of a scheduler: the learning rate follows from (step, total_steps, lr_scale).
    """

    step: int = 0
    total_steps: int = 0
    labels: int = 0
    tokens: int = 0
    seconds: float = 0.0
    checked_step: int = 0
    best_value: float | None = None
    best_step: int = -1
    checks_since_best: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    lr_scale: float = 1.0
    skipped_batches: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    trackers: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        return asdict(self)

    def take(self, saved: Mapping[str, Any]) -> None:
        """Become the saved state.

        Raises: ArtifactError if an item is missing: a run that goes on without it would not be the same.
        """
        for item in fields(self):
            if item.name not in saved:
                raise ArtifactError(f"the checkpoint's state has no `{item.name}`", "resume from an older checkpoint")
            setattr(self, item.name, saved[item.name])

    def spike(self, loss: float, norm: float) -> str:
        """Return what stands out of the last steps, in words, or an empty string; remember the two otherwise.

        Source: OLMo-core's SkipStepOptimizer: more than six deviations above the mean of 128 steps.
        """
        found = []
        for name, value, usual in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if len(usual) >= FEWEST:
                mean = math.fsum(usual) / len(usual)
                deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in usual) / len(usual))
                if value > mean + N_DEVIATIONS * deviation:
                    found.append(f"{name} {value:.4g}, usually {mean:.4g} ± {deviation:.2g}")
        for value, usual in ((loss, self.losses), (norm, self.norms)):
            usual.append(value)
            del usual[:-WINDOW]
        return "; ".join(found)
