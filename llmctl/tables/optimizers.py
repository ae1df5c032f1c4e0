"""Optimizers and learning-rate schedules. To add one: a row here, and its class or function in training/optim.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer.

    make: the function of training/optim.py that builds it. state: what it keeps of every parameter. floats_per_weight: in
    its state, for memory estimates. rate: the setting with its peak learning rate. matrices_only: the rest is left to adamw.
    """

    summary: str
    source: str
    make: str
    state: frozenset[str]
    floats_per_weight: int
    rate: str = "lr"
    matrices_only: bool = False


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(
        "AdamW for all parameters",
        "Loshchilov and Hutter 2017, arXiv:1711.05101",
        "adamw",
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
        2,
    ),
    "muon": OptimizerRow(
        "Muon for hidden matrices, adamw for the rest",
        "Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982",
        "muon",
        frozenset({"momentum_buffer"}),
        1,
        rate="muon_lr",
        matrices_only=True,
    ),
}

SCHEDULES: dict[str, str] = {
    "wsd": "constant, then linear decay over decay_frac; arXiv:2404.06395, arXiv:2405.18392",
    "cosine": "half a cosine; arXiv:1608.03983",
    "linear": "linear decay",
    "constant": "no decay",
}
"""Schedules after warmup, by the name of their function in training/optim.py, with their source."""
