"""sentencepiece tokenizers of published models give transformers' ids, and opus-mt works from its own files."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from llmctl.inference.encoding import encode_prompt, encode_target
from llmctl.tokenizer.languages import M2M, NLLB
from llmctl.tokenizer.load import load_tokenizer
from llmctl.tokenizer.sentencepiece_classes import CLASSES
from tests.support.spm import folder_files, sentences
from tests.support.tuning import SMALL

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")]

TEXTS = [
    "the cat sat on a mat",
    "Hello World!",
    "猫坐在垫子上。",
    "12,345 b 67, 8.9",
    "two  spaces   here",
    " lead",
    "trail ",
    "",
    "x 😀 y",
    "naïve café Ünïcode",
    "line\nbreak",
    "tab\there",
    "ＡＢＣ ½",
    "``quoted'' cat",
    "the <b> cat",
    "zzz qqq",
]
TRAILING = "a space at the end, which sentencepiece drops, is a token there"
CHARACTERS = "the model's own table of characters is left out there"
DIFFERENT = {
    "Pegasus": {"trail ": TRAILING},
    "BigBird": {"trail ": TRAILING} | dict.fromkeys(["line\nbreak", "tab\there", "ＡＢＣ ½"], CHARACTERS),
    "DebertaV2": {"ＡＢＣ ½": CHARACTERS},
    "MBart": {"ＡＢＣ ½": CHARACTERS},
    "MBart50": {"trail ": TRAILING},
    "Nllb": {"trail ": TRAILING},
}
"""Where the classes of transformers 5 do not give what sentencepiece gives, as the models were trained and those of 4 did."""

CONFIGS = {
    # As published, with all languages listed: transformers 5 knows no others, or not as special.
    "Nllb": {"src_lang": "deu_Latn", "tgt_lang": "fra_Latn"},
    "MBart": {"src_lang": "de_DE", "tgt_lang": "ro_RO"},
    "MBart50": {"src_lang": "de_DE", "tgt_lang": "fr_XX"},
    "M2M100": {
        "src_lang": "de",
        "tgt_lang": "fr",
        "additional_special_tokens": [f"__{code}__" for code in M2M.split()],
    },
}
COMPARED = [name for name in CLASSES if name != "XGLM"]
"""transformers 5 has no XGLMTokenizer that reads `sentencepiece.bpe.model`; tests/tokenizer compares the ids with it."""


@cache
def files_of(name: str) -> dict[str, bytes]:
    config = CONFIGS.get(name, {})
    files = folder_files(name, **config)
    if name == "Nllb":
        size = sentencepiece.SentencePieceProcessor(model_proto=files[CLASSES[name].model]).get_piece_size() + 1
        tokens = [*NLLB.split(), "<mask>"]
        listed = {str(size + n): {"content": token, "special": True} for n, token in enumerate(tokens)}
        files = folder_files(name, **config, added_tokens_decoder=listed, additional_special_tokens=tokens[:-1])
    return files


def written(name: str, folder: Path) -> Path:
    for file, data in files_of(name).items():
        (folder / file).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_ids_and_texts_are_those_of_transformers(name, tmp_path):
    folder = written(name, tmp_path)
    ours, theirs = load_tokenizer(folder), getattr(transformers, f"{name}Tokenizer").from_pretrained(folder)
    before, between, after = ours.frame("encoder")
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = ours.encode(text)
        expected = theirs(text, add_special_tokens=False).input_ids
        assert (ids == expected) == (text not in DIFFERENT.get(name, {})), text
        assert [*before, *expected, *after] == theirs(text).input_ids
        expected = theirs(text).input_ids
        # The older classes strip what they decode at both ends.
        mine, other = ours.decode(expected), theirs.decode(expected, skip_special_tokens=True)
        assert (mine.strip() if CLASSES[name].vocabulary else mine) == other
    pair = theirs("the cat", "Hello").input_ids
    assert pair == [*before, *ours.encode("the cat"), *between, *ours.encode("Hello"), *after]
    special = {token: theirs.convert_tokens_to_ids(token) for token in ours.special_tokens()}
    assert special == {token: special.token_id for token, special in ours.special_tokens().items()}


@pytest.mark.parametrize("name", COMPARED)
def test_special_tokens_in_a_text_are_taken_as_text(name, tmp_path):
    """On purpose: in transformers a user's text can contain control tokens."""
    folder = written(name, tmp_path)
    ours, theirs = load_tokenizer(folder), getattr(transformers, f"{name}Tokenizer").from_pretrained(folder)
    end = ours.piece(ours.eos_id)
    text = f"the {end} cat"
    assert ours.eos_id in theirs(text, add_special_tokens=False).input_ids
    assert ours.eos_id not in ours.encode(text)


