"""What the loop works with, put together by a job's session, and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmctl.config import OptimConfig, TrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.model.transformer import LanguageModel
from llmctl.runs.journal import Tracker
from llmctl.runs.progress import Progress
from llmctl.training.batch import BatchSource
from llmctl.training.objectives import Objective
from llmctl.training.state import State


@dataclass
class Training:
    """Everything `fit` works with.

    deadline, limit: on the clock of `time.monotonic`: the end of a budget of minutes; when this process must have ended.
    sample, score: generate samples, and metrics that need generated text, at every evaluation.
    keeps_start: the weights from before the first step are kept if training made them worse.
    """

    objective: Objective
    model: LanguageModel
    train: BatchSource
    held_out: BatchSource
    config: TrainConfig
    optim: OptimConfig
    runtime: Runtime
    folder: Path
    progress: Progress
    resume_command: str
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    deadline: float | None = None
    limit: float | None = None
    sample: Callable[[], list[dict[str, str]]] | None = None
    score: Callable[[int | None], dict[str, float]] | None = None
    metric: str = "loss"
    keeps_start: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    trackers: Mapping[str, Tracker] = field(default_factory=dict)
    state: State = field(default_factory=State)


@dataclass(frozen=True)
class Fitted:
    """The result: metrics before and after, the final state, the step whose weights were kept, and these weights."""

    before: dict[str, float]
    after: dict[str, float]
    state: State
    kept_step: int
    weights: dict[str, Tensor]
