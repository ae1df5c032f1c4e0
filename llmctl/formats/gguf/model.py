"""A decoder inside a GGUF file: its configuration, its tensors' names, and its weights, as llama.cpp lays them out.

Where llama.cpp turns neighboring channels together (`llama`), the rows of queries and keys are stored so that rotary pairs
stand side by side; ours stand half a head apart.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.families.published import Published
from llmctl.formats.gguf.architectures import (
    ARCHITECTURES,
    FACTORS,
    LONG_FACTORS,
    POOLINGS,
    SCALING_KEY,
    SHORT_FACTORS,
    TOP,
    Architecture,
    read_scaling,
    shortest,
)
from llmctl.formats.gguf.container import DAMAGED, UNSUPPORTED, GgufHeader, dequantize, map_file
from llmctl.model.parameters import parameter_shapes
from llmctl.model.shapes import complete
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES, BlockScheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from llmctl.quant.grid import Codes


def gguf_config(header: GgufHeader) -> ModelConfig:
    """Return the model configuration of a GGUF file, and check its tensors against it.

    Raises: ArtifactError for another architecture, rope scaling, experts, or tensors that do not fit.
    """
    n_parts = header.metadata.get("split.count", 0)
    if n_parts not in (0, 1):
        raise ArtifactError(
            f"`{header.path}` is one of the {str(n_parts)[:10]} parts of a split GGUF file, which llmctl does not read",
            "join them first: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ArtifactError(
            f"`{header.path}` is of the architecture `{str(name)[:60]}`, which llmctl does not read as GGUF",
            f"what is read: {', '.join(ARCHITECTURES)}; other families come in as Hugging Face folders",
        )
    row = ARCHITECTURES[name]
    refuse_extras(header, row)
    config = config_of(header, row)
    if not row.holds(config):
        raise ArtifactError(f"`{header.path}` has settings that no {name} model of llama.cpp has", UNSUPPORTED)
    check_gguf_tensors(header, config, row)
    return config


def config_of(header: GgufHeader, row: Architecture) -> ModelConfig:
    """Return the configuration that metadata and tensors state.

    Raises: ArtifactError naming a key or tensor that is missing or wrong.
    """
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ArtifactError(f"`{header.path}` has no tensor `token_embd.weight`", DAMAGED)
    data = Published(own_values(header, row.name), f"`{header.path}`")
    norm = row.fields.get("norm", "rmsnorm")
    eps = "attention.layer_norm_epsilon" if norm == "layernorm" else "attention.layer_norm_rms_epsilon"
    n_heads, d_model = data.integer("attention.head_count"), data.integer("embedding_length")
    head_dim = data.integer("attention.key_length", max(1, d_model // n_heads))
    rotated = data.integer("rope.dimension_count", head_dim)
    max_positions = data.integer("context_length")
    window = data.values.get("attention.sliding_window") if row.drops_window else None
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "d_model": d_model,
        "n_layers": data.integer("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": data.integer("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "d_ff": data.integer("feed_forward_length"),
        "max_positions": max_positions,
        "norm_eps": shortest(data.number(eps, 1e-5)),
        "rope_theta": float(shortest(data.number("rope.freq_base", 10000.0))),
        "rotary_dim": 0 if rotated == head_dim else rotated,
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": "output.weight" not in header.tensors,
        "bos_id": data.token("tokenizer.ggml.bos_token_id"),
        "eos_id": data.token("tokenizer.ggml.eos_token_id"),
        "pad_id": data.token("tokenizer.ggml.padding_token_id"),
    }
    if type(window) is int and 0 < window < max_positions:
        values["attention_windows"] = (window,)
    if row.fields.get("family") == "encoder":  # the tokens around a text are its tokenizer's
        values |= {"bos_id": -1, "eos_id": -1}
    values |= {**read_scaling(data, max_positions), **row.fields, **row.settings(data, header.tensors)}
    if values["rotary_dim"] and "rotary_dim" not in row.named:
        raise ArtifactError(
            f"`{header.path}` rotates {rotated} of {head_dim} channels, which llmctl does not read", UNSUPPORTED
        )
    try:
        config = complete(ModelConfig(**values))
    except UsageError as error:
        raise ArtifactError(f"`{header.path}`: {error}", DAMAGED) from error
    if FACTORS in header.tensors:
        return with_factors(header, config)
    has_factors = not {SHORT_FACTORS, LONG_FACTORS}.isdisjoint(header.tensors)
    return with_long_factors(header, config, data) if has_factors else config


def rotated_width(config: ModelConfig) -> int:
    """Return how many channels of a head are rotated."""
    return config.rotary_dim or config.head_dim


def own_values(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """Return the metadata without the architecture's prefix."""
    return {key.removeprefix(f"{architecture}."): value for key, value in header.metadata.items()}


