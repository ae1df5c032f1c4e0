"""Write a decoder as a GGUF file that llama.cpp runs: which models, which weight formats, metadata and tensors.

The inverse of `gguf_model.py`; the container is written by the package `gguf`, the blocks by `quant/gguf_blocks.py`.
Nothing is believed of the result here: `converting/gguf_check.py` reads it back.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, MissingExtraError, UsageError
from llmctl.formats.gguf.architectures import (
    ADDED,
    ARCHITECTURES,
    FACTORS,
    LONG_FACTORS,
    NAMED,
    POOLINGS,
    SCALING,
    SCALING_KEY,
    SHORT_FACTORS,
    architecture_for,
    nearest_architecture,
    scaling_values,
)
from llmctl.formats.gguf.container import BLOCKS
from llmctl.formats.gguf.model import n_paired_heads, rope_factors, rotated_width, stacked_shape, tensor_names
from llmctl.model.parameters import Shape, parameter_shapes
from llmctl.model.shapes import complete
from llmctl.model.supports import describe, unsupported
from llmctl.tables.heads import HEADS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from llmctl.quant.grid import Codes

ALIGNMENT = 32
ENTRY_BYTES = 64
"""Bytes of a tensor's entry in the header at most, without its name."""
QUANTIZATION_VERSION = 2  # of ggml's block layouts


class FileType(NamedTuple):
    """What `--type` means: the blocks of matrices, those of the head, and llama.cpp's number of the whole."""

    block: str
    head: str
    number: int


# The head of a model in four or five bits has six or eight, as in llama.cpp: its errors are not averaged by a next layer.
TYPES = {
    "f32": FileType("F32", "F32", 0),
    "f16": FileType("F16", "F16", 1),
    "bf16": FileType("BF16", "BF16", 32),
    "q8_0": FileType("Q8_0", "Q8_0", 7),
    "q6_K": FileType("Q6_K", "Q6_K", 18),
    "q5_K": FileType("Q5_K", "Q6_K", 16),
    "q5_1": FileType("Q5_1", "Q6_K", 9),
    "q5_0": FileType("Q5_0", "Q6_K", 8),
    "q4_K": FileType("Q4_K", "Q6_K", 14),
    "q4_1": FileType("Q4_1", "Q6_K", 3),
    "q4_0": FileType("Q4_0", "Q6_K", 2),
    "iq4_nl": FileType("IQ4_NL", "Q6_K", 25),
    "iq4_xs": FileType("IQ4_XS", "Q6_K", 30),
    "q3_K": FileType("Q3_K", "Q6_K", 11),
    "q2_K": FileType("Q2_K", "Q6_K", 10),
}
NARROWER = {"Q6_K": "Q8_0", "Q5_K": "Q5_0"} | dict.fromkeys(("Q4_K", "IQ4_XS", "Q3_K", "Q2_K"), "IQ4_NL")
"""What holds a tensor whose rows are no whole blocks of 256: the smallest format with blocks of 32 and at least its bits."""
N_ELEMENTS = {block.name: block.n_elements for block in BLOCKS.values()}
N_BYTES = {block.name: block.n_bytes for block in BLOCKS.values()}
EXPORTED = f"what is exported: {', '.join(ARCHITECTURES)}; --to single or hf takes every model"


@dataclass
class Written:
    """What was written: the weights that its bytes stand for and the blocks they are in, under our names, and their bytes."""

    meant: dict[str, "Tensor"] = field(default_factory=dict)
    blocks: dict[str, "Planned"] = field(default_factory=dict)
    n_bytes: int = 0


class Planned(NamedTuple):
    """The block of a tensor, and the one it would have if its rows were whole ones of it."""

    block: str
    wanted: str


def find_type(name: str, *, quantized: bool = False) -> str:
    """Return the type of this name, however it is capitalized; quantized: the hint lists only those that are.

    Raises: UsageError listing those there are.
    """
    found = next((known for known in TYPES if known.lower() == name.lower()), None)
    if found is None:
        near = next((known for known in TYPES if name.lower().startswith(f"{known.lower()}_")), None)
        offered = [kind for kind, row in TYPES.items() if not (quantized and row.block in ("F32", "F16", "BF16"))]
        listed = f"--type takes {', '.join(offered)}"
        raise UsageError(f"there is no GGUF type `{name}`", f"did you mean {near}? {listed}" if near else listed)
    return found


def check_kind(config: ModelConfig, architecture: str, path: Path) -> None:
    """Refuse a model that none of llama.cpp's architectures here expresses.

    Raises: ArtifactError naming the model's kind and what is exported.
    """
    obstacle = obstacle_in(config)
    if obstacle:
        raise ArtifactError(f"`{path}` ({architecture}) {obstacle}, which is not exported as GGUF", EXPORTED)