@pytest.mark.parametrize("name", ["Marian", "MBart50", "Nllb", "M2M100"])
def test_targets_are_those_of_transformers(name, tmp_path):
    folder = written(name, tmp_path)
    ours, theirs = load_tokenizer(folder), getattr(transformers, f"{name}Tokenizer").from_pretrained(folder)
    target = ours.for_target
    before, _, after = target.frame("encoder_decoder")
    for text in sentences():
        assert [*before, *target.encode(text), *after] == theirs(text_target=text).input_ids


@pytest.fixture(scope="module", params=["one vocabulary", "two vocabularies"])
def opus(request, tmp_path_factory) -> Path:
    """A random model as opus-mt is published: two sentencepiece models, one vocabulary or two, no tokenizer.json."""
    folder, is_double = tmp_path_factory.mktemp("opus"), request.param == "two vocabularies"
    double = {"separate_vocabs": True} if is_double else {}
    files = folder_files("Marian", source_lang="en", target_lang="de", **double)
    ids = json.loads(files["vocab.json"])
    config = transformers.MarianConfig(
        vocab_size=len(ids),
        decoder_vocab_size=len(json.loads(files["target_vocab.json" if is_double else "vocab.json"])),
        share_encoder_decoder_embeddings=not is_double,
        tie_word_embeddings=not is_double,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        scale_embedding=True,
        activation_function="swish",
        static_position_embeddings=True,
        normalize_embedding=False,
        bos_token_id=0,
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        decoder_start_token_id=ids["<pad>"],
        forced_eos_token_id=None,
        init_std=0.4,
    )
    torch.manual_seed(0)
    transformers.MarianMTModel(config).save_pretrained(folder)
    for file, data in files.items():
        # The oldest of them name no class.
        (folder / file).write_bytes(
            data
            if file != "tokenizer_config.json"
            else json.dumps({"target_lang": "de", "source_lang": "en", **double}).encode()
        )
    return folder


def pairs_file(folder: Path) -> str:
    lines = list(sentences())[::2][:40]
    (folder / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairwise(lines)))
    return str(folder / "pairs.tsv")


def generated(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(["generate", *arguments, "-t", "0", "-n", "12", "-q"]) == 0
    return capsys.readouterr().out


def test_opus_mt_generates_what_transformers_does(opus, tmp_path, capsys):
    model = transformers.MarianMTModel.from_pretrained(opus).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(opus)
    imported = str(tmp_path / "imported")
    assert run(["import", str(opus), "-o", imported, "-q"]) == 0
    for text in [">>de<< the cat sat", "Hello World!", "猫坐在垫子上。"]:
        batch = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=12, do_sample=False, num_beams=1)[0]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        for folder in (str(opus), imported):
            assert generated(["-m", folder, text], capsys).strip() == expected
        given = " ".join(map(str, batch.input_ids[0].tolist()))
        out = generated(["-m", imported, "--ids", given], capsys).split()
        new = [i for i in ids.tolist()[1:] if i != model.config.eos_token_id]
        assert [int(word) for word in out][-len(new) :] == new


def test_sources_and_targets_of_opus_mt_are_those_of_transformers(opus):
    loaded, tokenizer = load_model(opus, device="cpu"), transformers.MarianTokenizer.from_pretrained(opus)
    for text in sentences():
        assert encode_prompt(loaded, text) == tokenizer(text).input_ids
        assert [*encode_target(loaded, text), tokenizer.eos_token_id] == tokenizer(text_target=text).input_ids


def test_opus_mt_is_trained_and_distilled_from_its_own_files(opus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = pairs_file(tmp_path)
    settings = [part for setting in SMALL if "adapter" not in setting for part in ("--set", setting)]
    line = ["--task", "translate", "--steps", "3", *settings, "-q"]
    assert run(["finetune", str(opus), pairs, *line, "-o", "tuned"]) == 0
    assert run(["distill", str(opus), "-d", pairs, *line, "--student", "layers=1", "--loss", "seq", "-o", "small"]) == 0
    original = load_tokenizer(opus)
    for name in ("tuned", "small"):
        assert load_tokenizer(Path(name)).sha256 == original.sha256
        assert transformers.MarianTokenizer.from_pretrained(name)("the cat").input_ids[:-1] == original.encode(
            "the cat"
        )
        generated(["-m", name, "the cat"], capsys)


def test_the_files_of_opus_mt_are_inspected_and_tokenize(opus, tmp_path, capsys):
    single = str(tmp_path / "opus.safetensors")
    assert run(["export", str(opus), "--to", "single", "-o", single]) == 0
    capsys.readouterr()
    assert run(["inspect", single, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == "sentencepiece (Marian)"
    assert load_tokenizer(Path(single)).encode("the cat") == load_tokenizer(opus).encode("the cat")
