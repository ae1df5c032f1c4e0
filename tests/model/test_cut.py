"""Cutting: nothing cut changes no bit, what is dead can go, what moves together is the same model."""

from dataclasses import replace

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.cut import Kept, cut, prefixes
from llmctl.model.transformer import LanguageModel, initialize, load_tensors
from tests.support.tuning import FAMILIES

BASE = {"vocab_size": 29, "d_model": 24, "n_layers": 3, "n_heads": 4, "d_ff": 40, "max_positions": 32, "init_std": 0.3}
SEPARATE = {
    "norm": "layernorm",
    "parallel": "separate",
    "rotary_dim": 2,
    "gated": False,
    "activation": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
SHAPES = {
    "llama": {"n_kv_heads": 2, "head_dim": 8},
    "qwen3": {"n_kv_heads": 2, "head_dim": 8, "qk_norm": True, "tie_embeddings": False},
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "gated": False,
        "activation": "gelu_tanh",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "bert": FAMILIES["bert"] | {"head_transform": True, "logits_bias": True},
    "t5": {
        "family": "encoder_decoder",
        "positions": "relative",
        "attention_scale": 1.0,
        "head_dim": 8,
        "activation": "relu",
        "gated": False,
        "logits_scale": 24**-0.5,
        "decoder_start_id": 0,
    },
    "bart": {
        "family": "encoder_decoder",
        "norm": "layernorm",
        "norm_position": "post",
        "embedding_norm": True,
        "positions": "learned",
        "position_offset": 2,
        "gated": False,
        "activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "logits_bias": True,
        "decoder_start_id": 2,
    },
    "marian": {
        "family": "encoder_decoder",
        "norm": "layernorm",
        "norm_position": "post",
        "positions": "sinusoidal",
        "embedding_scale": 0.0,
        "gated": False,
        "activation": "relu",
        "attention_bias": True,
        "mlp_bias": True,
        "logits_bias": True,
        "decoder_start_id": 0,
    },
    "two vocabularies": {
        "family": "encoder_decoder",
        "source_vocab_size": 37,
        "tie_embeddings": False,
        "embedding_scale": 0.0,
        "decoder_start_id": 0,
    },
    "two vocabularies, tied": {
        "family": "encoder_decoder",
        "source_vocab_size": 37,
        "embedding_scale": 0.0,
        "decoder_start_id": 0,
    },
    "windows": {"attention_windows": (4, 0, 2)},
    "pangu": {"attention_windows": (0, 3, 0, 2), "query_layer": True},
    "qwen2": {"n_kv_heads": 2, "attention_bias": True, "attention_output_bias": "no"},
    "gemma2": {
        "n_kv_heads": 2,
        "head_dim": 8,
        "norm_position": "both",
        "attention_softcap": 5.0,
        "logits_softcap": 3.0,
        "attention_windows": (4, 0, 2),
        "rope_thetas": (100.0, 1e4, 100.0),
    },
    "gemma": {"embedding_scale": 0.0, "n_kv_heads": 2, "head_dim": 8},
    "mbart": {
        "family": "encoder_decoder",
        "norm": "layernorm",
        "embedding_norm": True,
        "embedding_scale": 0.0,
        "positions": "learned",
        "position_offset": 2,
        "gated": False,
        "activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "logits_bias": True,
        "decoder_start_id": 2,
    },
    "olmo2": {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width", "n_kv_heads": 2},
    "neox": SEPARATE,
    "cohere": {"norm": "layernorm", "norm_bias": False, "parallel": "shared", "residual_scale": 0.5},
    "modernbert": {"family": "encoder", "norm": "layernorm", "norm_bias": False, "first_norm": False},
    "mpnet": FAMILIES["bert"] | {"n_token_types": 0, "relative_bias": True, "position_offset": 2},
    "electra": FAMILIES["bert"] | {"d_embedding": 12, "head_transform": True, "logits_bias": True},
    "umt5": {
        "family": "encoder_decoder",
        "positions": "relative",
        "relative_bias_per_layer": True,
        "attention_scale": 1.0,
        "decoder_start_id": 0,
    },
    "deberta": FAMILIES["bert"]
    | {"positions": "disentangled", "n_relative_buckets": 12, "n_kv_heads": 2, "head_transform": True},
    "classifier": {"n_labels": 3, "pooled_activation": "tanh", "family": "encoder"},
}


def build(name: str, seed: int = 1) -> LanguageModel:
    model = LanguageModel(ModelConfig(**(BASE | SHAPES[name]))).double().eval()
    initialize(model, seed)
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(parameter)), dtype=torch.float64
            )
    return model


def outputs(model: LanguageModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 29, (2, 9), generator=generator)
    with torch.no_grad():
        if model.config.n_labels:
            return model.classify(ids)
        target = torch.randint(1, 29, (2, 7), generator=generator)
        extra = {"decoder_input_ids_BT": target} if model.config.family == "encoder_decoder" else {}
        return model(ids, **extra)


def smaller(model: LanguageModel, kept: Kept) -> LanguageModel:
    config, state = cut(model.config, model.state_dict(), kept)
    result = LanguageModel(config).double().eval()
    load_tensors(result, state)
    return result


def everything(model: LanguageModel, order=torch.arange) -> Kept:
    """Name all of a model's parts as those that stay, in an order."""
    config, state = model.config, model.state_dict()
    attentions = [name.removesuffix(".q_proj.weight") for name in state if name.endswith(".q_proj.weight")]
    blocks = [name.removesuffix("mlp.up_proj.weight") for name in state if name.endswith("mlp.up_proj.weight")]
    return Kept(
        layers={prefix: tuple(range(n)) for prefix, n in prefixes(config).items()},
        channels=None if config.positions == "sinusoidal" else order(config.d_model),
        groups={name: order(config.n_kv_heads) for name in attentions},
        units={name: order(config.d_ff) for name in blocks},
    )


