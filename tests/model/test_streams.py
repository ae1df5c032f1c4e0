"""Passes of a block over several streams that wait for each other."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from llmctl.model.streams import InStep, catch, linears
from llmctl.model.transformer import LanguageModel
from tests.families.test_table import CONFIGS, config_of

UNITS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def block_and_streams(**fields: int) -> tuple[nn.Module, list[tuple[object, ...]]]:
    torch.manual_seed(0)
    model = LanguageModel(replace(config_of(CONFIGS["LlamaForCausalLM"][0]), dropout=0.0, **fields)).eval()
    block = model.stacks()[-1].layers[0]
    ids = torch.randint(4, 40, (6, 5), generator=torch.Generator().manual_seed(1))
    return block, [catch(model, block, {"input_ids_BT": part}) for part in ids.split([1, 3, 2])]


def units_of(block: nn.Module) -> dict[str, str]:
    return {name: f"{name.rpartition('.')[0]}.{UNITS.get(name.split('.')[-1], name)}" for name, _ in linears(block)}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"n_experts": 8, "n_active_experts": 1}])
def test_layers_are_changed_before_any_pass_goes_through_them(fields):
    """Also experts, of which every stream runs others: equal to a pass through the changed block."""
    block, streams = block_and_streams(**fields)
    unchanged = [block(*stream) for stream in streams]
    passes = InStep(block, streams, units_of(block))
    seen: dict[str, dict[int, torch.Tensor]] = {}
    for unit, inputs in passes:
        assert unit not in seen
        seen[unit] = {number: tensor.clone() for number, tensor in inputs.items()}
        for layer, own in units_of(block).items():
            if own == unit:
                block.get_submodule(layer).weight.mul_(0.5)
    assert set(seen) == set(units_of(block).values())
    for number, (stream, before) in enumerate(zip(streams, unchanged, strict=True)):
        wanted: dict[str, torch.Tensor] = {}

        def keep(_: object, args: tuple[torch.Tensor, ...], unit: str, found: dict[str, torch.Tensor]) -> None:
            found.setdefault(unit, args[0].clone())

        handles = [
            block.get_submodule(layer).register_forward_pre_hook(partial(keep, unit=unit, found=wanted))
            for layer, unit in units_of(block).items()
        ]
        after = block(*stream)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(passes.outputs[number], after, rtol=0, atol=0)
        assert not torch.equal(after, before)
        assert {unit for unit in seen if number in seen[unit]} == set(wanted)
        for unit, tensor in wanted.items():
            torch.testing.assert_close(seen[unit][number], tensor, rtol=0, atol=0)


def test_a_loop_that_ends_early_leaves_no_thread_and_no_hook():
    block, streams = block_and_streams()
    n_threads = threading.active_count()
    with torch.no_grad():
        for _ in InStep(block, streams, units_of(block)):
            break
    assert threading.active_count() == n_threads
    assert not any(module._forward_pre_hooks for module in block.modules())
    with torch.no_grad():
        block(*streams[0])


def test_an_error_in_a_pass_is_raised_where_it_is_awaited():
    block, streams = block_and_streams()

    def fail(*_: object) -> None:
        raise ArithmeticError("in a pass")

    handle = block.mlp.down_proj.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(ArithmeticError, match="in a pass"):
        list(InStep(block, streams, units_of(block)))
    handle.remove()
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_the_threads_take_over_autocast_and_the_gradient_mode():
    block, streams = block_and_streams()
    modes: set[tuple[bool, bool]] = set()
    handle = block.mlp.register_forward_pre_hook(
        lambda *_: modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        list(InStep(block, streams, units_of(block)))
    list(InStep(block, streams, units_of(block)))
    handle.remove()
    assert modes == {(False, True), (True, False)}
