"""Metrics of models next to their teacher, on the same held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from llmctl.config import ModelConfig, TaughtConfig, TrainConfig
from llmctl.distilling.build_objective import build_objective, shared_vocabulary
from llmctl.distilling.matching import Matching
from llmctl.distilling.objectives import Distillation
from llmctl.distilling.teacher import Teachers
from llmctl.distributed.runtime import Runtime
from llmctl.model.transformer import LanguageModel
from llmctl.training.held_out import measure
from llmctl.training.objectives import Objective, token_bytes_of
from llmctl.training.task_data import TaskData


def measuring_objective(
    config: TaughtConfig,
    data: TaskData,
    teachers: Teachers,
    model: LanguageModel,
    channels: Sequence[int] | None = None,
) -> Objective:
    """Return the objective by which models are compared: KL divergence at temperature 1 where tokens are predicted."""
    if model.config.n_labels or config.loss.name == "none":
        return build_objective(config, data, teachers, model, channels=channels)
    return Distillation(
        model,
        teachers.computing,
        replace(config.loss, name="fkl", temperature=1.0, weight=1.0),
        token_bytes_of(data.corpus, model.config),
        matching=Matching(),
        chunk_tokens=config.train.loss_chunk_tokens,
        vocab_size=shared_vocabulary(model, teachers),
    )


def measure_models(
    models: Mapping[str, LanguageModel],
    shape: ModelConfig,
    config: TaughtConfig,
    data: TaskData,
    teachers: Teachers,
    train: TrainConfig,
    runtime: Runtime,
    *,
    channels: Sequence[int] | None = None,
    max_tokens: int | None = None,
    exact: bool = False,
) -> dict[str, dict[str, float]]:
    """Return the metrics of models, and how far each is from the teacher, on the same held-out rows.

    shape: of the model that trains, by which the rows are laid out. max_tokens: see `measure`; the rows on which a run within
    a budget of minutes was evaluated. exact: do not autocast to bfloat16 where training does.
    """
    is_narrow = runtime.dtype == torch.bfloat16 and not exact
    source, metrics = data.batches(shape, shuffle=False), {}
    for name, model in models.items():
        objective = measuring_objective(config, data, teachers, model, channels)
        with torch.autocast(runtime.device.type, torch.bfloat16, enabled=is_narrow):
            metrics[name] = measure(
                objective, objective, source, train, runtime, max_tokens, lambda: None, sharded=False
            )
    return metrics
