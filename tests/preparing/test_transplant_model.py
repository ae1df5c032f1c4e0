"""Models with the tokenizer of another: shared pieces keep their rows, others are combinations or means."""

import json

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.preparing import transplant_model as module
from llmctl.preparing.transplant_model import transplant_model
from llmctl.tokenizer.load import find_tokenizer
from tests.support.bpe import byte_level

TEXTS = ["the cat sat on the mat\n" * 30]
SHAPES = [
    {"tie_embeddings": True},
    {"tie_embeddings": False, "logits_bias": True, "norm": "layernorm"},
    {"family": "encoder", "positions": "learned"},
    {"family": "encoder_decoder", "positions": "relative", "tie_embeddings": False},
]


def files_with(n_more: int) -> dict[str, bytes]:
    """Return a tokenizer without the last merges of another, and with other special tokens."""
    files = byte_level()
    content = json.loads(files["tokenizer.json"])
    merges, vocabulary = content["model"]["merges"], content["model"]["vocab"]
    gone = ["".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in merges[-n_more:]]
    content["model"]["merges"] = merges[:-n_more]
    rest = [piece for piece in vocabulary if piece not in {*gone, "<think>"}]
    content["model"]["vocab"] = {piece: index for index, piece in enumerate(reversed(rest))}
    content["added_tokens"] = [
        own | {"id": content["model"]["vocab"][own["content"]]}
        for own in content["added_tokens"]
        if own["content"] in content["model"]["vocab"]
    ]
    return {"tokenizer.json": json.dumps(content).encode()}


def written(path, files, seed=0, **fields):
    tokenizer = find_tokenizer(files)
    roles = {"eos_id": tokenizer.special_id("<|end|>"), "decoder_start_id": tokenizer.special_id("<|end|>")}
    settings = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_positions": 64}
    model = LanguageModel(ModelConfig(**(settings | roles | fields)))
    initialize(model, seed)
    return write_artifact(path, model.config, model.state_dict(), files=files, provenance={})


@pytest.mark.parametrize("fields", SHAPES, ids=["tied", "untied", "encoder", "encoder_decoder"])
def test_a_model_with_its_own_tokenizer_stays_as_it_is(fields, tmp_path):
    source = written(tmp_path / "a", byte_level(), **fields)
    found = transplant_model(source, written(tmp_path / "b", byte_level(), 1), tmp_path / "out", TEXTS)
    assert found.shared >= found.vocab_size - 2  # all but holes
    before, after = (load_model(path, device="cpu", dtype="float32").model for path in (source, tmp_path / "out"))
    ids_BT = torch.tensor([find_tokenizer(byte_level()).encode("the cat sat")])
    more = {"decoder_input_ids_BT": ids_BT} if fields.get("family") == "encoder_decoder" else {}
    with torch.no_grad():
        torch.testing.assert_close(after.hidden(ids_BT, **more), before.hidden(ids_BT, **more), rtol=0, atol=0)


@pytest.mark.parametrize("fields", SHAPES, ids=["tied", "untied", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("method", ["omp", "mean"])
def test_shared_pieces_keep_their_rows_and_others_are_made_of_them(method, fields, tmp_path):
    source = written(tmp_path / "a", files_with(20), **fields)
    donor = written(tmp_path / "b", byte_level(), 1, d_model=48)
    if method == "omp":  # rows of the donor that are sums of two shared ones
        made = load_model(donor, device="cpu", dtype="float32")
        table = made.model.state_dict()["model.embed_tokens.weight"]
        old, new = find_tokenizer(files_with(20)), find_tokenizer(byte_level())
        shared = module.shared_pieces(old, new)
        atoms = sorted(shared)[40:42]
        rest = [index for index in range(new.vocab_size) if index not in shared]
        table[rest] = 2 * table[atoms[0]] - table[atoms[1]]
        donor = write_artifact(
            donor, made.model.config, made.model.state_dict(), files=byte_level(), provenance={}, force=True
        )
    found = transplant_model(source, donor, tmp_path / "out", TEXTS, method=method, n_atoms=2)
    before, after = (load_model(path, device="cpu", dtype="float32") for path in (source, tmp_path / "out"))
    assert after.tokenizer.sha256 == find_tokenizer(byte_level()).sha256
    assert after.model.config.vocab_size == found.vocab_size == after.tokenizer.vocab_size
    assert after.model.config.eos_id == after.tokenizer.special_id("<|end|>")
    assert found.bytes_per_token > found.bytes_per_token_before
    shared = module.shared_pieces(before.tokenizer, after.tokenizer)
    rest = [index for index in range(after.tokenizer.vocab_size) if index not in shared]
    assert found.shared == len(shared) > 250
    assert len(rest) >= 20
    for name, old in before.model.state_dict().items():
        new = after.model.state_dict()[name]
        if len(old) != before.tokenizer.vocab_size:
            assert torch.equal(old, new), name
            continue
        assert torch.equal(new[list(shared)], old[list(shared.values())]), name
        for index in rest:
            if method == "omp":
                wanted = 2 * old[shared[atoms[0]]] - old[shared[atoms[1]]]
            else:
                text = after.tokenizer.piece_bytes(index).decode("utf-8", "replace")
                ids = before.tokenizer.encode(text)
                wanted = old[ids].mean(dim=0) if ids else old.mean(dim=0)
            torch.testing.assert_close(new[index], wanted, rtol=1e-3, atol=1e-4)


def test_a_tokenizer_without_weights_gives_means(tmp_path):
    source = written(tmp_path / "a", files_with(20))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(byte_level()["tokenizer.json"])
    assert transplant_model(source, folder, tmp_path / "out", TEXTS).method == "mean"
    with pytest.raises(UsageError, match="`--method omp` needs the weights of"):
        transplant_model(source, folder, tmp_path / "more", TEXTS, method="omp")
    assert not (tmp_path / "more").exists()


def test_neither_model_is_replaced_by_the_result(tmp_path):
    source, donor = written(tmp_path / "a", files_with(20)), written(tmp_path / "b", byte_level(), 1)
    for out in (source, donor):
        with pytest.raises(UsageError, match="is the model itself"):
            transplant_model(source, donor, out, TEXTS, force=True)