@pytest.mark.parametrize("name", SHAPES)
def test_cutting_nothing_changes_no_bit(name):
    model = build(name)
    for kept in (Kept(), everything(model)):
        result = smaller(model, kept)
        assert result.config == model.config
        assert torch.equal(outputs(result), outputs(model))


@pytest.mark.parametrize("name", SHAPES)
def test_parts_in_another_order_are_the_same_model(name):
    model = build(name)
    generator = torch.Generator().manual_seed(7)
    # Heads under one table of positions move together.
    groups = torch.randperm(model.config.n_kv_heads, generator=generator)

    def order(n: int) -> torch.Tensor:
        return groups if n == model.config.n_kv_heads else torch.randperm(n, generator=generator)

    kept = everything(model, order)
    channels = kept.channels
    result = smaller(model, replace(kept, channels=channels))
    torch.testing.assert_close(outputs(result), outputs(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_layers_that_go_are_layers_that_are_passed_over(name):
    model = build(name)
    last = list(prefixes(model.config))[-1]
    result = smaller(model, Kept(layers={last: (0, 2)}))
    stack = model.stacks()[-1]
    stack.layers = torch.nn.ModuleList([stack.layers[0], stack.layers[2]])
    torch.testing.assert_close(outputs(result), outputs(model), rtol=1e-12, atol=1e-12)
    assert len(result.stacks()[-1].layers) == 2


# A norm over all heads (OLMo 2) divides by the mean square of those that are left.
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "olmo2"])
def test_heads_and_units_that_do_nothing_can_go(name):
    model = build(name)
    config = model.config
    size = config.n_heads // config.n_kv_heads * config.head_dim
    groups, units = {}, {}
    for module_name, module in model.named_modules():
        if hasattr(module, "o_proj"):
            module.o_proj.weight.data[:, :size] = 0  # the first group
            groups[module_name] = torch.arange(1, config.n_kv_heads)
        if hasattr(module, "down_proj"):
            module.down_proj.weight.data[:, 5:17] = 0
            kept = torch.cat([torch.arange(5), torch.arange(17, config.d_ff)])
            units[module_name.removesuffix("mlp")] = kept
    result = smaller(model, Kept(groups=groups, units=units))
    torch.testing.assert_close(outputs(result), outputs(model), rtol=1e-10, atol=1e-10)
    assert (result.config.n_kv_heads, result.config.d_ff) == (config.n_kv_heads - 1, config.d_ff - 12)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "t5"])
def test_channels_that_are_silent_can_go(name):
    """Nothing writes into them; factors on the norms make up for the mean over fewer."""
    model = build(name)
    config = model.config
    silent, loud = torch.arange(6), torch.arange(6, config.d_model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data[silent] = 0
        elif parameter_name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.data[:, silent] = 0
    names = [n.removesuffix(".weight") for n in model.state_dict() if n.endswith("norm.weight") and "q_n" not in n]
    names = [n for n in names if not n.endswith(("q_norm", "k_norm"))]
    factor = (config.d_model / len(loud)) ** 0.5
    model.eval()
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.0
    result = smaller(model, Kept(channels=loud, norms=dict.fromkeys(names, factor)))
    for module in result.modules():
        if hasattr(module, "eps"):
            module.eps = 0.0
    torch.testing.assert_close(outputs(result), outputs(model), rtol=1e-9, atol=1e-9)
    assert result.config.d_model == len(loud)


def test_stacks_that_share_their_windows_keep_the_same_layers():
    pair = {"family": "encoder_decoder", "attention_windows": (2, 0, 5)}
    model = LanguageModel(ModelConfig(**(BASE | pair))).double().eval()
    with pytest.raises(UsageError, match="windows"):
        cut(model.config, model.state_dict(), Kept(layers={"model.decoder.": (1, 2)}))
    both = Kept(layers={"model.encoder.": (1, 2), "model.decoder.": (1, 2)})
    assert cut(model.config, model.state_dict(), both)[0].attention_windows == (0, 5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "bert", "t5", "bart", "marian", "mbart"])
def test_what_was_cut_is_saved_and_loaded(name, tmp_path):
    model = build(name)
    config = model.config
    attentions = [n for n, module in model.named_modules() if hasattr(module, "o_proj")]
    blocks = [n.removesuffix("mlp") for n, module in model.named_modules() if hasattr(module, "down_proj")]
    free = config.n_heads * config.head_dim != config.d_model or name in ("llama", "qwen3", "gemma", "t5")
    half = config.n_kv_heads // 2
    width = 16 if free else half * (config.n_heads // config.n_kv_heads) * config.head_dim
    sinusoidal = config.positions == "sinusoidal"
    kept = Kept(
        layers=dict.fromkeys(prefixes(config), (0, 2)),
        channels=None if sinusoidal else torch.arange(width),
        groups={} if sinusoidal else {n: torch.arange(half) for n in attentions},
        units={n: torch.arange(24) for n in blocks},
    )
    result = smaller(model, kept).float()
    path = write_artifact(tmp_path / "student", result.config, result.state_dict(), files={}, provenance={})
    artifact = read_artifact(path)
    again = LanguageModel(artifact.config).eval()
    load_tensors(again, artifact.state())
    assert artifact.config == result.config
    assert torch.equal(outputs(again), outputs(result))
    if name == "t5":  # the states under the head keep their scale
        assert artifact.config.logits_scale == pytest.approx(16**-0.5)
