"""llama.cpp's architectures as data: their tensors, what they fix, and both directions of their metadata.

To add one: a row of `ROWS`. Sources: llama.cpp's converter and its graphs, and the table of tensor names of the package
`gguf`.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmctl.config import ModelConfig
from llmctl.families.published import Published
from llmctl.model.shapes import theta_of, window_of
from llmctl.model.supports import CLASSIFIER, SIZES, TOKEN_IDS, TRAINING, close, describe, unsupported

Names = Mapping[str, str | tuple[str, ...]]
"""llama.cpp's name of a module -> ours, or those that it stores below each other; weight and bias where there is one."""

ATTENTION: Names = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
LAYER: Names = {**ATTENTION, "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
QK_NORMS: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Gemma 2 and 3: norms of what each part adds, too.
SANDWICH: Names = {"post_attention_norm": "attention_output_layernorm", "post_ffw_norm": "mlp_output_layernorm"}
# OLMo 2: norms of what each part adds only.
OUTPUT_NORMS: Names = {"post_attention_norm": "input_layernorm", "post_ffw_norm": "post_attention_layernorm"}
FUSED: Names = {
    "attn_qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "ffn_up": ("mlp.gate_proj", "mlp.up_proj"),
}

ENCODER: Names = {
    "attn_output": "self_attn.o_proj",
    "attn_output_norm": "input_layernorm",
    "ffn_down": "mlp.down_proj",
    "layer_output_norm": "post_attention_layernorm",
}
TOP: Names = {
    "token_embd": "model.embed_tokens",
    "token_types": "model.embed_token_types",
    "position_embd": "model.embed_positions",
    "token_embd_norm": "model.embedding_norm",
    "output_norm": "model.norm",
}
"""The modules outside of layers, as far as a model has them; an untied head is `output`."""
ADDED = ("token_types.weight", "position_embd.weight")
"""Tables that llama.cpp adds to the embeddings, which are in float32."""

NAMED = SIZES | TOKEN_IDS | TRAINING | CLASSIFIER - {"n_labels"} | {"tie_embeddings", "norm_eps", "rope_theta"}
"""Fields that every row expresses, whatever their value."""
SCALING = ("rope_scaling", "rope_scaling_values")

FACTORS = "rope_freqs.weight"
"""The tensor (R/2,) by which llama.cpp divides rotary frequencies."""
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
"""The same for rows of at most the original context, and for longer ones."""
SCALING_KEY = "llmctl.rope_scaling"
"""Our own key for the numbers that `FACTORS` were computed from."""


class Architecture(NamedTuple):
    """One of llama.cpp's architectures.

    layer: the modules of a layer; fields: what it fixes, beside our defaults; named: fields that its metadata state;
    scalings: kinds of scaled rotary frequencies; limits: config -> what of it cannot be expressed, beside these; metadata:
    config -> more keys and values; settings: metadata, names of the tensors -> more fields. has_paired_rows: rotary pairs are neighbors.
    drops_window: llama.cpp attends to the whole context, whatever the file says.
    """

    name: str
    layer: Names
    fields: Mapping[str, Any] = {}
    named: frozenset[str] = frozenset()
    scalings: tuple[str, ...] = ("none", "linear", "yarn")
    limits: Callable[[ModelConfig], list[str]] = lambda _: []
    metadata: Callable[[ModelConfig], Mapping[str, Any]] = lambda _: {}
    settings: Callable[[Published, Mapping[str, Any]], Mapping[str, Any]] = lambda *_: {}
    has_paired_rows: bool = False
    drops_window: bool = False

    def holds(self, config: ModelConfig) -> bool:
        """Tell whether a complete config is one of this architecture."""
        return self.fits(config) and not self.missing(config)

    def fits(self, config: ModelConfig) -> bool:
        """Tell whether a config has what the architecture fixes."""
        return all(getattr(config, name) == value for name, value in self.fields.items())

    def missing(self, config: ModelConfig) -> list[str]:
        """Return what of a complete config cannot be expressed, beside what is fixed."""
        windows = {"attention_windows"} if self.drops_window and len(set(config.attention_windows)) == 1 else set()
        others = unsupported(config, NAMED | self.named | windows | {*self.fields, *SCALING})
        scaling = [] if can_scale(config, self) else [describe(config, SCALING)]
        return [describe(config, [name]) for name in others] + scaling + self.limits(config)


def can_scale(config: ModelConfig, row: Architecture) -> bool:
    """Tell whether the scaling of rotary frequencies, if any, can be stated: numbers, or divisors of each frequency."""
    kind, values = config.rope_scaling, config.rope_scaling_values
    if kind == "longrope" and "longrope" not in row.scalings:
        n = (len(values) - 2) // 2
        return FACTORS in row.scalings and values[1] == 1.0 and values[2 : 2 + n] == values[2 + n :]
    if kind == "yarn" and not is_usual_yarn(values):
        return False
    return kind in row.scalings


def is_usual_yarn(values: tuple[float, ...]) -> bool:
    """Tell whether YaRN has the factor on cosines and sines that llama.cpp computes, and whole channels."""
    return close(values[4], grown(values[0])) and (len(values) == 5 or values[5] == 1.0)


def grown(factor: float) -> float:
    """Return YaRN's factor on cosines and sines."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaling_values(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata of scaled rotary frequencies."""
    values = [float(value) for value in config.rope_scaling_values]
    if config.rope_scaling == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": values[0]}
    if config.rope_scaling == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": values[0],
            "rope.scaling.yarn_beta_fast": values[1],
            "rope.scaling.yarn_beta_slow": values[2],
            "rope.scaling.original_context_length": int(values[3]),
        }
    if config.rope_scaling == "longrope":
        return {"rope.scaling.original_context_length": int(values[0]), "rope.scaling.attn_factor": values[1]}
    return {SCALING_KEY: json.dumps(values)} if config.rope_scaling == "llama3" else {}


