"""Allocate bits to layers under a size budget: more to those whose rounding error changes the predictions more.

Layers with the same inputs, which are multiplied as one, get the same bits.

Sensitivity is measured on a few batches: to second order, the KL divergence caused by a change of a layer's outputs is half
its mean square along the gradient of the log-probability of tokens sampled from the model.

Source: as in `model/fisher.py`; allocation by marginal returns: Shoham and Gersho 1988, doi:10.1109/29.90373.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.config import ModelConfig, WeightsConfig
from llmctl.errors import UsageError
from llmctl.formats.quantization import is_inside, stored_bytes
from llmctl.losses.logits import cap_, is_native
from llmctl.model.fisher import CHUNK_TOKENS, Hook, listen
from llmctl.model.importance import Batches
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel
from llmctl.quant.methods import AnyScheme, clipped, decode
from llmctl.quant.schemes import GROUPS, SCHEMES, Scheme
from llmctl.runs.progress import paced

WIDTHS = {2: (1,), 3: (1, 2), 4: (1, 2), 5: (2,), 6: (2,)}
"""Bits of grouped schemes, with their group sizes as multiples of the plan's; 8 bits always use whole rows.

With more bits, the scales of small groups cost more than they gain."""

PART_WEIGHTS = 1 << 30
"""Weight changes (2 bytes each) kept in memory at a time; a larger model takes several passes."""

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a module that are fused into one matmul, by the ends of their names."""

SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kMG]?)i?B?", re.ASCII | re.IGNORECASE)
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}

Costs = dict[str, dict[AnyScheme, float]]


def parse_size(text: str, option: str = "--target-size") -> int:
    """Read `60MB`, `1.5GB` or `500k` as bytes.

    Raises: UsageError naming the option for anything else.
    """
    found = SIZE.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        raise UsageError(f"`{option} {text}` is not a size", "60MB, 1.5GB or 500kB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def candidates(plan: Mapping[str, Scheme], widths: Mapping[str, int]) -> dict[str, list[AnyScheme]]:
    """Return the candidate schemes of every layer in a plan: its group size or twice that, and int8."""
    return {name: schemes_like(planned, widths[name]) for name, planned in plan.items() if is_inside(name)}


def schemes_like(planned: Scheme, width: int) -> list[AnyScheme]:
    """Return the candidate schemes of a layer with `width` inputs, the smallest first."""
    # A plan of int8 has no groups: candidates with fewer bits take int4's.
    base = planned if planned.group else SCHEMES["int4"]
    group = base.group if base.fits(width) else 0
    sizes = {
        times: times * group if times * group <= max(GROUPS) and width % (times * group or 1) == 0 else group
        for times in (1, 2)
    }
    found = {replace(base, bits=bits, group=sizes[times]) for bits, each in WIDTHS.items() for times in each}
    return sorted({*found, SCHEMES["int8"]}, key=lambda scheme: scheme.size_bits(1, width))


def measure_costs(
    model: LanguageModel,
    choices: Mapping[str, list[AnyScheme]],
    batches: Batches,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> Costs:
    """Return the expected cost of each candidate of each layer in nats per token; the model is not changed.

    Costs are those of clipped rounding, whatever method chooses the codes later: counting only the error that GPTQ leaves
    (0.07 of it in some key projections, 0.53 in some gates) allocated no better (SmolLM2: KL 0.0254 either way).
    """
    costs: Costs = {}
    for part in parts_of(model, choices):
        costs |= measure_part(model, part, batches, seed, say)
    return costs


def parts_of(model: LanguageModel, choices: Mapping[str, list[AnyScheme]]) -> list[dict[str, list[AnyScheme]]]:
    """Split the candidates into parts whose weight changes fit in memory together."""
    parts: list[dict[str, list[AnyScheme]]] = []
    held = PART_WEIGHTS
    for name, schemes in choices.items():
        n_weights = model.get_parameter(f"{name}.weight").numel() * len(schemes)
        if held + n_weights > PART_WEIGHTS:
            parts.append({})
            held = 0
        parts[-1][name] = schemes
        held += n_weights
    return parts


def measure_part(
    model: LanguageModel,
    choices: Mapping[str, list[AnyScheme]],
    batches: Batches,
    seed: int,
    say: Callable[[str], None],
) -> Costs:
    """Return the costs of one part of the layers."""
    costs: Costs = {name: dict.fromkeys(schemes, 0.0) for name, schemes in choices.items()}
    inputs: dict[str, Tensor] = {}
    handles, hooks = [], {}
    for name, schemes in choices.items():
        layer: Any = model.get_submodule(name)
        weight_OI = layer.weight.detach()
        # bfloat16: only the size of a change matters here, and there are several per layer.
        changes = [(decode(clipped(weight_OI, scheme), scheme) - weight_OI).bfloat16() for scheme in schemes]
        handles.append(layer.register_forward_pre_hook(keeper(inputs, name)))
        hooks[name] = adder(inputs, name, changes, schemes, costs[name])
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_native(torch.bfloat16)):
            n_labels = listen(model, hooks, batches, paced(say, "Fisher information: batch", len(batches)), seed)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {scheme: total / max(n_labels, 1) / 2 for scheme, total in each.items()} for name, each in costs.items()
    }


