"""A decoder inside a GGUF file: its configuration, its tensors' names, and its weights, as llama.cpp lays them out.

The architectures are the rows of `ROWS`. Where llama.cpp turns neighboring channels together (`llama`), the rows of queries and keys
are stored so that rotary pairs stand side by side; ours stand half a head apart.
Source: llama.cpp's converters and its table of tensor names, the package `gguf`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.families.family import FamilyFormat
from llmctl.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmctl.families.llama import LLAMA, QWEN2, QWEN3
from llmctl.formats.gguf.container import DAMAGED, UNSUPPORTED, GgufHeader, dequantize, map_file
from llmctl.model.parameters import parameter_shapes
from llmctl.model.shapes import complete, theta_of, window_of
from llmctl.model.supports import CLASSIFIER, SIZES, TOKEN_IDS, TRAINING, close, unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# llama.cpp's name of a tensor in a layer -> ours.
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
QK_NORM_NAMES = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}


BIAS_NAMES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
# Gemma 2 and 3: norms of what each part adds, too.
SANDWICH_NAMES = {
    "post_attention_norm.weight": "attention_output_layernorm.weight",
    "post_ffw_norm.weight": "mlp_output_layernorm.weight",
}
NAMED = SIZES | TOKEN_IDS | TRAINING | CLASSIFIER - {"n_labels"} | {"tie_embeddings", "norm_eps", "rope_theta"}
"""Fields that every row expresses, whatever their value."""


class Architecture(NamedTuple):
    """One of llama.cpp's architectures.

    family: ours; layer_names: the tensors of a layer; fields: what it fixes, beside our defaults; named: fields that its
    metadata state; allows: what does not follow from these; metadata: config -> more keys and values; settings: metadata ->
    more keys and values of config.json. has_paired_rows: rotary pairs are neighbors. has_factors: a tensor may scale
    the rotary frequencies.
    """

    name: str
    family: FamilyFormat
    layer_names: Mapping[str, str]
    fields: Mapping[str, Any] = {}
    named: frozenset[str] = frozenset()
    allows: Callable[[ModelConfig], bool] = lambda _: True
    metadata: Callable[[ModelConfig], Mapping[str, Any]] = lambda _: {}
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    has_paired_rows: bool = False
    has_factors: bool = False

    def holds(self, config: ModelConfig) -> bool:
        """Tell whether a complete config is one of this architecture."""
        fixed = all(getattr(config, name) == value for name, value in self.fields.items())
        others = unsupported(config, NAMED | self.named | {*self.fields, *SCALING})
        return fixed and not others and can_scale(config, self) and self.allows(config)


SCALING = ("rope_scaling", "rope_scaling_values")
FACTORS = "rope_freqs.weight"
"""The tensor (H/2,) by which llama.cpp divides rotary frequencies."""
SCALING_KEY = "llmctl.rope_scaling"
"""Our own key for the numbers that `FACTORS` were computed from."""


def can_scale(config: ModelConfig, row: Architecture) -> bool:
    """Tell whether the scaling of rotary frequencies, if any, can be stated: a factor, or divisors of each frequency."""
    if config.rope_scaling in ("none", "linear"):
        return True
    values = config.rope_scaling_values
    n = (len(values) - 2) // 2
    is_divided = config.rope_scaling == "longrope" and values[1] == 1.0 and values[2 : 2 + n] == values[2 + n :]
    return row.has_factors and (config.rope_scaling == "llama3" or is_divided)


def scaled_by_width(config: ModelConfig) -> bool:
    """Tell whether embeddings and scores have the factors of Gemma, which no key states."""
    return close(config.embedding_scale, config.d_model**0.5) and close(config.attention_scale, config.head_dim**-0.5)


def in_pattern(config: ModelConfig, period: int) -> bool:
    """Tell whether all layers but every `period`-th have the same window."""
    sizes = [window_of(config, layer) for layer in range(config.n_layers)]
    expected = [0 if (layer + 1) % period == 0 else max(sizes) for layer in range(config.n_layers)]
    return sizes == expected and max(sizes) > 0


LOCAL_THETA = 10000.0
"""The base of layers with a window of llama.cpp's `gemma3`."""


def is_gemma3(config: ModelConfig) -> bool:
    """Tell whether windows and bases are those of `gemma3`."""
    layers = range(config.n_layers)
    thetas = all(
        theta_of(config, layer) == (LOCAL_THETA if window_of(config, layer) else config.rope_theta) for layer in layers
    )
    return in_pattern(config, 6) and thetas and scaled_by_width(config) and config.n_layers not in LARGE


LARGE = (46, 62)
"""Layers by which llama.cpp recognizes models of 27 billion parameters, whose scores it scales otherwise."""