def read_scaling(data: Published, max_positions: int) -> dict[str, Any]:
    """Return the fields of scaled rotary frequencies that no tensor states."""
    kind = data.values.get("rope.scaling.type")
    if kind not in ("linear", "yarn"):
        return {}
    factor = shortest(data.number("rope.scaling.factor", 1.0))
    if factor <= 0:
        raise data.refuse("rope.scaling.factor", factor, "a positive number")
    if kind == "linear":
        return {"rope_scaling": "linear", "rope_scaling_values": (factor,)}
    fast, slow = (
        shortest(data.number(f"rope.scaling.yarn_beta_{name}", n)) for name, n in (("fast", 32.0), ("slow", 1.0))
    )
    length = float(data.integer("rope.scaling.original_context_length", max_positions))
    return {"rope_scaling": "yarn", "rope_scaling_values": (factor, fast, slow, length, grown(factor), 1.0)}


def shortest(value: Any) -> Any:
    """Return the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def standard_heads(config: ModelConfig) -> list[str]:
    """Return what is not expressed if all heads together are not as wide as the model."""
    width = config.n_heads * config.head_dim
    return (
        []
        if width == config.d_model
        else [f"attention heads of a total width of {width} in a model of {config.d_model}"]
    )


def scaled_by_width(config: ModelConfig) -> list[str]:
    """Return which factors are not those of Gemma, which no key states."""
    found = []
    if not close(config.embedding_scale, config.d_model**0.5):
        found.append(f"embeddings scaled by {config.embedding_scale:.6g} instead of sqrt(d_model)")
    if not close(config.attention_scale, config.head_dim**-0.5):
        found.append(f"attention scores scaled by {config.attention_scale:.6g} instead of head_dim^-0.5")
    return found


def width_scale(data: Published) -> dict[str, Any]:
    """Return Gemma's factor on the embeddings."""
    return {"embedding_scale": data.integer("embedding_length") ** 0.5}


def in_pattern(config: ModelConfig, period: int) -> list[str]:
    """Return what is not expressed unless all layers but every `period`-th have the same window."""
    sizes = [window_of(config, layer) for layer in range(config.n_layers)]
    expected = [0 if (layer + 1) % period == 0 else max(sizes) for layer in range(config.n_layers)]
    if sizes == expected and max(sizes) > 0:
        return []
    if max(sizes) == 0:
        return ["full attention without sliding windows"]
    return [f"sliding windows other than one size in all layers but every {ORDINALS[period]}"]


ORDINALS = {2: "second", 6: "sixth"}

LOCAL_THETA = 10000.0
"""The base of layers with a window of llama.cpp's `gemma3`."""
LARGE = (46, 62)
"""Layers by which llama.cpp recognizes models of 27 billion parameters, whose scores it scales otherwise."""


