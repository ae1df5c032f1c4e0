"""GGUF files: the header by the standard library, quantized weights through the package `gguf`.

Knows the format and nothing of models: those are read by `gguf_model.py`, the tokenizer inside by `gguf_tokenizer.py`.
Every length in a header is checked against the file before it is believed.
Source: the GGUF specification, docs/gguf.md in ggml-org/ggml.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmctl.errors import ArtifactError, MissingExtraError, NotFoundError
from llmctl.files import recognized
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Scalar type id -> struct code; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Block(NamedTuple):
    """A weight format: its name, elements per block, bytes per block."""

    name: str
    n_elements: int
    n_bytes: int


NUMBERS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip
"""ggml's numbers of the formats of `quant/gguf_schemes.py`."""

BLOCKS = {0: Block("F32", 1, 4), 1: Block("F16", 1, 2), 30: Block("BF16", 1, 2)} | {
    number: Block(name, BLOCK_SCHEMES[name].block, BLOCK_SCHEMES[name].n_bytes) for number, name in NUMBERS.items()
}


class GgufTensor(NamedTuple):
    """One tensor of the header: its weight format, shape (rows first, as torch has it), first byte, bytes."""

    block: Block
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands at the head of a GGUF file."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


DAMAGED = "the file is damaged or incomplete: convert or download it again"
"""The hint for contents that contradict each other."""

UNSUPPORTED = "import the model from its Hugging Face folder, or convert it without this"
"""The hint for contents that mean something llmctl does not compute."""


