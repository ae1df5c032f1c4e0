"""Quantize a model block by block: the inputs of each block come from the quantized blocks before it.

Memory holds the input moments of one block and the hidden states of the calibration rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.formats.quantization import EMBEDDING, HEAD, is_inside
from llmctl.machine import give_back_memory, share_heap
from llmctl.model.equalize import fold, joints, shared_factors
from llmctl.model.fisher import Weights, token_weights
from llmctl.model.importance import Batches, read
from llmctl.model.parameters import IN_EXPERTS
from llmctl.model.predicted_weights import Predictor, predictors
from llmctl.model.stack import Block
from llmctl.model.streams import CaughtError, InStep, catch, chains, linears, names_of, run
from llmctl.model.transformer import LanguageModel
from llmctl.quant.columns import PART_FLOATS
from llmctl.quant.factors import best_factors
from llmctl.quant.grid import Codes
from llmctl.quant.methods import AnyScheme, Moments, decode, method_of, output_errors, relative
from llmctl.quantizing.bit_allocation import unit_of
from llmctl.runs.progress import Say, paced
from llmctl.tables.methods import METHODS

Plan = Mapping[str, AnyScheme]
Weighers = Mapping[str, list[Tensor]] | Mapping[str, Predictor]

FISHER_ROWS = 16
"""Rows whose gradients are computed: the importance of positions in others is predicted."""

KEPT_BLOCKS = 4
"""Blocks after which freed memory is given back, where passes share a heap: getting it anew takes time."""


@dataclass
class Calibrated:
    """Codes by module, and each layer's relative output error where inputs were measured."""

    codes: dict[str, Codes] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def calibrate(
    model: LanguageModel, plan: Plan, method: str, batches: Batches, say: Say, *, is_narrow: bool = False
) -> Calibrated:
    """Return codes for the modules of a plan; the model's weights are replaced by their dequantized values.

    The output head, or the tied embedding, is calibrated on the output of the quantized blocks. Other modules outside the
    blocks use the clipped range. is_narrow: run the batches in bfloat16.
    """
    # No autocast cache: weights change between two passes through a block, and the second must see that.
    with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow, cache_enabled=False):
        return _calibrate(model.eval(), plan, method, batches, say)


def _calibrate(model: LanguageModel, plan: Plan, method: str, batches: Batches, say: Say) -> Calibrated:
    found = Calibrated()
    in_blocks: set[str] = set()
    sees_data, equalizes = needs_data(plan, method), moves_scales(plan, method)
    is_stepwise = in_step(model.config, plan, method)
    weights: Weighers = {}
    streams: list[tuple[Any, ...]] = []
    if METHODS[method].weighs:
        # Experts of the quantized model may get other tokens than the weights are of.
        weighed = [name for name in plan if is_inside(name) and IN_EXPERTS not in name]
        weights = find_weights(model, weighed, batches, say)
    for prefix, blocks in chains(model):
        streams = [catch(model, blocks[0], batch) for batch in batches] if sees_data else []
        if is_stepwise:
            # SmolLM2-135M: 1.63 GB and 1.2 s of page faults in 6 layers, against 1.90 GB and 2.9 s when each pass has a heap
            # of its own that is given back after every block.
            share_heap()
        done = freeing(paced(say, f"{prefix}layer", len(blocks)), every=KEPT_BLOCKS if is_stepwise else 1)
        for number, block in enumerate(blocks):
            name = names_of(model)[block]
            schemes = {inner: plan[f"{name}.{inner}"] for inner, _ in linears(block) if f"{name}.{inner}" in plan}
            in_blocks |= {f"{name}.{inner}" for inner in schemes}
            own = {inner: weights.get(f"{name}.{inner}") for inner in schemes}
            chosen = partial(choose_inside, found, block, name, schemes, method)
            if not streams:
                for inner in schemes:
                    chosen([inner], None)
            elif not is_stepwise:
                moments = observe(block, streams, own)
                if equalizes:
                    with torch.autocast("cpu", enabled=False):
                        equalize(block, model.config, schemes, moments, method)
                for inner in schemes:
                    chosen([inner], moments.get(inner))
                streams = [(run(block, stream), *stream[1:]) for stream in streams]
            else:
                outputs = choose_in_step(block, name, list(schemes), streams, own, chosen)
                streams = [(output, *stream[1:]) for output, stream in zip(outputs, streams, strict=True)]
            done(number + 1)
    give_back_memory()
    table = table_of(model)
    for name in sorted((name for name in plan if name not in in_blocks), key=lambda name: name == table):
        is_read = name == table and METHODS[method].needs_data  # the head's inputs have passed all blocks
        inputs = read_head(model, batches, [stream[0] for stream in streams]) if is_read else None
        own_method = method if is_read else fallback(method)
        choose(found, {name: model.get_submodule(name)}, plan[name], own_method, inputs)
    give_back_memory()
    return found


