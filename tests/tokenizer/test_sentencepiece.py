"""Our tokenizers give every text back, count its bytes, never let text become control, and agree with their JSON."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.config import TokenizerConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer
from llmctl.tokenizer.train import sampled, train_tokenizer
from tests.support.spm import published

CORPUS = [
    "The function returns a list of strings.\n\n    def f(x):\n        return x  # 123\n",
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。",
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。",
    "A class is a description of objects; an object is a value with behavior.\r\n",
] * 30
EDGE = [
    "",
    " ",
    "  leading",
    "trailing  ",
    "\0",
    "a\0b",
    "\r\n\r\n",
    "\t\t  \n ",
    "a\u2581b",
    "\u2581",
    "\ufeffx",
    "e\u0301",
    "👩‍👩‍👧‍👦🀄",
    "\U0010ffff",
    "中文 and English，混合。",
    "ＡＢＣ",
    "1234567890",
    "x" * 300,
    "\ud7ff\ue000",
]
LITERAL = ["<s>", "</s><mask>", "<pad> <unk>", "<extra_id_0>", "<0x41>"]
BYTE_LITERALS = ["<0x41>", "a <0x0A> b", "<0xFF><0x00>", "<0x4>", "<<0x41>>", "*" * 70, "½①Ⅷ३9"]
KINDS = ("bpe", "unigram", "char")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> SentencePieceTokenizer:
    config = TokenizerConfig(model_type=request.param, vocab_size=420, n_sentinels=3, character_coverage=1.0)
    return train_tokenizer(CORPUS, config)


@given(text=st.text(st.characters(exclude_categories=("Cs",))))
@settings(max_examples=300, deadline=None)
def test_decoding_gives_the_text_back(tokenizer: SentencePieceTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("text", EDGE + LITERAL)
def test_edges_come_back_and_are_never_control(tokenizer: SentencePieceTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
    assert tokenizer.encode_batch([text, text])[1] == ids


def test_special_tokens_have_the_usual_places(tokenizer: SentencePieceTokenizer):
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert tokenizer.sentinel_ids() == [5, 6, 7]
    assert tokenizer.encode("a", bos=True, eos=True)[0] == 2
    assert tokenizer.encode("a", bos=True, eos=True)[-1] == 3
    assert tokenizer.token_bytes()[:8].sum() == 0
    assert tokenizer.special_id("<nothing>") is None


def samples(n: int) -> list[str]:
    rng = random.Random(0)
    whole = "".join(CORPUS)
    cuts = [whole[(at := rng.randrange(len(whole))) : at + rng.randrange(60)] for _ in range(n)]
    wild = [
        "".join(chr(rng.choice((32, 10, 0x4E00, 0x1F600, 97, 0x2581)) + rng.randrange(20)) for _ in range(12))
        for _ in range(80)
    ]
    return EDGE + cuts + wild


def agree(tokenizer: SentencePieceTokenizer, ours: list[int], theirs: list[int]) -> bool:
    """Tell whether ids are equal, or those of a unigram model's equally likely other segmentation of the text."""
    scores = [score for _, score in tokenizer.scored_pieces()]
    is_unigram = any(score != int(score) for score in scores)
    totals = [sum(scores[index] for index in ids) for ids in (ours, theirs)]
    return ours == theirs or (is_unigram and totals[0] == pytest.approx(totals[1], rel=1e-6))


def test_tokenizer_json_gives_the_same_ids_and_texts(tokenizer: SentencePieceTokenizer):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    reader = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    texts = samples(300) + BYTE_LITERALS
    assert len(texts) > 400
    for text in texts:
        ours, theirs = tokenizer.encode(text), reader.encode(text, add_special_tokens=False).ids
        assert agree(tokenizer, ours, theirs), text
        assert reader.decode(ours) == text
    assert [reader.encode(text, add_special_tokens=False).ids for text in BYTE_LITERALS] == tokenizer.encode_batch(
        BYTE_LITERALS
    )


