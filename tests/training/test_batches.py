"""Batches of pairs hold what the tokenizer puts around sources and targets."""

from llmctl.config import ModelConfig, PretrainConfig
from llmctl.preparing.corpus import prepare_corpus
from llmctl.recipe import load
from llmctl.tokenizer.load import find_tokenizer
from llmctl.training.batches import make_batches
from tests.support.spm import folder_files


def test_sources_and_targets_of_mbart_have_their_languages(tmp_path):
    (tmp_path / "p.tsv").write_text("".join(f"the cat {n}\tein Frosch {n}\n" for n in range(30)))
    settings = ["objective=seq2seq", f"data.paths=[{tmp_path / 'p.tsv'}]", "train.batch_size=4", "train.seq_len=8"]
    config = load(PretrainConfig, settings=settings).config
    for name, languages in {
        "MBart": ("en_XX", "de_DE"),
        "MBart50": ("en_XX", "de_DE"),
        "Nllb": ("eng_Latn", "deu_Latn"),
    }.items():
        tokenizer = find_tokenizer(folder_files(name, src_lang=languages[0], tgt_lang=languages[1]))
        corpus = prepare_corpus(config, tmp_path / name, tokenizer, lambda _: None)
        model = ModelConfig(
            family="encoder_decoder",
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            decoder_start_id=tokenizer.eos_id,
        )
        batch = make_batches(config, corpus, model, shuffle=False).batch([0])
        source = [i for i in batch["input_ids_BT"][0].tolist() if i != tokenizer.pad_id]
        target = [i for i in batch["labels"][0].tolist() if i >= 0]
        codes = [tokenizer.special_id(code) for code in languages]
        assert len(source) <= 8
        if name == "MBart":  # its decoder starts with the language, which `decoder_start_token_id` says
            assert source[-2:] == [tokenizer.eos_id, codes[0]]
            assert codes[1] not in target
        else:
            assert (source[0], target[0]) == tuple(codes)
            assert source[-1] == tokenizer.eos_id
        assert target[-1] == tokenizer.eos_id
