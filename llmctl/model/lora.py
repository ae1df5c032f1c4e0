"""Low-rank adapters on the linear layers of a model whose own weights stay as they are.

LoRA: y = W x + s B A x, where A is random and B zero at the start (Hu et al. 2021, arXiv:2106.09685, section 4.1).
DoRA: the columns of W + s B A are brought to learned lengths m (Liu et al. 2024, arXiv:2402.09353, eq. 5). Their
"columns" are the rows of torch's (out, in) weights. No files: `formats/adapter.py` stores what is made here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.errors import UsageError
from llmctl.model.transformer import LanguageModel
from llmctl.quant.linear import QuantLinear

HEAD = "classifier"
"""What the names of the classification head's parameters begin with."""


def scale_of(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """Return the factor on B A: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return the length of every row of W + s B A (O,), in float32 at least, without making that matrix.

    |w + s b A|^2 = |w|^2 + 2 s (W A^T) . b + s^2 (b A A^T) . b. A row of zeros counts as of a tiny length, so that
    nothing is divided by zero.
    """
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight_OI.device.type, enabled=False):
        squares_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=dtype).square()
        a, b = a_RI.to(dtype), b_OR.to(dtype)
        cross_OR = (weight_OI @ a_RI.to(weight_OI.dtype).T).to(dtype)
        squares_O += ((2 * scale * cross_OR + scale**2 * (b @ (a @ a.T))) * b).sum(dim=1)
        return squares_O.clamp_(min=torch.finfo(dtype).tiny).sqrt_()


def merge(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None = None) -> Tensor:
    """Return the weight of the plain linear layer that does the same, computed in float32 at least."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight_OI.device.type, enabled=False):
        merged_OI = torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype), alpha=scale)
        if magnitude_O is not None:
            merged_OI *= (magnitude_O.to(dtype) / norms(weight_OI, a_RI, b_OR, scale))[:, None]
        return merged_OI.to(weight_OI.dtype)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; `weight` and `bias` are those of the layer it takes over, frozen.

    Its own parameters are `lora_A` (R, I), `lora_B` (O, R) and, of DoRA, `lora_magnitude` (O,). Where we deviate from
    PEFT: dropout falls on the input of A alone, with DoRA too.
    """

    lora_magnitude: nn.Parameter | None

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
        nn.Module.__init__(self)  # a Linear's own would draw a weight that nobody needs
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.take(base)
        self.requires_grad_(False)
        # Kaiming-uniform with a = sqrt(5), as the authors' code and PEFT have it: uniform in +-1 / sqrt(I).
        bound = 1 / math.sqrt(base.in_features)
        a_RI = torch.rand(rank, base.in_features, generator=generator) * (2 * bound) - bound
        weight_OI = self.weight
        self.lora_A = nn.Parameter(a_RI.to(weight_OI))
        self.lora_B = nn.Parameter(weight_OI.new_zeros(base.out_features, rank))
        self.register_parameter("lora_magnitude", None)
        if dora:
            lengths_O = norms(weight_OI, self.lora_A, self.lora_B, self.scale)
            self.lora_magnitude = nn.Parameter(lengths_O.to(weight_OI.dtype))
        self.train(base.training)

    def take(self, base: nn.Linear) -> None:
        """Take the layer's weight and bias over."""
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

    def plain(self, x: Tensor) -> Tensor:
        """Return what the layer makes of x without its adapter."""
        return F.linear(x, self.weight, self.bias)

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return scale_of(self.rank, self.alpha, rslora=self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        """Return y = W x + s B A x + bias, or with DoRA the same at the learned lengths.

        The lengths of the rows of W + s B A count as constants, as in section 4.3 of the paper.
        """
        y = self.plain(x)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        delta = F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)
        if self.lora_magnitude is None:
            return y + delta
        ratio_O = self.lora_magnitude / norms(self.weight, self.lora_A, self.lora_B, self.scale)
        has_bias: bool = self.bias is not None
        if not has_bias:
            return (y + delta) * ratio_O.to(y.dtype)
        # The bias has no part in it. In this form a ratio of exactly 1 gives exactly the base's output.
        plain = y - self.bias.to(y.dtype)
        return y + plain * (ratio_O - 1).to(y.dtype) + delta * ratio_O.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """Return the weight (O, I) of the plain linear layer that does the same."""
        return merge(self.weight, self.lora_A, self.lora_B, self.scale, self.lora_magnitude)

    def extra_repr(self) -> str:
        """Describe the adapter beside the layer."""
        kind = "" if self.lora_magnitude is None else ", dora=True"
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}{kind}"


