"""An ONNX graph under construction, and the file it becomes. Knows operators and constants, nothing about models.

Opset 17 is the first with LayerNormalization. What came later (Gelu, blocked quantization, Attention) is written out: ONNX
Runtime fuses it when it loads the file, and older runtimes, such as those in browsers, still read it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmctl import __version__
from llmctl.errors import MissingExtraError

OPSET, IR_VERSION = 17, 8
FLOAT, INT64, BOOL = 1, 7, 9
"""Types of tensors, as Cast names them."""
MOST_BYTES = 2**31 - 2**20
"""Protocol buffers end at 2 GiB; a larger model keeps its tensors in a second file."""
FEWEST_BYTES = 1024
"""The smallest tensor that the second file takes."""


def onnx_module() -> Any:
    """Import `onnx`.

    Raises: MissingExtraError.
    """
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("`--to onnx`", "onnx") from None
    return onnx


Axes = list[str | int]
"""The dimensions of a value; those with a name are any size."""


class Graph:
    """Nodes in the order of execution, and constants by name; values are referred to by name.

    inputs are int64, outputs float32.
    """

    def __init__(self, inputs: Mapping[str, Axes], outputs: Mapping[str, Axes]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.nodes: list[tuple[str, list[str], list[str], str, dict[str, Any]]] = []
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self.scope = ""

    @contextmanager
    def inside(self, scope: str) -> Iterator[None]:
        """Name nodes after a part of the model."""
        before, self.scope = self.scope, f"{self.scope}/{scope}"
        yield
        self.scope = before

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, n_outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        name = f"{self.scope}/{kind}_{len(self.nodes)}"
        outputs = [f"{name}:{number}" for number in range(n_outputs)]
        self.nodes.append((kind, list(inputs), outputs, name, attributes))
        return outputs

    def name_output(self, value: str, name: str) -> None:
        """Let the graph return the output of a node under this name."""
        for _, inputs, outputs, _, _ in self.nodes:
            for values in (inputs, outputs):
                values[:] = [name if each == value else each for each in values]

    def tensor(self, name: str, tensor: Tensor) -> str:
        """Add a weight under its own name, once."""
        if name not in self.constants:
            self.constants[name] = tensor.detach().contiguous().numpy()
        return name

    def number(self, value: float) -> str:
        """Return a float32 scalar."""
        return self._small(np.float32(value))

    def integers(self, *values: int) -> str:
        """Return a list of integers, as shapes and axes are given."""
        return self._small(np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """Return an integer scalar."""
        return self._small(np.int64(value))

    def unsigned(self, value: int) -> str:
        """Return a scalar of eight bits without a sign."""
        return self._small(np.uint8(value))

    def _small(self, value: Any) -> str:
        array = np.asarray(value)
        name = f"{array.dtype.name}[{','.join(map(str, array.ravel().tolist()))}]" + "s" * (array.ndim == 0)
        self.constants.setdefault(name, array)
        return name

    @property
    def n_bytes(self) -> int:
        """The size of all constants."""
        return sum(array.nbytes for array in self.constants.values())


def model_of(graph: Graph, name: str) -> Any:
    """Return the ONNX model of a graph."""
    onnx = onnx_module()
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node(kind, ins, outs, name=label, **attributes)
        for kind, ins, outs, label, attributes in graph.nodes
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(key, kinds.INT64, axes) for key, axes in graph.inputs.items()],
            [helper.make_tensor_value_info(key, kinds.FLOAT, axes) for key, axes in graph.outputs.items()],
            [onnx.numpy_helper.from_array(array, key) for key, array in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="llmctl",
        producer_version=__version__,
    )


def save(model: Any, path: Path, n_bytes: int, *, most: int = MOST_BYTES) -> list[Path]:
    """Write a model as one file, or with its tensors in `X.onnx_data` beside it if it has more than `most` bytes."""
    onnx = onnx_module()
    if n_bytes <= most:
        onnx.save_model(model, path)
        return [path]
    data = path.with_name(path.name + "_data")
    onnx.save_model(model, path, save_as_external_data=True, location=data.name, size_threshold=FEWEST_BYTES)
    return [path, data]