def window_values(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata of windows."""
    return {"attention.sliding_window": max(config.attention_windows)}


def gemma2_values(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata of windows and soft caps."""
    caps = {
        "attn_logit_softcapping": float(config.attention_softcap),
        "final_logit_softcapping": float(config.logits_softcap),
    }
    return window_values(config) | caps


def gemma_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Gemma 2 and 3."""
    caps = {key: shortest(data.get(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    scalar = {"query_pre_attn_scalar": data.get("attention.key_length")}
    return {"sliding_window": data.get("attention.sliding_window"), **caps, **scalar}


GEMMA_FIELDS = {"activation": "gelu_tanh", "tie_embeddings": True}
GEMMA_NAMED = frozenset({"embedding_scale", "attention_scale", "attention_windows"})
ROWS = (
    Architecture("llama", LLAMA, LAYER_NAMES, has_paired_rows=True, has_factors=True),
    Architecture("qwen3", QWEN3, LAYER_NAMES | QK_NORM_NAMES, {"qk_norm": True}),
    Architecture(
        "qwen2",
        QWEN2,
        LAYER_NAMES | BIAS_NAMES,
        {"attention_bias": True, "attention_output_bias": "no"},
        allows=lambda config: config.n_heads * config.head_dim == config.d_model,
    ),
    Architecture("gemma", GEMMA, LAYER_NAMES, GEMMA_FIELDS, frozenset({"embedding_scale"}), scaled_by_width),
    Architecture(
        "gemma2",
        GEMMA2,
        LAYER_NAMES | SANDWICH_NAMES,
        GEMMA_FIELDS | {"norm_position": "both"},
        GEMMA_NAMED | {"attention_softcap", "logits_softcap"},
        lambda config: (
            in_pattern(config, 2)
            and scaled_by_width(config)
            and config.attention_softcap > 0
            and config.logits_softcap > 0
            and config.n_layers not in LARGE
        ),
        gemma2_values,
        gemma_settings,
    ),
    Architecture(
        "gemma3",
        GEMMA3,
        LAYER_NAMES | SANDWICH_NAMES | QK_NORM_NAMES,
        GEMMA_FIELDS | {"norm_position": "both", "qk_norm": True},
        GEMMA_NAMED | {"rope_thetas"},
        is_gemma3,
        window_values,
        gemma_settings,
    ),
)
ARCHITECTURES = {row.name: row for row in ROWS}


def architecture_for(config: ModelConfig) -> Architecture:
    """Return the architecture of a config that is one of llama.cpp's; `llama` for any other."""
    return next((row for row in ROWS if row.holds(config)), ROWS[0])


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
    if name not in ARCHITECTURES:
        raise ArtifactError(
            f"`{header.path}` is of the architecture `{str(name)[:60]}`, which llmctl does not read as GGUF",
            f"what is read: {', '.join(ARCHITECTURES)}; other families come in as Hugging Face folders",
        )
    architecture = ARCHITECTURES[name]
    refuse_extras(header, name)
    config = architecture.family.read_config(
        hf_values(header, name) | dict(architecture.settings(own_values(header, name)))
    )
    try:
        config = complete(config)
    except UsageError as error:
        raise ArtifactError(f"`{header.path}`: {error}", DAMAGED) from error
    if FACTORS in header.tensors:
        config = with_factors(header, config)
    # The names of the tensors follow from the config, which must not be another architecture's.
    if architecture_for(config) is not architecture:
        raise ArtifactError(f"`{header.path}` has settings that no {name} model of llama.cpp has", UNSUPPORTED)
    check_gguf_tensors(header, config)
    return config


def own_values(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """Return the metadata without the architecture's prefix."""
    return {key.removeprefix(f"{architecture}."): value for key, value in header.metadata.items()}


def rope_factors(config: ModelConfig) -> "NDArray[np.float32]":
    """Return what divides the rotary frequencies, float32 (H/2,)."""
    import torch

    from llmctl.model.positions import SCALINGS

    width = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2).float() / width)
    scaled, _ = SCALINGS[config.rope_scaling](frequencies, config.rope_theta, 1, *config.rope_scaling_values)
    return (frequencies / scaled).numpy()


def with_factors(header: GgufHeader, config: ModelConfig) -> ModelConfig:
    """Return the config with the scaling of rotary frequencies that a tensor states.

    As the numbers of Llama 3.1 and 3.2, or those that we wrote beside them, if these give the tensor; else as divisors.
    Raises: ArtifactError for a tensor of another size.
    """
    import numpy as np

    stored = dequantize(map_file(header.path), header.tensors[FACTORS]).reshape(-1)
    if len(stored) != config.head_dim // 2 or not np.isfinite(stored).all() or (stored <= 0).any():
        raise ArtifactError(f"`{FACTORS}` of `{header.path}` is not {config.head_dim // 2} positive numbers", DAMAGED)
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