@torch.no_grad()
def measure_table_costs(model: LanguageModel, choices: Mapping[str, list[AnyScheme]], batches: Batches) -> Costs:
    """Return the costs of candidates of embedding and head: the divergence of the outputs if only they are rounded.

    They are in no hook of a backward pass: a tied one changes the inputs and the outputs. The model is not changed.
    """
    before = [outputs_of(model, batch) for batch in batches]
    costs: Costs = {}
    for name, schemes in choices.items():
        weight = model.get_parameter(f"{name}.weight")
        original = weight.detach().clone()
        costs[name] = {}
        for scheme in schemes:
            weight.copy_(decode(clipped(original, scheme), scheme))
            found = [outputs_of(model, batch) for batch in batches]
            total = sum(divergence(model, one, other) for one, other in zip(before, found, strict=True))
            costs[name][scheme] = total / sum(len(one) for one, _ in before)
        weight.copy_(original)
    return costs


@torch.no_grad()
def outputs_of(model: LanguageModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the states (N, D) before the head at labeled positions, and the head's weight; without labels no weight."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
    hidden_ND, labels = model.hidden(**inputs).flatten(0, 1), batch.get("labels")
    if labels is None or model.config.n_labels:
        return hidden_ND, None
    states_ND = model.head_input(hidden_ND[(labels.flatten() >= 0).nonzero().squeeze(1)])
    return states_ND, model.lm_head.weight.detach().clone()


def divergence(model: LanguageModel, one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> float:
    """Return the sum of KL(one || other) over positions in nats; of states, as means of unit normal distributions."""
    total = 0.0
    for p_ND, q_ND in zip(one[0].split(CHUNK_TOKENS), other[0].split(CHUNK_TOKENS), strict=True):
        if one[1] is None or other[1] is None:
            total += float((p_ND - q_ND).square().sum()) / 2
            continue
        p_NV, q_NV = (logits(model, states, weight) for states, weight in ((p_ND, one[1]), (q_ND, other[1])))
        total += float((p_NV.exp() * (p_NV - q_NV)).sum(dtype=torch.float64))
    return total


def logits(model: LanguageModel, states_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Return log-probabilities (N, V)."""
    logits_NV = F.linear(states_ND, weight_VD, model.lm_head.bias)
    cap_(logits_NV, model.config.logits_softcap)
    return logits_NV.log_softmax(dim=-1)


def keeper(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return the hook that keeps a layer's input until the backward pass."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].detach()

    return hook


def adder(
    inputs: dict[str, Tensor], name: str, changes: list[Tensor], schemes: list[AnyScheme], costs: dict[AnyScheme, float]
) -> Hook:
    """Return the hook that adds up the cost of each change of a layer's weight."""

    def hook(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
        x_NI, grad_NO = inputs.pop(name).flatten(0, -2), grads[0].flatten(0, -2)
        for scheme, change_OI in zip(schemes, changes, strict=True):
            # Squared per position before summing: the expected square of the loss change (Fisher information).
            moved_NO = x_NI @ change_OI.to(x_NI.dtype).T
            costs[scheme] += float((moved_NO.float() * grad_NO).sum(dim=1).double().square().sum())

    return hook


class Budget(NamedTuple):
    """The bits to allocate: candidate schemes and shapes by layer, the bits for all of them, and the bits of everything else."""

    choices: dict[str, list[AnyScheme]]
    shapes: dict[str, tuple[int, ...]]
    bits: float
    rest_bits: int


def budget_of(config: ModelConfig, plan: Mapping[str, Scheme], weights: WeightsConfig) -> Budget:
    """Return the budget that `target_size` or `target_bpw` sets."""
    parameters = parameter_shapes(config)
    shapes = {name: parameters[f"{name}.weight"] for name in plan}
    choices = candidates(plan, {name: shape[1] for name, shape in shapes.items()})
    # A size in bytes covers the whole file; bits per weight count the allocated layers only.
    rest = other_bits(config, plan, set(choices))
    if weights.target_size:
        return Budget(choices, shapes, 8 * parse_size(weights.target_size) - rest, rest)
    return Budget(choices, shapes, weights.target_bpw * sum(math.prod(shapes[name]) for name in choices), rest)


def other_bits(config: ModelConfig, plan: Mapping[str, Scheme], allocated: set[str]) -> int:
    """Return the bits of everything with a fixed scheme: embedding, head, norms, biases."""
    shapes = parameter_shapes(config)
    bits = sum(scheme.size_bits(*shapes[f"{name}.weight"]) for name, scheme in plan.items() if name not in allocated)
    planned = {f"{name}.weight" for name in plan}
    # A tied head has no weights of its own in the file.
    if config.tie_embeddings:
        planned.add("lm_head.weight")
    return bits + sum(
        (16 if len(shape) > 1 else 32) * math.prod(shape) for name, shape in shapes.items() if name not in planned
    )


def check_budget(
    choices: Mapping[str, Iterable[AnyScheme]],
    shapes: Mapping[str, tuple[int, ...]],
    budget_bits: float,
    rest_bits: float = 0,
) -> None:
    """Refuse a budget below the smallest candidate of every layer; rest_bits as in `allocate`.

    Raises: UsageError with the smallest possible budget.
    """
    least = sum(min(scheme.size_bits(*shapes[name]) for scheme in each) for name, each in choices.items())
    weights = sum(shapes[name][0] * shapes[name][1] for name in choices)
    if least > budget_bits:
        raise UsageError(
            f"the model cannot be quantized to {(budget_bits + rest_bits) / 8e6:,.3f} MB",
            f"the smallest possible is {math.ceil((least + rest_bits) / 8e3) / 1e3:,.3f} MB, {least / weights:.2f} bits per weight "
            "in the matrices",
        )


def allocate(
    costs: Costs, shapes: Mapping[str, tuple[int, ...]], budget_bits: float, rest_bits: float = 0
) -> dict[str, AnyScheme]:
    """Return the scheme of every layer, greedily: at each step the upgrade with the largest gain per bit that still fits.

    rest_bits: of the parts of the model with fixed bits, for the error message.

    Raises: UsageError as `check_budget`.
    """
    check_budget(costs, shapes, budget_bits, rest_bits)
    units: dict[str, list[str]] = {}
    for name in costs:
        units.setdefault(unit_of(name), []).append(name)
    losses, sizes = {}, {}
    for unit, names in units.items():
        # Fused layers must agree, so only candidates that all of them have.
        shared = [scheme for scheme in costs[names[0]] if all(scheme in costs[name] for name in names)]
        losses[unit] = {scheme: sum(costs[name][scheme] for name in names) for scheme in shared}
        sizes[unit] = {scheme: sum(scheme.size_bits(*shapes[name]) for name in names) for scheme in shared}
    # Start from the smallest model and upgrade while the budget lasts.
    chosen = {unit: min(each, key=each.__getitem__) for unit, each in sizes.items()}
    used = sum(sizes[unit][scheme] for unit, scheme in chosen.items())
    while True:
        steps = []
        for unit, scheme in chosen.items():
            for other, loss in losses[unit].items():
                more = sizes[unit][other] - sizes[unit][scheme]
                # An upgrade may skip sizes: of all that fit, the best gain per bit is taken.
                if more > 0 and used + more <= budget_bits and losses[unit][scheme] > loss:
                    steps.append(((losses[unit][scheme] - loss) / more, unit, other))
        if not steps:
            return {name: chosen[unit] for unit, names in units.items() for name in names}
        # `max` keeps the first of equals, in the order of layers: the result is deterministic.
        _, unit, other = max(steps, key=lambda step: step[0])
        used += sizes[unit][other] - sizes[unit][chosen[unit]]
        chosen[unit] = other


def allocate_stored(
    config: ModelConfig, plan: Mapping[str, AnyScheme], costs: Costs, budget: Budget
) -> dict[str, AnyScheme]:
    """Return the scheme of every layer so that the file, with the padding of packed codes, fits the budget.

    plan: the schemes of all modules, before those of `costs` are allocated.

    Raises: UsageError as `check_budget`.
    """
    bits = budget.bits
    least = sum(min(one.size_bits(*budget.shapes[name]) for one in each) for name, each in costs.items())
    while True:
        chosen = allocate(costs, budget.shapes, bits, budget.rest_bits + budget.bits - bits)
        schemes = {name: one for name, one in {**plan, **chosen}.items() if isinstance(one, Scheme)}
        nominal = sum(one.size_bits(*budget.shapes[name]) for name, one in schemes.items())
        used = sum(one.size_bits(*budget.shapes[name]) for name, one in chosen.items())
        excess = used + 8 * stored_bytes(schemes, config) - nominal - budget.bits
        if excess <= 0:
            return chosen
        # The smallest schemes may fit where a step of this size would ask for less than they take.
        bits = bits - excess if bits <= least else max(bits - excess, least)


def unit_of(name: str) -> str:
    """Return the name shared by layers that must get the same bits."""
    parent, _, last = name.rpartition(".")
    return next((f"{parent}.{ends[0]}" for ends in TOGETHER if last in ends), name)
