"""safetensors files: the header by the standard library alone, tensors by the library, and a writer of equal bytes.

Knows nothing of models. Reading trusts nothing: a header that is damaged or hostile is refused before any tensor is
touched. The writer exists because the library's own puts the metadata in a random order: here equal content is equal
bytes, and tensors are written one after the other.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from llmctl.errors import ArtifactError, NotFoundError, OutputError
from llmctl.files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADER_LIMIT_BYTES = 100_000_000  # the limit of the format's own library

# Width of one element in bits, for every dtype of the format.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "BOOL": "bool",
}


class TensorEntry(NamedTuple):
    """One tensor of a header: dtype as the format names it, shape, and the bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What stands at the head of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file without touching its tensors.

    Raises: NotFoundError; ArtifactError naming the first thing that is wrong.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            return parse_header(read_header_bytes(file, size, path), size, path)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file `{path}`") from error
    except IsADirectoryError as error:
        raise ArtifactError(f"`{path}` is a folder, not a safetensors file") from error


def damaged(path: Path, what: str) -> ArtifactError:
    """Return the error for a file that breaks the format."""
    return ArtifactError(f"`{path}` is not a sound safetensors file: {what}", "fetch or write the file again")


def read_header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    """Return the JSON at the head of the file, its length checked against the file's `size` in bytes."""
    if size < 8:
        raise damaged(path, f"it has {size} bytes, the header's length alone takes 8")
    (n_bytes,) = struct.unpack("<Q", file.read(8))
    if n_bytes > HEADER_LIMIT_BYTES:
        raise damaged(path, f"its header claims {n_bytes} bytes, more than {HEADER_LIMIT_BYTES}")
    if n_bytes > size - 8:
        raise damaged(path, f"its header claims {n_bytes} bytes, the file has {size - 8} after the length")
    return file.read(n_bytes)


def parse_header(raw: bytes, size: int, path: Path) -> Header:
    """Check the header's JSON and that its tensors cover the rest of the file exactly."""
    try:
        obj = json.loads(raw.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(obj, dict):
        raise damaged(path, "its header is not a JSON object")
    metadata = obj.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "`__metadata__` does not map strings to strings")
    n_bytes = size - 8 - len(raw)
    tensors = {name: parse_entry(name, entry, n_bytes, path) for name, entry in obj.items()}
    check_coverage(tensors, n_bytes, path)
    return Header(metadata, tensors)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that stands there twice."""
    obj = dict(pairs)
    if len(obj) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` stands there twice")
    return obj


def parse_entry(name: str, entry: Any, n_bytes: int, path: Path) -> TensorEntry:
    """Check one tensor of the header by itself: dtype, shape, offsets, and that they agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"tensor `{name}` does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(path, f"tensor `{name}` has the unknown dtype `{str(dtype)[:40]}`")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise damaged(path, f"tensor `{name}` has a shape or offsets that are not whole numbers from 0")
    begin, end = offsets
    if not begin <= end <= n_bytes:
        raise damaged(path, f"tensor `{name}` lies at bytes {begin} to {end} of {n_bytes}")
    n_bits = count_elements(shape, 8 * n_bytes) * DTYPE_BITS[dtype]
    if n_bits != 8 * (end - begin):
        raise damaged(path, f"tensor `{name}` of shape {shape} and dtype {dtype} does not fill its {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), begin, end)


def is_sizes(value: Any) -> bool:
    """Say whether this is a list of whole numbers from 0."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def count_elements(shape: Iterable[int], limit: int) -> int:
    """Multiply the sizes of a shape, stopping just above `limit`, so that a hostile shape costs no time."""
    sizes = list(shape)
    if 0 in sizes:
        return 0
    product = 1
    for size in sizes:
        product *= size
        if product > limit:
            return limit + 1
    return product


def check_coverage(tensors: Mapping[str, TensorEntry], n_bytes: int, path: Path) -> None:
    """Check that the tensors follow each other without a hole or an overlap, up to the end of the file."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the one before it" if entry.begin < position else "leaves a hole before it"
            raise damaged(path, f"tensor `{name}` {kind}")
        position = entry.end
    if position != n_bytes:
        raise damaged(path, f"its tensors take {position} bytes, the file has {n_bytes}")


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, "Tensor"]:
    """Return the named tensors of a file, or all, in the dtypes they are stored in.

    The tensors are views of the mapped file: copy before writing into them.

    Raises: NotFoundError; ArtifactError for a damaged file, a missing name, or a dtype that torch lacks.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    missing = [name for name in wanted if name not in header.tensors]
    if missing:
        raise ArtifactError(f"`{path}` has no tensor `{missing[0]}`")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise damaged(path, str(error)) from error


def write_safetensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; equal content gives equal bytes.

    The header is sorted, the wider dtypes come first so that every tensor is aligned, and one tensor at a time is
    copied off its device. A tensor that shares memory with another is written twice: drop it before.

    Raises: OutputError when the file cannot be written or the metadata is too long.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"data_offsets": [position, end], "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        position = end
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT_BYTES:
        raise OutputError(f"`{path}` would need a header of {len(raw)} bytes, the format allows {HEADER_LIMIT_BYTES}")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for name in order:
            file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the format's name of a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    found = [key for key, value in TORCH_NAMES.items() if value == name]
    if not found:
        raise OutputError(f"tensors of type `{name}` cannot be stored in a safetensors file")
    return found[0]