def pooling_of(header: GgufHeader) -> str:
    """Return how an encoder represents a text; empty if the file does not say."""
    kind = header.metadata.get(f"{header.metadata.get('general.architecture')}.pooling_type")
    return next((name for name, number in POOLINGS.items() if number == kind), "")


def rope_factors(config: ModelConfig) -> "NDArray[np.float32]":
    """Return what divides the rotary frequencies, float32 (H/2,)."""
    import torch

    from llmctl.model.positions import SCALINGS

    width = rotated_width(config)
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2).float() / width)
    scaled, _ = SCALINGS[config.rope_scaling](frequencies, config.rope_theta, 1, *config.rope_scaling_values)
    return (frequencies / scaled).numpy()


def with_factors(header: GgufHeader, config: ModelConfig) -> ModelConfig:
    """Return the config with the scaling of rotary frequencies that a tensor states.

    As the numbers of Llama 3.1 and 3.2, or those that we wrote beside them, if these give the tensor; else as divisors.
    Raises: ArtifactError for a tensor of another size.
    """
    import numpy as np

    stored = factors_in(header, FACTORS, config)
    known = [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0), *written_scaling(header)]
    for numbers in known:
        trial = replace(config, rope_scaling="llama3", rope_scaling_values=numbers)
        if np.allclose(rope_factors(trial), stored, rtol=1e-6, atol=0):
            return trial
    divisors = tuple(float(number) for number in stored)
    values = (float(config.max_positions), 1.0, *divisors, *divisors)
    return replace(config, rope_scaling="longrope", rope_scaling_values=values)


def written_scaling(header: GgufHeader) -> list[tuple[float, ...]]:
    """Return the numbers of the scaling that we wrote into the file, if they are four."""
    try:
        numbers = json.loads(str(header.metadata.get(SCALING_KEY, "[]"))[:1000])
        return [tuple(float(number) for number in numbers)] if len(numbers) == 4 and numbers[2] != numbers[1] else []
    except (ValueError, TypeError, KeyError):
        return []


def with_long_factors(header: GgufHeader, config: ModelConfig, data: Published) -> ModelConfig:
    """Return the config with the divisors of rotary frequencies for short and for long rows, as in Phi-3.5.

    Raises: ArtifactError for tensors of another size.
    """
    divisors: list[float] = []
    for name in (SHORT_FACTORS, LONG_FACTORS):
        divisors += [float(number) for number in factors_in(header, name, config)]
    length = float(data.integer("rope.scaling.original_context_length", config.max_positions))
    attention = float(shortest(data.number("rope.scaling.attn_factor", 1.0)))
    return replace(config, rope_scaling="longrope", rope_scaling_values=(length, attention, *divisors))


def factors_in(header: GgufHeader, name: str, config: ModelConfig) -> "NDArray[np.float32]":
    """Return a tensor that divides rotary frequencies, float32 (R/2,).

    Raises: ArtifactError if it is missing, of another size, or not positive.
    """
    import numpy as np

    n = rotated_width(config) // 2
    if name not in header.tensors:
        raise ArtifactError(f"`{header.path}` has no tensor `{name}`", "fetch the file again")
    stored = dequantize(map_file(header.path), header.tensors[name]).reshape(-1)
    if len(stored) != n or not np.isfinite(stored).all() or (stored <= 0).any():
        raise ArtifactError(f"`{name}` of `{header.path}` is not {n} positive numbers", DAMAGED)
    return stored


def refuse_extras(header: GgufHeader, row: Architecture) -> None:
    """Refuse what changes the maths of the architecture.

    Raises: ArtifactError naming the key.
    """
    scalings = ("none", None, *(kind for kind in row.scalings if kind in ("linear", "yarn", "longrope")))
    plain_values: dict[str, tuple[Any, ...]] = {
        "rope.scaling.type": scalings,
        "rope.scale_linear": (1.0, None),
        "expert_count": (0, None),
        "attention.causal": (row.fields.get("family") != "encoder", None),
        "pooling_type": (None, 0, *POOLINGS.values()),
        "use_parallel_residual": (False, None),
    }
    if "attention_windows" not in row.named and not row.drops_window:
        plain_values["attention.sliding_window"] = (0, None)
    for key, allowed in plain_values.items():
        value = header.metadata.get(f"{row.name}.{key}")
        if value not in allowed:
            raise ArtifactError(
                f"`{header.path}` has `{row.name}.{key}` {str(value)[:60]!r}, which llmctl does not read",
                UNSUPPORTED,
            )
    needs = {FACTORS: FACTORS, SHORT_FACTORS: "longrope", LONG_FACTORS: "longrope"}
    scaled = [name for name, kind in needs.items() if name in header.tensors and kind not in row.scalings]
    if scaled:
        raise ArtifactError(
            f"`{header.path}` scales its rotary frequencies ({scaled[0]}), which llmctl does not read", UNSUPPORTED
        )


