"""Published sentencepiece tokenizers: ids by construction, frames, files, and what is refused."""

import json
import pickle
from functools import cache

import pytest
import sentencepiece

from llmctl.errors import ArtifactError, UsageError
from llmctl.tokenizer.base import Frame
from llmctl.tokenizer.load import find_tokenizer, load_tokenizer
from llmctl.tokenizer.published_sentencepiece import PublishedPieces, from_sentencepiece, with_class
from llmctl.tokenizer.sentencepiece_classes import CLASSES, SPIECE
from tests.support.bpe import byte_level
from tests.support.spm import folder_files, sentences, trained

TEXTS = ["the cat sat", "Hello World !", "猫坐在垫子上。", "naïve café 12 345", "", "a"]
OFFSETS = {"T5": 0, "Pegasus": 103, "Albert": 0, "BigBird": 0, "DebertaV2": 0, "XLMRoberta": 1, "Camembert": 4}
OFFSETS |= {"MBart": 1, "MBart50": 1, "Nllb": 1, "XGLM": 1}


@cache
def published(name: str) -> dict[str, bytes]:
    return folder_files(name)


def processor(name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=published(name)[CLASSES[name].model])


@pytest.mark.parametrize("name", OFFSETS)
def test_ids_are_those_of_the_pieces_moved_by_the_offset(name):
    ours, model = find_tokenizer(published(name)), processor(name)
    for text in TEXTS:
        seen = text.lower().replace("ï", "i").replace("é", "e") if name == "Albert" else text
        ids = [ours.unk_id if i == model.unk_id() else i + OFFSETS[name] for i in model.encode(seen)]
        assert ours.encode(text) == ids
    assert ours.encode_batch(["the cat", "a"]) == [ours.encode("the cat"), ours.encode("a")]


@pytest.mark.parametrize("name", CLASSES)
def test_texts_come_back_and_special_tokens_are_omitted(name):
    ours = find_tokenizer(published(name))
    frame = ours.frame("encoder")
    for text in ["the cat sat on a mat", "猫坐在垫子上。", "ein kleiner frosch"] if name != "Marian" else ["the cat"]:
        ids = [i for i in ours.encode(text) if i != ours.unk_id]
        assert ours.decode([*frame.before, *ids, *frame.after]) == ours.decode(ids)
        assert (ours.decode(ids) == text) == (len(ids) == len(ours.encode(text)))
    assert ours.decode_bytes([*frame.before, *frame.after]) == b""
    assert all(0 <= i < ours.vocab_size for i in ours.special_tokens().values() for i in i[:1])


@pytest.mark.parametrize("name", CLASSES)
def test_special_tokens_in_a_text_are_text(name):
    ours = find_tokenizer(published(name))
    special = {token.token_id for token in ours.special_tokens().values()} - {ours.unk_id}
    for token in ours.special_tokens():
        assert not special & set(ours.encode(f"the {token} cat"))


@pytest.mark.parametrize("name", CLASSES)
def test_files_pickles_and_the_digest_tell_the_same_tokenizer(name):
    ours = find_tokenizer(published(name))
    for again in (find_tokenizer(ours.files()), pickle.loads(pickle.dumps(ours))):
        assert (again.sha256, again.vocab_size) == (ours.sha256, ours.vocab_size)
        assert again.encode("the cat") == ours.encode("the cat")
        assert again.frame("encoder") == ours.frame("encoder")
    target = pickle.loads(pickle.dumps(ours.for_target))
    assert target.encode("the cat sat") == ours.for_target.encode("the cat sat")