def refuse_extras(header: GgufHeader, architecture: str) -> None:
    """Refuse what changes the maths of the architecture.

    Raises: ArtifactError naming the key.
    """
    plain_values: dict[str, tuple[Any, ...]] = {
        "rope.scaling.type": ("none", "linear", None),
        "rope.scale_linear": (1.0, None),
        "expert_count": (0, None),
    }
    if "attention_windows" not in ARCHITECTURES[architecture].named:
        plain_values["attention.sliding_window"] = (0, None)
    for key, allowed in plain_values.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if value not in allowed:
            raise ArtifactError(
                f"`{header.path}` has `{architecture}.{key}` {str(value)[:60]!r}, which llmctl does not read",
                UNSUPPORTED,
            )
    if FACTORS in header.tensors and not ARCHITECTURES[architecture].has_factors:
        raise ArtifactError(
            f"`{header.path}` scales its rotary frequencies ({FACTORS}), which llmctl does not read",
            UNSUPPORTED,
        )


def hf_values(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """Return the metadata under the names that the family's config.json has."""
    data = own_values(header, architecture)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ArtifactError(f"`{header.path}` has no tensor `token_embd.weight`", DAMAGED)
    values = {
        "vocab_size": embedding.shape[0],
        "hidden_size": data.get("embedding_length"),
        "num_hidden_layers": data.get("block_count"),
        "num_attention_heads": data.get("attention.head_count"),
        "num_key_value_heads": data.get("attention.head_count_kv"),
        "head_dim": data.get("attention.key_length", data.get("rope.dimension_count")),
        "intermediate_size": data.get("feed_forward_length"),
        "max_position_embeddings": data.get("context_length"),
        "rms_norm_eps": shortest(data.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(data.get("rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": data.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": data.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": data.get("tokenizer.ggml.padding_token_id"),
    }
    if data.get("rope.scaling.type") == "linear":
        values["rope_scaling"] = {"rope_type": "linear", "factor": shortest(data.get("rope.scaling.factor"))}
    rotated = data.get("rope.dimension_count", values["head_dim"])
    if rotated != values["head_dim"]:
        raise ArtifactError(
            f"`{header.path}` rotates {rotated} of {values['head_dim']} channels, which llmctl does not read",
            UNSUPPORTED,
        )
    return values


def shortest(value: Any) -> Any:
    """Return the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Return llama.cpp's name -> ours of every tensor of the model."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    in_layer = architecture_for(config).layer_names
    for layer in range(config.n_layers):
        names |= {f"blk.{layer}.{key}": f"model.layers.{layer}.{value}" for key, value in in_layer.items()}
    return names


def check_gguf_tensors(header: GgufHeader, config: ModelConfig) -> None:
    """Check names and shapes before anything is read.

    Raises: ArtifactError naming the first that is missing, left over, or of another shape.
    """
    if config.n_layers > len(header.tensors):
        raise ArtifactError(
            f"`{header.path}` claims {config.n_layers} layers and has {len(header.tensors)} tensors", DAMAGED
        )
    names, shapes = tensor_names(config), parameter_shapes(config)
    for name in names:
        if name not in header.tensors:
            raise ArtifactError(f"`{header.path}` has no tensor `{name}`", "fetch the file again")
        shape = header.tensors[name].shape
        if shape != shapes[names[name]]:
            wanted = shapes[names[name]]
            raise ArtifactError(
                f"tensor `{name}` of `{header.path}` has the shape {shape}, its metadata says {wanted}", DAMAGED
            )
    extra = [name for name in header.tensors if name not in names and name != FACTORS]
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

    data = map_file(header.path)
    state: dict[str, Tensor] = {}
    for there, name in tensor_names(config).items():
        array = dequantize(data, header.tensors[there])
        n_heads = n_paired_heads(config, name)
        state[name] = torch.from_numpy(half_split(array, n_heads) if n_heads else array)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def n_paired_heads(config: ModelConfig, name: str) -> int:
    """Return how many heads' rows of this parameter are stored as rotary pairs side by side; 0 for other parameters."""
    if not architecture_for(config).has_paired_rows:
        return 0
    heads = {"q_proj.weight": config.n_heads, "k_proj.weight": config.n_kv_heads}
    return next((n for ending, n in heads.items() if name.endswith(ending)), 0)


def half_split(array: "NDArray[np.float32]", n_heads: int) -> "NDArray[np.float32]":
    """Reorder rows (N*H, D) from interleaved rotary pairs to halves of a head."""
    import numpy as np

    rows = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
