"""Baselines of a distillation: the student's shape from fresh weights, trained on the data alone, with budgets of their own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmctl.config import DistillConfig, ModelConfig
from llmctl.distilling.settings import read_teacher
from llmctl.formats.artifact import Artifact
from llmctl.formats.transformers_backend import TransformersArtifact
from llmctl.model.flops import Rows, row_flops
from llmctl.training.task_data import TaskData

SCRATCH = "scratch"
WITH_RATE = f"{SCRATCH}-lr-"
"""What the names of the baselines begin with that try a learning rate; its factor follows."""

WITH_COMPUTE = f"{SCRATCH}-compute"
"""The baseline that also gets the steps which the teacher's share of the work would have paid for."""


def baseline_names(config: DistillConfig) -> list[str]:
    """Return the baselines of a run in the order of their training."""
    if not config.baseline.enabled:
        return []
    rates = [f"{WITH_RATE}{factor:g}" for factor in config.baseline.lr_factors]
    return [*rates, WITH_COMPUTE] if config.baseline.compute else rates


def baseline_config(
    config: DistillConfig, name: str, measured: Mapping[str, Mapping[str, Any]], cost_ratio: Callable[[], float]
) -> DistillConfig:
    """Return the config of a baseline: it has a learning rate and a number of steps of its own.

    measured: the metrics of the baselines before it. cost_ratio: the FLOPs of a step of the student with its teachers,
    over those of its own work.
    """
    factor, share = _budget(name, measured, cost_ratio)
    share *= config.stages  # as many steps as all stages together
    train, optim = config.train, config.optim
    steps, tokens = round(train.steps * share), round(train.tokens * share)
    train = replace(train, steps=steps, tokens=tokens, epochs=train.epochs * share)
    optim = replace(optim, lr=optim.lr * factor, muon_lr=optim.muon_lr * factor)
    return replace(config, train=train, optim=optim)


def _budget(
    name: str, measured: Mapping[str, Mapping[str, Any]], cost_ratio: Callable[[], float]
) -> tuple[float, float]:
    """Return a baseline's factor on the learning rate, and its steps as a share of the student's."""
    if name != WITH_COMPUTE:
        return float(name.removeprefix(WITH_RATE)), 1.0
    tuned = {name: metrics for name, metrics in measured.items() if name.startswith(WITH_RATE)}
    # Only the best rate is trained for longer: tuning again at the larger budget would cost as much as the rest.
    best = min(tuned, key=lambda name: tuned[name]["loss"])
    return float(best.removeprefix(WITH_RATE)), cost_ratio()


def row_costs(config: DistillConfig, data: TaskData, shape: ModelConfig) -> tuple[float, float]:
    """Return the FLOPs of a row: the student's forward and backward pass, and the teachers' forward passes."""
    rows = data.rows(shape)
    own = row_flops(shape, rows.source, rows.target, rows.label_frac)
    if config.loss.name == "seq" or config.teacher.cache:
        return own, 0.0
    teachers = [read_teacher(config, name) for name in (config.model, *config.teacher.more)]
    return own, sum(forward_flops(teacher, rows) for teacher in teachers)


def forward_flops(teacher: Artifact, rows: Rows) -> float:
    """Return the FLOPs of a teacher's forward pass over a row."""
    if isinstance(teacher, TransformersArtifact):  # blocks that are not ours: two for each parameter and token
        return 2.0 * teacher.n_parameters * (rows.source + rows.target)
    # A forward pass is a third of a training step.
    return row_flops(teacher.config, rows.source, rows.target, rows.label_frac) / 3