def test_special_tokens_have_their_published_ids():
    n = {name: processor(name).get_piece_size() for name in OFFSETS}
    t5, pegasus = find_tokenizer(published("T5")), find_tokenizer(published("Pegasus"))
    assert t5.sentinel_ids() == [n["T5"] + 99 - index for index in range(100)]
    assert (t5.pad_id, t5.eos_id, t5.unk_id, t5.vocab_size) == (0, 1, 2, n["T5"] + 100)
    names = ("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>", "<unk_102>")
    assert [pegasus.special_id(name) for name in names] == [0, 1, 2, 3, 4, 104]
    assert (pegasus.unk_id, pegasus.mask_id) == (105, 3)
    xlmr, camembert = find_tokenizer(published("XLMRoberta")), find_tokenizer(published("Camembert"))
    assert (xlmr.bos_id, xlmr.pad_id, xlmr.eos_id, xlmr.unk_id, xlmr.mask_id) == (0, 1, 2, 3, n["XLMRoberta"] + 1)
    end = n["Camembert"] + 4
    assert (camembert.bos_id, camembert.eos_id, camembert.mask_id, camembert.vocab_size) == (5, 6, end, end + 1)
    mbart, mbart50, nllb = (find_tokenizer(published(name)) for name in ("MBart", "MBart50", "Nllb"))
    assert [mbart.special_id(code) for code in ("ar_AR", "en_XX", "zh_CN", "<mask>")] == [
        n["MBart"] + index for index in (1, 4, 25, 26)
    ]
    assert mbart50.special_id("sl_SI") == n["MBart50"] + 52
    assert (nllb.special_id("ace_Arab"), nllb.mask_id) == (n["Nllb"] + 1, n["Nllb"] + 203)
    deberta = find_tokenizer(published("DebertaV2"))
    assert (deberta.pad_id, deberta.bos_id, deberta.eos_id, deberta.unk_id) == (0, 1, 2, 3)
    assert deberta.mask_id == n["DebertaV2"]


@pytest.mark.parametrize(
    ("name", "config", "frame"),
    [
        ("T5", {}, "|</s>|</s>"),
        ("Pegasus", {}, "||</s>"),
        ("Albert", {}, "[CLS]|[SEP]|[SEP]"),
        ("BigBird", {}, "[CLS]|[SEP]|[SEP]"),
        ("DebertaV2", {}, "[CLS]|[SEP]|[SEP]"),
        ("XLMRoberta", {}, "<s>|</s> </s>|</s>"),
        ("Camembert", {}, "<s>|</s> </s>|</s>"),
        ("XGLM", {}, "</s>|</s> </s>|"),
        ("MBart", {"src_lang": "de_DE", "tgt_lang": "ro_RO"}, "||</s> de_DE"),
        ("MBart50", {}, "en_XX||</s>"),
        ("Nllb", {"src_lang": "deu_Latn"}, "deu_Latn||</s>"),
        ("Nllb", {"legacy_behaviour": True}, "||</s> eng_Latn"),
        ("M2M100", {"src_lang": "fr"}, "__fr__||</s>"),
        ("Marian", {}, "||</s>"),
    ],
)
def test_texts_stand_in_the_frame_of_the_class(name, config, frame):
    files = published(name) | {
        "tokenizer_config.json": json.dumps({"tokenizer_class": f"{name}Tokenizer"} | config).encode()
    }
    ours = find_tokenizer(files)
    wanted = Frame(*(tuple(ours.special_id(token) for token in part.split()) for part in frame.split("|")))
    assert ours.frame("encoder") == wanted


def test_targets_have_the_tokens_of_their_language():
    languages = {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}
    ours = find_tokenizer(folder_files("Nllb", **languages))
    assert ours.for_target.frame("encoder_decoder").before == (ours.special_id("fra_Latn"),)
    assert ours.frame("encoder_decoder").before == (ours.special_id("eng_Latn"),)
    assert ours.for_target.for_target is ours.for_target
    plain = find_tokenizer(published("T5"))
    assert plain.for_target is plain
    with pytest.raises(ArtifactError, match="language `xx`"):
        find_tokenizer(folder_files("Nllb", src_lang="xx"))


