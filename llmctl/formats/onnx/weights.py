"""Products with weights, and rows of tables, as nodes of an ONNX graph: in float32, or in 8 bits as our scheme `w8a8`."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmctl.formats.onnx.graph import FLOAT, Graph
from llmctl.quant.grid import Codes
from llmctl.quant.products import LARGEST_CODE
from llmctl.quant.schemes import SCHEMES

SCHEME = SCHEMES["w8a8"]
SMALLEST_SCALE = 1e-30
"""As in `products.rounded_inputs`."""
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Weights(Protocol):
    """How products with weights and rows of tables become nodes."""

    def plain(self, name: str) -> Tensor:
        """Return a parameter in float32."""

    def linear(self, graph: Graph, x: str, *names: str, is_constant: bool = False) -> str:
        """Return the outputs of linear layers with the same input, side by side.

        is_constant: the input is the same for all texts, so that the product is computed once, when a file is loaded.
        """

    def rows(self, graph: Graph, ids: str, name: str) -> str:
        """Return the rows of a table."""


class Float32:
    """Weights in float32. tied: the head over the vocabulary is the table of tokens."""

    def __init__(self, state: Mapping[str, Tensor], *, tied: bool) -> None:
        self.state, self.tied = state, tied

    def plain(self, name: str) -> Tensor:
        """Return a parameter in float32."""
        return self.state[name].float()

    def linear(self, graph: Graph, x: str, *names: str, is_constant: bool = False) -> str:
        """Return the outputs of linear layers with the same input, side by side."""
        del is_constant
        if self.tied and names == (HEAD,):
            weight = graph.op("Transpose", self._table(graph, EMBEDDING), perm=[1, 0])
        else:
            weight_OI = torch.cat([self.plain(f"{name}.weight") for name in names])
            weight = graph.tensor(f"{joined(names)}.weight", weight_OI.T)
        return self.biased(graph, graph.op("MatMul", x, weight), names)

    def biased(self, graph: Graph, y: str, names: tuple[str, ...]) -> str:
        """Add the biases of linear layers; all of them have one, or none."""
        biases = [f"{name}.bias" for name in names]
        if biases[0] not in self.state:
            return y
        bias_O = torch.cat([self.plain(bias) for bias in biases])
        return graph.op("Add", y, graph.tensor(f"{joined(names)}.bias", bias_O))

    def rows(self, graph: Graph, ids: str, name: str) -> str:
        """Return the rows of a table."""
        return graph.op("Gather", self._table(graph, name), ids)

    def _table(self, graph: Graph, name: str) -> str:
        return graph.tensor(f"{name}.weight", self.plain(f"{name}.weight"))


class Int8(Float32):
    """Weights in 8 bits with one scale per output, where there are codes for them.

    Inputs are rounded when they are computed, to 8 bits with one scale per token: what a text yields does not depend on the
    texts beside it, as it does with the one scale per tensor of ONNX Runtime's own dynamic quantization. Source:
    ZeroQuant, Yao et al. 2022, arXiv:2206.01861, section 4.1.
    """

    def __init__(self, state: Mapping[str, Tensor], codes: Mapping[str, Codes], *, tied: bool) -> None:
        super().__init__(state, tied=tied)
        self.codes = codes
        self.rounded: dict[str, tuple[str, str]] = {}

    def linear(self, graph: Graph, x: str, *names: str, is_constant: bool = False) -> str:
        """Return the outputs of linear layers with the same input, side by side."""
        is_table = self.tied and names == (HEAD,)
        if not is_table and any(name not in self.codes for name in names):
            return super().linear(graph, x, *names)
        if is_table:
            table, scales = self._coded(graph, EMBEDDING)
            codes, scales = graph.op("Transpose", table, perm=[1, 0]), graph.op("Squeeze", scales, graph.integers(1))
        else:
            parts = [self.codes[name] for name in names]
            codes = graph.tensor(f"{joined(names)}.codes", torch.cat([signed(part) for part in parts]).T)
            scales_O = torch.cat([part.grid.scales_OG for part in parts]).flatten()
            scales = graph.tensor(f"{joined(names)}.scales", scales_O)
        if is_constant:  # not with QuantizeLinear, which ONNX Runtime would leave to every run
            return self.biased(graph, graph.op("MatMul", x, decoded(graph, codes, scales)), names)
        steps, sizes = self._rounded(graph, x)
        product = graph.op("MatMulInteger", steps, codes, graph.unsigned(SCHEME.middle))
        y = graph.op("Mul", decoded(graph, product, scales), sizes)
        return self.biased(graph, y, names)

    def _rounded(self, graph: Graph, x: str) -> tuple[str, str]:
        """Return the codes of inputs, around 128, and the scale of every token."""
        if x not in self.rounded:
            largest = graph.op("ReduceMax", graph.op("Abs", x), axes=[-1], keepdims=1)
            scales = graph.op("Max", graph.op("Div", largest, graph.number(LARGEST_CODE)), graph.number(SMALLEST_SCALE))
            # ONNX Runtime has fast products of unsigned inputs with signed weights only.
            middle = graph.unsigned(SCHEME.middle)
            codes = graph.op("QuantizeLinear", graph.op("Div", x, scales), graph.number(1.0), middle)
            self.rounded[x] = codes, scales
        return self.rounded[x]

    def rows(self, graph: Graph, ids: str, name: str) -> str:
        """Return the rows of a table."""
        if name not in self.codes:
            return super().rows(graph, ids, name)
        codes, scales = self._coded(graph, name)
        return decoded(graph, graph.op("Gather", codes, ids), graph.op("Gather", scales, ids))

    def _coded(self, graph: Graph, name: str) -> tuple[str, str]:
        codes = self.codes[name]
        return graph.tensor(f"{name}.codes", signed(codes)), graph.tensor(f"{name}.scales", codes.grid.scales_OG)


def decoded(graph: Graph, codes: str, scales: str) -> str:
    """Return codes or sums of them times their scales."""
    return graph.op("Mul", graph.op("Cast", codes, to=FLOAT), scales)


def signed(codes: Codes) -> Tensor:
    """Return symmetric 8-bit codes as int8 (O, I)."""
    return (codes.codes_OI.to(torch.int16) - SCHEME.middle).to(torch.int8)


def joined(names: tuple[str, ...]) -> str:
    """Return one name for layers whose weights are side by side."""
    first, *others = names
    return "_".join([first, *(name.rpartition(".")[2] for name in others)])
