"""Bits per layer under a budget: those get more whose rounding would move the model's predictions more.

How much is measured on a few batches: to second order, the divergence from the full model that a change of a layer's outputs
makes is half the mean square of that change along the gradient of the log-probability of what the model itself would say.

Source: as in `fisher.py`; allocation by marginal returns: Shoham and Gersho 1988, doi:10.1109/29.90373.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.engine.fisher import Hook, listen
from llmctl.engine.importance import Batches
from llmctl.errors import UsageError
from llmctl.formats.quantization import is_inside
from llmctl.losses.products import is_native
from llmctl.model.transformer import LanguageModel
from llmctl.quant.grid import decode
from llmctl.quant.methods import clipped
from llmctl.quant.schemes import SCHEMES, Scheme

CANDIDATES = ("int2", "int3", "int4", "int8")
"""Schemes that a layer may get, from the smallest."""

SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kMG]?)i?B?", re.ASCII | re.IGNORECASE)
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}

Costs = dict[str, dict[Scheme, float]]


def parse_size(text: str) -> int:
    """Read `60MB`, `1.5GB` or `500k` as bytes.

    Raises: UsageError for anything else.
    """
    found = SIZE.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        raise UsageError(f"`--target-size {text}` is not a size", "60MB, 1.5GB or 500kB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def candidates(plan: Mapping[str, Scheme], widths: Mapping[str, int]) -> dict[str, list[Scheme]]:
    """Return the schemes that every layer of a plan may get, its group kept where it is one; the smallest first."""
    found = {}
    for name, planned in plan.items():
        if not is_inside(name):
            continue
        found[name] = [
            replace(scheme, group=planned.group) if scheme.group and planned.group else scheme
            for scheme in map(SCHEMES.__getitem__, CANDIDATES)
        ]
        found[name] = [scheme if scheme.fits(widths[name]) else replace(scheme, group=0) for scheme in found[name]]
    return found


def measure_costs(
    model: LanguageModel,
    choices: Mapping[str, list[Scheme]],
    batches: Batches,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> Costs:
    """Return nats per token that each choice of each layer is expected to cost; the model stays as it is."""
    costs: Costs = {name: dict.fromkeys(schemes, 0.0) for name, schemes in choices.items()}
    inputs: dict[str, Tensor] = {}
    handles, hooks = [], {}
    for name, schemes in choices.items():
        layer: Any = model.get_submodule(name)
        changes = [decode(clipped(layer.weight.detach(), scheme), scheme) - layer.weight.detach() for scheme in schemes]
        handles.append(layer.register_forward_pre_hook(keeper(inputs, name)))
        hooks[name] = adder(inputs, name, changes, schemes, costs[name])
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_native(torch.bfloat16)):
            n_labels = listen(model, hooks, batches, say, seed)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {scheme: total / max(n_labels, 1) / 2 for scheme, total in each.items()} for name, each in costs.items()
    }


def keeper(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return the hook that keeps what comes into a layer until its gradient comes back."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].detach()

    return hook


def adder(
    inputs: dict[str, Tensor], name: str, changes: list[Tensor], schemes: list[Scheme], costs: dict[Scheme, float]
) -> Hook:
    """Return the hook that adds up what each change of a layer's weight would cost."""

    def hook(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
        x_NI, grad_NO = inputs.pop(name).flatten(0, -2), grads[0].flatten(0, -2)
        for scheme, change_OI in zip(schemes, changes, strict=True):
            costs[scheme] += float(((x_NI @ change_OI.T).float() * grad_NO).sum(dim=1).double().square().sum())

    return hook


def allocate(
    costs: Costs, shapes: Mapping[str, tuple[int, ...]], budget_bits: float, rest_bits: float = 0
) -> dict[str, Scheme]:
    """Return the scheme of every layer of least cost within a budget, by the largest saving per bit at each step.

    rest_bits: of the parts of the model whose bits are settled, for the message.

    Raises: UsageError with the smallest budget that can be.
    """
    chosen = {name: next(iter(each)) for name, each in costs.items()}
    sizes = {name: {scheme: scheme.size_bits(*shapes[name]) for scheme in each} for name, each in costs.items()}
    used = sum(sizes[name][scheme] for name, scheme in chosen.items())
    weights = sum(shapes[name][0] * shapes[name][1] for name in costs)
    if used > budget_bits:
        raise UsageError(
            f"the model cannot be held in {(budget_bits + rest_bits) / 8e6:,.3f} MB",
            f"the smallest possible is {(used + rest_bits) / 8e6:,.3f} MB, {used / weights:.2f} bits per weight in the blocks",
        )
    while True:
        steps = []
        for name, scheme in chosen.items():
            for other, cost in costs[name].items():
                more = sizes[name][other] - sizes[name][scheme]
                if more > 0 and used + more <= budget_bits and costs[name][scheme] > cost:
                    steps.append(((costs[name][scheme] - cost) / more, name, other))
        if not steps:
            return chosen
        _, name, other = max(steps, key=lambda step: step[0])
        used += sizes[name][other] - sizes[name][chosen[name]]
        chosen[name] = other
