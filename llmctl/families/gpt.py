"""Decoders between GPT-2 and Llama: GPT-Neo, GPT-J, GPT-NeoX, OPT, BLOOM, MPT, Falcon, GPT-BigCode."""

from dataclasses import replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.family import FamilyFormat
from llmctl.families.gpt2 import SIZES as GPT2_SIZES
from llmctl.families.parameters import Stored, Tensors, module, modules
from llmctl.families.published import Published
from llmctl.families.rope import read_rope, write_parameters
from llmctl.families.rows import (
    SQUARE,
    STANDARD_HEADS,
    TOKENS,
    Row,
    activation,
    constant,
    derived,
    equal,
    fixed,
    flag,
    integer,
    number,
    only,
    repeated,
    replaced,
    requires,
    written,
)

OWN = "model.layers.{}."
QKV = tuple(f"{OWN}self_attn.{name}_proj" for name in "qkv")
BIASED = fixed(norm="layernorm", gated=False, attention_bias=True, mlp_bias=True)
HEADS_AND_TOKENS = (*TOKENS, *STANDARD_HEADS)
TIED = flag("tie_word_embeddings", "tie_embeddings", default=True)


def body(layer: str, names: dict[str, str], embedding: str, norm: str, positions: str = "") -> Tensors:
    """Return the tensors of a decoder: embeddings, the modules of its layers, the final norm, and the head."""
    learned = (Stored(positions, ("model.embed_positions.weight",)),) if positions else ()
    return (
        Stored(embedding, ("model.embed_tokens.weight",)),
        *learned,
        *modules(names, layer, OWN),
        *module(norm, "model.norm"),
        *module("lm_head", "lm_head"),
    )


NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}