def gemma2_limits(config: ModelConfig) -> list[str]:
    """Return which windows, factors and caps are not those of `gemma2`."""
    caps = {"attention scores": config.attention_softcap, "logits": config.logits_softcap}
    uncapped = [f"{what} without a soft cap" for what, cap in caps.items() if not cap > 0]
    return [*in_pattern(config, 2), *scaled_by_width(config), *uncapped, *too_large(config)]


def gemma3_limits(config: ModelConfig) -> list[str]:
    """Return which windows, factors and rotary bases are not those of `gemma3`."""
    layers = range(config.n_layers)
    thetas = all(
        theta_of(config, layer) == (LOCAL_THETA if window_of(config, layer) else config.rope_theta) for layer in layers
    )
    bases = [] if thetas else [f"a RoPE base other than {LOCAL_THETA:g} in layers with a sliding window"]
    return [*in_pattern(config, 6), *bases, *scaled_by_width(config), *too_large(config)]


def too_large(config: ModelConfig) -> list[str]:
    """Return what is not expressed in models that llama.cpp takes for those of 27 billion parameters."""
    return (
        [f"{config.n_layers} layers, by which llama.cpp picks another attention scale"]
        if config.n_layers in LARGE
        else []
    )


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


def gemma2_settings(data: Published, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Gemma 2."""
    return width_scale(data) | {
        "attention_windows": (data.integer("attention.sliding_window"), 0),
        "attention_softcap": float(shortest(data.number("attn_logit_softcapping", 50.0))),
        "logits_softcap": float(shortest(data.number("final_logit_softcapping", 30.0))),
    }


def gemma3_settings(data: Published, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Gemma 3."""
    theta = float(shortest(data.number("rope.freq_base", 1000000.0)))
    size = data.integer("attention.sliding_window")
    return width_scale(data) | {
        "attention_windows": (size,) * 5 + (0,),
        "rope_thetas": (LOCAL_THETA,) * 5 + (theta,),
    }


GRANITE_SCALES = {
    "attention.scale": "attention_scale",
    "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale",
}


def granite_values(config: ModelConfig) -> dict[str, Any]:
    """Return Granite's factors; llama.cpp divides the logits by theirs."""
    values = {key: float(getattr(config, field)) for key, field in GRANITE_SCALES.items()}
    return values | {"logit_scale": 1.0 / config.logits_scale}


def granite_settings(data: Published, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return Granite's factors."""
    values = {field: float(shortest(data.number(key, 1.0))) for key, field in GRANITE_SCALES.items()}
    divisor = float(shortest(data.number("logit_scale", 1.0)))
    for key, value in {"attention.scale": values["attention_scale"], "logit_scale": divisor}.items():
        if value <= 0:
            raise data.refuse(key, value, "a positive number")
    return values | {"logits_scale": 1.0 / divisor}


def query_biases(_: Published, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether queries, keys and values have biases, which only the tensors tell."""
    has_bias = "blk.0.attn_q.bias" in tensors
    return {"attention_bias": has_bias, "attention_output_bias": "no" if has_bias else "same"}


POOLINGS = {"mean": 1, "first": 2, "last": 3}
"""Our names of llama.cpp's `pooling_type`."""


def token_types(data: Published, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many token types there are, which the tensor tells; llama.cpp insists on the same number in the metadata."""
    n_types = tensors["token_types.weight"].shape[0] if "token_types.weight" in tensors else 0
    key = "tokenizer.ggml.token_type_count"
    if n_types and data.integer(key, n_types) != n_types:
        raise data.refuse(key, data.values[key], f"{n_types}, the rows of `token_types.weight`")
    return {"n_token_types": n_types}


def encoder_limits(config: ModelConfig) -> list[str]:
    """Return what of an encoder llama.cpp cannot run: it always adds a token type."""
    return [*([] if config.n_token_types > 0 else ["an encoder without token types"]), *standard_heads(config)]


def stablelm_limits(config: ModelConfig) -> list[str]:
    """Return what of a model `stablelm` does not express."""
    has_bias = config.attention_output_bias != "no"
    return [*standard_heads(config), *(["a bias of the attention output"] if has_bias else [])]


BIASES = frozenset({"attention_bias", "attention_output_bias"})
LAYERNORM = {"norm": "layernorm"}
OWN_HEAD = {"tie_embeddings": False}  # llama.cpp's loader insists on it
BERT_FIELDS = LAYERNORM | {
    "family": "encoder",
    "norm_position": "post",
    "embedding_norm": True,
    "tie_embeddings": True,
}
GEMMA_FIELDS = {"activation": "gelu_tanh", "tie_embeddings": True}
GEMMA_NAMED = frozenset({"embedding_scale", "attention_scale", "attention_windows"})
ROWS = (
    Architecture(
        "llama",
        LAYER,
        scalings=("none", "linear", "yarn", "llama3", FACTORS),
        has_paired_rows=True,
        drops_window=True,
    ),
    Architecture("qwen3", {**LAYER, **QK_NORMS}, {"qk_norm": True}),
    Architecture("qwen2", LAYER, {"attention_bias": True, "attention_output_bias": "no"}, limits=standard_heads),
    Architecture(
        "phi3",
        {
            name: own
            for name, own in {**LAYER, **FUSED}.items()
            if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")
        },
        named=frozenset({"rotary_dim"}),
        scalings=("none", "longrope"),
        limits=standard_heads,
        drops_window=True,
    ),
    Architecture(
        "granite",
        LAYER,
        named=frozenset({"attention_scale", "embedding_scale", "residual_scale", "logits_scale"}),
        metadata=granite_values,
        settings=granite_settings,
        has_paired_rows=True,
    ),
    Architecture(
        "olmo2",
        {
            **{name: own for name, own in LAYER.items() if name not in ("attn_norm", "ffn_norm")},
            **OUTPUT_NORMS,
            **QK_NORMS,
        },
        OWN_HEAD | {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width"},
    ),
    Architecture(
        "stablelm",
        LAYER,
        LAYERNORM | OWN_HEAD,
        BIASES | {"rotary_dim"},
        limits=stablelm_limits,
        metadata=lambda _: {"use_parallel_residual": False},
        settings=lambda data, tensors: {"attention_output_bias": "no"} | query_biases(data, tensors),
    ),
    Architecture(
        "starcoder2",
        {name: own for name, own in LAYER.items() if name != "ffn_gate"},
        LAYERNORM | {"gated": False, "activation": "gelu_tanh", "attention_bias": True, "mlp_bias": True},
        limits=standard_heads,
        drops_window=True,
    ),
    Architecture(
        "gemma",
        LAYER,
        GEMMA_FIELDS,
        frozenset({"embedding_scale"}),
        limits=scaled_by_width,
        settings=lambda data, _: width_scale(data),
    ),
    Architecture(
        "gemma2",
        {**LAYER, **SANDWICH},
        GEMMA_FIELDS | {"norm_position": "both"},
        GEMMA_NAMED | {"attention_softcap", "logits_softcap"},
        limits=gemma2_limits,
        metadata=gemma2_values,
        settings=gemma2_settings,
    ),
    Architecture(
        "gemma3",
        {**LAYER, **SANDWICH, **QK_NORMS},
        GEMMA_FIELDS | {"norm_position": "both", "qk_norm": True},
        GEMMA_NAMED | {"rope_thetas"},
        limits=gemma3_limits,
        metadata=window_values,
        settings=gemma3_settings,
    ),
    Architecture(
        "bert",
        {**ENCODER, **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}, "ffn_up": "mlp.up_proj"},
        BERT_FIELDS
        | {"positions": "learned", "activation": "gelu", "gated": False, "attention_bias": True, "mlp_bias": True},
        frozenset({"n_token_types"}),
        ("none",),
        encoder_limits,
        lambda _: {"attention.causal": False},
        token_types,
    ),
    Architecture(
        "nomic-bert",
        {**ENCODER, "attn_qkv": FUSED["attn_qkv"], "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"},
        BERT_FIELDS,
        frozenset({"n_token_types"}),
        ("none",),
        encoder_limits,
        lambda _: {"attention.causal": False},
        token_types,
    ),
)
ARCHITECTURES = {row.name: row for row in ROWS}


def architecture_for(config: ModelConfig) -> Architecture:
    """Return the architecture of a config that is one of llama.cpp's; `llama` for any other."""
    return next((row for row in ROWS if row.holds(config)), ROWS[0])


def nearest_architecture(config: ModelConfig) -> tuple[str, list[str]]:
    """Return the architecture of which the least of a config cannot be expressed, among those that fix something, and what.

    ("", []) if none has what it fixes.
    """
    found = [(row.missing(config), row) for row in ROWS if row.fields and row.fits(config)]
    least, row = min(found, key=lambda pair: (len(pair[0]), -len(pair[1].fields)), default=([], None))
    return (row.name, least) if row else ("", [])
