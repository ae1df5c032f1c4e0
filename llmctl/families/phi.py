"""Phi-1 to Phi-4-mini: parallel blocks with partly rotated heads, then Llama's block with fused projections.

Sources: Phi-1.5, arXiv:2309.05463; Phi-3, arXiv:2404.14219; Phi-4-mini, arXiv:2503.01743.
"""

from llmctl.families.family import FamilyFormat
from llmctl.families.llama import LAYER, SHARED
from llmctl.families.parameters import Stored, module, modules
from llmctl.families.rope import rope
from llmctl.families.rows import SQUARE, activation, fixed, number, only, replaced, window

PHI = FamilyFormat(
    architecture="PhiForCausalLM",
    model_type="phi",
    source="Li et al. 2023, arXiv:2309.05463",
    rows=(
        fixed(norm="layernorm", parallel="shared", gated=False, attention_bias=True, mlp_bias=True, logits_bias=True),
        *replaced(
            SHARED,
            activation("hidden_act", "gelu_new"),
            rope(partial=True, share=0.5),
            rms_norm_eps=number("layer_norm_eps", "norm_eps", 1e-5),
            attention_bias=None,
            dropout=number("resid_pdrop", "dropout", 0.0),
        ),
        only("qk_layernorm", False),
        SQUARE,
    ),
    tensors=(
        *modules(
            {"self_attn.dense": "self_attn.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}, LAYER, LAYER
        ),
        *module("model.final_layernorm", "model.norm"),
    ),
    own_names=True,
    prefix="model.",
)

PHI3 = FamilyFormat(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    source="Abdin et al. 2024, arXiv:2404.14219",
    rows=(
        *replaced(
            SHARED,
            number("rms_norm_eps", "norm_eps", 1e-5),
            rope(partial=True),
            attention_bias=None,
            dropout=number("resid_pdrop", "dropout", 0.0),
        ),
        window(),
        SQUARE,
    ),
    tensors=(
        Stored(LAYER + "self_attn.qkv_proj.weight", tuple(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv")),
        Stored(LAYER + "mlp.gate_up_proj.weight", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")),
    ),
    own_names=True,
    prefix="model.",
)