def test_albert_reads_lower_case_without_accents_and_splits_commas_from_numbers():
    ours = find_tokenizer(published("Albert"))
    assert ours.encode("  Naïve   CAFÉ\n") == ours.encode("naive cafe")
    assert ours.encode("``cat''") == ours.encode('"cat"')
    config = {"do_lower_case": False, "keep_accents": True}
    exact = find_tokenizer(folder_files("Albert", **config))
    assert exact.encode("naïve Hello") != exact.encode("naive hello")
    assert exact.sha256 != ours.sha256
    proto = trained(user_defined_symbols=["7,"], control_symbols=["[CLS]", "[SEP]", "[MASK]"])
    files = {SPIECE: proto, "tokenizer_config.json": b'{"tokenizer_class": "AlbertTokenizer"}'}
    pieces = [find_tokenizer(files).piece(index) for index in find_tokenizer(files).encode("67, 7, 5")]
    assert "7," not in pieces
    assert "".join(pieces) == "▁67,▁7,▁5"


def test_marian_looks_pieces_up_by_name_in_one_vocabulary():
    files = published("Marian")
    ours, ids = find_tokenizer(files), json.loads(files["vocab.json"])
    for tokenizer, file in ((ours, "source.spm"), (ours.for_target, "target.spm")):
        model = sentencepiece.SentencePieceProcessor(model_proto=files[file])
        for text in (*TEXTS, *list(sentences())[:20]):
            assert tokenizer.encode(text) == [
                ids.get(piece, ids["<unk>"]) for piece in model.encode(text, out_type=str)
            ]
    assert any(ours.encode(text) != ours.for_target.encode(text) for text in sentences())
    assert ours.sha256 != ours.for_target.sha256
    assert (ours.pad_id, ours.eos_id, ours.bos_id, ours.mask_id) == (ids["<pad>"], ids["</s>"], None, None)
    coded = ours.encode(">>de<< the cat")
    assert coded == [ids[">>de<<"], *ours.encode("the cat")]
    assert ours.decode(coded).startswith(">>de<<")
    assert ours.encode(">>xx<< the cat") == [ours.unk_id, *ours.encode("the cat")]


def test_targets_of_two_vocabularies_have_ids_of_their_own():
    files = folder_files("Marian", separate_vocabs=True)
    ours = find_tokenizer(files)
    for tokenizer, model, vocabulary in (
        (ours, "source.spm", "vocab.json"),
        (pickle.loads(pickle.dumps(ours)).for_target, "target.spm", "target_vocab.json"),
    ):
        ids, pieces = json.loads(files[vocabulary]), sentencepiece.SentencePieceProcessor(model_proto=files[model])
        assert tokenizer.vocab_size == len(ids)
        for text in list(sentences())[:20]:
            wanted = pieces.encode(text, out_type=str)
            assert tokenizer.encode(text) == [ids.get(piece, ids["<unk>"]) for piece in wanted]
            kept = "".join(piece for piece in wanted if piece in ids)
            known = [index for index in tokenizer.encode(text) if index != ids["<unk>"]]
            assert tokenizer.decode(known) == kept.replace("\u2581", " ").removeprefix(" ")
    assert ours.for_output("encoder_decoder") is ours.for_target
    assert ours.for_output("decoder") is ours
    # Tokenizers that differ only in the targets' vocabulary are different.
    ids = json.loads(files["target_vocab.json"])
    other = {piece: len(ids) - 1 - index for piece, index in ids.items()}
    assert find_tokenizer(files | {"target_vocab.json": json.dumps(other).encode()}).sha256 != ours.sha256
    assert find_tokenizer(ours.files()).sha256 == ours.sha256
    with pytest.raises(ArtifactError, match=r"lacks its `target_vocab\.json`"):
        find_tokenizer({name: data for name, data in files.items() if name != "target_vocab.json"})


