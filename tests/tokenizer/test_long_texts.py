"""A long text is encoded in parts only where tests of the tokenizer show that its ids stay the same."""

import io
import random
import re
from itertools import chain

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmctl.config import TokenizerConfig
from llmctl.tokenizer import long_texts
from llmctl.tokenizer.added import AddedTokens
from llmctl.tokenizer.huggingface import HuggingFaceTokenizer
from llmctl.tokenizer.long_texts import INNER, LONG_CHARACTERS, RULES, SURROUNDINGS, LongTexts, spanning
from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer
from llmctl.tokenizer.train import train_tokenizer

LINES = [
    "The name of the function is returned as a string.",
    " = Heading = ",
    "\u6a21\u5757\u7684\u540d\u79f0\u662f\u4ec0\u4e48\uff1f",
    "\tdef function(name):  # 12,345",
    "",
    "  \u00e9t\u00e9 e\u0301 \ue000 \ufb01n \u2581 <s> don't  stop ",
    "of the one of the other of the third of the one",
]


def text_of(n_lines: int, seed: int = 0) -> str:
    """Random lines with all kinds of line ends, and the surroundings that tokenizers are tested with."""
    chosen = random.Random(seed)
    ends = ["\n", "\n", "\n", "\n\n", "\r\n", " \n", "\n \n", "\n\t\n", " \n "]
    text = "".join(chosen.choice(LINES) + chosen.choice(ends) for _ in range(n_lines))
    return text + "".join(chosen.sample(SURROUNDINGS, 500))


def sentencepiece_model(**settings: object) -> SentencePieceTokenizer:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2} | settings
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES * 3), model_writer=model, **settings)
    return SentencePieceTokenizer(model.getvalue())


LLAMA = {"byte_fallback": True, "vocab_size": 360, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False}


def byte_level(*, splits: bool = True) -> HuggingFaceTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400 if splits else 900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{line}\n\n{line}\n{line}\n  \n" for line in LINES * 3], trainer)
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), {})


def own(model_type: str = "bpe") -> SentencePieceTokenizer:
    tokenizer = train_tokenizer(LINES * 20, TokenizerConfig(vocab_size=330, model_type=model_type))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


CUT = {
    "ours": own,
    "as tokenizer.json": lambda: HuggingFaceTokenizer(own().files()["tokenizer.json"], {}),
    "normalizes": sentencepiece_model,
    "dummy space before the first word": lambda: sentencepiece_model(**LLAMA),
    "GPT-2": byte_level,
}
WHOLE = {
    "pieces of several words": lambda: sentencepiece_model(split_by_whitespace=False),
    "a line end is unknown": lambda: sentencepiece_model(
        normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "unigram": lambda: own("unigram"),
    "pieces of several lines": lambda: byte_level(splits=False),
}


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_a_long_text_has_the_ids_that_it_has_as_a_whole(name: str):
    tokenizer = (CUT | WHOLE)[name]()
    assert (tokenizer._long_texts.way is not None) == (name in CUT)
    texts = [text_of(500, seed) for seed in range(3)]
    assert min(map(len, texts)) > LONG_CHARACTERS
    whole = [tokenizer._long_texts._encode([text])[0] for text in texts]
    assert tokenizer.encode_batch([*texts, "short", ""]) == [*whole, tokenizer.encode("short"), []]
    assert tokenizer.encode(texts[0]) == whole[0]


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_parts_are_encoded_as_texts_of_their_own(name: str):
    tokenizer = (CUT | WHOLE)[name]()
    text = text_of(500)
    parts = tokenizer.cut(text, 2000)
    assert "".join(parts) == text
    assert list(chain.from_iterable(tokenizer.encode_batch(parts))) == tokenizer.encode(text)
    # Without the dummy space, later parts are no texts of their own.
    assert (len(parts) > 5) == (name in CUT and not name.startswith("dummy"))
    assert all(len(part) >= 2000 for part in parts[:-1])
    assert tokenizer.cut("short", 2000) == ["short"]


def test_added_tokens_are_found_in_the_whole_text():
    base, text = own(), text_of(500)
    entry = {"content": "<end>\n", "special": True}
    assert AddedTokens(base, {base.vocab_size: entry}, {}).cut(text, 2000) == base.cut(text, 2000)
    assert AddedTokens(base, {base.vocab_size: entry | {"special": False}}, {}).cut(text, 2000) == [text]


def characters(texts):
    return [[ord(character) for character in text] for text in texts]


def toy(encode, later=(), probes=()) -> LongTexts:
    return LongTexts("bpe", encode, lambda: later, lambda: probes)


def test_only_parts_are_encoded():
    sizes: list[int] = []

    def encode(texts):
        sizes.extend(map(len, texts))
        return characters(texts)

    toy_texts = toy(encode)
    assert toy_texts.way is not None
    sizes.clear()
    text = "A line of text.\n" * 1000
    assert toy_texts.encode_batch([text, "a"]) == characters([text, "a"])
    assert max(sizes) < 1.1 * long_texts.PART_CHARACTERS
    # Short texts are not cut, and cost no test.
    again = toy(encode)
    again.encode_batch(["a\nb" * 100])
    assert "way" not in vars(again)


def test_rules_are_tried_until_one_changes_nothing():
    def with_pairs(texts):  # two line ends are one token, unless a word follows: as in GPT-2's pattern
        return characters([re.sub(r"\n\n(?!\S)", "\t", text) for text in texts])

    way = toy(with_pairs).way
    assert way is not None
    assert way[0] is RULES[1]


def test_a_piece_that_spans_lines_is_found_by_its_probe():
    def encode(texts):
        return characters([text.replace("x\ny", "z") for text in texts])

    assert toy(encode).way is not None
    assert toy(encode, probes=spanning("x y")).way is None
    assert INNER.search("x\u2581y")
    assert not INNER.search("\u2581xy")


def test_later_parts_may_need_another_way():
    def with_space(texts):
        return characters([f" {text}" for text in texts])

    long = toy(with_space, [characters])
    assert long.way is not None
    assert long.way[1] is characters
    text = "A line of text.\n" * 1000
    assert long.encode_batch([text, text]) == with_space([text, text])
    assert long.cut(text, 1000) == [text]
    assert toy(with_space).way is None
