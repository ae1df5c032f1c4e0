"""Prune a student from a model: layers, heads, units and channels, chosen by measurements on a few batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig
from llmctl.distilling.refit import can_refit, refit
from llmctl.model.cut import Kept, cut, prefixes
from llmctl.model.importance import Batches, Importance, rank, stack_of
from llmctl.model.shapes import has_shared_bias
from llmctl.model.transformer import LanguageModel, load_tensors

GREEDY_LAYERS = 12
"""Depth above which layers are chosen by influence, since trying each one takes too long."""

MeanLoss = Callable[[LanguageModel, Sequence[int] | None], float]
"""The loss of a model that has these hidden channels of the pruned one; None is all of them."""


@dataclass(frozen=True)
class Cut:
    """A pruned model: its shape, its state dict, and how it was chosen."""

    config: ModelConfig
    state: dict[str, Tensor]
    report: dict[str, Any]


def cut_student(
    model: LanguageModel,
    shape: ModelConfig,
    batches: Batches,
    mean_loss: MeanLoss,
    *,
    pick: str,
    say: Callable[[str], None],
    refit_batches: Batches = (),
    measures_all: bool = True,
) -> Cut:
    """Prune a model to a shape.

    mean_loss: the loss of a model on the same batches. refit_batches: those on which output projections are refit; without
    any they are not. pick: `greedy` removes the layer whose removal costs least, one after the other; `influence` those that
    change the residual stream least; `uniform` keeps evenly spaced ones; `auto` is greedy if that needs few trials. The first
    layer is always kept, by influence the last too. measures_all: also measure the loss before and between the steps.
    """
    config = model.config
    report: dict[str, Any] = {"loss_before": mean_loss(model, None)} if measures_all else {}
    importance = rank(model, batches)
    layers: dict[str, tuple[int, ...]] = {}
    for prefix, n_layers in prefixes(config).items():
        wanted = prefixes(shape)[prefix]
        if wanted < n_layers:
            way = pick if pick != "auto" else "greedy" if n_layers <= GREEDY_LAYERS else "influence"
            layers[prefix] = choose_layers(model, prefix, wanted, importance, mean_loss, way)
            report[f"{prefix}layers"] = list(layers[prefix])
            report["pick"] = way
    kept = narrow(model, shape, importance, layers)
    smaller, state = cut(config, model.state_dict(), kept)
    student = LanguageModel(smaller)
    load_tensors(student, state)
    channels = None if kept.channels is None else kept.channels.tolist()
    if measures_all:
        report["loss_cut"] = mean_loss(student, channels)
    if refit_batches and not can_refit(config):
        say(f"output projections are not refitted: their outputs are normalized (norm_position {config.norm_position})")
        refit_batches = ()
    if refit_batches:
        refit(model.eval(), student.eval(), kept, refit_batches, say)
        state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    report |= {"loss_after": mean_loss(student, channels), "d_model": smaller.d_model, "n_heads": smaller.n_heads}
    report |= {"d_ff": smaller.d_ff, "n_kv_heads": smaller.n_kv_heads}
    if channels is not None:
        report["channels"] = channels
    if measures_all:
        solved = f", {report['loss_after']:.3f} after refitting output projections" if refit_batches else ""
        change = f"{report['loss_before']:.3f} -> {report['loss_cut']:.3f}"
        say(f"pruned: loss {change}{solved}, before any training{kept_layers(layers, config)}")
    return Cut(smaller, state, report)


def kept_layers(layers: Mapping[str, Sequence[int]], config: ModelConfig) -> str:
    """Return a description of the kept layers."""
    parts = []
    for prefix, kept in layers.items():
        name = prefix.removeprefix("model.").rstrip(".")
        of = prefixes(config)[prefix]
        parts.append(f"{name + ' ' if name else ''}layers {', '.join(str(layer + 1) for layer in kept)} of {of}")
    return f"; {'; '.join(parts)} stay" if parts else ""


def choose_layers(
    model: LanguageModel, prefix: str, wanted: int, importance: Importance, mean_loss: MeanLoss, way: str
) -> tuple[int, ...]:
    """Return the kept layers of a stack in order."""
    n_layers = prefixes(model.config)[prefix]
    if way == "uniform":
        step = (n_layers - 1) / max(1, wanted - 1)
        return tuple(round(place * step) for place in range(wanted))
    layers = list(range(n_layers))
    if way == "influence":
        scores = [importance.influence[f"{prefix}layers.{layer}"] for layer in layers]
        ends = {0} if wanted < 2 else {0, n_layers - 1}
        order = sorted((layer for layer in layers if layer not in ends), key=lambda layer: -scores[layer])
        return tuple(sorted([*ends, *order[: wanted - len(ends)]]))
    while len(layers) > wanted:
        trials = {layer: loss_without(model, prefix, layers, layer, mean_loss) for layer in layers[1:]}
        layers.remove(min(trials, key=lambda layer: trials[layer]))
    return tuple(layers)


def loss_without(model: LanguageModel, prefix: str, layers: Sequence[int], missing: int, mean_loss: MeanLoss) -> float:
    """Return the loss with some layers of a stack and without one of them; the model is restored."""
    stack = stack_of(model, prefix)
    whole = stack.layers
    stack.layers = nn.ModuleList(whole[layer] for layer in layers if layer != missing)
    try:
        return mean_loss(model, None)
    finally:
        stack.layers = whole


def narrow(
    model: LanguageModel, shape: ModelConfig, importance: Importance, layers: dict[str, tuple[int, ...]]
) -> Kept:
    """Return what is kept: the most important channels, heads and units."""
    config = model.config
    channels = best(importance.channels, shape.d_model) if shape.d_model < config.d_model else None
    units: dict[str, Tensor] = {}
    if shape.d_ff < config.d_ff:
        units = {name: best(scores, shape.d_ff) for name, scores in importance.units.items()}
    groups: dict[str, Tensor] = {}
    if shape.n_kv_heads < config.n_kv_heads:
        groups = {name: best(scores, shape.n_kv_heads) for name, scores in shared(config, importance.groups).items()}
    return Kept(layers, channels, groups, units, norm_factors(importance, channels))


def shared(config: ModelConfig, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of heads; a shared relative position table makes all self-attentions of a stack keep the same heads."""
    if not has_shared_bias(config):
        return dict(groups)
    result = dict(groups)
    for prefix in prefixes(config):
        own = [name for name in groups if name.startswith(f"{prefix}layers.") and name.endswith("self_attn")]
        total = torch.stack([groups[name] for name in own]).sum(dim=0)
        result |= dict.fromkeys(own, total)
    return result


def best(scores: Tensor, n: int) -> Tensor:
    """Return the indices of the n largest scores in ascending order."""
    return scores.topk(n).indices.sort().values


def norm_factors(importance: Importance, channels: Tensor | None) -> dict[str, float]:
    """Return norm factors that preserve the scale of the kept channels, whose mean square differs from that of all."""
    if channels is None:
        return {}
    return {
        name: float((squares[channels].mean() / squares.mean()).sqrt()) for name, squares in importance.energy.items()
    }