class Cursor:
    """A position in the header's bytes; every step is checked against the end of the file.

    Raises: ArtifactError from every method.
    """

    def __init__(self, path: Path, data: "NDArray[np.uint8]") -> None:
        self.path, self.data, self.position = path, data, 0

    def damaged(self, what: str) -> ArtifactError:
        """Return the error for a file that breaks the format."""
        return ArtifactError(f"`{self.path}` is not a sound GGUF file: {what}", "fetch the file again")

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        if n_bytes > len(self.data) - self.position:
            what = f"it ends at byte {len(self.data)}, in the middle of {n_bytes} bytes from {self.position}"
            raise self.damaged(what)
        self.position += n_bytes
        return self.data[self.position - n_bytes : self.position].tobytes()

    def scalar(self, code: str) -> Any:
        """Return the next number, little-endian."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """Return the next count of things, which must fit into the rest of the file."""
        n_items: int = self.scalar("Q")
        if n_items * least_bytes > len(self.data) - self.position:
            raise self.damaged(f"it claims {n_items} {what}, more than fit into it")
        return n_items

    def string(self) -> str:
        """Return the next string."""
        raw = self.take(self.count(1, "characters"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string before byte {self.position} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Return the next metadata value of the given type."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise self.damaged(f"a value before byte {self.position} has the unknown type {kind}")
        return self.scalar(SCALARS[kind])

    def array(self) -> list[Any]:
        """Return the next array, of numbers or strings."""
        kind = self.scalar("I")
        if kind == STRING:
            return [self.string() for _ in range(self.count(8, "strings"))]
        if kind not in SCALARS:
            raise self.damaged(f"an array before byte {self.position} has elements of the unknown type {kind}")
        width = struct.calcsize("<" + SCALARS[kind])
        n_items = self.count(width, "numbers")
        return list(struct.unpack(f"<{n_items}{SCALARS[kind]}", self.take(n_items * width)))


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file without touching its tensors.

    Raises: NotFoundError; ArtifactError naming the first thing that is wrong.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file `{path}`", "check the path")
    cursor = Cursor(path, map_file(path))
    known = recognized(bytes(cursor.data[:512]))
    if known is not None and known[0] != "a GGUF file":
        raise ArtifactError(f"`{path}` is not a GGUF file, but {known[0]}", known[1])
    if cursor.take(4) != MAGIC:
        raise cursor.damaged("it does not begin with `GGUF`")
    version = cursor.scalar("I")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise ArtifactError(
            f"`{path}` is a big-endian GGUF file, which llmctl does not read",
            "convert the model to a little-endian file, which nearly all machines use",
        )
    if version not in VERSIONS:
        raise cursor.damaged(f"its version is {version}, 2 and 3 are read")
    n_tensors, n_values = cursor.count(24, "tensors"), cursor.count(13, "values")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the key `{key[:80]}` stands there twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return GgufHeader(path, version, metadata, read_tensor_entries(cursor, n_tensors, metadata))


def map_file(path: Path) -> "NDArray[np.uint8]":
    """Return the bytes of a file, mapped."""
    import numpy as np

    if path.stat().st_size == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def read_tensor_entries(cursor: Cursor, n_tensors: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """Read the tensors of the header and check that each lies in the file."""
    entries: dict[str, tuple[Block, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = cursor.string()
        n_dims = cursor.scalar("I")
        if name in entries or not 1 <= n_dims <= 4:
            raise cursor.damaged(f"tensor `{name[:80]}` stands there twice or has {n_dims} dimensions")
        dims = tuple(cursor.scalar("Q") for _ in range(n_dims))
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        if kind not in BLOCKS:
            known = ", ".join(block.name for block in BLOCKS.values())
            raise ArtifactError(
                f"tensor `{name[:80]}` of `{cursor.path}` has the weight format {kind}, which llmctl does not read",
                f"what is read: {known}",
            )
        entries[name] = BLOCKS[kind], dims[::-1], offset
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise cursor.damaged(f"`general.alignment` is {str(alignment)[:40]}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: place(cursor, name, start, entry) for name, entry in entries.items()}
    refuse_overlap(cursor, tensors)
    return tensors


def refuse_overlap(cursor: Cursor, tensors: Mapping[str, GgufTensor]) -> None:
    """Refuse tensors that share bytes: a small file of them would take any amount of memory.

    Raises: ArtifactError naming two.
    """
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin < end and tensor.n_bytes:
            raise cursor.damaged(f"the tensors `{before[:80]}` and `{name[:80]}` share bytes")
        if tensor.n_bytes:
            end, before = tensor.begin + tensor.n_bytes, name


def place(cursor: Cursor, name: str, start: int, entry: tuple[Block, tuple[int, ...], int]) -> GgufTensor:
    """Check that a tensor's rows are whole blocks and that it lies in the file."""
    block, shape, offset = entry
    n_elements = 1
    for size in shape:
        n_elements *= size
        if n_elements > 2**50:
            raise cursor.damaged(f"tensor `{name[:80]}` has the shape {shape}")
    if shape[-1] % block.n_elements != 0:
        raise cursor.damaged(f"tensor `{name[:80]}` of shape {shape} does not fill blocks of {block.n_elements}")
    n_bytes = n_elements // block.n_elements * block.n_bytes
    if start + offset + n_bytes > len(cursor.data):
        what = f"tensor `{name[:80]}` ends at byte {start + offset + n_bytes} of {len(cursor.data)}"
        raise cursor.damaged(what)
    return GgufTensor(block, shape, start + offset, n_bytes)


def dequantize(data: "NDArray[np.uint8]", tensor: GgufTensor) -> "NDArray[np.float32]":
    """Return a tensor in float32, a copy of its own.

    Raises: MissingExtraError when its weight format needs the package `gguf`.
    """
    import numpy as np

    raw = data[tensor.begin : tensor.begin + tensor.n_bytes]
    if tensor.block.name == "F32":
        return np.frombuffer(raw.tobytes(), np.float32).reshape(tensor.shape).copy()
    if tensor.block.name == "F16":
        return np.frombuffer(raw.tobytes(), np.float16).astype(np.float32).reshape(tensor.shape)
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingExtraError(f"the weight format {tensor.block.name}", "gguf") from error
    rows = np.asarray(raw).reshape(-1, tensor.shape[-1] // tensor.block.n_elements * tensor.block.n_bytes)
    values = dequantize(rows, GGMLQuantizationType[tensor.block.name])
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)