def find_weights(model: LanguageModel, names: Sequence[str], batches: Batches, say: Say) -> Weighers:
    """Return the importance of positions for the output errors of layers: predicted from the gradients of a few rows.

    Where padding makes that impossible, from those of all rows.
    """
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(input_of(name), []).append(name)
    n_rows, few = 0, []
    for batch in batches:
        if n_rows < FISHER_ROWS:
            few.append(batch)
        n_rows += len(batch["input_ids_BT"])
    if (
        model.config.positions != "disentangled"
    ):  # DeBERTa's queries and keys also multiply distances, its values do not
        done = freeing(paced(say, "Fisher information: batch", len(few)))
        found = predictors(model, units, few, done=done)
        if found is not None:
            return found
    done = freeing(paced(say, "Fisher information: batch", len(batches)))
    return shared(token_weights(model, names, batches, done=done))


def shared(weights: Weights) -> Weights:
    """Return the mean of the weights of layers that are multiplied as one, for all of them: they share their moments.

    That is also more certain: SmolLM2-135M on 32 rows, KL 0.01254 against 0.01272 with weights of their own (8 of 30 layers).
    """
    unit_names: dict[str, tuple[str | int, ...]] = {
        name: (input_of(name), *map(len, parts)) for name, parts in weights.items()
    }
    units: dict[tuple[str | int, ...], list[str]] = {}
    for name, unit in unit_names.items():
        units.setdefault(unit, []).append(name)
    means = {
        unit: [torch.stack(parts).mean(dim=0) for parts in zip(*(weights[name] for name in names), strict=True)]
        for unit, names in units.items()
    }
    return {name: means[unit] for name, unit in unit_names.items()}


def input_of(name: str) -> str:
    """Return the name shared by layers with the same inputs."""
    # Queries of cross-attention and of PanGu-Alpha's query layer have other inputs than keys and values.
    is_apart = name.endswith(("cross_attn.q_proj", "query_layer.self_attn.q_proj"))
    return f"{name} of the target" if is_apart else unit_of(name)


def freeing(done: Callable[[int], None], *, every: int = 1) -> Callable[[int], None]:
    """Return `done` so that freed memory is given back first: kept by the allocator, it was a third of the peak."""

    def then(number: int) -> None:
        if number % every == 0:
            give_back_memory()
        done(number)

    return then


def fallback(method: str) -> str:
    """Return the method for modules whose inputs are not measured."""
    return "clip" if METHODS[method].needs_data else method


def table_of(model: LanguageModel) -> str:
    """Return the module whose weight the output head multiplies by; empty if there is no head."""
    if model.config.n_labels:
        return ""
    return EMBEDDING if model.config.tie_embeddings else HEAD


def read_head(model: LanguageModel, batches: Batches, last: Sequence[Tensor]) -> Moments:
    """Return the input moments of the output head; `last`: what the last block returned for each batch."""
    stack = model.stacks()[-1]
    # Only the final norm follows, unless blocks are shared or a query layer comes after it.
    is_complete = len(last) > 0 and stack.n_repeats == 1 and not stack.config.query_layer
    moments = Moments.empty(model.config.d_embedding or model.config.d_model, model.device)
    for number, batch in enumerate(batches):
        hidden_BTD = stack.normed(last[number]) if is_complete else read(model, batch)
        moments.add(model.head_input(hidden_BTD))
    return moments


def refuse_unfinite(model: LanguageModel, name: str) -> None:
    """Refuse weights that are not finite.

    Raises: ArtifactError naming the tensor.
    """
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ArtifactError(f"`{name}` has NaN or infinite values in `{key}`", "download or train the model again")


def needs_data(plan: Plan, method: str) -> bool:
    """Return whether calibration needs batches."""
    return METHODS[method].needs_data or any(scheme.activations for scheme in plan.values())


def moves_scales(plan: Plan, method: str) -> bool:
    """Return whether scales are moved between the layers of a block before any of them has codes."""
    return METHODS[method].equalizes or any(scheme.activations for scheme in plan.values())


def in_step(config: ModelConfig, plan: Plan, method: str) -> bool:
    """Return whether one pass through a block serves all its layers, each after those before it have codes.

    Not if that is too early for scales to move, and not for DeBERTa, whose layers are also run on its distances.
    """
    return not moves_scales(plan, method) and config.positions != "disentangled"


def equalize(block: nn.Module, config: ModelConfig, schemes: Plan, moments: dict[str, Moments], method: str) -> None:
    """Move scales between the layers of a block where that lowers the error; the moments are updated."""
    if not isinstance(block, Block):
        return
    for joint in joints(block, config):
        readers = [name for name in joint.readers if name in schemes and name in moments]
        if len(readers) < len(joint.readers) or not moments[readers[0]].count:
            continue
        maps: list[Any] = [block.get_submodule(name) for name in readers]
        weights = [one.weight.float() for one in maps]
        own = [schemes[name] for name in readers]
        share = partial(shared_factors, joint=joint)
        factors_I = best_factors(weights, own, moments[readers[0]], share, method_of(method))
        if factors_I is not None:
            fold(joint, maps, factors_I)
            divided = {id(moments[name]): moments[name].divided(factors_I) for name in readers}
            moments |= {name: divided[id(moments[name])] for name in readers}


