"""Products with weights, and rows of tables, as nodes of an ONNX graph: in float32 or in 8 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.formats.onnx.graph import FLOAT, Graph
from llmctl.quant.grid import Codes, Grid, decode
from llmctl.quant.schemes import SCHEMES

SCHEME = SCHEMES["int8"]
SMALLEST_SCALE = 1e-30
LARGEST_SUM = 2**15 - 1
"""At which `vpmaddubsw`, by which ONNX Runtime multiplies on x86 without VNNI, cuts off the sum of two products."""
IDS, EMBEDDING, HEAD = "input_ids", "model.embed_tokens", "lm_head"


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
        """Add the biases of linear layers, if they have any."""
        bias_O = self.bias(names)
        return y if bias_O is None else graph.op("Add", y, graph.tensor(f"{joined(names)}.bias", bias_O))

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the biases of linear layers, side by side; all of them have one, or none."""
        biases = [f"{name}.bias" for name in names]
        return torch.cat([self.plain(bias) for bias in biases]) if biases[0] in self.state else None

    def rows(self, graph: Graph, ids: str, name: str) -> str:
        """Return the rows of a table."""
        return graph.op("Gather", self._table(graph, name), ids)

    def _table(self, graph: Graph, name: str) -> str:
        return graph.tensor(f"{name}.weight", self.plain(f"{name}.weight"))


@dataclass(frozen=True)
class Matrix:
    """A weight (O, I) in 8 bits, but for the columns of a few inputs, the outliers.

    codes: symmetric, with one scale per output; they are 0 for outliers. outliers_K: which these are; columns_OK: their
    weights. levels: the largest code of the other inputs.
    """

    codes: Codes
    outliers_K: Tensor
    columns_OK: Tensor
    levels: int

    def inliers(self) -> Tensor:
        """Return a row (I) that is 0 for outliers and 1 for others."""
        row_I = torch.ones(self.codes.codes_OI.shape[1])
        row_I[self.outliers_K] = 0
        return row_I

    def decoded(self) -> Tensor:
        """Return the weight (O, I) in float32."""
        weight_OI = decode(self.codes, SCHEME)
        weight_OI[:, self.outliers_K] = self.columns_OK
        return weight_OI


class Rounded(NamedTuple):
    """An input in 8 bits, as values of a graph: low + codes * scale, for every token; and what is not in the codes."""

    codes: str
    scale: str
    low: str
    outliers: str


