"""float32 logits from bfloat16 or float16 inputs, and the products for their gradients.

The product of two bfloat16 matrices is rounded to bfloat16, three digits: too few if two distributions are close and
their difference is the training signal. On CUDA the product can be returned in float32. On a CPU it is computed twice:
the second product starts from the negative of the first, which leaves its rounding error, which is added back. Whether
a method is accurate is tested once on a small block. A CPU without bfloat16 instructions is 10 to 100 times slower
with bfloat16 than with float32 (measured with AVX2 only); there the matrices are upcast block by block.
"""

import platform
from functools import cache

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
LARGEST_ERROR = 1e-4
"""The largest accepted error of a method, relative to the largest logit; rounding to bfloat16 alone gives 2e-3."""

UPCAST_COLUMNS = 8192
"""Rows of the weight to upcast at a time, to bound memory."""

CACHED_FLOATS = 1 << 18
"""Logits that are processed at a time on a CPU: with what is computed of them, they stay in a core's cache."""


def logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out_CV: Tensor) -> Tensor:
    """Compute hidden @ weight.T + bias into `out`, accumulated in its dtype (float32 or float64), and return it."""
    WAYS[choose_way(weight_VD.dtype, weight_VD.device.type)](hidden_CD, weight_VD, out_CV)
    if bias_V is not None:
        out_CV += bias_V
    return out_CV


def in_one_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states and the head's weight in the dtype of their product: autocast's, or else the weight's."""
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden_ND.to(dtype), weight_VD.to(dtype)
    return hidden_ND.to(weight_VD.dtype), weight_VD


def cached_rows(logits_CV: Tensor) -> tuple[Tensor, ...]:
    """Return views of the rows that are processed at a time; all of them where starting a kernel costs more."""
    if logits_CV.device.type != "cpu":
        return (logits_CV,)
    return logits_CV.split(max(1, CACHED_FLOATS // logits_CV.shape[1]))


def cap_(logits_CV: Tensor, cap: float) -> Tensor | None:
    """Turn logits into cap * tanh(logit / cap) in place, and return the derivative; None and unchanged for cap 0.

    Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    if not cap:
        return None
    logits_CV.div_(cap).tanh_()
    slope_CV = 1 - logits_CV.square()
    logits_CV.mul_(cap)
    return slope_CV


def plain(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Multiply float32 or float64 matrices."""
    torch.mm(hidden_CD, weight_VD.T, out=out_CV)


def kept(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Multiply 16-bit matrices into a float32 result (CUDA)."""
    torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32, out=out_CV)


def pair(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Multiply 16-bit matrices twice; the second product is the rounding error of the first."""
    narrow_CV = hidden_CD @ weight_VD.T
    out_CV.copy_(narrow_CV)
    out_CV += narrow_CV.neg_().addmm_(hidden_CD, weight_VD.T)


def upcast(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Upcast the weight block by block and multiply the blocks."""
    wide_CD = hidden_CD.to(out_CV.dtype)
    for start in range(0, len(weight_VD), UPCAST_COLUMNS):
        block_BD = weight_VD[start : start + UPCAST_COLUMNS].to(out_CV.dtype)
        out_CV[:, start : start + UPCAST_COLUMNS] = wide_CD @ block_BD.T


WAYS = {"plain": plain, "kept": kept, "pair": pair, "upcast": upcast}


@cache
def choose_way(dtype: torch.dtype, device: str) -> str:
    """Return the fastest accurate method for this dtype and device; tested once."""
    if dtype in WIDE:
        return "plain"
    candidates = ("kept", "upcast") if device == "cuda" else ("pair", "upcast") if is_native(dtype) else ("upcast",)
    return next(way for way in candidates if way == "upcast" or error_of(way, dtype, device) < LARGEST_ERROR)


@torch.no_grad()
def error_of(way: str, dtype: torch.dtype, device: str) -> float:
    """Return a method's error on a small block against float64, relative to the largest logit."""
    generator = torch.Generator().manual_seed(0)
    hidden_CD = torch.randn(48, 192, generator=generator).to(device, dtype)
    weight_VD = torch.randn(320, 192, generator=generator).to(device, dtype)
    out_CV = torch.empty(48, 320, dtype=torch.float32, device=device)
    with torch.autocast(device, enabled=False):
        try:
            WAYS[way](hidden_CD, weight_VD, out_CV)
        except (RuntimeError, TypeError):  # unsupported by this torch version or GPU
            return float("inf")
    exact_CV = hidden_CD.double() @ weight_VD.double().T
    return float((out_CV.double() - exact_CV).abs().amax() / exact_CV.abs().amax())


def is_native(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has instructions for products of this dtype."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # unknown: assume so, since choose_way tests the accuracy anyway
    # oneDNN, whose products these are, may be limited: ONEDNN_MAX_CPU_ISA.
    has_onednn = torch.backends.mkldnn.is_available()
    if dtype != torch.bfloat16 or not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):  # noqa: SLF001
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001


def add_gradients(
    error_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, grad_hidden_CD: Tensor, grad_weight_VD: Tensor | None
) -> None:
    """Write a chunk's gradient of the hidden states, and add its gradient of the weight (float32 or float64), if wanted.

    error: the gradient of the logits.
    """
    if choose_way(weight_VD.dtype, weight_VD.device.type) == "upcast":
        sums_CD = torch.zeros(hidden_CD.shape, dtype=error_CV.dtype, device=error_CV.device)
        for start in range(0, len(weight_VD), UPCAST_COLUMNS):
            columns = slice(start, start + UPCAST_COLUMNS)
            sums_CD.addmm_(error_CV[:, columns], weight_VD[columns].to(error_CV.dtype))
        grad_hidden_CD.copy_(sums_CD)
        if grad_weight_VD is not None:
            grad_weight_VD.addmm_(error_CV.T, hidden_CD.to(error_CV.dtype))
        return
    error_CV = error_CV.to(hidden_CD.dtype)
    torch.mm(error_CV, weight_VD, out=grad_hidden_CD)
    if grad_weight_VD is None:
        return
    if weight_VD.dtype == grad_weight_VD.dtype:
        grad_weight_VD.addmm_(error_CV.T, hidden_CD)
    else:
        grad_weight_VD += error_CV.T @ hidden_CD
