"""Adapters against PEFT itself: ours opened there, its own opened here, on every published family."""

import json
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.adapters import load_adapter, save_adapter
from llmctl.artifacts.load import load_model
from llmctl.config import AdapterConfig
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.lora import LoRALinear, adapter_modules, adapter_state, add_adapters, merge_adapters
from llmctl.model.transformer import LanguageModel
from tests.families.test_table import CONFIGS
from tests.interop.test_classifiers import random_classifier

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
peft = pytest.importorskip("peft", reason="pip install peft")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own
]

ALL = AdapterConfig().targets


@pytest.fixture(autouse=True)
def seeded() -> None:
    """PEFT draws its new tensors from torch's own generator: the same ones in every run."""
    torch.manual_seed(0)


IDS = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(7))
IDS[:, -1] = 2


def make_base(architecture: str, folder: Path) -> Path:
    """Write a random model of an architecture, whose head, if it is a classifier's, is not zero."""
    model = random_classifier(CONFIGS[architecture][0])
    return write_artifact(folder / "base", model.config, model.state_dict(), files={}, provenance={})


def there(architecture: str, base: Path, **options) -> torch.nn.Module:
    return getattr(transformers, architecture).from_pretrained(base, **options).eval()


def lora(architecture: str, **settings) -> "peft.LoraConfig":
    return peft.LoraConfig(fan_in_fan_out=architecture.startswith("GPT2"), **settings)


def draw(tensors, seed: int = 5) -> None:
    """Move tensors away from where they begin; lengths of rows stay near theirs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.1)


@torch.no_grad()
def theirs(model: torch.nn.Module) -> torch.Tensor:
    config = model.config
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if config.is_encoder_decoder and not is_classifier(model):
        inputs["decoder_input_ids"] = IDS[:, :5]
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def is_classifier(model: torch.nn.Module) -> bool:
    return "SequenceClassification" in model.config.architectures[0] or (
        hasattr(model, "active_peft_config") and (model.active_peft_config.task_type == "SEQ_CLS")
    )


@torch.no_grad()
def ours(model: LanguageModel, *, hidden: bool = False) -> torch.Tensor:
    model.eval()
    if model.config.n_labels:
        return model.classify(IDS)
    inputs = {"decoder_input_ids_BT": IDS[:, :5]} if model.config.family == "encoder_decoder" else {}
    return model.hidden(IDS, **inputs) if hidden else model(IDS, **inputs)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Compare up to what float32 rounds away of the largest of the values, which small ones are differences of."""
    torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, float(b.abs().max())), rtol=1e-5)


ADAPTED = [architecture for architecture in CONFIGS if not architecture.startswith("Llmctl")]


@pytest.mark.parametrize(("targets", "dora"), [(ALL, False), (ALL, True), (("q_proj", "down_proj"), True)])
@pytest.mark.parametrize("architecture", ADAPTED)
def test_our_adapter_computes_the_same_there(architecture, targets, dora, tmp_path):
    base = make_base(architecture, tmp_path)
    loaded = load_model(base)
    hidden = architecture == "BertModel"
    before = ours(loaded.model, hidden=hidden)
    add_adapters(loaded.model, rank=3, alpha=5, targets=targets, dora=dora, dropout=0.1)
    draw(adapter_state(loaded.model).values())
    out = save_adapter(loaded.model, tmp_path / "adapter", base=loaded.artifact, provenance={"猫": 1})
    here = ours(loaded.model, hidden=hidden)
    assert (here - before).abs().max() > 1e-2
    wrapped = peft.PeftModel.from_pretrained(there(architecture, base), out).eval()
    close(theirs(wrapped), here)
    close(ours(load_model(out).model, hidden=hidden), here)
    n_layers = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in wrapped.modules())
    fused = 2 * loaded.model.config.n_layers if architecture.startswith("GPT2") and targets == ALL else 0
    assert n_layers == len(adapter_modules(loaded.model)) - fused
    again = load_model(base)
    names = load_adapter(again, out)
    assert sorted(names) == sorted(adapter_modules(loaded.model))
    state = adapter_state(again.model)
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter_state(loaded.model).items())
    close(ours(again.model, hidden=hidden), here)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True, "lora_alpha": 3},
        {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.2, "lora_alpha": 2},
    ],
)
@pytest.mark.parametrize("architecture", ADAPTED)
def test_their_adapter_computes_the_same_here(architecture, settings, tmp_path):
    base = make_base(architecture, tmp_path)
    task = "SEQ_CLS" if "Classification" in architecture else None
    wrapped = peft.get_peft_model(there(architecture, base), lora(architecture, r=4, task_type=task, **settings))
    draw(parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    hidden = architecture == "BertModel"
    close(ours(loaded.model, hidden=hidden), theirs(wrapped))
    unmerged = load_model(base)
    load_adapter(unmerged, tmp_path / "theirs")
    close(ours(unmerged.model, hidden=hidden), theirs(wrapped))
    out = save_adapter(unmerged.model, tmp_path / "ours", base=unmerged.artifact, provenance={})
    close(theirs(peft.PeftModel.from_pretrained(there(architecture, base), out).eval()), theirs(wrapped))
    merge_adapters(unmerged.model)
    close(ours(unmerged.model, hidden=hidden), theirs(wrapped))


def save_theirs(architecture: str, base: Path, out: Path, **settings) -> torch.nn.Module:
    wrapped = peft.get_peft_model(there(architecture, base), lora(architecture, **settings))
    draw(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.eval().save_pretrained(out)
    return wrapped


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (
            "LlamaForCausalLM",
            {
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {
                    "down_proj": 5,
                    r"model\.layers\.1\.self_attn.q_proj": 2,
                    "^model.layers.0.*v_proj": 1,
                },
                "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 17},
            },
        ),
        ("GPT2LMHeadModel", {"target_modules": ["c_attn"], "rank_pattern": {"h.1.attn.c_attn": 7}, "use_dora": True}),
        ("T5ForConditionalGeneration", {"target_modules": r".*decoder.*(q|v)", "task_type": "SEQ_2_SEQ_LM"}),
        ("BertForMaskedLM", {"target_modules": ["query", "output.dense"], "rank_pattern": {"query": 1}}),
    ],
)
def test_patterns_mean_what_they_mean_there(architecture, settings, tmp_path):
    base = make_base(architecture, tmp_path)
    wrapped = save_theirs(architecture, base, tmp_path / "theirs", r=4, lora_alpha=9, **settings)
    close(ours(load_model(tmp_path / "theirs").model), theirs(wrapped))