class PackedLoRALinear(LoRALinear):
    """An adapter over a weight in few bits, which is never held multiplied out.

    Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314, eq. 5.
    """

    base: QuantLinear

    def take(self, base: nn.Linear | QuantLinear) -> None:
        """Take the layer over."""
        assert isinstance(base, QuantLinear)
        self.base = base

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the codes mean, float32, made anew."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The layer's bias."""
        return self.base.bias

    def plain(self, x: Tensor) -> Tensor:
        """Return what the layer makes of x without its adapter."""
        made: Tensor = self.base(x)
        return made


def adapted_kind(layer: nn.Module) -> type[LoRALinear]:
    """Return the kind of layer that gives another an adapter."""
    return PackedLoRALinear if isinstance(layer, QuantLinear) else LoRALinear


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
    """Give every linear layer that `targets` names an adapter, freeze the rest, and return the layers' names.

    A target is the end of a layer's name (`q_proj`, `self_attn.q_proj`) or all of it; one that the model lacks is
    passed over. A classification head stays trainable. The same seed gives the same adapter.
    Raises: UsageError for a rank, dropout or scale that cannot be, or when no target fits.
    """
    assert not adapter_modules(model), "the model has adapters already: merge them first"
    if not (math.isfinite(alpha) and 0 <= dropout < 1):
        raise UsageError(f"`adapter.alpha` {alpha} and `adapter.dropout` {dropout} cannot be", "dropout is below 1")
    layers = find_targets(model, targets)
    for name, layer in layers.items():
        smaller = min(layer.in_features, layer.out_features)
        if not 1 <= rank <= smaller:
            raise UsageError(
                f"`adapter.rank` {rank} does not fit `{name}`, which maps {layer.in_features} to {layer.out_features}",
                f"a rank from 1 to {smaller}",
            )
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        adapted = adapted_kind(layer)(layer, rank=rank, alpha=alpha, dropout=dropout, dora=dora, generator=generator)
        model.set_submodule(name, adapted)
    freeze(model)
    return list(layers)


def find_targets(model: LanguageModel, targets: Sequence[str]) -> dict[str, Any]:
    """Return the linear layers whose names end with a target.

    Raises: UsageError for a table or a head, or when nothing fits, naming what the model has.
    """
    available = dict(candidates(model))
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in available}))
    for target in targets:
        leaf = target.rpartition(".")[2]
        if leaf.startswith(("embed", "lm_head", HEAD)) or leaf == "relative_bias":
            raise UsageError(f"`adapter.targets` names `{target}`, which takes no adapter", f"of this model: {leaves}")
    found = {
        name: layer
        for name, layer in available.items()
        if any(name == target or name.endswith("." + target) for target in targets)
    }
    if not found:
        raise UsageError(f"no layer is called one of `adapter.targets` ({', '.join(targets)})", f"it has {leaves}")
    return found


def candidates(model: LanguageModel) -> Iterator[tuple[str, nn.Linear | QuantLinear]]:
    """Yield the linear layers that can have an adapter: all but the heads over the vocabulary and over labels."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantLinear)) and not name.startswith(("lm_head", HEAD)):
            yield name, module


def freeze(model: nn.Module) -> None:
    """Let only the adapters and the classification head train."""
    adapted = adapter_modules(model)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parameter.requires_grad_(leaf.startswith("lora_") or (name.startswith(HEAD) and owner not in adapted))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter consists of, the trainable tensors by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge_adapters(model: nn.Module) -> None:
    """Put every adapter into the weights: the model is then plain again, its state that of one without adapters.

    What was held in few bits is multiplied out.
    """
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
        model.multiply_out()
    model.requires_grad_(True)
