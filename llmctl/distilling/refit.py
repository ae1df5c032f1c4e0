"""Refit output projections after pruning, so that they compensate what was removed as far as linear layers can.

Block by block from the bottom: inputs are the student's own states, including earlier errors; targets are the teacher's
inputs to the student's next block. Attention's output projection thus compensates earlier errors and removed heads, the
last projection of a block the removed units and the removed layers up to the next kept block. Nothing is trained: each
projection is a least-squares solution, regularized toward the pruned weights.
Source: layers replaced by linear maps merged into the feed-forward layer before them: ReplaceMe, Shopkhoev et al. 2025,
arXiv:2505.02819, section 3; projections refit after pruning units: SlimGPT, Ling et al. 2024, arXiv:2412.18110.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig
from llmctl.model.cut import Kept, prefixes
from llmctl.model.importance import Batches, stack_of
from llmctl.model.prunable import check_supported
from llmctl.model.stack import Block
from llmctl.model.streams import catch, run
from llmctl.model.transformer import LanguageModel

RIDGE = 1e-2
"""Ridge toward the pruned weights, as a fraction of the mean square of the inputs."""

Stream = tuple[Any, ...]
"""The arguments of a block: its input (B, T, D) and what all layers share."""


@torch.no_grad()
def refit(
    teacher: LanguageModel, student: LanguageModel, kept: Kept, batches: Batches, say: Callable[[str], None]
) -> None:
    """Refit a student's output projections in place; `say` reports every block.

    kept: the parts of the teacher that the student has. Both models are on the CPU, in float32 and evaluation mode.
    Raises: UsageError for a model with an unsupported setting, see `can_refit`.
    """
    check_supported(teacher.config, "refitting after pruning")
    assert can_refit(teacher.config)
    for prefix, n_layers in prefixes(teacher.config).items():
        if not is_cut(kept, prefix):
            continue
        layers = kept.layers.get(prefix, tuple(range(n_layers)))
        whole, blocks = list(stack_of(teacher, prefix).layers), list(stack_of(student, prefix).layers)
        # The student starts from the embeddings, the teacher's states from before its first kept layer.
        theirs = passed(whole[: layers[0]], [catch(teacher, whole[0], batch) for batch in batches])
        own = [catch(student, blocks[0], batch) for batch in batches]
        real = [is_real(batch, stream) for batch, stream in zip(batches, own, strict=True)]
        for place, block in enumerate(blocks):
            # A student's block stands for the teacher's layers up to the next kept one.
            *above, stop = *layers[place + 1 :], n_layers
            segment = whole[layers[place] : above[0] if above else stop]
            *earlier, last = sums(block)
            # Projections inside the block match the same sums of the teacher's first layer of the segment,
            # the last one what comes out of the whole segment.
            for one in earlier:
                fit(block, one, own, written(segment[0], one, theirs)[0], kept.channels, real)
            theirs = passed(segment[:-1], theirs)
            # A post-norm block ends in a norm: that of the segment's last layer belongs to the output to match.
            if not block.before and len(segment) > 1:
                take_norm(block.post_attention_layernorm, segment[-1].post_attention_layernorm, kept.channels)
            wanted, theirs = written(segment[-1], last, theirs)
            fit(block, last, own, wanted, kept.channels, real)
            # From here on the student's own states, with the errors that are left: later blocks compensate them.
            own = passed([block], own)
            say(
                f"refit the output projections of {prefix.removeprefix('model.').replace('.', ' ')}layer {place + 1} of {len(blocks)}"
            )


def can_refit(config: ModelConfig) -> bool:
    """Tell whether the residual sums are linear in the output projections: not if their outputs are normalized."""
    return config.norm_position in ("pre", "post")


def is_cut(kept: Kept, prefix: str) -> bool:
    """Return whether anything of a stack was removed."""
    names = (*kept.groups, *kept.units)
    return kept.channels is not None or prefix in kept.layers or any(name.startswith(prefix) for name in names)


def is_real(batch: Mapping[str, Tensor], stream: Stream) -> Tensor:
    """Return which positions are not padding (B, T)."""
    shape = stream[0].shape[:2]
    for name in ("decoder_documents_BT", "documents_BT"):
        if name in batch and batch[name].shape == shape:
            return batch[name] != 0
    return torch.ones(shape, dtype=torch.bool)


def sums(block: Block) -> list[tuple[str, str]]:
    """Return a block's output projections in order, each with the norm that follows its residual sum.

    The last one of a pre-norm block has none: its sum is the block's output, as are all sums of a block whose parts are
    side by side.
    """
    if block.parallel != "none":
        return [("self_attn.o_proj", ""), ("mlp.down_proj", "")]
    maps = ["self_attn.o_proj", *(["cross_attn.o_proj"] if block.cross else []), "mlp.down_proj"]
    norms = [
        "input_layernorm",
        *(["cross_attention_layernorm"] if block.cross else []),
        "post_attention_layernorm",
    ]
    return list(zip(maps, [*norms[1:], ""] if block.before else norms, strict=True))


def passed(blocks: Sequence[Block], streams: Sequence[Stream]) -> list[Stream]:
    """Return the hidden states after some blocks."""
    result = list(streams)
    for block in blocks:
        result = [(run(block, stream), *stream[1:]) for stream in result]
    return result


def seen(block: Block, stream: Stream, *names: str) -> tuple[Tensor, list[Tensor]]:
    """Return a block's output, under an empty name, and the inputs of some of its modules."""
    modules = [block.get_submodule(name) for name in names if name]
    caught: dict[nn.Module, Tensor] = {}
    handles = [one.register_forward_pre_hook(lambda module, args: caught.update({module: args[0]})) for one in modules]
    try:
        out = run(block, stream)
    finally:
        for handle in handles:
            handle.remove()
    return out, [caught[block.get_submodule(name)] if name else out for name in names]


