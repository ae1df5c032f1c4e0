"""What processes exchange before a step, in one all-reduce: counts, signals, and the first one's clock and step budget."""

import signal
from dataclasses import astuple, dataclass

import torch

from llmctl.distributed.runtime import Runtime


@dataclass(frozen=True)
class Word:
    """The values of one process, or their sum over all; every field is a number.

    labels, positions: of the step's own micro-batches. sigint, sigterm, sighup: 1 for the signal that came.
    wants_save, at_limit: 1 if a checkpoint is due, if the time limit is reached. total_steps, check_every: the plan, from the
    first process only.
    """

    labels: float = 0
    positions: float = 0
    sigint: float = 0
    sigterm: float = 0
    sighup: float = 0
    wants_save: float = 0
    at_limit: float = 0
    total_steps: float = 0
    check_every: float = 0

    @property
    def number(self) -> int:
        """The signal that ends the run, 0 if none came."""
        came = {signal.SIGINT: self.sigint, signal.SIGTERM: self.sigterm, signal.SIGHUP: self.sighup}
        return next((int(number) for number, count in came.items() if count), 0)


def agree(runtime: Runtime, word: Word) -> Word:
    """Return the sum over all processes."""
    values = torch.tensor(astuple(word), dtype=torch.float64, device=runtime.device)
    return Word(*runtime.sum(values).tolist())