def test_added_tokens_and_additional_special_tokens_come_last():
    base = find_tokenizer(published("XLMRoberta"))
    size, known = base.vocab_size, base.piece(9)
    config = {"additional_special_tokens": ["<a>", known, "<b>"]}
    listed = {"added_tokens_decoder": {str(size): {"content": "<b>", "special": True}}}
    ours = find_tokenizer(folder_files("XLMRoberta", **config, **listed))
    assert (ours.special_id("<b>"), ours.special_id("<a>"), ours.vocab_size) == (size, size + 1, size + 2)
    assert (ours.special_id(known), ours.piece_bytes(9)) == (9, b"")
    assert ours.frame("encoder") == find_tokenizer(published("XLMRoberta")).frame("encoder")
    user = {"added_tokens_decoder": {str(size): {"content": "<tool>", "special": False}}}
    ours = find_tokenizer(folder_files("MBart50", added_tokens_decoder={}, tgt_lang="fr_XX"))
    tool = find_tokenizer(folder_files("XLMRoberta", **user))
    assert tool.encode("the <tool> cat").count(size) == 1
    assert tool.decode(tool.encode("the <tool> cat")) == "the<tool> cat"  # as sentencepiece ends a text
    assert tool.decode([*tool.encode("sat"), *tool.encode_next("sat", after_special=False)]) == "satsat"
    assert tool.decode([*tool.encode("sat"), *tool.encode_next(" sat", after_special=False)]) == "sat sat"
    added = {
        **folder_files("MBart50", tgt_lang="fr_XX"),
        "added_tokens.json": json.dumps({"<x>": ours.vocab_size}).encode(),
    }
    both = find_tokenizer(added)
    assert both.for_target.frame("").before == (both.special_id("fr_XX"),)
    assert both.for_target.vocab_size == ours.vocab_size + 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"model_type": "t5"}, "T5"),
        ({"model_type": "umt5"}, "T5"),
        ({"model_type": "pegasus"}, "Pegasus"),
        ({"model_type": "albert"}, "Albert"),
        ({"tokenizer_class": "XLMRobertaTokenizer", "model_type": "bert"}, "XLMRoberta"),
        ({"model_type": "bert", "vocab_size": "XLMRoberta"}, "XLMRoberta"),
        ({"model_type": "mbart", "vocab_size": "MBart"}, "MBart"),
        ({"model_type": "mbart", "vocab_size": "MBart50"}, "MBart50"),
        ({"model_type": "m2m_100"}, "Nllb"),
        ({"model_type": "m2m_100"}, "M2M100"),
        ({"tokenizer_class": "MT5Tokenizer"}, "T5"),
    ],
    ids=str,
)
def test_the_class_is_that_of_the_models_config(model, name, tmp_path):
    model = dict(model)
    if "vocab_size" in model:
        model["vocab_size"] = find_tokenizer(published(str(model["vocab_size"]))).vocab_size
    bare = {file: data for file, data in published(name).items() if file != "tokenizer_config.json"}
    assert find_tokenizer(with_class(bare, model)).sha256 == find_tokenizer(published(name)).sha256
    for file, data in (bare | {"config.json": json.dumps(model).encode()}).items():
        (tmp_path / file).write_bytes(data)
    for path in (tmp_path, tmp_path / CLASSES[name].model):
        assert load_tokenizer(path).sha256 == find_tokenizer(published(name)).sha256


def test_files_that_no_other_class_has_tell_it():
    for name in ("Marian", "DebertaV2"):
        bare = {file: data for file, data in published(name).items() if file != "tokenizer_config.json"}
        assert find_tokenizer(bare).encode("the cat") == find_tokenizer(published(name)).encode("the cat")


