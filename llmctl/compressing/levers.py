"""What each lever costs alone: smaller vocabularies, fewer layers, narrower layers, fewer bits of the tables and the blocks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmctl.compressing.ground import Ground
from llmctl.compressing.plans import Plan, Point, Sensitivity, fractions
from llmctl.compressing.timeline import Timeline
from llmctl.config import ModelConfig, PlanConfig
from llmctl.distilling.cut_student import Cut, cut_student
from llmctl.distilling.student_shape import has_free_heads, resized, step_of, widths
from llmctl.errors import UsageError
from llmctl.model.prunable import check_supported
from llmctl.model.shapes import complete
from llmctl.model.transformer import LanguageModel
from llmctl.quant.methods import AnyScheme, clipped, decode
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.bit_allocation import Budget, Costs, allocate, measure_costs, unit_of
from llmctl.runs.progress import Say

DEPTHS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
WIDTHS = (5 / 6, 2 / 3, 1 / 2, 1 / 3)
HEADS = (2 / 3, 1 / 3)
MOST_WIDTHS = 2
"""Smaller model widths that are tried: each takes heads and feed-forward units with it."""

TABLE_BATCHES = 1
"""Held-out batches on which schemes of the tables are compared: their costs are small, and each takes a pass."""

HOPELESS = 3.0
"""A setting whose cost alone is more than so many times that of the best plan so far ends the search on its lever: training
recovers a part of what pruning costs, rarely more."""

CURVE = (1.0, 1.06, 1.12, 1.2, 1.3, 1.4, 1.55, 1.7, 1.9, 2.1, 2.4, 2.7, 3.0, 3.5, 4.0)
"""Budgets at which the cost of the blocks is computed, as multiples of the smallest."""

ROUNDED = 1.6
"""The budget, as a multiple of the smallest, at which distances of pooled states are related to costs of positions."""

Predict = Callable[[Sensitivity], list[Plan]]


def structures(config: ModelConfig, keep: Sequence[str], *, keeps_width: bool) -> dict[str, list[dict[str, int]]]:
    """Return the settings of each structural lever, the mildest first.

    keeps_width: the model's width stays, since its states are what it is used for.
    """
    config = complete(config)
    try:
        check_supported(config, "pruning")
    except UsageError:
        return {}
    found: dict[str, list[dict[str, int]]] = {}
    if "depth" not in keep:
        name = "layers" if config.family != "encoder_decoder" else "encoder layers"
        found[name] = [{"n_layers": n} for n in fractions(config.n_layers, DEPTHS)]
        if config.family == "encoder_decoder":
            found["decoder layers"] = [{"n_decoder_layers": n} for n in fractions(config.n_decoder_layers, DEPTHS)]
    if "width" not in keep:
        found["ffn"] = [{"d_ff": n} for n in fractions(config.d_ff, WIDTHS, step_of(config.d_ff))]
        size = config.n_heads // config.n_kv_heads
        if has_free_heads(config):
            found["heads"] = [{"n_kv_heads": n, "n_heads": n * size} for n in fractions(config.n_kv_heads, HEADS)]
        if not keeps_width:
            names = ("d_model", "n_heads", "n_kv_heads", "d_ff")
            narrower = [shape for shape in widths(config) if shape.d_model < config.d_model][:MOST_WIDTHS]
            found["dim"] = [{name: getattr(shape, name) for name in names} for shape in narrower]
    return {name: settings for name, settings in found.items() if settings}


def cut_to(ground: Ground, model: LanguageModel, changes: Mapping[str, int], plan: PlanConfig, say: Say) -> Cut:
    """Return a model pruned to other sizes and refit."""
    rows = -(-plan.refit_tokens // ground.config.train.seq_len) if plan.refit_tokens else 0

    def mean_loss(other: LanguageModel, _: Sequence[int] | None) -> float:
        return ground.mean_divergence(other)

    return cut_student(
        model,
        resized(complete(model.config), dict(changes)),
        ground.batches(plan.calibration_rows),
        mean_loss,
        pick=ground.config.student.pick,
        say=say,
        refit_batches=ground.batches(rows) if rows else [],
        measures_all=False,
    )


def measure_structure(
    ground: Ground,
    model: LanguageModel,
    levers: Mapping[str, Sequence[Mapping[str, int]]],
    measured: Sensitivity,
    plan: PlanConfig,
    predict: Predict,
    timeline: Timeline,
    done: Callable[[], None],
) -> None:
    """Add what structural levers cost to the measurements; `done` is called after each point."""
    timeline.plan("pruned model", sum(map(len, levers.values())))
    for name, settings in levers.items():
        points = measured.structure.setdefault(name, [])
        for number, changes in enumerate(settings, start=1):
            timeline.begin()
            known = next((point for point in points if point.changes == dict(changes)), None)
            if known is None:
                cut = cut_to(ground, model, changes, plan, lambda _: None)
                known = Point(dict(changes), float(cut.report["loss_after"]))
                points.append(known)
                timeline.done("pruned model", f"{name} {next(iter(changes.values()))}: {known.cost:.4f}")
                done()
            else:
                timeline.plan("pruned model", -1)
            best = predict(measured)
            if best and known.cost > HOPELESS * best[0].predicted:
                timeline.plan("pruned model", number - len(settings))
                break


def scheme_name(scheme: AnyScheme) -> str:
    """Return the name of a candidate scheme, for JSON."""
    return f"int{scheme.bits}/{scheme.group}" if isinstance(scheme, Scheme) else scheme.name


def measure_bits(
    ground: Ground, model: LanguageModel, budget: Budget, measured: Sensitivity, n_rows: int, say: Say
) -> None:
    """Add what fewer bits of the blocks cost: of every layer and scheme, and as a curve over the mean bits per weight."""
    costs = measure_costs(model, budget.choices, ground.batches(n_rows), ground.config.train.seed, say)
    if not (ground.predicts_tokens or ground.has_labels):
        factor = pooled_factor(ground, model, budget, costs)
        costs = {name: {one: factor * cost for one, cost in each.items()} for name, each in costs.items()}
    measured.layers = {name: {scheme_name(one): cost for one, cost in each.items()} for name, each in costs.items()}
    weights = sum(math.prod(budget.shapes[name]) for name in costs)
    least = sum(min(one.size_bits(*budget.shapes[name]) for one in each) for name, each in costs.items())
    most = sum(max(one.size_bits(*budget.shapes[name]) for one in each) for name, each in costs.items())
    seen: dict[float, float] = {}
    for bits in sorted({min(factor * common_least(budget), float(most)) for factor in CURVE} | {float(most)}):
        chosen = allocate(costs, budget.shapes, max(bits, least))
        used = sum(one.size_bits(*budget.shapes[name]) for name, one in chosen.items())
        seen[used / weights] = sum(costs[name][one] for name, one in chosen.items())
    measured.bits = sorted(seen.items())


@torch.no_grad()
def pooled_factor(ground: Ground, model: LanguageModel, budget: Budget, costs: Costs) -> float:
    """Return the distance of pooled states over the sum of the costs of positions, with all layers rounded."""
    chosen = allocate(costs, budget.shapes, ROUNDED * common_least(budget))
    before: dict[str, Tensor] = {}
    for name, scheme in chosen.items():
        weight = model.get_parameter(f"{name}.weight")
        before[name] = weight.detach().clone()
        weight.copy_(decode(clipped(before[name], scheme), scheme))
    found = ground.mean_divergence(model)
    for name, original in before.items():
        model.get_parameter(f"{name}.weight").copy_(original)
    return found / max(sum(costs[name][one] for name, one in chosen.items()), 1e-30)


def common_least(budget: Budget) -> float:
    """Return the bits of the smallest schemes that fused layers share."""
    units: dict[str, list[str]] = {}
    for name in budget.choices:
        units.setdefault(unit_of(name), []).append(name)
    total = 0
    for names in units.values():
        shared = [one for one in budget.choices[names[0]] if all(one in budget.choices[name] for name in names)]
        total += min(sum(one.size_bits(*budget.shapes[name]) for name in names) for one in shared)
    return float(total)


@torch.no_grad()
def measure_tables(
    ground: Ground, model: LanguageModel, tables: Mapping[str, Mapping[str, AnyScheme]], measured: Sensitivity
) -> None:
    """Add what schemes of embedding and head cost: name -> module -> scheme."""
    for name, schemes in tables.items():
        parameters = {module: model.get_parameter(f"{module}.weight") for module in schemes}
        before = {module: weight.detach().clone() for module, weight in parameters.items()}
        for module, scheme in schemes.items():
            parameters[module].copy_(decode(clipped(before[module], scheme), scheme))
        measured.tables[name] = ground.mean_divergence(model, TABLE_BATCHES)
        for module, weight in before.items():
            parameters[module].copy_(weight)


def kept_costs(
    layers: Mapping[str, Mapping[str, float]], choices: Mapping[str, Sequence[AnyScheme]], cut: Mapping[str, Any]
) -> dict[str, dict[AnyScheme, float]]:
    """Return the costs of a pruned model's layers, from those of the layers that they were."""
    found: dict[str, dict[AnyScheme, float]] = {}
    for name, schemes in choices.items():
        known = layers[earlier_name(name, cut)]
        found[name] = {scheme: nearest(known, scheme) for scheme in schemes}
    return found


def earlier_name(name: str, cut: Mapping[str, Any]) -> str:
    """Return the name that a pruned model's layer had before."""
    prefix, mark, rest = name.partition("layers.")
    kept = cut.get(f"{prefix}layers")
    if not mark or kept is None:
        return name
    number, _, inner = rest.partition(".")
    return f"{prefix}layers.{kept[int(number)]}.{inner}"


def nearest(known: Mapping[str, float], scheme: AnyScheme) -> float:
    """Return the cost of a scheme, or of one with as many bits and other groups."""
    name = scheme_name(scheme)
    if name in known:
        return known[name]
    bits = name.partition("/")[0]
    return next((cost for other, cost in known.items() if other.partition("/")[0] == bits), max(known.values()))
