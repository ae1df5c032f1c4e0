"""Models in few bits as transformers opens them, through compressed-tensors."""

import pytest
import torch

from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.engine.models import load_model
from llmctl.formats.artifact import write_artifact
from llmctl.formats.quantization import linear_modules
from llmctl.model.transformer import LanguageModel, initialise
from llmctl.quant.methods import nearest
from llmctl.quant.schemes import SCHEMES
from llmctl.quant.weight import packed
from llmctl.tokenizer.train import train_tokenizer

pytest.importorskip("compressed_tensors", reason="pip install 'llmctl[interop]'")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_positions": 64, "init_std": 0.2}


@pytest.mark.parametrize("name", ["int8", "int4-sym"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_computes_what_we_compute(tmp_path, name, kind):
    from transformers import AutoModelForCausalLM

    tokenizer = train_tokenizer(["the cat sat on the mat. 猫坐在垫子上。\n"] * 40, TokenizerConfig(vocab_size=320))
    more = {"qk_norm": True} if kind == "qwen3" else {}
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, tie_embeddings=False, **(SHAPE | more)))
    initialise(model, 3)
    state = model.state_dict()
    schemes = {name_: SCHEMES[name] for name_ in linear_modules(model.config) if name_ != "lm_head"}
    for module, scheme in schemes.items():
        codes = nearest(state.pop(f"{module}.weight"), scheme)
        state |= {f"{module}.{part}": tensor for part, tensor in packed(codes, scheme).items()}
    path = write_artifact(
        tmp_path / "small", model.config, state, files=tokenizer.files(), provenance={}, schemes=schemes
    )
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = load_model(path).model
    ids = torch.randint(0, tokenizer.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = theirs(ids).logits, ours(ids)
    assert (found - expected).norm() <= 5e-3 * expected.norm()