def tensor_names(config: ModelConfig, row: Architecture) -> dict[str, tuple[str, ...]]:
    """Return llama.cpp's name -> ours of every tensor of the model: the parameters that it holds below each other."""
    shapes = parameter_shapes(config)
    modules = {there: (own,) if isinstance(own, str) else own for there, own in TOP.items()}
    if not config.tie_embeddings:
        modules["output"] = ("lm_head",)
    for layer in range(config.n_layers):
        for there, own in row.layer.items():
            names = (own,) if isinstance(own, str) else own
            modules[f"blk.{layer}.{there}"] = tuple(f"model.layers.{layer}.{name}" for name in names)
    found = {}
    for there, owns in modules.items():
        for kind in ("weight", "bias"):
            if f"{owns[0]}.{kind}" in shapes:
                found[f"{there}.{kind}"] = tuple(f"{own}.{kind}" for own in owns)
    return found


def stacked_shape(names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of parameters that are stored below each other."""
    return (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])


def check_gguf_tensors(header: GgufHeader, config: ModelConfig, row: Architecture) -> None:
    """Check names and shapes before anything is read.

    Raises: ArtifactError naming the first that is missing, left over, or of another shape.
    """
    if config.n_layers > len(header.tensors):
        raise ArtifactError(
            f"`{header.path}` claims {config.n_layers} layers and has {len(header.tensors)} tensors", DAMAGED
        )
    names, shapes = tensor_names(config, row), parameter_shapes(config)
    for name in names:
        if name not in header.tensors:
            raise ArtifactError(f"`{header.path}` has no tensor `{name}`", "fetch the file again")
        shape = header.tensors[name].shape
        wanted = stacked_shape(names[name], shapes)
        if shape != wanted:
            raise ArtifactError(
                f"tensor `{name}` of `{header.path}` has the shape {shape}, its metadata says {wanted}", DAMAGED
            )
    extra = [
        name for name in header.tensors if name not in names and name not in (FACTORS, SHORT_FACTORS, LONG_FACTORS)
    ]
    if extra:
        kind = header.metadata["general.architecture"]
        raise ArtifactError(
            f"`{header.path}` has the tensor `{extra[0][:80]}`, which is not part of a {kind} model", UNSUPPORTED
        )


def gguf_state(header: GgufHeader, config: ModelConfig) -> dict[str, "Tensor"]:
    """Return the state of `LanguageModel(config)` in float32, the tied head included.

    Raises: MissingExtraError when a weight format needs the package `gguf`.
    """
    import torch

    data, shapes = map_file(header.path), parameter_shapes(config)
    row = ARCHITECTURES[header.metadata["general.architecture"]]
    state: dict[str, Tensor] = {}
    for there, names in tensor_names(config, row).items():
        whole = torch.from_numpy(dequantize(data, header.tensors[there]))
        for name, part in zip(names, whole.split([shapes[name][0] for name in names]), strict=True):
            n_heads = n_paired_heads(config, row, name)
            state[name] = torch.from_numpy(half_split(part.numpy(), n_heads)) if n_heads else part
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def gguf_codes(header: GgufHeader, config: ModelConfig) -> dict[str, tuple[BlockScheme, "Codes"]]:
    """Return format and codes of every module whose weight is in blocks of ggml."""
    import torch

    from llmctl.quant.gguf_layout import unpacked

    data, shapes = map_file(header.path), parameter_shapes(config)
    row = ARCHITECTURES[header.metadata["general.architecture"]]
    found: dict[str, tuple[BlockScheme, Codes]] = {}
    for there, names in tensor_names(config, row).items():
        tensor = header.tensors[there]
        scheme = BLOCK_SCHEMES.get(tensor.block.name)
        if scheme is None:
            continue
        whole = torch.from_numpy(data[tensor.begin : tensor.begin + tensor.n_bytes].reshape(tensor.shape[0], -1).copy())
        for name, part in zip(names, whole.split([shapes[name][0] for name in names]), strict=True):
            n_heads = n_paired_heads(config, row, name)
            rows = torch.from_numpy(half_split(part.numpy(), n_heads)) if n_heads else part
            found[name.removesuffix(".weight")] = scheme, unpacked(rows, scheme)
    return found


def n_paired_heads(config: ModelConfig, row: Architecture, name: str) -> int:
    """Return how many heads' rows of this parameter are stored as rotary pairs side by side; 0 for other parameters."""
    if not row.has_paired_rows:
        return 0
    heads = {"q_proj.weight": config.n_heads, "k_proj.weight": config.n_kv_heads}
    return next((n for ending, n in heads.items() if name.endswith(ending)), 0)


def half_split(array: "NDArray[Any]", n_heads: int) -> "NDArray[Any]":
    """Reorder rows (N*H, D) from interleaved rotary pairs to halves of a head."""
    import numpy as np

    rows = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
