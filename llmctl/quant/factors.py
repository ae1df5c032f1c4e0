"""Scale factors per input channel that make linear layers easier to quantize (AWQ, SmoothQuant).

Weight columns are multiplied by the factors and inputs divided by them, which leaves the product unchanged. The caller
applies the division to the inputs, usually by folding it into the layer before.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmctl.quant.methods import AnyScheme, Method, Moments, decode, nearest, output_error
from llmctl.quant.products import rounded_inputs

POWERS = tuple(step / 10 for step in range(1, 11))
"""Exponents in the grid search."""

Share = Callable[[Tensor], Tensor]


def best_factors(
    weights: Sequence[Tensor], schemes: Sequence[AnyScheme], moments: Moments, share: Share, method: Method = nearest
) -> Tensor | None:
    """Search the factors (I,) with the least output error for linear layers that share their input; None if 1 is best.

    The search uses round-to-nearest. Its result is kept only if it also lowers every layer's error with `method`:
    factors can hurt where GPTQ's compensation alone does better.

    weights: (O, I) float32. share: makes factors equal where the model requires it (grouped-query attention).
    Source: AWQ, arXiv:2306.00978, eq. 4 and 5: powers of the inputs' mean magnitude. If inputs are quantized too,
    SmoothQuant, arXiv:2211.10438, eq. 4: powers of their maximum over that of the weights.
    """
    rounds_inputs = any(scheme.activations for scheme in schemes)
    size_I = (moments.absolute_I / max(moments.count, 1)).clamp(min=1e-6)
    if rounds_inputs and moments.sample_NI is not None:
        size_I = moments.sample_NI.abs().amax(dim=0).clamp(min=1e-6)
    weight_I = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp(min=1e-6)
    pairs = list(zip(weights, schemes, strict=True))

    def errors(factors_I: Tensor, chosen: Method = nearest) -> Tensor:
        return torch.tensor([lost_by(weight, scheme, moments, factors_I, chosen) for weight, scheme in pairs])

    ones_I = torch.ones_like(size_I)
    baseline = errors(ones_I)
    # Errors are relative to each layer's own baseline: otherwise queries and keys, whose errors are small, could get
    # much worse for a small gain in values.
    unit = torch.ones_like(baseline) if rounds_inputs else baseline.clamp(min=1e-12)
    best, least = None, float((baseline / unit).sum())
    for power in POWERS:
        factors_I = size_I.pow(power) / (weight_I.pow(1 - power) if rounds_inputs else 1.0)
        factors_I = share(factors_I / (factors_I.amax() * factors_I.amin()).sqrt())
        error = float((errors(factors_I) / unit).sum())
        if error < least:
            best, least = factors_I, error
    if best is None or rounds_inputs or method is nearest:
        return best
    return best if bool((errors(best, method) < errors(ones_I, method)).all()) else None


def lost_by(
    weight_OI: Tensor, scheme: AnyScheme, moments: Moments, factors_I: Tensor, method: Method = nearest
) -> float:
    """Return the relative squared error of a layer's output after quantizing with these factors."""
    scaled_OI = weight_OI * factors_I
    inputs = None if method is nearest else moments.divided(factors_I)
    quantized_OI = decode(method(scaled_OI, scheme, inputs), scheme)
    if not scheme.activations or moments.sample_NI is None:
        return output_error(weight_OI, quantized_OI / factors_I, moments)
    # Second moments do not describe rounded inputs: multiply a sample of them instead.
    codes_NI, scales_N1 = rounded_inputs(moments.sample_NI / factors_I)
    output_NO = codes_NI.float() * scales_N1 @ quantized_OI.T
    exact_NO = moments.sample_NI @ weight_OI.T
    return float((output_NO - exact_NO).square().sum() / exact_NO.square().sum().clamp(min=1e-30))
