"""The state of the loop besides weights and optimizer, saved with every checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmctl.errors import ArtifactError

WINDOW = 128
"""Window of recent losses and gradient norms in steps (OLMo's SkipStepOptimizer)."""

FEWEST = 32
"""Steps before spikes are detected."""

N_DEVIATIONS = 6.0


def is_alike(value: Any, default: Any) -> bool:
    """Tell whether a value is of the kind that its default is."""
    if isinstance(default, list):
        return isinstance(value, list) and all(is_alike(item, 0.0) for item in value)
    if isinstance(default, dict):
        return isinstance(value, dict)
    if isinstance(default, int):
        return type(value) is int and abs(value) < 2**63
    return (default is None and value is None) or type(value) in (int, float)


@dataclass
class State:
    """The counters of the loop.

    There is no data position and no random state: both follow from (seed, step). There is no scheduler state: the learning
    rate follows from (step, total_steps, lr_scale). eval_rows: the held-out rows of the evaluations before and after
    training; 0 is all.
    """

    step: int = 0
    total_steps: int = 0
    eval_rows: int = 0
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
        """Return the state for JSON."""
        return asdict(self)

    def take(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises: ArtifactError if an item is missing: the resumed run would differ.
        """
        for item in fields(self):
            if (
                item.name == "eval_rows" and item.name not in saved
            ):  # a checkpoint from before there were such: all rows
                continue
            if item.name not in saved:
                raise ArtifactError(f"the checkpoint's state has no `{item.name}`", "resume from an older checkpoint")
            if not is_alike(saved[item.name], getattr(State(), item.name)):
                raise ArtifactError(
                    f"the checkpoint's state has `{item.name}` {str(saved[item.name])[:60]}",
                    "resume from an older checkpoint",
                )
            setattr(self, item.name, saved[item.name])

    def spike(self, loss: float, norm: float) -> str:
        """Return a description of a spike, or an empty string; both values join the window.

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
