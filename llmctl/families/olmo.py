"""OLMo 1 to 3: norms without parameters, then RMSNorm of what each part adds, with normalized queries and keys.

Sources: OLMo, arXiv:2402.00838; OLMo 2, arXiv:2501.00656; OLMo 3, 2025 (windows).
"""

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat
from llmctl.families.llama import LAYER, ROUTER, SHARED, experts
from llmctl.families.parameters import Stored
from llmctl.families.published import Published
from llmctl.families.rope import rope_by_kind
from llmctl.families.rows import FULL, SQUARE, WINDOWED, Row, fixed, flag, integer, number, only, replaced, windows

OLMO = FamilyFormat(
    architecture="OlmoForCausalLM",
    model_type="olmo",
    source="Groeneveld et al. 2024, arXiv:2402.00838",
    rows=(
        fixed(norm="layernorm", norm_weight=False, norm_bias=False, norm_eps=1e-5),
        *replaced(SHARED, rms_norm_eps=None),
        only("clip_qkv"),
        SQUARE,
    ),
    own_names=True,
    prefix="model.",
)

# The published names count the norms of a layer in another order.
OUTPUT_NORMS = (
    Stored(LAYER + "post_attention_layernorm.weight", (LAYER + "input_layernorm.weight",)),
    Stored(LAYER + "post_feedforward_layernorm.weight", (LAYER + "post_attention_layernorm.weight",)),
)
SIZES = replaced(SHARED, number("rms_norm_eps", "norm_eps", 1e-5))

OLMO2 = FamilyFormat(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    source="OLMo 2, arXiv:2501.00656",
    rows=(fixed(norm_position="output", qk_norm=True, qk_norm_kind="width"), *SIZES, SQUARE),
    tensors=OUTPUT_NORMS,
    own_names=True,
    prefix="model.",
)

OLMO3 = FamilyFormat(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    source="OLMo 3, 2025",
    rows=(
        fixed(norm_position="output", qk_norm=True, qk_norm_kind="width"),
        *replaced(SIZES, rope_theta=None),
        windows(lambda _, config: [FULL if (layer + 1) % 4 == 0 else WINDOWED for layer in range(config.n_layers)]),
        rope_by_kind(default=500000.0, local_default=None),
        SQUARE,
    ),
    tensors=OUTPUT_NORMS,
    own_names=True,
    prefix="model.",
)


OLMOE = FamilyFormat(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    source="OLMoE, arXiv:2409.02060",
    rows=(
        fixed(qk_norm=True, qk_norm_kind="width"),
        *replaced(SIZES, integer("intermediate_size", "d_ff", 2048)),
        *experts("num_experts", 64, 8),
        flag("norm_topk_prob", "normalized_experts"),
        only("clip_qkv"),
        SQUARE,
    ),
    tensors=(ROUTER,),
    own_names=True,
    prefix="model.",
)


def unrotated() -> Row:
    """Return the row of EXAONE 4: layers without a window are not rotated, if there are layers with one."""
    return Row(
        read=lambda _, config: {
            "rope_thetas": tuple(config.rope_theta if size else 0.0 for size in config.attention_windows)
            if any(config.attention_windows)
            else ()
        }
    )


def three_of_four(published: Published, config: ModelConfig) -> list[str]:
    """Return EXAONE 4's kinds of layers, whose period may be written as `LLLG`; without a window all are full."""
    if published.values.get("sliding_window") is None:
        return [FULL] * config.n_layers
    pattern = published.values.get("sliding_window_pattern")
    period = len(pattern) if isinstance(pattern, str) and pattern else published.integer("sliding_window_pattern", 4)
    return [FULL if (layer + 1) % period == 0 else WINDOWED for layer in range(config.n_layers)]


EXAONE4 = FamilyFormat(
    architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    source="EXAONE 4.0, arXiv:2507.11407",
    rows=(
        fixed(norm_position="output", qk_norm=True),
        *replaced(SIZES, attention_bias=None),
        windows(three_of_four),
        unrotated(),
        SQUARE,
    ),
    tensors=OUTPUT_NORMS,
    own_names=True,
    prefix="model.",
)