@pytest.mark.parametrize("model", [{}, {"model_type": "bert", "vocab_size": 7}, {"model_type": "xlnet"}], ids=str)
@pytest.mark.parametrize("name", ["XLMRoberta", "T5"])
def test_an_unknown_class_is_refused(name, model):
    bare = {CLASSES[name].model: published(name)[CLASSES[name].model]}
    with pytest.raises(ArtifactError, match="does not tell which tokenizer class") as error:
        find_tokenizer(with_class(bare, model))
    assert f"{name}Tokenizer" in error.value.hint


def test_another_class_is_refused_by_name():
    files = published("T5") | {"tokenizer_config.json": b'{"tokenizer_class": "XLNetTokenizer"}'}
    with pytest.raises(ArtifactError, match=r"`XLNetTokenizer` reads `spiece\.model` in a way of its own"):
        find_tokenizer(files)


def test_a_damaged_model_is_refused_by_its_name():
    with pytest.raises(ArtifactError, match=r"`spiece\.model` is not a sentencepiece model"):
        find_tokenizer(published("T5") | {SPIECE: b"\x00\x01"})
    missing = {file: data for file, data in published("Marian").items() if file != "vocab.json"}
    with pytest.raises(ArtifactError, match=r"`source\.spm` lacks its `vocab\.json`"):
        find_tokenizer(missing)
    for key, value in {"extra_ids": "many", "extra_ids ": -1, "extra_ids  ": 10**9}.items():
        with pytest.raises(ArtifactError, match="extra_ids"):
            from_sentencepiece(folder_files("T5", **{key.strip(): value}))


@pytest.mark.parametrize(
    ("token", "named"), [("</s>", "`vocab.json` has no `</s>`"), ("<unk>", "`vocab.json` has no token")]
)
def test_a_vocabulary_without_a_token_is_refused_by_name(token, named):
    files = published("Marian")
    ids = {piece: index for piece, index in json.loads(files["vocab.json"]).items() if piece != token}
    with pytest.raises(ArtifactError, match=named):
        find_tokenizer(files | {"vocab.json": json.dumps(ids).encode()})


@pytest.mark.parametrize("value", [3, ["a"], "x", True], ids=str)
def test_a_damaged_list_of_added_tokens_is_refused(value):
    with pytest.raises(ArtifactError, match="`added_tokens_decoder`"):
        find_tokenizer(folder_files("T5", added_tokens_decoder=value))


def test_a_tokenizer_json_is_preferred():
    assert not isinstance(find_tokenizer(published("T5") | byte_level()), PublishedPieces)


@pytest.mark.parametrize("name", ["XLMRoberta", "Camembert"])
def test_tokens_know_their_characters(name):
    ours = find_tokenizer(published(name))
    for text in ["the cat sat on a mat", "猫坐在垫子上。", ""]:
        ids, spans = ours.encode_with_spans([text])[0]
        assert ids == ours.encode(text)
        assert "".join(text[begin:end] for begin, end in spans) == text
        assert [text[b:e].strip() for b, e in spans] == [
            ours.decode([i]) if i != ours.unk_id else text[b:e].strip() for i, (b, e) in zip(ids, spans, strict=True)
        ]


@pytest.mark.parametrize(
    "text", ["  The ``CAT''  sat,\n on  12 Mats ", "naïve CAFÉ 猫坐在垫子上。", "345, 67", "", " ", "ﬁve Ｃａｔs"]
)
@pytest.mark.parametrize("name", ["Albert", "DebertaV2"])
def test_places_are_those_in_the_text_before_it_is_changed(name, text):
    ours = find_tokenizer(published(name))
    ids, spans = ours.encode_with_spans([text])[0]
    assert ids == ours.encode(text)
    assert len(ids) == len(spans)
    seen = "".join(text[begin:end] for begin, end in dict.fromkeys(spans))
    assert "".join(seen.split()) == "".join(text.split())
    assert spans == sorted(spans)


def test_pieces_that_are_looked_up_by_name_do_not_tell_their_place():
    with pytest.raises(UsageError, match="does not tell where"):
        find_tokenizer(published("Marian")).encode_with_spans(["the cat"])
