"""Gemma 1 to 3: norms that multiply by 1 + w, scaled embeddings, and from Gemma 2 on norms before and after each part.

Sources: Gemma 1, arXiv:2403.08295; Gemma 2, arXiv:2408.00118 (soft caps); Gemma 3, arXiv:2503.19786 (normalized queries
and keys, five layers with a window to one without).
"""

from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat
from llmctl.families.llama import LAYER, SHARED, positive
from llmctl.families.parameters import Stored
from llmctl.families.published import Published
from llmctl.families.rope import rope_by_kind
from llmctl.families.rows import (
    FULL,
    WINDOWED,
    Row,
    activation,
    converted,
    derived,
    fixed,
    flag,
    integer,
    replaced,
    windows,
)
from llmctl.model.supports import close


def read_activation(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read the activation; the first files say `gelu` and mean its approximation, which the new key states."""
    named = published.values.get("hidden_activation")
    if named is None:
        return {"activation": "gelu_tanh"}
    return {"activation": published.activation("hidden_activation", "gelu_pytorch_tanh")}


def write_activation(config: ModelConfig) -> dict[str, Any]:
    """Write the activation under both keys."""
    name = activation("hidden_act", "").write(config)["hidden_act"]
    return {"hidden_act": name, "hidden_activation": name}


SIZES = replaced(
    SHARED,
    Row("hidden_act", read_activation, write_activation),
    integer("head_dim", "head_dim", 256),
    flag("tie_word_embeddings", "tie_embeddings", default=True),
)
SCALED = derived("embedding_scale", lambda config: config.d_model**0.5)
SCORES = converted(
    "query_pre_attn_scalar",
    "attention_scale",
    lambda published, _: positive(published, "query_pre_attn_scalar", 256) ** -0.5,
    # Mostly a whole number, of which the root was taken.
    lambda scale: round(scale**-2) if close(round(scale**-2), scale**-2) else scale**-2,
)


def norms(names: dict[str, str]) -> tuple[Stored, ...]:
    """Return the norms of a layer by their published names, and the final one."""
    rows = {f"{LAYER}{name}.weight": f"{LAYER}{own}.weight" for name, own in names.items()}
    rows["model.norm.weight"] = "model.norm.weight"
    return tuple(Stored(name, (own,), "plus_one") for name, own in rows.items())


SANDWICH = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "attention_output_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_layernorm",
}

GEMMA = FamilyFormat(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    source="arXiv:2403.08295",
    rows=(*replaced(SIZES, integer("max_position_embeddings", "max_positions", 8192)), SCALED),
    tensors=norms({name: name for name in ("input_layernorm", "post_attention_layernorm")}),
    own_names=True,
    prefix="model.",
)


def alternating(_: Published, config: ModelConfig) -> list[str]:
    """Return Gemma 2's kinds of layers."""
    return [WINDOWED if layer % 2 == 0 else FULL for layer in range(config.n_layers)]


def every_sixth(published: Published, config: ModelConfig) -> list[str]:
    """Return Gemma 3's kinds of layers."""
    period = published.integer("sliding_window_pattern", 6)
    return [FULL if (layer + 1) % period == 0 else WINDOWED for layer in range(config.n_layers)]


def cap(key: str, field: str, default: float) -> Row:
    """Return the row of a soft cap; null is none."""

    def read(published: Published, _: ModelConfig) -> float:
        if key in published.values and published.values[key] is None:
            return 0.0
        return float(published.number(key, default))

    return converted(key, field, read, lambda value: value or None)


GEMMA2 = FamilyFormat(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    source="arXiv:2408.00118",
    rows=(
        fixed(norm_position="both"),
        *replaced(SIZES, integer("max_position_embeddings", "max_positions", 8192), attention_scale=None),
        windows(alternating),
        SCALED,
        SCORES,
        cap("attn_logit_softcapping", "attention_softcap", 50.0),
        cap("final_logit_softcapping", "logits_softcap", 30.0),
    ),
    tensors=norms(SANDWICH),
    own_names=True,
    prefix="model.",
)

GEMMA3 = FamilyFormat(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    source="arXiv:2503.19786",
    rows=(
        fixed(norm_position="both", qk_norm=True),
        # The windows stand before the bases, which depend on them.
        *replaced(
            SIZES, integer("max_position_embeddings", "max_positions", 131072), rope_theta=None, attention_scale=None
        ),
        windows(every_sixth),
        rope_by_kind("rope_local_base_freq", default=1000000.0),
        SCALED,
        SCORES,
        cap("attn_logit_softcapping", "attention_softcap", 0.0),
        cap("final_logit_softcapping", "logits_softcap", 0.0),
    ),
    tensors=(
        *norms(SANDWICH),
        Stored(LAYER + "self_attn.q_norm.weight", (LAYER + "self_attn.q_norm.weight",), "plus_one"),
        Stored(LAYER + "self_attn.k_norm.weight", (LAYER + "self_attn.k_norm.weight",), "plus_one"),
    ),
    own_names=True,
    prefix="model.",
)