@pytest.mark.interop
def test_transformers_gives_the_same_ids(tokenizer: SentencePieceTokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(theirs).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    for text in samples(300) + BYTE_LITERALS:
        assert agree(tokenizer, tokenizer.encode(text), theirs.encode(text, add_special_tokens=False)), text
    assert theirs.mask_token_id == tokenizer.mask_id


def best_segmentation(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    """Return the most probable pieces (Viterbi), scores added up in float32; of equal ones the first found."""
    scored = tokenizer.scored_pieces()
    pieces = {piece: index for index, (piece, _) in enumerate(scored)}
    best = [(np.float32(0), -1, -1), *[(np.float32(-np.inf), -1, -1)] * len(text)]
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            index = pieces.get(text[start:end])
            if index is not None and best[start][0] + np.float32(scored[index][1]) > best[end][0]:
                best[end] = (best[start][0] + np.float32(scored[index][1]), start, index)
    ids: list[int] = []
    end = len(text)
    while end:
        _, end, index = best[end]
        ids.append(index)
    return ids[::-1]


def test_unigram_readers_part_only_where_rounding_decides_between_equals():
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    rows = [sign * n for sign in "*-" for n in range(1, 40)]
    tokenizer = train_tokenizer(CORPUS + rows * 20, TokenizerConfig(model_type="unigram", vocab_size=420))
    reader = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    for text in [sign * n for sign in "*-" for n in range(1, 120)]:
        ours = tokenizer.encode(text)
        assert ours == best_segmentation(tokenizer, text)
        assert agree(tokenizer, ours, reader.encode(text, add_special_tokens=False).ids)


def test_training_is_reproducible_byte_for_byte():
    config = TokenizerConfig(vocab_size=400)
    assert train_tokenizer(CORPUS, config).files() == train_tokenizer(iter(CORPUS), config).files()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_spaces_still_gives_them_back(kind: str):
    tokenizer = train_tokenizer(["床前明月光，疑是地上霜。"] * 20, TokenizerConfig(model_type=kind, vocab_size=290))
    assert tokenizer.is_lossless
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= tokenizer.files().keys()
    for text in [*EDGE, "a b  c\u2581 d"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_line_ends_are_learned():
    tokenizer = train_tokenizer(CORPUS, TokenizerConfig(vocab_size=420, character_coverage=1.0))
    assert [tokenizer.piece(index) for index in tokenizer.encode("\n")] == ["\n"]


def test_files_make_the_same_tokenizer(tokenizer: SentencePieceTokenizer):
    again = tokenizer_from_files(tokenizer.files())
    assert again.sha256 == tokenizer.sha256
    assert again.encode_batch(samples(20)) == tokenizer.encode_batch(samples(20))
    config = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert config["mask_token"] == "<mask>"


def test_words_start_at_spaces_and_at_chinese_characters(tokenizer: SentencePieceTokenizer):
    starts = tokenizer.word_starts()
    ids = tokenizer.encode("a list 白日 of")
    marks = [(tokenizer.piece_bytes(i).decode(), bool(starts[i])) for i in ids]
    assert all(is_start for text, is_start in marks if text[0] in " 白日")
    assert not any(is_start for text, is_start in marks if text[0].isascii() and text[0].isalpha())
    assert not starts[tokenizer.bos_id]


def test_a_small_vocabulary_names_what_is_needed():
    with pytest.raises(UsageError, match=r"`tokenizer.vocab_size` 50 is too small") as caught:
        train_tokenizer(CORPUS, TokenizerConfig(vocab_size=50))
    assert "--set tokenizer.vocab_size=" in caught.value.hint


def test_a_vocabulary_that_is_not_given_fits_the_text():
    from llmctl.tokenizer.train import fitting_vocab_size

    assert fitting_vocab_size(["plain English text"], TokenizerConfig()) == 2048
    chinese = "".join(chr(0x4E00 + n) for n in range(3000))
    assert fitting_vocab_size([chinese], TokenizerConfig()) == 8192
    assert fitting_vocab_size(["x" * 9_000_000], TokenizerConfig()) == 8192
    assert train_tokenizer([chinese] * 3, TokenizerConfig()).vocab_size > 3000


def test_no_text_is_one_clear_error():
    with pytest.raises(UsageError, match="no text"):
        train_tokenizer([], TokenizerConfig(vocab_size=400))


def test_a_vocabulary_larger_than_the_corpus_is_smaller_than_asked():
    assert train_tokenizer(["ab abc"], TokenizerConfig(vocab_size=5000)).vocab_size < 300


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x0a\x05hello", bytes(range(256)) * 4])
def test_a_damaged_model_is_refused(content: bytes):
    with pytest.raises(ArtifactError, match=r"tokenizer\.model"):
        SentencePieceTokenizer(content)


def test_the_sample_is_even_and_bounded():
    texts = [f"{index:04d}" for index in range(1000)]
    kept = list(sampled(texts, 400))
    assert sum(map(len, kept)) <= 400
    gaps = {int(b) - int(a) for a, b in itertools.pairwise(kept)}
    assert len(gaps) == 1
    assert list(sampled(texts, 10**6)) == texts


def test_every_character_of_shakespeare_is_one_token(shared_data):
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    tokenizer = train_tokenizer([text], TokenizerConfig(model_type="char"))
    assert len(set(text)) == 65
    assert all(len(tokenizer.encode(character)) == 1 for character in set(text))
    assert len(tokenizer.encode(text)) == len(text)


def test_tang_poems_come_back(shared_data):
    from llmctl.data.sources import read_documents

    path = str(shared_data / "chinese-poetry-tang" / "quantangshi.jsonl.gz")
    poems = [text for text, _ in zip(read_documents([path], text_key="paragraphs"), range(3000), strict=False)]
    tokenizer = train_tokenizer(poems, TokenizerConfig(vocab_size=6000))
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(poems)] == poems


@pytest.mark.parametrize("legacy", [True, False])
def test_a_text_that_goes_on_gets_no_dummy_prefix(legacy: bool):
    config = json.dumps({"legacy": legacy}).encode()
    tokenizer = tokenizer_from_files({"tokenizer.model": published(CORPUS, 340), "tokenizer_config.json": config})
    prefixed = tokenizer.encode("list")
    bare = tokenizer.encode_next("list", after_special=False)
    assert tokenizer.decode_bytes(prefixed) == b" list"
    assert tokenizer.decode_bytes(bare) == b"list"
    assert tokenizer.encode_next("list", after_special=True) == (prefixed if legacy else bare)
    for after_special in (True, False):
        assert tokenizer.encode_next(" list", after_special=after_special) == prefixed
    ids = [*tokenizer.encode("a"), *tokenizer.encode_next(" list\n", after_special=False)]
    assert tokenizer.decode(ids) == "a list\n"
    assert set(tokenizer.special_tokens()) == {"<unk>", "<s>", "</s>"}


def test_our_own_have_no_prefix_to_leave_out(tokenizer: SentencePieceTokenizer):
    for text in ("list", " list", "", "诗"):
        assert tokenizer.encode_next(text, after_special=True) == tokenizer.encode(text)
    assert {name: token.token_id for name, token in tokenizer.special_tokens().items()} == tokenizer.specials()


@pytest.mark.parametrize("text", [text for text in EDGE if text] + BYTE_LITERALS + [CORPUS[1]])
def test_tokens_know_their_characters(tokenizer: SentencePieceTokenizer, text: str):
    ids, spans = tokenizer.encode_with_spans([text])[0]
    assert ids == tokenizer.encode(text)
    at = 0
    for number, (begin, end) in enumerate(spans):
        if (begin, end) == spans[number - 1] and number:  # another byte of the same character
            continue
        assert begin == at
        parts = [index for index, span in zip(ids, spans, strict=True) if span == (begin, end)]
        assert tokenizer.decode_bytes(parts).decode() == text[begin:end]
        at = end
    assert at == len(text)


def test_a_published_model_tells_the_characters_of_normalized_text():
    """The dummy space stands for no character, two spaces for one, and a full-width letter for a narrow one."""
    from tests.support.spm import trained

    tokenizer = SentencePieceTokenizer(trained())
    text = "the  ＣＡＴ 猫"
    ids, spans = tokenizer.encode_with_spans([text])[0]
    assert ids == tokenizer.encode(text)
    assert spans[0][0] == 0
    assert spans[-1] == (9, 10)
    assert "".join(text[begin:end] for begin, end in spans).replace(" ", "") == "theＣＡＴ猫"
