"""Optimizers, and the learning rate as a pure function of the step: there is no scheduler state to save."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llmctl.config import OptimConfig
from llmctl.distributed.sharding import own_rows
from llmctl.errors import ArtifactError
from llmctl.runs.checkpoint import Checkpoint
from llmctl.tables.optimizers import OPTIMIZERS
from llmctl.training.averaging import AVERAGE
from llmctl.training.muon import Muon

NOT_FOR_MUON = ("embed", "lm_head", "relative_bias", "classifier", "lora_")
"""Parts of parameter names that Muon is not meant for: embeddings, heads and low-rank factors."""


def make_optimizers(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by name: the configured one, and adamw for what it leaves out.

    Weight decay falls on matrices only. `dtype` is that of muon's matmuls. A group's `lr_scale` is its factor on the learning
    rate under layer decay. Source: layer decay: Howard and Ruder 2018, arXiv:1801.06146, section 3.2, in the form of ELECTRA,
    arXiv:2003.10555.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = layer_scales([name for name, _ in model.named_parameters()], config.layer_decay)
    row = OPTIMIZERS[config.name]
    own = [(name, p) for name, p in named if not row.matrices_only or is_hidden_matrix(name, p)]
    # By identity: comparing tensors compares their elements.
    chosen = {id(p) for _, p in own}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, some in ((config.name, own), ("adamw", [(name, p) for name, p in named if id(p) not in chosen])):
        if some:
            make: Make = globals()[OPTIMIZERS[name].make]
            optimizers[name] = make(groups_of(some, scales, config.weight_decay), config, dtype)
    return optimizers


Groups = list[dict[str, Any]]
Make = Callable[[Groups, OptimConfig, torch.dtype], torch.optim.Optimizer]


def adamw(groups: Groups, config: OptimConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Return AdamW."""
    del dtype
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def muon(groups: Groups, config: OptimConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Return Muon, whose orthogonalization multiplies in `dtype`."""
    return Muon(groups, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=config.momentum, dtype=dtype)


def groups_of(named: Sequence[tuple[str, nn.Parameter]], scales: Mapping[str, float], weight_decay: float) -> Groups:
    """Return parameter groups: matrices with weight decay, then vectors without."""
    # Norms and biases are not decayed: 0 is no sensible value to pull a norm's scale toward.
    matrices, vectors = [(n, p) for n, p in named if p.dim() >= 2], [(n, p) for n, p in named if p.dim() < 2]
    return [*grouped(matrices, scales, weight_decay), *grouped(vectors, scales, 0.0)]


def grouped(
    named: Sequence[tuple[str, nn.Parameter]], scales: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups, one per scale of the learning rate, in the order of the parameters."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(scales[name], []).append(parameter)
    return [{"params": ps, "weight_decay": weight_decay, "lr_scale": scale} for scale, ps in groups.items()]


def layer_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """Return each parameter's learning-rate factor: 1 for the head, multiplied by `decay` for every layer below.

    Embeddings count as below the first layer, the decoder of an encoder-decoder as on top of its encoder.
    """
    places = {name: re.match(r"(.*\.)layers\.(\d+)\.", name) for name in names}
    found = {(place[1], int(place[2])) for place in places.values() if place}
    bottom_up = sorted(found, key=lambda layer: ("decoder" in layer[0], layer[1]))
    layers = {layer: depth for depth, layer in enumerate(bottom_up, start=1)}
    # Depth 0 is below the first layer, `top` above the last: the head trains at the full rate.
    top = len(layers) + 1

    def depth_of(name: str) -> int:
        place = places[name]
        if place:
            return layers[place[1], int(place[2])]
        return 0 if "embed" in name or "relative_bias" in name else top

    return {name: decay ** (top - depth_of(name)) for name in names}


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a hidden matrix."""
    return parameter.dim() == 2 and not any(part in name for part in NOT_FOR_MUON)


def schedule(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step (counted from 0) as a fraction of its peak."""
    warmup_steps = max(1, round(config.warmup_frac * total_steps))
    if step < warmup_steps:
        # Counted from 1: a first step with rate 0 would be lost.
        return (step + 1) / warmup_steps
    shape: Callable[[int, int, int, OptimConfig], float] = globals()[config.schedule]
    low = config.min_lr_frac
    return low + (1 - low) * shape(step, warmup_steps, total_steps, config)


def progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the fraction of the steps after warmup that is done."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)


def cosine(step: int, warmup_steps: int, total_steps: int, config: OptimConfig) -> float:
    """Return half a cosine from 1 to 0."""
    del config
    return 0.5 * (1 + math.cos(math.pi * min(progress(step, warmup_steps, total_steps), 1.0)))


def linear(step: int, warmup_steps: int, total_steps: int, config: OptimConfig) -> float:
    """Return a line from 1 to 0."""
    del config
    return 1 - min(progress(step, warmup_steps, total_steps), 1.0)


def wsd(step: int, warmup_steps: int, total_steps: int, config: OptimConfig) -> float:
    """Return 1, then a line to 0 over the last `decay_frac` of the steps."""
    del warmup_steps
    if config.decay_frac <= 0:
        return 1.0
    return min(1.0, max((total_steps - step) / max(1.0, config.decay_frac * total_steps), 0.0))


def constant(step: int, warmup_steps: int, total_steps: int, config: OptimConfig) -> float:
    """Return 1."""
    del step, warmup_steps, total_steps, config
    return 1.0


def set_rates(optimizers: dict[str, torch.optim.Optimizer], config: OptimConfig, share: float) -> None:
    """Set every optimizer's learning rate to this fraction of its peak."""
    for name, optimizer in optimizers.items():
        rate = getattr(config, OPTIMIZERS[name].rate)
        for group in optimizer.param_groups:
            group["lr"] = rate * share * group["lr_scale"]


def named_state(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield every tensor of the optimizers' state under `optimizer/parameter name/key`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer_name, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{optimizer_name}/{names[id(parameter)]}/{key}", torch.as_tensor(value)


def load_state(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], saved: Checkpoint) -> None:
    """Restore what `named_state` yielded, by parameter name; each process takes its own rows.

    State that is not in the checkpoint (after a rollback to before the first step) is cleared.
    Raises: ArtifactError if the checkpoint has other optimizers or parameters, or lacks part of their state.
    """
    parameters = dict(model.named_parameters())
    states: dict[tuple[str, str], dict[str, Any]] = {}
    for key in saved.names("optimizer"):
        optimizer_name, _, rest = key.partition("/")
        parameter_name, _, entry = rest.partition("/")
        if optimizer_name not in optimizers or parameter_name not in parameters:
            raise ArtifactError(
                f"checkpoint `{saved.path}` has state of `{key}`, which this run does not have",
                "resume with the run's own recipe",
            )
        parameter = parameters[parameter_name]
        shape = saved.shape("optimizer", key)
        states.setdefault((optimizer_name, parameter_name), {})[entry] = (
            own_rows(parameter, lambda *rows, key=key: saved.read("optimizer", key, *rows))
            # State of the parameter's shape is sharded as the parameter is; scalars such as the step are whole.
            if shape == tuple(parameter.shape)
            else saved.read("optimizer", key)
        )
    # Only now: a file that cannot be read leaves the optimizers as they were.
    for optimizer in optimizers.values():
        optimizer.state.clear()
    for (optimizer_name, parameter_name), state in states.items():
        needed = {AVERAGE} if optimizer_name == AVERAGE else OPTIMIZERS[optimizer_name].state
        missing = sorted(needed - set(state))
        if missing:
            raise ArtifactError(
                f"checkpoint `{saved.path}` has no `{optimizer_name}/{parameter_name}/{missing[0]}`",
                "resume from an older checkpoint",
            )
        optimizers[optimizer_name].state[parameters[parameter_name]] = state
