"""Quantized modules in a model: put empty ones in to load packed tensors into, or replace them by plain ones."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from llmctl.model.transformer import LanguageModel
from llmctl.quant.linear import QuantEmbedding, QuantLinear
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import QuantWeight


def quantize(model: LanguageModel, schemes: Mapping[str, Scheme]) -> None:
    """Replace modules by empty quantized ones, to load packed tensors into; a tied head follows the embedding.

    schemes: name of a linear layer or of a table of tokens -> scheme.
    """
    for name, scheme in schemes.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            put_module(model, name, QuantEmbedding(module.num_embeddings, module.embedding_dim, scheme))
            if name == "model.embed_tokens" and model.config.tie_embeddings and not model.config.n_labels:
                sizes = (module.embedding_dim, module.num_embeddings)
                head = QuantLinear(*sizes, scheme, bias=model.config.logits_bias)
                model.lm_head = head  # type: ignore[assignment]
            continue
        has_bias = module.bias is not None
        put_module(model, name, QuantLinear(module.in_features, module.out_features, scheme, bias=has_bias))
    model.tie()


def dequantize(model: LanguageModel) -> None:
    """Replace quantized modules by plain ones with dequantized weights, in place."""
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantWeight)]
    for name, module in packed:
        weight = nn.Parameter(module.weight.to(model.dtype))
        plain: Any = nn.Embedding(module.n_out, module.n_in, device="meta")
        if isinstance(module, QuantLinear):
            plain = nn.Linear(module.n_in, module.n_out, bias=module.bias is not None, device="meta")
            plain.bias = None if module.bias is None else nn.Parameter(module.bias)
        plain.weight = weight
        put_module(model, name, plain)
    if packed:
        model.tie()


def schemes_of(model: LanguageModel) -> dict[str, Scheme]:
    """Return the schemes of the quantized modules, as accepted by `quantize`."""
    found = {name: module.scheme for name, module in model.named_modules() if isinstance(module, QuantWeight)}
    if model.config.tie_embeddings:
        found.pop("lm_head", None)
    return found


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `root`."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
