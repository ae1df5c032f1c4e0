"""Read and write safetensors files: headers without the library, tensors with it, and a deterministic writer.

Knows nothing about models. Files are not trusted: a damaged or malicious header is refused before any tensor is read.
The library's own writer orders metadata randomly; ours writes equal bytes for equal content, one tensor at a time.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from llmctl.errors import ArtifactError, NotFoundError, OutputError
from llmctl.files import atomic_path, recognized

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
    """The header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file without reading its tensors.

    Raises: NotFoundError; ArtifactError with the first problem.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise damaged(path, "it is a pipe or a device, not a file")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(512)
            file.seek(0)
            try:
                return parse_header(read_header_bytes(file, size, path), size, path)
            except ArtifactError:
                if (known := recognized(head)) is None:
                    raise
                raise ArtifactError(f"`{path}` is not a safetensors file, but {known[0]}", known[1]) from None
    except FileNotFoundError as error:
        raise NotFoundError(f"file `{path}` does not exist", "check the path") from error
    except IsADirectoryError as error:
        raise ArtifactError(
            f"`{path}` is a folder, not a safetensors file", "pass the path of a .safetensors file"
        ) from error


def damaged(path: Path, what: str) -> ArtifactError:
    """Return the error for a file that violates the format."""
    return ArtifactError(f"`{path}` is not a valid safetensors file: {what}", "download or write the file again")


def read_header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    """Read the JSON header, checking its length against the file's `size` in bytes."""
    if size < 8:
        raise damaged(path, f"it has {size} bytes, but the header's length alone takes 8")
    (n_bytes,) = struct.unpack("<Q", file.read(8))
    if n_bytes > HEADER_LIMIT_BYTES:
        raise damaged(path, f"its header claims {n_bytes} bytes, more than the limit of {HEADER_LIMIT_BYTES}")
    if n_bytes > size - 8:
        raise damaged(path, f"its header claims {n_bytes} bytes, but only {size - 8} follow")
    return file.read(n_bytes)


def parse_header(raw: bytes, size: int, path: Path) -> Header:
    """Parse the JSON header and check that its tensors cover the rest of the file exactly."""
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
    """Build a JSON object, refusing duplicate keys.

    Raises: ValueError.
    """
    obj = dict(pairs)
    if len(obj) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key `{key[:80]}`")
    return obj


def parse_entry(name: str, entry: Any, n_bytes: int, path: Path) -> TensorEntry:
    """Parse one tensor of the header and check that dtype, shape and offsets agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"tensor `{name}` does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(path, f"tensor `{name}` has the unknown dtype `{str(dtype)[:40]}`")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise damaged(path, f"tensor `{name}` has a shape or offsets that are not non-negative integers")
    begin, end = offsets
    # Checked here, since the library maps the file: a wrong offset must not become a read outside it.
    if not begin <= end <= n_bytes:
        raise damaged(path, f"tensor `{name}` lies at bytes {begin} to {end} of {n_bytes}")
    # In bits, since some dtypes have fewer than eight per element.
    n_bits = count_elements(shape, 8 * n_bytes) * DTYPE_BITS[dtype]
    if n_bits != 8 * (end - begin):
        raise damaged(path, f"tensor `{name}` of shape {shape} and dtype {dtype} does not fill its {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), begin, end)


def is_sizes(value: Any) -> bool:
    """Tell whether this is a list of non-negative 63-bit integers."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def count_elements(shape: Iterable[int], limit: int) -> int:
    """Multiply the sizes of a shape, stopping above `limit`, so that a malicious shape cannot build a huge integer."""
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
    """Check that the tensors are contiguous, without gaps or overlaps, up to the end of the file."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the previous one" if entry.begin < position else "has a gap before it"
            raise damaged(path, f"tensor `{name}` {kind}")
        position = entry.end
    if position != n_bytes:
        raise damaged(path, f"its tensors take {position} bytes, but the file has {n_bytes}")


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, "Tensor"]:
    """Return the named tensors of a file, or all, in their stored dtypes.

    The tensors are views of the mapped file: copy before writing into them.

    Raises: NotFoundError; ArtifactError for a damaged file, a missing name, or a dtype that torch lacks.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path)  # our stricter checks, before the library maps the file
    selected = list(header.tensors) if names is None else list(names)
    missing = [name for name in selected if name not in header.tensors]
    if missing:
        raise ArtifactError(f"`{path}` has no tensor `{missing[0]}`", "download or write the file again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in selected}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise damaged(path, str(error)) from error


def write_safetensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; equal content gives equal bytes.

    The header is sorted, wider dtypes come first so that every tensor is aligned, and one tensor at a time is copied
    from its device. Tensors that share memory are each written: drop duplicates first.

    Raises: OutputError if the file cannot be written or the metadata is too long.
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
    raw += b" " * (-len(raw) % 8)  # pads the header, so that tensor data starts aligned
    if len(raw) > HEADER_LIMIT_BYTES:
        raise OutputError(
            f"`{path}` would need a header of {len(raw)} bytes, but the format allows {HEADER_LIMIT_BYTES}",
            "shorten the metadata",
        )
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for name in order:
            file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    flat = flat.as_strided(
        (flat.numel(),), (1,)
    )  # one element is contiguous at any stride, and refused by the view below
    # Via uint8, because NumPy has no bfloat16.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the format's name of a torch dtype.

    Raises: OutputError if it has none.
    """
    name = str(dtype).removeprefix("torch.")
    names = [key for key, value in TORCH_NAMES.items() if value == name]
    if not names:
        raise OutputError(
            f"a tensor of dtype `{name}` cannot be stored in a safetensors file",
            f"use one of {', '.join(TORCH_NAMES.values())}",
        )
    return names[0]