class Int8(Float32):
    """Weights in 8 bits where there are matrices for them, and their inputs rounded to 8 bits when they are computed.

    Every token has a range of its own, so that what a text yields does not depend on the texts beside it, as it does with
    the one range per tensor of ONNX Runtime's dynamic quantization. The few channels of the largest values, which would
    widen the range of all others, are multiplied in float32. Codes are such that the sum of two products stays within 16
    bits, at which x86 processors without VNNI cut it off: all processors compute the same.

    Sources: ZeroQuant, Yao et al. 2022, arXiv:2206.01861, section 4.1 (ranges of tokens); LLM.int8(), Dettmers et al. 2022,
    arXiv:2208.07339, section 3.2 (channels apart, there found by a threshold in every batch).
    """

    def __init__(self, state: Mapping[str, Tensor], matrices: Mapping[str, Matrix], *, tied: bool) -> None:
        super().__init__(state, tied=tied)
        self.matrices = matrices
        self.rounded: dict[tuple[str, int], Rounded] = {}
        self.ones = ""

    def linear(self, graph: Graph, x: str, *names: str, is_constant: bool = False) -> str:
        """Return the outputs of linear layers with the same input, side by side."""
        label, is_table = joined(names), self.tied and names == (HEAD,)
        sources = (EMBEDDING,) if is_table else names
        if any(name not in self.matrices for name in sources):
            return super().linear(graph, x, *names)
        parts = [self.matrices[name] for name in sources]
        if is_table:
            codes, scales = self._coded(graph, EMBEDDING)
            codes, scales = graph.op("Transpose", codes, perm=[1, 0]), graph.op("Squeeze", scales, graph.integers(1))
        else:
            codes = graph.tensor(f"{label}.codes", torch.cat([signed(part.codes) for part in parts]).T)
            scales_O = torch.cat([part.codes.grid.scales_OG for part in parts]).flatten()
            scales = graph.tensor(f"{label}.scales", scales_O)
        outliers_K = parts[0].outliers_K
        for part in parts:
            assert torch.equal(part.outliers_K, outliers_K), "they read the same input"
            assert part.levels == parts[0].levels, "they read the same input"
        columns_KO = torch.cat([part.columns_OK for part in parts]).T
        if is_constant:
            return self._unrounded(graph, x, decoded(graph, codes, scales), columns_KO, outliers_K, names)
        rounded = self._rounded(graph, x, parts[0])
        y = graph.op("Mul", decoded(graph, graph.op("MatMulInteger", rounded.codes, codes), scales), rounded.scale)
        # What the codes leave out, in one thin product: the low end of the range, the outliers, and the bias.
        sums_O = torch.cat([decode(part.codes, SCHEME).sum(dim=1) for part in parts])
        rest = [sums_O[None], columns_KO]
        inputs = [rounded.low, *([rounded.outliers] if len(outliers_K) else [])]
        if (bias_O := self.bias(names)) is not None:
            rest.append(bias_O[None])
            inputs.append(self._ones(graph))
        thin = graph.tensor(f"{label}.rest", torch.cat(rest))
        return graph.op("Add", y, graph.op("MatMul", graph.op("Concat", *inputs, axis=-1), thin))

    def _unrounded(
        self, graph: Graph, x: str, weight: str, columns_KO: Tensor, outliers_K: Tensor, names: tuple[str, ...]
    ) -> str:
        """Return the product with an input that needs no rounding: ONNX Runtime computes it when it loads the file."""
        label = joined(names)
        if len(outliers_K):
            columns = graph.tensor(f"{label}.columns", columns_KO)
            weight = graph.op("ScatterND", weight, graph.tensor(f"{label}.outliers", outliers_K[:, None]), columns)
        return self.biased(graph, graph.op("MatMul", x, weight), names)

    def _rounded(self, graph: Graph, x: str, matrix: Matrix) -> Rounded:
        """Return the input of a matrix in 8 bits; once for all that read it."""
        key = (x, matrix.levels)
        if key not in self.rounded:
            others, outliers = x, ""
            if len(matrix.outliers_K):
                outliers = graph.op("Gather", x, graph.integers(*matrix.outliers_K.tolist()), axis=-1)
                others = graph.op("Mul", x, graph.tensor(f"{x}.inliers", matrix.inliers()))
            low, high = (graph.op(kind, others, axes=[-1], keepdims=1) for kind in ("ReduceMin", "ReduceMax"))
            width = graph.op("Div", graph.op("Sub", high, low), graph.number(float(matrix.levels)))
            scale = graph.op("Max", width, graph.number(SMALLEST_SCALE))
            steps = graph.op("Mul", graph.op("Sub", others, low), graph.op("Reciprocal", scale))
            codes = graph.op("QuantizeLinear", steps, graph.number(1.0), graph.unsigned(0))
            self.rounded[key] = Rounded(codes, scale, low, outliers)
        return self.rounded[key]

    def _ones(self, graph: Graph) -> str:
        """Return a 1 for every token (B, T, 1)."""
        if not self.ones:
            shape = graph.op("Concat", graph.op("Shape", IDS), graph.integers(1), axis=0)
            self.ones = graph.op("Expand", graph.number(1.0), shape)
        return self.ones

    def rows(self, graph: Graph, ids: str, name: str) -> str:
        """Return the rows of a table."""
        if name not in self.matrices:
            return super().rows(graph, ids, name)
        codes, scales = self._coded(graph, name)
        return decoded(graph, graph.op("Gather", codes, ids), graph.op("Gather", scales, ids))

    def _coded(self, graph: Graph, name: str) -> tuple[str, str]:
        codes = self.matrices[name].codes
        return graph.tensor(f"{name}.codes", signed(codes)), graph.tensor(f"{name}.scales", codes.grid.scales_OG)


def grid_for_pairs(weight_OI: Tensor) -> Grid:
    """Return the grid on which magnitudes sum up to at most 128 for two adjacent inputs: times 255, that is within 16 bits."""
    largest_O1 = pair_sums(weight_OI).amax(dim=1, keepdim=True)
    # Rounding both adds 1 at most: a magnitude of 127 before it is 128 afterwards.
    scales_O1 = (largest_O1 / (SCHEME.middle - 1)).clamp(min=SMALLEST_SCALE)
    return Grid(scales_O1, torch.full_like(scales_O1, SCHEME.middle, dtype=torch.uint8))


def levels_for(codes: Codes) -> int:
    """Return the largest code of inputs for which no two products of adjacent inputs exceed 16 bits together."""
    return min(SCHEME.levels, LARGEST_SUM // max(1, int(pair_sums(signed(codes).int()).max())))


def pair_sums(weight_OI: Tensor) -> Tensor:
    """Return the sums of the magnitudes of the weights of two adjacent inputs."""
    padded_OI = F.pad(weight_OI.abs(), (0, weight_OI.shape[1] % 2))
    return padded_OI[:, 0::2] + padded_OI[:, 1::2]


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
