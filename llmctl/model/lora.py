"""Low-rank adapters on the linear layers of a model with frozen weights.

LoRA: y = W x + s B A x, with A random and B zero at the start (Hu et al. 2021, arXiv:2106.09685, section 4.1).
DoRA: the columns of W + s B A are rescaled to learned magnitudes m (Liu et al. 2024, arXiv:2402.09353, eq. 5). The
paper's columns are the rows of torch's (out, in) weights. No files: see `formats/adapter.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.errors import UsageError
from llmctl.model.parameters import IN_EXPERTS
from llmctl.model.quantized import dequantize
from llmctl.model.transformer import LanguageModel
from llmctl.quant.linear import QuantLinear

HEAD = "classifier"
"""The prefix of the classification head's parameter names."""


def scale_of(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return the norm of every row of W + s B A (O,), in at least float32, without materializing that matrix.

    |w + s b A|^2 = |w|^2 + 2 s (W A^T) . b + s^2 (b A A^T) . b. The norm of a zero row is clamped to a tiny value, to
    avoid a division by zero.
    """
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight_OI.device.type, enabled=False):
        squares_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=dtype).square()
        a, b = a_RI.to(dtype), b_OR.to(dtype)
        cross_OR = (weight_OI @ a_RI.to(weight_OI.dtype).T).to(dtype)
        squares_O += ((2 * scale * cross_OR + scale**2 * (b @ (a @ a.T))) * b).sum(dim=1)
        return squares_O.clamp_(min=torch.finfo(dtype).tiny).sqrt_()


def merge(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None = None) -> Tensor:
    """Return the weight of the equivalent linear layer, computed in at least float32."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight_OI.device.type, enabled=False):
        merged_OI = torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype), alpha=scale)
        if magnitude_O is not None:
            merged_OI *= (magnitude_O.to(dtype) / norms(weight_OI, a_RI, b_OR, scale))[:, None]
        return merged_OI.to(weight_OI.dtype)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; `weight` and `bias` are those of the layer it replaces, frozen.

    Its own parameters are `lora_A` (R, I), `lora_B` (O, R) and, with DoRA, `lora_magnitude` (O,). Deviation from PEFT:
    dropout applies only to the input of A, with DoRA too.
    """

    lora_magnitude: nn.Parameter | None
    is_off = False
    """Whether the layer is for a while what it was without its adapter."""

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dora: bool = False,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)  # skips nn.Linear.__init__, which would allocate and initialize a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.take(base)
        self.requires_grad_(False)
        # Kaiming-uniform with a = sqrt(5), as in the authors' code and PEFT: uniform in +-1 / sqrt(I).
        bound = 1 / math.sqrt(base.in_features)
        a_RI = torch.rand(rank, base.in_features, generator=generator) * (2 * bound) - bound
        weight_OI = self.weight
        self.lora_A = nn.Parameter(a_RI.to(weight_OI))
        self.lora_B = nn.Parameter(weight_OI.new_zeros(base.out_features, rank))
        self.register_parameter("lora_magnitude", None)
        if dora:
            norms_O = norms(weight_OI, self.lora_A, self.lora_B, self.scale)
            self.lora_magnitude = nn.Parameter(norms_O.to(weight_OI.dtype))
        self.train(base.training)

    def take(self, base: nn.Linear) -> None:
        """Use the weight and bias of the base layer."""
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

    def plain(self, x: Tensor) -> Tensor:
        """Return the base layer's output, without the adapter."""
        return F.linear(x, self.weight, self.bias)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return scale_of(self.rank, self.alpha, rslora=self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        """Return y = W x + s B A x + bias, or with DoRA the same with rows rescaled to the learned magnitudes.

        The row norms of W + s B A are treated as constants in the gradient, as in section 4.3 of the paper.
        """
        y = self.plain(x)
        if self.is_off:
            return y
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        # The scale goes to the low-rank activations, which are the smallest tensor.
        delta = F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)
        if self.lora_magnitude is None:
            return y + delta
        ratio_O = self.lora_magnitude / norms(self.weight, self.lora_A, self.lora_B, self.scale)
        has_bias: bool = self.bias is not None
        if not has_bias:
            return (y + delta) * ratio_O.to(y.dtype)
        # The bias is not rescaled. In this form, a ratio of exactly 1 gives exactly the base's output.
        plain = y - self.bias.to(y.dtype)
        return y + plain * (ratio_O - 1).to(y.dtype) + delta * ratio_O.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """Return the weight (O, I) of the equivalent linear layer."""
        return merge(self.weight, self.lora_A, self.lora_B, self.scale, self.lora_magnitude)

    def extra_repr(self) -> str:
        """Describe the layer and its adapter."""
        kind = "" if self.lora_magnitude is None else ", dora=True"
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}{kind}"


