"""Run a model block by block and capture the inputs of its layers."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
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


def settings_of_thread() -> Callable[[], AbstractContextManager[None]]:
    """Return what enters this thread's gradient mode and autocast, without its cache of weights, in another one."""
    is_enabled = torch.is_grad_enabled()
    is_narrow, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    @contextmanager
    def entered() -> Iterator[None]:
        with torch.set_grad_enabled(is_enabled), torch.autocast("cpu", dtype, enabled=is_narrow, cache_enabled=False):
            yield

    return entered


class InStep:
    """Passes of one block over several streams that wait for each other before its layers, which can then be changed.

    units: layer -> name of what it belongs to: layers of one unit have the same input. One pass runs at a time, each in a
    thread of its own, whose stack keeps what it has computed while it waits. `outputs` holds the block's outputs at the end.
    """

    def __init__(self, block: nn.Module, streams: Sequence[Sequence[Any]], units: Mapping[str, str]) -> None:
        self.block, self.streams, self.units = block, streams, units
        self.outputs: list[Tensor] = []
        self._settings = settings_of_thread()
        self._waiting: dict[int, tuple[str, Tensor]] = {}
        self._passed: set[str] = set()
        self._current, self._is_stopped = 0, False
        self._turns = [threading.Semaphore(0) for _ in streams]
        self._back = threading.Semaphore(0)

    def __iter__(self) -> Iterator[tuple[str, dict[int, Tensor]]]:
        """Yield every unit with the input of its layers in each stream that reaches it.

        Until then its layers have not been run. Where streams differ in their order of layers, such as with experts, a unit
        that comes earlier in the block is yielded with the streams that wait for it.
        """
        order = {unit: place for place, unit in enumerate(dict.fromkeys(self.units.values()))}
        handles = [
            self.block.get_submodule(layer).register_forward_pre_hook(self._hook_of(unit))
            for layer, unit in self.units.items()
        ]
        try:
            with ThreadPoolExecutor(len(self.streams)) as pool:
                try:
                    passes = [pool.submit(self._run, number) for number in range(len(self.streams))]
                    for one in passes:
                        one.add_done_callback(lambda _: self._back.release())
                    self._resume(passes, range(len(passes)))
                    while self._waiting:
                        unit = min((unit for unit, _ in self._waiting.values()), key=order.__getitem__)
                        inputs = {number: own for number, (name, own) in sorted(self._waiting.items()) if name == unit}
                        yield unit, inputs
                        self._passed.add(unit)
                        self._resume(passes, inputs)
                    self.outputs = [one.result() for one in passes]
                finally:
                    self._is_stopped = True
                    for turn in self._turns:
                        turn.release()
        finally:
            for handle in handles:
                handle.remove()

    def _resume(self, passes: Sequence[Future[Tensor]], numbers: Iterable[int]) -> None:
        """Run passes until they wait again or end, one after the other."""
        for number in numbers:
            self._waiting.pop(number, None)
            self._current = number
            self._turns[number].release()
            self._back.acquire()
            if passes[number].done():
                passes[number].result()  # raises its error

    def _run(self, number: int) -> Tensor:
        self._turns[number].acquire()
        if self._is_stopped:
            raise CaughtError
        with self._settings():
            return run(self.block, self.streams[number])

    def _hook_of(self, unit: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if unit in self._passed:
                return
            number = self._current
            self._waiting[number] = unit, args[0]
            self._back.release()
            self._turns[number].acquire()
            if self._is_stopped:
                raise CaughtError

        return hook
