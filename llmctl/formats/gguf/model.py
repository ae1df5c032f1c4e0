"""A decoder inside a GGUF file: its configuration, its tensors' names, and its weights, as llama.cpp lays them out.

Knows `llama` and `qwen3`. Where llama.cpp turns neighboring channels together (`llama`), the rows of queries and keys
are stored so that rotary pairs stand side by side; ours stand half a head apart.
Source: llama.cpp's converters and its table of tensor names, the package `gguf`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.families.family import FamilyFormat
from llmctl.families.llama import LLAMA, QWEN3
from llmctl.formats.gguf.container import DAMAGED, UNSUPPORTED, GgufHeader, dequantize, map_file
from llmctl.model.parameters import parameter_shapes

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


class Architecture(NamedTuple):
    """One of llama.cpp's architectures: our family of it, the tensors of a layer, and whether rotary pairs are neighbors."""

    name: str
    family: FamilyFormat
    layer_names: Mapping[str, str]
    has_paired_rows: bool


ROWS = (
    Architecture("llama", LLAMA, LAYER_NAMES, has_paired_rows=True),
    Architecture("qwen3", QWEN3, LAYER_NAMES | QK_NORM_NAMES, has_paired_rows=False),
)
ARCHITECTURES = {row.name: row for row in ROWS}


def architecture_for(config: ModelConfig) -> Architecture:
    """Return the architecture of a config that is one of llama.cpp's: normalized queries and keys make it `qwen3`."""
    return ARCHITECTURES["qwen3" if config.qk_norm else "llama"]


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
    config = architecture.family.read_config(hf_values(header, name))
    check_gguf_tensors(header, config)
    return config


def refuse_extras(header: GgufHeader, architecture: str) -> None:
    """Refuse what changes the maths of the architecture.

    Raises: ArtifactError naming the key.
    """
    plain_values = {
        "rope.scaling.type": ("none", None),
        "rope.scale_linear": (1.0, None),
        "expert_count": (0, None),
        "attention.sliding_window": (0, None),
    }
    for key, allowed in plain_values.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if value not in allowed:
            raise ArtifactError(
                f"`{header.path}` has `{architecture}.{key}` {str(value)[:60]!r}, which llmctl does not read",
                UNSUPPORTED,
            )
    if "rope_freqs.weight" in header.tensors:
        raise ArtifactError(
            f"`{header.path}` scales its rotary frequencies (rope_freqs.weight), which llmctl does not read",
            UNSUPPORTED,
        )


def hf_values(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """Return the metadata under the names that the family's config.json has."""
    data = {key.removeprefix(f"{architecture}."): value for key, value in header.metadata.items()}
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
    extra = [name for name in header.tensors if name not in names]
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