class PackedLoRALinear(LoRALinear):
    """An adapter on a quantized weight, which is dequantized only temporarily.

    Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314, eq. 5.
    """

    base: QuantLinear

    def take(self, base: nn.Linear | QuantLinear) -> None:
        """Use the quantized base layer."""
        assert isinstance(base, QuantLinear)
        self.base = base

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, float32, recomputed at every access."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The layer's bias."""
        return self.base.bias

    def plain(self, x: Tensor) -> Tensor:
        """Return the base layer's output, without the adapter."""
        y: Tensor = self.base(x)
        return y


def adapted_kind(layer: nn.Module) -> type[LoRALinear]:
    """Return the adapter class for a plain or quantized layer."""
    return PackedLoRALinear if isinstance(layer, QuantLinear) else LoRALinear


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of a model off for a while."""
    layers = adapter_modules(model).values()
    for layer in layers:
        layer.is_off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_off = False


def adapter_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_adapters(
    model: LanguageModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Add an adapter to every linear layer matched by `targets`, freeze the rest, and return the layers' names.

    A target is a layer's name or a suffix of it (`q_proj`, `self_attn.q_proj`); one that the model lacks is ignored. A
    classification head stays trainable. The same seed gives the same adapter.
    Raises: UsageError for an invalid rank, dropout or alpha, or if no target matches.
    """
    assert not adapter_modules(model), "the model has adapters already: merge them first"
    if not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise UsageError(
            f"`adapter.alpha` {alpha} or `adapter.dropout` {dropout} is invalid",
            "alpha must be finite, dropout at least 0 and below 1",
        )
    layers = find_targets(model, targets)
    for name, layer in layers.items():
        smaller = min(layer.in_features, layer.out_features)
        if not 1 <= rank <= smaller:
            raise UsageError(
                f"`adapter.rank` {rank} does not fit `{name}` with {layer.in_features} inputs and "
                f"{layer.out_features} outputs",
                f"use a rank from 1 to {smaller}",
            )
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        adapted = adapted_kind(layer)(layer, rank=rank, alpha=alpha, dropout=dropout, dora=dora, generator=generator)
        # One generator for all layers, in the model's order: the same seed gives the same adapter.
        model.set_submodule(name, adapted)
    freeze(model)
    return list(layers)


def find_targets(model: LanguageModel, targets: Sequence[str]) -> dict[str, Any]:
    """Return the linear layers whose names end with a target.

    Raises: UsageError for an embedding or a head, or if nothing matches, listing the model's layers.
    """
    available = dict(candidates(model))
    # Checked before matching, so that a mistaken target is named even if others match.
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in available}))
    for target in targets:
        leaf = target.rpartition(".")[2]
        if leaf.startswith(("embed", "lm_head", HEAD)) or leaf == "relative_bias":
            raise UsageError(
                f"`adapter.targets` contains `{target}`, which cannot have an adapter", f"use any of {leaves}"
            )
    matches = {
        name: layer
        for name, layer in available.items()
        if any(name == target or name.endswith("." + target) for target in targets)
    }
    if not matches:
        raise UsageError(f"no layer matches `adapter.targets` {', '.join(targets)}", f"use any of {leaves}")
    return matches


def candidates(model: LanguageModel) -> Iterator[tuple[str, nn.Linear | QuantLinear]]:
    """Yield the linear layers that can have an adapter: all except the vocabulary and classification heads, and experts.

    transformers holds all experts of a layer as one tensor, to which PEFT adds no adapter of a module.
    """
    for name, module in model.named_modules():
        is_linear = isinstance(module, (nn.Linear, QuantLinear))
        if is_linear and not name.startswith(("lm_head", HEAD)) and IN_EXPERTS not in name:
            yield name, module


def freeze(model: nn.Module) -> None:
    """Make only the adapters and the classification head trainable."""
    adapted = adapter_modules(model)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parameter.requires_grad_(leaf.startswith("lora_") or (name.startswith(HEAD) and owner not in adapted))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return an adapter's tensors: all trainable parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge_adapters(model: nn.Module) -> None:
    """Merge all adapters into the weights in place, which gives a plain model; quantized weights are dequantized."""
    for name, adapted in adapter_modules(model).items():
        has_bias = adapted.bias is not None
        plain = nn.Linear(adapted.in_features, adapted.out_features, bias=has_bias, device="meta")
        if isinstance(adapted, PackedLoRALinear):
            plain.weight = nn.Parameter(adapted.merged_weight())
            plain.register_parameter("bias", None if adapted.bias is None else nn.Parameter(adapted.bias))
        else:
            adapted.weight.data = adapted.merged_weight()
            plain.weight, plain.bias = adapted.weight, adapted.bias
        plain.train(adapted.training)
        model.set_submodule(name, plain)
    if isinstance(model, LanguageModel):
        dequantize(model)
    model.requires_grad_(True)
