"""After a cut: maps that write into the stream take over, as far as linear maps can, what went did.

Block by block from the bottom, what comes in are the student's own states with the errors made so far, and what is to come
out is what the student's next block was given in the teacher. So attention makes up for errors below it and for heads
that are gone, and the last map of a block for units that are gone and for the layers between it and the next block that
stayed. Nothing is trained: each map is solved for by least squares, drawn to the weights that were cut out.
Source: layers replaced by linear maps that go into the feed-forward part before them, ReplaceMe, Shopkhoev et al. 2025,
arXiv:2505.02819, section 3; maps solved for anew after units are gone, SlimGPT, Ling et al. 2024, arXiv:2412.18110.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.model.cut import Kept, check_supported, prefixes
from llmctl.model.importance import Batches, stack_of
from llmctl.model.stack import Block
from llmctl.model.streams import catch, run
from llmctl.model.transformer import LanguageModel

RIDGE = 1e-2
"""What draws a map to the weights that were cut out, as a share of the mean square of what comes into it."""

Stream = tuple[Any, ...]
"""What a block is called with: its input (B, T, D) and what the layers share."""


@torch.no_grad()
def refit(
    teacher: LanguageModel, student: LanguageModel, kept: Kept, batches: Batches, say: Callable[[str], None]
) -> None:
    """Solve for a student's maps into its stream, in place; `say` hears of every block.

    kept: what of the teacher the student consists of. Both are on the CPU, in float32 and in their evaluation mode.
    Raises: UsageError for a model with a switch that is not known here.
    """
    check_supported(teacher.config, "refitting after pruning")
    for prefix, n_layers in prefixes(teacher.config).items():
        if not is_cut(kept, prefix):
            continue
        layers = kept.layers.get(prefix, tuple(range(n_layers)))
        whole, blocks = list(stack_of(teacher, prefix).layers), list(stack_of(student, prefix).layers)
        theirs = passed(whole[: layers[0]], [catch(teacher, whole[0], batch) for batch in batches])
        own = [catch(student, blocks[0], batch) for batch in batches]
        real = [is_real(batch, stream) for batch, stream in zip(batches, own, strict=True)]
        for place, block in enumerate(blocks):
            *above, stop = *layers[place + 1 :], n_layers
            segment = whole[layers[place] : above[0] if above else stop]
            *earlier, last = sums(block)
            for one in earlier:
                fit(block, one, own, written(segment[0], one, theirs)[0], kept.channels, real)
            theirs = passed(segment[:-1], theirs)
            if not block.pre and len(segment) > 1:
                take_norm(block.post_attention_layernorm, segment[-1].post_attention_layernorm, kept.channels)
            wanted, theirs = written(segment[-1], last, theirs)
            fit(block, last, own, wanted, kept.channels, real)
            own = passed([block], own)
            say(
                f"solved for the maps of {prefix.removeprefix('model.').replace('.', ' ')}layer {place + 1} of {len(blocks)}"
            )


def is_cut(kept: Kept, prefix: str) -> bool:
    """Tell whether anything of a stack is gone."""
    names = (*kept.groups, *kept.units)
    return kept.channels is not None or prefix in kept.layers or any(name.startswith(prefix) for name in names)


def is_real(batch: Mapping[str, Tensor], stream: Stream) -> Tensor:
    """Return which positions of a stream are no padding (B, T)."""
    shape = stream[0].shape[:2]
    for name in ("decoder_documents_BT", "documents_BT"):
        if name in batch and batch[name].shape == shape:
            return batch[name] != 0
    return torch.ones(shape, dtype=torch.bool)


def sums(block: Block) -> list[tuple[str, str]]:
    """Return a block's maps into the stream in their order, each with the norm that reads the sum it adds to.

    The last of a block whose norms come first has none: its sum is what comes out of the block.
    """
    maps = ["self_attn.o_proj", *(["cross_attn.o_proj"] if block.cross else []), "mlp.down_proj"]
    norms = [
        "input_layernorm",
        *(["cross_attention_layernorm"] if block.cross else []),
        "post_attention_layernorm",
    ]
    return list(zip(maps, [*norms[1:], ""] if block.pre else norms, strict=True))


def passed(blocks: Sequence[Block], streams: Sequence[Stream]) -> list[Stream]:
    """Return the streams after some blocks."""
    result = list(streams)
    for block in blocks:
        result = [(run(block, stream), *stream[1:]) for stream in result]
    return result


def seen(block: Block, stream: Stream, *names: str) -> tuple[Tensor, list[Tensor]]:
    """Return what a block makes of a stream, and what comes into some of its modules; no name stands for the former."""
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
    """Return the sums that one of a block's maps adds to, and the streams after the block."""
    found = [seen(block, stream, one[1]) for stream in streams]
    return [caught[0] for _, caught in found], [
        (out, *stream[1:]) for (out, _), stream in zip(found, streams, strict=True)
    ]


def take_norm(norm: nn.Module, other: nn.Module, channels: Tensor | None) -> None:
    """Give a norm the parameters of another, of the channels that stay."""
    for parameter, told in zip(norm.parameters(), other.parameters(), strict=True):
        parameter.copy_(told if channels is None else told[channels])


def fit(
    block: Block,
    one: tuple[str, str],
    streams: Sequence[Stream],
    wanted: Sequence[Tensor],
    channels: Tensor | None,
    real: Sequence[Tensor],
) -> None:
    """Solve for one of a block's maps, so that the sum it adds to is what is wanted."""
    module: Any = block.get_submodule(one[0])
    n_in, has_bias = module.in_features, module.bias is not None
    second_II = torch.zeros(n_in + has_bias, n_in + has_bias, dtype=torch.float64)
    cross_IO = torch.zeros(n_in + has_bias, module.out_features, dtype=torch.float64)
    for stream, target_BTD, is_real_BT in zip(streams, wanted, real, strict=True):
        _, (x_BTI, sum_BTD) = seen(block, stream, *one)
        missing_BTD = (target_BTD if channels is None else target_BTD[..., channels]) - sum_BTD
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