def obstacle_in(config: ModelConfig) -> str:
    """Return what about a model is of none of the architectures; nothing where it is one of them."""
    if config.n_labels:
        return f"is {HEADS[config.head].model}"
    if config.family == "encoder_decoder":
        return "is an encoder-decoder"
    config = complete(config)
    if architecture_for(config).holds(config):
        return ""
    if config.family == "encoder":
        return "is an encoder with a prediction head, or of another block than BERT's or nomic-embed's"
    names = unsupported(config, NAMED) or list(SCALING)
    near, missing = nearest_architecture(config)
    if near and len(missing) < len(names):
        return f"is a {near} model with {', '.join(missing)}"
    return f"is of another block than Llama's ({describe(config, names)})"


def file_type(config: ModelConfig, plan: Mapping[str, Planned]) -> int:
    """Return llama.cpp's number of a whole file: that of the blocks which most of the layers' weights are in."""
    shapes, counts = parameter_shapes(config), Counter[str]()
    for there, names in tensor_names(config, architecture_for(config)).items():
        if there.startswith("blk."):
            counts[plan[there].wanted] += sum(math.prod(shapes[name]) for name in names)
    most = counts.most_common(1)[0][0]
    return next(row.number for row in TYPES.values() if row.block == most)


def model_values(config: ModelConfig, general: Mapping[str, str], *, pooling: str = "mean") -> dict[str, Any]:
    """Return the metadata of a model; `general` are names and license without their prefix, `pooling` an encoder's."""
    values: dict[str, Any] = {f"general.{key}": text for key, text in general.items()}
    values |= {
        "general.type": "model",
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": rotated_width(config),
        "rope.freq_base": float(config.rope_theta),
    }
    row = architecture_for(config)
    if config.family == "encoder":
        sizes["pooling_type"] = POOLINGS[pooling]
        values["tokenizer.ggml.token_type_count"] = config.n_token_types
    is_rms = config.norm == "rmsnorm"
    sizes["attention.layer_norm_rms_epsilon" if is_rms else "attention.layer_norm_epsilon"] = config.norm_eps
    if row.drops_window and any(config.attention_windows):
        sizes["attention.sliding_window"] = max(config.attention_windows)
    scaling = scaling_values(config)
    if SCALING_KEY in scaling:
        values[SCALING_KEY] = scaling.pop(SCALING_KEY)
    return values | {
        f"{row.name}.{key}": value for key, value in (sizes | scaling | dict(row.metadata(config))).items()
    }


def dropped_window(config: ModelConfig) -> int:
    """Return the attention window that llama.cpp does not have for this architecture; 0 if there is none."""
    return max(config.attention_windows, default=0) if architecture_for(complete(config)).drops_window else 0


def factor_tensors(config: ModelConfig) -> "dict[str, NDArray[np.float32]]":
    """Return the tensors that divide rotary frequencies."""
    import numpy as np

    if config.rope_scaling == "longrope" and "longrope" in architecture_for(config).scalings:
        divisors = np.array(config.rope_scaling_values[2:], dtype=np.float32)
        return dict(zip((SHORT_FACTORS, LONG_FACTORS), np.split(divisors, 2), strict=True))
    return {FACTORS: rope_factors(config)} if config.rope_scaling in ("llama3", "longrope") else {}


def plan_blocks(config: ModelConfig, kind: str) -> dict[str, Planned]:
    """Return llama.cpp's name of every tensor -> its block; vectors stay in float32."""
    head = "token_embd.weight" if config.tie_embeddings else "output.weight"
    shapes, plan = parameter_shapes(config), {}
    for there, names in tensor_names(config, architecture_for(config)).items():
        wanted = TYPES[kind].head if there == head else TYPES[kind].block
        wanted = "F32" if len(shapes[names[0]]) == 1 or there in ADDED else wanted
        plan[there] = Planned(fitting_block(wanted, shapes[names[0]]), wanted)
    return plan


def fitting_block(block: str, shape: Shape) -> str:
    """Return the block of this name, or the next of those that fill the rows."""
    while shape[-1] % N_ELEMENTS[block]:
        block = NARROWER.get(block, "F16")
    return block


def write_gguf(
    path: Path,
    config: ModelConfig,
    state: Mapping[str, "Tensor"],
    values: Mapping[str, Any],
    plan: Mapping[str, Planned],
    codes: Mapping[str, "Codes"],
) -> Written:
    """Write the file, tensor by tensor, and return what its weights are meant to be.

    `state` is that of `LanguageModel(config)`, a config that passes `check_kind`; `values` the metadata of model and
    tokenizer; `plan` the blocks by llama.cpp's names; `codes` those chosen for a module, the others get the nearest.
    Raises: MissingExtraError without the package `gguf`; ArtifactError for weights that are not finite or too large.
    """
    import numpy as np

    row = architecture_for(config)
    names, written, factors = tensor_names(config, row), Written(), factor_tensors(config)
    writer = new_writer(path, row.name, values)
    try:
        write_header(writer, config, plan, factors)
        for tensor in factors.values():
            writer.write_tensor_data(tensor)
        for there, planned in plan.items():
            parts = []
            for name in names[there]:
                stored, meant = checked(
                    name,
                    state[name].detach().float().contiguous(),
                    planned.block,
                    codes.get(name.removesuffix(".weight")),
                )
                n_heads = n_paired_heads(config, row, name)
                parts.append(paired(stored, n_heads) if n_heads else stored)
                written.meant[name], written.blocks[name] = meant, planned
                written.n_bytes += stored.nbytes
            writer.write_tensor_data(parts[0] if len(parts) == 1 else np.concatenate(parts))
    finally:
        writer.close()
    return written