def choose_in_step(
    block: nn.Module,
    name: str,
    layers: Sequence[str],
    streams: Sequence[Sequence[Any]],
    weights: Mapping[str, list[Tensor] | Predictor | None],
    chosen: Callable[[Sequence[str], Moments | None], None],
) -> list[Tensor]:
    """Choose the codes of a block's layers in the order in which they are run, in one pass; return the block's outputs.

    chosen: what chooses those of layers with the same input.

    What comes into a layer has gone through the codes of those before it, in its own block too. SmolLM2-135M at 4 bits: the
    mean KL of four runs is that of three runs with a second pass (1.030 and 1.029 of one from before, each +- 0.02).
    """
    units = {inner: input_of(f"{name}.{inner}") for inner, _ in linears(block) if inner in layers}
    passes, left = InStep(block, streams, units), list(layers)
    for unit, inputs in passes:
        members = [inner for inner in left if units[inner] == unit]
        own = next((found for found in map(weights.get, members) if found is not None), None)
        n_in: int = block.get_submodule(members[0]).in_features  # type: ignore[assignment]
        moments = Moments.empty(n_in, next(iter(inputs.values())).device)
        for number, tensor in inputs.items():
            moments.add(tensor, own(tensor) if isinstance(own, Predictor) else own[number] if own else None)
        chosen(members, moments)
        left = [inner for inner in left if inner not in members]
    for inner in left:  # no input reached them, such as cross-attention without an encoder's output
        chosen([inner], None)
    return passes.outputs


def choose_inside(
    found: Calibrated,
    block: nn.Module,
    name: str,
    schemes: Plan,
    method: str,
    inner: Sequence[str],
    moments: Moments | None,
) -> None:
    """Choose the codes of layers with the same input in a block called `name`: together, if they are small."""
    groups: dict[AnyScheme, list[dict[str, nn.Module]]] = {}
    for layer in inner:
        module, own = block.get_submodule(layer), groups.setdefault(schemes[layer], [{}])
        if own[-1] and n_weights([*own[-1].values(), module]) > PART_FLOATS:
            own.append({})
        own[-1][f"{name}.{layer}"] = module
    for scheme, parts in groups.items():
        for layers in parts:
            choose(found, layers, scheme, method, moments)


def n_weights(layers: Iterable[nn.Module]) -> int:
    """Return the number of weights of layers."""
    return sum(layer.weight.numel() for layer in layers)  # type: ignore[operator, misc]


def choose(
    found: Calibrated, layers: Mapping[str, nn.Module], scheme: AnyScheme, method: str, moments: Moments | None
) -> None:
    """Choose the codes of modules with the same input, and replace their weights by the dequantized ones."""
    weights: list[Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    if moments is None or moments.count == 0:
        method = fallback(method)
    with torch.autocast("cpu", enabled=False):
        wide = [weight.float() for weight in weights]
        original = wide[0] if len(wide) == 1 else torch.cat(wide)  # no copy of a table
        codes = method_of(method)(original, scheme, moments)
        meant, sizes = decode(codes, scheme), list(map(len, weights))
        if moments is not None and moments.count:
            errors = zip(*(sums_O.split(sizes) for sums_O in output_errors(original, meant, moments)), strict=True)
            found.lost |= {name: relative(*own) for name, own in zip(layers, errors, strict=True)}
        found.codes |= dict(zip(layers, codes.split(sizes), strict=True))
        for weight, own in zip(weights, meant.split(sizes), strict=True):
            weight.copy_(own)


def observe(
    block: nn.Module, streams: Sequence[Sequence[Any]], weights: Mapping[str, list[Tensor] | Predictor | None]
) -> dict[str, Moments]:
    """Return the input moments of the linear layers of a block; layers with the same input and weights share them.

    weights: per-position weights of a layer's inputs, for each batch, or what predicts them.
    """
    moments: dict[str, Moments] = {}
    last: list[tuple[Tensor, list[Tensor] | Predictor | None, Moments]] = []
    seen: Counter[str] = Counter()
    order: list[str] = []
    names = [name for name, _ in linears(block)]

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(module, name, args)
            if len(order) < len(names):
                order.append(name)
            elif name == order[-1] and sorted(order) == sorted(names):
                raise CaughtError  # nothing more is read: the product of the last layer is not needed

        def take(module: nn.Module, name: str, args: tuple[Tensor, ...]) -> None:
            own = weights.get(name)
            if last and last[0][0] is args[0] and last[0][1] is own:
                moments[name] = last[0][2]
                return
            n_in: int = module.in_features  # type: ignore[assignment]
            found = moments.setdefault(name, Moments.empty(n_in, args[0].device))
            if isinstance(own, Predictor):
                found.add(args[0], own(args[0]))
            else:
                found.add(args[0], None if own is None else own[seen[name]])
            seen[name] += 1
            last[:] = [(args[0], own, found)]

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in linears(block)]
    try:
        for stream in streams:
            with suppress(CaughtError):
                run(block, stream)
    finally:
        for handle in handles:
            handle.remove()
    return moments
