"""Log probabilities of all answers by the model before training, for training without a second model in memory."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llmctl.data.preference_batches import SLOTS, PreferenceBatches
from llmctl.distributed.runtime import Runtime
from llmctl.files import atomic_path
from llmctl.machine import give_back_memory
from llmctl.runs.progress import Say, paced
from llmctl.training.batch import to_device
from llmctl.training.objectives import evaluating
from llmctl.training.preference_objective import PreferencePrediction
from llmctl.training.task_data import TaskData

FILE = "reference.npy"
ROWS = 8
"""Preferences per forward pass."""


def write_reference(objective: PreferencePrediction, data: TaskData, folder: Path, runtime: Runtime, say: Say) -> None:
    """Write the log probabilities of every answer (N, 2), and of those to other prompts (N, 3), unless they are there."""
    path = folder / FILE
    if path.exists():
        return
    objective.to(runtime.device)
    found = np.zeros((len(data.corpus.documents.lengths), SLOTS + (not objective.row.is_paired)))
    parts = [data.preferences(data.base.model.config, part, shuffle=False) for part in data.parts]
    n_batches = sum(-(-part.n_rows // ROWS) for part in parts)
    done = paced(say, "log probabilities before training: batch", n_batches)
    is_narrow = runtime.dtype == torch.bfloat16
    n_done = 0
    with (
        torch.inference_mode(),
        evaluating(objective.model),
        torch.autocast(runtime.device.type, torch.bfloat16, enabled=is_narrow),
    ):
        for part in parts:
            for start in range(0, part.n_rows, ROWS):
                numbers = range(start, min(start + ROWS, part.n_rows))
                found[[part.indexes(number)[0] for number in numbers]] = measured(objective, part, numbers, runtime)
                n_done += 1
                done(n_done)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    give_back_memory()


def measured(
    objective: PreferencePrediction, part: PreferenceBatches, numbers: range, runtime: Runtime
) -> NDArray[np.float64]:
    """Return the log probabilities of the answers of rows with one preference each."""
    batch = to_device(part.batch(numbers), runtime.device)
    columns = [objective.log_probs(batch)[0]]
    if part.mismatched is not None:
        columns.append(objective.log_probs(batch, "other_")[0][:, :1])
    return torch.cat(columns, dim=1).cpu().numpy()


def read_reference(folder: Path) -> NDArray[np.float64]:
    """Return what `write_reference` has written."""
    found: NDArray[np.float64] = np.load(folder / FILE, allow_pickle=False)
    return found