def read_attention_layers(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read which layers of GPT-Neo have a window: a list of kinds, each group repeated."""
    kinds = published.values.get("attention_layers")
    if kinds is None:
        types = published.values.get("attention_types") or [[["global", "local"], config.n_layers // 2]]
        try:
            # Bounded by the number of layers: a count of a stranger's file may be any.
            kinds = [
                kind for names, count in types for _ in range(min(int(count), config.n_layers + 1)) for kind in names
            ]
        except (TypeError, ValueError) as error:
            raise published.refuse("attention_types", types, "[[kinds, count], ...]") from error
    if not isinstance(kinds, list) or len(kinds) != config.n_layers or not set(map(str, kinds)) <= {"global", "local"}:
        raise published.refuse("attention_types", kinds, f"global or local for each of {config.n_layers} layers")
    size = published.integer("window_size", 256) if "local" in kinds else 0
    return {"attention_windows": tuple(size if kind == "local" else 0 for kind in kinds) if size else ()}


def write_attention_layers(config: ModelConfig) -> dict[str, Any]:
    """Write which layers have a window."""
    windows = config.attention_windows or (0,)
    kinds = ["local" if windows[layer % len(windows)] else "global" for layer in range(config.n_layers)]
    types = [[[kind], 1] for kind in kinds]
    return {"attention_types": types, "attention_layers": kinds, "window_size": max(windows) or 256}


GPT_NEO = FamilyFormat(
    architecture="GPTNeoForCausalLM",
    model_type="gpt_neo",
    source="GPT-Neo, Black et al. 2021",
    rows=(
        fixed(norm="layernorm", gated=False, mlp_bias=True, attention_output_bias="yes", positions="learned"),
        integer("vocab_size", "vocab_size"),
        integer("hidden_size", "d_model", 2048),
        integer("num_layers", "n_layers", 24),
        integer("num_heads", "n_heads", 16),
        integer("intermediate_size", "d_ff", lambda config: 4 * config.d_model),
        integer("max_position_embeddings", "max_positions", 2048),
        activation("activation_function", "gelu_new"),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        number("resid_dropout", "dropout", 0.0),
        repeated("embed_dropout", "dropout"),
        written("attention_dropout", 0.0),
        number("initializer_range", "init_std", 0.02),
        TIED,
        Row("attention_layers", read_attention_layers, write_attention_layers),
        *replaced(HEADS_AND_TOKENS, attention_scale=None),
        fixed(attention_scale=1.0),  # scores are not scaled there
    ),
    tensors=body(
        "transformer.h.{}.",
        {
            **NORMS,
            **{f"attn.attention.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
            "attn.attention.out_proj": "self_attn.o_proj",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
        "transformer.wte.weight",
        "transformer.ln_f",
        "transformer.wpe.weight",
    ),
    prefix="transformer.",
    ignored=(".attn.attention.bias", ".attn.attention.masked_bias"),
)


def read_rotary_dim(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read how many channels of a head GPT-J rotates; null is all."""
    head_dim = config.d_model // config.n_heads
    width = head_dim if published.values.get("rotary_dim", 64) is None else published.integer("rotary_dim", 64)
    return {"rotary_dim": 0 if width == head_dim else width}


GPT_J = FamilyFormat(
    architecture="GPTJForCausalLM",
    model_type="gptj",
    source="GPT-J, Wang and Komatsuzaki 2021",
    rows=(
        fixed(norm="layernorm", gated=False, mlp_bias=True, parallel="shared", logits_bias=True),
        integer("vocab_size", "vocab_size"),
        integer("n_embd", "d_model", 4096),
        integer("n_layer", "n_layers", 28),
        integer("n_head", "n_heads", 16),
        integer("n_inner", "d_ff", lambda config: 4 * config.d_model),
        integer("n_positions", "max_positions", 2048),
        Row("rotary_dim", read_rotary_dim, lambda config: {"rotary_dim": config.rotary_dim or config.head_dim}),
        activation("activation_function", "gelu_new"),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        number("resid_pdrop", "dropout", 0.0),
        repeated("embd_pdrop", "dropout"),
        written("attn_pdrop", 0.0),
        number("initializer_range", "init_std", 0.02),
        flag("tie_word_embeddings", "tie_embeddings"),
        *HEADS_AND_TOKENS,
    ),
    tensors=(
        *module("transformer.h.{}.attn.q_proj", OWN + "self_attn.q_proj", form="pairs"),
        *module("transformer.h.{}.attn.k_proj", OWN + "self_attn.k_proj", form="pairs"),
        *body(
            "transformer.h.{}.",
            {
                "ln_1": "input_layernorm",
                "attn.v_proj": "self_attn.v_proj",
                "attn.out_proj": "self_attn.o_proj",
                "mlp.fc_in": "mlp.up_proj",
                "mlp.fc_out": "mlp.down_proj",
            },
            "transformer.wte.weight",
            "transformer.ln_f",
        ),
    ),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)


def read_neox_rope(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read rotary positions under the names of GPT-NeoX."""
    old: dict[str, Any] = {"rope_theta": published.number("rotary_emb_base", 10000.0)}
    old["partial_rotary_factor"] = published.number("rotary_pct", 0.25)
    settings = Published({**old, **published.rope_parameters().values}, published.architecture)
    return read_rope(settings, with_head_dim(config), partial=True)


def with_head_dim(config: ModelConfig) -> ModelConfig:
    """Return the config with the width of its heads, which follows from the others in this family."""
    return replace(config, head_dim=max(config.d_model // config.n_heads, 1))


def write_neox_rope(config: ModelConfig) -> dict[str, Any]:
    """Write rotary positions, for old readers and new ones."""
    parameters = write_parameters(config, partial=True)
    scaling = {"rope_scaling": parameters} if config.rope_scaling != "none" else {}
    return {
        "rotary_pct": parameters["partial_rotary_factor"],
        "rotary_emb_base": config.rope_theta,
        "rope_parameters": parameters,
        **scaling,
    }


def read_parallel(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read whether attention and feed-forward are side by side."""
    return {"parallel": "separate" if published.flag("use_parallel_residual", default=True) else "none"}


GPT_NEOX = FamilyFormat(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    source="GPT-NeoX-20B, arXiv:2204.06745; Pythia, arXiv:2304.01373",
    rows=(
        BIASED,
        constant("attention_bias", True),
        integer("vocab_size", "vocab_size"),
        integer("hidden_size", "d_model", 6144),
        integer("num_hidden_layers", "n_layers", 44),
        integer("num_attention_heads", "n_heads", 64),
        integer("intermediate_size", "d_ff", 24576),
        integer("max_position_embeddings", "max_positions", 2048),
        Row("rope_theta", read_neox_rope, write_neox_rope),
        Row(
            "use_parallel_residual",
            read_parallel,
            lambda config: {"use_parallel_residual": config.parallel == "separate"},
        ),
        activation("hidden_act", "gelu"),
        number("layer_norm_eps", "norm_eps", 1e-5),
        number("hidden_dropout", "dropout", 0.0),
        written("attention_dropout", 0.0),
        number("initializer_range", "init_std", 0.02),
        flag("tie_word_embeddings", "tie_embeddings"),
        *HEADS_AND_TOKENS,
    ),
    tensors=(
        Stored("gpt_neox.embed_in.weight", ("model.embed_tokens.weight",)),
        *module("gpt_neox.layers.{}.attention.query_key_value", *QKV, form="groups", bias_form="groups"),
        *modules(
            {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_attention_layernorm",
                "attention.dense": "self_attn.o_proj",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
            "gpt_neox.layers.{}.",
            OWN,
        ),
        *module("gpt_neox.final_layer_norm", "model.norm"),
        Stored("embed_out.weight", ("lm_head.weight",)),
    ),
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)

OPT = FamilyFormat(
    architecture="OPTForCausalLM",
    model_type="opt",
    source="OPT, Zhang et al. 2022, arXiv:2205.01068",
    rows=(
        BIASED,
        fixed(positions="learned", position_offset=2),
        # The 350M model is post-norm with narrower embeddings, and has no final norm.
        constant("do_layer_norm_before", True),
        only("_remove_final_layer_norm", False),
        constant("enable_bias", True),
        constant("layer_norm_elementwise_affine", True),
        integer("vocab_size", "vocab_size"),
        integer("hidden_size", "d_model", 768),
        equal("word_embed_proj_dim", "d_model", "hidden_size"),
        integer("num_hidden_layers", "n_layers", 12),
        integer("num_attention_heads", "n_heads", 12),
        integer("ffn_dim", "d_ff", 3072),
        integer("max_position_embeddings", "max_positions", 2048),
        activation("activation_function", "relu"),
        fixed(norm_eps=1e-5),
        number("dropout", "dropout", 0.1),
        written("attention_dropout", 0.0),
        number("init_std", "init_std", 0.02),
        TIED,
        *HEADS_AND_TOKENS,
    ),
    tensors=body(
        "model.decoder.layers.{}.",
        {
            **{f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
            "self_attn.out_proj": "self_attn.o_proj",
            "self_attn_layer_norm": "input_layernorm",
            "fc1": "mlp.up_proj",
            "fc2": "mlp.down_proj",
            "final_layer_norm": "post_attention_layernorm",
        },
        "model.decoder.embed_tokens.weight",
        "model.decoder.final_layer_norm",
        "model.decoder.embed_positions.weight",
    ),
    prefix="model.",
    spellings=(("model.model.", "model."),),
)

DENSE_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED = module("transformer.h.{}.self_attention.query_key_value", *QKV, form="groups", bias_form="groups")

BLOOM = FamilyFormat(
    architecture="BloomForCausalLM",
    model_type="bloom",
    source="BLOOM, arXiv:2211.05100",
    rows=(
        BIASED,
        fixed(positions="alibi", embedding_norm=True, activation="gelu_tanh"),
        only("apply_residual_connection_post_layernorm", False),
        integer("vocab_size", "vocab_size"),
        integer("hidden_size", "d_model", 64),
        integer("n_layer", "n_layers", 2),
        integer("n_head", "n_heads", 8),
        derived("d_ff", lambda config: 4 * config.d_model),
        integer("seq_length", "max_positions", 2048),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        number("hidden_dropout", "dropout", 0.0),
        written("attention_dropout", 0.0),
        number("initializer_range", "init_std", 0.02),
        TIED,
        *HEADS_AND_TOKENS,
        requires(lambda config: config.d_ff == 4 * config.d_model),
    ),
    tensors=(
        *FUSED,
        *module("transformer.word_embeddings_layernorm", "model.embedding_norm"),
        *body(
            "transformer.h.{}.",
            DENSE_NAMES | {"post_attention_layernorm": "post_attention_layernorm"},
            "transformer.word_embeddings.weight",
            "transformer.ln_f",
        ),
    ),
    prefix="transformer.",
)


def read_mpt_attention(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Refuse the settings of MPT's attention that our blocks lack."""
    settings = published.values.get("attn_config") or {}
    if not isinstance(settings, dict):
        raise published.refuse("attn_config", settings, "an object")
    inner = Published(settings, published.architecture)
    inner.only("alibi", True)
    inner.only("alibi_bias_max", 8)
    inner.only("qk_ln", False)
    inner.only("clip_qkv")
    inner.only("prefix_lm", False)
    inner.only("attn_type", "multihead_attention")
    if inner.values.get("softmax_scale") is not None:
        return {"attention_scale": inner.number("softmax_scale")}
    return {"attention_scale": max(config.d_model // config.n_heads, 1) ** -0.5}


MPT = FamilyFormat(
    architecture="MptForCausalLM",
    model_type="mpt",
    source="MPT-7B, MosaicML 2023",
    rows=(
        fixed(norm="layernorm", norm_bias=False, gated=False, positions="alibi", activation="gelu"),
        constant("no_bias", True),
        only("embedding_fraction", 1.0),
        only("logit_scale"),
        integer("vocab_size", "vocab_size"),
        integer("d_model", "d_model", 2048),
        integer("n_layers", "n_layers", 24),
        integer("n_heads", "n_heads", 16),
        derived("d_ff", lambda config: 4 * config.d_model),
        constant("expansion_ratio", 4),
        integer("max_seq_len", "max_positions", 2048),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        number("resid_pdrop", "dropout", 0.0),
        number("initializer_range", "init_std", 0.02),
        TIED,
        *replaced(HEADS_AND_TOKENS, attention_scale=None),
        Row(
            "attn_config",
            read_mpt_attention,
            lambda config: {"attn_config": {"alibi": True, "softmax_scale": config.attention_scale}},
        ),
        requires(lambda config: config.d_ff == 4 * config.d_model),
    ),
    tensors=(
        *module("transformer.blocks.{}.attn.Wqkv", *QKV),
        *body(
            "transformer.blocks.{}.",
            {
                "norm_1": "input_layernorm",
                "norm_2": "post_attention_layernorm",
                "attn.out_proj": "self_attn.o_proj",
                "ffn.up_proj": "mlp.up_proj",
                "ffn.down_proj": "mlp.down_proj",
            },
            "transformer.wte.weight",
            "transformer.norm_f",
        ),
    ),
    prefix="transformer.",
)


def read_falcon(published: Published, config: ModelConfig) -> dict[str, Any]:
    """Read the variants of Falcon: multi-query or not, side by side or not, rotary or ALiBi."""
    if published.flag("new_decoder_architecture"):
        raise published.refuse("new_decoder_architecture", True, "false")
    multi, side = published.flag("multi_query", default=True), published.flag("parallel_attn", default=True)
    head_dim = max(config.d_model // config.n_heads, 1)
    fields: dict[str, Any] = {"n_kv_heads": 1 if multi else config.n_heads, "parallel": "shared" if side else "none"}
    biased = published.flag("bias")
    fields |= {"attention_bias": biased, "mlp_bias": biased, "head_dim": head_dim}
    if published.flag("alibi"):
        return fields | {"positions": "alibi", "alibi_scale": head_dim**-0.5}
    return fields | read_rope(published.rope_parameters(), config)


def write_falcon(config: ModelConfig) -> dict[str, Any]:
    """Write the variant."""
    values = {
        "new_decoder_architecture": False,
        "multi_query": config.n_kv_heads == 1,
        "parallel_attn": config.parallel == "shared",
        "bias": config.attention_bias,
        "alibi": config.positions == "alibi",
    }
    rotary = {"rope_theta": config.rope_theta, "rope_parameters": write_parameters(config)}
    return values if config.positions == "alibi" else values | rotary


FALCON = FamilyFormat(
    architecture="FalconForCausalLM",
    model_type="falcon",
    source="Falcon, arXiv:2311.16867",
    rows=(
        fixed(norm="layernorm", gated=False),
        integer("vocab_size", "vocab_size"),
        integer("hidden_size", "d_model", 4544),
        integer("num_hidden_layers", "n_layers", 32),
        integer("num_attention_heads", "n_heads", 71),
        integer("ffn_hidden_size", "d_ff", lambda config: 4 * config.d_model),
        integer("max_position_embeddings", "max_positions", 2048),
        Row("multi_query", read_falcon, write_falcon),
        activation("activation", "gelu"),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        number("hidden_dropout", "dropout", 0.0),
        written("attention_dropout", 0.0),
        number("initializer_range", "init_std", 0.02),
        TIED,
        *TOKENS,
        derived("attention_scale", lambda config: config.head_dim**-0.5),
        SQUARE,
    ),
    tensors=(
        *FUSED,
        *body(
            "transformer.h.{}.",
            DENSE_NAMES | {"post_attention_layernorm": "post_attention_layernorm"},
            "transformer.word_embeddings.weight",
            "transformer.ln_f",
        ),
    ),
    prefix="transformer.",
)

BIGCODE = FamilyFormat(
    architecture="GPTBigCodeForCausalLM",
    model_type="gpt_bigcode",
    source="SantaCoder, arXiv:2301.03988; StarCoder, arXiv:2305.06161",
    rows=(
        BIASED,
        fixed(positions="learned", n_kv_heads=1),
        constant("multi_query", True),
        only("scale_attn_weights", True),
        only("add_cross_attention", False),
        *replaced(GPT2_SIZES, activation("activation_function", "gelu_pytorch_tanh"), n_ctx=None),
        TIED,
        *TOKENS,
        derived("head_dim", lambda config: max(config.d_model // config.n_heads, 1)),
        derived("attention_scale", lambda config: config.head_dim**-0.5),
        SQUARE,
    ),
    tensors=(
        *module("transformer.h.{}.attn.c_attn", *QKV),
        *body(
            "transformer.h.{}.",
            {**NORMS, "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
            "transformer.wte.weight",
            "transformer.ln_f",
            "transformer.wpe.weight",
        ),
    ),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