def metadata_bytes(values: Mapping[str, Any], architecture: str) -> int:
    """Return the bytes of a file's metadata."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.gguf"
        writer = new_writer(path, architecture, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path.stat().st_size


def file_bytes(config: ModelConfig, values: Mapping[str, Any], plan: Mapping[str, Planned]) -> int:
    """Return the size of the file that `write_gguf` writes."""
    row, factors = architecture_for(config), factor_tensors(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = new_writer(path, row.name, values)
        write_header(writer, config, plan, factors)
        writer.close()
        total = aligned(path.stat().st_size)
    shapes = parameter_shapes(config)
    for there, names in tensor_names(config, row).items():
        n_weights = math.prod(stacked_shape(names, shapes))
        total += aligned(n_weights // N_ELEMENTS[plan[there].block] * N_BYTES[plan[there].block])
    return total + sum(aligned(tensor.nbytes) for tensor in factors.values())


def aligned(n_bytes: int) -> int:
    """Return bytes with the padding after them."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def new_writer(path: Path, architecture: str, values: Mapping[str, Any]) -> Any:
    """Return the writer of a file with this metadata."""
    writer = gguf_module().GGUFWriter(path, architecture)
    writer.add_custom_alignment(ALIGNMENT)
    for key, value in values.items():
        put(writer, key, value)
    return writer


def write_header(
    writer: Any, config: ModelConfig, plan: Mapping[str, Planned], factors: "Mapping[str, NDArray[np.float32]]"
) -> None:
    """Write the metadata, and the names and shapes of all tensors, whose bytes come later."""
    gguf, shapes, names = gguf_module(), parameter_shapes(config), tensor_names(config, architecture_for(config))
    for there, tensor in factors.items():
        declare(writer, there, tensor.shape, gguf.GGMLQuantizationType.F32, gguf.GGML_QUANT_SIZES)
    for there, (block, _) in plan.items():
        shape = stacked_shape(names[there], shapes)
        declare(writer, there, shape, gguf.GGMLQuantizationType[block], gguf.GGML_QUANT_SIZES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def gguf_module() -> Any:
    """Return the package `gguf`.

    Raises: MissingExtraError naming the extra.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("writing GGUF files", "gguf") from error
    return gguf


def put(writer: Any, key: str, value: Any) -> None:
    """Add one metadata value in the type that llama.cpp's own converters give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def declare(writer: Any, name: str, shape: Shape, block: Any, sizes: Mapping[Any, tuple[int, int]]) -> None:
    """Announce a tensor, whose bytes come later."""
    import numpy as np

    n_elements, n_bytes = sizes[block]
    row_bytes = shape[-1] // n_elements * n_bytes
    byte_shape = (*shape[:-1], row_bytes)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=block)


def checked(
    name: str, weight: "Tensor", block: str, codes: "Codes | None" = None
) -> tuple["NDArray[np.uint8]", "Tensor"]:
    """Return a tensor's bytes and what they stand for; `codes`: those chosen for it, else the nearest.

    Raises: ArtifactError for weights that are not finite, or too large for a block's 16-bit scales.
    """
    if not weight.isfinite().all():
        raise ArtifactError(f"`{name}` has NaN or infinite numbers", "fetch or train the model again")
    stored, meant = encoded(weight, block, codes)
    if not meant.isfinite().all():
        largest = float(weight.abs().max())
        raise ArtifactError(
            f"`{name}` has weights up to {largest:.4g}, too large for {block}",
            "`llmctl export --to gguf --type bf16` or f32 holds them",
        )
    return stored, meant


def encoded(weight: "Tensor", block: str, codes: "Codes | None" = None) -> tuple["NDArray[np.uint8]", "Tensor"]:
    """Return a tensor's bytes, row by row, and the weights in float32 that they stand for."""
    import torch

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if block in plain:
        rounded = weight.to(plain[block])
        return rounded.view(torch.uint8).numpy(), rounded.float()
    from llmctl.quant.gguf_layout import packed
    from llmctl.quant.gguf_schemes import BLOCK_SCHEMES
    from llmctl.quant.methods import clipped, decode

    scheme = BLOCK_SCHEMES[block]
    codes = codes or clipped(weight, scheme)
    return packed(codes, scheme).numpy(), decode(codes, scheme)


def paired(rows: "NDArray[np.uint8]", n_heads: int) -> "NDArray[np.uint8]":
    """Reorder rows (N*H, B) from halves of a head to interleaved rotary pairs; the inverse of `half_split`."""
    import numpy as np

    halves = rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