def test_ranks_that_differ_come_back_in_the_patterns(tmp_path):
    base = make_base("GPT2LMHeadModel", tmp_path)
    loaded = load_model(base)
    for name, rank, alpha in (("0.self_attn.q_proj", 2, 3), ("0.self_attn.v_proj", 3, 7), ("1.mlp.up_proj", 4, 9)):
        where = "model.layers." + name
        layer = LoRALinear(loaded.model.get_submodule(where), rank=rank, alpha=alpha, dora=True, rslora=True)
        loaded.model.set_submodule(where, layer)
        draw([layer.lora_A, layer.lora_B, layer.lora_magnitude])
    out = save_adapter(loaded.model, tmp_path / "adapter", base=loaded.artifact, provenance={})
    values = json.loads((out / "adapter_config.json").read_text())
    assert values["target_modules"] == ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]
    assert (values["r"], values["rank_pattern"]) == (5, {"c_fc": 4})
    close(theirs(peft.PeftModel.from_pretrained(there("GPT2LMHeadModel", base), out).eval()), ours(loaded.model))
    close(ours(load_model(out).model), ours(loaded.model))


@pytest.mark.parametrize(
    ("body", "classifier"),
    [
        ("LlamaForCausalLM", "LlamaForSequenceClassification"),
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        ("BertForMaskedLM", "BertForSequenceClassification"),
        ("T5ForConditionalGeneration", "T5ForSequenceClassification"),
        ("BartForConditionalGeneration", "BartForSequenceClassification"),
    ],
)
def test_a_language_model_gets_a_classifiers_head_from_the_adapter(body, classifier, tmp_path):
    base = make_base(body, tmp_path)
    modules = {"BertForSequenceClassification": ["pooler"]}.get(classifier, ["classification_head"])
    modules = None if classifier.startswith(("Llama", "GPT2")) else modules
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        there(classifier, base, num_labels=4),
        lora(classifier, r=2, task_type="SEQ_CLS", modules_to_save=modules),
    )
    draw(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    assert loaded.artifact.architecture == classifier
    close(ours(loaded.model), theirs(wrapped))
    fresh = LanguageModel(loaded.model.config)
    fresh.load_state_dict(loaded.model.state_dict() | fresh_body(base, fresh))
    load_adapter(fresh, tmp_path / "theirs")
    out = save_adapter(fresh, tmp_path / "ours", base=read_artifact(base), provenance={})
    close(ours(load_model(out).model), theirs(wrapped))
    assert load_model(out).model.config == loaded.model.config
    close(theirs(peft.PeftModel.from_pretrained(there(classifier, base, num_labels=4), out).eval()), theirs(wrapped))


def fresh_body(base: Path, model: LanguageModel) -> dict[str, torch.Tensor]:
    names = model.state_dict().keys()
    return {name: tensor for name, tensor in read_artifact(base).state().items() if name in names}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration"])
def test_an_adapter_of_the_bare_model_is_read(architecture, tmp_path):
    base = make_base(architecture, tmp_path)
    wrapped = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(base), lora(architecture, r=2, task_type="FEATURE_EXTRACTION")
    )
    draw(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    inputs = {"decoder_input_ids": IDS[:, :5]} if wrapped.config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = wrapped(input_ids=IDS, **inputs).last_hidden_state
    close(ours(load_model(tmp_path / "theirs").model, hidden=True), expected)
