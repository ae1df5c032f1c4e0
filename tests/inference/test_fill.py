"""Masks are filled with what a full forward pass finds likeliest; padding and spelling change nothing."""

import dataclasses

import pytest
import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.inference.encoding import encode_around
from llmctl.inference.fill import encode_masked, fill, put_in
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture
def encoder(text_tokenizer, tmp_path) -> Loaded:
    config = ModelConfig(
        family="encoder",
        vocab_size=text_tokenizer.vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=4,
        max_positions=32,
        init_std=0.4,
    )
    model = LanguageModel(config)
    initialize(model, 0)
    return Loaded(model.eval(), text_tokenizer, Artifact(tmp_path, "", model.config, {}, {}))


def test_candidates_are_those_of_a_full_forward(encoder):
    ids, places = encode_masked(encoder, "a <mask> of")
    assert [ids[place] for place in places] == [encoder.tokenizer.mask_id]
    assert (ids[0], ids[-1]) == (encoder.tokenizer.bos_id, encoder.tokenizer.eos_id)
    with torch.no_grad():
        logits = encoder.model(torch.tensor([ids]))[0, places[0]]
    special = torch.from_numpy(encoder.tokenizer.token_bytes() == 0)
    best = logits.masked_fill(special, float("-inf")).topk(3).indices.tolist()
    got = fill(encoder, ["a <mask> of"], top_k=3)[0]
    expected = [encoder.tokenizer.decode_bytes([index]).decode("utf-8", "replace") for index in best]
    assert [token for token, _ in got.masks[0]] == expected
    assert [p for _, p in got.masks[0]] == sorted((p for _, p in got.masks[0]), reverse=True)


def test_spellings_and_batches_agree(encoder):
    texts = ["a <mask> of", "a [MASK] of", "<mask>", "long " * 8 + "<mask> and <mask>"]
    together = fill(encoder, texts)
    assert together[0].masks == together[1].masks
    assert len(together[3].masks) == 2
    for text, filled in zip(texts, together, strict=True):
        alone = fill(encoder, [text])[0]
        assert alone.filled == filled.filled
        for one, other in zip(alone.masks, filled.masks, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            assert [p for _, p in one] == pytest.approx([p for _, p in other], abs=1e-5)


@pytest.mark.parametrize(("text", "match"), [("no mask", "no mask"), ("<mask> " * 40, "context is 32")])
def test_texts_that_cannot_be_filled(encoder, text: str, match: str):
    with pytest.raises(UsageError, match=match):
        fill(encoder, [text])


def test_no_candidates_are_refused(encoder):
    with pytest.raises(UsageError, match="--top-k"):
        fill(encoder, ["<mask>"], top_k=0)


def test_more_candidates_than_tokens_are_all_the_tokens_once(encoder, text_tokenizer):
    wide = LanguageModel(dataclasses.replace(encoder.model.config, vocab_size=text_tokenizer.vocab_size + 30))
    initialize(wide, 0)
    loaded = dataclasses.replace(encoder, model=wide.eval())
    (mask,) = fill(loaded, ["a <mask> of"], top_k=10**6)[0].masks
    assert len(mask) == int((text_tokenizer.token_bytes() > 0).sum())
    assert sum(p for _, p in mask) <= 1.0 + 1e-5
    assert min(p for _, p in mask) >= 0.0


def test_a_character_is_masked_as_it_stands_and_a_word_with_its_space(encoder, text_tokenizer):
    characters = train_tokenizer(["a list of 中文，诗。"] * 20, TokenizerConfig(model_type="char", vocab_size=330))
    mask = characters.mask_id
    assert encode_around(characters, "a <mask>i", {"<mask>": mask}) == [
        *characters.encode("a "),
        mask,
        *characters.encode("i"),
    ]
    mask = text_tokenizer.mask_id
    expected = [*text_tokenizer.encode("a"), mask, *text_tokenizer.encode(" of ")]
    assert encode_around(text_tokenizer, "a <mask> of ", {"<mask>": mask}) == expected
    assert put_in(characters, "a <mask>i", [" "]) == "a  i"
    assert put_in(text_tokenizer, "a <mask> of", [" list"]) == "a list of"


def test_the_longest_special_word_is_meant(text_tokenizer):
    specials = {"<extra_id_1>": 7, "<extra_id_10>": 8}
    assert encode_around(text_tokenizer, "<extra_id_10><extra_id_1>", specials) == [8, 7]


def test_errors_number_the_text(encoder):
    with pytest.raises(UsageError, match="text 18, `none`"):
        fill(encoder, ["<mask>", "none"], first=17)
    with pytest.raises(UsageError, match="text 3 has"):
        fill(encoder, ["<mask>", "<mask> " * 40], first=2)
