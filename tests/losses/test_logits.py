import os
import platform
import subprocess
import sys

import pytest
import torch

from llmctl.losses import logits as products


def tensors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(40, 96, generator=generator).to(dtype)
    weight = torch.randn(300, 96, generator=generator).to(dtype)
    return hidden, weight, torch.randn(300, generator=generator)


@pytest.mark.parametrize("way", ["pair", "upcast"])
def test_narrow_products_are_accumulated_in_float32(way):
    hidden, weight, _ = tensors(torch.bfloat16)
    exact = hidden.double() @ weight.double().T
    out = torch.empty(40, 300)
    products.WAYS[way](hidden, weight, out)
    error = float((out.double() - exact).norm() / exact.norm())
    rounded = float(((hidden @ weight.T).double() - exact).norm() / exact.norm())
    if way == "pair" and products.choose_way(torch.bfloat16, "cpu") != "pair":
        pytest.skip("this processor's addmm does not keep its sum in float32, so the way is not taken")
    assert error < 2e-5 < 1e-3 < rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_logits_have_a_bias_and_are_written_in_place(dtype):
    hidden, weight, bias = tensors(dtype)
    out = torch.empty(40, 300, dtype=torch.promote_types(dtype, torch.float32))
    found = products.logits(hidden, weight, bias.to(out.dtype), out)
    assert found is out
    exact = hidden.double() @ weight.double().T + bias
    assert float((out.double() - exact).abs().amax()) < 1e-3


def test_a_way_that_fails_its_trial_is_not_taken(monkeypatch):
    def rounds(hidden_CD, weight_VD, out_CV):
        out_CV.copy_(hidden_CD @ weight_VD.T)

    monkeypatch.setitem(products.WAYS, "pair", rounds)
    products.choose_way.cache_clear()
    try:
        assert products.choose_way(torch.bfloat16, "cpu") == "upcast"
    finally:
        products.choose_way.cache_clear()


def test_bfloat16_is_not_native_where_the_library_may_not_use_it():
    code = "import torch; from llmctl.losses.logits import is_native; print(is_native(torch.bfloat16))"
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("only x86 processors tell")
    assert subprocess.check_output([sys.executable, "-c", code], env=limited, text=True).strip() == "False"
