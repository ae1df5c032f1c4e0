"""Factors on the inputs of linear maps that make them easier to round: columns that matter, or inputs that stand out.

What multiplies the columns divides the inputs, so that the product stays; who divides them is the caller's business.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmctl.quant.grid import decode
from llmctl.quant.methods import Method, Moments, nearest, output_error
from llmctl.quant.products import rounded_inputs
from llmctl.quant.schemes import Scheme

POWERS = tuple(step / 10 for step in range(1, 11))
"""Exponents that are tried."""

Share = Callable[[Tensor], Tensor]


def best_factors(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], moments: Moments, share: Share, method: Method = nearest
) -> Tensor | None:
    """Return the factors (I,) with which maps that read the same inputs lose the least, or None where 1 is best.

    They are sought with weights that are rounded to the nearest, and taken where every map is better for them with the
    method that will choose its codes too: what GPTQ makes up for, they can make worse.

    weights: (O, I) float32. share: makes factors equal where they have to be.
    Source: AWQ, arXiv:2306.00978, eq. 4 and 5: powers of the inputs' mean size; where inputs are rounded too, SmoothQuant,
    arXiv:2211.10438, eq. 4: of their largest size over the weights'.
    """
    rounds_inputs = any(scheme.activations for scheme in schemes)
    size_I = (moments.absolute_I / max(moments.count, 1)).clamp(min=1e-6)
    if rounds_inputs and moments.sample_NI is not None:
        size_I = moments.sample_NI.abs().amax(dim=0).clamp(min=1e-6)
    weight_I = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp(min=1e-6)
    pairs = list(zip(weights, schemes, strict=True))

    def lost(factors_I: Tensor, chosen: Method = nearest) -> Tensor:
        return torch.tensor([lost_by(weight, scheme, moments, factors_I, chosen) for weight, scheme in pairs])

    ones_I = torch.ones_like(size_I)
    alone = lost(ones_I)
    # Each map counts by what it loses anyway: keys and queries, which lose little, are not to pay for values.
    unit = torch.ones_like(alone) if rounds_inputs else alone.clamp(min=1e-12)
    best, least = None, float((alone / unit).sum())
    for power in POWERS:
        factors_I = size_I.pow(power) / (weight_I.pow(1 - power) if rounds_inputs else 1.0)
        factors_I = share(factors_I / (factors_I.amax() * factors_I.amin()).sqrt())
        found = float((lost(factors_I) / unit).sum())
        if found < least:
            best, least = factors_I, found
    if best is None or rounds_inputs or method is nearest:
        return best
    return best if bool((lost(best, method) < lost(ones_I, method)).all()) else None


def lost_by(weight_OI: Tensor, scheme: Scheme, moments: Moments, factors_I: Tensor, method: Method = nearest) -> float:
    """Return the share of the output that a method loses with the factors."""
    scaled_OI = weight_OI * factors_I
    inputs = None if method is nearest else moments.divided(factors_I)
    meant_OI = decode(method(scaled_OI, scheme, inputs), scheme)
    if not scheme.activations or moments.sample_NI is None:
        return output_error(weight_OI, meant_OI / factors_I, moments)
    codes_NI, scales_N1 = rounded_inputs(moments.sample_NI / factors_I)
    found_NO = codes_NI.float() * scales_N1 @ meant_OI.T
    wanted_NO = moments.sample_NI @ weight_OI.T
    return float((found_NO - wanted_NO).square().sum() / wanted_NO.square().sum().clamp(min=1e-30))
