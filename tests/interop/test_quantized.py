"""Models in few bits as transformers opens them, through compressed-tensors, and what it saves as we open it."""

import shutil
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.cli import run
from llmctl.config import ModelConfig, QuantizeConfig, TokenizerConfig, WeightsConfig
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.calibrate import calibrate
from llmctl.quantizing.packed_state import stored_state
from llmctl.quantizing.settings import plan_of
from llmctl.tokenizer.train import train_tokenizer

pytest.importorskip("compressed_tensors", reason="pip install '.[interop]'")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128, "max_positions": 64, "init_std": 0.2}
SCHEMES = [
    *(("int8", "int8"), ("int8", "float"), ("int4-sym", "int8"), ("int4-sym", "float"), ("int4", "int4")),
    *(("int4", "float"), ("int3", "float"), ("int2", "float")),
]
"""Blocks and embedding; with zeros all of a file has to have one scheme."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat. 猫坐在垫子上。\n"] * 40, TokenizerConfig(vocab_size=320))


def plain(folder: Path, tokenizer, **more) -> Path:
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **(SHAPE | ids | more)))
    initialize(model, 3)
    return write_artifact(folder, model.config, model.state_dict(), files=tokenizer.files(), provenance={})


def in_few_bits(source: Path, out: Path, **weights) -> Path:
    base = load_model(source)
    plan = plan_of(base.model.config, QuantizeConfig(weights=WeightsConfig(**({"scale_bits": 16} | weights))))
    state = stored_state(base.model, calibrate(base.model, plan, "nearest", [], lambda _: None), plan)
    return write_artifact(out, base.model.config, state, files=base.artifact.files, provenance={}, schemes=plan)


def compare(path: Path, theirs, *, off: float) -> None:
    found, expected = logits(theirs, path), logits(load_model(path, packed=True).model, path)
    assert (found - expected).norm() <= off * expected.norm()


def logits(model, path: Path) -> torch.Tensor:
    size = read_model(path).config.vocab_size
    ids = torch.randint(0, size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def meant(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of modules in few bits, in the precision of their scales."""
    artifact = read_artifact(path)
    state = artifact.state()
    return {f"{name}.weight": state[f"{name}.weight"].bfloat16().float() for name in artifact.schemes}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("scheme", "embedding"), SCHEMES)
def test_transformers_computes_what_we_compute(tmp_path, tokenizer, scheme, embedding, tie):
    from transformers import AutoModelForCausalLM

    source = plain(tmp_path / "whole", tokenizer, tie_embeddings=tie, qk_norm=tie)
    path = in_few_bits(source, tmp_path / "small", scheme=scheme, embedding=embedding)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    compare(path, theirs, off=0.02)  # it multiplies weights out in the scales' 16 bits
    found = theirs.state_dict()
    for name, weight in meant(path).items():
        torch.testing.assert_close(found[name].float(), weight, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("embedding", ["float", "int8"])
def test_scales_in_eight_bits_are_not_taken_for_others(tmp_path, tokenizer, embedding):
    from transformers import AutoModelForCausalLM

    source = plain(tmp_path / "whole", tokenizer)
    path = in_few_bits(source, tmp_path / "small", scheme="int4", scale_bits=8, embedding=embedding)
    with pytest.raises(Exception, match="llmctl"):
        AutoModelForCausalLM.from_pretrained(path)


def test_transformers_opens_what_is_exported_of_scales_in_eight_bits(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    source = plain(tmp_path / "whole", tokenizer)
    path = in_few_bits(source, tmp_path / "small", scheme="int4", scale_bits=8, embedding="float")
    assert run(["export", str(path), "--to", "hf", "-o", str(tmp_path / "wide")]) == 0
    compare(path, AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32), off=0.02)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embedding", ["int8", "float"])
def test_transformers_rounds_inputs_as_we_do(tmp_path, tokenizer, embedding, tie):
    """Not on the same grid, 127.5 steps to the largest against our 127: as near as rounding is to not rounding."""
    from transformers import AutoModelForCausalLM

    source = plain(tmp_path / "whole", tokenizer, tie_embeddings=tie)
    path = in_few_bits(source, tmp_path / "small", scheme="w8a8", embedding=embedding)
    theirs, ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), load_model(path, packed=True).model
    found, expected, unrounded = logits(theirs, path), logits(ours, path), logits(load_model(path).model, path)
    off = (expected - unrounded).norm()
    assert (found - expected).norm() <= 1.5 * off
    assert 0.5 * off <= (found - unrounded).norm() <= 1.5 * off


def test_bytes_are_those_that_the_library_saves_and_reads(tmp_path, tokenizer):
    """Rounded inputs, codes in bytes: opened, saved and opened by transformers, and opened by us again."""
    from transformers import AutoModelForCausalLM

    source = plain(tmp_path / "whole", tokenizer, tie_embeddings=False)
    path = in_few_bits(source, tmp_path / "small", scheme="w8a8", embedding="float")
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    first, last = read_artifact(path), read_artifact(tmp_path / "again")
    assert first.schemes == last.schemes
    a, b = first.packed_state(), last.packed_state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name].to(a[name].dtype)) for name in a)


def test_packed_zeros_are_those_that_the_library_packs():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from llmctl.quant.grid import Codes, Grid
    from llmctl.quant.weight import packed

    draw = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4):
        codes_OI, zeros_OG = (
            torch.randint(2**bits, shape, generator=draw, dtype=torch.uint8) for shape in ((96, 128), (96, 2))
        )
        ours = packed(Codes(codes_OI, Grid(torch.ones(96, 2), zeros_OG)), Scheme(bits, 64, symmetric=False))
        signed = [(one.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8) for one in (codes_OI, zeros_OG)]
        assert torch.equal(ours["weight_packed"], pack_to_int32(signed[0], bits))
        assert torch.equal(ours["weight_zero_point"], pack_to_int32(signed[1], bits, packed_dim=0))


@pytest.mark.filterwarnings("ignore")
def test_peft_opens_an_adapter_on_the_base_that_a_run_has_put_in_four_bits(tmp_path, tokenizer, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    plain(Path("whole"), tokenizer)
    Path("text.txt").write_text("the cat sat on the mat.\n\n" * 200)
    flags = ["--set", "data.split=blank", "--set", "train.seq_len=32", "--lr", "0.01", "--steps", "8", "-q"]
    assert run(["finetune", "whole", "text.txt", "--task", "text", "--method", "qlora", *flags, "-o", "tuned"]) == 0
    base = AutoModelForCausalLM.from_pretrained("tuned/base-int4", dtype=torch.float32)
    shutil.rmtree("whole")
    compare(Path("tuned"), PeftModel.from_pretrained(base, "tuned").eval(), off=0.02)
