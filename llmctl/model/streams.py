"""Run a model block by block and capture the inputs of its layers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from llmctl.model.importance import read
from llmctl.model.transformer import LanguageModel


class CaughtError(Exception):
    """Raised to stop a forward pass once what it is run for has been captured."""


def chains(model: LanguageModel) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield sequences of blocks that pass on their hidden states, with a display name; encoders before decoders."""
    for stack in model.stacks():
        prefix = "" if len(model.stacks()) == 1 else "decoder " if stack.causal else "encoder "
        yield prefix, list(stack.layers)
        if stack.config.query_layer:
            yield f"{prefix}query ", [stack.query_layer]


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return module -> name."""
    return {module: name for name, module in model.named_modules()}


def linears(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of a block with their names in it."""
    return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def catch(model: LanguageModel, block: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return the arguments of a block when the model processes a batch."""
    caught: list[tuple[Any, ...]] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args)
        raise CaughtError

    handle = block.register_forward_pre_hook(hook)
    try:
        read(model, batch)
    except CaughtError:
        pass
    finally:
        handle.remove()
    return caught[0]


def run(block: nn.Module, stream: Sequence[Any]) -> Tensor:
    """Run a block on captured arguments."""
    out: Tensor = block(*stream)
    return out