def written(block: Block, one: tuple[str, str], streams: Sequence[Stream]) -> tuple[list[Tensor], list[Stream]]:
    """Return the residual sums that a projection adds to, and the hidden states after the block."""
    found = [seen(block, stream, one[1]) for stream in streams]
    return [caught[0] for _, caught in found], [
        (out, *stream[1:]) for (out, _), stream in zip(found, streams, strict=True)
    ]


def take_norm(norm: nn.Module, other: nn.Module, channels: Tensor | None) -> None:
    """Copy a norm's parameters of the kept channels to another norm."""
    for parameter, source in zip(norm.parameters(), other.parameters(), strict=True):
        parameter.copy_(source if channels is None else source[channels])


def fit(
    block: Block,
    one: tuple[str, str],
    streams: Sequence[Stream],
    wanted: Sequence[Tensor],
    channels: Tensor | None,
    real: Sequence[Tensor],
) -> None:
    """Solve for one projection, so that its residual sum matches the target."""
    module: Any = block.get_submodule(one[0])
    n_in, has_bias = module.in_features, module.bias is not None
    # Normal equations, accumulated in float64: inputs are strongly correlated.
    second_II = torch.zeros(n_in + has_bias, n_in + has_bias, dtype=torch.float64)
    cross_IO = torch.zeros(n_in + has_bias, module.out_features, dtype=torch.float64)
    for stream, target_BTD, is_real_BT in zip(streams, wanted, real, strict=True):
        _, (x_BTI, sum_BTD) = seen(block, stream, *one)
        # What the sum lacks, so that the solution is a change of the pruned weights, and the ridge pulls toward them.
        missing_BTD = ((target_BTD if channels is None else target_BTD[..., channels]) - sum_BTD) / block.scale
        x_PI = x_BTI[is_real_BT].double()
        if has_bias:
            x_PI = torch.cat([x_PI, x_PI.new_ones(len(x_PI), 1)], dim=1)
        second_II += x_PI.T @ x_PI
        cross_IO += x_PI.T @ missing_BTD[is_real_BT].double()
    second_II.diagonal().add_(RIDGE * second_II.diagonal()[:n_in].mean().clamp(min=1e-30))
    change_OI = torch.linalg.solve(second_II, cross_IO).T.to(module.weight.dtype)
    module.weight += change_OI[:, :n_in]
    if has_bias:
        module.bias += change_OI[:, n_in]
