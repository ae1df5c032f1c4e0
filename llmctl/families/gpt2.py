"""GPT-2: a pre-norm decoder with learned positions; its weights are stored transposed, and q, k and v as one.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from llmctl.families.family import FamilyFormat
from llmctl.families.parameters import Stored, module
from llmctl.families.rows import (
    STANDARD_HEADS,
    TOKENS,
    activation,
    fixed,
    flag,
    integer,
    number,
    only,
    repeated,
    written,
)

SIZES = (
    integer("vocab_size", "vocab_size"),
    integer("n_embd", "d_model", 768),
    integer("n_layer", "n_layers", 12),
    integer("n_head", "n_heads", 12),
    integer("n_inner", "d_ff", lambda config: 4 * config.d_model),
    integer("n_positions", "max_positions", 1024),
    repeated("n_ctx", "max_positions"),
    activation("activation_function", "gelu_new"),
    number("layer_norm_epsilon", "norm_eps", 1e-5),
    number("resid_pdrop", "dropout", 0.1),
    repeated("embd_pdrop", "dropout"),
    written("attn_pdrop", 0.0),
    number("initializer_range", "init_std", 0.02),
)
ROWS = (
    fixed(norm="layernorm", positions="learned", gated=False, attention_bias=True, mlp_bias=True),
    # Both change the scale of the scores, the second by layer.
    only("scale_attn_weights", True),
    only("scale_attn_by_inverse_layer_idx", False),
    only("add_cross_attention", False),
    *SIZES,
    flag("tie_word_embeddings", "tie_embeddings", default=True),
    *TOKENS,
    *STANDARD_HEADS,
)

LAYER, OWN = "transformer.h.{}.", "model.layers.{}."
TENSORS = (
    Stored("transformer.wte.weight", ("model.embed_tokens.weight",)),
    Stored("transformer.wpe.weight", ("model.embed_positions.weight",)),
    *module("transformer.ln_f", "model.norm"),
    *module(LAYER + "ln_1", OWN + "input_layernorm"),
    *module(LAYER + "ln_2", OWN + "post_attention_layernorm"),
    *module(LAYER + "attn.c_attn", *(f"{OWN}self_attn.{name}_proj" for name in "qkv"), form="transposed"),
    *module(LAYER + "attn.c_proj", OWN + "self_attn.o_proj", form="transposed"),
    *module(LAYER + "mlp.c_fc", OWN + "mlp.up_proj", form="transposed"),
    *module(LAYER + "mlp.c_proj", OWN + "mlp.down_proj", form="transposed"),
    Stored("lm_head.weight", ("lm_head.weight",)),
)

GPT2 = FamilyFormat(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    rows=ROWS,
    tensors=TENSORS,
    # The causal mask was once stored as a buffer: attn.bias next to attn.c_attn.bias.
    ignored=(".attn.bias", ".attn.masked_bias"),
    prefix="transformer.",
)
