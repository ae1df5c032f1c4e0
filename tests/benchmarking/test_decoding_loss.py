"""What writing costs in loss: nothing where nothing is rounded, and what was rounded where it is."""

import shutil

import pytest
import torch

from llmctl.benchmarking.decoding_loss import ROW_TOKENS, read_rows, rows_of, step_loss
from llmctl.benchmarking.random_models import random_model
from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.kernels.compiled_step import load_library, make_native
from llmctl.model.decode import Decoder
from tests.support.models import KINDS

DECODERS = [kind for kind, fields in KINDS.items() if "family" not in fields]
TEXT = "a list of strings 中文，诗。 \n"


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize("kind", DECODERS)
def test_a_step_that_rounds_nothing_writes_at_the_loss_of_reading(make_loaded, text, kind: str):
    loaded = make_loaded(kind)
    ids_BT = rows_of(loaded, text)
    assert ids_BT.shape == (4, 48)
    with torch.no_grad():
        logits_NV = loaded.model(ids_BT)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:].flatten())
    read = read_rows(loaded.model, ids_BT)
    found = step_loss(loaded.model, ids_BT, read, loaded.decoder)
    assert found.read == pytest.approx(float(expected), rel=1e-5)
    assert found.written == pytest.approx(found.read, rel=1e-5)
    assert abs(found.perplexity_change) < 1e-3
    assert (found.same_best_frac, found.n_tokens) == (1.0, 4 * 47)
    coded = step_loss(loaded.model, ids_BT, read, loaded.decoder, "int8")
    assert coded.read == found.read
    assert 0 < abs(coded.written - found.written) < 0.1 * found.read


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not there")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_compiled_step_is_measured_where_it_is_used(compiled, precision: str):
    shape = {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "max_positions": 32}
    model = random_model(ModelConfig(**shape), precision)
    plain, native = Decoder(model), Decoder(model)
    native.native = make_native(load_library(compiled("native")), native)
    ids_BT = torch.randint(0, 96, (4, 30), generator=torch.Generator().manual_seed(0))
    read = read_rows(model, ids_BT)
    losses = [step_loss(model, ids_BT, read, decoder) for decoder in (plain, native)]
    assert losses[0].read == losses[1].read == pytest.approx(losses[0].written, abs=1e-3)  # few rows, another product
    change = abs(losses[1].written - losses[0].written)
    assert change < (1e-5 if precision == "fp32" else 0.05)
    assert (change > 1e-6) == (precision == "int4")


def test_rows_begin_as_the_models_texts_do(make_loaded, text, text_tokenizer):
    loaded = make_loaded("rope", max_positions=1000)
    ids_BT = rows_of(loaded, text)
    n_tokens = len(text_tokenizer.encode(TEXT * 40))
    assert ids_BT.shape == (4, min(ROW_TOKENS, n_tokens // 4 + 1))
    assert (ids_BT[:, 0] == text_tokenizer.bos_id).all()
    assert ids_BT[:, 1:].flatten().tolist() == text_tokenizer.encode(TEXT * 40)[: ids_BT[:, 1:].numel()]


def test_what_cannot_be_measured_is_refused(make_loaded, text, tmp_path):
    with pytest.raises(UsageError, match="is not a decoder"):
        rows_of(make_loaded("t5"), text)
    with pytest.raises(UsageError, match="no tokenizer"):
        rows_of(make_loaded("rope", tokenizer=False), text)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UsageError, match="too few"):
        rows_of(make_loaded("rope"), str(tmp_path / "short.txt"))
